"""Scores: how well images and texts find each other, and what drawn pictures are worth.

What it is: Algorithm 3 (sample.py) turned into the field's numbers, and the baselines' by the same code.
    python evaluate.py retrieval --data shapes        R@1/5/10, image -> text and text -> image
    python evaluate.py zeroshot  --data DIR           top-1, top-5, mean per class; Diffusion Classifier's too
    python evaluate.py fid       --data DIR           Fréchet distance of drawn pictures and real ones
    python evaluate.py longtail  --data DIR           VL-LTR's two stages on few images of most classes
    python evaluate.py row       --data shapes        all that a checkpoint was trained for, in one go
    python evaluate.py checker   --best-of 4          pictures for held-out prompts, judged from their pixels
What it is not: DiffDis's training. What predicts is `sample.draw_queries`, which is handed clean latents and
nothing else (of a CLIP, its image tower and pixels); its text queries are compared with those of all
candidate texts, and only then with the truth. Whatever has right answers has controls (`--control`) in which
a sound evaluation must fall to chance.

Under torchrun the ranks share every task but longtail and checker.
Read next: train.py, which scores as it goes.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import model as models
from data import (IMAGE_SUFFIXES, KINDS, SIDE, Batch, FileSource, Sample, Shapes, SkipReport, Source,
                  check, check_index, clean, evaluation_batches, evenly_spaced, files_below,
                  open_source, rand_augment, refuse_missing, text_lines, to_square, usable_captions)
from diffusion import (generation_loss, generator_of, make_alphas_cumprod, make_target,
                       noise_of, q_sample, read_prediction, signal_and_noise)
from model import Clip, DiffDis, LanguageGuidedHead, TextConfig
from sample import (CKPT_HELP, SAMPLERS, Parser, best_of, draw_images, draw_queries, fail, find_checkpoint,
                    fingerprint, finite, natural, pick_device, positive, to_pil)

CONTROLS = ("none", "shuffle-images", "no-image", "shuffle-labels")


# ---------------------------------------------------------------- ranks
def restarts() -> int:
    """How often torchrun has started these ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join_ranks(name: str) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if it does; name: of the device, or auto
    -> rank, number of ranks, device."""
    device, rank, world = pick_device(name), 0, 1
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Long: one rank may index a large data set, or write a large checkpoint, while the others wait.
        options: dict = {"timeout": timedelta(minutes=30)}
        store, rank, world = next(dist.rendezvous("env://", **options))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun keeps its store when it starts ranks again: without a name of their own for each try
            # they would call at the addresses of the dead. (Between machines the counts may differ.)
            store = dist.PrefixStore(f"try-{restarts()}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, **options)
    return rank, world, device


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everybody(value):
    """What every rank passes, in rank order; with one rank a list of one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def in_turn(do: Callable):
    """`do`, by the first rank of each machine before the others: what it keeps or downloads they find.
    Where one fails, all do, with its ValueError or OSError."""
    first, result = int(os.environ.get("LOCAL_RANK", 0)) == 0, None
    for turn in (True, False):
        error = None
        if first == turn:
            try:
                result = do()
            except (ValueError, OSError) as raised:
                error = raised
        for error in filter(None, everybody(error)):
            raise error
    return result


def together(count: int, rows_of: Callable[[range], Tensor]) -> Tensor:
    """Rows 0 … count-1 of something, computed by all ranks: rank r computes r, r + N, … -> all of them."""
    rank, world = rank_and_world()
    mine = rows_of(range(rank, count, world)) if rank < count else None
    if world == 1:
        return mine
    parts = [part for part in everybody(None if mine is None else mine.cpu()) if part is not None]
    whole = parts[0].new_empty(count, *parts[0].shape[1:])
    for r, part in enumerate(parts):
        whole[r::world] = part
    return whole.to(mine.device) if mine is not None else whole


# ---------------------------------------------------------------- reading images
class Mismatched(Source):
    """Every sample with the image of another: the control "shuffle-images"."""

    def __init__(self, source: Source, seed: int) -> None:
        super().__init__(source.name, len(source))
        self.source, self.others, self.skipped = source, shuffled(len(source), seed).tolist(), source.skipped

    def read(self, index: int, side: int | None = None) -> Sample:
        row = self.rows[index]
        return replace(self.source.read(row, side), image=self.source.read(self.others[row], side).image)


class Read(NamedTuple):
    """What `over_images` found; rows are the usable samples in the source's order."""
    values: Tensor                # [N, ...], on the CPU
    captions: list[list[str]]
    labels: list
    keys: list[str]
    skips: SkipReport
    seconds: float                # per image and device, decoding included


@torch.no_grad()
def over_images(model: DiffDis | Clip, source: Source, args: argparse.Namespace,
                values_of: Callable[[Tensor, list[int]], Tensor]) -> Read:
    """values_of(inputs [B, ...], numbers of the images [B]) -> [B, ...], for all usable images, each once;
    the ranks share them. inputs: clean latents, of a CLIP normalised pixels.

    The controls that concern images act here, before anything is predicted: "no-image" zeroes the inputs,
    "shuffle-images" gives each sample the image of another.
    """
    if args.control.startswith("shuffle") and len(source) < 2:
        raise ValueError(f"--control {args.control} needs two samples or more, {source.name} has "
                         f"{len(source)}")
    if args.control == "shuffle-images":
        source = Mismatched(source, args.seed)
    rank, world = rank_and_world()
    mine = source.subset(np.arange(rank, len(source), world)) if world > 1 else source
    skips, values, rows, began = SkipReport(args.max_bad), [], [], time.perf_counter()
    with tqdm(total=len(mine), unit="image", desc="read", disable=None if rank == 0 else True,
              leave=False) as bar:
        for batch in evaluation_batches(mine, model.config.image_size, args.batch_size, args.workers or 0):
            skips.add(batch.skipped, batch.visited)
            if batch.captions:
                inputs, places = model.read_batch(batch.images.to(model.device)), [
                    i * world + rank for i in batch.places]
                inputs = torch.zeros_like(inputs) if args.control == "no-image" else inputs
                values.append(values_of(inputs, places).cpu())
                rows += zip(places, batch.captions, batch.labels, batch.keys)
            bar.update(batch.visited)
    seconds = time.perf_counter() - began
    # One tensor a rank: pickled, a row that is a view of its batch would take the batch along.
    parts = everybody((torch.cat(values) if values else None, rows))
    skips = join_reports(skips, source, args)
    rows = [row for _, part in parts for row in part]
    if not rows:
        raise ValueError(f"{source.name} has no usable sample ({skips})")
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    whole = torch.cat([part for part, _ in parts if part is not None])[order]
    _, captions, labels, keys = zip(*(rows[i] for i in order))
    return Read(whole, list(captions), list(labels), list(keys), skips, seconds * world / len(rows))


def join_reports(skips: SkipReport, source: Source, args: argparse.Namespace) -> SkipReport:
    """What all ranks left out, and what the source's index did. Raises ValueError, on all, if it is much."""
    whole = SkipReport(args.max_bad)
    for report in everybody(skips):
        whole.add(report.skipped, report.visited)
    whole.add(+source.skipped, sum(source.skipped.values()))
    whole.check(final=True)
    return whole


def read_queries(model: DiffDis | Clip, inputs: Tensor, places: list[int],
                 args: argparse.Namespace) -> Tensor:
    """What the model reads from images, comparable with texts [B, D], unit norm: a denoised text query
    (Algorithm 3), of a CLIP the image's embedding."""
    if isinstance(model, Clip):
        return model.encode_image(inputs)
    return draw_queries(model, inputs, places, args.text_steps, args.draws, args.guidance_scale, args.seed)


def image_queries(model: DiffDis | Clip, source: Source, args: argparse.Namespace) -> Read:
    """`read_queries` of all usable images. Raises ValueError where they are not finite."""
    read = over_images(model, source, args, lambda inputs, places: read_queries(model, inputs, places, args))
    if not torch.isfinite(read.values).all():
        raise ValueError("the model's text queries are not finite: its weights are not usable")
    return read


@torch.no_grad()
def encode_texts(model: DiffDis | Clip, texts: list[str], batch: int = 256) -> Tensor:
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


