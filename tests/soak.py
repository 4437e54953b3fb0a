"""Long-running checks of training, too slow for the test suite: uneven shards on any number of ranks, and a
job that is killed again and again.

    python tests/soak.py ranks --ranks 1 2 4 8 --shards 1 3 7 16 --steps 12
    python tests/soak.py kill --minutes 30 --kill-every 120 --ranks 2 --hostile DIR --json soak.json

ranks: the same training on 1, 2, 4, 8 ranks must see the same samples in the same order, each once an epoch,
have the same losses, and end; for data in 1, 3, 7, 16 tars of very unequal sizes.
kill: one run is left alone. Another, the same, runs under torchrun while ranks are killed (SIGKILL) at random
times, and every third time the whole job is told to stop (SIGTERM) and started again. Their logs must have
the same numbers, and their checkpoints the same bits. --hostile adds tars with broken samples to the data.

The networks are those of small_run.py, on CPU. Linux only: processes are found in /proc. Prints what it saw;
ends with status 1 and words if anything is wrong.
"""
import argparse
import io
import json
import os
import platform
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
SMALL_RUN = str(HERE / "small_run.py")
TIMINGS = ("images_per_s", "data_wait", "memory_gib", "mfu")
LOSSES = ("loss", "loss_generation", "loss_alignment")
EXACT = (*LOSSES, "accuracy", "grad_norm")
NEVER = 10 ** 9           # steps
MAX_DIFFERENCE = 1e-4     # relative: sums in another order, which Adam's division then amplifies
SAMPLES = 200             # of `ranks`: 8 are held out, and 12 steps of 16 pairs are the other 192 once


class Failure(Exception):
    """What is wrong, in words."""


# ---------------------------------------------------------------- data
def uneven(count: int, shards: int, rng: np.random.Generator) -> list[int]:
    """Sizes of shards, at least 1 each, `count` in sum; of two or more the smallest has one sample."""
    shares = rng.exponential(size=shards)
    shares[rng.integers(shards)] = 0 if shards > 1 else 1
    sizes = 1 + np.floor((count - shards) * shares / shares.sum()).astype(int)
    sizes[shares.argmax()] += count - sizes.sum()
    return sizes.tolist()


