"""The script that asks a GPU its questions, on a CPU: every part answers."""
import json
import subprocess
import sys

from conftest import ROOT


def test_every_part_answers_on_a_cpu(tmp_path) -> None:
    parts = "steps,profile,read,draw"              # the scripts have tests of their own
    command = f"tests/gpu.py --preset tiny --device cpu --rounds 1 --parts {parts} --json {tmp_path}/gpu.json"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    answers = json.loads((tmp_path / "gpu.json").read_text())
    for part in parts.split(","):
        for name, answer in answers[part].items():
            assert not {"failed", "left_out"} & set(answer), (name, answer)
    steps = answers["steps"]
    assert {"joint, 4", "generation, 8", "alignment, 8", "clip, 8", "joint, 8, two passes"} < set(steps)
    assert all(step["images_per_s"] > 0 for name, step in steps.items() if name != "matrix product")
    assert len(answers["profile"]["joint, 8"]["kernels"]) == 10