def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- statistics
def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a rate in [0, 1] observed over n trials."""
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def ranks_of_best_match(queries: Tensor, candidates: Tensor, matches: list[list[int]],
                        block: int = 1024) -> Tensor:
    """How many wrong candidates are at least as similar as the best right one; 0 is a hit at R@1.

    queries [N, D], candidates [K, D], matches: N lists of right candidates -> [N] int64. Memory is block · K;
    the ranks share the rows.
    Ties count against the model: one that gives every candidate the same score must not look perfect.
    """
    def ranks_of(places: range) -> Tensor:
        ranks, places = [], list(places)
        for start in range(0, len(places), block):
            some = places[start:start + block]
            similarity = queries[some] @ candidates.T
            right = torch.zeros_like(similarity, dtype=torch.bool)
            for row, place in enumerate(some):
                right[row, matches[place]] = True
            best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
            ranks.append((~(similarity < best) & ~right).sum(dim=1))   # so written, NaN counts against it too
        return torch.cat(ranks).cpu()
    return together(len(queries), ranks_of)


def chance_of_hit(k: int, candidates: int, right: int) -> float:
    """Probability that k candidates drawn blindly hold at least one of the right ones."""
    k = min(k, candidates)
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)


# ---------------------------------------------------------------- tasks
def retrieval(model: DiffDis, source: Source, args: argparse.Namespace) -> dict:
    """R@1/5/10 both ways over all captions of all images.

    Image -> text is a hit if any caption of the image is among the k most similar texts; text -> image if any
    image with that caption is. Equal captions are one text; with Karpathy's files each is its own, as in the
    field's protocol.
    """
    read = image_queries(model, source, args)
    queries, captions = read.values, read.captions
    if args.control == "shuffle-labels":
        captions = [captions[i] for i in shuffled(len(captions), args.seed).tolist()]
    if source.texts is not None:
        texts = [text for found in captions for text in found]
        ends = np.cumsum([len(found) for found in captions]).tolist()
        texts_of = [list(range(end - len(found), end)) for end, found in zip(ends, captions)]
    else:
        texts = list(dict.fromkeys(text for found in captions for text in found))
        column = {text: i for i, text in enumerate(texts)}
        texts_of = [[column[text] for text in found] for found in captions]
    images_of = [[] for _ in texts]
    for image, columns in enumerate(texts_of):
        for j in columns:
            images_of[j].append(image)
    result = {"n": len(queries), "n_texts": len(texts)}
    texts = encode_texts(model, texts).cpu()
    for name, ranks, matches, pool in (
            ("i2t", ranks_of_best_match(queries, texts, texts_of), texts_of, len(texts)),
            ("t2i", ranks_of_best_match(texts, queries, images_of), images_of, len(queries))):
        for k in (1, 5, 10):
            rate = (ranks < k).double().mean().item()
            result[f"{name}_r{k}"] = rate
            # An image's captions succeed and fail together: no more trials than images.
            result[f"{name}_r{k}_interval"] = wilson(rate, min(len(ranks), len(queries)))
            result[f"{name}_r{k}_chance"] = sum(
                chance_of_hit(k, pool, len(set(m))) for m in matches) / len(matches)
    return {**result, "mean_r1": (result["i2t_r1"] + result["t2i_r1"]) / 2, "chance": result["i2t_r1_chance"],
            "seconds_per_image": read.seconds, "skipped": read.skips.counts()}


def fill(template: str, name: str, verbatim: bool = False) -> str:
    """A class name in a template; if it is one of ours, "a {}" becomes "an {}" before the letter of a vowel,
    as in the captions that training makes of class folders."""
    if name[0].lower() in "aeiou" and not verbatim:
        template = re.sub(r"\ba \{\}", "an {}", template)
    return template.replace("{}", name)


ENSEMBLE = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a close-up photo of a {}",
            "a blurry photo of a {}", "a bright photo of a {}", "a dark photo of a {}",
            "a photo of a small {}", "a photo of a large {}", "a photo of one {}", "a cropped photo of a {}",
            "a drawing of a {}", "a {} outdoors", "a {} on a plain background", "this is a {}",
            "there is a {} in this picture")
# Data sets for which the field quotes the mean of the classes' accuracies, by the last folders' names.
MEAN_PER_CLASS = re.compile("aircraft|(?<![a-z])pets?(?![a-z])|caltech|flowers", re.IGNORECASE)


def pick_templates(model: DiffDis | Clip, source: Source, args: argparse.Namespace) -> list[str]:
    """--templates, or what is built in."""
    if args.templates:
        return args.templates
    if source.name == "shapes":
        return ["a {}"]
    # A vocabulary learnt here comes with a text encoder that has read little but "a photo of a CLASS".
    return list(ENSEMBLE if model.config.text.vocab_size == TextConfig().vocab_size else ENSEMBLE[:1])


def class_queries(model: DiffDis | Clip, names: list[str], templates: list[str],
                  verbatim: bool = False) -> Tensor:
    """Names of K classes -> the normalised mean of each one's prompts [K, D]; verbatim: no "an" for "a"."""
    prompts = [fill(template, name, verbatim) for name in names for template in templates]
    queries = encode_texts(model, prompts).unflatten(0, (len(names), -1))
    return F.normalize(queries.mean(dim=1), dim=-1).cpu()


def spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of the values, evenly spaced."""
    return [values[(2 * i + 1) * len(values) // (2 * count)] for i in range(count)]


@torch.no_grad()
def classify_by_loss(model: DiffDis, latents: Tensor, places: list[int], contexts: Tensor,
                     args: argparse.Namespace) -> Tensor:
    """Diffusion Classifier (Li et al. 2023): the class under whose prompt the UNet denoises an image best.

    latents: clean z [B, C, h, w]; places: numbers that name the images: noise is a function of (seed, place,
    draw); contexts: the classes' text conditions [K, L, D] -> scores [B, K]: minus the mean generation loss
    (Eq. 4) over timesteps and noise that an image's classes share. In stages: after so many draws in all
    (--dc-samples) only so many classes (--dc-keep) go on, and those behind rank below them.
    """
    config, (count, classes) = model.config, (len(latents), len(contexts))
    alphas = make_alphas_cumprod(config.image_schedule, config.timesteps).to(model.device)
    total, drawn = args.dc_samples[-1], []
    losses, scores = latents.new_zeros(2, count, classes, dtype=torch.float64)
    alive = torch.arange(classes, device=model.device).repeat(count, 1)               # [B, classes left]
    for stage, samples in enumerate(args.dc_samples):
        left = alive.shape[1]
        rows = torch.arange(count * left, device=model.device).split(args.batch_size)
        # Timesteps evenly spaced in the first stage and in all, and nearly so in between.
        open_to = [j for j in spread(range(total), samples) if j not in drawn]
        new = spread(open_to, samples - len(drawn))
        for j in new:
            noise = noise_of(latents.shape[1:], [(args.seed, place, j) for place in places]).to(model.device)
            t = torch.full((count,), (2 * j + 1) * config.timesteps // (2 * total), device=model.device)
            a, s = signal_and_noise(t, latents, alphas)
            target = make_target(config.image_target, latents, noise, a, s)
            noisy, found = q_sample(latents, t, noise, alphas), []
            for some in rows:       # pairs of image and class
                image, which = some // left, alive.flatten()[some]
                pred = model.denoise_image(noisy[image], t[image], contexts[which])
                found.append(generation_loss(pred, target[image]))
            losses.scatter_add_(1, alive, torch.cat(found).double().view(count, left))
        drawn += new
        mean = losses.gather(1, alive) / len(drawn)
        scores.scatter_(1, alive, 1e4 * stage - mean)
        if stage < len(args.dc_keep):
            best = mean.topk(min(args.dc_keep[stage], left), largest=False).indices
            alive = alive.gather(1, best.sort(dim=1).values)
    return scores


def zeroshot(model: DiffDis | Clip, source: Source, args: argparse.Namespace) -> dict:
    """Zero-shot classification: top-1, top-5 and the mean of the classes' top-1.

    A class's text query is the normalised mean of its templates' queries; with --method diffusion-classifier
    a class is its first template's text condition, and the generation loss decides.
    """
    if source.classes is None:
        raise ValueError(f"{source.name} has no classes: "
                         "zeroshot needs class folders (DIR/CLASS/*.jpg) or another layout of the README")
    templates, names = pick_templates(model, source, args), source.classes
    verbatim, where = args.templates is not None, "/".join(Path(args.data).resolve().parts[-3:])
    if args.method == "alignment":
        classes = class_queries(model, names, templates, verbatim)
        read = image_queries(model, source, args)
        similarity = read.values @ classes.cpu().T
    else:
        templates = templates[:1]
        with torch.no_grad():
            contexts = model.encode_text([fill(templates[0], name, verbatim) for name in names])[0]
        read = over_images(model, source, args, lambda latents, places: classify_by_loss(
            model, latents, places, contexts, args))
        similarity = read.values
    for j, name in enumerate(names):        # ImageNet has two "crane"s: the first wins, as by argmax
        if name in names[:j]:
            similarity[:, j] = similarity[:, j].nextafter(similarity.new_tensor(-math.inf))
    labels = torch.tensor(read.labels)
    if args.control == "shuffle-labels":
        labels = labels[shuffled(len(labels), args.seed)]
    return {"method": args.method, "classes": len(names), "templates": templates,
            **accuracies(similarity, labels), "seconds_per_image": read.seconds,
            "quoted": "mean_per_class" if MEAN_PER_CLASS.search(where) else "top1",
            "skipped": read.skips.counts()}


def accuracies(similarity: Tensor, labels: Tensor) -> dict:
    """similarity [N, K], labels [N] -> top-1 with its interval, top-5, mean per class, n, chance."""
    truth = similarity.gather(1, labels[:, None])
    ranks = (~(similarity < truth)).sum(dim=1) - 1        # ties count against the model, as above
    hits = (ranks == 0).double()
    per_class = [hits[labels == c].mean().item() for c in labels.unique()]
    top1 = hits.mean().item()
    return {"n": len(labels), "chance": 1 / similarity.shape[1], "top1": top1,
            "top1_interval": wilson(top1, len(labels)), "top5": (ranks < 5).double().mean().item(),
            "mean_per_class": sum(per_class) / len(per_class)}


# ---------------------------------------------------------------- features of images, the checker's rates
@torch.no_grad()
def image_tokens(model: DiffDis | Clip, inputs: Tensor, places: list[int], seed: int) -> Tensor:
    """inputs, places: as `over_images` hands them over -> the image tokens after the alignment transformer
    (from t = T-1), of a CLIP after the last layer, averaged [B, D]."""
    if isinstance(model, Clip):
        return model.vision_model.tokens(inputs)[:, 1:].mean(dim=1)
    noise = noise_of((model.config.text.width,), [(seed, place, 0) for place in places]).to(model.device)
    t = torch.full((len(places),), model.config.timesteps - 1, device=model.device)
    return model.image_features(noise, t, inputs)


def held_out_captions(count: int) -> list[str]:
    """Captions of the first `count` validation scenes of `shapes`."""
    val = Shapes("val")
    return [val.captions(i)[0] for i in range(min(count, len(val)))]


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
        whole = Statistics(len(self.mean))
        whole.merge(everybody(self))
        return whole

    def covariance(self) -> Tensor:
        """-> [D, D], unbiased. Raises ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, here are {self.count}")
        return self.scatter / (self.count - 1)


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


