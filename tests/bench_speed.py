"""What a training step of either task, and of both, costs (the paper's Table 6), with train.py's own step.

    python tests/bench_speed.py --preset tiny
    python tests/bench_speed.py --preset sd-v1 --batch-size 2 --rounds 3 --repeats 1 --json speed.json

Random weights and pairs; every kind takes its turn --repeats times, the median counts. "By FLOPs" is what the
ratios could be by counting. Where there is an autoencoder: from pixels, and from cached latents."""
import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (the path comes first)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
from data import Tokenizer  # noqa: E402
from model import CLIPS, PRESETS, Clip, DiffDis, UNet, wrap_blocks  # noqa: E402
from sample import Parser, errors_in_one_line, natural, pick_device, positive  # noqa: E402

PEAK = 989e12            # FLOP/s of an H100 or H200, dense bf16, by its data sheet
# Preset -> the CLIP of like size, and pairs per step.
LIKE = {"tiny": ("clip-tiny", 64), "small": ("clip-small", 16), "sd-v1": ("clip-vit-l14", 2)}
# Kind of step -> its tasks, and whether it starts from cached latents.
KINDS = {"generation": (("generation",), False), "alignment": (("alignment",), False),
         "joint": (train.TASKS, False), "generation_cached": (("generation",), True),
         "alignment_cached": (("alignment",), True), "joint_cached": (train.TASKS, True),
         "clip": (("alignment",), False)}


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held: of the device's, or of the machine's."""
    return (torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


def in_turns(calls: dict[str, Callable], rounds: int, warm_up: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, its work on the device included; what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


class Steps:
    """Training steps on random pairs, as train.py does them: of DiffDis, or of a CLIP of like size."""

    def __init__(self, args: argparse.Namespace, device: torch.device, is_clip: bool) -> None:
        self.args, self.device = args, device
        self.preset = LIKE[args.preset][0] if is_clip else args.preset
        self.config = config = (PRESETS | CLIPS)[self.preset]
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

    def make_step(self, kind: str) -> Callable:
        (tasks, cached), bf16 = KINDS[kind], self.args.precision == "bf16"
        images = self.moments if cached else self.pixels
        self.model.requires_grad_(True)
        if isinstance(self.model, Clip):
            loss = train.ClipLoss(self.model, bf16)
        else:
            train.freeze_unused(self.model, tasks, self.config.autoencoder.kind != "kl")  # not a pretrained T
            with torch.device(self.device):
                loss = train.JointLoss(self.model, tasks, bf16=bf16)
        muon = train.RECIPES[self.preset]["muon"]
        optimizer = train.make_optimizer(self.model, 1e-4, 0.99, 0.01, muon=muon)
        optimizer.bf16 = bf16
        averages = train.Averages(self.model, 0.99)

        def step() -> None:
            train.backward(loss, [(images, self.tokens, self.noise)], 1.0)
            torch.nn.utils.clip_grad_norm_(averages.live.values(), train.MAX_NORM)
            optimizer.step()
            averages.update(0)
            optimizer.zero_grad(set_to_none=True)
        return step

    def flops(self, kind: str) -> float:
        """Of one pair, two per multiply-add: forward, backward, and its share of Muon's products."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:     # it knows no other
            self.make_step(kind)()
        return counter.get_total_flops() / self.args.batch_size


def where_time_goes(step: Callable, device: torch.device) -> dict:
    """ms of a step by kernel: of all, and of the ten that take the most."""
    is_cuda, times = device.type == "cuda", Counter()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as trace:
        in_turns({"step": step}, 1, 0, device)
    for row in trace.key_averages():
        times[row.key[:110]] += (row.self_device_time_total if is_cuda else row.self_cpu_time_total) / 1000
    return {"ms": times.total(), "kernels": dict(times.most_common(10))}


@torch.compiler.set_stance("force_eager")
def inference_seconds(steps: Steps, clip: Steps) -> dict[str, float]:
    """Of what the trained model does with a batch: drawing with the dual-stream blocks and with plain ones,
    reading images from pixels and from latents, and CLIP reading as many."""
    model, config, t = steps.model.requires_grad_(False), steps.config, steps.noise["t_image"]
    latents, query = model.read_batch(steps.moments), steps.noise["query_noise"]
    context, null = model.text_encoder(steps.tokens)[0], model.text_encoder(model.null_tokens)[0]
    plain = UNet(replace(config, fusion=replace(config.fusion, fusion=False))).to(steps.device)
    calls = {"draw_step": lambda: model.unet.denoise_image(latents, t, context),
             "draw_step_plain": lambda: plain.denoise_image(latents, t, context),
             "read_pixels": lambda: model.unet.denoise_query(query, t, model.read_batch(steps.pixels), null),
             "read_latents": lambda: model.unet.denoise_query(query, t, latents, null),
             "clip_image": lambda: clip.model.encode_image(clip.model.read_batch(clip.pixels))}
    is_bf16 = steps.args.precision == "bf16"
    with torch.no_grad(), torch.autocast(steps.device.type, torch.bfloat16, enabled=is_bf16):
        return in_turns(calls, max(2, steps.args.rounds), 1, steps.device)


