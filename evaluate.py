"""Scores: how well images and texts find each other, and whether drawn pictures show what was asked.

What it is: Algorithm 3 (sample.py) turned into the field's numbers.
    python evaluate.py retrieval --data shapes        R@1/5/10, image -> text and text -> image
    python evaluate.py zeroshot  --data cifar10       top-1, top-5, mean per class over class folders
    python evaluate.py checker   --best-of 4          pictures for held-out prompts, judged from their pixels
    python evaluate.py speed     --preset tiny        what a training step of either task, and of both, costs
What it is not: training. What predicts is `sample.draw_queries`, which is handed clean latents and nothing
else; its text queries are compared with those of all candidate texts, and only then with the truth.
Retrieval and zeroshot have controls (`--control`) in which a sound evaluation must fall to chance.
"""
import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model as models
from data import (SIDE, SkipReport, Source, Subset, Tokenizer, check, evaluation_batches, evenly_spaced,
                  held_out_captions, open_source)
from diffusion import alignment_loss
from model import CLIPS, Clip, ClipConfig, DiffDis
from sample import (CKPT_HELP, Parser, best_of, draw_images, draw_queries, fail, find_checkpoint, finite,
                    natural, pick_device, positive, to_pil)

CONTROLS = ("none", "shuffle-images", "no-image", "shuffle-labels")


# ---------------------------------------------------------------- scoring
@torch.no_grad()
def encode_texts(model: DiffDis, texts: list[str], batch: int = 256) -> Tensor:
    """Texts -> text queries e [K, D], unit norm, float32; shared by all ranks."""
    def rows_of(places: range) -> Tensor:
        mine = [texts[i] for i in places]
        return torch.cat([model.encode_text(mine[i:i + batch])[1] for i in range(0, len(mine), batch)])
    return together(len(texts), rows_of)


@torch.no_grad()
def score(model: DiffDis, images: Tensor, texts: list[str], text_steps: int = 1, draws: int = 1,
          guidance_scale: float = 1.0, seed: int = 0) -> Tensor:
    """Cosine similarity of each image's denoised text query with each text (Algorithm 3).

    images: [B, 3, H, W] in [-1, 1]; texts: K candidates, the same for every image; text_steps, draws,
    guidance_scale, seed: as `sample.draw_queries` -> [B, K], float32.
    """
    queries = draw_queries(model, model.encode_image(images.to(model.device)), list(range(len(images))),
                           text_steps, draws, guidance_scale, seed)
    return queries @ encode_texts(model, texts).T


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(count: int, rows_of: Callable[[range], Tensor]) -> Tensor:
    """Rows 0 … count-1 of something, computed by all ranks: rank r computes r, r + N, … -> all of them."""
    rank, world = rank_and_world()
    mine = rows_of(range(rank, count, world)) if rank < count else None
    if world == 1:
        return mine
    parts = [None] * world
    dist.all_gather_object(parts, None if mine is None else mine.cpu())
    parts = [part for part in parts if part is not None]
    whole = parts[0].new_empty(count, *parts[0].shape[1:])
    for r, part in enumerate(parts):
        whole[r::world] = part
    return whole.to(mine.device) if mine is not None else whole


def read_latents(model: DiffDis, source: Source, args: argparse.Namespace):
    """All usable images, read by all ranks together
    -> latents [N, C, h, w] on the CPU, captions [N] of lists, labels [N], the report on what was left out."""
    if source.cache is not None and model.autoencoder is not None:      # None while training on it: checked
        models.check_latents(source.cache, model, source.name)
    rank, world = rank_and_world()
    mine = Subset(source, np.arange(rank, len(source), world)) if world > 1 else source
    skips, found = SkipReport(args.max_bad), []
    with tqdm(total=len(mine), unit="image", desc="read", disable=None, leave=False) as bar:
        for batch in evaluation_batches(mine, model.config.image_size, args.batch_size):
            skips.add(batch.skipped, batch.visited)
            if batch.captions:
                latents = model.read_batch(batch.images.to(model.device)).float().cpu()
                found += zip((i * world + rank for i in batch.places), latents, batch.captions, batch.labels)
            bar.update(batch.visited)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (found, skips.skipped, skips.visited))
        skips = SkipReport(args.max_bad)
        for _, skipped, visited in parts:
            skips.add(skipped, visited)
        found = sorted((row for part, _, _ in parts for row in part), key=lambda row: row[0])
    skips.add(source.skipped, sum(source.skipped.values()))
    skips.check(final=True)
    if not found:
        raise ValueError(f"{source.name} has no usable sample ({skips})")
    _, latents, captions, labels = zip(*found)
    return torch.stack(latents), list(captions), list(labels), skips


