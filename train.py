"""Trains DiffDis: one network, two losses, one gradient step on both (the paper's Algorithm 1).

    python train.py                                        the built-in data, on two CPU cores in minutes
    python train.py --data DIR --resume                    go on with the newest run of that data and preset
    torchrun --nproc_per_node=8 train.py --data cc3m       the paper's run, from Stable Diffusion v1

Top to bottom: flags and recipes; the loss, as the paper writes it; optimiser, averages; latents; a run.
Nothing random here has a state: batches, timesteps and noise are functions of (seed, step, index in the
global batch). So a resumed run is the run that was never stopped, and N ranks see what one rank would see."""
import argparse
import gc
import hashlib
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # before torch; else far slower where cores are shared
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import model as models
from data import (Batch, SkipReport, Source, Tokenizer, evaluation_batches, evenly_spaced, hold_out,
                  open_source, to_float, training_batches, usable_captions, write_atomically)
from diffusion import (SCHEDULES, TARGETS, alignment_loss, generation_loss, generator_of, make_alphas_cumprod,
                       make_target, q_sample, read_prediction, signal_and_noise)
from evaluate import (Reading, checker, denoising_errors, everybody, in_turn, join_ranks, over_images,
                      rank_and_world, report, retrieval, zeroshot)
from model import CLIPS, PRESETS, Clip, ClipConfig, Config, DiffDis, Network, TextConfig, is_new
from sample import (SWITCH, Parser, draw_all, errors_in_one_line, make_grid, natural, pick_device, positive,
                    share, weight, within)

TASKS = ("generation", "alignment")
# What training starts from where no flag says otherwise. sd-v1: the paper's run on CC3M; the large CLIPs'
# rate, decay and 20 epochs are its appendix's. Weights of --init learn at lr / slower. Matrices take
# Muon's steps at lr × muon; where that is 0, AdamW's, as all the rest.
COLUMNS = ("steps", "batch_size", "lr", "muon", "slower", "lr_decay", "warmup", "beta2", "weight_decay",
           "ema", "align_weight")
RECIPES = {name: dict(zip(COLUMNS, values)) for name, *values in (
    ("tiny", 400, 64, 1.4e-3, 10, 1, "linear", 30, 0.99, 1e-2, 0.985, 0.1),
    ("small", 50000, 256, 3e-4, 0, 1, "cosine", 500, 0.99, 1e-2, 0.999, 0.3),
    ("sd-v1", 60000, 1024, 1e-4, 0, 10, "constant", 1000, 0.999, 1e-4, 0.9999, 1.0),
    ("clip-tiny", 400, 64, 1.4e-3, 10, 100, "cosine", 30, 0.98, 0.1, 0.985, 1.0),
    ("clip-small", 50000, 256, 1e-3, 0, 100, "cosine", 500, 0.98, 0.1, 0.999, 1.0),
    ("clip-vit-b32", 57000, 1024, 1e-3, 0, 100, "cosine", 2000, 0.98, 0.1, 0.9999, 1.0),
    ("clip-vit-l14", 57000, 1024, 1e-3, 0, 100, "cosine", 2000, 0.98, 0.1, 0.9999, 1.0))}

P_UNCOND = 0.1             # share of captions replaced by the empty prompt, for guidance
MAX_NORM = 1.0             # of the gradient
MOMENTUM = 0.8             # of Muon
LOG_EVERY = 10             # steps between lines of log.jsonl, and of progress


# ---------------------------------------------------------------- flags
N, WHOLE, X, SHARE = ({"type": kind, "metavar": name} for kind, name in (
    (positive, "N"), (natural, "N"), (weight, "X"), (share, "SHARE")))
