"""The script that turns results into the README's tables, against numpy on made results."""
import json

import numpy as np
import pytest
import tables

ROWS = {"joint": [0.40, 0.42, 0.44], "better": [0.50, 0.55, 0.54], "same": [0.41, 0.45, 0.43],
        "no-fusion": [0.20, 0.22, 0.21], "t-0": [0.60, 0.61, 0.62], "generation": []}


@pytest.fixture()
def folder(tmp_path):
    for name, values in ROWS.items():
        for seed in range(3):
            score = {"mean_r1": values[seed], "top1": values[seed]} if values else {"fid": 0.5 + seed}
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(score))
    return tmp_path


def test_effects_are_differences_in_pooled_standard_errors(folder) -> None:
    rows = tables.read(folder)
    values, deviation = tables.summary(rows, "mean_r1")
    measured = [v for v in ROWS.values() if v]
    assert sorted(values) == sorted(name for name, v in ROWS.items() if v)
    assert deviation == pytest.approx(np.sqrt(np.mean([np.var(v, ddof=1) for v in measured])))
    difference, errors = tables.effect(values, deviation, "better")
    assert difference == pytest.approx(np.mean(ROWS["better"]) - np.mean(ROWS["joint"]))
    assert errors == pytest.approx(difference / (deviation * np.sqrt(2 / 3)))
    assert tables.effect(values, deviation, "joint") is None
    assert tables.effect(values, deviation, "generation") is None


def test_the_verdict_is_by_sign_and_noise(folder) -> None:
    assert tables.verdict((0.1, 3.0), 0.5) == "agrees" and tables.verdict((-0.1, -3.0), -0.5) == "agrees"
    assert tables.verdict((0.1, 3.0), -0.5) == "disagrees"
    assert tables.verdict((0.1, 1.9), 0.5) == "within noise"
    assert tables.verdict((0.1, 3.0), None) == "–" == tables.verdict(None, 0.5)
    told = tables.table(tables.read(folder)).splitlines()
    line = {name: next(text for text in told if text.startswith(f"| {name} |")) for name in ROWS}
    assert "▲" in line["better"] and "▼" in line["no-fusion"] and not set("▲▼") & set(line["same"])
    assert "1.500 ± 1.000" in line["generation"], "a row has the measures it has"
    of_paper = [text for text in told if text.startswith("| no-fusion |")][1]
    assert of_paper.count("agrees") == 2 and "disagrees" not in of_paper
    assert "disagrees" in [text for text in told if text.startswith("| t-0 |")][1]


def test_longtail_has_columns_of_its_own(tmp_path) -> None:
    for seed in range(3):
        told = {"task": "longtail", "image_acc": 0.3, "top1": 0.4 + 0.1 * seed, "linear_few": 0.0}
        (tmp_path / f"clip-{seed}.json").write_text(json.dumps(told))
        (tmp_path / f"shapes-{seed}.json").write_text(json.dumps(told))
    title, _, row, *rest = tables.table(tables.read(tmp_path)).splitlines()
    assert title == "| row | seeds | stage 1: Image-Acc | stage 2 |"
    assert row == "| clip | 3 | 30.0 ± 0.0 | 50.0 ± 10.0 |"
    assert "Under 1 % in every row: linear layer, few." in rest[-1], "and nothing of the paper's other tables"


def test_several_tasks_in_a_file_are_a_row(tmp_path) -> None:
    tasks = {"retrieval": {"task": "retrieval", "mean_r1": 0.5, "n": 3},
             "checker": {"task": "checker", "all": 0.25, "n": 64}}
    (tmp_path / "joint-0.json").write_text(json.dumps(tasks))
    assert {"mean_r1": 0.5, "all": 0.25}.items() <= tables.read(tmp_path)["joint"][0].items()
