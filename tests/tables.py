"""The README's tables from the results of its loop: means over seeds, and what they say of the paper.

    python tests/tables.py tables                      print the table, of every NAME-SEED.json in a folder
    python tests/tables.py longtail                    the same of `evaluate.py longtail`'s
    python tests/tables.py tables --runs runs --out .  and draw curves and one sheet of pictures per seed

A row differs from the joint run if their means are further apart than twice the standard error of their
difference, whose standard deviation over seeds is pooled over all rows that are runs of their own; else it
is within noise.
"""
import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import read_log  # noqa: E402  (the path comes first)

# Of evaluate.py's JSON: title, factor, digits, and whether more is better.
METRICS = {"top1": ("zero-shot top-1", 100, 1, True), "mean_r1": ("mean R@1", 100, 1, True),
           "denoising_error": ("denoising error ×1000", 1000, 2, False),
           "fid": ("Fréchet distance", 1, 3, False),
           "colour": ("colours right", 100, 1, True), "shape": ("shapes right", 100, 1, True),
           "size": ("sizes right", 100, 1, True), "relation": ("relation right", 100, 1, True),
           "all": ("all right", 100, 1, True)}
LONGTAIL = {"image_acc": ("stage 1: Image-Acc", 100, 1, True), "text_acc": ("Text-Acc", 100, 1, True),
            "knn_acc": ("KNN-Acc", 100, 1, True), "image_acc_many": ("Image-Acc, many", 100, 1, True),
            "image_acc_few": ("Image-Acc, few", 100, 1, True),
            "top1": ("stage 2", 100, 1, True), "top1_many": ("many", 100, 1, True),
            "top1_medium": ("medium", 100, 1, True), "top1_few": ("few", 100, 1, True),
            "linear": ("linear layer", 100, 1, True), "linear_few": ("linear layer, few", 100, 1, True)}
# What the paper says of a row against its own default: zero-shot top-1, R@1, FID.
PAPER = {"text-noise": (22.62 - 23.44, 29.38 - 28.64, 10.78 - 11.52),           # Table 2
         "no-fusion": (24.53 - 25.92, 32.97 - 33.60, 10.05 - 9.80),             # Table 4
         "shared-ffn": (25.92 - 25.92, 33.75 - 33.60, 10.26 - 9.80),            # Table 5
         "own-attention": (26.25 - 25.92, 33.07 - 33.60, 10.19 - 9.80),
         "t-0": (21.97 - 22.13, 27.20 - 27.56, 12.35 - 11.35),                  # Table 7
         "t-999": (21.73 - 22.13, 27.56 - 27.56, 12.02 - 11.35),
         "clip": (21.1 - 25.9, None, None), "generation": (None, None, 10.8 - 9.8)}      # Table 6
BASE = "joint"


def read(folder: Path) -> dict[str, dict[int, dict]]:
    """NAME-SEED.json -> row -> seed -> the numbers; those of several tasks side by side."""
    rows: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in sorted(folder.glob("*-[0-9]*.json")):
        name, seed = path.stem.rsplit("-", 1)
        if seed.isdecimal():
            numbers = json.loads(path.read_text())
            tasks = [part for part in numbers.values() if isinstance(part, dict) and "task" in part]
            rows[name][int(seed)] = {key: part[key] for part in tasks for key in part} if tasks else numbers
    first = [BASE, "generation", "alignment", *PAPER]
    order = [name for name in dict.fromkeys(first) if name in rows]
    return {name: rows[name] for name in order + sorted(set(rows) - set(order))}


