"""Long-running checks of training, too slow for the test suite: uneven shards on any number of ranks, and a
job that is killed again and again.

    python tests/soak.py ranks --ranks 1 2 4 8
    python tests/soak.py kill --steps 3000 --kill-every 60 --ranks 2 --hostile DIR

ranks: the same training, from tars of very unequal sizes, must have the same losses on any number of ranks.
kill: one run is left alone. Another, the same, runs under torchrun while ranks are killed (SIGKILL) at random
times, and every third time the whole job is told to stop (SIGTERM) and started again. Their logs must have
the same numbers, and their checkpoints the same bits. --hostile adds tars with broken samples to the data.

The networks are those of small_run.py, on CPU. Ends with status 1 and words if anything is wrong.
"""
import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SMALL_RUN = str(Path(__file__).resolve().parent / "small_run.py")
LOSSES = ("loss", "loss_generation", "loss_alignment")
# Timings, and what a resumed run counts anew.
FREE = ("images_per_s", "data_wait", "memory_gib", "skipped", "skipped_by_cause")
MAX_DIFFERENCE = 1e-4     # relative: sums in another order, which Adam's division then amplifies
TIMEOUT = 300             # seconds without a new line in the log: it hangs


def write_shards(folder: Path, count: int, shards: int) -> list[int]:
    """`count` captioned JPEGs of random colours in tars of very unequal sizes -> how many are in each."""
    rng = np.random.default_rng([count, shards])
    shares = rng.exponential(size=shards) ** 2
    sizes = 1 + np.floor((count - shards) * shares / shares.sum()).astype(int)
    sizes[shares.argmax()] += count - sizes.sum()
    folder.mkdir(parents=True)
    for shard, size in enumerate(sizes.tolist()):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(size):
                colours, picture = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8), io.BytesIO()
                Image.fromarray(colours).resize((48, 40)).save(picture, "JPEG")
                for suffix, body in (("jpg", picture.getvalue()), ("txt", f"no {shard} {i}".encode())):
                    member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
    return sizes.tolist()


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
    size, changed = -1, time.monotonic()
    while job.poll() is None and time.monotonic() < until and len(log_of(folder)) < lines:
        log = folder / "log.jsonl"
        if log.exists() and log.stat().st_size != size:
            size, changed = log.stat().st_size, time.monotonic()
        if time.monotonic() - changed > TIMEOUT:
            job.kill()
            sys.exit(f"failed: {folder.name} hangs, nothing logged for {TIMEOUT} s")
        time.sleep(0.01)
    if job.returncode:
        sys.exit(f"failed: {folder.name} ended with status {job.returncode}; it said\n"
                 + folder.with_suffix(".said").read_text()[-3000:])


# ---------------------------------------------------------------- ranks
def check_ranks(args: argparse.Namespace, root: Path) -> list[str]:
    wrong = []
    for shards in (1, 3, 7, 16):
        sizes, expected = write_shards(root / f"data-{shards}", 200, shards), None
        for ranks in args.ranks or (1, 2, 4, 8):
            folder = root / f"{shards}-{ranks}"
            watch(launch(ranks, folder, "--data", root / f"data-{shards}", "--steps", args.steps or 12,
                         "--workers", 1), folder)
            losses = np.array([[line[name] for name in LOSSES] for line in log_of(folder)])
            expected = losses if expected is None else expected
            difference = np.abs(losses - expected).max() / np.abs(expected).max()
            print(f"{shards} shards of {sizes}, {ranks} ranks: differs by {difference:.1e}", flush=True)
            if not difference <= MAX_DIFFERENCE:       # so that NaN is wrong too
                wrong.append(f"{shards} shards, {ranks} ranks: {difference:.1e} off")
    return wrong


# ---------------------------------------------------------------- kill
def disturb(count: int, kill_every: float, folder: Path, flags: list) -> int:
    """A run of `count` ranks that is disturbed again and again until it is through -> how often it was."""
    job, times = launch(count, folder, *flags), 0
    while True:
        watch(job, folder, time.monotonic() + kill_every * random.uniform(0.5, 1.5))
        ranks = ranks_of(job)
        if job.poll() is not None:
            return times
        if len(ranks) < count:         # not all there yet
            continue
        times += 1
        print(f"{len(log_of(folder))} lines of the log: "
              f"{'SIGKILL to a rank' if times % 3 else 'SIGTERM to the job'}", flush=True)
        if times % 3:
            os.kill(random.choice(ranks), signal.SIGKILL)
        else:
            job.send_signal(signal.SIGTERM)
            job.wait(60)
            job = launch(count, folder, *flags, "--resume")


def check_kill(args: argparse.Namespace, root: Path) -> list[str]:
    data, whole, disturbed = root / "data", root / "whole", root / "disturbed"
    write_shards(data, 400, 9)
    for tar in sorted(args.hostile.glob("*.tar")) if args.hostile else ():
        (data / f"hostile-{tar.name}").symlink_to(tar.resolve())
    flags = ["--data", data, "--steps", args.steps or 3000, "--save-every", 200, "--max-bad", 0.5,
             "--workers", 1]
    count, *_ = args.ranks or [2]
    watch(launch(count, whole, *flags), whole)
    times = disturb(count, args.kill_every, disturbed, flags)
    print(f"disturbed {times} times; compared {len(log_of(whole))} lines of the log, and the checkpoints")
    return differences(disturbed, whole) if times else ["nothing was killed: give more --steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("ranks", "kill"))
    parser.add_argument("--ranks", type=int, nargs="+", help="processes that train, of kill 2 or more")
    parser.add_argument("--steps", type=int, help="gradient steps of each run")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds between kills, on average")
    parser.add_argument("--hostile", type=Path, help="folder of further tars, broken in all ways")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        wrong = (check_kill if args.task == "kill" else check_ranks)(args, Path(folder))
    sys.exit("\n".join(f"failed: {words}" for words in wrong) or print("passed"))


if __name__ == "__main__":
    main()
