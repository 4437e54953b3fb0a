"""Long-running checks of training, too slow for the test suite: uneven shards on any number of ranks, and a
job that is killed again and again.

    python tests/soak.py ranks --ranks 1 2 4 8 --shards 1 3 7 16
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


def write_shards(folder: Path, count: int, shards: int, seed: int) -> list[int]:
    """`count` captioned JPEGs of random colours in tars of very unequal sizes -> how many are in each."""
    rng = np.random.default_rng([seed, count, shards])
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
    """A run under torchrun; what it says goes to a file beside its folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
               "--nproc_per_node", str(ranks), "--max-restarts", "1000", SMALL_RUN, *map(str, flags),
               "--device", "cpu", "--out", str(folder)]
    with folder.with_suffix(".said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def ranks_of(job: subprocess.Popen) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(job.pid)], stdout=subprocess.PIPE)
    return [int(line.split()[0]) for line in children.stdout.decode().splitlines() if SMALL_RUN in line]


def log_of(folder: Path) -> list[dict]:
    """The whole lines of a run's log; the last may just be being written."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def watch(job: subprocess.Popen, folder: Path, until: float = float("inf")) -> None:
    """Wait for a job's end, or until a time. Ends the program if it hangs or fails."""
    size, changed = -1, time.monotonic()
    while job.poll() is None and time.monotonic() < until:
        log = folder / "log.jsonl"
        if log.exists() and log.stat().st_size != size:
            size, changed = log.stat().st_size, time.monotonic()
        if time.monotonic() - changed > TIMEOUT:
            job.kill()
            sys.exit(f"failed: {folder.name} hangs, nothing logged for {TIMEOUT} s")
        time.sleep(0.05)
    if job.returncode:
        sys.exit(f"failed: {folder.name} ended with status {job.returncode}; it said\n"
                 + folder.with_suffix(".said").read_text()[-3000:])


# ---------------------------------------------------------------- ranks
def check_ranks(args: argparse.Namespace, root: Path) -> list[str]:
    wrong = []
    for shards in args.shards:
        sizes, expected = write_shards(root / f"data-{shards}", 200, shards, args.seed), None
        for ranks in args.ranks:
            folder = root / f"{shards}-{ranks}"
            watch(launch(ranks, folder, "--data", root / f"data-{shards}", "--val", 8, "--steps", args.steps,
                         "--batch-size", args.batch_size, "--workers", 1, "--seed", args.seed), folder)
            losses = np.array([[line[name] for name in LOSSES] for line in log_of(folder)])
            expected = losses if expected is None else expected
            difference = np.abs(losses - expected).max() / np.abs(expected).max()
            print(f"{shards} shards of {sizes}, {ranks} ranks: differs by {difference:.1e}", flush=True)
            if len(losses) != args.steps or not difference <= MAX_DIFFERENCE:       # so that NaN is wrong too
                wrong.append(f"{shards} shards, {ranks} ranks: {len(losses)} steps, {difference:.1e} off")
    return wrong


# ---------------------------------------------------------------- kill
def disturb(args: argparse.Namespace, folder: Path, flags: list) -> tuple[int, int]:
    """A run that is killed again and again until it is through -> kills of a rank, stops of the whole job."""
    rng, kills, stops = random.Random(args.seed), 0, 0
    job = launch(args.ranks, folder, *flags)
    while True:
        watch(job, folder, time.monotonic() + args.kill_every * rng.uniform(0.5, 1.5))
        ranks = ranks_of(job)
        if job.poll() is not None:
            return kills, stops
        if len(ranks) < args.ranks:         # not all there yet
            continue
        lines = log_of(folder)
        print(f"after step {lines[-1]['step'] if lines else 0}: "
              f"{'SIGTERM to the job' if kills % 3 == 2 else 'SIGKILL to a rank'}", flush=True)
        if kills % 3 == 2:
            job.send_signal(signal.SIGTERM)
            job.wait(60)
            job, stops = launch(args.ranks, folder, *flags, "--resume"), stops + 1
            kills += 1                      # the next is a rank again
        else:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            kills += 1


def flat(value, name: str = "") -> dict:
    """Everything in nested dicts and lists, by name; tensors as bytes: NaN equals itself, and 0 is not -0."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def check_kill(args: argparse.Namespace, root: Path) -> list[str]:
    data, whole, disturbed = root / "data", root / "whole", root / "disturbed"
    sizes = write_shards(data, args.samples, args.shards[0], args.seed)
    for tar in sorted(args.hostile.glob("*.tar")) if args.hostile else ():
        (data / f"hostile-{tar.name}").symlink_to(tar.resolve())
    flags = ["--data", data, "--val", 8, "--steps", args.steps, "--batch-size", args.batch_size,
             "--workers", 1, "--seed", args.seed, "--save-every", args.save_every, "--max-bad", 0.5]
    watch(launch(args.ranks, whole, *flags), whole)
    kills, stops = disturb(args, disturbed, flags)
    wrong = [] if kills else ["nothing was killed: give more --steps, or a lower --kill-every"]
    logs = [[{k: v for k, v in line.items() if k not in FREE} for line in log_of(run)]
            for run in (whole, disturbed)]
    wrong += [f"step {a['step']}: {b}, expected {a}" for a, b in zip(*logs) if a != b][:5]
    wrong += ["the logs have other lengths"] * (len(logs[0]) != len(logs[1]))
    count = 0
    for name in ("checkpoint.pt", "best.pt"):
        a, b = (flat(torch.load(run / name, weights_only=True)) for run in (whole, disturbed))
        wrong, count = wrong + [f"{name}: {k} differs" for k in a | b if a.get(k) != b.get(k)], count + len(a)
    print(f"shards of {sizes}: {kills - stops} kills of a rank, {stops} stops of the whole job; compared "
          f"{len(logs[0])} lines of the log, {count} values of checkpoints; "
          f"skipped {log_of(whole)[-1]['skipped']}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("ranks", "kill"))
    parser.add_argument("--ranks", type=int, nargs="+", help="processes that train together")
    parser.add_argument("--shards", type=int, nargs="+", help="numbers of tars")
    parser.add_argument("--steps", type=int, help="gradient steps of each run")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step, over all ranks")
    parser.add_argument("--samples", type=int, default=400, help="of kill, over all tars")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints, of kill")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds between kills, on average")
    parser.add_argument("--hostile", type=Path, help="folder of further tars, broken in all ways")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and kills")
    args = parser.parse_args()
    is_kill = args.task == "kill"
    args.ranks = (args.ranks or [2])[0] if is_kill else args.ranks or [1, 2, 4, 8]
    args.shards = args.shards or ([9] if is_kill else [1, 3, 7, 16])
    args.steps = args.steps or (3000 if is_kill else 12)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        wrong = (check_kill if is_kill else check_ranks)(args, Path(folder))
    sys.exit("\n".join(f"failed: {words}" for words in wrong) or print("passed"))


if __name__ == "__main__":
    main()
