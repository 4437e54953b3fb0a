"""What a training step of either task, and of both, costs (the paper's Table 6), with train.py's own step.

    python tests/bench_speed.py --preset tiny
    python tests/bench_speed.py --preset sd-v1 --batch-size 2 --rounds 3 --repeats 1 --json speed.json

Random weights, random pairs. Every kind of step takes its turn --repeats times; the median counts. "By FLOPs"
is what counting gives as the limit of the two ratios. Where there is an autoencoder every kind is measured
twice, from pixels and from cached latents.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (the path comes first)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from data import Tokenizer  # noqa: E402
from model import CLIPS, PRESETS, Clip, DiffDis, UNet  # noqa: E402
from sample import Parser, fail, natural, pick_device, positive  # noqa: E402

LIKE = {"tiny": "clip-tiny", "small": "clip-small", "sd-v1": "clip-vit-l14"}     # preset -> its CLIP
TASKS = {"generation": ("generation",), "alignment": ("alignment",), "joint": ("generation", "alignment")}


def median_seconds(step: Callable, rounds: int, warm_up: int, device: torch.device) -> float:
    """Median time of calling `step`, its work on the device included."""
    times = []
    for _ in range(warm_up + rounds):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


class Steps:
    """Training steps on random pairs, as train.py does them: of DiffDis, or of a CLIP of like size."""

    def __init__(self, args: argparse.Namespace, device: torch.device, is_clip: bool = False) -> None:
        self.args, self.device = args, device
        self.config = config = CLIPS[LIKE[args.preset]] if is_clip else PRESETS[args.preset]
        count, size, length = args.batch_size, config.image_size, config.text.context_length
        torch.manual_seed(args.seed)
        merges = [f"{i} {i}" for i in range(config.text.vocab_size - 514)]      # no words, but as many
        with torch.device(device):
            self.model = (Clip if is_clip else DiffDis)(config, Tokenizer(merges, length))
            self.pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
            self.tokens = torch.randint(config.text.vocab_size - 2, (count, length))
        self.noise, self.moments = {}, None
        if not is_clip:
            channels, *sides = shape = self.model.latent_shape(size, size)
            self.moments = torch.randn(count, 2 * channels, *sides, device=device).half()
            self.noise = {name: value.to(device) for name, value in
                          train.sample_noise(config, shape, args.seed, 0, range(count)).items()}

    def loss(self, tasks: tuple[str, ...]) -> torch.nn.Module:
        self.model.requires_grad_(True)
        if isinstance(self.model, Clip):
            return train.ClipLoss(self.model, self.args.precision == "bf16")
        train.freeze_unused(self.model, tasks, self.config.autoencoder.kind != "kl")    # not a pretrained T
        with torch.device(self.device):
            return train.JointLoss(self.model, tasks, bf16=self.args.precision == "bf16")

    def flops(self, tasks: tuple[str, ...], cached: bool) -> float:
        """Of one pair: forward and backward, two per multiply-add."""
        loss = self.loss(tasks)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:     # it knows no other
            predicted = loss(self.moments if cached else self.pixels, self.tokens, self.noise)[1:4]
            sum(value.sum() for value in predicted if value is not None and value.requires_grad).backward()
        return counter.get_total_flops() / self.args.batch_size

    def seconds(self, tasks: tuple[str, ...], cached: bool) -> float:
        """Of a whole step, from cached latents or from pixels."""
        loss, images, args = self.loss(tasks), self.moments if cached else self.pixels, self.args
        self.model.to(memory_format=torch.channels_last)
        if args.recompute and isinstance(self.model, DiffDis):
            self.model.unet.recompute_activations()
        if args.compile:
            loss.compile(dynamic=False)
        optimizer = train.make_optimizer(self.model, 1e-4, 0.99, 0.01)
        averages = train.Averages(self.model, 0.99)

        def step() -> None:
            train.backward(loss, [(images, self.tokens, self.noise)], 1.0)
            torch.nn.utils.clip_grad_norm_(averages.live.values(), train.MAX_NORM)
            optimizer.step()
            averages.update(0)
            optimizer.zero_grad(set_to_none=True)
        return median_seconds(step, args.rounds, args.warm_up, self.device)


def inference_seconds(steps: Steps, clip: Steps, args: argparse.Namespace) -> dict:
    """Seconds per batch of what the trained model does: drawing with the dual-stream blocks and with plain
    ones, reading images from pixels and from latents, and CLIP reading as many."""
    model, config, t = steps.model.requires_grad_(False), steps.config, steps.noise["t_image"]
    latents, query = model.read_batch(steps.moments), steps.noise["query_noise"]
    context, null = model.text_encoder(steps.tokens)[0], model.text_encoder(model.null_tokens)[0]
    plain = UNet(replace(config, fusion=replace(config.fusion, fusion=False))).to(args.device)
    cases = {"draw_step": lambda: model.unet.denoise_image(latents, t, context),
             "draw_step_plain": lambda: plain.denoise_image(latents, t, context),
             "read_pixels": lambda: model.unet.denoise_query(query, t, model.read_batch(steps.pixels), null),
             "read_latents": lambda: model.unet.denoise_query(query, t, latents, null),
             "clip_image": lambda: clip.model.encode_image(clip.model.read_batch(clip.pixels))}
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
    kinds = {name + "_cached" * cached: (tasks, cached) for cached in (False, True)
             if not cached or PRESETS[args.preset].autoencoder.kind == "kl" for name, tasks in TASKS.items()}
    clip_kind = (("alignment",), False)
    with FakeTensorMode():          # tensors without storage
        counting = Steps(args, torch.device("cpu"))
        flops = {name: counting.flops(*kind) for name, kind in kinds.items()}
        flops["clip"] = Steps(args, torch.device("cpu"), is_clip=True).flops(*clip_kind)
    steps, runs = Steps(args, args.device), {name: [] for name in flops}
    for _ in tqdm(range(args.repeats), unit="repeat", disable=None):
        for name, kind in kinds.items():
            runs[name].append(steps.seconds(*kind))
    clip = Steps(args, args.device, is_clip=True)       # only now: with the other it might not fit in memory
    runs["clip"] = [clip.seconds(*clip_kind) for _ in range(args.repeats)]
    seconds = {name: statistics.median(values) for name, values in runs.items()}
    took = inference_seconds(steps, clip, args)
    rows = {name: {"seconds": value, "images_per_s": args.batch_size / value,
                   "gflops_per_image": flops[name] / 1e9} for name, value in seconds.items()}
    return {"n": args.batch_size, "chance": None, "steps": rows, "inference_seconds": took,
            **ratios(seconds, ""), **ratios(flops, "_limit"),
            "draw_over_plain": took["draw_step"] / took["draw_step_plain"],
            "read_over_clip": took["read_pixels"] / took["clip_image"],
            "read_latents_over_clip": took["read_latents"] / took["clip_image"],
            "memory_gib": train.memory_gib(args.device)}


def print_speed(result: dict, args: argparse.Namespace) -> None:
    print(f"{args.preset}, batch {args.batch_size}, {args.precision}, {'not ' * (not args.compile)}compiled, "
          f"seed {args.seed}; most memory of this process {result['memory_gib']:.1f} GiB")
    print(f"  {'training step':<19}{'ms':>9}{'images/s':>10}{'GFLOP/image':>13}")
    for name, row in result["steps"].items():
        print(f"  {name:<19}{1000 * row['seconds']:9.1f}{row['images_per_s']:10.2f}"
              f"{row['gflops_per_image']:13.1f}")
    for name, seconds in result["inference_seconds"].items():
        print(f"  {name:<19}{1000 * seconds:9.1f}{args.batch_size / seconds:10.2f}")
    for name in (name for name in result if "_over_" in name and not name.endswith("_limit")):
        limit = result.get(f"{name}_limit")
        print(f"  {name:<40}{result[name]:7.3f}" + (f"   by FLOPs {limit:.3f}" if limit else ""))


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
            result |= {"preset": args.preset, "precision": args.precision, "command": command,
                       "date": date.today().isoformat(), "device": device, "torch": torch.__version__,
                       "threads": torch.get_num_threads()}
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
