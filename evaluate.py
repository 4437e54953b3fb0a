"""The paper's measurements: how well images and texts find each other, and how good drawn pictures are.

    python evaluate.py retrieval --data shapes        R@1/5/10, image -> text and text -> image
    python evaluate.py zeroshot fid --data DIR        top-1, top-5; Fréchet distance of drawn to real pictures
    python evaluate.py longtail --data DIR            VL-LTR's two stages on few images of most classes
The predictor receives only clean latents and noise, of a CLIP pixels; what it reads meets all candidate
texts, and only then the truth. `--control` breaks that on purpose: a sound evaluation then falls to chance.
Under torchrun ranks share the images (not checker's; put `--` before evaluate.py). Read next: train.py."""
import argparse
import copy
import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")      # before torch; see train.py
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import model as models
from data import (SIDE, Batch, Shapes, SkipReport, Source, check, clean, evaluation_batches, evenly_spaced,
                  fill, open_source, rand_augment, text_lines, to_square, write_atomically)
from diffusion import (generation_loss, generator_of, make_alphas_cumprod, make_target, noise_of, q_sample,
                       signal_and_noise)
from model import Clip, DiffDis, Network
from sample import (CKPT_HELP, SAMPLERS, SWITCH, Parser, all_finite, denoise_queries, draw_all, draw_images,
                    draw_queries, errors_in_one_line, find_checkpoint, finite, natural, pick_device, positive,
                    require, score, share, target, to_pil, weight)     # noqa: F401  (score is offered here)


