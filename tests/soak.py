"""A run that is killed again and again beside one that is left alone, for hours: too slow for the test suite.

    python tests/soak.py --ranks 2 --kill-every 60 --steps 3000 [more FLAGS of train.py, as --data TARS]

Ranks are killed (SIGKILL) at random times; torchrun starts them again. Both logs must have the same numbers,
and both checkpoints the same bits; else the status is 1. The networks are those of small_run.py, on CPU.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SMALL_RUN = str(Path(__file__).resolve().parent / "small_run.py")
# Timings, and what a resumed run counts anew.
FREE = ("images_per_s", "data_wait", "skipped")
TIMEOUT = 300             # seconds without a new line in the log: it hangs


def launch(ranks: int, folder: Path, *flags) -> subprocess.Popen:
    """A run, of several ranks under torchrun; what it says goes to a file beside its folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
                "--nproc_per_node", str(ranks), "--max-restarts", "1000"] if ranks > 1 else []
    command = [sys.executable, *torchrun, SMALL_RUN, "--device", "cpu", "--val", "8", "--batch-size", "16",
               "--out", str(folder), *map(str, flags)]
    with folder.with_suffix(".said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def ranks_of(job: subprocess.Popen) -> list[int]:
    """The processes that train; a rank's own children read its data."""
    if "torch.distributed.run" not in job.args:
        return [job.pid]
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(job.pid)], text=True,
                            stdout=subprocess.PIPE)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if SMALL_RUN in line]


def log_of(folder: Path) -> list[dict]:
    """The whole lines of a run's log, without FREE; the last may just be being written."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []
    return [{name: value for name, value in line.items() if name not in FREE} for line in lines]


def flat(value, name: str = "") -> dict:
    """Everything in nested dicts and lists, by name; tensors as bytes: NaN equals itself, and 0 is not -0."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def differences(run: Path, other: Path) -> list[str]:
    """What logs and checkpoints of two runs do not share, bit for bit, in words."""
    logs, words = (log_of(run), log_of(other)), []
    if len(logs[0]) != len(logs[1]):
        words.append(f"logs of {len(logs[0])} and {len(logs[1])} lines")
    words += [f"step {a['step']}: {a} or {b}" for a, b in zip(*logs) if a != b][:5]
    for path in other.glob("*.pt"):
        a, b = (flat(torch.load(folder / path.name, weights_only=True)) for folder in (run, other))
        words += [f"{path.name}: {key} differs" for key in a | b if key not in a or a[key] != b.get(key)]
    return words


def watch(job: subprocess.Popen, folder: Path, until: float = float("inf"), lines: float = float("inf")
          ) -> None:
    """Wait for a job's end, until a time, or for so many lines of the log. Ends the program if it hangs or
    fails."""
    log, count, changed = folder / "log.jsonl", -1, time.monotonic()
    while job.poll() is None and time.monotonic() < until and count < lines:
        time.sleep(0.01)
        before, count = count, log.read_bytes().count(b"\n") if log.exists() else 0
        changed = changed if count == before else time.monotonic()
        if time.monotonic() - changed > TIMEOUT:
            job.kill()
            sys.exit(f"failed: {folder.name} hangs, nothing logged for {TIMEOUT} s")
    if job.returncode:
        sys.exit(f"failed: {folder.name} ended with status {job.returncode}; it said\n"
                 + folder.with_suffix(".said").read_text()[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes that train, 2 or more")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds between kills, on average")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        whole, killed, kills = Path(name, "whole"), Path(name, "killed"), 0
        watch(launch(args.ranks, whole, *flags), whole)
        job = launch(args.ranks, killed, *flags)
        while job.poll() is None:
            watch(job, killed, time.monotonic() + args.kill_every * random.uniform(0.5, 1.5))
            ranks = ranks_of(job)
            if job.poll() is None and len(ranks) == args.ranks:         # else not all there yet
                print(f"after {len(log_of(killed))} lines of the log: SIGKILL to a rank", flush=True)
                os.kill(random.choice(ranks), signal.SIGKILL)
                kills += 1
        watch(job, killed)
        print(f"killed {kills} times; compared {len(log_of(whole))} lines of the log, and the checkpoints")
        wrong = differences(killed, whole) if kills else ["nothing was killed: give more --steps"]
    sys.exit("\n".join(f"failed: {words}" for words in wrong) or print("passed"))


if __name__ == "__main__":
    main()
