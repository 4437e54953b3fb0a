"""What one GPU answers in nine minutes: does all of it run there, as on a CPU, and how fast.

    python tests/gpu.py --json gpu.json                        one H100 or H200
    python tests/gpu.py --preset tiny --device cpu             the same questions, for the script's own sake

Most valuable first: the three scripts; what is drawn, read and learnt against the CPU; training steps at 256
px, with one encoder pass for both tasks and with two; a profile of the joint step; drawing at 512 px beside
diffusers, reading beside CLIP; compiled steps. Random weights. Answers are written as they come; what no time
is left for says so.
"""
import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402  (the path comes first)
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import model as models  # noqa: E402
import train  # noqa: E402
from bench_speed import TASKS, Steps, inference_seconds  # noqa: E402
from data import Shapes  # noqa: E402
from sample import draw_images, draw_queries  # noqa: E402

PEAK = 989e12            # FLOP/s of an H100 or H200, dense bf16, by its data sheet
# What float32 may differ by from the CPU's: of drawings in [-1, 1], of unit vectors, of a gradient's length.
TOLERANCES = {"drawn": 2e-3, "read": 2e-3, "gradient": 2e-3}
SCRIPT_SECONDS = 150     # for the scripts that run side by side


class Answers:
    """Results by part and name, in a file from the first one on; and the clock. "took": seconds until the
    answer was there; the scripts, which run side by side, are only waited for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.end, self.parts = args.json, time.monotonic() + 60 * args.minutes, {}
        self.about = {"date": date.today().isoformat(), "torch": torch.__version__, "preset": args.preset,
                      "command": " ".join(["python tests/gpu.py", *sys.argv[1:]]), "device":
                      torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()}

    def add(self, part: str, name: str, seconds: float, measure: Callable[[], dict]) -> dict:
        """Measure, unless less than `seconds` are left; an error is an answer too."""
        began = time.monotonic()
        if began + seconds > self.end:
            answer = {"left_out": "no time"}
        else:
            try:
                answer = measure()
            except torch.cuda.OutOfMemoryError:
                answer = {"failed": "out of memory"}
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            gc.collect()
            torch.cuda.empty_cache() if torch.cuda.is_available() else None
        answer["took"] = round(time.monotonic() - began, 1)
        self.parts.setdefault(part, {})[name] = answer
        shown = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in answer.items()}
        print(f"{part:<10}{name:<34}{json.dumps(shown)}", flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps({**self.about, **self.parts}, indent=1) + "\n")
        return answer


# ---------------------------------------------------------------- the scripts
def run_scripts(answers: Answers, folder: Path, device: str) -> None:
    """train.py not compiled and compiled, side by side, then what their checkpoints are for."""
    def start(words: str) -> subprocess.Popen:
        log = (folder / f"{len(list(folder.glob('*.log')))}.log").open("w+")
        job = subprocess.Popen([sys.executable, *f"{words} --device {device}".split()], cwd=ROOT, stdout=log,
                               stderr=subprocess.STDOUT)
        job.log, job.end = log, time.monotonic() + SCRIPT_SECONDS
        return job

    def finish(job: subprocess.Popen) -> dict:
        try:
            status: int | str = job.wait(timeout=max(1, job.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
            status = "not done in time"
        job.log.seek(0)
        return {"status": status, "last_line": (job.log.read().splitlines() or [""])[-1][-300:]}
    steps = 12 if device == "cuda" else 4
    common = f"train.py --preset tiny --steps {steps} --val 40 --out {folder}"
    jobs = {"train": start(f"{common}/eager --no-compile"),
            "train bf16 --recompute": start(f"{common}/bf16 --no-compile --precision bf16 --recompute")}
    if device == "cuda":
        jobs |= {"train --compile": start(f"{common}/compiled --compile"),
                 "train CLIP --compile": start(f"train.py --preset clip-tiny --steps 20 --val 40 --compile "
                                               f"--out {folder}/clip")}
    for name, job in jobs.items():
        answers.add("scripts", name, 0, lambda job=job: finish(job))
    ckpt = f"--ckpt {folder}/eager"
    jobs = {"sample": start(f"sample.py circle {ckpt} --best-of 2 --steps 4 --out {folder}/a.png"),
            "sample bf16": start(f"sample.py circle {ckpt} --dtype bf16 --sampler dpm++ --steps 4 "
                                 f"--out {folder}/b.png"),
            "evaluate": start(f"evaluate.py retrieval zeroshot checker {ckpt} --limit 40 --n 4 --steps 4"),
            "evaluate fid longtail": start(f"evaluate.py fid longtail {ckpt} --features {folder}/eager "
                                           "--limit 40 --n 20 --steps 4 --epochs 1 --head-epochs 1")}
    for name, job in jobs.items():
        answers.add("scripts", name, 0, lambda job=job: finish(job))


def agree(folder: Path, device: str) -> dict:
    """What the same weights draw, read and learn there and on the CPU: the largest difference of drawings and
    of text queries, the joint loss's gradient's in its own length; float32 (no TF32), and bf16 weights (of
    the gradient: autocast). And of the last logged loss, compiled over not compiled."""
    prompts, pictures, answer = [Shapes().captions(i)[0] for i in range(8)], [], {}
    pixels = torch.stack([torch.tensor(np.asarray(Shapes().image(i, None))) for i in range(8)])

    def values(where: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = models.load(folder / "eager", where, dtype=dtype)
        pictures.append(draw_images(model, prompts, list(range(8)), steps=10).cpu())
        queries = draw_queries(model, model.encode_image(pictures[0].to(where)), list(range(8)), draws=2)
        learner = models.load(folder / "eager", where).requires_grad_(True)
        noise = train.sample_noise(learner.config, learner.latent_shape(32, 32), 0, 0, range(8))
        loss = train.JointLoss(learner, bf16=dtype == torch.bfloat16).to(where)
        train.backward(loss, [(pixels.to(where), learner.tokenizer(prompts).to(where),
                               {name: value.to(where) for name, value in noise.items()})], 1.0)
        gradient = torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]).cpu()
        return {"drawn": pictures[-1], "read": queries.cpu(), "gradient": gradient}
    reference = values("cpu", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for name, value in values(device, dtype).items():
            error = value - reference[name]
            answer[f"{name}_{str(dtype)[6:]}"] = (
                error.norm() / reference[name].norm() if name == "gradient" else error.abs().max()).item()
    answer["ok"] = all(answer[f"{name}_float32"] < most for name, most in TOLERANCES.items())
    if (folder / "compiled" / "log.jsonl").is_file():
        ours, theirs = (json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])["loss"]
                        for name in ("compiled", "eager"))
        answer["loss_compiled_over_eager"] = ours / theirs
    return answer


# ---------------------------------------------------------------- training steps
class Timer:
    """Training steps of a preset's networks on random pairs, at any batch up to the largest."""

    def __init__(self, args: argparse.Namespace, largest: int) -> None:
        values = dict(preset=args.preset, batch_size=largest, seed=0, precision="bf16", recompute=False,
                      compile=False, warm_up=3, rounds=args.rounds, device=torch.device(args.device))
        self.args = argparse.Namespace(**values)
        with FakeTensorMode():          # tensors without storage
            self.count(argparse.Namespace(**values | {"batch_size": 2}))
        self.steps = Steps(self.args, self.args.device)
        self.clip = Steps(self.args, self.args.device, is_clip=True)
        self.clip.moments = self.steps.moments          # never read
        self.whole = {steps: (steps.pixels, steps.tokens, steps.moments, steps.noise)
                      for steps in (self.steps, self.clip)}
        unet = self.steps.model.unet
        self.both = {True: unet.denoise_both, False: lambda z_t, t, c, e_t, t_e, z, null: (
            unet.denoise_image(z_t, t, c), unet.denoise_query(e_t, t_e, z, null))}

    def count(self, args: argparse.Namespace) -> None:
        counting, clip = Steps(args, torch.device("cpu")), Steps(args, torch.device("cpu"), is_clip=True)
        self.flops = {name: counting.flops(tasks, False) for name, tasks in TASKS.items()}
        self.flops["clip"] = clip.flops(("alignment",), False)

    def take(self, batch: int) -> None:
        """From here on steps are of so many pairs."""
        for steps, (pixels, tokens, moments, noise) in self.whole.items():
            steps.pixels, steps.tokens, steps.moments = pixels[:batch], tokens[:batch], moments[:batch]
            steps.noise = {name: value[:batch] for name, value in noise.items()}
            steps.model.zero_grad(set_to_none=True)
        self.args.batch_size = batch

    def step(self, kind: str, batch: int, compiled: bool = False, one_pass: bool = True) -> dict:
        self.take(batch)
        steps, self.args.compile = self.clip if kind == "clip" else self.steps, compiled
        self.steps.model.unet.denoise_both = self.both[one_pass]
        torch._dynamo.reset()
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = steps.seconds(TASKS.get(kind, ("alignment",)), False)
        return {"ms": 1000 * seconds, "images_per_s": batch / seconds,
                "share_of_peak": self.flops[kind] * batch / seconds / PEAK,
                "gib": train.memory_gib(self.args.device), "gflop_per_image": self.flops[kind] / 1e9}

    def profile(self, batch: int, compiled: bool) -> dict:
        """The ten kernels on which a joint step spends the most time, ms and share of the whole."""
        from torch.profiler import ProfilerActivity, profile
        cuda, calls = self.args.device.type == "cuda", []
        backward = train.backward

        def traced(*args, **kwargs):
            calls.append(0)
            if len(calls) < 4:
                return backward(*args, **kwargs)
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
                result = backward(*args, **kwargs)
                torch.cuda.synchronize() if cuda else None
            calls.append(trace)
            return result
        train.backward, rounds, self.args.rounds = traced, self.args.rounds, 1
        try:
            self.step("joint", batch, compiled)
        finally:
            train.backward, self.args.rounds = backward, rounds
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(calls[-1].key_averages(), key=lambda row: -getattr(row, name))
        total = sum(getattr(row, name) for row in rows)
        return {"ms": total / 1000, "kernels": [
            {"name": row.key[:110], "calls": row.count, "ms": round(getattr(row, name) / 1000, 3),
             "share": round(getattr(row, name) / total, 4)} for row in rows[:10]],
            "groups": group(rows, name)}


