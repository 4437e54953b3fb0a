"""The script that asks a GPU its questions, on a CPU."""
import json
import subprocess
import sys

from conftest import ROOT


def ask(tmp_path, *flags: str) -> dict:
    subprocess.run([sys.executable, "tests/gpu.py", "--preset", "tiny", "--device", "cpu", "--rounds", "1",
                    "--json", tmp_path / "gpu.json", *flags], cwd=ROOT, check=True, capture_output=True)
    return json.loads((tmp_path / "gpu.json").read_text())


def test_every_part_answers_on_a_cpu(tmp_path) -> None:
    answers = ask(tmp_path, "--parts", "steps,draw")                 # the scripts have tests of their own
    steps, draw = answers["steps"]["batch 2"], answers["draw"]["draw 2"]
    assert steps["status"] == draw["status"] == 0
    assert set(steps["steps"]) == set(answers["steps"]["batch 4"]["steps"])
    assert all(0 < row["share_of_peak"] < 1 for row in steps["steps"].values())
    assert len(steps["profile"]["kernels"]) == 10
    assert draw["difference"] < 1e-2, "diffusers' UNet must hold the same weights"


def test_what_takes_too_long_is_ended_and_said(tmp_path) -> None:
    answers = ask(tmp_path, "--parts", "large", "--minutes", "0.01")["large"]
    assert [answer["status"] for answer in answers.values()] == ["not done in time"] * 3