def image_queries(model: DiffDis, latents: Tensor, args: argparse.Namespace) -> Tensor:
    """latents [N, C, h, w] of all images -> their denoised text queries [N, D].

    The controls that concern images act here, before anything is predicted: "no-image" zeroes the condition,
    "shuffle-images" gives each place the latents of another.
    """
    if args.control == "no-image":
        latents = torch.zeros_like(latents)
    elif args.control == "shuffle-images":
        latents = latents[shuffled(len(latents), args.seed)]

    def rows_of(places: range) -> Tensor:
        queries = []
        for first in tqdm(range(0, len(places), args.batch_size), unit="batch", disable=None, leave=False):
            some = places[first:first + args.batch_size]
            queries.append(draw_queries(model, latents[some].to(model.device), list(some), args.text_steps,
                                        args.draws, args.guidance_scale, args.seed))
        return torch.cat(queries)
    queries = together(len(latents), rows_of)
    if not torch.isfinite(queries).all():
        raise ValueError("the model's text queries are not finite: its weights are not usable")
    return queries


def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- statistics
def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a rate in [0, 1] observed over n trials."""
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def ranks_of_best_match(queries: Tensor, candidates: Tensor, matches: list[list[int]],
                        block: int = 1024) -> Tensor:
    """How many wrong candidates are at least as similar as the best right one; 0 is a hit at R@1.

    queries [N, D], candidates [K, D], matches: N lists of right candidates -> [N] int64. Memory is block · K.
    Ties count against the model: one that gives every candidate the same score must not look perfect.
    """
    ranks = []
    for start in range(0, len(queries), block):
        similarity = queries[start:start + block] @ candidates.T
        right = torch.zeros_like(similarity, dtype=torch.bool)
        for row, columns in enumerate(matches[start:start + block]):
            right[row, columns] = True
        best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity < best) & ~right).sum(dim=1))       # so written, NaN counts against it too
    return torch.cat(ranks).cpu()


def chance_of_hit(k: int, candidates: int, right: int) -> float:
    """Probability that k candidates drawn blindly hold at least one of the right ones."""
    k = min(k, candidates)
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)


# ---------------------------------------------------------------- tasks
def retrieval(model: DiffDis, source: Source, args: argparse.Namespace) -> dict:
    """R@1/5/10 both ways over all captions of all images; equal captions are one text.

    Image -> text is a hit if any caption of the image is among the k most similar texts;
    text -> image if any image with that caption is.
    """
    latents, captions, _, skips = read_latents(model, source, args)
    queries = image_queries(model, latents, args)
    if args.control == "shuffle-labels":
        captions = [captions[i] for i in shuffled(len(captions), args.seed).tolist()]
    column = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    texts_of = [[column[text] for text in texts] for texts in captions]
    images_of = [[] for _ in column]
    for image, columns in enumerate(texts_of):
        for j in columns:
            images_of[j].append(image)
    texts = encode_texts(model, list(column))
    result = {"n": len(queries), "n_texts": len(column)}
    for name, ranks, matches, pool in (
            ("i2t", ranks_of_best_match(queries, texts, texts_of), texts_of, len(texts)),
            ("t2i", ranks_of_best_match(texts, queries, images_of), images_of, len(queries))):
        for k in (1, 5, 10):
            rate = (ranks < k).float().mean().item()
            result[f"{name}_r{k}"] = rate
            # An image's captions succeed and fail together: no more trials than images.
            result[f"{name}_r{k}_interval"] = wilson(rate, min(len(ranks), len(queries)))
            result[f"{name}_r{k}_chance"] = sum(
                chance_of_hit(k, pool, len(set(m))) for m in matches) / len(matches)
    return {**result, "chance": result["i2t_r1_chance"], "skipped": skips.to_dict()}


def fill(template: str, name: str) -> str:
    """A class name in a template; "a {}" becomes "an {}" before a vowel."""
    return (template.replace("a {}", "an {}") if name[0].lower() in "aeiou" else template).replace("{}", name)


def zeroshot(model: DiffDis, source: Source, args: argparse.Namespace) -> dict:
    """Zero-shot classification: a class's text query is the normalised mean of its templates' queries."""
    if source.classes is None:
        raise ValueError(f"{source.name} has no classes: "
                         "zeroshot needs a folder of class folders (DIR/CLASS/*.jpg)")
    templates = args.templates or ["a {}" if source.name == "shapes" else "a photo of a {}"]
    classes = torch.stack([encode_texts(model, [fill(t, name) for t in templates]).mean(dim=0)
                           for name in source.classes])
    latents, _, labels, skips = read_latents(model, source, args)
    queries = image_queries(model, latents, args)
    similarity, labels = (queries @ F.normalize(classes, dim=-1).T).cpu(), torch.tensor(labels)
    if args.control == "shuffle-labels":
        labels = labels[shuffled(len(labels), args.seed)]
    truth = similarity.gather(1, labels[:, None])
    ranks = (~(similarity < truth)).sum(dim=1) - 1        # ties count against the model, as above
    hits = (ranks == 0).float()
    per_class = [hits[labels == c].mean().item() for c in labels.unique()]
    top1, count = hits.mean().item(), len(source.classes)
    return {"n": len(labels), "classes": count, "templates": templates, "chance": 1 / count, "top1": top1,
            "top1_interval": wilson(top1, len(labels)), "top5": (ranks < 5).float().mean().item(),
            "mean_per_class": sum(per_class) / len(per_class), "skipped": skips.to_dict()}


def checker(model: DiffDis, args: argparse.Namespace) -> dict:
    """Draw pictures for held-out prompts of `shapes` and judge each from its pixels alone.

    With best_of > 1 the rates are those of the picture the model itself reads the prompt from best, and
    `all_single` those of the first draw.
    """
    prompts = held_out_captions(args.n)
    scale = model.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    keys, rates = ("colour", "shape", "size", "relation", "all"), {}
    kept, singles, at_once = [], [], max(1, 64 // args.best_of)
    for i in tqdm(range(0, len(prompts), at_once), unit="batch", disable=None, leave=False):
        some = prompts[i:i + at_once]
        seeds = list(range(args.seed + i * args.best_of, args.seed + (i + len(some)) * args.best_of))
        images = draw_images(model, [prompt for prompt in some for _ in range(args.best_of)], seeds,
                             args.steps, scale)
        if images.shape[2] != SIDE:          # `shapes` at another --image-size: judged at its own
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        pixels = [np.asarray(to_pil(image)) for image in images]
        for k, prompt in enumerate(some):
            first = k * args.best_of
            own = images[first:first + args.best_of]
            best = best_of(model, prompt, own, args.seed)[0] if args.best_of > 1 else 0
            kept.append(check(pixels[first + best], prompt))
            singles.append(check(pixels[first], prompt)["all"])
    for key in keys:
        rates[key] = sum(verdict[key] for verdict in kept) / len(kept)
    return {"n": len(prompts), "best_of": args.best_of, "steps": args.steps,
            "guidance_scale": scale, "chance": 0.0, **rates,
            "all_interval": wilson(rates["all"], len(prompts)), "all_single": sum(singles) / len(singles)}


# ---------------------------------------------------------------- distances between sets of images (FID)
RESIZES = ("clean", "legacy")
INCEPTION_SIDE = 299       # px


def inception_input(pixels: Tensor, resize: str) -> Tensor:
    """Pixels as Inception wants them; how they are resized moves FID by whole points.

    pixels: uint8 [B, H, W, 3]; resize: "clean", as clean-fid (Parmar et al. 2022): bicubic of floats, widened
    where it shrinks so that nothing aliases; or "legacy", as pytorch-fid: bilinear between the nearest pixels
    -> float32 [B, 3, 299, 299] in about [-1, 1], on the pixels' device.
    Raises ValueError on other pixels or another resize.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, H, W, 3]")
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}, expected one of {', '.join(RESIZES)}")
    channels, size = pixels.permute(0, 3, 1, 2).float(), (INCEPTION_SIDE, INCEPTION_SIDE)
    if resize == "legacy":
        return 2 * F.interpolate(channels / 255, size, mode="bilinear", align_corners=False) - 1
    # Pillow itself: another program's bicubic is not the same one.
    planes = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
              for plane in channels.flatten(0, 1).cpu().numpy()]
    resized = torch.from_numpy(np.stack(planes)).unflatten(0, channels.shape[:2])
    return ((resized.clamp(0, 255) - 128) / 128).to(pixels.device)