KERNELS = {"attention": ("flash", "fmha", "attention"), "convolution": ("conv", "wgrad", "dgrad", "fprop"),
           "matrix product": ("gemm", "nvjet", "cutlass", "cublas"), "triton": ("triton",),
           "copy, layout": ("copy", "memcpy", "memset", "nchw", "nhwc", "cat"), "norm": ("norm",),
           "element-wise": ("elementwise", "vectorized", "reduce"), "other": ("",)}


def group(rows: list, name: str) -> dict:
    """Share of the time by what kernels are called."""
    shares = dict.fromkeys(KERNELS, 0.0)
    for row in rows:
        words = row.key.lower()
        shares[next(kind for kind in KERNELS if any(w in words for w in KERNELS[kind]))] += getattr(row, name)
    total = sum(shares.values())
    return {kind: round(share / total, 4) for kind, share in sorted(shares.items(), key=lambda x: -x[1])}


def matrix_product(device: str) -> dict:
    """What a large product of matrices reaches: the practical limit."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * n ** 3 / median(lambda: a @ b, 10, device) / 1e12}


def median(call: Callable, rounds: int, device: str) -> float:
    """Seconds of a call, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        torch.cuda.synchronize() if device == "cuda" else None
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# ---------------------------------------------------------------- drawing and reading
def draw(model: models.DiffDis, batch: int, side: int, steps: int, device: str) -> dict:
    """Seconds of a batch of drawings, bf16 weights."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompts, seeds = ["a dog"] * batch, list(range(batch))
    seconds = median(lambda: draw_images(model, prompts, seeds, steps, 7.5, (side, side)), 2, device)
    return {"seconds": seconds, "steps_per_s": steps / seconds, "images_per_s": batch / seconds,
            "gib": train.memory_gib(torch.device(device))}


def draw_as_diffusers(model: models.DiffDis, batch: int, side: int, steps: int, device: str,
                      layout: torch.memory_format) -> dict:
    """The same by diffusers' networks of the same sizes, its scheduler and its usual loop."""
    import diffusers
    unet, vae, D = model.config.unet, model.config.autoencoder, model.config.text.width
    make = dict(device=device, dtype=torch.bfloat16)
    with torch.device(device):
        theirs = diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=unet.res_blocks, cross_attention_dim=D,
            block_out_channels=unet.channels, attention_head_dim=unet.heads, down_block_types=[
                "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention], up_block_types=[
                "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in unet.attention[::-1]]).to(**make).eval()
        decoder = diffusers.AutoencoderKL(
            block_out_channels=vae.channels, latent_channels=4, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * len(vae.channels),
            up_block_types=["UpDecoderBlock2D"] * len(vae.channels)).to(**make).eval()
    theirs.to(memory_format=layout), decoder.to(memory_format=layout)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    context = torch.randn(2 * batch, 77, D, **make)

    @torch.no_grad()
    def call() -> None:
        z = torch.randn(batch, 4, side // 8, side // 8, **make)
        for t in scheduler.timesteps:
            unconditional, conditional = theirs(torch.cat([z, z]), t, context).sample.chunk(2)
            z = scheduler.step(unconditional + 7.5 * (conditional - unconditional), t, z).prev_sample
        decoder.decode(z / 0.18215).sample.float().cpu()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median(call, 2, device)
    return {"seconds": seconds, "steps_per_s": steps / seconds, "gib": train.memory_gib(torch.device(device))}


# ---------------------------------------------------------------- all of it
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("tiny", "small", "sd-v1"), default="sd-v1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing new is begun")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each kind")
    parser.add_argument("--parts", help="which, with commas",
                        default="scripts,steps,profile,read,draw,compiled")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    answers, parts, device, big = Answers(args), args.parts.split(","), args.device, args.preset == "sd-v1"
    if "scripts" in parts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault("TORCH_HOME", folder)
            run_scripts(answers, Path(folder), device)
            torch.backends.cudnn.allow_tf32 = False
            answers.add("agree", "with the CPU", 5, lambda: agree(Path(folder), device))
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True      # as train.py has it
    torch.set_float32_matmul_precision("high")
    batches, kinds = (32, 64, 128) if big else (4, 8), (*TASKS, "clip")
    timer, middle = Timer(args, batches[-1]), batches[1]
    if "steps" in parts:
        answers.add("steps", "matrix product", 2, lambda: matrix_product(device))
        for batch in batches:
            for kind in kinds:
                answers.add("steps", f"{kind}, {batch}", 5, lambda: timer.step(kind, batch))
        answers.add("steps", f"joint, {middle}, two passes", 5,
                    lambda: timer.step("joint", middle, one_pass=False))
    if "profile" in parts:
        answers.add("profile", f"joint, {middle}", 5, lambda: timer.profile(middle, False))
    if "read" in parts:
        timer.take(batches[0])
        answers.add("read", f"beside CLIP, {batches[0]}", 10, lambda: inference_seconds(
            timer.steps, timer.clip, timer.args))
    if "draw" in parts:
        model = copy.deepcopy(timer.steps.model).requires_grad_(False).eval().to(torch.bfloat16)
        side, steps = (512, 20) if big else (model.config.image_size, 4)
        for batch in (1, 16) if big else (1, 4):
            answers.add("draw", f"{batch} of {side} px", 20, lambda: draw(model, batch, side, steps, device))
            for layout in (torch.contiguous_format, torch.channels_last) if big else ():
                answers.add("draw", f"{batch} of {side} px, diffusers, {str(layout)[6:]}", 20,
                            lambda: draw_as_diffusers(model, batch, side, steps, device, layout))
    for kind in kinds if "compiled" in parts and device == "cuda" else ():
        seconds = 300 if big else 60          # an H100's host had not compiled sd-v1's joint step in so many
        answers.add("steps", f"{kind}, {middle}, compiled", seconds, lambda: timer.step(kind, middle, True))
        if kind == "joint":
            answers.add("profile", f"joint, {middle}, compiled", seconds, lambda: timer.profile(middle, True))


if __name__ == "__main__":
    main()
