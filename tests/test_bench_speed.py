"""The timing of training steps: every kind is there, and the ratios are of what was timed and counted."""
import json

import bench_speed
import pytest
from conftest import tiny_config

import model as models
from model import AutoencoderConfig, ClipConfig


def test_speed_measures_every_kind_of_step(monkeypatch, tmp_path) -> None:
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
    with pytest.raises(SystemExit) as stop:
        bench_speed.main(["--batch-size", "1", "--device", "cpu"])
    assert stop.value.code == 2