class Features:
    """Where images are compared: Inception's pool3 (FID), or the image tokens of a checkpoint, averaged."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        if args.features is None:
            self.network, self.width = in_turn(lambda: models.load_inception(args.inception, device)), 2048
            self.name = f"Inception pool3, {args.resize} resize"
        else:
            self.network = models.load(args.features, device)
            if "alignment" not in self.network.tasks:
                raise ValueError(f"--features {args.features} was trained to draw only, and its image tokens "
                                 "mean nothing: expected one trained with --tasks alignment, or a CLIP")
            clip = isinstance(self.network, Clip)
            self.width = self.network.config.width if clip else self.network.config.fusion.query_width
            self.name = f"image tokens of {args.features} ({fingerprint(models.locate(args.features))})"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, places: list[int]) -> Tensor:
        """pixels uint8 [B, H, W, 3] -> [B, width], float32."""
        if self.args.features is None:
            return self.network(inception_input(pixels.to(self.device), self.args.resize))
        size = self.network.config.image_size
        if pixels.shape[1] != size:
            pixels = torch.from_numpy(np.stack([to_square(Image.fromarray(p.cpu().numpy()), size)
                                                for p in pixels]))
        inputs = self.network.read_batch(pixels.to(self.device))
        return image_tokens(self.network, inputs, places, self.args.seed).float()


def statistics_of(features: Features, source: Source, size: int, args: argparse.Namespace
                  ) -> tuple[Statistics, dict]:
    """Of the source's centre squares at `size` px, by all ranks, and the report on what was left out.
    Raises ValueError."""
    rank, world = rank_and_world()
    skips, statistics = SkipReport(args.max_bad), Statistics(features.width)
    mine = source.subset(np.arange(rank, len(source), world))
    for batch in tqdm(evaluation_batches(mine, size, args.batch_size, args.workers or 0), unit="batch",
                      desc="read", disable=None if rank == 0 else True, leave=False,
                      total=-(-len(mine) // args.batch_size)):
        skips.add(batch.skipped, batch.visited)
        if batch.captions:
            statistics.add(features(batch.images, [i * world + rank for i in batch.places]))
    return statistics.gather(), join_reports(skips, source, args).counts()


def drawn_pictures(model: DiffDis, prompts: list[str], size: int,
                   args: argparse.Namespace) -> Iterator[tuple[list[int], np.ndarray]]:
    """This rank's share of one picture per prompt, at `size` px, in batches -> numbers of the prompts, uint8
    [B, size, size, 3]; picture i comes from seed + i, whatever the batches."""
    rank, world = rank_and_world()
    mine = range(rank, len(prompts), world)
    for first in tqdm(range(0, len(mine), args.batch_size), unit="batch", desc="draw",
                      disable=None if rank == 0 else True):
        some = list(mine[first:first + args.batch_size])
        images = draw_images(model, [prompts[i] for i in some], [args.seed + i for i in some], args.steps,
                             args.guidance_scale, sampler=args.sampler)
        pixels = np.stack([to_square(to_pil(image), size) for image in images])
        if args.out:
            for i, picture in zip(some, pixels):
                Image.fromarray(picture).save(Path(args.out) / f"{i:06d}.png")
        yield some, pixels


def drawn_statistics(features: Features, model: DiffDis, prompts: list[str], size: int,
                     args: argparse.Namespace) -> Statistics:
    """Of `drawn_pictures`, by all ranks."""
    found = Statistics(features.width)
    for places, pixels in drawn_pictures(model, prompts, size, args):
        found.add(features(torch.from_numpy(pixels), places))
    return found.gather()


def open_pictures(args: argparse.Namespace) -> Source:
    """--images: all pictures below a folder, --n of them. Raises ValueError."""
    found = [p for p in files_below(Path(args.images)) if p.suffix[1:].lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"--images {args.images} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return evenly_spaced(FileSource(found, args.images, ["picture"], [0] * len(found)), args.n)


def check_number(args: argparse.Namespace, **numbers: int) -> None:
    """Raises ValueError if there are fewer than Inception has features, and nobody said to go on."""
    for what, n in numbers.items():
        if n < 2048 and not args.allow_small:
            raise ValueError(f"{n} {what.replace('_', ' ')}, and below 2048 the distance says more about "
                             "their number than about the pictures: take more, or see it with --allow-small")


def fid(model: DiffDis | None, source: Source, args: argparse.Namespace) -> dict:
    """Fréchet distance between drawn pictures, or those of --images, and the images of --data.

    Drawn is one picture for each of --n samples' first captions. Both sets are compared at the same size.
    """
    if args.control != "none":
        raise ValueError(f"--control {args.control}: fid has no right answers to break, leave it out")
    size = args.image_size or (256 if model is None else model.config.image_size)
    if model is None:
        ours = open_pictures(args)
        count = len(ours)
    else:
        some = evenly_spaced(source, args.n or 30000)
        prompts = [captions[0] for captions in usable_captions(some, len(some))]
        count = len(prompts)
    check_number(args, pictures=count, reference_images=len(source))
    features = Features(args, args.device if model is None else model.device)
    reference, skips = statistics_of(features, source, size, args)
    if model is None:
        found, lost = statistics_of(features, ours, size, args)
        protocol, skips = {"pictures": args.images}, {**skips, "skipped_pictures": lost["skipped"]}
    else:
        found = drawn_statistics(features, model, prompts, size, args)
        scale = model.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
        protocol = {"pictures": f"one per caption, seeds from {args.seed}",
                    "checkpoint": f"{args.ckpt} ({fingerprint(Path(args.ckpt))})", "sampler": args.sampler,
                    "steps": args.steps, "guidance_scale": scale}
    check_number(args, pictures=found.count, reference_images=reference.count)
    protocol |= {"features": features.name, "image_size": size,
                 "reference": f"{args.data}, centre squares, bicubic"}
    return {"n": found.count, "n_reference": reference.count, "chance": None,
            "fid": frechet_distance(found, reference), "protocol": protocol, "skipped": skips}


# ---------------------------------------------------------------- a row of the paper's tables
@torch.no_grad()
def denoising_error(model: DiffDis, source: Source, args: argparse.Namespace,
                    levels: int = 10) -> tuple[float, SkipReport]:
    """Mean squared error of ẑ_0, predicted from z_t and the image's own caption, over evenly spaced t, and
    what was left out: the loss of generation (Eq. 4) with target data, whatever target was trained, on images
    not seen. Raises ValueError where it is not finite."""
    config = model.config
    alphas = make_alphas_cumprod(config.image_schedule, config.timesteps).to(model.device)

    def values_of(latents: Tensor, places: list[int]) -> Tensor:
        context, errors = model.encode_text([source.captions(place)[0] for place in places])[0], []
        for j, t in enumerate(spread(range(config.timesteps), levels)):
            noise = noise_of(latents.shape[1:], [(args.seed, place, j) for place in places]).to(model.device)
            t = torch.full((len(places),), t, device=model.device)
            noisy, (a, s) = q_sample(latents, t, noise, alphas), signal_and_noise(t, latents, alphas)
            found = read_prediction(config.image_target, model.denoise_image(noisy, t, context), noisy, a, s)
            errors.append(generation_loss(found[0], latents))
        return torch.stack(errors).mean(dim=0)
    read = over_images(model, source, args, values_of)
    if not torch.isfinite(read.values).all():
        raise ValueError("the denoising error is not finite: the model's weights are not usable")
    return read.values.mean().item(), read.skips


def row(model: DiffDis | Clip, source: Source, args: argparse.Namespace) -> dict:
    """All that a checkpoint was trained for, in one go: a row of the paper's tables in small.

    Reading: retrieval where there are captions, zero-shot where there are classes; `shapes` has both.
    Drawing: the denoising error, and --n pictures for captions of --data: judged if it is `shapes`, and with
    --features their Fréchet distance to the images of --data in that checkpoint's image tokens.
    """
    if args.control != "none":
        raise ValueError(f"--control {args.control}: a row has no right answers to break, but retrieval and "
                         "zeroshot have")
    shapes, draws = args.data == "shapes", "generation" in model.tasks
    # First: a mistaken file is to be found now, not after minutes.
    features = Features(args, model.device) if draws and args.features else None
    result: dict = {"n": len(source), "chance": None, "tasks": list(model.tasks)}
    if "alignment" in model.tasks:
        own = argparse.Namespace(**{**vars(args), "templates": None, "method": "alignment",
                                    "guidance_scale": 1.0})
        if source.classes is not None or shapes:
            things = evenly_spaced(open_source("shapes", "classes"), args.limit) if shapes else source
            found = zeroshot(model, things, own)
            result |= {name: found[name] for name in ("n", "top1", "top1_interval", "top5", "skipped")}
            result["top1_chance"] = found["chance"]
        if source.classes is None:
            found = retrieval(model, source, own)
            kept = ("n", "i2t", "t2i", "mean", "skipped")
            result |= {name: value for name, value in found.items() if name.startswith(kept)}
    if draws:
        result |= drawing_row(model, source, features, args)
    return result


def drawing_row(model: DiffDis, source: Source, features: Features | None, args: argparse.Namespace) -> dict:
    """The denoising error on --n samples, and what pictures for their captions are worth."""
    some, size, verdicts = evenly_spaced(source, args.n), model.config.image_size, []
    error, skips = denoising_error(model, some, args)
    result: dict = {"n_drawn": len(some), "denoising_error": error, "skipped_drawing": skips.counts()}
    if features is None and args.data != "shapes":       # nobody would look at the pictures
        return result
    prompts = [captions[0] for captions in usable_captions(some, args.n)]
    found = Statistics(features.width if features else 1)
    for places, pixels in drawn_pictures(model, prompts, size, args):
        if features:
            found.add(features(torch.from_numpy(pixels), places))
        if args.data == "shapes":
            at_side = [to_square(Image.fromarray(picture), SIDE) for picture in pixels]
            verdicts += [check(picture, prompts[i]) for i, picture in zip(places, at_side)]
    verdicts = [verdict for part in everybody(verdicts) for verdict in part]
    for name in verdicts[0] if verdicts else ():
        result[name] = sum(verdict[name] for verdict in verdicts) / len(verdicts)
    if verdicts:
        result["all_interval"], result["all_chance"] = wilson(result["all"], len(verdicts)), 0.0
    scale = model.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    result["protocol"] = {"pictures": len(prompts), "sampler": args.sampler, "steps": args.steps,
                          "guidance_scale": scale, "image_size": size}
    if features:
        reference = statistics_of(features, source, size, args)[0]
        result["protocol"] |= {"features": features.name}
        result |= {"fid": frechet_distance(found.gather(), reference), "n_reference": reference.count}
    return result


# ---------------------------------------------------------------- long-tailed recognition (Table 8)
SHOTS = ("many", "medium", "few")       # training images of a class
BY_SHOT = ("", *(f"_{name}" for name in SHOTS))
REPRESENTATIONS = ("query", "tokens")


class LongTail(NamedTuple):
    """A data set with few images of most classes, and what is said of each (VL-LTR; Tian et al. 2022)."""
    train: Source                 # labelled
    test: Source                  # likewise
    names: list[str]              # K classes
    sentences: list[list[str]]    # of each class, from its description; none without one

    @property
    def name(self) -> str:
        return self.test.name

    def labels(self) -> Tensor:
        """Of all training images [N]."""
        return torch.tensor([self.train.label(i) for i in range(len(self.train))])

    def counts(self) -> list[int]:
        """Training images of each class."""
        return torch.bincount(self.labels(), minlength=len(self.names)).tolist()


PLACES_LT = {"train": 62500, "val": 7300, "test": 36500}       # images of its lists, 365 classes
# Sections of a Wikipedia article that tell nothing of its subject.
DROPPED_SECTIONS = {"References", "External links", "Further reading", "Bibliography"}


def open_longtail(name: str) -> LongTail:
    """A long-tailed data set in Places-LT's layout, as VL-LTR has it.

    name: a folder, or "places-lt" (./places-lt or ./data/places-lt), with
    *train.txt, *val.txt and *test.txt, lines "PATH LABEL", PATH below the folder, LABEL from 0 (of val the
    list is checked, its images are not needed);
    labels.txt, lines "NAME LABEL" (without it a class is called as the folder of its images);
    wiki/desc_LABEL.txt, if there, an article on the class; or "shapes": 24 kinds of things, by Zipf's law.
    Raises FileNotFoundError or ValueError before any image is read: lists or images that are not there,
    labels out of range, classes without a training image, paths that are trained and tested on, other counts
    than Places-LT's in its own lists.
    """
    if name == "shapes":
        return zipf_shapes()
    places = [Path(name), *([Path("data") / name] if name == "places-lt" else [])]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"no folder at {', '.join(map(str, places))}: expected one with lists "
                                "*train.txt, *val.txt, *test.txt, or 'shapes'")
    tables, lists = {}, {}
    for split in PLACES_LT:
        found = sorted(root.glob(f"*{split}.txt"))
        if len(found) != 1:
            raise ValueError(f"{root} has {len(found)} files *{split}.txt, expected one list of images")
        tables[split], lists[split] = found[0], read_label_list(found[0])
    names = label_names(root, lists["train"], tables["train"])
    for split, entries in lists.items():
        check_labels(tables[split], entries, names, split)
    sources = []
    for split, entries in ((split, lists[split]) for split in ("train", "test")):
        images = [root / path for path, _ in entries]
        refuse_missing(images, tables[split])
        sources.append(FileSource(images, f"{root.name} {split}", names, [label for _, label in entries]))
    shared = len({os.path.realpath(p) for p in sources[0].images}
                 & {os.path.realpath(p) for p in sources[1].images})
    if shared:
        raise ValueError(f"{shared} images are both in {tables['train']} and in {tables['test']}: what is "
                         "tested on must not be trained on")
    articles = [root / "wiki" / f"desc_{label}.txt" for label in range(len(names))]
    return LongTail(*sources, names, [read_sentences(path) if path.is_file() else [] for path in articles])


def check_labels(table: Path, entries: list[tuple[str, int]], names: list[str], split: str) -> None:
    """Raises ValueError on a label out of range, a class without training, or a part of Places-LT's list."""
    for path, label in entries:
        if label >= len(names):
            raise ValueError(f"{table}: {path} has label {label}, expected 0 to {len(names) - 1}")
    if "Places_LT" in table.name and (len(entries), len(names)) != (PLACES_LT[split], 365):
        raise ValueError(f"{table} has {len(entries)} images, of {len(names)} classes, and Places-LT's has "
                         f"{PLACES_LT[split]}, of 365: complete it, or give it another name")
    empty = sorted(set(range(len(names))) - {label for _, label in entries})
    if split == "train" and empty:
        raise ValueError(f"{table} has no image of {len(empty)} of {len(names)} classes, the first is "
                         f"{empty[0]} ({names[empty[0]]}): there is nothing to learn it from")