def summary(rows: dict, metric: str) -> tuple[dict[str, list[float]], float]:
    """-> row -> its values over seeds, and their standard deviation pooled over rows."""
    values = {name: [found[metric] for found in seeds.values() if metric in found]
              for name, seeds in rows.items()}
    values = {name: some for name, some in values.items() if some}
    # The base's own checkpoints measured in another way would count its seeds again.
    again = {run.get("checkpoint") for run in rows.get(BASE, {}).values()} - {None}
    several = [some for name, some in values.items() if len(some) > 1 and (
        name == BASE or again.isdisjoint(run.get("checkpoint") for run in rows[name].values()))]
    degrees = sum(len(some) - 1 for some in several)
    squares = sum(statistics.variance(some) * (len(some) - 1) for some in several)
    return values, math.sqrt(squares / degrees) if degrees else math.inf


def effect(values: dict[str, list[float]], deviation: float, name: str) -> tuple[float, float] | None:
    """Difference of a row's mean from the base's, and in standard errors; None where there is none."""
    if name == BASE or name not in values or BASE not in values:
        return None
    error = deviation * math.sqrt(1 / len(values[name]) + 1 / len(values[BASE]))
    difference = statistics.mean(values[name]) - statistics.mean(values[BASE])
    return difference, difference / error if error else 0.0


def verdict(ours: tuple[float, float] | None, paper: float | None) -> str:
    """Whether an effect of ours has the sign of the paper's."""
    if ours is None or paper is None:
        return "–"
    if abs(ours[1]) < 2:
        return "within noise"
    return "agrees" if ours[0] * paper > 0 else "disagrees" if paper else "paper: none"


def table(rows: dict) -> str:
    kinds = {run.get("task") == "longtail" for seeds in rows.values() for run in seeds.values()}
    if len(kinds) > 1:
        raise ValueError("results of longtail and of other tasks: expected a folder for each")
    metrics = LONGTAIL if kinds == {True} else METRICS
    found = {metric: summary(rows, metric) for metric in metrics}
    found = {metric: some for metric, some in found.items() if some[0]}
    # At the floor one lucky picture would look like an effect.
    floor = [metric for metric, (values, _) in found.items() if metrics[metric][1] == 100
             and max(statistics.mean(some) for some in values.values()) < 0.01]
    found = {metric: some for metric, some in found.items() if metric not in floor}
    lines = ["| row | seeds | " + " | ".join(metrics[m][0] for m in found) + " |",
             "|---|" + "---|" * (len(found) + 1)]
    for name, seeds in rows.items():
        cells = [name, str(len(seeds))]
        for metric, (values, deviation) in found.items():
            _, factor, digits, more_is_better = metrics[metric]
            if name not in values:
                cells.append("")
                continue
            mean, ours = statistics.mean(values[name]), effect(values, deviation, name)
            spread = statistics.stdev(values[name]) if len(values[name]) > 1 else 0.0
            better = ours is not None and (ours[1] > 0) == more_is_better
            mark = "" if ours is None or abs(ours[1]) < 2 else " ▲" if better else " ▼"
            cells.append(f"{factor * mean:.{digits}f} ± {factor * spread:.{digits}f}{mark}")
        lines.append("| " + " | ".join(cells) + " |")
    pooled = "; ".join(f"{metrics[m][0]} {metrics[m][1] * found[m][1]:.{metrics[m][2]}f}" for m in found
                       if math.isfinite(found[m][1])) or "unknown, with one seed nothing is told from noise"
    below = f" Under 1 % in every row: {', '.join(metrics[m][0] for m in floor)}." if floor else ""
    if metrics is LONGTAIL:      # of which many rows share a first stage: nothing to pool
        return "\n".join([*lines, below.strip()])
    lines += ["", f"Pooled standard deviation over seeds: {pooled}.{below}", "",
              "| row | zero-shot: paper, ours | R@1: paper, ours | FID: paper, our Fréchet distance |",
              "|---|---|---|---|"]
    for name, paper in PAPER.items():
        if name not in rows:
            continue
        cells = [name]
        for metric, theirs in zip(("top1", "mean_r1", "fid"), paper):
            if metric not in found:
                cells.append("–")
                continue
            ours, factor, digits = effect(*found[metric], name), *metrics[metric][1:3]
            cells.append("–" if theirs is None or ours is None else
                         f"{theirs:+.2f}, {factor * ours[0]:+.{digits}f}: {verdict(ours, theirs)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(runs: Path, rows: dict, path: Path,
           names: tuple[str, ...] = (BASE, "generation", "alignment")) -> None:
    """Held-out scores of both tasks over steps, joint against single-task; a line per seed."""
    width, height, edge = 480, 300, 40
    picture = Image.new("RGB", (2 * width, height), "white")
    pen, colours = ImageDraw.Draw(picture), dict(zip(names, ("#1f5fa8", "#c2571a", "#2e8b57")))
    for k, (metric, title) in enumerate((("val_i2t_r1", "held-out R@1, image to text"),
                                         ("val_denoising_error", "held-out denoising error"))):
        lines = {(name, seed): [(line["step"], line[metric]) for line in
                                read_log(runs / f"{name}-{seed}" / "log.jsonl") if metric in line]
                 for name in names for seed in rows.get(name, ())}
        lines = {key: points for key, points in lines.items() if points}
        if not lines:
            continue
        last = max(step for points in lines.values() for step, _ in points)
        high = max(value for points in lines.values() for _, value in points) or 1.0
        left, top, right, bottom = k * width + edge, edge, (k + 1) * width - 10, height - edge
        pen.rectangle((left, top, right, bottom), outline="#999999")
        pen.text((left, top - 28), title, fill="black")
        pen.text((left - 36, top), f"{high:.3g}", fill="black")
        pen.text((left - 12, bottom - 10), "0", fill="black")
        pen.text((right - 60, bottom + 4), f"step {last}", fill="black")
        for j, name in enumerate(sorted({name for name, _ in lines}, key=names.index)):
            pen.text((left + 100 * j, top - 14), name, fill=colours[name])
        for (name, _), points in lines.items():
            pen.line([(left + (right - left) * step / last, bottom - (bottom - top) * value / high)
                      for step, value in points], fill=colours[name], width=2)
    picture.save(path)


