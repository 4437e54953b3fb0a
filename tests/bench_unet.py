"""Time against diffusers' networks of the same size: a UNet's forward and backward pass, or guided drawing.

    python tests/bench_unet.py                       the `tiny` preset at its batch of 32
    python tests/bench_unet.py --preset sd-v1 --batch 1 --device cuda
    python tests/bench_unet.py --preset sd-v1 --draw 20 --size 512 --batch 1 --rounds 2     in so many steps

Both UNets hold the same weights; the two take turns within one process, each measured in both memory formats,
and the better median of each counts. A ratio below 1 means that ours is faster."""
import argparse
import json
import platform
import time
from pathlib import Path

import diffusers
import torch
from bench_speed import Steps, in_turns, memory_gib
from conftest import diffusers_unet, diffusers_vae, draw_by_diffusers, give_weights

from model import PRESETS
from sample import draw_images

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="tiny")
    add("--batch", type=int, default=32)
    add("--rounds", type=int, default=30, help="measured calls of each network")
    add("--warm-up", type=int, default=3, help="calls before them")
    add("--size", type=int, help="px; without it the preset's")
    add("--draw", type=int, metavar="STEPS", help="draw pictures instead of training")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cpu")
    add("--json", help="also write the figures here")
    args = parser.parse_args()
    config, device, dtype = PRESETS[args.preset], torch.device(args.device), getattr(torch, args.dtype)
    model = Steps(argparse.Namespace(preset=args.preset, batch_size=2, seed=0), device, is_clip=False).model
    for parameter in model.unet.parameters():
        if not parameter.any():                                 # at its start it puts out zeros
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.device(device):
        theirs = diffusers_unet(config)
        vae = diffusers_vae(config) if config.autoencoder.kind == "kl" else None
    give_weights(model.unet, theirs)
    networks = [network for network in (model, theirs, vae) if network is not None]
    for network in networks:
        network.to(dtype).requires_grad_(not args.draw)
    side = args.size or config.image_size
    make = dict(device=device, dtype=dtype)
    latents = torch.randn(args.batch, *model.latent_shape(side, side), **make)
    context = torch.randn(2 * args.batch, config.text.context_length, config.text.width, **make)
    inputs = torch.randint(config.timesteps, (args.batch,), device=device), context[:args.batch]

    def train_step(network: torch.nn.Module) -> None:
        is_ours = network is model.unet
        output = network.denoise_image(latents, *inputs) if is_ours else network(latents, *inputs).sample
        output.square().mean().backward()
        network.zero_grad(set_to_none=True)
    calls = {"ours": lambda: train_step(model.unet), "diffusers": lambda: train_step(theirs)}
    if args.draw:
        prompts, seeds = ["a dog"] * args.batch, list(range(args.batch))
        calls = {"ours": lambda: draw_images(model, prompts, seeds, args.draw, 7.5, (side, side)),
                 "diffusers": lambda: draw_by_diffusers(theirs, vae, latents, context, args.draw)}
    with torch.no_grad():
        ours = model.unet.denoise_image(latents, *inputs)
        difference = (ours - theirs(latents, *inputs).sample).abs().max().item()
    seconds = {}
    for layout, memory_format in LAYOUTS.items():
        for network in networks:
            network.to(memory_format=memory_format)
        latents = latents.contiguous(memory_format=memory_format)
        for name, value in in_turns(calls, args.rounds, args.warm_up, device).items():
            seconds[f"{name}, {layout}"] = value
            print(f"{name + ', ' + layout:26s} {1000 * value:8.1f} ms")
    own, other = (min(seconds[f"{name}, {layout}"] for layout in LAYOUTS) for name in calls)
    result = {"ratio": own / other, "difference": difference, "memory_gib": memory_gib(device)}
    print("ours / diffusers, each at its best; largest difference of the UNets' outputs; most memory held:\n",
          result)
    if args.json:
        Path(args.json).write_text(json.dumps({
            "seconds": seconds, **result, **vars(args), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "diffusers": diffusers.__version__, "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