def write_shards(folder: Path, count: int, shards: int, seed: int) -> list[int]:
    """`count` captioned JPEGs of random colours and sizes in uneven tars -> how many are in each."""
    rng, number = np.random.default_rng([seed, count, shards]), 0
    sizes = uneven(count, shards, rng)
    folder.mkdir(parents=True)
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(size):
                colours = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
                width, height = rng.integers(32, 80, 2).tolist()
                picture = io.BytesIO()
                Image.fromarray(colours).resize((width, height)).save(picture, "JPEG")
                # Short: the small networks' text encoder reads 22 bytes.
                caption = f"no {number} r{colours[1, 1, 0]} g{colours[1, 1, 1]}"
                for suffix, body in (("jpg", picture.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
                number += 1
    return sizes


# ---------------------------------------------------------------- processes
def processes() -> Iterator[tuple[int, int, str]]:
    """Every process that runs: its id, its parent's, its command line."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:           # it ended meanwhile
            continue
        if state != "Z":
            yield int(entry.name), int(parent), command


def send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Job:
    """A training run as processes of its own; what they say goes to a file, after what earlier ones said."""
    running: list["Job"] = []

    def __init__(self, command: list[str], said: Path) -> None:
        self.said, self.begin = said, said.stat().st_size if said.exists() else 0
        with said.open("a") as file:
            # One thread each, and no progress bar's control characters in between.
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL, cwd=said.parent,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})
        Job.running.append(self)

    def words(self) -> str:
        """What this job said so far."""
        return self.said.read_bytes()[self.begin:].decode(errors="replace")

    def ranks(self) -> list[int]:
        """The ranks' processes: torchrun's children, whose children in turn read the data."""
        return sorted(pid for pid, parent, command in processes()
                      if parent == self.process.pid and SMALL_RUN in command)

    def family(self) -> list[int]:
        """All its processes, the oldest first."""
        parents, found = {pid: parent for pid, parent, _ in processes()}, [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def end(self) -> None:
        """Kill whatever is left of it."""
        if self.process.poll() is None:
            for pid in self.family():
                send(pid, signal.SIGKILL)
            self.process.wait()
        Job.running.remove(self)

    def failure(self, what: str) -> Failure:
        lines = [line.split("\r")[-1] for line in self.words().splitlines()]
        return Failure("\n    ".join([f"{what}; the last it said:", *lines[-60:]]))


def wait_until_gone(folder: Path, seconds: float = 60) -> None:
    """Nothing that works on a folder may outlive its job. Readers of data whose rank was killed take seconds
    to notice. Raises Failure."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid, _, command in processes() if str(folder) in command]:
        if time.monotonic() > deadline:
            for pid in left:
                send(pid, signal.SIGKILL)
            raise Failure(f"{len(left)} processes were still there {seconds:.0f} s after their job ended")
        time.sleep(0.2)


def torchrun(ranks: int, *more: str) -> list[str]:
    # Standalone: on a free port.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
            "--nproc_per_node", str(ranks), *more]


def log_of(folder: Path) -> list[dict]:
    """The whole lines of a run's log; the last may just be being written."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def strings(**flags) -> list[str]:
    return [str(part) for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]


# ---------------------------------------------------------------- ranks
def recorded(prefix: str, flags: list[str]) -> None:
    """One rank of a run of `ranks`: small_run.py, that also writes down which samples each step has."""
    import conftest  # noqa: F401  (puts the project on the path)
    import train
    step = train.Trainer.train_step

    def train_step(trainer, batch):
        with open(f"{prefix}-{trainer.rank}", "a") as file:
            file.write(json.dumps(batch.keys) + "\n")
        return step(trainer, batch)
    train.Trainer.train_step = train_step
    sys.argv = [SMALL_RUN, *flags]
    runpy.run_path(SMALL_RUN, run_name="__main__")


def train_on(folder: Path, data: Path, ranks: int, workers: int, args: argparse.Namespace) -> dict:
    """A whole run -> its "losses" and "keys" by step and the "seconds" it took. Raises Failure."""
    flags = strings(data=data, val=8, steps=args.steps, batch_size=args.batch_size, workers=workers,
                    seed=args.seed, shuffle_buffer=args.shuffle_buffer, log_every=1, eval_every=1000,
                    sample_every=1000, save_every=1000, device="cpu", out=folder / "run")
    folder.mkdir()
    launcher = [sys.executable] if ranks == 1 else torchrun(ranks)
    began = time.monotonic()
    job = Job([*launcher, __file__, "recorded", str(folder / "keys"), *flags], folder / "said")
    try:
        status = job.process.wait(args.timeout)
    except subprocess.TimeoutExpired:
        raise job.failure(f"hangs: no end after {args.timeout:.0f} s") from None
    finally:
        job.end()
    seconds = time.monotonic() - began
    if status:
        raise job.failure(f"ended with status {status}")
    wait_until_gone(folder)
    lines = log_of(folder / "run")
    if [line["step"] for line in lines] != list(range(1, args.steps + 1)):
        raise Failure(f"the log has steps {[line['step'] for line in lines]}, expected 1 to {args.steps}")
    shares = [[json.loads(line) for line in (folder / f"keys-{rank}").read_text().splitlines()]
              for rank in range(ranks)]
    # Row i of the global batch is rank i % ranks's.
    keys = [[key for row in zip(*parts, strict=True) for key in row] for parts in zip(*shares, strict=True)]
    return {"losses": [[line[name] for name in LOSSES] for line in lines], "keys": keys, "seconds": seconds}


def compare_ranks(got: dict, expected: dict) -> float:
    """-> the largest relative difference of losses. Raises Failure."""
    for step, (a, b) in enumerate(zip(got["keys"], expected["keys"], strict=True), 1):
        if a != b:
            row = next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
            raise Failure(f"step {step} has other samples, from row {row} on: {a[row:row + 3]}, "
                          f"expected {b[row:row + 3]}")
    seen = [key for keys in got["keys"] for key in keys][:SAMPLES - 8]
    if len(set(seen)) < len(seen):
        raise Failure(f"{len(seen) - len(set(seen))} samples came twice in the first epoch")
    a, b = np.array(got["losses"]), np.array(expected["losses"])
    difference = np.abs(a - b) / np.abs(b)
    if not difference.max() <= MAX_DIFFERENCE:       # so that NaN is a failure too
        step, name = np.unravel_index(np.nan_to_num(difference, nan=np.inf).argmax(), difference.shape)
        raise Failure(f"step {step + 1} has {LOSSES[name]} {a[step, name]}, expected {b[step, name]}: "
                      f"{difference[step, name]:.1e} off, allowed {MAX_DIFFERENCE:.0e}")
    return float(difference.max())


def check_ranks(args: argparse.Namespace, folder: Path) -> dict:
    rows, failures, ranks = [], [], sorted(set(args.ranks))
    print(f"{'shards':>6} {'ranks':>6} {'workers':>8} {'largest difference':>19} {'seconds':>8}", flush=True)
    for shards in args.shards:
        sizes = write_shards(folder / f"data-{shards}", SAMPLES, shards, args.seed)
        cases, first = [(count, 1) for count in ranks], None
        if shards == args.shards[-1]:
            cases.append((ranks[min(1, len(ranks) - 1)], 2))
        for count, workers in cases:
            row = {"shards": shards, "ranks": count, "workers": workers, "sizes": sizes}
            try:
                result = train_on(folder / f"{shards}-{count}-{workers}", folder / f"data-{shards}", count,
                                  workers, args)
                first = first or result
                row |= {"difference": compare_ranks(result, first), "seconds": round(result["seconds"], 1)}
                told = f"{row['difference']:19.1e} {row['seconds']:8.1f}"
            except Failure as failure:
                failures.append(f"{shards} shards, {count} ranks, {workers} workers: {failure}")
                row["failure"], told = str(failure).split("\n")[0], f"{'FAILED':>19}"
            rows.append(row)
            print(f"{shards:6} {count:6} {workers:8} {told}", flush=True)
    largest = max((row["difference"] for row in rows if "difference" in row), default=None)
    if largest is not None:
        print(f"largest difference of any loss at any step of {args.steps}: {largest:.1e} "
              f"(allowed {MAX_DIFFERENCE:.0e})")
    return {"largest_difference": largest, "runs": rows, "failures": failures}


# ---------------------------------------------------------------- kill
class Watch:
    """Whether a run gets on: its log grows."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.log, self.timeout, self.size, self.changed = folder / "log.jsonl", timeout, -1, time.monotonic()

    def grew(self) -> bool:
        """Since the last call. After a restart the log is shorter, which is a change but no growth."""
        before, self.size = self.size, self.log.stat().st_size if self.log.exists() else -1
        if self.size != before:
            self.changed = time.monotonic()
        return self.size > before >= 0

    def stalled(self) -> bool:
        return time.monotonic() - self.changed > self.timeout


def undisturbed(folder: Path, flags: list[str], args: argparse.Namespace) -> float:
    """A run that is left alone -> seconds. Raises Failure."""
    began, watch = time.monotonic(), Watch(folder, args.timeout)
    job = Job([*torchrun(args.ranks), SMALL_RUN, *flags, "--out", str(folder)], folder.with_suffix(".said"))
    try:
        while job.process.poll() is None:
            watch.grew()
            if watch.stalled():
                raise job.failure(f"the undisturbed run hangs: nothing logged for {args.timeout:.0f} s")
            time.sleep(0.1)
    finally:
        job.end()
    if job.process.returncode:
        raise job.failure(f"the undisturbed run ended with status {job.process.returncode}")
    return time.monotonic() - began


def steps_for(args: argparse.Namespace, folder: Path, flags: list[str]) -> int:
    """How many steps take about --minutes with all the disturbances, from a short timed run."""
    timed = 4 * args.log_every + 200
    took = undisturbed(folder, [*flags, *strings(steps=timed, eval_every=NEVER, sample_every=NEVER)], args)
    speed = statistics.median(line["images_per_s"] for line in log_of(folder)[2:]) / args.batch_size
    shutil.rmtree(folder)
    startup, again = took - timed / speed, args.save_every / 2 / speed
    print(f"a timed run: {speed:.1f} steps per second, {startup:.0f} s to start and to end", flush=True)
    if args.kill_every < startup + 2 * again:
        raise Failure(f"--kill-every {args.kill_every:g} leaves no time for starting ({startup:.0f} s) and "
                      f"the steps to the next save ({2 * again:.0f} s): raise it, or lower --save-every")
    share = 1 - (startup + again) / args.kill_every
    return max(2, round(args.minutes * 60 * share * speed / args.log_every)) * args.log_every


class Disturbed:
    """The run that is killed again and again until it is through."""

    def __init__(self, folder: Path, flags: list[str], steps: int, args: argparse.Namespace) -> None:
        self.folder, self.flags, self.steps, self.args = folder, flags, steps, args
        self.said, self.rng = folder.with_suffix(".said"), random.Random(args.seed)
        self.events: list[dict] = []
        self.stops: list[int] = []          # steps after which a SIGTERM stopped it
        self.launches, self.watch = 0, Watch(folder, args.timeout)

    def launch(self) -> Job:
        self.launches += 1
        resume = ["--resume"] if self.launches > 1 else []
        return Job([*torchrun(self.args.ranks, "--max-restarts", "1000"), SMALL_RUN, *self.flags,
                    "--out", str(self.folder), *resume], self.said)

    def note(self, what: str) -> None:
        lines = log_of(self.folder)
        step = lines[-1]["step"] if lines else 0
        self.events.append({"second": round(time.monotonic() - self.began, 1), "what": what, "step": step})
        print(f"{self.events[-1]['second']:8.1f} s, step {step:6}: {what}", flush=True)

    def run(self) -> float:
        """-> seconds. Raises Failure."""
        self.began, limit = time.monotonic(), 180 * self.args.minutes + 600
        job, due = self.launch(), self.next_time()
        try:
            while job.process.poll() is None:
                grew, now = self.watch.grew(), time.monotonic()
                if self.watch.stalled():
                    raise job.failure(f"hangs: nothing logged for {self.args.timeout:.0f} s")
                if now - self.began > limit:
                    raise job.failure(f"not through after {limit:.0f} s: are kills rarer than saves?")
                terminates = len(self.events) % 3 == 2
                # A job that is still starting has nothing to save when told to stop; killed it may be always.
                if now >= due and (grew or not terminates):
                    if terminates:
                        job = self.terminate(job)
                        due = self.next_time()
                    elif self.kill_a_rank(job):
                        due = self.next_time()
                time.sleep(0.05)
        finally:
            job.end()
        if job.process.returncode:
            raise job.failure(f"the disturbed run ended with status {job.process.returncode}")
        return time.monotonic() - self.began

    def next_time(self) -> float:
        return time.monotonic() + self.args.kill_every * self.rng.uniform(0.5, 1.5)

    def kill_a_rank(self, job: Job) -> bool:
        pids = job.ranks()
        if len(pids) < self.args.ranks:       # not all there yet
            return False
        which = self.rng.randrange(len(pids))
        killed = send(pids[which], signal.SIGKILL)
        if killed:
            self.note(f"SIGKILL to process {which + 1} of {len(pids)}")
        return killed

    def terminate(self, job: Job) -> Job:
        """SIGTERM to the whole job, which must save and end -> the job that goes on. Raises Failure."""
        everyone = self.rng.random() < 0.5    # schedulers differ: some tell all processes, some the first
        self.note(f"SIGTERM to {'all processes' if everyone else 'torchrun'}")
        for pid in job.family() if everyone else [job.process.pid]:
            send(pid, signal.SIGTERM)
        try:
            job.process.wait(60)
        except subprocess.TimeoutExpired:
            raise job.failure("still running 60 s after SIGTERM") from None
        finally:
            job.end()
        wait_until_gone(self.folder)
        saved = torch.load(self.folder / "checkpoint.pt", weights_only=True)["training"]["step"]
        logged, told = log_of(self.folder)[-1]["step"], re.findall(r"after step (\d+) of", job.words())
        # Between the last save and the end nothing is left to be saved.
        if saved < self.steps and not (told and int(told[-1]) == saved == logged):
            raise job.failure(f"SIGTERM: it said that it stopped after step {told[-1] if told else '?'}, "
                              f"saved is step {saved}, logged {logged}: expected the same three times")
        self.stops.append(saved)
        return self.launch()

    def begun(self) -> int:
        """How often training began: a job says so when all its ranks are ready."""
        return len(re.findall(r"^(?:.*\r)?run: .* step: \d+ of", self.said.read_text(errors="replace"), re.M))


def compare_logs(whole: list[dict], disturbed: list[dict], stops: list[int]) -> tuple[list[str], dict]:
    """-> what is wrong, and figures."""
    wrong, other, skips, by_step = [], 0, 0, {line["step"]: line for line in disturbed}
    steps = [line["step"] for line in disturbed]
    if steps != sorted(by_step):
        wrong.append("the disturbed log's steps are not in order, or come twice")
    missing = [line["step"] for line in whole if line["step"] not in by_step]
    if missing:
        wrong.append(f"{len(missing)} steps are missing from the disturbed log: {missing[:10]}")
    extra = sorted(by_step.keys() - {line["step"] for line in whole})
    if set(extra) - set(stops):
        wrong.append(f"the disturbed log has steps that no SIGTERM explains: "
                     f"{sorted(set(extra) - set(stops))[:10]}")
    before = {b: a for a, b in zip([0, *steps], steps)}
    for previous, line in zip([{"step": 0}, *whole], whole):
        got = by_step.get(line["step"])
        if got is None:
            continue
        for name in sorted(line.keys() | got.keys()):
            if name in TIMINGS or line.get(name) == got.get(name):
                continue
            if name in EXACT or not name.startswith(("skipped", "loss_")):
                wrong.append(f"step {line['step']}: {name} is {got.get(name)}, expected {line.get(name)}")
            elif name.startswith("skipped"):
                skips += name == "skipped"
            elif before[line["step"]] == previous["step"]:      # else it sums up other steps
                wrong.append(f"step {line['step']}: {name} is {got.get(name)}, expected {line.get(name)}")
            else:
                other += 1
    return wrong, {"lines_compared": len(whole) - len(missing), "lines_of_stops": len(extra),
                   "sums_over_other_steps": other, "lines_with_other_skip_counts": skips}


def flat(value, name: str = "") -> Iterator[tuple[str, object]]:
    """Everything in nested dicts and lists, by name."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def compare_checkpoints(whole: Path, disturbed: Path) -> tuple[list[str], int]:
    """Weights, averages, optimiser state and the rest, bit by bit -> what is wrong, how many tensors."""
    if not whole.exists() and not disturbed.exists():
        return [], 0
    if not (whole.exists() and disturbed.exists()):
        return [f"only one run has a {whole.name}"], 0
    states = []
    for path in (whole, disturbed):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["training"].pop("skipped")          # of visits, and some were made again
        states.append(dict(flat(checkpoint)))
    wrong, tensors, (expected, got) = [], 0, states
    for name in sorted(expected.keys() | got.keys()):
        a, b = expected.get(name), got.get(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            tensors += 1
            # As bytes: a NaN equals itself, and 0 is not -0.
            same = (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
        else:
            same = type(a) is type(b) and a == b
        if not same:
            wrong.append(f"{whole.name}: {name} differs")
    return wrong, tensors


def check_kill(args: argparse.Namespace, folder: Path) -> dict:
    data, tars = folder / "data", []
    sizes = write_shards(data, args.samples, args.shards, args.seed)
    if args.hostile is not None:
        tars = sorted(args.hostile.glob("*.tar"))
        if not tars:
            raise Failure(f"--hostile {args.hostile.name}: no tars there")
        for tar in tars:
            (data / f"hostile-{tar.name}").symlink_to(tar.resolve())
    print(f"data: shards of {sizes} samples and {len(tars)} hostile tars", flush=True)
    flags = strings(data=data, val=8, batch_size=args.batch_size, workers=args.workers, seed=args.seed,
                    shuffle_buffer=args.shuffle_buffer, log_every=args.log_every, save_every=args.save_every,
                    max_bad=args.max_bad, device="cpu")
    steps = args.steps or steps_for(args, folder / "timed", flags)
    flags += ["--steps", str(steps)]
    print(f"{steps} steps of {args.batch_size} pairs on {args.ranks} ranks", flush=True)
    took = undisturbed(folder / "whole", flags, args)
    wait_until_gone(folder / "whole")
    print(f"undisturbed: {took:.0f} s", flush=True)
    run = Disturbed(folder / "disturbed", flags, steps, args)
    seconds = run.run()
    wait_until_gone(folder / "disturbed")
    whole, disturbed = log_of(folder / "whole"), log_of(folder / "disturbed")
    wrong, figures = compare_logs(whole, disturbed, run.stops)
    tensors = 0
    for name in ("checkpoint.pt", "best.pt"):
        more, count = compare_checkpoints(folder / "whole" / name, folder / "disturbed" / name)
        wrong, tensors = wrong + more, tensors + count
    if args.hostile is not None and not whole[-1]["skipped"]:
        wrong.append("the hostile tars are in the data, but no sample was counted as bad")
    kills = sum("SIGKILL" in event["what"] for event in run.events)
    if not kills:
        wrong.append("nothing was killed: give more --minutes or --steps, or a lower --kill-every")
    print(f"disturbed: {seconds:.0f} s, {kills} kills of a rank, {len(run.stops)} stops of the whole job, "
          f"training began {run.begun()} times\ncompared: {figures['lines_compared']} lines of the log "
          f"({figures['lines_of_stops']} more where the job was stopped; skip counts differ in "
          f"{figures['lines_with_other_skip_counts']}), {tensors} tensors of checkpoints; "
          f"{whole[-1]['skipped']} samples skipped as bad")
    return {"steps": steps, "batch_size": args.batch_size, "ranks": args.ranks, "shard_sizes": sizes,
            "hostile_tars": len(tars), "seconds_undisturbed": round(took, 1),
            "seconds_disturbed": round(seconds, 1), "kills": kills, "stops": len(run.stops),
            "times_begun": run.begun(), **figures, "tensors_compared": tensors,
            "skipped": whole[-1]["skipped"], "skipped_by_cause": whole[-1]["skipped_by_cause"],
            "last_loss": whole[-1]["loss"], "events": run.events, "failures": wrong}


# ---------------------------------------------------------------- command line
def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    ranks = tasks.add_parser("ranks", help="the same losses and samples on any number of ranks",
                             formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ranks.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks")
    ranks.add_argument("--shards", type=positive, nargs="+", default=[1, 3, 7, 16],
                       help=f"numbers of tars, each time with {SAMPLES} samples in all")
    ranks.add_argument("--steps", type=positive, default=12, help="gradient steps of each run")
    ranks.add_argument("--batch-size", type=positive, default=16, help="pairs per step, over all ranks")
    kill = tasks.add_parser("kill", help="killed again and again, and never stopped",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kill.add_argument("--minutes", type=float, default=30, help="that the disturbed run is to take, about")
    kill.add_argument("--steps", type=positive, help="gradient steps; without it as many as --minutes allow, "
                      "from a short timed run")
    kill.add_argument("--kill-every", type=float, default=120, help="seconds between kills on average: each "
                      "interval is drawn from half to one and a half of it")
    kill.add_argument("--ranks", type=positive, default=2, help="processes that train together")
    kill.add_argument("--workers", type=positive, default=1, help="processes per rank that read data")
    kill.add_argument("--batch-size", type=positive, default=16, help="pairs per step, over all ranks")
    kill.add_argument("--samples", type=positive, default=400, help="generated samples, over all tars")
    kill.add_argument("--shards", type=positive, default=9, help="tars of generated samples")
    kill.add_argument("--hostile", type=Path, help="folder of further tars, broken in all ways (*.tar)")
    kill.add_argument("--max-bad", type=float, default=0.5, help="share of bad samples that training bears")
    kill.add_argument("--log-every", type=positive, default=10, help="steps between lines of the log")
    kill.add_argument("--save-every", type=positive, default=200, help="steps between checkpoints")
    for task in (ranks, kill):
        task.add_argument("--shuffle-buffer", type=positive, default=50,
                          help="samples mixed with each other; fewer than there are, so that shards matter")
        task.add_argument("--seed", type=int, default=0, help="of data, training and kills")
        task.add_argument("--timeout", type=float, default=300, help="seconds: of each run of `ranks`; of "
                          "`kill`, without a new line in the log; after that it counts as hanging")
        task.add_argument("--folder", type=Path, help="an empty folder for data and runs, which stay there; "
                          "without it a temporary one")
        task.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.task == "ranks" and any(args.batch_size % count for count in args.ranks):
        parser.error(f"--batch-size {args.batch_size} cannot be shared evenly by {args.ranks} ranks")
    if max([args.shards] if args.task == "kill" else args.shards) > 100:
        parser.error("--shards: up to 100")
    return args


def command_line() -> str:
    """As it was given, without places on this machine."""
    named = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python tests/soak.py", *named])


def main() -> None:
    if sys.argv[1:2] == ["recorded"]:
        recorded(sys.argv[2], sys.argv[3:])
        return
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))      # so that `finally` runs
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = {"ranks": check_ranks, "kill": check_kill}[args.task](args, folder)
    except Failure as failure:
        result = {"failures": [str(failure)]}
    finally:
        for job in list(Job.running):
            job.end()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        failures = [failure.split("\n")[0] for failure in result["failures"]]
        head = {"command": command_line(), "date": date.today().isoformat(), "torch": torch.__version__,
                "python": platform.python_version(), "cores": os.cpu_count()}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}"
                 for name, value in {**head, **result, "failures": failures}.items()]
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for failure in result["failures"][:20]:
        print(f"failed: {failure}", file=sys.stderr)
    if result["failures"]:
        print(f"{len(result['failures'])} failures", file=sys.stderr)
        sys.exit(1)
    print("passed")


if __name__ == "__main__":
    main()
