"""What a training step of either task, and of both, costs (the paper's Table 6), with train.py's own step.

    python tests/bench_speed.py --preset tiny
    python tests/bench_speed.py --preset sd-v1 --batch-size 2 --rounds 3 --repeats 1 --json speed.json

Random weights, random pairs. Every kind of step takes its turn --repeats times; the median counts. "By FLOPs"
is what counting gives as the limit of the two ratios. Where there is an autoencoder every kind is measured
twice, from pixels and from cached latents.
"""
import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (the path comes first)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model as models  # noqa: E402
import train  # noqa: E402
from data import Tokenizer  # noqa: E402
from diffusion import alignment_loss  # noqa: E402
from model import CLIPS, LIKE, PRESETS, Clip, ClipConfig, DiffDis  # noqa: E402
from sample import Parser, fail, natural, pick_device, positive  # noqa: E402

TASKS = {"generation": ("generation",), "alignment": ("alignment",), "joint": ("generation", "alignment")}


def median_seconds(step: Callable, rounds: int, warm_up: int, device: torch.device) -> float:
    """Median time of calling `step`, its work on the device included."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = []
    for _ in range(warm_up + rounds):
        wait()
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what this device gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    with torch.no_grad():
        return 2 * n ** 3 / median_seconds(lambda: a @ b, 20, 5, device)


class Steps:
    """Training steps of DiffDis on random pairs, as train.py does them."""

    def __init__(self, args: argparse.Namespace) -> None:
        config, device, count = PRESETS[args.preset], args.device, args.batch_size
        merges = [f"{i} {i}" for i in range(config.text.vocab_size - 514)]      # no words, but as many
        torch.manual_seed(args.seed)
        self.model = DiffDis(config, Tokenizer(merges, config.text.context_length))
        self.model.to(device, memory_format=torch.channels_last)
        self.args, self.run = args, train.parse_args(["--preset", args.preset, "--precision", args.precision])
        self.run.compile, self.run.recompute = args.compile, args.recompute
        size, shape = config.image_size, self.model.latent_shape(config.image_size, config.image_size)
        self.pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, device=device)
        self.moments = torch.randn(count, 2 * shape[0], *shape[1:], device=device).half()
        self.tokens = torch.randint(config.text.vocab_size - 2, (count, config.text.context_length),
                                    device=device)
        self.drawn = {name: value.to(device) for name, value in
                      train.draw(config, shape, args.seed, 0, range(count)).items()}
        self.trains_text = config.autoencoder.kind != "kl"       # as in train.py: not if it came pretrained

    def flops(self, tasks: tuple[str, ...], cached: bool) -> float:
        """Of one pair, one step."""
        self.run.tasks = tasks
        return train.count_flops(self.model.config, self.model.tokenizer, self.run, self.trains_text,
                                 self.args.batch_size, cached)

    def measure(self, tasks: tuple[str, ...], cached: bool) -> float:
        """Seconds of a step with these tasks, from cached latents or from pixels."""
        self.run.tasks, args = tasks, self.args
        self.model.train().requires_grad_(True)
        train.freeze_unused(self.model, tasks, self.trains_text)
        joint = train.JointLoss(self.model, self.run).to(args.device)
        optimizer = train.make_optimizer(self.model, self.run, pretrained=False)
        averages = train.Averages(self.model, 0.999)

        def step() -> None:
            latents = joint.encode(self.moments if cached else self.pixels, self.drawn)
            train.backward(joint, [(latents, self.tokens, self.drawn)], self.run.align_weight)
            torch.nn.utils.clip_grad_norm_(averages.live.values(), 1.0)
            optimizer.step()
            averages.update(0)
            self.model.zero_grad(set_to_none=True)
        return median_seconds(step, args.rounds, args.warm_up, args.device)


class ClipSteps:
    """The same for CLIP: what the alignment task would cost as a network of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        config, size, self.args = CLIPS[LIKE[args.preset]], CLIPS[LIKE[args.preset]].image_size, args
        self.model = Clip(config).to(args.device)
        self.images = torch.randn(args.batch_size, 3, size, size, device=args.device)
        self.tokens = torch.randint(config.text.vocab_size, (args.batch_size, config.text.context_length),
                                    device=args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.encoders = self.model.encode_image, self.model.encode_tokens
        if args.compile:
            self.encoders = tuple(map(torch.compile, self.encoders))

    def step(self) -> None:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            ours, texts = self.encoders[0](self.images), self.encoders[1](self.tokens)
        alignment_loss(ours, texts, self.model.logit_scale)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def clip_flops(config: ClipConfig, pairs: int) -> float:
    """Of one pair, one training step of CLIP, counted as train.count_flops counts."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Clip(config)
        ours = model.encode_image(torch.empty(pairs, 3, config.image_size, config.image_size))
        texts = model.encode_tokens(torch.zeros(pairs, config.text.context_length, dtype=torch.int64))
        (ours + texts).sum().backward()
    return counter.get_total_flops() / pairs


def inference_seconds(steps: Steps, clip: ClipSteps, args: argparse.Namespace) -> dict:
    """Seconds per batch of what the trained model does: drawing with and without the query stream's weights
    beside it, reading images from pixels and from latents, and CLIP reading as many."""
    model = steps.model.eval().requires_grad_(False)
    latents = model.read_batch(steps.moments)
    context, null = model.text_encoder(steps.tokens)[0], model.text_encoder(model.null_tokens)[0]
    t, queries = steps.drawn["t_image"], steps.drawn["query_noise"]
    plain = copy.deepcopy(model.unet)
    models.drop_query_stream(plain)
    read = lambda z: model.unet.denoise_query(queries, t, z, null)
    cases = {"draw_step": lambda: model.unet.denoise_image(latents, t, context),
             "draw_step_plain": lambda: plain.denoise_image(latents, t, context),
             "read_pixels": lambda: read(model.read_batch(steps.pixels)),
             "read_latents": lambda: read(latents),
             "clip_image": lambda: clip.model.encode_image(clip.images)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for i in range(max(2, args.rounds)):            # in turns: what disturbs one disturbs all
            for name, case in cases.items():
                times[name].append(median_seconds(case, 1, 1 if i == 0 else 0, args.device))
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(cost: dict[str, float], ending: str) -> dict[str, float]:
    """What joint training costs, over its two parts, and over generation and a CLIP of its own."""
    return {name + tail + ending: cost["joint" + tail] / (cost["generation" + tail] + cost[other])
            for tail in ("", "_cached") if "joint" + tail in cost
            for name, other in (("joint_over_sum", "alignment" + tail),
                                ("joint_over_generation_plus_clip", "clip"))}


def speed(args: argparse.Namespace) -> dict:
    """The paper's Table 6: joint training beside its two parts, and what either task costs after."""
    steps = Steps(args)
    kinds = {name + "_cached" * cached: (tasks, cached) for cached in (False, True)
             if not cached or steps.model.config.autoencoder.kind == "kl" for name, tasks in TASKS.items()}
    flops = {name: steps.flops(*kind) for name, kind in kinds.items()}
    flops["clip"] = clip_flops(CLIPS[LIKE[args.preset]], args.batch_size)
    runs: dict[str, list[float]] = {name: [] for name in flops}
    for _ in tqdm(range(args.repeats), unit="repeat", disable=None):
        for name, kind in kinds.items():
            runs[name].append(steps.measure(*kind))
    clip = ClipSteps(args)            # only now: the two at once might not fit in memory
    for _ in range(args.repeats):
        runs["clip"].append(median_seconds(clip.step, args.rounds, args.warm_up, args.device))
    peak = matmul_flops(args.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    seconds = {name: statistics.median(values) for name, values in runs.items()}
    rows = {name: {"seconds": value, "images_per_s": args.batch_size / value,
                   "gflops_per_image": flops[name] / 1e9,
                   "share_of_matmul_peak": flops[name] * args.batch_size / value / peak}
            for name, value in seconds.items()}
    took = inference_seconds(steps, clip, args)
    return {"n": args.batch_size, "chance": None, "matmul_tflops": peak / 1e12, "steps": rows,
            "inference_seconds": took, **ratios(seconds, ""), **ratios(flops, "_limit"),
            "draw_over_plain": took["draw_step"] / took["draw_step_plain"],
            "read_over_clip": took["read_pixels"] / took["clip_image"],
            "read_latents_over_clip": took["read_latents"] / took["clip_image"],
            "memory_gib": train.memory_gib(args.device)}


def print_speed(result: dict, args: argparse.Namespace) -> None:
    print(f"{args.preset}, batch {args.batch_size}, {args.precision}, {'not ' * (not args.compile)}compiled, "
          f"seed {args.seed}; most memory of this process {result['memory_gib']:.1f} GiB")
    print(f"  {'training step':<19}{'ms':>9}{'images/s':>10}{'GFLOP/image':>13}{'of product':>12}")
    for name, row in result["steps"].items():
        print(f"  {name:<19}{1000 * row['seconds']:9.1f}{row['images_per_s']:10.2f}"
              f"{row['gflops_per_image']:13.1f}{100 * row['share_of_matmul_peak']:11.0f}%")
    print(f"  (product: a large matrix product does {result['matmul_tflops']:.2f} TFLOP/s)")
    for name, seconds in result["inference_seconds"].items():
        print(f"  {name:<19}{1000 * seconds:9.1f}{args.batch_size / seconds:10.2f}")
    for name, value in result.items():
        if "_over_" in name and not name.endswith("_limit"):
            limit = result.get(f"{name}_limit")
            print(f"  {name:<40}{value:7.3f}" + (f"   by FLOPs {limit:.3f}" if limit else ""))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add, switch = parser.add_argument, dict(action=argparse.BooleanOptionalAction)
    add("--preset", choices=tuple(PRESETS), default="tiny", help="whose networks, with random weights")
    add("--batch-size", type=positive, help="pairs per step, 2 or more; without it 32, small 16, sd-v1 2")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA")
    add("--compile", **switch, help="torch.compile; without it: on CUDA")
    add("--recompute", **switch, default=False, help="activation checkpointing")
    add("--rounds", type=positive, default=10, help="measured steps of each kind in a row")
    add("--warm-up", type=natural, default=2, help="steps before them")
    add("--repeats", type=positive, default=3, help="times that all kinds take their turn")
    add("--seed", type=natural, default=0, help="of the weights' and inputs' random numbers")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    cuda = args.device.type == "cuda"
    args.precision = args.precision if args.precision != "auto" else "bf16" if cuda else "fp32"
    args.compile = cuda if args.compile is None else args.compile
    args.batch_size = args.batch_size or {"tiny": 32, "small": 16, "sd-v1": 2}[args.preset]
    if args.batch_size < 2:
        raise ValueError("--batch-size is 1, but the alignment loss compares pairs: 2 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse_args(argv)
        result = {"task": "speed", "seed": args.seed, **speed(args)}
        print_speed(result, args)
        if args.json:
            device = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine()
            command = " ".join(["python tests/bench_speed.py", *(sys.argv[1:] if argv is None else argv)])
            text = json.dumps({**result, "preset": args.preset, "precision": args.precision,
                               "command": command, "date": date.today().isoformat(), "device": device,
                               "torch": torch.__version__, "threads": torch.get_num_threads()}, indent=1)
            Path(args.json).write_text(text + "\n")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