def read_label_list(table: Path) -> list[tuple[str, int]]:
    """Lines "PATH LABEL" -> [(path, label)]. Raises ValueError."""
    entries = []
    for line in text_lines(table):
        path, label = (line.strip().rsplit(None, 1) + [""])[:2]
        if not path or not label.isdecimal():
            raise ValueError(f"{table}: {line[:60]!r}, expected 'PATH LABEL', LABEL from 0")
        entries.append((path.strip().lstrip("/"), int(label)))
    if not entries:
        raise ValueError(f"{table} is empty: expected lines 'PATH LABEL'")
    return entries


def label_names(root: Path, entries: list[tuple[str, int]], table: Path) -> list[str]:
    """Names of the classes 0, 1, …: from labels.txt, else of the folders their images lie in."""
    if (root / "labels.txt").is_file():
        table = root / "labels.txt"
        entries = read_label_list(table)
    else:
        entries = [(os.path.basename(os.path.dirname(path)), label) for path, label in entries]
    pairs = {(label, re.sub("[_/]", " ", name).strip()) for name, label in entries}
    names = dict(sorted(pairs))
    if list(names) != list(range(len(pairs))) or not all(names.values()):
        raise ValueError(f"{table}: {len(pairs)} pairs of label and name, the highest label is {max(names)}: "
                         "expected every number from 0 on once, each with a name")
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice and table.name != "labels.txt":
        raise ValueError(f"{table}: two classes have folders {twice[0]!r}, a name that would not tell them "
                         "apart: write labels.txt, lines 'NAME LABEL'")
    return list(names.values())


