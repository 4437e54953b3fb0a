"""The tables of .readme/RESULTS.md from their raw results: means over seeds.

    python tests/tables.py tables                           of every NAME-SEED.json in a folder
    python tests/tables.py .readme/results/joint.jsonl      or of their lines in files, each with its name

A row differs from the joint run if the means are further apart than twice the standard error of their
difference, its standard deviation pooled over all rows that are runs of their own; else it is noise."""
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev, variance

# Of evaluate.py's JSON: title, factor, digits, and whether more is better (1) or less (-1).
METRICS = {"top1": ("zero-shot top-1", 100, 1, 1), "mean_r1": ("mean R@1", 100, 1, 1),
           "denoising_error": ("denoising error ×1000", 1000, 2, -1), "fid": ("Fréchet distance", 1, 3, -1),
           "colour": ("colours right", 100, 1, 1), "shape": ("shapes right", 100, 1, 1),
           "size": ("sizes right", 100, 1, 1), "relation": ("relation right", 100, 1, 1),
           "all": ("all right", 100, 1, 1)}
BASE = "joint"
FIRST = (BASE, "generation", "alignment", "clip", "text-noise", "text-linear", "no-fusion", "own-attention",
         "shared-ffn", "t-0", "t-999")       # rows in the order of the paper's tables; others follow by name


def read(*paths: Path) -> dict[str, list[dict]]:
    """Folders of NAME-SEED.json, or files of lines that say theirs under "file" -> row -> a dict of numbers
    for each seed; those of several tasks side by side."""
    rows: dict[str, list[dict]] = defaultdict(list)
    runs = [run for path in paths for run in (
        map(json.loads, path.read_text().splitlines()) if path.is_file() else
        [{"file": file.stem, **json.loads(file.read_text())} for file in sorted(path.glob("*.json"))])]
    for numbers in runs:
        name, _, seed = numbers["file"].rpartition("-")
        if name and seed.isdecimal():
            tasks = [part for part in numbers.values() if isinstance(part, dict) and "task" in part]
            rows[name].append({key: part[key] for part in tasks for key in part} if tasks else numbers)
    return {name: rows[name] for name in [*FIRST, *sorted(set(rows) - set(FIRST))] if name in rows}


class Measure:
    """One column: the values of every row over its seeds, and their standard deviation pooled over rows."""

    def __init__(self, rows: dict[str, list[dict]], name: str, metric: tuple) -> None:
        self.title, self.factor, self.digits, self.better = metric
        values = {row: [run[name] for run in runs if name in run] for row, runs in rows.items()}
        self.values = {row: own for row, own in values.items() if own}
        # The base's own checkpoints measured in another way would count its seeds again.
        again = {run.get("checkpoint") for run in rows.get(BASE, ())} - {None}
        several = [own for row, own in self.values.items() if len(own) > 1 and (
            row == BASE or again.isdisjoint(run.get("checkpoint") for run in rows[row]))]
        degrees = sum(len(own) - 1 for own in several)
        squares = sum(variance(own) * (len(own) - 1) for own in several)
        self.deviation = math.sqrt(squares / degrees) if degrees else math.inf
        # At the floor one lucky picture would look like an effect.
        self.is_floor = self.factor == 100 and max(map(mean, self.values.values()), default=0) < 0.01

    def effect(self, row: str) -> tuple[float, bool] | None:
        """Difference of a row's mean from the base's, and whether it is beyond noise; None without either."""
        if row == BASE or not {row, BASE} <= self.values.keys():
            return None
        own, base = self.values[row], self.values[BASE]
        error = self.deviation * math.sqrt(1 / len(own) + 1 / len(base))
        return mean(own) - mean(base), abs(mean(own) - mean(base)) >= 2 * error > 0

    def cell(self, row: str) -> str:
        """Mean ± deviation of a row, marked where it is better or worse than the base beyond noise."""
        if row not in self.values:
            return ""
        own, (difference, is_beyond) = self.values[row], self.effect(row) or (0, False)
        mark = "" if not is_beyond else " ▲" if difference * self.better > 0 else " ▼"
        spread = stdev(own) if len(own) > 1 else 0.0
        return f"{self.factor * mean(own):.{self.digits}f} ± {self.factor * spread:.{self.digits}f}{mark}"


def table(rows: dict[str, list[dict]]) -> str:
    columns = [column for name, metric in METRICS.items() if (column := Measure(rows, name, metric)).values]
    floor = [column.title for column in columns if column.is_floor]
    shown = [column for column in columns if not column.is_floor]
    lines = [f"| row | seeds | {' | '.join(column.title for column in shown)} |",
             "|---|---|" + "---|" * len(shown)]
    lines += [f"| {' | '.join([row, str(len(runs)), *(column.cell(row) for column in shown)])} |"
              for row, runs in rows.items()]
    below = f"Under 1 % in every row: {', '.join(floor)}." if floor else ""
    pooled = "; ".join(f"{column.title} {column.factor * column.deviation:.{column.digits}f}"
                       for column in shown if math.isfinite(column.deviation))
    pooled = pooled or "unknown, with one seed nothing is told from noise"
    below = f"Pooled standard deviation over seeds: {pooled}.{' ' * bool(floor)}{below}"
    return "\n".join([*lines, "", below])


if __name__ == "__main__":
    print(table(read(*map(Path, sys.argv[1:]))) if sys.argv[1:] else __doc__)
