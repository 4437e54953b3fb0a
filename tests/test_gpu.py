"""The script that asks a GPU its questions, on a CPU."""
import json
import subprocess
import sys

from conftest import ROOT


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
