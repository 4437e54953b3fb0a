"""Speed of loading data alone (read, decode, crop, resize, tokenise, stack) against webdataset and Pillow.

    pip install webdataset                           an oracle for this file only
    python tests/bench_data.py --data data/flickr8k/train --image-size 32 64 128
    python tests/bench_data.py --data data/flickr8k/train --make 2000 --side 256 --image-size 256
    python tests/bench_data.py --make 1000 --side 512 --image-size 256        no data: random pictures

Ours is `training_batches` without workers, theirs the recipe that users write with webdataset. Both read the
same tars, warm in the file cache, and make the same uint8 batch and tokens with the same tokenizer. The two
take turns within one process of one thread, the median counts, and the rate is per second of processor time:
samples per second and core. A ratio above 1 means that ours is faster.
"""
import argparse
import io
import itertools
import json
import platform
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import conftest     # noqa: F401  (puts the project on the import path)
import numpy as np
import PIL
import torch
import webdataset
from PIL import Image, features

import data
from data import Shapes, Source, TarSource, Tokenizer, TrainingBatches, training_batches


# ---------------------------------------------------------------- pictures larger than those at hand
def pictures(source: Source | None, width: int, height: int) -> Iterator[tuple[Image.Image, str]]:
    """Endless pictures of one size with a caption each: the source's, enlarged, or smooth random ones."""
    rng, words = np.random.default_rng(0), Shapes()
    for i in itertools.count():
        if source is None:
            picture = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
            caption = words.captions(i)[0]
        else:
            sample = source.read(i % len(source))
            picture, caption = sample.image, sample.captions[i // len(source) % len(sample.captions)]
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        # Grain: enlarged pictures alone hold so little detail that they would decode faster than photos do.
        grain = rng.normal(0, 4, (height, width, 1))
        yield Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)), caption


def write_tars(source: Source | None, folder: Path, count: int, side: int, aspect: float) -> None:
    """`count` pictures into tars as img2dataset leaves them: .jpg of quality 95, .txt and .json."""
    endless = pictures(source, round(side * aspect), side)
    for shard, first in enumerate(range(0, count, 1000)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(first, min(first + 1000, count)):
                image, caption = next(endless)
                coded = io.BytesIO()
                image.save(coded, "JPEG", quality=95)
                meta = {"caption": caption, "key": f"{i:09d}", "status": "success", "error_message": None,
                        "width": image.width, "height": image.height, "exif": "{}", "sha256": "0" * 64}
                for suffix, raw in (("jpg", coded.getvalue()), ("json", json.dumps(meta).encode()),
                                    ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))


# ---------------------------------------------------------------- theirs
MIXED = 1000        # samples in webdataset's shuffle buffer


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The usual centre crop. Written out: with ours it would be no comparison."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def stream(tars: list[str], seed: int) -> webdataset.WebDataset:
    """Undecoded samples, shards and then MIXED samples shuffled, as webdataset's own examples do.

    The same shards again and again, as if there were many: at an epoch's end webdataset empties its buffer
    without reading, and at a start it reads two samples for each, so that no round would be like another.
    """
    return webdataset.WebDataset(tars * 10_000, shardshuffle=100, seed=seed).shuffle(MIXED)


def recipe(tars: list[str], size: int, batch: int, seed: int, tokenizer: Tokenizer) -> Iterator:
    """Endless batches: uint8 [B, S, S, 3] and tokens [B, L]."""
    def collate(samples: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*samples)
        return torch.from_numpy(np.stack(images)), tokenizer(list(captions))

    return iter(stream(tars, seed).decode("pil").to_tuple("jpg;jpeg;png;webp", "txt")
                .map_tuple(lambda image: squared(image, size), lambda caption: caption)
                .batched(batch, collation_fn=collate, partial=False))


def difference(source: Source, tars: list[str], size: int, count: int = 64) -> tuple[int, float]:
    """Largest and mean difference of the pixels, of 255: not 0 where ours decoded at a part of the size."""
    plain = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple(
        "__key__", "jpg;jpeg;png;webp")
    theirs = {key: squared(image, size) for key, image in itertools.islice(plain, count)}
    ours = {s.key: data.to_square(s.image, size) for s in (source.read(i, size) for i in range(count))}
    both = [np.abs(ours[key].astype(int) - theirs[key]) for key in ours.keys() & theirs.keys()]
    if not both:
        raise SystemExit("the two read different samples: are there damaged ones at the start of the data?")
    return int(max(d.max() for d in both)), float(np.mean(both))