class Statistics:
    """Mean and covariance of rows that come in batches, in float64 on the CPU.

    Sums of squares would cancel where the mean is large; batches are centred first and then joined
    (Chan, Golub & LeVeque 1979).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)      # Σ (x - mean) (x - mean)ᵀ

    def add(self, features: Tensor) -> None:
        """features [B, D], any B. Raises ValueError if D is another, or a feature is not finite."""
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are {tuple(features.shape)}, expected [B, {len(self.mean)}]")
        if not torch.isfinite(features).all():
            raise ValueError("features of images are not finite: the network or its images are damaged")
        rows = features.detach().cpu().double()
        mean = rows.mean(dim=0)
        self._join(len(rows), mean, (rows - mean).T @ (rows - mean))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:           # whose mean is NaN
            return
        apart, total = mean - self.mean, self.count + count
        self.scatter += scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    def merge(self, others: Iterable["Statistics"]) -> None:
        """Take in the rows of others. Raises ValueError if they are of another width."""
        for other in others:
            if len(other.mean) != len(self.mean):
                raise ValueError(f"statistics of {len(other.mean)} features do not join {len(self.mean)}")
            self._join(other.count, other.mean, other.scatter)

    def gather(self) -> "Statistics":
        """-> the statistics of all ranks' rows, the same on each; alone: of one's own."""
        parts = [self]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        whole = Statistics(len(self.mean))
        whole.merge(parts)
        return whole

    def covariance(self) -> Tensor:
        """-> [D, D], unbiased. Raises ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, here are {self.count}")
        return self.scatter / (self.count - 1)

    def to_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @staticmethod
    def from_dict(state: dict[str, Tensor]) -> "Statistics":
        """The inverse of `to_dict`. Raises ValueError if these are no statistics."""
        shapes = {name: tuple(getattr(state.get(name), "shape", "?"))
                  for name in ("count", "mean", "scatter")}
        width = shapes["mean"]
        if len(width) != 1 or shapes["count"] != () or shapes["scatter"] != width * 2:
            raise ValueError("these are no statistics of images: expected tensors count [], mean [D], "
                             f"scatter [D, D], found {shapes}")
        found = Statistics(*width)
        found._join(int(state["count"]), state["mean"].double(), state["scatter"].double())
        return found