METHOD = "the method and its ablations, not for CLIP; --init brings its own"
# Without a default a flag that is not given is None, until `settle` knows from what training starts.
FLAGS = {"the run": (
    ("data", {"default": "shapes"}, "shapes, cc3m, or a folder, tar, list or table as in the README"),
    ("preset", {"choices": (*PRESETS, *CLIPS)}, "networks, recipe; else --init's; else tiny, of cc3m sd-v1"),
    ("init", {"metavar": "WEIGHTS"}, "a checkpoint, Stable Diffusion v1, or sd-v1-5 to download"),
    ("out", {"metavar": "DIR"}, "folder of the run; without it runs/DATA-PRESET, numbered if taken"),
    ("resume", {"action": "store_true"}, "go on with the run in --out, else the newest of data and preset"),
    ("tasks", {"choices": (*TASKS, ",".join(TASKS)), "metavar": "TASKS"},
     "generation, alignment or generation,alignment; without it both, of a CLIP alignment"),
    ("seed", {"default": 0, **WHOLE}, "of everything"),
    ("val", {"default": 500, **N}, "pairs held out of --data, or of its own val/"),
    ("image_size", {"type": within(int, 1, 4096), "metavar": "N"}, "px; else the preset's or --init's"),
    ("device", {"choices": ("auto", "cpu", "cuda"), "default": "auto"}, "where to run"),
    ("precision", {"choices": ("fp32", "bf16")}, "without it bf16 on CUDA, else fp32"),
    ("compile", SWITCH, "torch.compile the networks' blocks; without it on CUDA"),
    ("workers", WHOLE, "processes per rank that read data; without it 2, for shapes 0"),
    ("max_bad", {"default": 0.05, **SHARE}, "stop when more of the samples is unusable"),
    ("augment", SWITCH, "random crops and RandAugment; without it for CLIP, but not on shapes"),
    ("latents", {"metavar": "DIR"}, "keeps the images' latents: made at first use, then read instead"),
    ("micro_batch", N, "pairs per pass and rank; InfoNCE stays that of the whole batch"),
    ("recompute", SWITCH, "activations in the backward pass, to save memory"),
    ("save_every", {"default": 500, **N}, "steps between checkpoints"),
    ("eval_every", N, "steps between held-out scores and sample grids; without it a quarter of all")),
    "optimisation": (
    ("steps", N, "gradient steps"),
    ("batch_size", N, "pairs per step, over all ranks"),
    ("lr", X, "peak learning rate of AdamW; of Muon, in tiny and clip-tiny, ten times that"),
    ("warmup", WHOLE, "steps over which it rises"),
    ("align_weight", X, "λ, weight of the alignment loss")),
    METHOD: (
    ("p_drop_image", SHARE, "of images dropped in alignment; without it none"),
    ("text_target", {"choices": TARGETS}, "predicted for text queries (Table 2); without it data"),
    ("text_schedule", {"choices": SCHEDULES}, "noise of text queries (Table 3); without it cosine"),
    ("image_schedule", {"choices": SCHEDULES}, "noise of images (Table 3); without it linear"),
    ("gamma", {"type": within(float, 0.001, 1)}, "γ, scale of e within e_t (Eq. 6); without it the preset's"),
    ("condition_timestep", {"type": within(int, 0, 1000)}, "t_z of a condition (Table 7); without it 1000"),
    ("fusion", SWITCH, "dual-stream attention (Table 4)"),
    ("shared_attention", SWITCH, "the query uses the image tokens' attention weights (Table 5)"),
    ("own_ffn", SWITCH, "the query has a feed-forward of its own (Table 5)"),
    ("align_blocks", WHOLE, "M, blocks after the middle block; without it the preset's"),
    ("train_text_encoder", SWITCH, "train T; without it only if it did not come pretrained"))}
# Flags that may differ between a run and its resumption without changing what is computed.
FREE_ON_RESUME = ("resume", "data", "out", "device", "workers", "max_bad", "save_every", "eval_every",
                  "micro_batch", "recompute")        # data: its samples are compared, wherever they lie


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train DiffDis, or a CLIP to compare it with.", usage="train.py [FLAGS]")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, options, text in flags:
            if name in RECIPES["tiny"]:
                values = [f"{preset} {RECIPES[preset][name]}" for preset in (*PRESETS, "clip-vit-l14")]
                text += f" ({', '.join(values)})"
            group.add_argument("--" + name.replace("_", "-"), help=text, **options)
    args = parser.parse_args(argv)
    if args.preset is None and args.init is None:
        args.preset, args.init = ("sd-v1", "sd-v1-5") if str(Path(args.data)) == "cc3m" else ("tiny", None)
        if args.init and pick_device(args.device).type != "cuda":
            raise ValueError("--data cc3m trains Stable Diffusion, which needs CUDA: or give --preset tiny")
    return args


def preset_of(config: Config | ClipConfig) -> str | None:
    """The preset whose networks these are."""
    names = ("unet",) if isinstance(config, Config) else ("width", "layers", "patch")
    return next((name for name, preset in (PRESETS | CLIPS).items() if type(preset) is type(config)
                 and all(getattr(preset, part) == getattr(config, part) for part in names)), None)