# ---------------------------------------------------------------- ranks
def join_ranks(device_name: str) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if it does -> rank, number of ranks, device."""
    device, patience = pick_device(device_name), timedelta(minutes=30)     # others may index a large data set
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store when it starts ranks again: under the old names they would meet the
        # addresses of the dead. (Between machines the counts may differ.)
        store = dist.PrefixStore(f"try-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return rank, world, device


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everybody(value) -> list:
    """What every rank passes, in rank order."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def in_turn(do: Callable):
    """-> do(); a machine's first rank calls it before the others, who find what it downloads."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = do() if first else None
    everybody(None)
    return result if first else do()


# ---------------------------------------------------------------- reading a data set
CONTROLS = ("none", "shuffle-images", "no-image", "shuffle-labels")


class Reading(NamedTuple):
    """How images are read. The first four: as in `sample.draw_queries`."""
    text_steps: int = 1
    draws: int = 1
    guidance_scale: float = 1.0
    seed: int = 0
    control: str = "none"         # of CONTROLS
    batch_size: int = 100         # images at once
    workers: int = 0              # processes that decode
    max_bad: float = 0.05         # more unusable samples than this share are an error


class Read(NamedTuple):
    """The usable samples of a source, in its order."""
    values: Tensor                # [N, ...], on the CPU
    captions: list[list[str]]
    labels: list
    skipped: dict                 # how many were visited, and of these left out, by cause


def read_queries(model: "Network | Inception", inputs: Tensor, places: list[int], reading: Reading) -> Tensor:
    """What the model reads from images [B, D]: a denoised text query (Algorithm 3), of a CLIP the image's
    embedding, both comparable with texts and of unit norm; of Inception its features."""
    if isinstance(model, Clip | Inception):
        return model.encode_image(inputs)
    return draw_queries(model, inputs, places, *reading[:4])


@torch.no_grad()
def over_images(model: "Network | Inception", source: Source, reading: Reading,
                values_of: Callable[..., Tensor] | None = None, size: int | None = None) -> Read:
    """values_of(inputs [B, ...], numbers of the images [B]) -> [B, ...], without it `read_queries`, for all
    usable images. The ranks share them, the controls act here. Raises ValueError where too many are unusable.
    inputs: what the model's read_batch makes of pixels, e.g. clean latents; size: px, else the model's."""
    (rank, world), control, skips, rows = rank_and_world(), reading.control, SkipReport(), []
    values_of = values_of or partial(read_queries, model, reading=reading)
    mine, rng = source.subset(np.arange(rank, len(source), world)), np.random.default_rng(reading.seed)
    if control == "shuffle-images":          # every sample with the image of another
        mine.image = source.subset(rng.permutation(len(source))[rank::world]).image
    batches = evaluation_batches(mine, size or model.config.image_size, reading.batch_size, reading.workers)
    for batch in tqdm(batches, source.name, leave=False, unit="batch", disable=None if rank == 0 else True):
        skips.add(batch)
        if batch.captions:
            places = [i * world + rank for i in batch.places]
            inputs = model.read_batch(batch.images.to(model.device))
            values = values_of(torch.zeros_like(inputs) if control == "no-image" else inputs, places)
            rows += zip(places, values.cpu().numpy(), batch.captions, batch.labels)
    skips, rows = zip(*everybody((skips, rows)))
    total = SkipReport(reading.max_bad, sum(own.visited for own in skips) + source.skipped.total(),
                       sum((own.skipped for own in skips), +source.skipped))
    total.check(final=True)
    rows = sorted(sum(rows, []), key=lambda row: row[0])          # by place
    if not rows:
        raise ValueError(f"{source.name} has no usable sample ({total})")
    order = rng.permutation(len(rows)) if control == "shuffle-labels" else range(len(rows))
    _, values, captions, labels = zip(*rows)
    return Read(all_finite(torch.from_numpy(np.stack(values))), [captions[i] for i in order],
                [labels[i] for i in order], {"visited": total.visited, "skipped": dict(total.skipped)})


@torch.no_grad()
def encode_texts(model: Network, texts: list[str], batch: int = 256) -> Tensor:
    """Texts -> text queries e [K, D], unit norm, float32, on the CPU."""
    parts = [model.encode_text(texts[i:i + batch])[1] for i in range(0, len(texts), batch)]
    return all_finite(torch.cat(parts).cpu())


# ---------------------------------------------------------------- retrieval, zero-shot, Diffusion Classifier
def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a rate in [0, 1] observed over n trials."""
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def ranks_of_best_match(queries: Tensor, candidates: Tensor, pairs: Tensor, block: int = 1024) -> Tensor:
    """How many wrong candidates are at least as similar as the best right one; 0 is a hit at R@1. Ties count
    against the model: one that gives every candidate the same score must not look perfect.
    queries [N, D], candidates [K, D], pairs [P, 2]: numbers of a query and of a right candidate -> [N]."""
    ranks = []
    for first in range(0, len(queries), block):
        similarity = queries[first:first + block] @ candidates.T
        right = torch.zeros_like(similarity, dtype=torch.bool)
        query, candidate = pairs[pairs[:, 0] // block == first // block].T
        right[query - first, candidate] = True
        best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def retrieval(model: Network, source: Source, reading: Reading = Reading()) -> dict:
    """R@1/5/10 both ways: a hit if any caption of the image is among the k most similar texts, any image with
    that caption among the k most similar images. Captions equal by `clean` are one text, not Karpathy's."""
    read, numbers = over_images(model, source, reading), {}     # (text, where if that matters) -> number
    pairs = torch.tensor([(i, numbers.setdefault((clean(text), source.texts and (i, j)), len(numbers)))
                          for i, own in enumerate(read.captions) for j, text in enumerate(own)])
    pairs, texts = pairs.unique(dim=0), encode_texts(model, [text for text, _ in numbers])
    n, n_texts = len(read.values), len(texts)
    result = {"n": n, "n_texts": n_texts, "seed": reading.seed, "control": reading.control,
              "chance": len(pairs) / n / n_texts}
    for name, ranks in (("i2t", ranks_of_best_match(read.values, texts, pairs)),
                        ("t2i", ranks_of_best_match(texts, read.values, pairs.flip(1)))):
        for k in (1, 5, 10):
            rate = result[f"{name}_r{k}"] = (ranks < k).double().mean().item()
            # An image's captions succeed and fail together: no more trials than images.
            result[f"{name}_r{k}_interval"] = wilson(rate, min(len(ranks), n))
    return {**result, "mean_r1": (result["i2t_r1"] + result["t2i_r1"]) / 2, "skipped": read.skipped}


@torch.no_grad()
def denoising_errors(model: DiffDis, latents: Tensor, places: list[int], contexts: Tensor, levels: int,
                     seed: int) -> Tensor:
    """Generation loss (Eq. 4) of images under texts, mean over `levels` evenly spaced timesteps.

    latents: clean z [B, C, h, w]; places: B numbers that name the images; contexts: text conditions
    [B, L, D] -> [B], float64. Noise is a function of (seed, place, level): an image's is the same for all
    texts, and the text under which it is denoised best describes it best (Li et al. 2023)."""
    config, device, losses = model.config, latents.device, []
    alphas = make_alphas_cumprod(config.image_schedule, config.timesteps).to(device)
    for j in range(levels):
        t = torch.full((len(latents),), (2 * j + 1) * config.timesteps // (2 * levels), device=device)
        noise = noise_of(latents.shape[1:], [(seed, place, j) for place in places]).to(device)
        target = make_target(config.image_target, latents, noise, *signal_and_noise(t, latents, alphas))
        pred = model.denoise_image(q_sample(latents, t, noise, alphas), t, contexts)
        losses.append(generation_loss(pred, target))
    return torch.stack(losses).double().mean(dim=0)


def zeroshot(model: Network, source: Source, reading: Reading = Reading(),
             templates: Sequence[str] | None = None, loss_timesteps: int | None = None) -> dict:
    """Zero-shot classification: a class's query is the normalised mean of its templates' queries, or that of
    its caption in training. loss_timesteps: by Diffusion Classifier over so many, of its first template."""
    names, templates = source.classes or [], templates or [source.template]
    if len(names) < 2:       # of a single class every answer is right
        raise ValueError(f"{source.name} has {len(names)} classes, zeroshot needs two: DIR/CLASS, or a list")
    if loss_timesteps is None:
        prompts = [fill(template, name) for name in names for template in templates]
        classes = F.normalize(encode_texts(model, prompts).unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)
        read = over_images(model, source, reading)
        similarity = read.values @ classes.T
    else:
        templates = templates[:1]
        with torch.no_grad():
            contexts = model.encode_text([fill(templates[0], name) for name in names])[0]
        read = over_images(model, source, reading, lambda latents, places: -torch.stack([
            denoising_errors(model, latents, places, context.expand(len(places), -1, -1), loss_timesteps,
                             reading.seed) for context in contexts], dim=1))
        similarity = read.values
    labels = torch.tensor(read.labels)
    hits = (similarity.topk(min(5, len(names))).indices == labels[:, None]).double()
    top1 = hits[:, 0].mean().item()
    per_class = [hits[labels == label, 0].mean().item() for label in labels.unique()]
    return {"n": len(labels), "seed": reading.seed, "control": reading.control, "classes": len(names),
            "chance": 1 / len(names), "templates": list(templates), "loss_timesteps": loss_timesteps,
            "top1": top1, "top1_interval": wilson(top1, len(labels)), "top5": hits.sum(dim=1).mean().item(),
            "mean_per_class": sum(per_class) / len(per_class), "skipped": read.skipped}


# ---------------------------------------------------------------- the checker's rates
def checker(model: DiffDis, n: int = 64, best_of: int = 1, seed: int = 0, **drawing) -> dict:
    """Draw pictures for n held-out prompts of `shapes` and judge each from its pixels alone, of best_of the
    one from which the model itself reads its prompt best. drawing: options of `draw_images`."""
    val = Shapes("val")
    prompts = [val.captions(i)[0] for i in range(min(n, len(val)))]
    each = [prompt for prompt in prompts for _ in range(best_of)]
    images, _ = draw_all(model, each, [*range(seed, seed + len(each))], best_of, **drawing)
    verdicts = [check(to_square(to_pil(image), SIDE), prompt) for image, prompt in zip(images, prompts)]
    rates = {key: sum(verdict[key] for verdict in verdicts) / len(verdicts) for key in verdicts[0]}
    return {"n": len(prompts), "seed": seed, "chance": 0.0, "best_of": best_of, **drawing, **rates,
            "all_interval": wilson(rates["all"], len(prompts))}


# ---------------------------------------------------------------- FID and its Inception
# Block -> its branches, in the order in which they are joined, and how many convolutions each has.
INCEPTION = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), {"1x1": 1, "5x5": 2, "3x3dbl": 3, "_pool": 1}),
    "Mixed_6a": {"3x3": 1, "3x3dbl": 3},
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
                    {"1x1": 1, "7x7": 3, "7x7dbl": 5, "_pool": 1}),
    "Mixed_7a": {"3x3": 2, "7x7x3": 4},
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), {"1x1": 1, "3x3": 2, "3x3dbl": 3, "_pool": 1})}