def square_root(covariance: Tensor) -> Tensor:
    """covariance [D, D] of rank r -> R [D, r] with R Rᵀ = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Below this, also below 0, an eigenvalue is rounding.
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½ of two sets of images: FID (Heusel et al. 2017).

    With Σ = R Rᵀ, the last trace is the sum of the singular values of R₁ᵀ R₂. No root of Σ₁ Σ₂ is taken:
    with fewer images than features it is singular, `sqrtm` turns complex, and eigenvalues that rounding
    keeps from 0 would count by their square roots.
    Raises ValueError on different widths, or fewer than two images.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"statistics of {len(a.mean)} and {len(b.mean)} features cannot be compared")
    first, second = a.covariance(), b.covariance()
    overlap = torch.linalg.svdvals(square_root(first).T @ square_root(second)).sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * overlap
    return distance.clamp(min=0).item()          # rounding could leave it a little below


# ---------------------------------------------------------------- speed (Table 6)
def median_seconds(step: Callable, rounds: int, warm_up: int, device: torch.device) -> float:
    """Median time of calling `step`, its work on the device included."""
    times = []
    for i in range(warm_up + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what this device gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    with torch.no_grad():
        return 2 * n ** 3 / median_seconds(lambda: a @ b, 20, 5, device)


class Steps:
    """Training steps on random pairs, as train.py does them: the same loss, optimiser and averages."""

    def __init__(self, model: DiffDis, args: argparse.Namespace) -> None:
        import train       # here, not above: train.py imports this file
        self.train, self.model, self.args, config = train, model, args, model.config
        self.run = train.parse_args(["--preset", args.preset, "--precision", args.precision])
        self.run.compile, self.run.recompute = args.compile, args.recompute
        size, count, device = config.image_size, args.batch_size, model.device
        shape = model.latent_shape(size, size)
        self.pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, device=device)
        self.moments = torch.randn(count, 2 * shape[0], *shape[1:], device=device).half()
        self.tokens = torch.randint(config.text.vocab_size - 2, (count, config.text.context_length),
                                    device=device)
        self.drawn = {name: value.to(device) for name, value in
                      train.draw(config, shape, 0, 0, range(count)).items()}
        self.trains_text = config.autoencoder.kind != "kl"       # as in train.py: not if it came pretrained

    def flops(self, tasks: tuple[str, ...], cached: bool) -> float:
        """Of one pair, one step."""
        self.run.tasks = tasks
        return self.train.count_flops(self.model.config, self.model.tokenizer, self.run, self.trains_text,
                                      self.args.batch_size, cached)

    def activations_gib(self, tasks: tuple[str, ...], pairs: int, recompute: bool) -> float:
        """What a forward pass keeps for the backward pass besides the weights, counted without running it."""
        self.run.tasks, config = tasks, self.model.config
        plain = argparse.Namespace(**{**vars(self.run), "compile": False, "recompute": recompute})
        kept: dict[int, Tensor] = {}            # by storage: views of one count once

        def keep(value: Tensor) -> Tensor:
            kept[value.untyped_storage()._cdata] = value
            return value
        with FakeTensorMode():                  # shapes, types and storages, but no numbers
            model = DiffDis(config, self.model.tokenizer)
            self.train.freeze_unused(model, tasks, self.trains_text)
            joint, shape = self.train.JointLoss(model, plain), self.drawn["noise"].shape[1:]
            drawn = {name: torch.zeros(pairs, *value.shape[1:], dtype=value.dtype)
                     for name, value in self.drawn.items()}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                joint(torch.zeros(pairs, *shape),
                      torch.zeros(pairs, self.tokens.shape[1], dtype=torch.int64), drawn)
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            return sum(value.untyped_storage().nbytes() for place, value in kept.items()
                       if place not in weights) / 2 ** 30

    def measure(self, tasks: tuple[str, ...], cached: bool) -> dict:
        """Seconds of a step with these tasks, and the device memory that it took."""
        self.run.tasks, device, args = tasks, self.model.device, self.args
        self.model.train().requires_grad_(True)
        self.train.freeze_unused(self.model, tasks, self.trains_text)
        joint = self.train.JointLoss(self.model, self.run).to(device)
        live = [p for p in self.model.parameters() if p.requires_grad]
        if args.optimizer:
            optimizer = self.train.make_optimizer(self.model, self.run, pretrained=False)
            averages = self.train.Averages(self.model, 0.999)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            images = self.moments if cached else self.pixels
            latents = joint.encode(images, self.drawn["posterior_noise"])
            self.train.backward(joint, [(latents, self.tokens, self.drawn)], self.run.align_weight)
            if args.optimizer:
                torch.nn.utils.clip_grad_norm_(live, 1.0)
                optimizer.step()
                averages.update(0)
            self.model.zero_grad(set_to_none=True)
        seconds = median_seconds(step, args.rounds, args.warm_up, device)
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
        return {"seconds": seconds, "memory_gib": memory}


class ClipSteps:
    """The same for CLIP: what the alignment task would cost as a network of its own."""

    def __init__(self, config: ClipConfig, args: argparse.Namespace, device: torch.device) -> None:
        self.args, count = args, args.batch_size
        self.model = Clip(config).to(device)
        self.images = torch.randn(count, 3, config.image_size, config.image_size, device=device)
        self.tokens = torch.randint(config.text.vocab_size, (count, config.text.context_length),
                                    device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.encoders = self.model.encode_image, self.model.encode_tokens
        if args.compile:
            self.encoders = tuple(map(torch.compile, self.encoders))

    def step(self) -> None:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            ours, texts = self.encoders[0](self.images), self.encoders[1](self.tokens)
        alignment_loss(ours, texts, self.model.logit_scale)[0].mean().backward()
        if self.args.optimizer:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def clip_flops(config: ClipConfig, pairs: int) -> float:
    """Of one pair, one training step of CLIP, counted as train.count_flops counts."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Clip(config)
        ours = model.encode_image(torch.empty(pairs, 3, config.image_size, config.image_size))
        texts = model.encode_tokens(torch.zeros(pairs, config.text.context_length, dtype=torch.int64))
        (ours + texts).sum().backward()
    return counter.get_total_flops() / pairs