# ---------------------------------------------------------------- measuring
def forget(args: argparse.Namespace) -> None:
    """Both clean captions by the same cached function; with millions of captions each is new to it."""
    if not args.known_captions:
        data.clean.cache_clear()


def parts(batches: TrainingBatches, first: int, count: int, args: argparse.Namespace) -> dict[str, float]:
    """Processor seconds per sample in each step of our path, from the stream's sample number `first` on.

    One step after another as TrainingBatches takes them; the whole loop less these is its own bookkeeping.
    """
    source, size, spent = batches.source, batches.image_size, Counter()

    def timed(part: str, function, *values):
        start = time.process_time()
        result = function(*values)
        spent[part] += time.process_time() - start
        return result

    for begin in range(first, first + count, args.batch):
        squares, captions = [], []
        for position in range(begin, begin + args.batch):
            _, index = batches.index_at(position)
            for kind in ("txt", "json"):                 # once more, to tell it from what captions() does
                timed("reading captions", source.member, index, kind)
            captions.append(timed("parsing and cleaning captions", source.captions, index)[0])
            raw = timed("reading images", source.member, index, "image")
            image = timed("decoding", data.decode_image, raw, "", size)
            squares.append(timed("cropping and resizing", data.to_square, image, size))
        timed("stacking", lambda rows: torch.from_numpy(np.stack(rows)), squares)
        timed("tokenising", batches.tokenizer, captions)
        timed("words of the captions", lambda cs: frozenset(w for c in cs for w in data.words(c)), captions)
    spent["parsing and cleaning captions"] -= spent["reading captions"]
    return {part: seconds / count for part, seconds in spent.items()}