def ratios(cost: dict[str, float], ending: str) -> dict[str, float]:
    """What joint training costs, over its two parts, and over generation and a CLIP of its own."""
    return {name + tail + ending: cost["joint" + tail] / (cost["generation" + tail] + cost[other])
            for tail in ("", "_cached") for name, other in (("joint_over_sum", "alignment" + tail),
                                                            ("joint_over_generation_plus_clip", "clip"))
            if {"joint" + tail, "generation" + tail, other} <= cost.keys()}


def speed(args: argparse.Namespace) -> dict:
    """The paper's Table 6: joint training beside its two parts, and what either task costs after."""
    cuda, has_cached = args.device.type == "cuda", PRESETS[args.preset].autoencoder.kind == "kl"
    kinds = args.only or [kind for kind in KINDS if has_cached or not KINDS[kind][1]]
    with FakeTensorMode():          # tensors without storage
        counting = {is_clip: Steps(args, torch.device("cpu"), is_clip) for is_clip in (False, True)}
        flops = {kind: counting[kind == "clip"].flops(kind) for kind in kinds}
    networks, seconds, memory, result = {}, {kind: [] for kind in kinds}, {}, {}
    for kind in kinds * args.repeats:
        is_clip = kind == "clip"          # made when it is needed: with the other it might not fit in memory
        if is_clip not in networks:
            networks[is_clip] = Steps(args, args.device, is_clip)
            networks[is_clip].model.to(memory_format=torch.channels_last)
            if args.compile:                                 # as train.py has it
                wrap_blocks(networks[is_clip].model)
        torch.cuda.reset_peak_memory_stats() if cuda else None
        step = networks[is_clip].make_step(kind)
        seconds[kind] += in_turns({kind: step}, args.rounds, args.warm_up, args.device).values()
        memory[kind] = memory_gib(args.device)
        if args.profile and kind == "joint":
            result["profile"] = where_time_goes(step, args.device)
        del step         # and with it the optimiser's moments
    cost = {kind: statistics.median(values) for kind, values in seconds.items()}
    result["steps"] = {kind: {"seconds": cost[kind], "images_per_s": args.batch_size / cost[kind],
                              "gflops_per_image": flops[kind] / 1e9, "memory_gib": memory[kind],
                              "share_of_peak": flops[kind] * args.batch_size / cost[kind] / PEAK}
                       for kind in kinds}
    result |= {**ratios(cost, ""), **ratios(flops, "_limit")}
    if not args.only:
        took = inference_seconds(networks[False], networks[True])
        result |= {"inference_seconds": took, "draw_over_plain": took["draw_step"] / took["draw_step_plain"],
                   "read_over_clip": took["read_pixels"] / took["clip_image"],
                   "read_latents_over_clip": took["read_latents"] / took["clip_image"]}
    return {"n": args.batch_size, "chance": None, **result, "memory_gib": max(memory.values())}


def print_speed(result: dict) -> None:
    print(f"  {'training step':<19}{'ms':>9}{'images/s':>10}{'GFLOP/image':>13}{'of peak':>9}{'GiB':>7}")
    for name, row in result["steps"].items():
        print(f"  {name:<19}{1000 * row['seconds']:9.1f}{row['images_per_s']:10.2f}"
              f"{row['gflops_per_image']:13.1f}{row['share_of_peak']:9.3f}{row['memory_gib']:7.1f}")
    for name, seconds in result.get("inference_seconds", {}).items():
        print(f"  {name:<19}{1000 * seconds:9.1f}{result['n'] / seconds:10.2f}")
    for name in (name for name in result if "_over_" in name and not name.endswith("_limit")):
        limit = result.get(f"{name}_limit")
        print(f"  {name:<40}{result[name]:7.3f}" + (f"   by FLOPs {limit:.3f}" if limit else ""))
    for name, ms in result.get("profile", {}).get("kernels", {}).items():
        print(f"  {name[:60]:<60}{ms:9.1f} ms of the joint step")


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=tuple(LIKE), default="tiny", help="whose networks, with random weights")
    add("--batch-size", type=positive, help="pairs per step, 2 or more; without it 64, small 16, sd-v1 2")
    add("--precision", choices=("fp32", "bf16"), help="without it bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; without it: on CUDA")
    add("--only", nargs="+", choices=tuple(KINDS), help="time these kinds of steps and nothing else")
    add("--profile", action="store_true", help="also where the time of a joint step goes, by kernel")
    add("--rounds", type=positive, default=10, help="measured steps of each kind in a row")
    add("--warm-up", type=natural, default=2, help="steps before them")
    add("--repeats", type=positive, default=3, help="times that all kinds take their turn")
    add("--seed", type=natural, default=0, help="of the weights' and inputs' random numbers")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    cuda, args.batch_size = args.device.type == "cuda", args.batch_size or LIKE[args.preset][1]
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile
    if args.batch_size < 2:
        raise ValueError("--batch-size is 1, but the alignment loss compares pairs: 2 or more")
    result = {"task": "speed", "preset": args.preset, "precision": args.precision,
              "compile": args.compile, "seed": args.seed, "date": date.today().isoformat(),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "device": torch.cuda.get_device_name() if cuda else platform.machine(),
              "command": " ".join(["python tests/bench_speed.py", *(argv or sys.argv[1:])])}
    print(*(f"{name}: {value}" for name, value in result.items()), sep=", ")
    result |= speed(args)
    print_speed(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
