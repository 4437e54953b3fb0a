"""Runs' logs as one picture: held-out scores and losses over the minutes of their steps, a line for each run.

    python tests/curves.py runs/shapes-tiny                                  -> curves.png
    python tests/curves.py "before=runs/old" "after=runs/new" --out both.png
"""
from pathlib import Path

import conftest  # noqa: F401  (which puts the project on the import path)
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import model
import train
from sample import Parser, errors_in_one_line

TITLES = {"val_i2t_r1": "R@1, image → text", "val_t2i_r1": "R@1, text → image", "val_top1": "zero-shot top-1",
          "val_denoising_error": "denoising error", "loss_generation": "loss, generation",
          "loss_alignment": "loss, alignment"}


def read(run: Path) -> list[dict]:
    """A run's log, with the minutes of its steps so far."""
    if not (lines := train.read_log(run / "log.jsonl")):
        raise ValueError(f"{run} has no log.jsonl with lines: expected the folder of a run")
    pairs = model.read_file(run / "checkpoint.pt")[1]["training"]["args"]["batch_size"]
    before = minutes = 0
    for line in lines:
        minutes += (line["step"] - before) * pairs / line["images_per_s"] / 60
        before, line["minutes"] = line["step"], minutes
    return lines


@errors_in_one_line()
def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]FOLDER", help="of runs, as train.py writes them")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    args = parser.parse_args()
    logs = {}
    for run in args.runs:
        label, path = run.split("=", 1) if "=" in run and not Path(run).is_dir() else (run, run)
        logs[label] = read(Path(path))
    if len(logs) < len(args.runs):
        raise ValueError("two runs have one label: give each its own, LABEL=FOLDER")
    names = [name for name in TITLES if any(name in line for log in logs.values() for line in log)]
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(9, 2.6 * rows))
    axes = figure.subplots(rows, 2, squeeze=False)
    for name, axis in zip(names, axes.flat):
        for i, log in enumerate(logs.values()):
            points = [(line["minutes"], line[name]) for line in log if name in line]
            if points:
                axis.plot(*zip(*points), f"C{i}", marker="." if name.startswith("val_") else "")
        axis.set(title=TITLES[name], xlabel="minutes of steps")
        if "loss" in name or "error" in name:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.remove()
    lines = [Line2D([], [], color=f"C{i}", label=label) for i, label in enumerate(logs)]
    figure.legend(handles=lines, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.3 / (2.6 * rows), 1, 1))
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
