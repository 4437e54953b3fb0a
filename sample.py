"""Draws pictures for prompts, and reads pictures: which of some texts is it that they show?

    python sample.py "a red circle above a blue square" --best-of 4
    python sample.py --image photo.jpg "a cat" "a dog" "a dog on a beach"

The paper's Algorithm 2 (`draw_images`) and Algorithm 3 (`draw_queries`), each a few lines around `ddim` of
diffusion.py; what the scripts share; and a command line. Read next: evaluate.py, which measures."""
import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")      # before torch; see train.py
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import model as models
from data import CAPTION, clean, decode_image, to_float, to_square, write_atomically
from diffusion import ddim, guide, make_alphas_cumprod, make_denoiser, noise_of, sampling_timesteps
from model import DiffDis, Network

SAMPLERS = {"ddim": (1, "DDIM"), "dpm++": (2, "DPM++ 2M")}      # order; name in Stable Diffusion's programs


def all_finite(values: Tensor) -> Tensor:
    """A network's outputs. Raises ValueError where one is no number: it would win or lose all comparisons."""
    if not torch.isfinite(values).all():
        raise ValueError("the network's outputs are not finite: its weights are not usable")
    return values


# ---------------------------------------------------------------- Algorithm 2: text -> image
@torch.no_grad()
def draw_images(model: DiffDis, prompts: list[str], seeds: list[int], steps: int = 50,
                guidance_scale: float | None = None, size: tuple[int, int] | None = None,
                negative: str = "", sampler: str = "ddim", progress=iter) -> Tensor:
    """Draw one image per prompt and seed (Algorithm 2): a sampler with classifier-free guidance.

    prompts, seeds: B of each, an image depends on its own two alone; steps: sampler steps, 1 to T;
    guidance_scale: 1 + w, 1 is no guidance, None the configuration's; size: (height, width) in px, None the
    training size; negative: the prompt to guide away from; sampler: one of SAMPLERS; progress: what goes
    around the timesteps, as tqdm -> images [B, 3, H, W] in [-1, 1], float32, on the model's device. Raises
    ValueError where they are not finite, or on an impossible size or number of steps."""
    config, device = model.config, model.device
    shape = model.latent_shape(*(size or (config.image_size, config.image_size)))
    z_T = noise_of(shape, [(seed,) for seed in seeds]).to(device)
    both = model.encode_text([negative] * len(prompts) + prompts)[0]      # [2B, L, D], unconditional first
    alphas_cumprod = make_alphas_cumprod(config.image_schedule, config.timesteps).to(device)
    scale = config.guidance_scale if guidance_scale is None else guidance_scale

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return model.denoise_image(z_t, t, both[len(prompts):])
        unconditional, conditional = model.denoise_image(z_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return guide(conditional, unconditional, scale)

    denoise = make_denoiser(predict, config.image_target, alphas_cumprod)
    # A noise-predicting model is sampled as Stable Diffusion is, from t = 981 to 1 (in 50 steps): at T-1 its
    # x̂0 would be its error divided by √ᾱ, a fifteenfold. v and data targets have no such trouble.
    predicts_noise = config.image_target == "noise"
    timesteps = sampling_timesteps(steps, config.timesteps, "leading" if predicts_noise else "trailing")
    last = float(alphas_cumprod[0]) if predicts_noise and sampler == "ddim" else 1.0
    latents = ddim(denoise, z_T, timesteps, alphas_cumprod, 1.0, last, progress, SAMPLERS[sampler][0])
    return all_finite(model.decode_image(latents).float()).clamp(-1, 1)


# ---------------------------------------------------------------- Algorithm 3: image -> text query
def denoise_queries(model: DiffDis, latents: Tensor, noise: Tensor, steps: int = 1,
                    guidance_scale: float = 1.0) -> Tensor:
    """The loop of Algorithm 3, with gradient: noise [B, D] -> text queries [B, D], of unit norm but for
    rounding. latents, steps, guidance_scale: as in `draw_queries`."""
    config, null = model.config, model.text_encoder(model.null_tokens)[0]      # the empty prompt's context
    alphas_cumprod = make_alphas_cumprod(config.text_schedule, config.timesteps).to(model.device)

    def predict(e_t: Tensor, t: Tensor) -> Tensor:
        conditional = model.unet.denoise_query(e_t, t, latents, null)
        if guidance_scale == 1:
            return conditional
        unconditional = model.unet.denoise_query(e_t, t, torch.zeros_like(latents), null)
        return guide(conditional, unconditional, guidance_scale)

    denoise = make_denoiser(predict, config.text_target, alphas_cumprod, config.gamma, unit_norm=True)
    timesteps = sampling_timesteps(steps, config.timesteps, "trailing")
    return ddim(denoise, noise.to(model.device), timesteps, alphas_cumprod, config.gamma)


@torch.no_grad()
def draw_queries(model: DiffDis, latents: Tensor, indices: list[int], steps: int = 1, draws: int = 1,
                 guidance_scale: float = 1.0, seed: int = 0) -> Tensor:
    """Denoise a text query from pure noise with each image as condition (Algorithm 3).

    latents: clean z [B, C, h, w]; indices: B numbers that name the images: noise is a function of
    (seed, index); steps: 1 is one pass from t = T-1; draws: noise draws whose results are averaged;
    guidance_scale: 1 + w, with the zeroed latent as the unconditional image
    -> text queries [B, D], unit norm, float32. Raises ValueError where they are not finite.
    No text goes in: whatever comes out was read from the image."""
    total = 0
    for draw in range(draws):
        noise = noise_of((model.config.text.width,), [(seed, index, draw) for index in indices])
        total = total + F.normalize(denoise_queries(model, latents, noise, steps, guidance_scale), dim=-1)
    return F.normalize(all_finite(total), dim=-1)


@torch.no_grad()
def score(model: Network, images: Tensor, texts: list[str], text_steps: int = 1, draws: int = 1,
          guidance_scale: float = 1.0, seed: int = 0, indices: list[int] | None = None) -> Tensor:
    """images [B, 3, H, W] in [-1, 1], K texts -> cosine similarities of what is read from the images
    (Algorithm 3; a CLIP embeds them) and the texts [B, K], float32; times model.logit_scale.exp(), logits.
    Options: as `draw_queries`; indices: without them 0 to B-1. Raises ValueError where not finite."""
    queries = model.encode_image(images.to(model.device))
    if isinstance(model, DiffDis):
        indices = indices or list(range(len(images)))
        queries = draw_queries(model, queries, indices, text_steps, draws, guidance_scale, seed)
    return all_finite(queries @ model.encode_text(texts)[1].T)


# ---------------------------------------------------------------- pictures
def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> 8-bit picture."""
    return Image.fromarray(((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def load_image(file: str | Path, size: int) -> Tensor:
    """Any picture -> its upright centre square [1, 3, size, size] in [-1, 1]. Raises ValueError."""
    with models.reading(file):
        return to_float(torch.tensor(to_square(decode_image(Path(file).read_bytes()), size))[None])


def make_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """images [N, 3, H, W] in [-1, 1] -> one picture, row by row, enlarged `scale` times without smoothing."""
    height, width = images.shape[2] * scale, images.shape[3] * scale
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return grid


# ---------------------------------------------------------------- what the scripts share
CKPT_HELP = ("checkpoint, Stable Diffusion v1 as .ckpt, .safetensors or diffusers folder, or sd-v1-5 to "
             "download; without it the newest runs/*/checkpoint.pt")


def fail(error: Exception | str, status: int = 2) -> None:
    """End the program in one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around a whole program: a user's mistake ends it with status 2, Ctrl-C with 130."""
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")      # a terminal may lack letters
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, ValueError | OSError | torch.OutOfMemoryError) or re.search(
                "DataLoader|DefaultCPUAllocator", str(error)):       # a worker killed; memory of the CPU
            fail(error)
        raise
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C or SIGTERM", 130)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and answers a mistake in one line instead of a page of usage."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"   # no line of code with it

    def format_help(self) -> str:
        """No "(default: None)": what a flag does when it is not given stands in its help."""
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())

    def error(self, message: str) -> None:
        fail(f"{message}; --help explains every flag")