def with_flags(config, flags: dict):
    """A configuration, and those within it, with the values of the flags that have its fields' names."""
    changes = {name: with_flags(value, flags) if is_dataclass(value) else flags.get(name)
               for name, value in vars(config).items()}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def settle(args: argparse.Namespace, device: torch.device, world: int, base: Config | ClipConfig
           ) -> Config | ClipConfig:
    """Fill in the flags that were not given, now that it is known which networks training starts from
    -> their configuration as the flags change it. Raises ValueError where flags contradict each other."""
    own, is_clip, is_shapes = preset_of(base), isinstance(base, ClipConfig), args.data == "shapes"
    preset, cuda = args.preset or own, device.type == "cuda"
    if preset is None or own not in (None, preset) or is_clip != (preset in CLIPS):
        raise ValueError(f"{args.init or args.out} has the networks of {own or 'no preset'}, --preset is "
                         f"{args.preset}: give {own or 'the one whose recipe to take'} as --preset")
    not_for_clip = ("recompute", "latents", *(name for name, *_ in FLAGS[METHOD]))
    foreign = [name for name in not_for_clip if is_clip and getattr(args, name) is not None]
    defaults = RECIPES[preset] | {
        "preset": preset, "tasks": "alignment" if is_clip else ",".join(TASKS), "compile": cuda,
        "precision": "bf16" if cuda else "fp32",
        "workers": 0 if is_shapes else 2, "p_drop_image": 0.0, "train_text_encoder": args.init is None,
        "augment": is_clip and not is_shapes}        # the captions of shapes are about places and colours
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.eval_every, args.tasks = args.eval_every or max(1, args.steps // 4), args.tasks.split(",")
    draws, reads = (task in args.tasks for task in TASKS)
    pairs, left = divmod(args.batch_size, world)
    for is_wrong, words in (
            (foreign or is_clip and draws,
             f"a CLIP only reads images: leave out --{[*foreign, 'tasks'][0].replace('_', '-')}"),
            (preset == "sd-v1" and not args.init,
             "--preset sd-v1 needs a trained autoencoder: give --init sd-v1-5, or other weights"),
            (args.augment and draws,
             "--augment shears, as a model that draws would learn to draw: train --tasks alignment with it"),
            (args.latents and (args.augment or is_shapes),
             "--latents replaces pictures, which --augment and the endless shapes need: leave it out"),
            (left or pairs % (args.micro_batch or 1) or reads and args.batch_size < 2,
             f"--batch-size {args.batch_size}, {world} ranks, --micro-batch {args.micro_batch}: expected 2 "
             "pairs or more, which ranks and micro-batches share evenly")):
        if is_wrong:
            raise ValueError(words)
    size = PRESETS[own].image_size if args.init and own == "sd-v1" else None       # the weights say 512 px
    return with_flags(base, {**vars(args), "image_size": args.image_size or size})


# ---------------------------------------------------------------- the loss (Algorithm 1)
def sample_noise(config: Config, latent_shape: tuple, seed: int, step: int, rows: range) -> dict[str, Tensor]:
    """All that is random in one step for these rows of the global batch, each row from its own generator."""
    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        return {"t_image": torch.randint(config.timesteps, (), generator=generator),
                "t_text": torch.randint(config.timesteps, (), generator=generator),
                "u": torch.rand(2, generator=generator),          # against P_UNCOND and p_drop_image
                "noise": torch.randn(latent_shape, generator=generator),
                "query_noise": torch.randn(config.text.width, generator=generator),
                "posterior_noise": torch.randn(latent_shape, generator=generator)}
    return torch.utils.data.default_collate([sample(generator_of(seed, step, row)) for row in rows])


class JointLoss(nn.Module):
    """Algorithm 1, both tasks. InfoNCE (Eq. 8), over the whole global batch, is for `backward` to add."""

    def __init__(self, model: DiffDis, tasks: tuple[str, ...] = TASKS, p_drop_image: float = 0.0,
                 bf16: bool = False) -> None:
        super().__init__()
        self.model, self.tasks, self.p_drop_image, self.bf16 = model, tasks, p_drop_image, bf16
        for name in ("image", "text"):
            table = make_alphas_cumprod(getattr(model.config, f"{name}_schedule"), model.config.timesteps)
            self.register_buffer(f"{name}_alphas", table)

    def forward(self, images: Tensor, tokens: Tensor, noise: dict, only_reads: bool = False) -> tuple:
        """Batch.images x (or latents), tokens y, noise -> z, L_IG [B], ê_0 [B, D], e [B, D], no image [B]."""
        is_raw = images.dtype in (torch.uint8, torch.float16)           # pixels, or moments of --latents
        model, config, unet, image_loss, x0_pred = self.model, self.model.config, self.model.unet, None, None
        draws, reads = "generation" in self.tasks and not only_reads, "alignment" in self.tasks
        t_z, t_e, eps_z, eps_e = (noise[name] for name in ("t_image", "t_text", "noise", "query_noise"))
        no_text, no_image = noise["u"][:, 0] < P_UNCOND, noise["u"][:, 1] < self.p_drop_image
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            z = model.read_batch(images, noise["posterior_noise"]).float() if is_raw else images    # z = V(x)
            c, e = model.text_encoder(tokens)                                               # c, e = T(y)
            null = model.text_encoder(model.null_tokens)[0]                                 # c masked
            c, clean = null.where(no_text[:, None, None], c), z.masked_fill(no_image[:, None, None, None], 0)
            z_t = q_sample(z, t_z, eps_z, self.image_alphas)                                # Eq. 4
            e_t = q_sample(e.detach(), t_e, eps_e, self.text_alphas, config.gamma)          # Eq. 6
            pred = unet.denoise_image(z_t, t_z, c) if draws else None                       # Φ_u, e masked
            query_pred = unet.denoise_query(e_t, t_e, clean, null) if reads else None       # Φ_θ (Eq. 7)
        if draws:
            scales = signal_and_noise(t_z, z, self.image_alphas)
            image_loss = generation_loss(pred, make_target(config.image_target, z, eps_z, *scales))   # L_IG
        if reads:
            scales = signal_and_noise(t_e, e_t, self.text_alphas, config.gamma)
            x0_pred = read_prediction(config.text_target, query_pred.float(), e_t, *scales)[0]        # ê_0
        return z, image_loss, x0_pred, e, no_image


class ClipLoss(nn.Module):
    """CLIP's embeddings in the places that `backward` knows: an image's is in that of ê_0."""
    tasks = ("alignment",)

    def __init__(self, model: Clip, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, images: Tensor, tokens: Tensor, noise: dict, only_reads: bool = False) -> tuple:
        """images [B, S, S, 3] uint8, or [B, 3, S, S] in [-1, 1]; tokens [B, L] -> as JointLoss."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = self.model.read_batch(images) if images.dtype == torch.uint8 else images
            embeddings = self.model.encode_image(pixels), self.model.encode_tokens(tokens)
        return pixels, None, *embeddings, torch.zeros_like(tokens[:, 0], dtype=torch.bool)


def backward(loss: nn.Module, parts: list[tuple], align_weight: float) -> dict[str, Tensor]:
    """Gradients of L = L_IG + λ L_ITA (Algorithm 1) over this rank's batch, whole or in micro-batches.

    InfoNCE (Eq. 8) is over the whole global batch however many parts it comes in: of several, a first pass
    takes all embeddings without keeping anything else, and in the second each part in its turn brings its own
    with gradient (Gao et al. 2021). So memory is that of one part, and the loss that of the batch.
    -> "generation", "alignment": loss of each pair [B]; "hits": whether its own text is the most similar."""
    joint, count = getattr(loss, "module", loss), sum(len(tokens) for images, tokens, noise in parts)
    reads, passed, image_losses, result = "alignment" in joint.tasks, [], [], {}
    if reads and len(parts) > 1:
        with torch.no_grad():
            passed = [joint(*part, only_reads=True) for part in parts]
        parts = [(z, tokens, noise) for (z, *_), (_, tokens, noise) in zip(passed, parts)]
    for i, part in enumerate(parts):
        is_last = i + 1 == len(parts)
        with nullcontext() if is_last or joint is loss else loss.no_sync():
            own, total = loss(*part), 0
            if "generation" in joint.tasks:
                image_losses.append(own[1].detach())
                total = own[1].sum() / count                                            # L_IG
            if reads:
                x0_pred, texts, no_image = map(torch.cat, list(zip(*passed[:i], own, *passed[i + 1:]))[2:])
                scale = joint.model.logit_scale if is_last else joint.model.logit_scale.detach()
                alignment, result["hits"] = alignment_loss(x0_pred, texts, scale, no_image)
                result["alignment"] = alignment.detach()
                total = total + align_weight * alignment.mean()                         # + λ L_ITA
            total.backward()
    return result | ({"generation": torch.cat(image_losses)} if image_losses else {})


# ---------------------------------------------------------------- optimiser, averages
def freeze_unused(model: Network, tasks: tuple[str, ...], train_text_encoder: bool) -> None:
    """Take gradients away from what these tasks never use, and from what is frozen by design."""
    for name, parameter in model.named_parameters():
        is_decoder = name.startswith(("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out."))
        if (name.startswith("autoencoder.") or name.startswith("text_encoder.") and not train_text_encoder
                or is_new(name) and "alignment" not in tasks or is_decoder and "generation" not in tasks):
            parameter.requires_grad_(False)


class Muon(torch.optim.AdamW):
    """AdamW, but groups with a "momentum" take Muon's steps (Jordan 2024): along their Nesterov momentum,
    its singular values made about 1 by five Newton–Schulz iterations, over matrices of one shape at once."""
    bf16 = False               # iterate in it

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape, beta = {}, group.get("momentum")
            for parameter in [p for p in group["params"] if beta and p.grad is not None]:
                state, gradient = self.state[parameter], parameter.grad
                if not state:          # the step is for AdamW, which asks for it when the state is loaded
                    state.update(momentum=torch.zeros_like(gradient), step=torch.zeros(()))
                update = gradient.lerp(state["momentum"].lerp_(gradient, 1 - beta), beta).flatten(1)
                same_shape.setdefault(update.shape, []).append((parameter, update))
            for (rows, columns), matrices in same_shape.items():
                x = torch.stack([update.bfloat16() if self.bf16 else update for _, update in matrices])
                x = x.mT if rows > columns else x                         # the smaller product x xᵀ is enough
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):               # x <- 3.4445 x + (2.0315 a a - 4.775 a) x
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                x = (x.mT if rows > columns else x).float() * max(1, rows / columns) ** 0.5
                for (parameter, _), update in zip(matrices, x):
                    parameter.sub_(update.view_as(parameter), alpha=group["lr"])
        groups, self.param_groups = self.param_groups, [g for g in self.param_groups if "momentum" not in g]
        super().step()
        self.param_groups = groups


def make_optimizer(model: nn.Module, lr: float, beta2: float, weight_decay: float,
                   slower: float | None = None, muon: float = 0) -> Muon:
    """AdamW over (pretrained or new) × (matrix or vector) groups; only its matrices are decayed.
    slower: by what the rate of pretrained weights is divided; None: nothing is pretrained. muon: rate / lr of
    Muon's steps, of matrices and kernels [out, rest] but embeddings and the UNet's ends; 0: AdamW's."""
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_old, is_matrix = slower is not None and not is_new(name), parameter.dim() >= 2
            is_end = "embedding.weight" in name or name.startswith(("unet.conv_in.", "unet.conv_out."))
            is_muon = muon > 0 and is_matrix and not is_end
            groups.setdefault((is_old, is_matrix and not is_muon, is_muon), []).append(parameter)
    return Muon([
        {"params": params, "peak_lr": lr * (muon if is_muon else 1) / (slower if is_old else 1),
         "weight_decay": weight_decay * decays, **({"momentum": MOMENTUM} if is_muon else {})}
        for (is_old, decays, is_muon), params in groups.items()], lr=lr, betas=(0.9, beta2), fused=True)


def learning_rate_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """Share of the peak rate at this step. "linear": constant, then to 0 over the last 0.6 after warm-up."""
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return {"constant": 1, "cosine": (1 - math.cos(math.pi * left)) / 2, "linear": min(1, left / 0.6)}[decay]


class Averages:
    """Exponential moving average of the trainable parameters, in float32, by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.live = decay, {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))     # early on, do not remember the random start
        torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.live.values()], 1 - decay)

    def swap(self) -> None:
        """Exchange averages and live weights; call twice to get back."""
        for name, parameter in self.live.items():
            parameter.data, self.values[name] = self.values[name], parameter.data


# ---------------------------------------------------------------- latents
@torch.no_grad()
def add_latents(source: Source, model: DiffDis, folder: Path, workers: int) -> None:
    """--latents: what the frozen autoencoder makes of all of a source's images, to be read in place of these.

    DIR/NAME.npy holds mean and log-variance, float16 [N, 2C, h, w], mapped, NaN for an unusable image;
    NAME.done.npy says which rows are there. The ranks, which must see the folder, share what is missing."""
    (rank, world), size = rank_and_world(), model.config.image_size
    # NAME says of which data, at which size, by which autoencoder: others make others.
    name = hashlib.sha256(repr((len(source), source.fingerprint(), size, model.config.autoencoder)).encode())
    for value in model.autoencoder.state_dict().values():
        name.update(value.cpu().contiguous().numpy())
    path, marks = (folder / f"{name.hexdigest()[:16]}{ending}" for ending in (".npy", ".done.npy"))
    if rank == 0 and not (path.exists() and marks.exists()):
        channels, height, width = model.latent_shape(size, size)
        folder.mkdir(parents=True, exist_ok=True)
        for file, dtype, shape in ((path, np.float16, (2 * channels, height, width)), (marks, bool, ())):
            np.lib.format.open_memmap(file, "w+", dtype, (len(source), *shape))
    everybody(None)
    with models.reading(path):
        np.load(path, "r")     # refuses a file cut short, which "r+" would fill up with zeros
        moments, done = np.load(path, "r+"), np.load(marks, "r+")
    todo = np.array_split(np.flatnonzero(~done), world)[rank]
    everybody(None)            # each has its share before any is marked as done
    for batch in tqdm(evaluation_batches(source.subset(todo), size, 32, workers), "latents", unit="batch",
                      disable=None if rank == 0 else True):
        if batch.captions:          # else not one of its images is usable
            rows, images = todo[list(batch.places)], to_float(batch.images.to(model.device))
            moments[rows] = model.autoencoder.moments(images).half().cpu().numpy()
            done[rows] = True
    moments[todo[~done[todo]]], done[todo] = np.nan, True
    moments.flush()
    done.flush()
    everybody(None)
    source.moments = moments


# ---------------------------------------------------------------- a run
def make_model(args: argparse.Namespace, source: Source, weights: str | Path | None, adapt: Callable
               ) -> Network:
    """A model from these weights, or from scratch; adapt: as of `model.load`, here `settle`."""
    if weights is not None:
        in_turn(lambda: models.locate(weights))
        model = models.load(weights, weights="raw", adapt=adapt).requires_grad_(True)
        model.data = args.data if args.data == model.data else None       # None: on more than that
        return model
    config = adapt((PRESETS | CLIPS)[args.preset])
    if config.text.vocab_size == TextConfig().vocab_size:      # CLIP's own size: CLIP's vocabulary
        vocabulary = in_turn(lambda: models.download("vocabulary"))
        tokenizer = Tokenizer.from_file(vocabulary, config.text.context_length)
    else:
        captions = (caption for captions in usable_captions(source, 100_000) for caption in captions)
        tokenizer = Tokenizer.learn(captions, config.text.vocab_size, config.text.context_length)
    config = replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))
    model = (Clip if args.preset in CLIPS else DiffDis)(config, tokenizer)
    model.data = args.data
    return model


def run_folder(args: argparse.Namespace) -> Path:
    """--out; to resume the newest runs/DATA-PRESET with a checkpoint; else the first that is not there."""
    name = f"runs/{Path(args.data).resolve().name}-{args.preset or 'init'}"
    runs = [Path(f"{name}-{k}".removesuffix("-1")) for k in range(1, 1000)]
    begun = [path for run in runs if args.resume and (path := run / "checkpoint.pt").exists()]
    return (Path(args.out) if args.out else max(begun, key=lambda path: path.stat().st_mtime).parent if begun
            else next(run for run in runs if not run.exists()))


def read_log(path: Path) -> list[dict]:
    """The lines of a log; the last one may have been cut short by a kill. Raises ValueError."""
    log = path.read_text() if path.exists() else ""
    with models.reading(path):
        return sorted(map(json.loads, log[:log.rfind("\n") + 1].splitlines()), key=lambda line: line["step"])


class Trainer:
    """All that a run holds, from the flags or from the run's checkpoint. Raises ValueError or OSError."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.step, self.result, self.signal, self.is_stopped = 0, None, 0, False
        # torchrun starts a failed run's processes again with the command they had: then they are to go on.
        args.resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.folder = run_folder(args)
        path = self.folder / "checkpoint.pt"
        checkpoint = models.read_file(path)[1] if path.exists() else None
        if checkpoint and not args.resume:
            raise ValueError(f"{path} is there: add --resume to go on with it, or choose another --out")
        if args.resume and not checkpoint and rank == 0:
            print(f"nothing to resume, {path} is not there: starting anew")
        source = in_turn(lambda: open_source(args.data, "train", args.max_bad))
        self.source, self.val = in_turn(lambda: hold_out(source, args.data, args.val, args.max_bad))
        if not next(iter(evaluation_batches(evenly_spaced(self.val, 32), 32, 32))).places:    # say it now
            raise ValueError(f"no held-out sample of {args.data} can be read: mend them, or leave them out")
        torch.manual_seed(args.seed)
        self.model = make_model(args, self.source, path if checkpoint else args.init,
                                partial(settle, args, device, world))
        self.model.tasks = tuple(args.tasks)
        freeze_unused(self.model, self.model.tasks, args.train_text_encoder)
        self.model.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, args.lr, args.beta2, args.weight_decay,
                                        args.slower if args.init else None, args.muon)
        self.optimizer.bf16 = args.precision == "bf16"
        self.averages = Averages(self.model, args.ema)
        self.flags = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
        known = [len(self.source), len(self.val), *([source.fingerprint()] if args.data != "shapes" else [])]
        self.flags |= {"latents": bool(args.latents), "samples": known}
        if checkpoint:
            self.restore(checkpoint)
        if args.latents:
            add_latents(source, self.model, Path(args.latents), args.workers)
            self.source, self.val = hold_out(source, args.data, args.val)   # again: now they have the latents
        self.loss, self.skips = self.make_loss(), SkipReport(args.max_bad)
        self.begin(source)

    def restore(self, checkpoint: dict) -> None:
        """Go on where the run was saved. Raises ValueError, naming what differs, where it is not the same."""
        state = checkpoint.get("training") or {"args": {}}         # none in weights alone
        differ = [f"--{name.replace('_', '-')} was {state['args'].get(name)}, is {value}"
                  for name, value in self.flags.items() if state["args"].get(name) != value]
        if differ:
            raise ValueError(f"the run in {self.folder} cannot go on: {'; '.join(differ[:5])}")
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in checkpoint["ema"].items():
            self.averages.values[name].copy_(value)
        self.step = state["step"]

    def make_loss(self) -> nn.Module:
        args, bf16 = self.args, self.args.precision == "bf16"
        if bf16 and self.device.type == "cpu":
            # Two of torch's kernels are slower in bf16 than in fp32: of attention's backward pass ten times,
            # of group norm three times. So attention is plain products, and norms are of float32, as on CUDA.
            torch.backends.cuda.enable_flash_sdp(False)            # says cuda, is heeded on a CPU, too
            for norm in (m for m in self.model.modules() if isinstance(m, nn.GroupNorm)):
                norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        loss = (ClipLoss(self.model, bf16) if isinstance(self.model, Clip)
                else JointLoss(self.model, self.model.tasks, args.p_drop_image, bf16)).to(self.device)
        if args.compile:
            models.wrap_blocks(self.model)
            eager = torch.compiler.set_stance("force_eager")       # for other batch sizes nothing is compiled
            self.evaluate, self.validate = eager(self.evaluate), eager(self.validate)
        if args.recompute:
            models.wrap_blocks(self.model.unet, lambda run: partial(recompute, run, use_reentrant=False))
        # The buffers never change, and gradients need no second copy beside the buckets they are sent in.
        return loss if self.world == 1 else DistributedDataParallel(
            loss, broadcast_buffers=False, gradient_as_bucket_view=True)

    def begin(self, source: Source) -> None:
        """The run's folder, only now that nothing can be wrong any more; of its log the lines that stay."""
        self.start = self.logged = self.step
        self.waited = self.worked = 0.0
        everybody(None)          # every rank knows the folder's name before it is taken
        if self.rank == 0:
            # Without these flags the name was free: a samples/ means that another run has just taken it.
            (self.folder / "samples").mkdir(parents=True, exist_ok=bool(self.args.out or self.args.resume))
            lines = [line for line in read_log(self.folder / "log.jsonl") if line["step"] <= self.step]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_atomically(self.folder / "log.jsonl", lambda file: file.write(text.encode()))
            trainable = sum(parameter.numel() for parameter in self.averages.live.values())
            print(f"data: {len(source):,} samples of {self.args.data}; left out: {dict(+source.skipped)}\n"
                  f"run: {self.folder}  seed: {self.args.seed}  device: {self.device} x {self.world}  "
                  f"{self.args.precision}  trainable parameters: {trainable:,}  "
                  f"step: {self.step} of {self.args.steps}", flush=True)
        if self.step == 0:
            self.save()          # what cannot be written is noticed now, not after hours

    def save(self) -> None:
        if self.rank == 0:
            state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "args": self.flags}
            models.save(self.folder / "checkpoint.pt", self.model, self.averages.values, state)

    # ------------------------------------------------------------ one step
    def parts(self, batch: Batch) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """This rank's share of a batch as micro-batches on the device: images, tokens, noise."""
        def move(values: Tensor) -> tuple[Tensor, ...]:
            return values.to(self.device, non_blocking=True).split(self.args.micro_batch or len(values))
        noise = {name: move(values) for name, values in (batch.drawn or {}).items()}
        return [(images, tokens, {name: values[i] for name, values in noise.items()})
                for i, (images, tokens) in enumerate(zip(move(batch.images), move(batch.tokens)))]

    def train_step(self, batch: Batch) -> dict:
        """A gradient step on a batch -> what to log. Raises ValueError on all ranks before one not finite."""
        args, parts = self.args, self.parts(batch)
        factor = learning_rate_factor(self.step, args.steps, args.warmup, args.lr_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if self.world > 2 and self.step == self.start:
            # After its first backward pass DDP lays out its buckets anew, and sums over more than two ranks
            # round by their layout: a pass for nothing, so that a resumed run's first step is as any other.
            backward(self.loss, parts, args.align_weight)
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(self.loss, parts, args.align_weight)
        norm = nn.utils.clip_grad_norm_(self.averages.live.values(), MAX_NORM)
        record = {**{"accuracy" if name == "hits" else f"loss_{name}": values.float().mean()
                     for name, values in losses.items()},
                  "grad_norm": norm, "logit_scale": self.model.logit_scale.detach()}
        # Means over all ranks, and whether one was told to stop: a step waits for the device only here.
        values = torch.stack([*record.values(), torch.tensor(float(self.signal > 0), device=self.device)])
        if self.world > 1:
            dist.all_reduce(values)
        *means, stop = (values / self.world).tolist()
        self.is_stopped, record = stop > 0, dict(zip(record, means))
        weighted = args.align_weight * record.get("loss_alignment", 0.0)
        record["loss"] = record.get("loss_generation", 0.0) + weighted
        if wrong := [name for name, value in record.items() if not math.isfinite(value)]:
            raise ValueError(f"step {self.step}: {', '.join(wrong)} not finite; the last checkpoint is from "
                             "before it: start anew from that one with --init and a lower --lr")
        self.optimizer.step()
        with torch.no_grad():
            # As CLIP. Here and not in the loss, where a clamp would leave no gradient to come back by.
            self.model.logit_scale.clamp_(0, math.log(100))
        self.averages.update(self.step)
        self.step += 1
        return {**record, "lr": args.lr * factor}

    # ------------------------------------------------------------ the loop
    def batches(self) -> Iterator[Batch]:
        args, config, noise = self.args, self.model.config, None
        if isinstance(self.model, DiffDis):
            shape = self.model.latent_shape(config.image_size, config.image_size)
            noise = partial(sample_noise, config, shape, args.seed,
                            rows=range(self.rank, args.batch_size, self.world))
        return training_batches(self.source, config.image_size, args.batch_size, args.seed, self.step,
                                args.workers, rank=self.rank, world=self.world, augment=args.augment,
                                tokenizer=self.model.tokenizer, draw=noise)

    def train(self) -> bool:
        """The steps that are left -> whether all are done; False when a signal said to stop."""
        args, batches = self.args, self.batches()
        handlers = {number: signal.signal(number, lambda number, frame: setattr(self, "signal", number))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < args.steps and not self.is_stopped:
                began = time.monotonic()
                batch = next(batches)
                self.waited += time.monotonic() - began
                self.skips.add(batch)
                self.skips.check()
                record = self.train_step(batch)
                self.worked += time.monotonic() - began
                is_scored = self.step % args.eval_every == 0 or self.step == args.steps
                if is_scored or self.step % LOG_EVERY == 0:
                    self.log(record | (self.evaluate() if is_scored else {}))
                if is_scored or self.step % args.save_every == 0 or self.is_stopped:
                    self.save()
        finally:
            batches.close()       # its processes ignore signals: they end when told to
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.step == args.steps

    def log(self, record: dict) -> None:
        """This step's numbers, and speed since the last line: to log.jsonl, and in words."""
        skipped = sum(everybody(self.skips.skipped), start=Counter())
        steps_per_s, data_wait = (self.step - self.logged) / self.worked, self.waited / self.worked
        self.waited, self.worked, self.logged = 0.0, 0.0, self.step
        if self.rank == 0:
            record = {"step": self.step, **record, "data_wait": round(data_wait, 4),
                      "images_per_s": round(steps_per_s * self.args.batch_size, 1),
                      "skipped": dict(sorted(skipped.items()))}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"step {self.step} of {self.args.steps}:",
                  *(f"{name} {record[name]:.4g}" for name in record if name.startswith(("loss_", "val_"))),
                  f"left {(self.args.steps - self.step) / steps_per_s:.0f} s", flush=True)

    # ------------------------------------------------------------ held-out scores
    def evaluate(self) -> dict:
        """The averaged weights on held-out pairs, by all ranks -> scores; a grid of pictures."""
        args, scores = self.args, {}
        reading = Reading(seed=args.seed, batch_size=min(100, args.micro_batch or 100), max_bad=1.0)
        self.averages.swap()
        if "alignment" in args.tasks:
            measure, names = (zeroshot, ["top1"]) if self.val.classes else (retrieval, ["i2t_r1", "t2i_r1"])
            self.result = measure(self.model, self.val, reading)
            scores = {f"val_{name}": round(self.result[name], 6) for name in names}
        if "generation" in args.tasks:
            few = evenly_spaced(self.val, 100)
            errors = over_images(self.model, few, reading, lambda latents, places: denoising_errors(
                self.model, latents, places, self.model.encode_text(
                    [few.captions(place)[0] for place in places])[0], levels=10, seed=args.seed))
            scores["val_denoising_error"] = round(errors.values.mean().item(), 6)
            if self.rank == 0:       # always of the same prompts, from the same noise
                prompts = [captions[0] for captions in usable_captions(self.val, 32)]
                images, _ = draw_all(self.model, prompts, [0] * len(prompts), steps=25)
                path = self.folder / "samples" / f"step_{self.step:06d}.png"
                make_grid(images, columns=8, scale=max(1, 96 // images.shape[3])).save(path)
        self.averages.swap()
        return scores

    def validate(self) -> None:
        """The run's last word: what the averaged weights can do on pairs that training never saw."""
        if self.result is not None:
            report("zeroshot" if self.val.classes else "retrieval", self.result, self.args.data)
        if "generation" in self.args.tasks and self.args.data == "shapes":
            self.averages.swap()
            report("checker", checker(self.model, seed=self.args.seed), "shapes")


# ---------------------------------------------------------------- main
def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    rank, world, device = join_ranks(args.device)
    trainer = Trainer(args, rank, world, device)
    is_done = trainer.train()
    if dist.is_initialized():      # from here on the first rank works alone
        time.sleep(0.1)            # gloo's threads clean up with Python's lock, which freeing DDP would keep
        dist.destroy_process_group()
    if rank == 0:
        print(f"{trainer.skips}\n{'trained' if is_done else 'stopped by a signal'} after step {trainer.step} "
              f"of {args.steps}, {time.monotonic() - started:.0f} s; wrote {trainer.folder}/checkpoint.pt")
        if is_done:
            trainer.validate()
        else:
            print(f"to go on, give the same command with --resume --out {trainer.folder}")


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # as Ctrl-C; the steps have their own way
    try:
        run(parse_args(argv))
    finally:
        # DDP holds on to the process group, whose thread, if Python ended first, would abort the process.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
