"""Speed of loading data alone (read, decode, crop, resize, tokenise, stack) against webdataset and Pillow.

    pip install webdataset                           an oracle for this file only
    python tests/bench_data.py --data data/flickr8k/train --image-size 32 64 128
    python tests/bench_data.py --data data/flickr8k/train --make 2000 --side 256 --image-size 256

Ours is `training_batches` without workers, theirs the recipe that users write with webdataset. Both read the
same tars, warm in the file cache, and make the same uint8 batch and tokens with the same tokenizer. The two
take turns within one process of one thread, the median counts, and the rate is per second of processor time:
samples per second and core. A ratio above 1 means that ours is faster.
"""
import argparse
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import conftest     # noqa: F401  (puts the project on the import path)
import numpy as np
import torch
import webdataset
from PIL import Image

import data
from data import Source, TarSource, Tokenizer, training_batches

MIXED = 1000        # samples in webdataset's shuffle buffer


def write_tar(source: Source, path: Path, count: int, side: int) -> None:
    """`count` square pictures, enlarged from the source's, into a tar as img2dataset leaves it."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            sample, file = source.read(i % len(source)), io.BytesIO()
            pixels = np.asarray(sample.image.resize((side, side), Image.Resampling.BICUBIC))
            # Grain: enlarged pictures alone hold so little detail that they would decode faster than photos.
            pixels = (pixels + rng.normal(0, 4, (side, side, 1))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, "JPEG", quality=95)
            meta = {"caption": sample.captions[0], "key": f"{i:09d}", "status": "success", "sha256": "0" * 64}
            for suffix, raw in (("jpg", file.getvalue()), ("json", json.dumps(meta).encode()),
                                ("txt", sample.captions[0].encode())):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The usual centre crop. Written out: with ours it would be no comparison."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def recipe(tars: list[str], size: int, batch: int, seed: int, tokenizer: Tokenizer) -> Iterator:
    """Endless batches: uint8 [B, S, S, 3] and tokens [B, L]; shards, then MIXED samples shuffled, as
    webdataset's own examples do. The same shards again and again, as if there were many: at an epoch's end
    webdataset empties its buffer without reading, so that no round would be like another."""
    def collate(samples: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*samples)
        return torch.from_numpy(np.stack(images)), tokenizer(list(captions))
    stream = webdataset.WebDataset(tars * 10_000, shardshuffle=100, seed=seed).shuffle(MIXED).decode("pil")
    return iter(stream.to_tuple("jpg;jpeg;png;webp", "txt")
                .map_tuple(lambda image: squared(image, size), lambda caption: caption)
                .batched(batch, collation_fn=collate, partial=False))


def measure(source: TarSource, size: int, tokenizer: Tokenizer, args: argparse.Namespace) -> dict:
    """Samples per second of processor time of both, for one size."""
    steps, spent = -(-args.samples // args.batch), {"ours": [], "webdataset": []}
    runs = {"ours": training_batches(source, size, args.batch, args.seed, tokenizer=tokenizer),
            "webdataset": recipe(list(map(str, source.tars)), size, args.batch, args.seed, tokenizer)}
    for _ in itertools.islice(runs["webdataset"], -(-MIXED // args.batch)):    # until its buffer is full
        pass
    for round_ in range(args.rounds + args.warm_up):
        for name in sorted(runs, reverse=round_ % 2):             # neither is always the first
            data.clean.cache_clear()      # of millions of captions each is new to it; both clean by it
            before = time.process_time()
            for _ in itertools.islice(runs[name], steps):
                pass
            spent[name].append((time.process_time() - before) / (steps * args.batch))
    rates = {name: [1 / seconds for seconds in taken[args.warm_up:]] for name, taken in spent.items()}
    ours, theirs = (statistics.median(rates[name]) for name in runs)
    return {"image_size": size, "stored": list(source.read(0).image.size), "ratio": ours / theirs,
            "samples_per_second_per_core": {"ours": ours, "webdataset": theirs},
            "lowest_and_highest": {name: [min(rates[name]), max(rates[name])] for name in runs}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of tars with KEY.jpg and KEY.txt")
    parser.add_argument("--image-size", type=int, nargs="+", default=[64], help="px, one or more")
    parser.add_argument("--make", type=int, default=0, help="measure on so many JPEGs made from these photos")
    parser.add_argument("--side", type=int, default=512, help="px, of those")
    parser.add_argument("--batch", type=int, default=64, help="samples per batch")
    parser.add_argument("--samples", type=int, default=1024, help="samples of each per round")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = data.open_source(args.data)
    captions = (captions[0] for captions in data.usable_captions(source, 5000))
    tokenizer = Tokenizer.learn(captions, 4096)
    with tempfile.TemporaryDirectory() as folder:
        if args.make:
            write_tar(source, Path(folder, "0.tar"), args.make, args.side)
            source = data.open_source(folder)
        cases = [measure(source, size, tokenizer, args) for size in args.image_size]
    for case in cases:
        print(json.dumps(case, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps({"cases": cases, "torch": torch.__version__,
                                               "webdataset": webdataset.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
