"""What one GPU answers in nine minutes: does all of it run there, as on a CPU, and how fast.

    python tests/gpu.py --json gpu.json                        one H100 or H200
    python tests/gpu.py --preset tiny --device cpu             the same questions, for the script's own sake

Every question is a command with a time limit of its own, most valuable first: the three scripts, and what
they learn and draw against the CPU; training steps at 256 px with a profile, and reading beside CLIP; drawing
at 512 px beside diffusers; what is compiled; the largest batch. Random weights. Answers come one by one."""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


class Answers:
    """Results by part and name, in a file from the first one on; and the clock."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.end = args, folder, time.monotonic() + 60 * args.minutes
        self.all = {"date": date.today().isoformat(), "torch": torch.__version__, "preset": args.preset,
                    "command": " ".join(["python tests/gpu.py", *sys.argv[1:]]), "device":
                    torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()}

    def add(self, part: str, name: str, answer: dict, said: str = "") -> None:
        self.all.setdefault(part, {})[name] = answer
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.all, indent=1) + "\n")
        print(f"{part}: {name}: {said or answer}", flush=True)

    def ask(self, part: str, limit: float, commands: dict[str, str]) -> None:
        """Run commands side by side, for `limit` seconds at most and what is left; an answer is what one
        writes as --json, its last line, and "took": seconds until it was done."""
        if part not in self.args.parts.split(","):
            return
        began, jobs = time.monotonic(), {}
        for name, words in commands.items():
            program, *flags = words.split()
            # What is compared with the CPU's results does without TF32.
            tf32 = {} if program.startswith("tests/") else {"NVIDIA_TF32_OVERRIDE": "0"}
            if program != "train.py":
                flags += ["--json", f"{self.folder}/{name}.json"]
            with (self.folder / f"{name}.txt").open("w") as said:
                jobs[name] = subprocess.Popen(
                    [sys.executable, program, "--device", self.args.device, *flags], cwd=ROOT, stdout=said,
                    stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, "TORCH_HOME": str(self.folder), **tf32})
        for name, job in jobs.items():
            try:
                answer = {"status": job.wait(max(0, min(began + limit, self.end) - time.monotonic()))}
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)          # with the processes that compile for it
                job.wait()
                answer = {"status": "not done in time"}
            answer["took"] = round(time.monotonic() - began, 1)
            said, result = (self.folder / f"{name}.txt").read_text(), self.folder / f"{name}.json"
            answer["last_line"] = (said.splitlines() or [""])[-1][-300:]
            if result.exists():
                answer |= json.loads(result.read_text())
            shown = answer["last_line"] if part == "scripts" else f"\n{said}"
            self.add(part, name, answer, f"status {answer['status']}, {answer['took']} s; {shown}")


def agree(folder: Path) -> dict:
    """Of every run the last loss and the average gradient beside the CPU's, differences in their own size; of
    the picture drawn there and on the CPU the largest difference, in levels of 255, of what is read there (in
    bf16) and on the CPU that of cosines."""
    losses, gradients, answer = {}, {}, {}
    for log in (log for log in folder.glob("*/log.jsonl") if log.stat().st_size):      # else it got nowhere
        run = log.parent.name
        losses[run] = json.loads(log.read_text().splitlines()[-1])["loss"]
        state = torch.load(log.with_name("checkpoint.pt"), "cpu", weights_only=True)["training"]["optimizer"]
        gradients[run] = torch.cat([values["exp_avg"].flatten() for values in state["state"].values()])
    for run in {"eager", "bf16", "compiled"} & losses.keys() if "cpu" in losses else ():
        difference = (gradients[run] - gradients["cpu"]).norm() / gradients["cpu"].norm()
        answer[run] = {"loss": abs(losses[run] / losses["cpu"] - 1), "gradient": difference.item()}
    pictures = [np.asarray(Image.open(path), int) for path in (folder / "cpu.png", folder / "eager.png")
                if path.exists()]
    answer["drawn"] = int(abs(pictures[0] - pictures[-1]).max()) if len(pictures) == 2 else None
    cosines = [np.array(json.loads(path.read_text())["images"][0]["cosines"])
               for path in folder.glob("read*.json")]
    answer["read"] = abs(cosines[0] - cosines[-1]).max() if len(cosines) == 2 else None
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("tiny", "small", "sd-v1"), default="sd-v1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which what still runs is ended")
    parser.add_argument("--parts", default="scripts,steps,draw,compiled,large", help="which, with commas")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers, big = Answers(args, folder), args.preset == "sd-v1"
        train = f"train.py --preset tiny --steps 4 --val 40 --out {folder}"
        bench = f"tests/bench_speed.py --preset {args.preset} --rounds 5 --repeats 1 --warm-up 3"
        ckpt = f"--ckpt {folder}/eager/checkpoint.pt"
        side, steps, small, middle, large = (512, 20, 32, 64, 128) if big else (32, 4, 2, 4, 8)
        answers.ask("scripts", 180, {
            "train": f"{train}/eager --no-compile --precision fp32",
            "train, CPU": f"{train}/cpu --no-compile --precision fp32 --device cpu",
            "train, bf16": f"{train}/bf16 --no-compile --precision bf16 --recompute"})
        answers.ask("scripts", 120, {
            "sample": f"sample.py circle -n 8 {ckpt} --steps 10 --precision fp32 --out {folder}/eager.png",
            "sample, CPU": f"sample.py circle -n 8 {ckpt} --steps 10 --out {folder}/cpu.png --device cpu",
            "read": f"sample.py --image .readme/grid.png circle square cross {ckpt}",
            "read, CPU": f"sample.py --image .readme/grid.png circle square cross {ckpt} --device cpu",
            "sample, bf16": f"sample.py circle {ckpt} --precision bf16 --sampler dpm++ --best-of 2 --steps 4 "
                            f"--out {folder}/bf16.png",
            "evaluate": f"evaluate.py retrieval zeroshot checker {ckpt} --limit 40 --n 4 --steps 4",
            "evaluate, fid": f"evaluate.py fid {ckpt} --features {folder}/eager/checkpoint.pt "
                             "--limit 40 --n 20 --steps 4"})
        answers.add("scripts", "agree", agree(folder))
        for batch, more in ((small, "--profile"), (middle, "--only generation alignment joint clip")):
            answers.ask("steps", 150, {f"batch {batch}": f"{bench} --no-compile --batch-size {batch} {more}"})
        for batch in (1, 16) if big else (2,):
            answers.ask("draw", 90, {
                f"draw {batch}": f"tests/bench_unet.py --preset {args.preset} --batch {batch} --size {side} "
                                 f"--draw {steps} --rounds 2 --warm-up 1 --dtype bfloat16"})
        if args.device == "cuda":
            answers.ask("compiled", 120, {
                "train, compiled": f"{train}/compiled --compile --precision fp32",
                "train, CLIP": f"{train}/clip --preset clip-tiny --compile"})
            answers.add("scripts", "agree, compiled", agree(folder))
            answers.ask("compiled", 300, {
                f"batch {middle}, compiled": f"{bench} --compile --batch-size {middle} --profile "
                                             "--only joint generation alignment clip"})
        for kind in ("alignment", "generation", "joint"):
            answers.ask("large", 60, {
                f"{kind} {large}": f"{bench} --no-compile --only {kind} --batch-size {large}"})


if __name__ == "__main__":
    main()
