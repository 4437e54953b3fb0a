"""Stable Diffusion v1 at full size, with random weights, against diffusers and transformers: prints a table.

    python tests/check_sd_v1.py --folder sd --vocabulary VOCABULARY.txt.gz --json sd_v1.json

Too large for the test suite (12 GB of memory, 13 GB of disk, minutes on 2 cores); the same comparisons run at
small size in tests/test_weights.py. Writes three layouts into --folder, loads each, and compares every part
and a guided trajectory.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from conftest import draw_by_diffusers, original_names, randomise, write_folder
from transformers import CLIPTextModel

import model as models
from data import Tokenizer
from diffusion import generator_of
from sample import draw_images

PROMPT = "a dog on a beach"
SCALE = models.AutoencoderConfig().scale


def write_layouts(folder: Path, vocabulary: str) -> None:
    """Random weights, without the query stream: a CompVis .ckpt and .safetensors, a diffusers folder."""
    torch.manual_seed(0)
    model = models.DiffDis(models.PRESETS["sd-v1"], Tokenizer.from_file(vocabulary)).requires_grad_(False)
    randomise(model.unet)       # its own start puts out zeros
    write_folder(model, folder / "diffusers")
    tensors = original_names(model)
    torch.save({"state_dict": tensors}, folder / "sd.ckpt")
    safetensors.torch.save_file(tensors, folder / "sd.safetensors")
    (folder / "tokenizer").symlink_to((folder / "diffusers/tokenizer").resolve())


@torch.no_grad()
def compare(folder: Path, layout: str, steps: int) -> dict[str, float]:
    """The largest difference from the libraries for each part, and over a guided trajectory."""
    ours, generator, worst = models.load(folder / layout), torch.Generator().manual_seed(1), {}

    def differ(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        worst[name] = (a - b).abs().max().item()
        print(f"{layout:16}{name:16}{worst[name]:.1e}   (values up to {b.abs().max():.1f})", flush=True)
    text = CLIPTextModel.from_pretrained(folder / "diffusers/text_encoder").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "diffusers/vae").eval()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "diffusers/unet").eval()
    tokens = ours.tokenizer([PROMPT, ""])
    context = text(tokens).last_hidden_state
    differ("text encoder", ours.text_encoder(tokens)[0], context)
    images = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mean = vae.encode(images).latent_dist.mean
    differ("VAE encode", ours.encode_image(images) / SCALE, mean)
    differ("VAE decode", ours.decode_image(mean * SCALE), vae.decode(mean).sample)
    latents, t = torch.randn(2, 4, 32, 32, generator=generator), torch.tensor([981, 1])
    differ("UNet", ours.denoise_image(latents, t, context), unet(latents, t, context).sample)
    if steps:
        z = torch.randn(1, 4, 32, 32, generator=generator_of(0))
        differ(f"{steps} steps", draw_images(ours, [PROMPT], [0], steps, 7.5, (256, 256)),
               draw_by_diffusers(unet, vae, z, context, steps))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write 13 GB of files")
    parser.add_argument("--vocabulary", required=True, help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--steps", type=int, default=20, help="of the trajectory")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "tokenizer").exists():
        write_layouts(args.folder, args.vocabulary)
    result = {"command": "python " + " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"),
              "torch": torch.__version__, "machine": platform.machine()}
    for layout in ("sd.safetensors", "sd.ckpt", "diffusers"):
        result[layout] = compare(args.folder, layout, args.steps if layout == "sd.safetensors" else 0)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