def within(kind: type, least: float, most: float) -> Callable[[str], float]:
    """The type of a flag: a number of this kind within these bounds, which NaN and infinity never are."""
    def number(text: str) -> float:
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return kind(text)
    return number


positive, natural = within(int, 1, 2 ** 63 - 1), within(int, 0, 2 ** 63 - 1)
finite, weight, share = within(float, -1e38, 1e38), within(float, 0, 1e38), within(float, 0, 1)
SWITCH = {"action": argparse.BooleanOptionalAction}


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda -> the device, set to be fast. Raises ValueError if CUDA is asked for and absent."""
    is_cuda = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not is_cuda:
        raise ValueError("--device cuda, but this machine has no CUDA device: use --device cpu")
    torch.set_float32_matmul_precision("high" if is_cuda else "highest")    # TF32 for what stays in float32
    torch.backends.cudnn.benchmark = True            # shapes hardly change: try, then take the fastest
    return torch.device("cuda" if is_cuda else "cpu")


def find_checkpoint(given: str | None, otherwise: str | None = None) -> str | Path:
    """--ckpt, or the newest runs/*/checkpoint.pt, or `otherwise` (saying which). Raises FileNotFoundError."""
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    path = given or [otherwise, *runs][-1]
    if path is None:
        raise FileNotFoundError("no --ckpt given and no runs/*/checkpoint.pt here: train one with `python "
                                "train.py`, or give another as --ckpt; sd-v1-5, Stable Diffusion, only draws")
    if not given:
        print(f"checkpoint: {path} (no --ckpt given; checkpoints in runs/: {len(runs)})")
    return path