def read_sentences(path: Path) -> list[str]:
    """A Wikipedia article as text, its sections headed "== Name ==" -> its sentences, less those of
    DROPPED_SECTIONS."""
    kept, dropped = [], False
    for line in text_lines(path):
        if line.startswith("=="):
            dropped = line.strip("= ") in DROPPED_SECTIONS
        elif not dropped:
            kept += regex.split(r"(?<=[.?!])\s+(?=\p{Lu})", line.strip())
    return [sentence for sentence in kept if clean(sentence)]


def zipf_shapes(most: int = 300) -> LongTail:
    """24 kinds of things, `most` training images of the first, a half, a third, … of that of the next ones.

    The order goes round colours and shapes, so that rare kinds are made of common words.
    """
    order = [7 * i % len(KINDS) for i in range(len(KINDS))]
    rows = [kind + len(KINDS) * i for place, kind in enumerate(order) for i in range(most // (place + 1))]
    train, test = Shapes("classes", seed=2), Shapes("classes")
    sentences = [[f"a {name}", f"a small {name}"] for name in test.classes]
    train.rows, train.labels = sorted(rows), most * test.labels[:len(KINDS)]      # more than test has
    return LongTail(train, test, test.classes, sentences)


def representation(model: DiffDis | Clip, inputs: Tensor, noise: Tensor) -> Tensor:
    """An image's features with their gradient [B, D], unit norm: the text query denoised from `noise` [B, D]
    in one step, as by `read_queries`; of a CLIP its embedding, whatever the noise."""
    if isinstance(model, Clip):
        return model.encode_image(inputs)
    config, t = model.config, torch.full((len(noise),), model.config.timesteps - 1, device=model.device)
    alphas = make_alphas_cumprod(config.text_schedule, config.timesteps).to(model.device)
    a, s = signal_and_noise(t, noise, alphas, config.gamma)
    pred = model.denoise_query(noise, t, inputs).float()
    return F.normalize(read_prediction(config.text_target, pred, noise, a, s)[0], dim=-1)


@torch.no_grad()
def features_of(model: DiffDis | Clip, inputs: Tensor, places: list[int], args: argparse.Namespace) -> Tensor:
    """What the head sees of images, as `over_images` hands them over: their text queries [B, D], and with
    --representation tokens their image tokens beside them [B, D + V]; both of unit norm."""
    queries = read_queries(model, inputs, places, args)
    if args.representation == "query":
        return queries
    tokens = image_tokens(model, inputs, places, args.seed)
    return torch.cat([queries, F.normalize(tokens, dim=-1)], dim=1)


def frozen_features(model: DiffDis | Clip, source: Source, args: argparse.Namespace) -> Read:
    """`features_of` all usable images of a source. Raises ValueError where they are not finite."""
    read = over_images(model, source, args, partial(features_of, model, args=args))
    if not torch.isfinite(read.values).all():
        raise ValueError("the model's features are not finite: its weights are not usable, or --lr too high")
    return read


def query_width(model: DiffDis | Clip) -> int:
    return model.config.embedding if isinstance(model, Clip) else model.config.text.width


def class_sentences(model: DiffDis | Clip, data: LongTail,
                    args: argparse.Namespace) -> tuple[list[str], Tensor]:
    """Each class's templates, and what its description says -> all texts [M], whose each is [M]."""
    templates, texts, owners = pick_templates(model, data.test, args), [], []
    for label, (name, said) in enumerate(zip(data.names, data.sentences)):
        own = list(dict.fromkeys([fill(t, name, args.templates is not None) for t in templates] + said))
        texts += own
        owners += [label] * len(own)
    return texts, torch.tensor(owners)


def balanced(labels: Tensor, args: argparse.Namespace, *key: int) -> Tensor:
    """An epoch's samples, drawn with replacement, in whole batches: a class of n images counts as
    n^(1 - balance), with VL-LTR's balance of a half √n-fold.

    labels: of all samples [N] -> numbers of samples, a function of the key.
    """
    size = max(1, len(labels) // args.batch_size) * args.batch_size
    weights = torch.bincount(labels).double()[labels] ** -args.balance
    return torch.multinomial(weights, size, replacement=True, generator=generator_of(*key))


class Drawn(Source):
    """Training images in the order they were drawn, centre squares, each with RandAugment if so asked: a
    function of the key and its place."""

    def __init__(self, source: Source, order: np.ndarray, size: int, augment: bool, key: tuple) -> None:
        super().__init__(source.name, len(order))
        self.source, self.order, self.size, self.augment, self.seed = source, order, size, augment, key

    def read(self, index: int, side: int | None = None) -> Sample:
        sample = self.source.read(self.order[index], side)
        if not self.augment:
            return sample
        square = Image.fromarray(to_square(sample.image, self.size))
        return replace(sample, image=rand_augment(square, np.random.default_rng([*self.seed, index])))


def balanced_batches(data: LongTail, size: int, key: tuple, skips: SkipReport,
                     args: argparse.Namespace) -> Iterator[Batch]:
    """An epoch of training images at `size` px, a function of the key; what is unusable goes into `skips`."""
    order = balanced(data.labels(), args, *key).numpy()
    drawn = Drawn(data.train, order, size, args.augment, key)
    for batch in evaluation_batches(drawn, size, args.batch_size, args.workers or 0):
        skips.add(batch.skipped, batch.visited)
        skips.check()
        if batch.captions:
            yield batch


def mix(pixels: Tensor, targets: Tensor, args: argparse.Namespace, rng: np.random.Generator
        ) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself in reverse, as timm's.

    pixels: uint8 [B, S, S, 3]; targets [B, K]; --mixup, --cutmix: α of the Beta distribution of their share,
    0: never; with both a coin decides -> the same of the mixtures.
    """
    cut = args.cutmix > 0 and (args.mixup == 0 or rng.random() < 0.5)
    alpha, side = args.cutmix if cut else args.mixup, pixels.shape[1]
    if alpha == 0:
        return pixels, targets
    share = rng.beta(alpha, alpha)
    if cut:
        half, (y, x) = int(side * math.sqrt(1 - share)) // 2, rng.integers(side, size=2)
        rows, columns = (slice(max(0, c - half), min(side, c + half)) for c in (y, x))
        mixed = pixels.clone()
        mixed[:, rows, columns] = pixels.flip(0)[:, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / side ** 2
    else:
        mixed = (share * pixels + (1 - share) * pixels.flip(0)).round().to(torch.uint8)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def make_groups(modules: list[tuple[nn.Module, float]], weight_decay: float = 0.05) -> list[dict]:
    """(module, peak learning rate) -> AdamW's groups; matrices alone are decayed, as in VL-LTR."""
    groups = []
    for module, rate in modules:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups += [{"params": [p for p in trained if (p.dim() > 1) == matrix], "lr": rate, "peak_lr": rate,
                    "weight_decay": weight_decay * matrix} for matrix in (True, False)]
    return [group for group in groups if group["params"]]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int, warmup: int,
            what: str) -> None:
    """A gradient step at a rate that rises for `warmup` steps and falls to 0 as a cosine. Raises ValueError
    where the loss is not finite."""
    if not torch.isfinite(loss):
        raise ValueError(f"{what}, step {step}: the loss is not finite; take a lower learning rate")
    for group in optimizer.param_groups:
        rise, fall = min(1.0, (step + 1) / max(1, warmup)), 0.5 * (1 + math.cos(math.pi * step / steps))
        group["lr"] = group["peak_lr"] * rise * fall
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-Σ target · log softmax(logits), mean over rows. logits, targets [B, K] (rows of targets sum to 1)."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def class_contrast(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Alignment loss of long-tailed recognition: all pairs of one class are right (Tian et al. 2022, L_ccl).

    logits: scaled cosines of B images with a sentence about each one's class [B, B]; labels [B].
    """
    same = (labels[:, None] == labels).float()
    targets = (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(labels)
    return (soft_cross_entropy(logits, targets) + soft_cross_entropy(logits.T, targets)) / 2


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """How far the logits' distributions, of texts given an image and the reverse, are from the teacher's
    (Tian et al. 2022, L_dis). Both [B, B]; the teacher's carry no gradient."""
    return (soft_cross_entropy(logits, teacher.softmax(dim=1))
            + soft_cross_entropy(logits.T, teacher.T.softmax(dim=1))) / 2


def fine_tune(model: DiffDis | Clip, data: LongTail, texts: list[str], owners: Tensor, skips: SkipReport,
              args: argparse.Namespace) -> None:
    """VL-LTR's first stage: class-wise contrast of images and sentences, and distillation from the model as
    it was, half of the loss each. It changes the model, which then only reads.

    Our choice: a text query is denoised from pure noise, as in evaluation, so that no sentence can leak.
    """
    teacher = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("autoencoder."))
    optimizer = torch.optim.AdamW(make_groups([(model, args.lr)]))
    of_class = [torch.nonzero(owners == k).flatten().tolist() for k in range(len(data.names))]
    per_epoch, size = max(1, len(data.train) // args.batch_size), model.config.image_size
    batches = chain.from_iterable(balanced_batches(data, size, (args.seed, 5, epoch), skips, args)
                                  for epoch in range(args.epochs))

    def logits_of(some: DiffDis | Clip, inputs: Tensor, noise: Tensor, chosen: list[str]) -> Tensor:
        return some.logit_scale.exp() * representation(some, inputs, noise) @ some.encode_text(chosen)[1].T
    with tqdm(total=args.epochs * per_epoch, unit="step", desc="stage 1", disable=None) as bar:
        for step, batch in enumerate(batches):
            rng, labels = np.random.default_rng([args.seed, 6, step]), torch.tensor(batch.labels)
            chosen = [texts[rng.choice(of_class[label])] for label in batch.labels]
            noise = noise_of((query_width(model),), [(args.seed, 7, step, i) for i in range(len(labels))])
            noise = noise.to(model.device)
            with torch.no_grad():
                inputs = model.read_batch(batch.images.to(model.device))
                theirs = logits_of(teacher, inputs, noise, chosen)
            ours = logits_of(model, inputs, noise, chosen)
            loss = 0.5 * class_contrast(ours, labels.to(model.device), args.smoothing)
            loss = loss + 0.5 * distillation(ours, theirs)
            descend(optimizer, loss, step, args.epochs * per_epoch, args.warmup_epochs * per_epoch, "stage 1")
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))        # as train.py does
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.requires_grad_(False)
    model.tasks = ("alignment",)


