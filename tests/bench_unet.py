"""Time of a UNet training step (forward, backward, no optimiser) against diffusers' UNet of the same size.

    python tests/bench_unet.py                       the `tiny` preset at its batch of 32
    python tests/bench_unet.py --preset sd-v1 --batch 1 --device cuda
    python tests/bench_unet.py --preset sd-v1 --sampling --size 512 --batch 1 --rounds 2   guided sampler step

Both networks hold the same weights and get the same tensors; the two take turns within one process,
each measured in both memory formats, and the better median of each counts.
A ratio below 1 means that ours is faster.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch
from conftest import diffusers_unet, randomise      # which also puts the project on the import path

from model import PRESETS, UNet, is_new

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each network")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them")
    parser.add_argument("--size", type=int, help="px; without it the preset's")
    parser.add_argument("--sampling", action="store_true",
                        help="no backward; each image twice, as guidance needs it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    config, make = PRESETS[args.preset], dict(device=args.device, dtype=getattr(torch, args.dtype))
    ours, theirs = randomise(UNet(config)), diffusers_unet(config)    # at its start it puts out zeros
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if not is_new(name)})
    networks = {"ours": ours.to(**make), "diffusers": theirs.to(**make)}
    batch, side = args.batch, (args.size or config.image_size) // config.autoencoder.factor
    if args.sampling:
        batch *= 2
        for network in networks.values():
            network.eval().requires_grad_(False)
    latents = torch.randn(batch, config.autoencoder.latent_channels, side, side, **make)
    t = torch.randint(config.timesteps, (batch,), device=args.device)
    context = torch.randn(batch, config.text.context_length, config.text.width, **make)
    with torch.no_grad():
        difference = (ours(latents, t, context) - theirs(latents, t, context).sample).abs().max().item()
    runs = networks if not args.compile else {
        name: torch.compile(network, dynamic=False) for name, network in networks.items()}

    def step(name: str, layout: str) -> float:
        networks[name].to(memory_format=LAYOUTS[layout])
        x = latents.contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2):      # the first changes the layout and warms the caches, untimed
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            pred = runs[name](x, t, context)
            if not args.sampling:
                (pred if name == "ours" else pred.sample).square().mean().backward()
                networks[name].zero_grad(set_to_none=True)
            if args.device == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - start
    times = {(name, layout): [] for layout in LAYOUTS for name in networks}
    for _ in range(args.rounds + args.warm_up):
        for key, seconds in times.items():
            seconds.append(step(*key))
    result = {", ".join(key): statistics.median(seconds[args.warm_up:]) for key, seconds in times.items()}
    ratio = min(result[f"ours, {layout}"] for layout in LAYOUTS) / min(
        result[f"diffusers, {layout}"] for layout in LAYOUTS)
    for name, seconds in result.items():
        print(f"{name:26s} {1000 * seconds:8.1f} ms")
    print(f"ratio ours / diffusers, each at its best: {ratio:.3f}"
          f"   (largest difference of the outputs: {difference:.1e})")
    if args.json:
        Path(args.json).write_text(json.dumps({
            "seconds": result, "ratio": ratio, "difference": difference, **vars(args),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
            "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
