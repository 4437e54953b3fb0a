"""All scripts' environment; those beside the tests: what measures speed, asks a GPU, makes tables."""
import json
import os
import subprocess
import sys

import bench_speed
import numpy as np
import pytest
import tables
from conftest import ROOT, error_of, tiny_config

import model as models
from model import AutoencoderConfig, ClipConfig


@pytest.mark.parametrize("script", ("train", "evaluate", "sample"))
def test_threads_hardly_spin_where_other_programs_want_the_cores(script) -> None:
    env = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    env.pop("GOMP_SPINCOUNT", None)
    run = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, env=env, capture_output=True)
    if b"GOMP_" not in run.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    assert b"GOMP_SPINCOUNT = '10000'" in run.stderr and b"--device" in run.stdout


def test_speed_measures_every_kind_of_step(monkeypatch, tmp_path, capsys) -> None:
    config = tiny_config(autoencoder=AutoencoderConfig("kl", 4, 2, 0.5, (32, 32)))
    monkeypatch.setitem(models.PRESETS, "tiny", config)
    monkeypatch.setitem(bench_speed.CLIPS, "clip-tiny", ClipConfig(32, 1, 2, 16, 32, 32, config.text))
    flags = "--batch-size 2 --rounds 1 --repeats 1 --warm-up 0 --device cpu --profile --json"
    bench_speed.main([*flags.split(), str(tmp_path / "speed.json")])
    result = json.loads((tmp_path / "speed.json").read_text())
    steps = result["steps"]
    assert set(steps) == set(bench_speed.KINDS) and len(result["profile"]["kernels"]) == 10
    expected = steps["joint"]["seconds"] / (steps["generation"]["seconds"] + steps["alignment"]["seconds"])
    assert result["joint_over_sum"] == pytest.approx(expected)
    for tail in ("", "_cached"):
        flops = [steps[name + tail]["gflops_per_image"] for name in ("generation", "alignment", "joint")]
        assert max(flops[:2]) < flops[2] < sum(flops[:2]), "joint training must share something"
        assert result[f"joint_over_sum{tail}_limit"] == pytest.approx(flops[2] / sum(flops[:2]))
    assert steps["joint_cached"]["gflops_per_image"] < steps["joint"]["gflops_per_image"]
    assert "2 or more" in error_of(capsys, bench_speed.main, ["--batch-size", "1", "--device", "cpu"])


# ---------------------------------------------------------------- tests/gpu.py
def ask(tmp_path, *flags: str) -> dict:
    subprocess.run([sys.executable, "tests/gpu.py", "--preset", "tiny", "--device", "cpu", "--json",
                    tmp_path / "gpu.json", *flags], cwd=ROOT, check=True, capture_output=True)
    return json.loads((tmp_path / "gpu.json").read_text())


def test_an_answer_is_what_its_command_writes(tmp_path) -> None:
    answer = ask(tmp_path, "--parts", "draw")["draw"]["draw 2"]
    assert answer["status"] == 0 and answer["ratio"] > 0, answer
    assert answer["difference"] < 1e-2, "diffusers' UNet must hold the same weights"


def test_what_takes_too_long_is_ended_and_said(tmp_path) -> None:
    answers = ask(tmp_path, "--parts", "large", "--minutes", "0.01")["large"]
    assert [answer["status"] for answer in answers.values()] == ["not done in time"] * 3


# ---------------------------------------------------------------- tests/tables.py, against numpy
ROWS = {"joint": [0.40, 0.42, 0.44], "better": [0.50, 0.55, 0.54], "same": [0.41, 0.45, 0.43],
        "no-fusion": [0.20, 0.22, 0.21], "t-0": [0.60, 0.61, 0.62], "generation": []}


def test_verdicts_are_by_sign_and_pooled_standard_errors(tmp_path) -> None:
    for name, values in ROWS.items():
        for seed, value in enumerate(values):
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({"mean_r1": value, "top1": value}))
    lines = [json.dumps({"file": f"generation-{seed}", "fid": 0.5 + seed}) for seed in range(3)]
    (tmp_path / "drawn.jsonl").write_text("\n".join(lines))
    rows = tables.read(tmp_path, tmp_path / "drawn.jsonl")
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