def require(model: Network, tasks: list[str], what: str) -> None:
    """Raises ValueError where a model was not trained for these tasks; what: for the message."""
    if not set(tasks) <= set(model.tasks):
        raise ValueError(f"{what}: this needs weights trained with --tasks {','.join(tasks)}, these were for "
                         f"{','.join(model.tasks)}: give others, or train a DiffDis on by train.py --init")


def target(flag: str, name: str, suffix: str = "") -> Path:
    """Where a flag says to write, judged before the work. Raises ValueError."""
    path = Path(name).absolute()
    if not path.parent.is_dir() or path.is_dir() or not path.name.lower().endswith(suffix):
        raise ValueError(f"{flag} is {name!r}, expected a {suffix or 'file'} in an existing folder")
    return path


# ---------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Draw pictures for prompts; with --image, read pictures.")
    add = parser.add_argument
    add("prompts", nargs="+", metavar="TEXT", help="what to draw, a row of the picture each; or to look for")
    add("--image", action="append", metavar="FILE", help="read this picture against the texts; repeatable")
    add("--ckpt", help=f"{CKPT_HELP}, and to draw without one sd-v1-5")
    add("--precision", choices=("fp32", "bf16"), help="without it bf16 on CUDA, else fp32")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ is DPM-Solver++(2M): 20 steps are plenty")
    add("--steps", type=positive, default=50, help="sampler steps")
    add("--guidance-scale", type=finite, help="1 + w, 1 is none; without it the checkpoint's own")
    add("--negative", default="", help="prompt to guide away from")
    add("--seed", type=natural, default=0, help="of all noise; the k-th drawn for a prompt has seed + k")
    add("-n", type=positive, default=1, help="images per prompt")
    add("--best-of", type=positive, default=1, metavar="N", help="draw N for each, keep the one read best")
    add("--size", type=within(int, 1, 4096), nargs=2, metavar=("WIDTH", "HEIGHT"), help="px; else as trained")
    add("--out", default="sample.png", help="PNG to write; small pictures are enlarged to about 256 px")
    add("--json", metavar="FILE", help="also write the numbers here")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    args = parser.parse_args(argv)
    if args.image and (files := [text for text in args.prompts if os.path.isfile(text)]):
        parser.error(f"{files[0]} is a file, not a text: put --image before each picture")
    for flag in "-n --best-of --out --sampler --steps --guidance-scale --negative --size".split():
        name = flag.strip("-").replace("-", "_")
        if args.image and getattr(args, name) != parser.get_default(name):
            parser.error(f"{flag} is for drawing, and --image only reads: leave out one of them")
    return args