def measure(source: TarSource, tars: list[str], size: int, tokenizer: Tokenizer,
            args: argparse.Namespace) -> dict:
    """One case: rates of both, and where our time goes."""
    steps = -(-args.samples // args.batch)
    runs = {"ours": training_batches(source, size, args.batch, args.seed, tokenizer=tokenizer),
            "webdataset": recipe(tars, size, args.batch, args.seed, tokenizer)}
    # Where our time goes is told from the same samples; reading alone is what webdataset itself costs.
    inside = TrainingBatches(source, size, args.batch, args.seed, 0, 1, tokenizer, 100_000, None)
    raw = iter(stream(tars, args.seed))
    for endless, count in ((runs["webdataset"], -(-MIXED // args.batch)), (raw, MIXED)):
        for _ in itertools.islice(endless, count):       # until its buffer is full: then a read per sample
            pass
    cpu: dict[str, list[float]] = {name: [] for name in (*runs, "reading")}
    wall: dict[str, list[float]] = {name: [] for name in (*runs, "reading")}
    shares: list[dict[str, float]] = []
    for round_ in range(args.rounds + args.warm_up):
        turns = {**{name: (run, steps) for name, run in runs.items()}, "reading": (raw, steps * args.batch)}
        for name in (list(turns) if round_ % 2 else reversed(list(turns))):     # neither is always the first
            forget(args)
            started, before = time.perf_counter(), time.process_time()
            for _ in itertools.islice(*turns[name]):
                pass
            if round_ >= args.warm_up:
                cpu[name].append((time.process_time() - before) / (steps * args.batch))
                wall[name].append((time.perf_counter() - started) / (steps * args.batch))
        forget(args)
        spent = parts(inside, round_ * steps * args.batch, steps * args.batch, args)
        if round_ >= args.warm_up:
            shares.append(spent)
    ours, theirs, reading = (statistics.median(cpu[name]) for name in (*runs, "reading"))
    where = {part: statistics.median(s[part] for s in shares) for part in shares[0]}
    where["bookkeeping (the rest)"] = max(0.0, ours - sum(where.values()))
    largest, mean = difference(source, tars, size, min(64, len(source)))
    bytes_ = np.maximum(source.table["place"][:, TarSource.KINDS.index("image"), 1], 0)
    return {"image_size": size, "stored": list(source.read(0).image.size),
            "kilobytes_per_image": round(float(bytes_.mean()) / 1000, 1),
            "samples_per_second_per_core": {"ours": 1 / ours, "webdataset": 1 / theirs},
            "by_wall_clock": {name: 1 / statistics.median(wall[name]) for name in runs},
            "lowest_and_highest": {name: [1 / max(cpu[name]), 1 / min(cpu[name])] for name in runs},
            "ratio": theirs / ours, "microseconds_ours": {part: 1e6 * s for part, s in where.items()},
            "microseconds_webdataset_reading": 1e6 * reading,
            "pixel_difference": {"largest": largest, "mean": mean}}


def tell(case: dict) -> None:
    rate, spread = case["samples_per_second_per_core"], case["lowest_and_highest"]
    print(f"\n{case['stored'][0]} × {case['stored'][1]} px stored "
          f"({case['kilobytes_per_image']} kB on average) -> {case['image_size']} px wanted")
    for name, value in rate.items():
        low, high = spread[name]
        print(f"  {name:12s} {value:8.0f} samples/s and core   ({low:.0f} to {high:.0f}; "
              f"by wall clock {case['by_wall_clock'][name]:.0f})")
    apart = case["pixel_difference"]
    print(f"  ratio ours / webdataset: {case['ratio']:.3f}   (pixels differ by at most "
          f"{apart['largest']}, on average {apart['mean']:.2f}, of 255)")
    total = sum(case["microseconds_ours"].values())
    for part, micro in sorted(case["microseconds_ours"].items(), key=lambda item: -item[1]):
        print(f"    {part:32s} {100 * micro / total:5.1f} %   {micro:8.1f} µs a sample")
    print("    (webdataset's reading and mixing alone: "
          f"{case['microseconds_webdataset_reading']:.1f} µs a sample)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of tars with KEY.jpg and KEY.txt")
    parser.add_argument("--image-size", type=int, nargs="+", default=[64],
                        help="px that are wanted, one or more")
    parser.add_argument("--make", type=int, default=0, metavar="N",
                        help="measure on N JPEGs made from --data's photos, or at random without it")
    parser.add_argument("--side", type=int, default=512, help="px, the height of those")
    parser.add_argument("--aspect", type=float, default=1.0, help="their width divided by their height")
    parser.add_argument("--batch", type=int, default=64, help="samples per batch")
    parser.add_argument("--samples", type=int, default=1024, help="samples of each per round")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer",
                        help="CLIP's vocabulary, a file or a folder; else one of 4096 tokens is learnt")
    parser.add_argument("--known-captions", action="store_true",
                        help="keep the cache of cleaned captions, as in later epochs of a small data set")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    if not (args.data or args.make):
        parser.error("name --data DIR, or --make N")
    torch.set_num_threads(1)
    source = data.open_source(args.data) if args.data else None
    if source is not None and not isinstance(source, TarSource):
        parser.error(f"{args.data} holds no tars, and webdataset reads nothing else")
    with tempfile.TemporaryDirectory() as folder:
        if args.make:
            write_tars(source, Path(folder), args.make, args.side, args.aspect)
            source = data.open_source(folder)
        tars = [str(path) for path in source.tars]
        for path in source.tars:
            path.read_bytes()                            # into the file cache
        tokenizer = (Tokenizer.from_file(args.tokenizer) if args.tokenizer else Tokenizer.learn(
            (captions[0] for captions in data.usable_captions(source, 5000)), 4096))
        cases = []
        for size in args.image_size:
            cases.append(measure(source, tars, size, tokenizer, args))
            tell(cases[-1])
    if args.json:
        named = {name: value and Path(value).name for name, value in          # no one's folders
                 (("data", args.data), ("tokenizer", args.tokenizer), ("json", args.json))}
        Path(args.json).write_text(json.dumps({
            "cases": cases, **vars(args), **named, "torch": torch.__version__, "pillow": PIL.__version__,
            "libjpeg_turbo": features.version("libjpeg_turbo"), "webdataset": webdataset.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