def nearest(queries: Tensor, candidates: Tensor, k: int, block: int = 1024) -> Tensor:
    """The k most similar candidates of each query, best first [N, k]. Memory is block · K."""
    k = min(k, len(candidates))
    return torch.cat([(some @ candidates.T).topk(k).indices for some in queries.split(block)])


def shots_of(counts: list[int], many: int, few: int) -> list[str]:
    """Training images of each class -> "many" (more than that), "few" (fewer than that) or "medium"."""
    return ["many" if n > many else "few" if n < few else "medium" for n in counts]


def by_shot(hits: Tensor, labels: Tensor, shots: list[str]) -> dict[str, float]:
    """hits [N], labels [N], `shots_of` the classes -> accuracy overall (""), and of the images of classes
    with many, medium and few ("_many", …; absent where there are none), each with its interval."""
    found = {}
    for ending in BY_SHOT:
        inside = torch.tensor([ending in ("", f"_{shot}") for shot in shots])[labels]
        if inside.any():
            found[ending] = hits[inside].double().mean().item()
            found[f"{ending}_interval"] = wilson(found[ending], int(inside.sum()))
    return found


def sentence_accuracies(images: Tensor, labels: Tensor, texts: Tensor, owners: Tensor,
                        shots: list[str]) -> dict:
    """VL-LTR's three of its first stage. Image-Acc: the nearest sentence is of the image's class; Text-Acc:
    the nearest image is of the sentence's; KNN-Acc: most of the 5 nearest sentences are, ties go to the
    nearest.

    images [N, D], labels [N]; texts [M, D], owners [M]: their classes; shots: `shots_of` the classes.
    """
    near = owners[nearest(images, texts, 5)]
    votes = torch.tensor([Counter(row).most_common(1)[0][0] for row in near.tolist()])
    found = labels[nearest(texts, images, 1)[:, 0]]
    by_image = by_shot(near[:, 0] == labels, labels, shots)
    return {**{f"image_acc{shot}": rate for shot, rate in by_image.items()},
            "text_acc": (found == owners).double().mean().item(),
            "knn_acc": (votes == labels).double().mean().item()}


def select_anchors(images: Tensor, labels: Tensor, texts: Tensor, owners: Tensor, scale: float, keep: int
                   ) -> tuple[Tensor, Tensor]:
    """VL-LTR's anchor sentences: of each class those that tell its images from the others' best.

    images [N, D] and labels [N] of training images (VL-LTR's script for Places takes validation's), texts
    [M, D], owners [M]; scale: inverse temperature -> text queries [K, S, D], S up to `keep`, and which of
    them are there [K, S].
    """
    absent = sorted(set(owners.tolist()) - set(labels.tolist()))
    if absent:
        raise ValueError(f"none of the training images of class {absent[0]} can be read")
    losses = torch.empty(len(texts))
    for some in torch.arange(len(texts)).split(1024):
        right = (owners[some, None] == labels).float()
        chance = F.log_softmax(scale * texts[some] @ images.T, dim=1)
        losses[some] = -(right * chance).sum(dim=1) / right.sum(dim=1)
    best = [torch.nonzero(owners == k).flatten() for k in range(int(owners.max()) + 1)]
    best = [own[losses[own].argsort()[:keep]] for own in best]
    anchors = texts.new_zeros(len(best), max(map(len, best)), texts.shape[1])
    for k, own in enumerate(best):
        anchors[k, :len(own)] = texts[own]
    return anchors, anchors.any(dim=2)


def head_batches(model: DiffDis | Clip, data: LongTail, skips: SkipReport,
                 args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, D or D + V] and soft targets [B, K] of --head-epochs epochs, on the model's device. The
    model is frozen: where nothing changes the images, each is read once."""
    classes, key = len(data.names), (args.seed, 8)
    if not (args.augment or args.mixup or args.cutmix):
        read = frozen_features(model, data.train, args)
        skips.add(Counter(read.skips.skipped), read.skips.visited)
        labels = torch.tensor(read.labels)
        for epoch in range(args.head_epochs):
            for some in balanced(labels, args, *key, epoch).split(args.batch_size):
                targets = F.one_hot(labels[some], classes).float()
                yield read.values[some].to(model.device), targets.to(model.device)
        return
    for epoch in range(args.head_epochs):
        batches = balanced_batches(data, model.config.image_size, (*key, epoch), skips, args)
        for step, batch in enumerate(batches):
            targets = F.one_hot(torch.tensor(batch.labels), classes).float()
            pixels, targets = mix(batch.images, targets, args, np.random.default_rng([*key, 9, epoch, step]))
            places = range(step * args.batch_size, step * args.batch_size + len(pixels))
            with torch.no_grad():
                inputs = model.read_batch(pixels.to(model.device))
            yield features_of(model, inputs, list(places), args), targets.to(model.device)


def train_heads(model: DiffDis | Clip, data: LongTail, head: LanguageGuidedHead, linear: nn.Linear,
                skips: SkipReport, args: argparse.Namespace) -> None:
    """VL-LTR's second stage: trains `head` on frozen features, its two branches' losses summed; and beside
    it, on the same batches, a linear layer: what sentences must beat."""
    attention = nn.ModuleList([head.norm_q, head.norm_k, head.to_q, head.to_k])
    optimizer = torch.optim.AdamW(make_groups([(attention, args.attention_lr), (head.visual, args.head_lr),
                                               (linear, args.head_lr)]))
    steps = args.head_epochs * max(1, len(data.train) // args.batch_size)
    with tqdm(total=steps, unit="step", desc="stage 2", disable=None) as bar:
        for step, (features, targets) in enumerate(head_batches(model, data, skips, args)):
            targets = (1 - args.smoothing) * targets + args.smoothing / targets.shape[1]
            logits = (*head(features), linear(head.visual_input(features)))
            descend(optimizer, sum(soft_cross_entropy(some, targets) for some in logits), step, steps, 0,
                    "stage 2")
            bar.update()


def second_stage(model: DiffDis | Clip, data: LongTail, read: Read, labels: Tensor, queries: Tensor,
                 owners: Tensor, shots: list[str], skips: SkipReport, args: argparse.Namespace) -> dict:
    """Anchors, heads, and what they make of the test images' features."""
    # Other noise than the test images': what is alike must be the pictures.
    args = argparse.Namespace(**{**vars(args), "control": "none", "seed": args.seed + 1})
    known, width = frozen_features(model, few_of_each(data), args), query_width(model)
    skips.add(Counter(known.skips.skipped), known.skips.visited)
    anchors = select_anchors(known.values[:, :width], torch.tensor(known.labels), queries, owners,
                             float(model.logit_scale.exp()), args.anchors)
    torch.manual_seed(args.seed)      # here: what ran before has drawn from it
    visual_width = known.values.shape[1] - width or width
    head = LanguageGuidedHead(*anchors, visual_width).to(model.device)
    linear = nn.Linear(visual_width, len(data.names)).to(model.device)
    train_heads(model, data, head, linear, skips, args)
    scores, result = {"top1": [], "linear": []}, {"anchors": int(head.present.sum())}
    with torch.no_grad():
        for some in read.values.to(model.device).split(256):
            scores["top1"].append(head.predict(some).cpu())
            scores["linear"].append(linear(head.visual_input(some)).cpu())
    for name, found in scores.items():
        by_name = by_shot(torch.cat(found).argmax(dim=1) == labels, labels, shots)
        result |= {f"{name}{shot}": rate for shot, rate in by_name.items()}
    return result