def draw_all(model: DiffDis, prompts: list[str], seeds: list[int], best_of: int = 1,
             size: tuple[int, int] | None = None, **settings) -> tuple[Tensor, list[dict]]:
    """As `draw_images`, any number, in batches; of each `best_of` in a row the one that the model itself, its
    noise from the first seed, reads best -> images [B / best_of, 3, H, W] on the CPU, a note on each."""
    height, width = size or (model.config.image_size,) * 2
    at_once, drawn, cosines = min(64, max(1, 2 ** 20 // (height * width))), [], []          # 4 of 512 px
    for i in range(0, len(prompts), at_once):
        texts, own_seeds = prompts[i:i + at_once], seeds[i:i + at_once]
        progress = partial(tqdm, unit="step", disable=None, leave=False)
        images = draw_images(model, texts, own_seeds, size=(height, width), progress=progress, **settings)
        drawn.append(images.cpu())
        if best_of > 1:
            alike = score(model, images, texts, draws=4, seed=seeds[0], indices=[0] * len(texts))
            cosines += alike.diagonal().tolist()       # all from the same noise, whose luck is not to choose
    notes = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds)]
    if best_of == 1:
        return torch.cat(drawn), notes
    chosen = [max(range(i, i + best_of), key=cosines.__getitem__) for i in range(0, len(notes), best_of)]
    return torch.cat(drawn)[chosen], [notes[i] | {"similarity": round(cosines[i], 3)} for i in chosen]


def draw(model: DiffDis, args: argparse.Namespace, path: Path) -> list[dict]:
    """One picture, or a grid with a row per prompt; what made it stands in the PNG's text."""
    scale = model.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    settings = dict(sampler=args.sampler, steps=args.steps, guidance_scale=scale, negative=args.negative)
    width, height = args.size or (model.config.image_size,) * 2
    each = range(args.n * args.best_of)
    prompts, seeds = zip(*[(prompt, args.seed + k) for prompt in args.prompts for k in each])
    images, notes = draw_all(model, [*prompts], [*seeds], args.best_of, (height, width), **settings)
    picture = make_grid(images, args.n, max(1, 256 // width), gap=2 if len(images) > 1 else 0)
    text = PngImagePlugin.PngInfo()      # the first picture's, as Stable Diffusion's programs read it back
    text.add_itxt("parameters", f"{args.prompts[0]}\nNegative prompt: {args.negative}\nSteps: {args.steps}, "
                                f"Sampler: {SAMPLERS[args.sampler][1]}, CFG scale: {scale}, "
                                f"Seed: {notes[0]['seed']}, Size: {width}x{height}, Model: {path.stem}")
    write_atomically(Path(args.out), lambda file: picture.save(file, "PNG", pnginfo=text))
    for note in notes:
        print("  ".join(f"{name}: {value}" for name, value in note.items()))
    print(f"wrote {args.out}")
    return notes


def read(model: Network, args: argparse.Namespace) -> list[dict]:
    """A table: of each picture the texts, from the likeliest on."""
    texts, notes = args.prompts, []
    images = torch.cat([load_image(file, model.config.image_size) for file in args.image]).split(64)
    cosines = torch.cat([          # from the same noise: what is read depends on no other picture
        score(model, part, texts, draws=4, seed=args.seed, indices=[0] * len(part)) for part in images])
    odds = (cosines * model.logit_scale.exp()).softmax(dim=1)          # at the model's own temperature
    print(f"probability  cosine  text, picture (seed {args.seed})")
    for file, cosine, odd in zip(args.image, cosines.tolist(), odds.tolist()):
        notes.append({"image": file, "cosines": cosine, "probabilities": odd})
        for k in sorted(range(len(texts)), key=lambda k: -cosine[k]):
            print(f"{100 * odd[k]:9.1f} %{cosine[k]:8.3f}  {texts[k]}, {file}")
    return notes


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    table = args.json and target("--json", args.json)
    if not args.image:
        target("--out", args.out, ".png")
    device, reads = pick_device(args.device), bool(args.image) or args.best_of > 1
    path = models.locate(find_checkpoint(args.ckpt, None if reads else "sd-v1-5"))
    model = models.load(path, device, precision=args.precision)
    model.to(memory_format=torch.channels_last)       # float32, 512 px, CPU: a tenth faster
    require(model, ["generation"] * (not args.image) + ["alignment"] * reads, str(path))
    for text in args.prompts if model.data == "shapes" else ():
        if not CAPTION.fullmatch(clean(text)):
            print(f"warning: {text!r} is not in the grammar of 'a red circle above a small blue square', two "
                  "colours, all this model has seen; --ckpt sd-v1-5 draws anything", file=sys.stderr)
    notes = read(model, args) if args.image else draw(model, args, path)
    if table:
        out = {"task": "read" if args.image else "draw", "n": len(notes), "seed": args.seed, "images": notes,
               "chance": args.image and 1 / len(args.prompts), "texts": args.prompts, "checkpoint": str(path)}
        table.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
