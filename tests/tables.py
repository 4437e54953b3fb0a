"""The tables of .readme/RESULTS.md from their raw results: means over seeds, and what they say of the paper.

    python tests/tables.py tables                           of every NAME-SEED.json in a folder
    python tests/tables.py .readme/results/longtail.jsonl   or of their lines in one file, each with its name

A row differs from the joint run if their means are further apart than twice the standard error of their
difference, whose standard deviation over seeds is pooled over all rows that are runs of their own; else it
is within noise.
"""
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

# Of evaluate.py's JSON: title, factor, digits, and whether more is better.
METRICS = {"top1": ("zero-shot top-1", 100, 1, True), "mean_r1": ("mean R@1", 100, 1, True),
           "denoising_error": ("denoising error ×1000", 1000, 2, False),
           "fid": ("Fréchet distance", 1, 3, False),
           "colour": ("colours right", 100, 1, True), "shape": ("shapes right", 100, 1, True),
           "size": ("sizes right", 100, 1, True), "relation": ("relation right", 100, 1, True),
           "all": ("all right", 100, 1, True)}
LONGTAIL = {name: (title, 100, 1, True) for name, title in {
    "image_acc": "stage 1: Image-Acc", "text_acc": "Text-Acc", "knn_acc": "KNN-Acc",
    "image_acc_many": "Image-Acc, many", "image_acc_few": "Image-Acc, few", "top1": "stage 2",
    "top1_many": "many", "top1_medium": "medium", "top1_few": "few", "linear": "linear layer",
    "linear_few": "linear layer, few"}.items()}
# What the paper says of a row against its own default: zero-shot top-1, R@1, FID.
PAPER = {"text-noise": (22.62 - 23.44, 29.38 - 28.64, 10.78 - 11.52),           # Table 2
         "no-fusion": (24.53 - 25.92, 32.97 - 33.60, 10.05 - 9.80),             # Table 4
         "shared-ffn": (25.92 - 25.92, 33.75 - 33.60, 10.26 - 9.80),            # Table 5
         "own-attention": (26.25 - 25.92, 33.07 - 33.60, 10.19 - 9.80),
         "t-0": (21.97 - 22.13, 27.20 - 27.56, 12.35 - 11.35),                  # Table 7
         "t-999": (21.73 - 22.13, 27.56 - 27.56, 12.02 - 11.35),
         "clip": (21.1 - 25.9, None, None), "generation": (None, None, 10.8 - 9.8)}      # Table 6
BASE = "joint"


def read(path: Path) -> dict[str, dict[int, dict]]:
    """A folder of NAME-SEED.json, or a file of lines that say theirs under "file" -> row -> seed -> the
    numbers; those of several tasks side by side."""
    rows: dict[str, dict[int, dict]] = defaultdict(dict)
    runs = ([json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else
            [{"file": file.stem, **json.loads(file.read_text())} for file in sorted(path.glob("*.json"))])
    for numbers in runs:
        name, _, seed = numbers["file"].rpartition("-")
        if name and seed.isdecimal():
            tasks = [part for part in numbers.values() if isinstance(part, dict) and "task" in part]
            rows[name][int(seed)] = {key: part[key] for part in tasks for key in part} if tasks else numbers
    first = [name for name in dict.fromkeys((BASE, "generation", "alignment", *PAPER)) if name in rows]
    return {name: rows[name] for name in [*first, *sorted(set(rows) - set(first))]}


def summary(rows: dict, metric: str) -> tuple[dict[str, list[float]], float]:
    """-> row -> its values over seeds, and their standard deviation pooled over rows."""
    values = {name: [run[metric] for run in seeds.values() if metric in run] for name, seeds in rows.items()}
    values = {name: own for name, own in values.items() if own}
    # The base's own checkpoints measured in another way would count its seeds again.
    again = {run.get("checkpoint") for run in rows.get(BASE, {}).values()} - {None}
    several = [own for name, own in values.items() if len(own) > 1 and (
        name == BASE or again.isdisjoint(run.get("checkpoint") for run in rows[name].values()))]
    degrees = sum(len(own) - 1 for own in several)
    squares = sum(statistics.variance(own) * (len(own) - 1) for own in several)
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


def cell(values: dict[str, list[float]], deviation: float, name: str, metric: tuple) -> str:
    """Mean ± deviation of a row, marked where it is better or worse than the base beyond noise."""
    if name not in values:
        return ""
    _, factor, digits, more_is_better = metric
    mean, own, ours = statistics.mean(values[name]), values[name], effect(values, deviation, name)
    spread = statistics.stdev(own) if len(own) > 1 else 0.0
    mark = "" if ours is None or abs(ours[1]) < 2 else " ▲" if (ours[1] > 0) == more_is_better else " ▼"
    return f"{factor * mean:.{digits}f} ± {factor * spread:.{digits}f}{mark}"


def against_paper(rows: dict, found: dict) -> list[str]:
    lines = ["", "| row | zero-shot: paper, ours | R@1: paper, ours | FID: paper, our Fréchet distance |",
             "|---|---|---|---|"]
    for name in filter(rows.get, PAPER):
        cells = [name]
        for metric, theirs in zip(("top1", "mean_r1", "fid"), PAPER[name]):
            ours, (_, factor, digits, _) = effect(*found.get(metric, ({}, 0)), name), METRICS[metric]
            cells.append("–" if theirs is None or ours is None else
                         f"{theirs:+.2f}, {factor * ours[0]:+.{digits}f}: {verdict(ours, theirs)}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(rows: dict) -> str:
    kinds = {run.get("task") == "longtail" for seeds in rows.values() for run in seeds.values()}
    assert len(kinds) == 1, "results of longtail and of other tasks: expected a folder for each"
    metrics = LONGTAIL if kinds == {True} else METRICS
    found = {metric: summary(rows, metric) for metric in metrics}
    found = {metric: measured for metric, measured in found.items() if measured[0]}
    # At the floor one lucky picture would look like an effect.
    floor = [metric for metric, (values, _) in found.items()
             if metrics[metric][1] == 100 and max(map(statistics.mean, values.values())) < 0.01]
    found = {metric: measured for metric, measured in found.items() if metric not in floor}
    titles = [metrics[metric][0] for metric in found]
    lines = [f"| row | seeds | {' | '.join(titles)} |", "|---|" + "---|" * (len(found) + 1)]
    for name, seeds in rows.items():
        cells = [cell(*found[metric], name, metrics[metric]) for metric in found]
        lines.append(f"| {' | '.join([name, str(len(seeds)), *cells])} |")
    below = f"Under 1 % in every row: {', '.join(metrics[m][0] for m in floor)}." if floor else ""
    if metrics is LONGTAIL:      # of which many rows share a first stage: nothing to pool
        return "\n".join([*lines, below])
    pooled = "; ".join(f"{title} {factor * found[m][1]:.{digits}f}" for m, (title, factor, digits, _)
                       in metrics.items() if m in found and math.isfinite(found[m][1]))
    pooled = pooled or "unknown, with one seed nothing is told from noise"
    lines += ["", f"Pooled standard deviation over seeds: {pooled}.{' ' * bool(floor)}{below}"]
    return "\n".join([*lines, *against_paper(rows, found)])


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
