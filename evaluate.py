"""Scores: how well images and texts find each other, and whether drawn pictures show what was asked.

What it is: Algorithm 3 (sample.py) turned into the field's numbers.
    python evaluate.py retrieval --data shapes        R@1/5/10, image -> text and text -> image
    python evaluate.py zeroshot  --data cifar10       top-1, top-5, mean per class over class folders
    python evaluate.py checker   --best-of 4          pictures for held-out prompts, judged from their pixels
What it is not: training. What predicts is `sample.draw_queries`, which is handed clean latents and nothing
else; its text queries are compared with those of all candidate texts, and only then with the truth.
Every task has controls (`--control`) in which a sound evaluation must fall to chance.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import model as models
from data import (SIDE, SkipReport, Source, Subset, check, evaluation_batches, evenly_spaced,
                  held_out_captions, open_source)
from model import DiffDis
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
    return parser.parse_args(argv)


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise ValueError(f"--json is {args.json!r}, expected a file in an existing folder")
        path, source = find_checkpoint(args.ckpt), None
        model = models.load(path, pick_device(args.device), args.weights)
        if args.task == "zeroshot":
            args.templates = read_templates(args.templates)
        if args.task != "checker":
            source = open_source(
                args.data, "classes" if (args.task, args.data) == ("zeroshot", "shapes") else "val")
            source = evenly_spaced(source, args.limit)
        result = report(args.task, model, source, args)
        if args.json:
            given = sys.argv[1:] if argv is None else argv
            settings = {"command": " ".join(["python evaluate.py", *given]),
                        "date": date.today().isoformat(), "checkpoint": str(path),
                        "torch": torch.__version__, "device": str(model.device)}
            Path(args.json).write_text(json.dumps({**result, **settings}, indent=1) + "\n")
            print(f"wrote {args.json}")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