def inference_seconds(model: DiffDis, steps: Steps, clip: ClipSteps, args: argparse.Namespace) -> dict:
    """Seconds per batch of what the trained model does: drawing with and without the query stream's weights
    beside it, reading images from pixels and from latents, and CLIP reading as many."""
    model.eval().requires_grad_(False)
    latents = model.read_batch(steps.moments)
    context, null = model.text_encoder(steps.tokens)[0], model.text_encoder(model.null_tokens)[0]
    t, queries = steps.drawn["t_image"], steps.drawn["query_noise"]
    images = steps.pixels

    def read(latents: Tensor) -> Tensor:
        return model.unet.denoise_query(queries, t, latents, null)
    plain = copy.deepcopy(model.unet)
    models.drop_query_stream(plain)
    cases = {"draw_step": lambda: model.unet.denoise_image(latents, t, context),
             "draw_step_plain": lambda: plain.denoise_image(latents, t, context),
             "read_pixels": lambda: read(model.read_batch(images)), "read_latents": lambda: read(latents),
             "clip_image": lambda: clip.model.encode_image(clip.images)}
    found: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16,
                                         enabled=args.precision == "bf16"):
        for i in range(max(2, args.rounds)):            # in turns: what disturbs one disturbs all
            for name, case in cases.items():
                found[name].append(median_seconds(case, 1, 1 if i == 0 else 0, model.device))
    return {name: statistics.median(times) for name, times in found.items()}


def scale_up(seconds: float, batch: int, gradient_bytes: float, args: argparse.Namespace) -> list[dict]:
    """What 1 … 64 devices would do, from one device's step: t(N) = t + max(0, c(N) − ⅔ t), where the ring
    all-reduce takes c(N) = 2 (N−1)/N · gradient bytes / link, and the backward pass, two thirds of a step,
    hides as much of it."""
    rows = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        link = args.link_gb_s[0] if count <= 8 else args.link_gb_s[-1]
        wait = 2 * (count - 1) / count * gradient_bytes / (link * 1e9)
        took = seconds + max(0.0, wait - 2 / 3 * seconds)
        rows.append({"devices": count, "images_per_s": count * batch / took, "seconds": took,
                     "all_reduce_seconds": wait, "efficiency": seconds / took})
    return rows


def kinds_of_step(model: DiffDis) -> dict[str, tuple[tuple[str, ...], bool]]:
    """name -> tasks, from cached latents (where there is an autoencoder to be spared)."""
    tasks = {"generation": ("generation",), "alignment": ("alignment",), "joint": ("generation", "alignment")}
    return {name + "_cached" * cached: (some, cached) for cached in (False, True)
            if not cached or model.config.autoencoder.kind == "kl" for name, some in tasks.items()}


