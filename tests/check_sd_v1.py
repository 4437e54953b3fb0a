"""Stable Diffusion v1 at full size, with random weights, against diffusers and transformers: prints a table.

    python tests/check_sd_v1.py --folder sd --vocabulary VOCABULARY.txt.gz --json sd_v1.json

Too large for the test suite (12 GB of memory, 13 GB of disk, minutes on 2 cores); the same comparisons run at
small size in tests/test_weights.py. Writes three layouts into --folder, loads each, and compares every part
and a guided trajectory; loading is measured in processes of their own.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from conftest import randomise, write_folder
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
    names = models.to_compvis(model.state_dict(), model.config)
    tensors = {names[ours]: value for ours, value in model.state_dict().items() if not models.is_new(ours)}
    tensors |= {name: value[:, :, None, None] for name, value in tensors.items()
                if "attn_1." in name and value.dim() == 2}
    torch.save({"state_dict": tensors}, folder / "sd.ckpt")
    safetensors.torch.save_file(tensors, folder / "sd.safetensors")
    (folder / "tokenizer").symlink_to((folder / "diffusers/tokenizer").resolve())


@torch.no_grad()
def compare(folder: Path, layout: str, steps: int) -> dict[str, float]:
    """The largest difference from the libraries for each part, and over a guided trajectory."""
    ours, generator = models.load(folder / layout), torch.Generator().manual_seed(1)
    found = {}

    def differ(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        found[name] = (a - b).abs().max().item()
        print(f"{layout:16}{name:16}{found[name]:.1e}   (values up to {b.abs().max():.1f})", flush=True)
    text = CLIPTextModel.from_pretrained(folder / "diffusers/text_encoder").eval()
    tokens = ours.tokenizer([PROMPT, ""])
    context = text(tokens).last_hidden_state
    differ("text encoder", ours.text_encoder(tokens)[0], context)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "diffusers/vae").eval()
    images = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mean = vae.encode(images).latent_dist.mean
    differ("VAE encode", ours.encode_image(images) / SCALE, mean)
    differ("VAE decode", ours.decode_image(mean * SCALE), vae.decode(mean).sample)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "diffusers/unet").eval()
    latents, t = torch.randn(2, 4, 32, 32, generator=generator), torch.tensor([981, 1])
    differ("UNet", ours.denoise_image(latents, t, context), unet(latents, t, context).sample)
    if steps:
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(steps)
        z = torch.randn(4, 32, 32, generator=generator_of(0))[None]
        for t in scheduler.timesteps:
            conditional, unconditional = unet(z.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
            z = scheduler.step(unconditional + 7.5 * (conditional - unconditional), t, z).prev_sample
        theirs = vae.decode(z / SCALE).sample.clamp(-1, 1)
        differ(f"{steps} steps", draw_images(ours, [PROMPT], [0], steps, 7.5, (256, 256)), theirs)
    return found


def peak(code: str) -> dict[str, float]:
    """Seconds and peak memory (GiB) of a piece of Python that loads `parts`, in a process of its own."""
    wrapped = f"""
import re, sys, time
from pathlib import Path
sys.path[:0] = {sys.path[:3]!r}
import torch, diffusers, transformers, model as models
memory = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 20
base, start = memory(), time.perf_counter()
{code}
total = sum(float(p.sum()) for part in parts for p in part.parameters())      # so that all of it is read
count = sum(p.numel() for part in parts for p in part.parameters())
print(time.perf_counter() - start, memory() - base, count * 4 / 2 ** 30)"""
    said = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True).stdout
    return dict(zip(("seconds", "peak_gib", "weights_gib"), map(float, said.split()[-3:])))


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
    file, config = str(args.folder / "sd.safetensors"), str(args.folder / "diffusers")
    single = ", ".join(f"diffusers.{name}.from_single_file({file!r}, config={config!r}, subfolder={part!r})"
                       for name, part in (("UNet2DConditionModel", "unet"), ("AutoencoderKL", "vae")))
    loaders = {"ours, all parts": f"parts = [models.load({file!r})]",
               "diffusers, UNet and VAE": f"parts = [{single}]"}
    for _ in range(2):               # the second turn counts: both with a warm page cache
        loading = {name: peak(code) for name, code in loaders.items()}
    for name, row in loading.items():
        print(f"{name:28}", *(f"{value:.2f} {what}" for what, value in row.items()), flush=True)
    result = {"command": "python " + " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"),
              "torch": torch.__version__, "machine": platform.machine(), "loading": loading}
    for layout in ("sd.safetensors", "sd.ckpt", "diffusers"):
        result[layout] = compare(args.folder, layout, args.steps if layout == "sd.safetensors" else 0)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
