"""The script that turns results into the README's tables, against numpy on made results."""
import json

import numpy as np
import pytest
import tables

ROWS = {"joint": [0.40, 0.42, 0.44], "better": [0.50, 0.55, 0.54], "same": [0.41, 0.45, 0.43],
        "no-fusion": [0.20, 0.22, 0.21], "t-0": [0.60, 0.61, 0.62], "generation": []}


def write(folder, rows: dict) -> dict:
    for name, runs in rows.items():
        for seed, run in enumerate(runs):
            (folder / f"{name}-{seed}.json").write_text(json.dumps(run))
    return tables.read(folder)


def test_verdicts_are_by_sign_and_pooled_standard_errors(tmp_path) -> None:
    rows = write(tmp_path, {name: [{"mean_r1": value, "top1": value} for value in values] or
                            [{"fid": 0.5 + seed} for seed in range(3)] for name, values in ROWS.items()})
    column = tables.Measure(rows, "mean_r1", tables.METRICS["mean_r1"])
    measured = [values for values in ROWS.values() if values]
    assert column.deviation == pytest.approx(np.sqrt(np.mean([np.var(v, ddof=1) for v in measured])))
    difference, is_beyond = column.effect("better")
    assert is_beyond and difference == pytest.approx(np.mean(ROWS["better"]) - np.mean(ROWS["joint"]))
    assert not column.effect("same")[1] and column.effect("joint") is column.effect("generation") is None
    lines = tables.table(rows).splitlines()
    first = {name: next(line for line in lines if line.startswith(f"| {name} |")) for name in ROWS}
    assert "▲" in first["better"] and "▼" in first["no-fusion"] and not set("▲▼") & set(first["same"])
    assert "1.500 ± 1.000" in first["generation"], "a row has the measures it has"