def measure_steps(steps: Steps, clip: Callable[[], ClipSteps], flops: dict, args: argparse.Namespace) -> dict:
    """Every kind of training step and CLIP's, several times, the median of each -> a row per kind."""
    runs: dict[str, list[dict]] = {name: [] for name in (*kinds_of_step(steps.model), "clip")}
    for _ in tqdm(range(args.repeats), unit="repeat", disable=None):
        for name, case in kinds_of_step(steps.model).items():
            runs[name].append(steps.measure(*case))
    step = clip().step            # only now: the two at once might not fit in memory
    for _ in range(args.repeats):
        runs["clip"].append({"seconds": median_seconds(step, args.rounds, args.warm_up, args.device)})
    peak = matmul_flops(args.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    rows = {}
    for name, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        rows[name] = {"seconds": seconds, "images_per_s": args.batch_size / seconds,
                      "gflops_per_image": flops[name] / 1e9,
                      "share_of_matmul_peak": flops[name] * args.batch_size / seconds / peak,
                      "memory_gib": found[-1].get("memory_gib")}
    return {"matmul_tflops": peak / 1e12, "steps": rows}


def ratios(cost: dict[str, float], ending: str) -> dict[str, float]:
    """What joint training costs, over its two parts, and over generation and a CLIP of its own."""
    return {name + tail + ending: cost["joint" + tail] / (cost["generation" + tail] + cost[other])
            for tail in ("", "_cached") if "joint" + tail in cost
            for name, other in (("joint_over_sum", "alignment" + tail),
                                ("joint_over_generation_plus_clip", "clip"))}


def count_memory(steps: Steps) -> dict:
    """GiB of joint training: weights, and for what is trained gradients, two moments and the average, in
    float32; and what a forward pass keeps, once and per pair."""
    steps.run.tasks = ("generation", "alignment")
    steps.model.requires_grad_(True)
    steps.train.freeze_unused(steps.model, steps.run.tasks, steps.trains_text)
    trained = sum(p.numel() for p in steps.model.parameters() if p.requires_grad) * 4 / 2 ** 30
    fixed = sum(p.numel() for p in steps.model.parameters()) * 4 / 2 ** 30 + 4 * trained
    memory = {"gradients": trained, "fixed": fixed, "fixed_ema_on_cpu": fixed - trained}
    for name, recompute in (("", False), ("_recompute", True)):
        one, two = (steps.activations_gib(steps.run.tasks, n, recompute) for n in (1, 2))
        memory |= {f"per_pair{name}": two - one, f"per_pass{name}": 2 * one - two}
    return memory


def speed(model: DiffDis, args: argparse.Namespace) -> dict:
    """The paper's Table 6: joint training beside its two parts, and what either task costs after."""
    steps, clip = Steps(model, args), cache(lambda: ClipSteps(CLIPS[args.preset], args, args.device))
    flops = {name: steps.flops(*case) for name, case in kinds_of_step(model).items()}
    flops["clip"] = clip_flops(CLIPS[args.preset], args.batch_size)
    result: dict = {"n": args.batch_size, "chance": None, "memory_gib": count_memory(steps),
                    "gflops": {name: value / 1e9 for name, value in flops.items()}}
    if args.tflops is not None:
        seconds = flops["joint"] * args.batch_size / (args.tflops * 1e12)
    else:
        result |= measure_steps(steps, clip, flops, args)
        result |= ratios({name: row["seconds"] for name, row in result["steps"].items()}, "")
        seconds = result["steps"]["joint"]["seconds"]
        took = result["inference_seconds"] = inference_seconds(model, steps, clip(), args)
        for name, a, b in (("draw_over_plain", "draw_step", "draw_step_plain"),
                           ("read_over_clip", "read_pixels", "clip_image"),
                           ("read_latents_over_clip", "read_latents", "clip_image")):
            result[name] = took[a] / took[b]
    result |= ratios(flops, "_limit")
    gradient_bytes = result["memory_gib"]["gradients"] * 2 ** 30
    result["scale"] = scale_up(seconds, args.batch_size, gradient_bytes, args)
    return {**result, "peak_memory_gib": steps.train.memory_gib(args.device)}


def print_speed(result: dict, args: argparse.Namespace) -> None:
    print(f"{args.preset}, batch {args.batch_size}, {args.precision}, "
          f"{'' if args.compile else 'not '}compiled, "
          f"optimiser {'included' if args.optimizer else 'left out'}")
    if "steps" in result:
        print(f"  {'training step':<19}{'ms':>9}{'images/s':>10}{'GFLOP/image':>13}"
              f"{'of product':>12}{'GiB':>7}")
        for name, row in result["steps"].items():
            memory = "n/a" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
            print(f"  {name:<19}{1000 * row['seconds']:9.1f}{row['images_per_s']:10.2f}"
                  f"{row['gflops_per_image']:13.1f}{100 * row['share_of_matmul_peak']:11.0f}%{memory:>7}")
        print(f"  (product: a large matrix product does {result['matmul_tflops']:.2f} TFLOP/s)")
        for name, seconds in result["inference_seconds"].items():
            print(f"  {name:<19}{1000 * seconds:9.1f}{args.batch_size / seconds:10.2f}")
    for name, value in result.items():
        if "_over_" in name and not name.endswith("_limit"):
            limit = result.get(f"{name}_limit")
            print(f"  {name:<40}{value:7.3f}" + (f"   by FLOPs {limit:.3f}" if limit else ""))
    memory = result["memory_gib"]
    print(f"  counted for joint training: weights, gradients, moments, averages {memory['fixed']:.1f} GiB "
          f"({memory['fixed_ema_on_cpu']:.1f} with --ema-on-cpu), a forward pass "
          f"{memory['per_pass']:.2f} + {memory['per_pair']:.3f} per pair "
          f"({memory['per_pass_recompute']:.2f} + {memory['per_pair_recompute']:.3f} with --recompute)\n"
          f"  most memory of this process: {result['peak_memory_gib']:.1f} GiB")
    print(f"  expected, where one device takes {1000 * result['scale'][0]['seconds']:.0f} ms per step "
          f"({'assumed' if args.tflops else 'measured'}); devices: images/s (share of perfect scaling)")
    print("  " + "  ".join(f"{row['devices']}: {row['images_per_s']:.1f} ({100 * row['efficiency']:.0f} %)"
                           for row in result["scale"]))


def speed_model(args: argparse.Namespace) -> DiffDis:
    """--ckpt's model, or the preset's with random weights."""
    if args.ckpt is not None:
        model = models.load(args.ckpt, args.device, weights="raw")
        kinds = [name for name, preset in models.PRESETS.items() if preset.unet == model.config.unet]
        args.preset = kinds[0] if kinds else args.preset
        return model
    config = models.PRESETS[args.preset]
    merges = [f"{i} {i}" for i in range(config.text.vocab_size - 514)]      # no words, but as many as it has
    torch.manual_seed(args.seed)
    model = DiffDis(config, Tokenizer(merges, config.text.context_length))
    return model.to(args.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------- command line
def print_table(title: str, result: dict, metrics: tuple[str, ...]) -> None:
    print(f"{title}  (n = {result['n']})")
    skipped = result.get("skipped", {"skipped": {}})["skipped"]
    if skipped:
        print(f"  left out: {', '.join(f'{count} {cause}' for cause, count in sorted(skipped.items()))}")
    for name in metrics:
        low, high = result.get(f"{name}_interval", (None, None))
        interval = "" if low is None else f"   95 % interval {100 * low:5.1f} – {100 * high:5.1f}"
        chance = result.get(f"{name}_chance", result["chance"] if name == "top1" else None)
        print(f"  {name:<15}{100 * result[name]:6.1f} %{interval}"
              + ("" if chance is None else f"   chance {100 * chance:.2f}"))


TASKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "retrieval": (retrieval, ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")),
    "zeroshot": (zeroshot, ("top1", "top5", "mean_per_class")),
    "checker": (checker, ("colour", "shape", "size", "relation", "all", "all_single")),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (function, _) in TASKS.items():
        task = tasks.add_parser(name, help=function.__doc__.split("\n")[0].replace("%", "%%"))
        add = task.add_argument
        add("--ckpt", help=CKPT_HELP)
        add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights, or the last step's")
        add("--json", metavar="FILE", help="also write the numbers here; rates are fractions")
        add("--seed", type=natural, default=0, help="seed of all noise and of the controls' shuffling")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
        if name == "checker":
            add("--n", type=positive, default=64, help="held-out prompts to draw")
            add("--best-of", type=positive, default=1, help="draw this many, keep the model's own favourite")
            add("--steps", type=positive, default=50, help="sampler steps")
            add("--guidance-scale", type=finite, help="1 + w, 1: none; without it the checkpoint's own")
            continue
        add("--data", default="shapes",
            help="shapes, cc3m, or a folder of tars, class folders or captioned images")
        add("--control", choices=CONTROLS, default="none",
            help="break the evaluation on purpose: expect chance")
        add("--text-steps", type=positive, default=1, help="denoising steps of the text query")
        add("--draws", type=positive, default=1, help="noise draws averaged per image")
        add("--guidance-scale", type=finite, default=1.0, help="1 + w; 1: no guidance")
        add("--limit", type=positive, help="images to use, evenly spaced; without it all")
        add("--batch-size", type=positive, default=100, help="images at once")
        add("--max-bad", type=finite, default=0.05,
            help="stop when more than this share of samples is unusable")
        if name == "zeroshot":
            add("--templates", metavar="FILE", help="text file, a template per line, {} for the class name")
    add_speed_flags(tasks.add_parser("speed", help=speed.__doc__.split("\n")[0]).add_argument)
    return parser.parse_args(argv)


def add_speed_flags(add: Callable) -> None:
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--preset", choices=tuple(models.PRESETS), default="tiny", help="whose networks, with random weights")
    add("--ckpt", help="a checkpoint's networks instead")
    add("--batch-size", type=positive, help="pairs per step, 2 or more; without it the preset's, sd-v1: 2")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA")
    add("--compile", **switch, help="torch.compile; without it: on CUDA")
    add("--recompute", **switch, default=False, help="activation checkpointing")
    add("--optimizer", **switch, default=True, help="AdamW and averages as part of the step")
    add("--rounds", type=positive, default=10, help="measured steps of each kind in a row, the median counts")
    add("--warm-up", type=natural, default=2, help="steps before them")
    add("--repeats", type=positive, default=3, help="times that all kinds take their turn")
    add("--tflops", type=finite, help="measure nothing: expect a device to do so many TFLOP/s, and count")
    add("--link-gb-s", type=finite, nargs=2, default=(450.0, 50.0), metavar=("NODE", "NETWORK"),
        help="GB/s one way: between the devices of a machine (up to 8), and of a machine's network")
    add("--seed", type=natural, default=0, help="of the weights' and inputs' random numbers")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--json", metavar="FILE", help="also write the numbers here")


def run_speed(args: argparse.Namespace) -> dict:
    """Settle what the flags leave open, measure, print -> the numbers."""
    args.device = pick_device(args.device)
    cuda = args.device.type == "cuda"
    args.precision = args.precision if args.precision != "auto" else "bf16" if cuda else "fp32"
    args.compile = cuda if args.compile is None else args.compile
    model = speed_model(args)
    args.batch_size = args.batch_size or {"tiny": 32, "small": 16, "sd-v1": 2}[args.preset]
    if min(*args.link_gb_s, 1.0 if args.tflops is None else args.tflops) <= 0:
        raise ValueError("--link-gb-s and --tflops are rates: expected more than 0")
    if args.batch_size < 2:
        raise ValueError("--batch-size is 1, but the alignment loss compares pairs: 2 or more")
    result = speed(model, args)
    print_speed(result, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "device", "task", "seed")}
    return {"task": "speed", "seed": args.seed, "settings": settings, **result}


def read_templates(path: str | None) -> list[str] | None:
    if path is None:
        return None
    lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not lines or any("{}" not in line for line in lines):
        raise ValueError(f"{path}: expected a template per line, each with {{}} for the class name")
    return lines


def report(task: str, model: DiffDis, source: Source | None, args: argparse.Namespace) -> dict:
    """Run a task, print its table -> the numbers. source: where the pairs come from (not for `checker`)."""
    function, metrics = TASKS[task]
    if source is not None and not model.can_read:
        raise ValueError("these weights only draw images, they do not read them: "
                         "train their query stream with train.py --init first")
    result = function(model, args) if source is None else function(model, source, args)
    name = "shapes" if source is None else source.name
    control = getattr(args, "control", "none")
    print_table(f"{task} on {name}, seed {args.seed}" + (f", control {control}" if control != "none" else ""),
                result, metrics)
    return {"task": task, "data": name, "control": control, "seed": args.seed, **result}


def write_json(args: argparse.Namespace, result: dict, argv: list[str] | None, path: str,
               device: torch.device) -> None:
    """--json: the printed numbers, and what they are of."""
    if args.json:
        given = sys.argv[1:] if argv is None else argv
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        settings = {"command": " ".join(["python evaluate.py", *given]), "date": date.today().isoformat(),
                    "checkpoint": path, "torch": torch.__version__, "device": f"{device} ({name})",
                    "threads": torch.get_num_threads()}
        Path(args.json).write_text(json.dumps({**result, **settings}, indent=1) + "\n")
        print(f"wrote {args.json}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise ValueError(f"--json is {args.json!r}, expected a file in an existing folder")
        if args.task == "speed":
            write_json(args, run_speed(args), argv, str(args.ckpt or args.preset), args.device)
            return
        path, source = find_checkpoint(args.ckpt), None
        model = models.load(path, pick_device(args.device), args.weights)
        if args.task == "zeroshot":
            args.templates = read_templates(args.templates)
        if args.task != "checker":
            source = open_source(
                args.data, "classes" if (args.task, args.data) == ("zeroshot", "shapes") else "val")
            source = evenly_spaced(source, args.limit)
        result = report(args.task, model, source, args)
        write_json(args, result, argv, str(path), model.device)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 130)


if __name__ == "__main__":
    main()