def sheet(runs: Path, rows: dict, seed: int, path: Path, count: int = 12, side: int = 32) -> None:
    """A line of pictures per row, each run's last for the same prompts and noise, at their own size."""
    strips = []
    for name in rows:
        grids = sorted((runs / f"{name}-{seed}" / "samples").glob("step_*.png"))
        if grids:
            grid = Image.open(grids[-1])
            tile = (grid.width - 2) // 8          # as train.py makes it: 8 columns, gaps of 2
            corners = [(2 + i % 8 * tile, 2 + i // 8 * tile) for i in range(count)]
            tiles = [grid.crop((x, y, x + tile - 2, y + tile - 2))
                     .resize((side, side), Image.Resampling.NEAREST) for x, y in corners]
            strips.append((name, tiles))
    if strips:
        picture = Image.new("RGB", (100 + count * (side + 2), len(strips) * (side + 2)), "white")
        for j, (name, tiles) in enumerate(strips):
            ImageDraw.Draw(picture).text((2, j * (side + 2) + side // 3), name, fill="black")
            for i, tile in enumerate(tiles):
                picture.paste(tile, (100 + i * (side + 2), j * (side + 2)))
        picture.quantize(128).save(path, optimize=True)      # small: the eye sees no difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", type=Path, help="folder of NAME-SEED.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs NAME-SEED")
    parser.add_argument("--out", type=Path, help="folder for curves and sheets; without it none are drawn")
    args = parser.parse_args()
    rows = read(args.tables)
    if not rows:
        parser.error(f"no NAME-SEED.json in {args.tables}")
    try:
        print(table(rows))
    except ValueError as error:
        parser.error(str(error))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        curves(args.runs, rows, args.out / "curves.png")
        for seed in sorted({seed for seeds in rows.values() for seed in seeds}):
            sheet(args.runs, rows, seed, args.out / f"pictures-seed{seed}.png")


if __name__ == "__main__":
    main()