class Inception:
    """The network whose features FID compares: TensorFlow's Inception v3 of 2015-12-05, from pytorch-fid's
    file, in which a tensor's shape says how many channels and which kernel. It is not torchvision's: other
    weights, other pooling at edges and at the end. Raises OSError where it cannot be fetched, ValueError."""

    def __init__(self, device: torch.device) -> None:
        path, self.device = models.download("inception"), device
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(models.DOWNLOADS["inception"][1]):
            raise ValueError(f"{path} is not FID's Inception: delete it to fetch it again")
        self.tensors = {name: value.to(device) for name, value in models.read_file(path)[0].items()}

    def conv(self, x: Tensor, name: str, stride: int = 1, pads: bool = True) -> Tensor:
        """A convolution without bias, batch norm, ReLU."""
        weight = self.tensors[f"{name}.conv.weight"]
        padding = [side // 2 for side in weight.shape[2:]] if pads else 0
        norm = [self.tensors[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(F.conv2d(x, weight, None, stride, padding), *norm, eps=0.001))

    def block(self, x: Tensor, name: str, branches: dict[str, int]) -> Tensor:
        """Branches side by side, joined over channels: x [B, C, H, W] -> [B, C', H, W]. Where none of them
        pools, their last convolutions halve H and W, and x itself is joined too, pooled."""
        halves, joined = "_pool" not in branches, []
        for branch, depth in branches.items():
            h = x
            if branch == "_pool":
                # The original's last block pools by maximum. Averages leave out the zeros that pad an edge.
                h = (F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else
                     F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            for i in range(1, depth + 1):
                layer = f"{name}.branch{branch}" + f"_{i}" * (depth > 1)
                # Two convolutions of the same input, side by side, are called a and b.
                layers = [layer] if f"{layer}.conv.weight" in self.tensors else [layer + "a", layer + "b"]
                is_last = halves and i == depth
                h = torch.cat([self.conv(h, layer, 1 + is_last, not is_last) for layer in layers], dim=1)
            joined.append(h)
        return torch.cat(joined + [F.max_pool2d(x, 3, 2)] * halves, dim=1)

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, 299, 299] in [-1, 1] -> features "pool3" [B, 2048]."""
        x = self.conv(images, "Conv2d_1a_3x3", 2, pads=False)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3", pads=False), "Conv2d_2b_3x3")
        x = self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", pads=False), 3, 2)
        for name, branches in INCEPTION.items():
            x = self.block(x, name, branches)
        return x.mean(dim=(2, 3))                                                    # of [B, 2048, 8, 8]

    @staticmethod
    def read_batch(pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, 299, 299] in about [-1, 1], resized as in clean-fid (Parmar et
        al. 2022): bicubic of floats, antialiased. The way of resizing moves FID by whole points."""
        # Pillow itself: another program's bicubic is not the same.
        planes = [np.asarray(Image.fromarray(plane).resize((299, 299), Image.Resampling.BICUBIC))
                  for plane in pixels.permute(0, 3, 1, 2).float().flatten(0, 1).cpu().numpy()]
        resized = torch.from_numpy(np.stack(planes)).to(pixels.device).clamp(0, 255)
        return ((resized - 128) / 128).unflatten(0, (-1, 3))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½ of features [N, D] and [M, D] (Heusel et al. 2017).

    With Σ = Rᵀ R, R by QR of the centred features, the last trace is the sum of the singular values of
    R₁ R₂ᵀ. No root is taken: with fewer images than features Σ₁ Σ₂ is singular, and `sqrtm` turns complex."""
    a, b = a.double(), b.double()
    first, second = (torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    overlap = torch.linalg.svdvals(first @ second.T).sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    distance = means + first.square().sum() + second.square().sum() - 2 * overlap
    return distance.clamp(min=0).item()          # rounding could leave it a little below


@torch.no_grad()
def fid(model: DiffDis, source: Source, network: Inception | Network, reading: Reading = Reading(),
        n: int = 30_000, out: Path | None = None, **drawing) -> dict:
    """Fréchet distance between drawn pictures and the images of a source, centre squares of the model's size.

    network: what compares, by `read_queries`; n: pictures, of samples from all over the source by their first
    captions, the i-th from seed + i; out: a folder for them; drawing: options of `draw_images`."""
    size, chosen = model.config.image_size, copy.copy(evenly_spaced(source, n))
    chosen.name, chosen.image = "draw", lambda *_: np.zeros((size, size, 3), np.uint8)  # never looked at

    def draw(_: Tensor, places: list[int]) -> Tensor:
        prompts, seeds = [chosen.captions(i)[0] for i in places], [reading.seed + i for i in places]
        # With --compile: for the last batch, which may be smaller, nothing is compiled anew.
        with torch.compiler.set_stance("default" if len(places) == reading.batch_size else "force_eager"):
            pictures = [to_pil(image) for image in draw_images(model, prompts, seeds, **drawing)]
        for i, picture in zip(places, pictures if out else ()):
            write_atomically(out / f"{i:06d}.png", partial(picture.save, format="PNG", compress_level=1))
        inputs = network.read_batch(torch.from_numpy(np.stack(pictures)).to(network.device))
        return read_queries(network, inputs, places, reading)
    read = over_images(network, source, reading, size=size)
    drawn = over_images(network, chosen, reading._replace(max_bad=1.0, workers=0), draw, size).values
    count, width = min(len(drawn), len(read.values)), drawn.shape[1]
    if count < 2:
        raise ValueError(f"{count} pictures: a distance between sets needs two or more of each")
    if count < width:
        print(f"warning: {count} pictures, {width} features: the distance depends on their number")
    return {"n": len(drawn), "n_reference": len(read.values), "seed": reading.seed, "chance": None,
            "fid": frechet_distance(drawn, read.values), "features": type(network).__name__,
            "image_size": size, **drawing, "skipped": read.skipped}


# ---------------------------------------------------------------- long-tailed recognition (Table 8)
# The recipe of VL-LTR (Tian et al. 2022); learning rates of its ResNet-50.
LR, HEAD_LR, ATTENTION_LR = 5e-5, 1e-4, 1e-6     # of the model in stage 1; of the head in stage 2
WARMUP, WEIGHT_DECAY = 0.1, 0.05                 # share of stage 1; on matrices alone
BALANCE = 0.5              # a class of n images is drawn n^(1 - BALANCE)-fold
SMOOTHING = 0.1            # share of the label that goes to all classes alike
MIXUP, CUTMIX = 0.8, 1.0   # α of the Beta distribution of the shares of two mixed images
ANCHORS = 64               # sentences of a class that the head looks at
MANY, FEW = 100, 20        # training images of a class, more than and fewer than which it is reported apart


class LongTail(NamedTuple):
    """A data set with few images of most classes, and sentences about each."""
    train: Source                 # labelled
    labels: Tensor                # of its images [N], K classes
    test: Source                  # labelled, of the same classes
    sentences: list[list[str]]    # on each class; none without a file of them


def open_longtail(name: str) -> LongTail:
    """A folder with lists train.txt and test.txt, as `open_source` reads them, and, as far as there are,
    texts/CLASS.txt, a sentence a line. Raises FileNotFoundError or ValueError."""
    root = Path(name)
    if not (root / "train.txt").is_file():
        raise FileNotFoundError(f"--data is {name!r}: longtail expects a folder with train.txt and test.txt")
    train, test = (open_source(str(root / f"{split}.txt")) for split in ("train", "test"))
    if train.classes != test.classes:
        raise ValueError(f"train.txt and test.txt in {root} are not of the same classes")
    if shared := set(train.images) & set(test.images):
        raise ValueError(f"{len(shared)} images are in both lists of {root}: expected others to test on")
    texts = {path.stem.replace("_", " "): path for path in (root / "texts").glob("*.txt")}
    sentences = [text_lines(texts[name]) if name in texts else [] for name in train.classes]
    if strays := texts.keys() - set(train.classes):
        raise ValueError(f"{texts[min(strays)]} is called as no class, unlike {train.classes[0]}.txt")
    return LongTail(train, torch.tensor(train.labels), test, sentences)


class LanguageGuidedHead(nn.Module):
    """Classifies an image's text query by itself, and by the sentences about each class (Tian et al. 2022).

    An image attends to the sentences about a class, which so become one vector; its cosine with the image's
    text query is one branch, a perceptron on the query the other. At its start the attention compares queries
    and sentences as they are: its projections are the identity.
    anchors: sentences' text queries [K, S, D], unit norm, or zeros where a class has fewer."""
    temperature, visual_share = 0.07, 0.2       # both fixed; of the prediction, the rest is the text branch's

    def __init__(self, anchors: Tensor) -> None:
        super().__init__()
        classes, _, width = anchors.shape
        self.register_buffer("anchors", anchors)
        self.register_buffer("present", anchors.any(dim=2))
        self.to_q, self.to_k = self.attention = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False)) for _ in range(2))
        self.visual = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes))
        for _, layer in self.attention:
            nn.init.eye_(layer.weight)
        for layer in self.visual[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query [B, D], unit norm -> logits of the visual and of the text branch, [B, K] each."""
        queries, mask = self.to_q(query).expand(len(self.anchors), -1, -1), self.present[:, None]
        classes = F.scaled_dot_product_attention(queries, self.to_k(self.anchors), self.anchors, mask)
        text = torch.einsum("kbd,bd->bk", F.normalize(classes, dim=2), query) / self.temperature
        return self.visual(query * query.shape[1] ** 0.5), text       # a perceptron likes numbers of about 1

    def predict(self, query: Tensor) -> Tensor:
        """query [B, D] -> probabilities [B, K]: 0.2 of the visual branch, 0.8 of the text branch."""
        visual, text = (logits.softmax(dim=1) for logits in self(query))
        return self.visual_share * visual + (1 - self.visual_share) * text


def stage_1_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Half L_ccl, for which all pairs of a class are right, half L_dis, for which the teacher is (Tian et al.
    2022). logits, and the teacher's, of the model as it was, without gradient [B, B]: scaled cosines of B
    images with a sentence about each one's class; labels [B]."""
    def loss(of_images: Tensor, of_texts: Tensor, smoothing: float = 0.0) -> Tensor:
        return (F.cross_entropy(logits, of_images, label_smoothing=smoothing)
                + F.cross_entropy(logits.T, of_texts, label_smoothing=smoothing)) / 2
    same = (labels[:, None] == labels).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return (loss(targets, targets, SMOOTHING) + loss(teacher.softmax(dim=1), teacher.T.softmax(dim=1))) / 2


def augmented(source: Source, size: int, key: tuple[int, ...], index: int, side: int | None) -> Image.Image:
    """An image's centre square, changed by RandAugment: a function of the key and its place."""
    square = Image.fromarray(to_square(source.image(index, side), size))
    return rand_augment(square, np.random.default_rng([*key, index]))


def balanced(labels: Tensor, batch_size: int, *key: int) -> Tensor:
    """labels [N] -> an epoch's rows, whole batches with replacement: a class of n images counts √n-fold."""
    size = max(1, len(labels) // batch_size) * batch_size
    weights = torch.bincount(labels).double()[labels] ** -BALANCE
    return torch.multinomial(weights, size, replacement=True, generator=generator_of(*key))


def balanced_batches(data: LongTail, size: int, epochs: int, reading: Reading, key: tuple) -> Iterator[Batch]:
    """Balanced epochs of augmented images of `size` px, by the key alone. Raises ValueError on a bad one."""
    for epoch in range(epochs):
        rows = balanced(data.labels, reading.batch_size, *key, epoch)
        source = data.train.subset(rows.numpy())
        source.image = partial(augmented, copy.copy(source), size, (*key, epoch))
        for batch in evaluation_batches(source, size, reading.batch_size, reading.workers):
            if batch.skipped:
                raise ValueError(f"train.txt has {dict(batch.skipped)}: take it out, also of the folder")
            yield batch


def mix(pixels: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), by a coin, of a batch with itself in reverse.
    pixels: uint8 [B, S, S, 3]; targets [B, K] -> the same of the mixtures."""
    cuts, side = rng.random() < 0.5, pixels.shape[1]
    share = rng.beta(CUTMIX, CUTMIX) if cuts else rng.beta(MIXUP, MIXUP)
    if cuts:
        half, (y, x) = int(side * math.sqrt(1 - share)) // 2, rng.integers(side, size=2)
        rows, columns = (slice(max(0, c - half), min(side, c + half)) for c in (y, x))
        mixed = pixels.clone()
        mixed[:, rows, columns] = pixels.flip(0)[:, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / side ** 2
    else:
        mixed = (share * pixels + (1 - share) * pixels.flip(0)).round().to(torch.uint8)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def descend(modules: list[tuple[nn.Module, float]], losses: Iterator[Tensor], steps: int, stage: str,
            warmup: int = 0) -> None:
    """A step of AdamW on each loss. modules: each with its peak learning rate, to which the rate rises for
    `warmup` steps while it falls to 0 as a cosine. Raises ValueError where a loss is not finite."""
    optimizer = torch.optim.AdamW([{"params": [p for p in module.parameters() if (p.dim() > 1) == is_matrix],
                                    "peak_lr": rate, "weight_decay": WEIGHT_DECAY * is_matrix}
                                   for module, rate in modules for is_matrix in (True, False)])
    for step, loss in enumerate(tqdm(losses, stage, steps, unit="step", disable=None)):
        if not torch.isfinite(loss):
            raise ValueError(f"longtail, {stage}, step {step}: the loss is not finite; lower --lr-scale")
        rise, fall = min(1.0, (step + 1) / max(1, warmup)), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rise * fall
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fine_tune(model: Network, data: LongTail, epochs: int, lr_scale: float, reading: Reading) -> Network:
    """VL-LTR's first stage, on a copy of the model, which then only reads. Our choice: a text query is
    denoised from pure noise, as in evaluation, so that no sentence can leak."""
    student, seed = copy.deepcopy(model).float().requires_grad_(True), reading.seed

    def logits_of(network: Network, inputs: Tensor, noise: Tensor, chosen: list[str]) -> Tensor:
        queries = (network.encode_image(inputs) if isinstance(network, Clip) else
                   denoise_queries(network, inputs, noise))
        return network.logit_scale.exp() * queries @ network.encode_text(chosen)[1].T

    def losses() -> Iterator[Tensor]:
        batches = balanced_batches(data, model.config.image_size, epochs, reading, (seed, 5))
        for step, batch in enumerate(batches):
            rng = np.random.default_rng([seed, 6, step])
            chosen = [data.sentences[k][rng.integers(len(data.sentences[k]))] for k in batch.labels]
            noise = noise_of((model.config.text.width,), [(seed, 7, step, i) for i in range(len(chosen))])
            with torch.no_grad():       # so the autoencoder stays as it is
                inputs = model.read_batch(batch.images.to(model.device))
                teacher = logits_of(model, inputs, noise, chosen)
            logits, labels = logits_of(student, inputs, noise, chosen), torch.tensor(batch.labels)
            yield stage_1_loss(logits, teacher, labels.to(model.device))
            with torch.no_grad():
                student.logit_scale.clamp_(0, math.log(100))        # as train.py does
    steps = epochs * max(1, len(data.train) // reading.batch_size)
    descend([(student, LR * lr_scale)], losses(), steps, "stage 1", int(WARMUP * steps))
    return student.requires_grad_(False)


def by_shot(name: str, hits: Tensor, labels: Tensor, counts: Tensor) -> dict:
    """hits [N], labels [N], training images of each class [K] -> the accuracy overall and of images of
    classes with many, medium and few (absent where there are none), with intervals."""
    many, few, result = counts[labels] > MANY, counts[labels] < FEW, {}
    for ending, inside in (("", many | True), ("_many", many), ("_medium", ~(many | few)), ("_few", few)):
        if inside.any():
            rate = result[name + ending] = hits[inside].double().mean().item()
            result[f"{name}{ending}_interval"] = wilson(rate, int(inside.sum()))
    return result


def select_anchors(images: Tensor, labels: Tensor, texts: Sequence[Tensor], scale: float) -> Tensor:
    """VL-LTR's anchor sentences: of each class those that tell its training images from the others' best.
    images [N, D], labels [N]; texts: of each class, text queries [M, D]; scale: inverse temperature
    -> text queries [K, S, D], S up to ANCHORS; zeros where a class has fewer."""
    best = []
    for label, own in enumerate(texts):
        losses = -F.log_softmax(scale * own @ images.T, dim=1)[:, labels == label].mean(dim=1)
        best.append(own[losses.argsort()[:ANCHORS]])
    return nn.utils.rnn.pad_sequence(best, batch_first=True)


def train_head(model: Network, data: LongTail, texts: Sequence[Tensor], epochs: int, lr_scale: float,
               reading: Reading) -> LanguageGuidedHead:
    """VL-LTR's second stage: a head on the frozen model's text queries of mixed images, its two branches'
    losses summed. texts: of each class, text queries [M, D]; its anchors are chosen by 50 images at most."""
    few = torch.cat([torch.nonzero(data.labels == k)[:50, 0] for k in range(len(texts))]).sort().values
    known = over_images(model, data.train.subset(few.numpy()), reading).values
    anchors = select_anchors(known, data.labels[few], texts, model.logit_scale.exp().item())
    torch.manual_seed(reading.seed)
    head, one_hot = LanguageGuidedHead(anchors).to(model.device), torch.eye(len(texts))
    steps = max(1, len(data.train) // reading.batch_size)        # of an epoch

    def losses() -> Iterator[Tensor]:
        batches = balanced_batches(data, model.config.image_size, epochs, reading, (reading.seed, 8))
        for i, batch in enumerate(batches):
            rng = np.random.default_rng([reading.seed, 8, 9, *divmod(i, steps)])
            pixels, targets = mix(batch.images, one_hot[batch.labels], rng)
            with torch.no_grad():
                inputs = model.read_batch(pixels.to(model.device))
                queries = read_queries(model, inputs, list(batch.places), reading)
            yield sum(F.cross_entropy(logits, targets.to(model.device), label_smoothing=SMOOTHING)
                      for logits in head(queries))
    descend([(head.attention, ATTENTION_LR * lr_scale), (head.visual, HEAD_LR * lr_scale)], losses(),
            epochs * steps, "stage 2")
    return head


def longtail(model: Network, data: LongTail, reading: Reading = Reading(batch_size=128),
             templates: Sequence[str] | None = None, epochs: int = 50, head_epochs: int = 50,
             lr_scale: float = 1.0) -> dict:
    """VL-LTR's two stages with this model as the backbone (Table 8). epochs, head_epochs: of stage 1 and 2, 0
    leaves a stage out; lr_scale: times VL-LTR's learning rates."""
    templates, counts = templates or [data.test.template], torch.bincount(data.labels)
    sentences = [list(dict.fromkeys([*(fill(template, name) for template in templates), *own]))
                 for name, own in zip(data.test.classes, data.sentences)]
    data, texts = data._replace(sentences=sentences), sum(sentences, [])
    owners = torch.tensor([label for label, own in enumerate(sentences) for _ in own])
    if epochs:
        model = fine_tune(model, data, epochs, lr_scale, reading)
    queries, read = encode_texts(model, texts), over_images(model, data.test, reading)
    labels, nearest = torch.tensor(read.labels), (read.values @ queries.T).argmax(dim=1)
    result = {"n": len(labels), "n_train": int(counts.sum()), "classes": len(counts),
              "sentences": len(texts), "seed": reading.seed, "control": reading.control,
              "chance": 1 / len(counts),          # Image-Acc: the nearest sentence is of the image's class
              **by_shot("image_acc", owners[nearest] == labels, labels, counts)}
    if head_epochs:
        # Other noise than the test images': what is alike must be the pictures.
        head = train_head(model, data, queries.split(list(map(len, sentences))), head_epochs, lr_scale,
                          reading._replace(control="none", seed=reading.seed + 1, max_bad=0.0))
        with torch.no_grad():
            scores = torch.cat([head.predict(part).cpu() for part in read.values.to(model.device).split(256)])
        result |= {"anchors": int(head.present.sum()),
                   **by_shot("top1", scores.argmax(dim=1) == labels, labels, counts)}
    return {**result, "skipped": read.skipped}


# ---------------------------------------------------------------- command line
READS, DRAWS = ("retrieval", "zeroshot", "longtail"), ("fid", "checker")
TASKS, OF_DATA = (*READS, *DRAWS), (*READS, "fid")
COUNT, WHOLE = {"type": positive}, {"type": natural}
FLAGS = (
    ("ckpt", TASKS, {}, f"{CKPT_HELP}; to read images also a CLIP"),
    ("data", OF_DATA, {"default": "shapes"}, "as in train.py; longtail: a folder with two lists"),
    ("limit", OF_DATA, COUNT, "images to use, of longtail to test on, evenly spaced; without it all"),
    ("json", TASKS, {"metavar": "FILE"}, "also write the numbers here; rates are fractions"),
    ("seed", TASKS, {**WHOLE, "default": 0}, "seed of all noise and of the controls' shuffling"),
    ("device", TASKS, {"choices": ("auto", "cpu", "cuda"), "default": "auto"}, "where to run"),
    ("precision", TASKS, {"choices": ("fp32", "bf16")}, "of weights; without it bf16 on CUDA, else fp32"),
    ("batch-size", OF_DATA, COUNT, "images at once; without it 100, fid 16, longtail 128"),
    ("workers", OF_DATA, WHOLE, "processes that decode images; without it 0 for shapes, else 2"),
    ("max-bad", OF_DATA, {"type": share, "default": 0.05}, "share of samples that may be unusable"),
    ("guidance-scale", TASKS, {"type": finite}, "1 + w; else 1 to read (see --p-drop-image), own to draw"),
    ("control", READS, {"choices": CONTROLS, "default": "none"}, "break what is read, to see chance"),
    ("text-steps", OF_DATA, {**COUNT, "default": 1}, "denoising steps of the text query"),
    ("draws", OF_DATA, {**COUNT, "default": 1}, "noise draws averaged per image"),
    ("template", ("zeroshot", "longtail"), {"action": "append"},
     "prompt of a class, {} is its name, {a} its article; may be repeated; else its caption in training"),
    ("loss-timesteps", ("zeroshot",), COUNT, "by Diffusion Classifier, from the loss of so many timesteps"),
    ("n", DRAWS, COUNT, "pictures to draw; without it 64, for fid 30,000 or a caption each"),
    ("steps", DRAWS, {**COUNT, "default": 50}, "sampler steps"),
    ("sampler", DRAWS, {"choices": SAMPLERS, "default": "ddim"}, "as in sample.py"),
    ("best-of", ("checker",), {**COUNT, "default": 1}, "draw so many, keep the model's own favourite"),
    ("features", ("fid",), {"metavar": "CKPT"}, "what compares, by what it reads; without it Inception"),
    ("out", ("fid",), {"metavar": "FOLDER"}, "also write the pictures here"),
    ("compile", ("fid",), SWITCH, "torch.compile the drawing; without it on CUDA, from 5,000 pictures"),
    ("epochs", ("longtail",), {**WHOLE, "default": 50}, "of stage 1, which tunes the model; 0 leaves it out"),
    ("head-epochs", ("longtail",), {**WHOLE, "default": 50}, "of stage 2, which trains a head; 0: as above"),
    ("lr-scale", ("longtail",), {"type": weight, "default": 1.0}, "times VL-LTR's learning rates"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    flags = [(parser.add_argument(f"--{name}", help=text if tasks is TASKS else f"{', '.join(tasks)}: {text}",
                                  **options), tasks) for name, tasks, options, text in FLAGS]
    args = parser.parse_intermixed_args(argv)
    if wrong := [text for text in args.template or () if "{}" not in text]:
        parser.error(f"template {wrong[0]!r} has no {{}} for the name of a class")
    for flag, tasks in flags:
        if getattr(args, flag.dest) != flag.default and not set(tasks) & set(args.tasks):
            warnings.warn(f"{flag.option_strings[0]} is for {', '.join(tasks)}: it changes nothing here")
    return args


def report(task: str, result: dict, name: str) -> None:
    """Print a task's result as a table; name: of the data."""
    control = f", control {result['control']}" if result.get("control", "none") != "none" else ""
    print(f"{task} on {name}, seed {result['seed']}{control}  (n = {result['n']})")
    for key, value in result.items():
        if isinstance(value, float) and key not in ("fid", "guidance_scale"):        # a rate
            interval = " – ".join(f"{100 * end:5.1f}" for end in result.get(f"{key}_interval", ()))
            print(f"  {key:<17}{100 * value:7.2f} %{'   95 % interval ' * bool(interval)}{interval}")
        elif isinstance(value, int | float | str) and key not in ("n", "seed", "control"):
            print(f"  {key:<17} {round(value, 6) if isinstance(value, float) else value}")
    for cause, count in result.get("skipped", {"skipped": {}})["skipped"].items():
        print(f"  skipped: {count} {cause}")


def check_tasks(args: argparse.Namespace, model: Network) -> None:
    """Refuse what these weights cannot do, before anything is computed. Raises ValueError."""
    for task in args.tasks:
        draws = task in DRAWS or task == "zeroshot" and args.loss_timesteps
        reads = not draws or task == "checker" and args.best_of > 1
        require(model, ["generation"] * bool(draws) + ["alignment"] * reads, f"{task} of images")
        if task == "longtail" and rank_and_world()[1] > 1:
            raise ValueError("longtail trains in one process: start it with python, not torchrun")


def run_task(task: str, model: Network, args: argparse.Namespace) -> dict:
    """Open the task's data and measure."""
    scale, workers, size = args.guidance_scale, 2 * (args.data != "shapes"), model.config.image_size
    reading = Reading(args.text_steps, args.draws, 1.0 if scale is None or task in DRAWS else scale,
                      args.seed, args.control if task in READS else "none",
                      args.batch_size or {"fid": 16, "longtail": 128}.get(task, 100),
                      workers if args.workers is None else args.workers, args.max_bad)
    if task == "longtail":
        data = open_longtail(args.data)
        data = data._replace(test=evenly_spaced(data.test, args.limit))
        return longtail(model, data, reading, args.template, args.epochs, args.head_epochs, args.lr_scale)
    if task in DRAWS:
        drawing = {"sampler": args.sampler, "steps": args.steps,
                   "guidance_scale": model.config.guidance_scale if scale is None else scale}
    if task == "checker":
        return checker(model, args.n or 64, args.best_of, args.seed, **drawing)
    split = "classes" if args.data == "shapes" and task == "zeroshot" else "val"
    source = evenly_spaced(in_turn(lambda: open_source(args.data, split, args.max_bad)), args.limit)
    if task == "retrieval":
        return retrieval(model, source, reading)
    if task == "zeroshot":
        return zeroshot(model, source, reading, args.template, args.loss_timesteps)
    network = (models.load(args.features, model.device, precision=args.precision) if args.features else
               in_turn(lambda: Inception(model.device)))
    if args.features and ("alignment" not in network.tasks or network.config.image_size != size):
        raise ValueError(f"--features {args.features}: expected a model that reads pictures of {size} px")
    n, is_cuda = min(args.n or 30_000, len(source)), model.device.type == "cuda"
    if args.compile or args.compile is None and is_cuda and n >= 5000:
        models.wrap_blocks(model)
    return fid(model, source, network, reading, n, args.out and Path(args.out), **drawing)


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    args, results = parse_args(argv), {}
    try:
        rank, world, device = join_ranks(args.device)
        if rank:      # the first speaks for all
            sys.stdout = open(os.devnull, "w")
        table = args.json and target("--json", args.json)
        path = in_turn(lambda: models.locate(find_checkpoint(args.ckpt)))
        model = models.load(path, device, precision=args.precision).to(memory_format=torch.channels_last)
        check_tasks(args, model)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        about = {"settings": vars(args), "command": " ".join(sys.argv), "date": date.today().isoformat(),
                 "checkpoint": str(path), "ranks": world, "device": str(device), "torch": torch.__version__}
        for task in args.tasks:
            result, name = run_task(task, model, args), "shapes" if task == "checker" else args.data
            results[task] = {"task": task, "data": name, **result, **about}
            if table and rank == 0:       # now: a later task may end in an error
                numbers = results if len(args.tasks) > 1 else results[task]
                table.write_text(json.dumps(numbers, indent=1) + "\n")
            report(task, result, name)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
