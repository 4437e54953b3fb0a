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
from conftest import randomise      # which also puts the project on the import path

from model import PRESETS, UNet, is_new


def pair(preset: str):
    """Ours and diffusers' UNet with the same weights, the query stream left out of the count."""
    config = PRESETS[preset]
    ours, u = randomise(UNet(config)), config.unet      # at its start it puts out zeros: nothing to compare
    theirs = diffusers.UNet2DConditionModel(
        in_channels=config.autoencoder.latent_channels, out_channels=config.autoencoder.latent_channels,
        layers_per_block=u.res_blocks, block_out_channels=u.channels, cross_attention_dim=config.text.width,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in u.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(u.attention)],
        attention_head_dim=u.heads)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if not is_new(name)})
    return config, ours, theirs


def main() -> None:
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
    args = parser.parse_args()
    torch.manual_seed(0)
    config, ours, theirs = pair(args.preset)
    dtype = getattr(torch, args.dtype)
    ours, theirs = ours.to(args.device, dtype), theirs.to(args.device, dtype)
    if args.sampling:
        ours, theirs = ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)
    batch, make = args.batch * (2 if args.sampling else 1), dict(device=args.device, dtype=dtype)
    side = (args.size or config.image_size) // config.autoencoder.factor
    latents = torch.randn(batch, config.autoencoder.latent_channels, side, side, **make)
    t = torch.randint(config.timesteps, (batch,), device=args.device)
    context = torch.randn(batch, config.text.context_length, config.text.width, **make)
    forward = {"ours": ours.denoise_image, "diffusers": theirs}
    if args.compile:
        forward = {name: torch.compile(function, dynamic=False) for name, function in forward.items()}
    runs = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for name, network in (("ours", ours), ("diffusers", theirs)):
            def step(network=network, layout=layout, run=forward[name], ours=network is ours) -> None:
                network.to(args.device, memory_format=layout)
                x = latents.contiguous(memory_format=layout)
                pred = run(x, t, context) if ours else run(x, t, context).sample
                if not args.sampling:
                    pred.square().mean().backward()
                    network.zero_grad(set_to_none=True)
            runs[f"{name}, {'channels last' if layout is torch.channels_last else 'contiguous'}"] = (step, [])
    with torch.no_grad():
        difference = (ours.denoise_image(latents, t, context)
                      - theirs(latents, t, context).sample).abs().max().item()
    for round_ in range(args.rounds + args.warm_up):
        for step, times in runs.values():
            step()                                     # changes the layout and warms the caches, untimed
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_ >= args.warm_up:
                times.append(time.perf_counter() - start)
    result = {name: statistics.median(times) for name, (_, times) in runs.items()}
    best = {who: min(s for name, s in result.items() if name.startswith(who))
            for who in ("ours", "diffusers")}
    for name, seconds in result.items():
        print(f"{name:26s} {1000 * seconds:8.1f} ms")
    print(f"ratio ours / diffusers, each at its best: {best['ours'] / best['diffusers']:.3f}"
          f"   (largest difference of the outputs: {difference:.1e})")
    if args.json:
        Path(args.json).write_text(json.dumps({
            "seconds": result, "ratio": best["ours"] / best["diffusers"], "difference": difference,
            **vars(args), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "machine": platform.machine(), "diffusers": diffusers.__version__,
            "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