def longtail(model: DiffDis | Clip, data: LongTail, args: argparse.Namespace) -> dict:
    """VL-LTR's two stages with this model as the backbone (Table 8): pretrain, finetune, or all.

    Accuracies by shot (--shots; without it OLTR's: classes of more than 100, of 20 to 100 and of fewer than
    20 training images) are by the same weighted prediction as the whole.
    """
    if rank_and_world()[1] > 1:
        raise ValueError("longtail trains in one process: start it with python, not torchrun")
    counts, skips = data.counts(), SkipReport(args.max_bad)
    texts, owners = class_sentences(model, data, args)
    described = sum(map(bool, data.sentences))
    print(f"{len(texts)} sentences on {len(counts)} classes, {described} of which have a description")
    if args.stage != "finetune":
        fine_tune(model, data, texts, owners, skips, args)
        if args.out:
            models.save(args.out, model)
            print(f"wrote {args.out}")
    queries, read = encode_texts(model, texts).cpu(), frozen_features(model, data.test, args)
    labels = torch.tensor(read.labels)
    if args.control == "shuffle-labels":
        labels = labels[shuffled(len(labels), args.seed)]
    shots = shots_of(counts, *args.shots)
    result = {"n": len(labels), "n_train": sum(counts), "classes": len(counts), "described": described,
              "classes_by_shot": {name: shots.count(name) for name in SHOTS}, "chance": 1 / len(counts),
              "sentences": len(texts),
              "stage": args.stage, "representation": args.representation,
              **sentence_accuracies(read.values[:, :query_width(model)], labels, queries, owners, shots)}
    if args.stage != "pretrain":
        result |= second_stage(model, data, read, labels, queries, owners, shots, skips, args)
    return {**result, "seconds_per_image": read.seconds, "skipped": read.skips.counts(),
            "skipped_training": skips.counts()}


def few_of_each(data: LongTail, most: int = 50) -> Source:
    """Training images, at most 50 of a class."""
    seen, kept = Counter(), []
    for i in range(len(data.train)):
        label = data.train.label(i)
        seen[label] += 1
        if seen[label] <= most:
            kept.append(i)
    return data.train.subset(np.array(kept))


