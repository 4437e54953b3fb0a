"""The timing of training steps: every kind is there, and the ratios are of what was timed and counted."""
import json

import bench_speed
import pytest
from conftest import tiny_config

import model as models
from model import AutoencoderConfig, ClipConfig


def test_speed_measures_every_kind_of_step(monkeypatch, tmp_path, capsys) -> None:
    config = tiny_config(autoencoder=AutoencoderConfig("kl", 4, 2, 0.5, (32, 32)))
    monkeypatch.setitem(models.PRESETS, "tiny", config)
    monkeypatch.setitem(bench_speed.CLIPS, "clip-tiny", ClipConfig(32, 1, 2, 16, 32, 32, config.text))
    flags = ["--batch-size", "2", "--rounds", "1", "--repeats", "1", "--warm-up", "0", "--device", "cpu"]
    bench_speed.main(["--preset", "tiny", *flags, "--json", str(tmp_path / "speed.json")])
    result = json.loads((tmp_path / "speed.json").read_text())
    steps = result["steps"]
    assert result["task"] == "speed" and result["n"] == 2 and result["seed"] == 0
    assert set(steps) == {"generation", "alignment", "joint", "generation_cached", "alignment_cached",
                          "joint_cached", "clip"}
    for name in ("joint_over_sum", "joint_over_sum_cached"):
        assert result[name] > 0 and 0.5 < result[f"{name}_limit"] < 1
    expected = steps["joint"]["seconds"] / (steps["generation"]["seconds"] + steps["alignment"]["seconds"])
    assert result["joint_over_sum"] == pytest.approx(expected)
    for tail in ("", "_cached"):
        flops = [steps[name + tail]["gflops_per_image"] for name in ("generation", "alignment", "joint")]
        assert max(flops[:2]) < flops[2] < sum(flops[:2]), "joint training must share something"
    assert steps["joint_cached"]["gflops_per_image"] < steps["joint"]["gflops_per_image"]
    assert "joint_over_sum" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        bench_speed.main(["--batch-size", "1", "--device", "cpu"])
    assert stop.value.code == 2