# ---------------------------------------------------------------- command line
def print_table(title: str, result: dict, metrics: tuple[str, ...]) -> None:
    print(f"{title}  (n = {result['n']})")
    for name in ("skipped", "skipped_training", "skipped_drawing"):
        left_out = result.get(name, {"skipped": {}})
        skipped = Counter(left_out["skipped"]) + Counter(left_out.get("skipped_pictures", {}))
        if skipped:
            told = ", ".join(f"{count} {cause}" for cause, count in sorted(skipped.items()))
            print(f"  left out{name.removeprefix('skipped').replace('_', ', ')}: {told}")
    if "fid" in result:
        what = "Fréchet distance" if "features" in result["protocol"] else "FID"
        print(f"  {what} {result['fid']:.3f} against {result['n_reference']} images; "
              + "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result["protocol"].items()))
    if "seconds_per_image" in result:
        print(f"  {1000 * result['seconds_per_image']:.2f} ms per image and device")
    if "denoising_error" in result:
        print(f"  denoising error {result['denoising_error']:.5f}  (n = {result['n_drawn']})")
    for name in (name for name in metrics if name in result):
        low, high = result.get(f"{name}_interval", (None, None))
        interval = "" if low is None else f"   95 % interval {100 * low:5.1f} – {100 * high:5.1f}"
        rates = name.startswith(("top1", "mean_per_class", "image_acc", "knn_acc", "linear"))
        chance = result.get(f"{name}_chance", result["chance"] if rates else None)
        print(f"  {name:<15}{100 * result[name]:6.1f} %{interval}"
              + ("" if chance is None else f"   chance {100 * chance:.2f}")
              + "   (what the field quotes)" * (name == result.get("quoted")))


TASKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "retrieval": (retrieval, ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_r1")),
    "zeroshot": (zeroshot, ("top1", "top5", "mean_per_class")),
    "fid": (fid, ()),
    "checker": (checker, ("colour", "shape", "size", "relation", "all", "all_single")),
    "longtail": (longtail, (*(f"image_acc{shot}" for shot in BY_SHOT), "text_acc", "knn_acc",
                            *(f"{name}{shot}" for name in ("top1", "linear") for shot in BY_SHOT))),
    "row": (row, ("top1", "i2t_r1", "t2i_r1", "mean_r1", "colour", "shape", "size", "relation", "all")),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (function, _) in TASKS.items():
        task = tasks.add_parser(name, help=function.__doc__.split("\n")[0].replace("%", "%%"))
        add = task.add_argument
        add("--ckpt", help=f"{CKPT_HELP}; to read images also a CLIP, trained here, or transformers' folder, "
            "OpenCLIP's or OpenAI's file")
        add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights, or the last step's")
        add("--json", metavar="FILE", help="also write the numbers here; rates are fractions")
        add("--seed", type=natural, default=0, help="seed of all noise and of the controls' shuffling")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
        if name in ("checker", "fid", "row"):
            add("--steps", type=positive, default=50, help="sampler steps")
            add("--guidance-scale", type=finite, help="1 + w, 1: none; without it the checkpoint's own")
        if name == "checker":
            add("--n", type=positive, default=64, help="held-out prompts to draw")
            add("--best-of", type=positive, default=1, help="draw this many, keep the model's own favourite")
            continue
        add_data_flags(add, name)
        if name != "fid":
            add("--text-steps", type=positive, default=1, help="denoising steps of the text query")
            add("--draws", type=positive, default=1, help="noise draws averaged per image")
        if name not in ("fid", "row"):
            add("--guidance-scale", type=finite, default=1.0, help="1 + w; 1: no guidance")
        if name == "zeroshot":
            add_zeroshot_flags(add)
        elif name == "fid":
            add_fid_flags(add)
        elif name == "longtail":
            add_longtail_flags(add)
            task.set_defaults(batch_size=128)
        elif name == "row":
            add("--n", type=positive, default=256, help="pictures to draw, and images of the denoising error")
            add("--sampler", choices=tuple(SAMPLERS), default="ddim", help="as in sample.py")
            add("--features", metavar="CKPT", help="measure fid in this checkpoint's image features")
            task.set_defaults(out=None)
        if name in ("fid", "row"):
            task.set_defaults(batch_size=16)         # drawing takes more memory than reading
    return parser.parse_args(argv)


def add_data_flags(add: Callable, task: str) -> None:
    if task == "longtail":
        add("--data", default="shapes", help="shapes, places-lt, or a folder in Places-LT's layout")
        add("--limit", type=positive, help="test images to use, evenly spaced; without it all")
    else:
        add("--data", default="shapes", help="shapes, cc3m, or data in one of the README's layouts")
        add("--limit", type=positive, help="images to use, evenly spaced; without it all")
    add("--batch-size", type=positive, default=100, help="images at once")
    add("--workers", type=natural, help="processes that read and decode; without it 0 for shapes, else 2")
    add("--max-bad", type=finite, default=0.05, help="stop when more than this share of samples is unusable")
    add("--control", choices=CONTROLS, default="none", help="break the evaluation on purpose: expect chance")


def add_zeroshot_flags(add: Callable) -> None:
    add("--templates", metavar="FILE", help="text file, a template per line, {} for the class name; without "
        "it what is built in, as far as the model knows its words")
    add("--method", choices=("alignment", "diffusion-classifier"), default="alignment",
        help="what decides: the denoised text query, or the generation loss under each class's prompt")
    add("--dc-samples", type=positive, nargs="+", default=[50, 500], metavar="N",
        help="diffusion-classifier: timesteps drawn per class up to the end of each stage")
    add("--dc-keep", type=positive, nargs="*", metavar="K",
        help="diffusion-classifier: classes that go on after each stage but the last; without it 5")


def add_longtail_flags(add: Callable) -> None:
    add("--stage", choices=("pretrain", "finetune", "all"), default="all",
        help="pretrain changes the model, finetune trains a head on it as it is")
    add("--out", metavar="FILE", help="also write the pretrained model here, a checkpoint like any other")
    add("--templates", metavar="FILE", help="as for zeroshot")
    add("--representation", choices=REPRESENTATIONS, default="query",
        help="what the head's visual branch sees of an image: its denoised text query, or its image tokens, "
        "averaged; sentences are always compared with the query")
    add("--epochs", type=positive, default=50, help="of pretraining")
    add("--lr", type=finite, default=5e-5, help="of pretraining, falling to 0 as a cosine")
    add("--warmup-epochs", type=natural, default=5, help="of pretraining, in which the rate rises")
    add("--head-epochs", type=positive, default=50, help="of the head")
    add("--head-lr", type=finite, default=1e-4, help="of the head's perceptron, likewise")
    add("--attention-lr", type=finite, default=1e-6, help="of the head's attention over sentences")
    add("--balance", type=finite, default=0.5, metavar="B",
        help="a class of n images is drawn n^(1-B)-fold: 0 as they are, 1 all classes alike")
    add("--smoothing", type=finite, default=0.1, help="share of the label that goes to all classes alike")
    add("--mixup", type=finite, default=0.8, help="α of mixup in finetuning, 0: none")
    add("--cutmix", type=finite, default=1.0, help="α of CutMix, 0: none; with both a coin decides")
    add("--augment", action=argparse.BooleanOptionalAction, default=None,
        help="RandAugment of training images; without it: not on shapes, whose colours it changes")
    add("--anchors", type=positive, default=64, help="sentences of a class that the head looks at")
    add("--shots", type=positive, nargs=2, default=[100, 20], metavar=("MANY", "FEW"),
        help="report classes of more than MANY and of fewer than FEW training images apart")


def add_fid_flags(add: Callable) -> None:
    add("--n", type=positive, help="pictures to compare; without it 30,000, or as many as --data has")
    add("--images", metavar="FOLDER", help="compare these pictures, draw none")
    add("--out", metavar="FOLDER", help="also write the drawn pictures here, as PNG")
    add("--sampler", choices=tuple(SAMPLERS), default="ddim", help="as in sample.py")
    add("--image-size", type=positive, help="px at which both sets are compared; without it the model's, "
        "for --images 256")
    add("--resize", choices=RESIZES, default="clean", help="to Inception's 299 px: as clean-fid, or as "
        "pytorch-fid, whose numbers are not comparable")
    add("--inception", metavar="PATH", help="pt_inception-2015-12-05-6726825d.pth; without it downloaded")
    add("--features", metavar="CKPT", help="compare in this checkpoint's image features instead")
    add("--allow-small", action="store_true", help="allow fewer than 2048 images")


def read_templates(path: str | None) -> list[str] | None:
    if path is None:
        return None
    lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not lines or any("{}" not in line for line in lines):
        raise ValueError(f"{path}: expected a template per line, each with {{}} for the class name")
    return lines


def check_task(task: str, model: DiffDis | Clip | None, args: argparse.Namespace) -> None:
    """Refuse what these weights were not trained for. Raises ValueError."""
    if isinstance(model, DiffDis) and getattr(args, "text_steps", 1) > model.config.timesteps:
        raise ValueError(f"--text-steps is {args.text_steps}, of {model.config.timesteps} timesteps in all")
    if task == "row":        # which is of what they were trained for
        return
    if task == "checker" and args.best_of > 1 and "alignment" not in model.tasks:
        raise ValueError("--best-of: these weights only draw images, they do not read them to choose one")
    if task in ("retrieval", "longtail") or task == "zeroshot" and args.method == "alignment":
        if "alignment" not in model.tasks:
            raise ValueError("these weights only draw images, they do not read them: "
                             "train their query stream with train.py --init first")
    elif model is not None and "generation" not in model.tasks:
        raise ValueError("these weights only read images, and this needs a model that draws them: one "
                         "trained with --tasks generation,alignment or generation")
    if task == "zeroshot":
        stages = args.dc_samples
        kept = args.dc_keep = [5] * (len(stages) - 1) if args.dc_keep is None else args.dc_keep
        if len(kept) + 1 != len(stages) or sorted(set(stages)) != stages:
            raise ValueError(f"--dc-samples {stages} --dc-keep {kept}: expected growing numbers of samples, "
                             "and one number of classes less than those")


def report(task: str, model: DiffDis | Clip | None, source: Source | None, args: argparse.Namespace) -> dict:
    """Run a task, print its table -> the numbers. source: where the pairs come from (not for `checker`)."""
    function, metrics = TASKS[task]
    check_task(task, model, args)
    result = function(model, args) if source is None else function(model, source, args)
    name = "shapes" if source is None else source.name
    control = getattr(args, "control", "none")
    print_table(f"{task} on {name}, seed {args.seed}" + (f", control {control}" if control != "none" else ""),
                result, metrics)
    return {"task": task, "data": name, "control": control, "seed": args.seed, **result}


def write_json(args: argparse.Namespace, result: dict, argv: list[str] | None, path: Path | str,
               device: torch.device) -> None:
    """--json: the printed numbers, and what they are of."""
    if args.json:
        given = sys.argv[1:] if argv is None else argv
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        settings = {k: v for k, v in vars(args).items()
                    if k not in ("json", "device", "task", "seed", "control", "ckpt")}
        kept = {"settings": settings, **result, "command": " ".join(["python evaluate.py", *given]),
                "date": date.today().isoformat(), "checkpoint": str(path),
                "checkpoint_hash": fingerprint(path) if isinstance(path, Path) else None,
                "ranks": rank_and_world()[1], "torch": torch.__version__, "device": f"{device} ({name})",
                "threads": torch.get_num_threads()}
        Path(args.json).write_text(json.dumps(kept, indent=1) + "\n")
        print(f"wrote {args.json}")


def settle_longtail(args: argparse.Namespace) -> LongTail:
    """What the flags leave open -> the data. Raises ValueError or FileNotFoundError."""
    for name, low, high in (("smoothing", 0, 1), ("balance", 0, 1), ("mixup", 0, math.inf),
                            ("cutmix", 0, math.inf), ("lr", 0, math.inf), ("head_lr", 0, math.inf),
                            ("attention_lr", 0, math.inf), ("batch_size", 2, math.inf)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {low} to {high}")
    if args.shots[0] < args.shots[1]:
        raise ValueError(f"--shots is {args.shots[0]} {args.shots[1]}, expected MANY, then FEW, at most MANY")
    if args.out and args.stage == "finetune":
        raise ValueError("--out is for the pretrained model, and --stage finetune changes none: leave it out")
    if args.out and (not Path(args.out).resolve().parent.is_dir() or Path(args.out).is_dir()):
        raise ValueError(f"--out is {args.out!r}, expected a file in an existing folder")
    if args.out and Path(args.out).resolve() == Path(args.ckpt).resolve():
        raise ValueError("--out is the checkpoint itself, which would be lost: expected another file")
    args.augment = args.data != "shapes" if args.augment is None else args.augment
    args.workers = args.workers if args.workers is not None else 0 if args.data == "shapes" else 2
    data = open_longtail(args.data)
    return data._replace(test=evenly_spaced(data.test, args.limit))


def run_task(args: argparse.Namespace, device: torch.device) -> tuple[dict, Path | str]:
    """Open what the flags name and run the task -> the numbers, the checkpoint's path."""
    model, source, path = None, None, "none"
    if args.task == "fid" and args.images is not None and (args.ckpt or args.out):
        raise ValueError("--images compares pictures that are there: leave out --ckpt and --out")
    if args.task == "fid" and args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.task != "fid" or args.images is None:
        path = in_turn(lambda: models.locate(find_checkpoint(args.ckpt)))
        args.ckpt, model = str(path), models.load(path, device, args.weights)
        check_task(args.task, model, args)
    if args.task in ("zeroshot", "longtail"):
        args.templates = read_templates(args.templates)
    if args.task == "longtail":
        source = settle_longtail(args)
    elif args.task != "checker":
        args.workers = args.workers if args.workers is not None else 0 if args.data == "shapes" else 2
        labelled = args.data == "shapes" and args.task == "zeroshot"
        source = in_turn(lambda: open_source(args.data, "classes" if labelled else "val"))
        check_index(source, args.max_bad)
        source = evenly_spaced(source, args.limit)
    args.device = device
    return report(args.task, model, source, args), path


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.json and (not Path(args.json).resolve().parent.is_dir() or Path(args.json).is_dir()):
            raise ValueError(f"--json is {args.json!r}, expected a file in an existing folder")
        rank, world, device = join_ranks(args.device)
        with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
            result, path = run_task(args, device)
            if rank == 0:
                write_json(args, result, argv, path, device)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- shim: the interface that is to come
@dataclass(frozen=True)
class Reading:
    text_steps: int = 1
    draws: int = 1
    guidance_scale: float = 1.0
    seed: int = 0
    control: str = "none"
    batch_size: int = 100
    workers: int = 0
    max_bad: float = 0.05
    templates: object = None
    method: str = "alignment"
    data: str = "."


_checker, _report = checker, report


def checker(model, n=64, steps=50, guidance_scale=None, best_of=1, seed=0):
    """Draw pictures for held-out prompts of `shapes` and judge each from its pixels alone."""
    if isinstance(n, argparse.Namespace):
        return _checker(model, n)
    return _checker(model, argparse.Namespace(n=n, steps=steps, guidance_scale=guidance_scale, best_of=best_of,
                                              seed=seed))


TASKS["checker"] = (checker, TASKS["checker"][1])


def report(task, result, *more):
    if len(more) != 1:
        return _report(task, result, *more)
    print_table(f"{task} on {more[0]}", result, TASKS[task][1])


if __name__ == "__main__":
    main()
