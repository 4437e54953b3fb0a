"""Trains DiffDis: one network, two losses, one gradient step on both (the paper's Algorithm 1).

What it is: recipe, loss, optimiser, loop, checkpoint, validation, told once from top to bottom.
    python train.py                                        the built-in data, on two CPU cores in minutes
    python train.py --data DIR                             tars, class folders or captioned images
    torchrun --nproc_per_node=8 train.py --data cc3m       several GPUs
    python train.py --resume                               go on with the newest run of that data and preset
What it is not: the formulas (diffusion.py) or the networks (model.py).

Nothing random here has a state: batches, timesteps and noise are functions of (seed, step, index in the
global batch). So a resumed run is the run that was never stopped, and N ranks see what one rank would see.
"""
import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import evaluate
import model as models
from data import (BadSample, Batch, SkipReport, Source, Tokenizer, check_index, evaluation_batches,
                  evenly_spaced, hold_out, open_source, to_float, training_batches, usable_captions,
                  write_atomically)
from diffusion import (alignment_loss, generation_loss, generator_of, make_alphas_cumprod, make_target,
                       q_sample, read_prediction, signal_and_noise)
from evaluate import everybody, in_turn, join_ranks, rank_and_world, restarts
from model import (CLIPS, LIKE, PRESETS, SCHEDULES, TARGETS, Clip, ClipConfig, Config, DiffDis, TextEncoder,
                   UNet, is_new)
from sample import Parser, draw_images, fail, finite, make_grid, natural, positive

TASKS = ("generation", "alignment")
# What a preset's training starts from where no flag says otherwise. sd-v1: the paper's for CC3M.
RECIPES = {
    "tiny": dict(steps=2000, batch_size=32, lr=5e-4, lr_pretrained=5e-4, lr_decay="cosine", warmup=150,
                 beta2=0.99, weight_decay=1e-2, ema=0.997, align_weight=0.3),
    "small": dict(steps=50000, batch_size=256, lr=3e-4, lr_pretrained=3e-4, lr_decay="cosine", warmup=500,
                  beta2=0.99, weight_decay=1e-2, ema=0.999, align_weight=0.3),
    "sd-v1": dict(steps=60000, batch_size=1024, lr=1e-4, lr_pretrained=1e-5, lr_decay="constant", warmup=1000,
                  beta2=0.999, weight_decay=1e-4, ema=0.9999, align_weight=1.0),
}
# CLIP (Table 1): the appendix's rate, decay, batch and 20 epochs of CC3M; beta2 is CLIP's own. A small one
# has the steps and batch of the preset it is compared with.
CLIP_RECIPE = dict(lr=1e-3, lr_pretrained=1e-5, lr_decay="cosine", beta2=0.98, weight_decay=0.1,
                   align_weight=1.0)
RECIPES |= {name: {**RECIPES[like], **CLIP_RECIPE} for like, name in LIKE.items()}
RECIPES["clip-vit-l14"] |= dict(steps=57000, warmup=2000)
RECIPES["clip-vit-b32"] = RECIPES["clip-vit-l14"]
START_OVER = "the last checkpoint is from before it: start anew from that one with --init and a lower --lr"
# Flags that may differ between a run and its resumption without changing what is computed.
FREE_ON_RESUME = ("resume", "out", "device", "workers", "log_every", "save_every", "sample_every",
                  "eval_every", "keep", "ema_on_cpu", "micro_batch", "recompute", "validate")
BINS = 4                  # equal stretches of timesteps by which the logged losses are also told apart
# Dense bfloat16 FLOP/s of one device, from its data sheet, by a part of the name that CUDA gives it.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12,
              "A100": 312e12, "A800": 312e12, "B200": 2250e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "A10G": 70e12, "A6000": 155e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "T4": 65e12}


# ---------------------------------------------------------------- command line
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train DiffDis.")
    for title, add_flags in (("the run", add_run_flags), ("optimisation", add_optimisation_flags),
                             ("the method and its ablations", add_method_flags)):
        group = parser.add_argument_group(title)

        def add(flag: str, help: str, group=group, **kwargs) -> None:
            field = flag.strip("-").replace("-", "_")
            if field in RECIPES["tiny"]:        # the default depends on the preset: show all three
                help += f" (default: {', '.join(f'{name} {RECIPES[name][field]}' for name in PRESETS)})"
                kwargs["default"] = argparse.SUPPRESS
            group.add_argument(flag, help=help, **kwargs)
        add_flags(add, dict(action=argparse.BooleanOptionalAction, default=None))
    args = parser.parse_args(argv)
    for field, value in RECIPES[args.preset if args.model == "diffdis" else args.model].items():
        if not hasattr(args, field):
            setattr(args, field, value)
    check_args(args)
    return args


def add_run_flags(add: Callable, switch: dict) -> None:
    add("--data", "shapes, cc3m, or a folder of tars, class folders or captioned images", default="shapes")
    add("--model", "what to train: DiffDis, or a CLIP to compare with, whose recipe is in RECIPES",
        choices=("diffdis", *CLIPS), default="diffdis")
    add("--preset", "size of DiffDis's networks, and recipe; with --init the recipe alone",
        choices=tuple(PRESETS), default="tiny")
    add("--init", "weights (and configuration) to start from: a checkpoint, Stable Diffusion v1 as .ckpt, "
        f".safetensors or diffusers folder, or {' or '.join(models.MODELS)} to download")
    add("--out", "folder of the run; without it runs/DATA-PRESET, numbered if taken")
    add("--resume", "go on from the checkpoint.pt of --out, else of the newest run of that data and preset",
        action="store_true")
    add("--tasks", "generation, alignment, or both with a comma", default=",".join(TASKS))
    add("--seed", "seed of everything", type=natural, default=0)
    add("--val", "pairs held out of --data for validation (shapes has its own)", type=int, default=500)
    add("--tokenizer", "CLIP's vocabulary file, or a folder with vocab.json and merges.txt; "
        "without it one is learnt from the captions")
    add("--max-bad", "stop when more than this share of samples is unusable", type=finite, default=0.05)
    add("--image-size", "px; without it the preset's", type=positive)
    add("--precision", "auto is bf16 on CUDA, fp32 elsewhere", choices=("auto", "fp32", "bf16"),
        default="auto")
    add("--compile", "torch.compile the UNet; without it: on CUDA", **switch)
    add("--device", "where to run", choices=("auto", "cpu", "cuda"), default="auto")
    add("--workers", "processes that read and decode data, per rank; without it 0 for shapes, 2 otherwise",
        type=natural)
    add("--log-every", "steps between lines of log.jsonl", type=positive, default=10)
    add("--save-every", "steps between checkpoints", type=positive, default=500)
    add("--keep", "checkpoints to keep: checkpoint.pt is the last, checkpoint-STEP.pt those before",
        type=positive, default=1)
    add("--sample-every", "steps between sample grids; without it a quarter of the steps", type=positive)
    add("--eval-every", "steps between scores on the held-out pairs, of which best.pt has the highest; "
        "without it a quarter of the steps", type=positive)
    add("--validate", "print what the averaged weights can do when the run is done", default=True,
        action=argparse.BooleanOptionalAction)
    add("--shuffle-buffer", "samples mixed with each other; tars are read one after another, so many at once",
        type=positive, default=100_000)
    add("--augment", "random crops and RandAugment instead of the centre square, never where images are "
        "drawn; without it: for CLIP, but not on shapes", **switch)
    add("--recompute", "keep fewer activations, compute them again in the backward pass (checkpointing)",
        **switch)
    add("--latents", "folder that keeps the images' latents: made at first use, then read instead of images")
    add("--micro-batch", "pairs per forward pass and rank, gradients summed; the alignment loss stays that "
        "of the whole batch; without it all at once", type=positive)
    add("--ema-on-cpu", "keep the averaged weights in host memory", action="store_true")


def add_optimisation_flags(add: Callable, switch: dict) -> None:
    add("--steps", "gradient steps", type=positive)
    add("--batch-size", "image-caption pairs per step, over all ranks", type=positive)
    add("--lr", "peak learning rate of AdamW", type=finite)
    add("--lr-pretrained", "the same for weights that came with --init", type=finite)
    add("--lr-decay", "after warm-up", choices=("cosine", "constant"))
    add("--warmup", "steps over which the learning rate rises", type=natural)
    add("--beta2", "AdamW's decay of squared gradients; beta1 is 0.9", type=finite)
    add("--weight-decay", "AdamW's, on matrices, kernels and embeddings", type=finite)
    add("--grad-clip", "largest norm of the gradient; 0: no limit", type=finite, default=1.0)
    add("--ema", "decay of the averaged weights per step", type=finite)


def add_method_flags(add: Callable, switch: dict) -> None:
    add("--align-weight", "λ, weight of the alignment loss", type=finite)
    add("--p-uncond", "share of captions replaced by the empty prompt (generation)", type=finite, default=0.1)
    add("--p-drop-image", "share of images dropped (alignment)", type=finite, default=0.0)
    add("--image-target", "what the UNet predicts for images; without it the preset's", choices=TARGETS)
    add("--text-target", "the same for text queries (Table 2); without it data", choices=TARGETS)
    add("--image-schedule", "noise schedule of images; without it linear", choices=SCHEDULES)
    add("--text-schedule", "noise schedule of text queries (Table 3); without it cosine", choices=SCHEDULES)
    add("--gamma", "γ, scale of the text query within its noise; without it 1", type=finite)
    add("--condition-timestep", "t_z of a conditioning image: 0, T-1 or T (Table 7); without it T",
        type=natural)
    add("--fusion", "dual-stream attention in the encoder half (Table 4)", **switch)
    add("--shared-attention", "the query uses the image tokens' attention weights (Table 5)", **switch)
    add("--own-ffn", "the query has a feed-forward of its own (Table 5)", **switch)
    add("--align-blocks", "M, transformer blocks after the middle block; without it the preset's",
        type=natural)
    add("--train-text-encoder", "train T; without it: only if it did not come pretrained", **switch)


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot be meant. Raises ValueError."""
    args.tasks = tuple(task.strip() for task in args.tasks.split(",") if task.strip())
    if args.model != "diffdis":
        check_clip_args(args)
    if args.augment and "generation" in args.tasks:
        raise ValueError("--augment recolours and shears, which a model that draws would learn to draw: "
                         "leave it out, or train --tasks alignment")
    if not args.tasks or set(args.tasks) - set(TASKS):
        raise ValueError(f"--tasks is {','.join(args.tasks)!r}, "
                         "expected generation, alignment, or both with a comma")
    for field, low, high in (("p_uncond", 0, 1), ("p_drop_image", 0, 1), ("ema", 0, 1), ("max_bad", 0, 1),
                             ("lr", 0, math.inf), ("lr_pretrained", 0, math.inf), ("warmup", 0, math.inf),
                             ("weight_decay", 0, math.inf), ("grad_clip", 0, math.inf), ("val", 1, math.inf),
                             ("align_weight", 0, math.inf), ("beta2", 0, 1 - 1e-9)):
        if getattr(args, field) is not None and not low <= getattr(args, field) <= high:
            raise ValueError(f"--{field.replace('_', '-')} is {getattr(args, field)}, "
                             f"expected {low} to {high}")
    if args.init is not None and args.preset == "sd-v1" and args.image_size is None:
        args.image_size = PRESETS["sd-v1"].image_size       # the paper's, not the 512 px of the weights
    if args.init is not None and args.tokenizer is not None:
        raise ValueError("--tokenizer with --init: a checkpoint brings its own, leave one of the two out")
    if args.latents and (args.model != "diffdis" or args.augment or args.data == "shapes"):
        raise ValueError("--latents replaces pictures, which CLIP, --augment and the endless shapes need: "
                         "leave it out")
    if "alignment" in args.tasks and args.batch_size < 2:
        raise ValueError("--batch-size is 1, but alignment compares pairs within a batch: 2 or more")


def check_clip_args(args: argparse.Namespace) -> None:
    """A CLIP has one task and none of the method's choices. Raises ValueError."""
    given = [name for name in ("image_target", "text_target", "image_schedule", "text_schedule", "gamma",
                               "condition_timestep", "fusion", "shared_attention", "own_ffn", "align_blocks",
                               "train_text_encoder", "recompute") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is DiffDis's, and --model is {args.model}: "
                         "leave one of the two out")
    if args.tasks == ("generation",):
        raise ValueError(f"--tasks generation, but --model {args.model} only reads images")
    args.tasks = ("alignment",)


def settle(args: argparse.Namespace, device: torch.device) -> None:
    """Decide what the flags leave to the device, the data and the number of steps."""
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    args.workers = args.workers if args.workers is not None else 0 if args.data == "shapes" else 2
    if args.augment is None:        # whose captions are about colours and places
        args.augment = args.model != "diffdis" and args.data != "shapes"
    args.sample_every = args.sample_every or max(1, args.steps // 4)
    args.eval_every = args.eval_every or max(1, args.steps // 4)


def make_config(base: Config | ClipConfig, args: argparse.Namespace) -> Config | ClipConfig:
    """The preset's (or checkpoint's) configuration with the flags that were given."""
    def given(*names: str) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if isinstance(base, ClipConfig):
        if args.init is not None and args.image_size not in (None, base.image_size):
            raise ValueError(f"--image-size {args.image_size} with --init: a CLIP's positions are those of "
                             f"its size, {base.image_size} px")
        return replace(base, **given("image_size"))
    fusion = replace(base.fusion, **given("fusion", "shared_attention", "own_ffn", "align_blocks"))
    return replace(base, fusion=fusion, **given("image_size", "image_target", "text_target", "image_schedule",
                                                "text_schedule", "gamma", "condition_timestep"))


# ---------------------------------------------------------------- the loss (Algorithm 1)
def draw(config: Config, latent_shape: tuple, seed: int, step: int, rows: range) -> dict[str, Tensor]:
    """All that is random in one step for these rows of the global batch, each row from its own generator."""
    drawn = []
    for row in rows:
        generator = generator_of(seed, step, row)
        drawn.append({
            "t_image": torch.randint(config.timesteps, (), generator=generator),
            "t_text": torch.randint(config.timesteps, (), generator=generator),
            "u": torch.rand(2, generator=generator),          # against p_uncond and p_drop_image
            "noise": torch.randn(latent_shape, generator=generator),
            "query_noise": torch.randn(config.text.width, generator=generator),
            "posterior_noise": torch.randn(latent_shape, generator=generator)})
    return {name: torch.stack([row[name] for row in drawn]) for name in drawn[0]}


class Loss(nn.Module):
    """What the losses of DiffDis and CLIP share: a model, and how its functions are run."""

    def __init__(self, model: DiffDis | Clip, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.tasks, self.bf16 = model, args.tasks, args.precision == "bf16"

    def set_functions(self, args: argparse.Namespace, **functions: Callable) -> None:
        """Keep functions of a network, compiled if so asked, before DDP wraps this; shapes never change: each
        is compiled once with gradients, with --micro-batch also once without."""
        for name, function in functions.items():
            setattr(self, name, torch.compile(function, dynamic=False) if args.compile else function)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Products and convolutions in bfloat16; weights, their gradients and all losses in float32."""
        return (torch.autocast(self.model.device.type, torch.bfloat16) if self.bf16
                else contextlib.nullcontext())


class JointLoss(Loss):
    """Algorithm 1, both tasks in one forward: DDP sees every trainable parameter used exactly once a step.

    Pixels, latents and the text encoder's pass are shared by the tasks; InfoNCE, which needs the whole global
    batch, is for `backward` to add.
    """

    def __init__(self, model: DiffDis, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        self.p_uncond, self.p_drop_image = args.p_uncond, args.p_drop_image
        for name in ("image", "text"):
            table = make_alphas_cumprod(getattr(model.config, f"{name}_schedule"), model.config.timesteps)
            self.register_buffer(f"{name}_alphas", table)
        if args.recompute:
            model.unet.recompute_activations()
        # Functions of a UNet, not methods bound to this one: a copy of the module must run its own weights.
        self.set_functions(args, denoise_image=UNet.denoise_image, denoise_query=UNet.denoise_query,
                           denoise_both=UNet.denoise_both, encode_text=TextEncoder.forward,
                           encode_image=DiffDis.read_batch)

    @torch.no_grad()
    def encode(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """z = V(x): Batch.images -> latents, of the frozen autoencoder."""
        with self.autocast():
            return self.encode_image(self.model, images, drawn["posterior_noise"]).float()

    def noise_image(self, latents: Tensor, context: Tensor, null_context: Tensor, drawn: dict):
        """Eq. 4's z_t, t_z and c (the text query masked), and what the UNet should say."""
        t, noise = drawn["t_image"], drawn["noise"]
        context = torch.where((drawn["u"][:, 0] < self.p_uncond)[:, None, None], null_context, context)
        noisy_latents = q_sample(latents, t, noise, self.image_alphas)
        a, s = signal_and_noise(t, latents, self.image_alphas)
        kind = self.model.config.image_target
        return (noisy_latents, t, context), make_target(kind, latents, noise, a, s)

    def noise_query(self, latents: Tensor, text_query: Tensor, null_context: Tensor, drawn: dict):
        """Eq. 6's e_t and t_e, the clean image and the null prompt (the text condition masked)."""
        dropped = drawn["u"][:, 1] < self.p_drop_image
        latents = torch.where(dropped[:, None, None, None], 0.0, latents)
        noisy_query = q_sample(text_query.detach(), drawn["t_text"], drawn["query_noise"], self.text_alphas,
                               self.model.config.gamma)
        return noisy_query, drawn["t_text"], latents, null_context

    def forward(self, latents: Tensor, tokens: Tensor, drawn: dict[str, Tensor],
                only_embeddings: bool = False) -> dict[str, Tensor]:
        """latents [B, C, h, w], tokens [B, L], what `draw` drew -> "generation": its loss per pair [B];
        "x0_pred", "text_query": the embeddings that InfoNCE compares [B, D]; "logit_scale"."""
        model, config, out = self.model, self.model.config, {}
        draws, reads = "generation" in self.tasks and not only_embeddings, "alignment" in self.tasks
        with self.autocast():
            context, text_query = self.encode_text(model.text_encoder, tokens)
            null_context = model.text_encoder(model.null_tokens)[0]                          # [1, L, D]
            if draws:
                image, target = self.noise_image(latents, context, null_context, drawn)
            if reads:
                query = self.noise_query(latents, text_query, null_context, drawn)
            if draws and reads:
                pred, query_pred = self.denoise_both(model.unet, *image, *query)
            elif draws:
                pred = self.denoise_image(model.unet, *image)
            else:
                query_pred = self.denoise_query(model.unet, *query)
        if draws:
            out["generation"] = generation_loss(pred, target)
        if reads:
            noisy_query, t = query[:2]
            a, s = signal_and_noise(t, noisy_query, self.text_alphas, config.gamma)
            out["x0_pred"] = read_prediction(config.text_target, query_pred.float(), noisy_query, a, s)[0]
            out["text_query"], out["logit_scale"] = text_query, model.logit_scale
        return out


class ClipLoss(Loss):
    """CLIP's embeddings, under the names that `backward` knows: an image's takes the place of x0_pred."""

    def __init__(self, model: Clip, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        self.set_functions(args, encode_image=Clip.encode_image, encode_text=Clip.encode_tokens)

    def encode(self, images: Tensor, drawn: dict) -> Tensor:
        return self.model.read_batch(images)

    def forward(self, images: Tensor, tokens: Tensor, drawn: dict,
                only_embeddings: bool = False) -> dict[str, Tensor]:
        """images [B, 3, S, S], tokens [B, L] -> "x0_pred", "text_query" [B, D], "logit_scale"."""
        with self.autocast():
            return {"x0_pred": self.encode_image(self.model, images),
                    "text_query": self.encode_text(self.model, tokens), "logit_scale": self.model.logit_scale}


def make_loss(model: DiffDis | Clip, args: argparse.Namespace) -> Loss:
    return (ClipLoss if isinstance(model, Clip) else JointLoss)(model, args)


Part = tuple[Tensor, Tensor, dict[str, Tensor]]       # a micro-batch: latents, tokens, what `draw` drew


def contrast(outs: list[dict], align_weight: float) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """λ L_ITA over the embeddings of all parts and ranks -> loss and hit of each pair of this rank [B], and
    the gradients of each part's (x0_pred, text_query, logit_scale)."""
    leaves = [torch.cat([out[name].detach() for out in outs]).requires_grad_()
              for name in ("x0_pred", "text_query")]
    leaves.append(outs[0]["logit_scale"].detach().requires_grad_())
    losses, found = alignment_loss(*leaves)
    by_query, by_text, by_scale = torch.autograd.grad(align_weight * losses.mean(), leaves)
    sizes = [len(out["x0_pred"]) for out in outs]
    return losses.detach(), found, list(zip(by_query.split(sizes), by_text.split(sizes),
                                            [by_scale / len(outs)] * len(outs)))


def backward(joint: nn.Module, parts: list[Part], align_weight: float) -> dict[str, Tensor]:
    """Gradients of L = L_IG + λ L_ITA (Algorithm 1) over all parts of this rank's batch.

    InfoNCE is over the whole global batch however many parts it comes in: with more than one, a first pass
    gathers all embeddings without keeping anything else, and the second hands each part the gradient of its
    own (Gao et al. 2021). So memory is that of one part and the loss that of the batch.
    -> "generation", "alignment": loss of each pair [B]; "found": whether its own text is the most similar.
    """
    inner, count = getattr(joint, "module", joint), sum(len(latents) for latents, _, _ in parts)
    result, generation, outs = {}, [], []
    if len(parts) > 1 and "alignment" in inner.tasks:
        with torch.no_grad():
            outs = [inner(*part, only_embeddings=True) for part in parts]
        result["alignment"], result["found"], gradients = contrast(outs, align_weight)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        with contextlib.nullcontext() if last or joint is inner else joint.no_sync():
            out = joint(*part)
            if "alignment" in inner.tasks and len(parts) == 1:
                result["alignment"], result["found"], gradients = contrast([out], align_weight)
            heads = []
            if "generation" in out:
                heads.append((out["generation"].sum() / count, None))
                generation.append(out["generation"].detach())
            if "alignment" in inner.tasks:
                heads += [(out[name], gradient) for name, gradient in
                          zip(("x0_pred", "text_query", "logit_scale"), gradients[i])
                          if out[name].requires_grad]
            torch.autograd.backward(*zip(*heads))
    if generation:
        result["generation"] = torch.cat(generation)
    return result


# ---------------------------------------------------------------- optimiser
def freeze_unused(model: DiffDis | Clip, tasks: tuple[str, ...], train_text_encoder: bool) -> None:
    """Take gradients away from what these tasks never use, and from what is frozen by design."""
    if isinstance(model, Clip):
        return
    model.autoencoder.requires_grad_(False)
    model.text_encoder.requires_grad_(train_text_encoder)
    for name, parameter in model.named_parameters():
        if "alignment" not in tasks and is_new(name):
            parameter.requires_grad_(False)
        if "generation" not in tasks and name.startswith(
                ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")):
            parameter.requires_grad_(False)


def make_optimizer(model: DiffDis | Clip, args: argparse.Namespace, pretrained: bool) -> torch.optim.AdamW:
    """AdamW over (new or pretrained) × (matrix or vector) groups;
    vectors and the temperature are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trainable.items():
        groups.setdefault((pretrained and not is_new(name), parameter.dim() >= 2), []).append(parameter)
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids)) == len(trainable) and all(groups.values()), \
        "groups must partition the parameters"
    return torch.optim.AdamW(
        [{"params": params, "peak_lr": args.lr_pretrained if old else args.lr,
          "weight_decay": args.weight_decay if matrix else 0.0} for (old, matrix), params in groups.items()],
        lr=args.lr, betas=(0.9, args.beta2), fused=True)


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Share of the peak rate at this step: a function of the global step alone, whatever the ranks."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    if args.lr_decay == "constant":
        return 1.0
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Averages:
    """Exponential moving average of the trainable parameters, in float32, by name."""

    def __init__(self, model: nn.Module, decay: float, on_cpu: bool = False) -> None:
        self.decay, self.device = decay, torch.device("cpu") if on_cpu else model.device
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().float().to(self.device, copy=True) for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))     # early on, do not remember the random start
        live = [p.to(self.device, torch.float32) for p in self.live.values()]
        torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    def swap(self) -> None:
        """Exchange averages and live weights; call twice to get back."""
        for name, parameter in self.live.items():
            kept = parameter.data.clone()
            parameter.data.copy_(self.values[name])
            self.values[name].copy_(kept)


# ---------------------------------------------------------------- what a step costs
def count_flops(config: Config | ClipConfig, tokenizer: Tokenizer, args: argparse.Namespace, train_text: bool,
                pairs: int, cached: bool = False) -> float:
    """FLOPs per pair of one training step on so many, forward and backward, two per multiply-add, counted by
    running it on tensors without storage. Recomputed activations do not count: "model FLOPs"."""
    plain = argparse.Namespace(**{**vars(args), "compile": False, "recompute": False, "precision": "fp32"})
    size = config.image_size
    with torch.device("meta"):
        model = (Clip if isinstance(config, ClipConfig) else DiffDis)(config, tokenizer)
        freeze_unused(model, args.tasks, train_text)
        joint, drawn = make_loss(model, plain), {}
        images = torch.empty(pairs, size, size, 3, dtype=torch.uint8)
        if isinstance(model, DiffDis):
            shape, t = model.latent_shape(size, size), torch.zeros(pairs, dtype=torch.int64)
            noise = torch.empty(pairs, *shape)
            drawn = {"t_image": t, "t_text": t, "u": torch.empty(pairs, 2), "noise": noise,
                     "query_noise": torch.empty(pairs, config.text.width), "posterior_noise": noise}
            if cached:
                images = torch.empty(pairs, 2 * shape[0], *shape[1:], dtype=torch.float16)
        with FlopCounterMode(display=False) as counter:
            tokens = torch.zeros(pairs, config.text.context_length, dtype=torch.int64)
            out = joint(joint.encode(images, drawn), tokens, drawn)
            sum(value.sum() for value in out.values() if value.requires_grad).backward()
    return counter.get_total_flops() / pairs


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak, None where this table does not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held: of the device's, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ---------------------------------------------------------------- run folder, log
class Run:
    """The run's folder: checkpoint, log, pictures. Only rank 0 writes."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        # torchrun starts a failed run's processes again with the command they had: then they are to go on.
        args.resume = args.resume or restarts() > 0
        self.rank = rank
        folder = [self.claim_folder(args) if rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        self.checkpoint, self.log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        self.best = self.folder / "best.pt"
        if self.checkpoint.exists() and not args.resume:
            raise ValueError(f"{self.folder} holds a run: add --resume to go on with it, "
                             "or choose another --out")

    @staticmethod
    def claim_folder(args: argparse.Namespace) -> Path:
        """--out, or runs/NAME, or the first runs/NAME-k that nobody has
        (to resume: the newest that has a checkpoint)."""
        data = Path(args.data).resolve().name if args.data not in ("shapes", "cc3m") else args.data
        kind = args.preset if args.model == "diffdis" else args.model
        names = [Path("runs") / f"{data}-{kind}{number}"
                 for number in ("", *(f"-{k}" for k in range(2, 1000)))]
        started = [path for path in names if (path / "checkpoint.pt").exists()]
        # One torchrun's ranks have one parent however often it starts them: again, they take its folder.
        agent = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"
        ours = [path for path in names if (path / ".torchrun").is_file()
                and (path / ".torchrun").read_text() == agent]
        if args.out:
            folder = Path(args.out)
        elif restarts() and ours:
            folder = ours[-1]
        elif args.resume and started and not restarts():
            folder = max(started, key=lambda path: (path / "checkpoint.pt").stat().st_mtime)
        else:
            folder = next(path for path in names if not path.exists())
            folder.mkdir(parents=True)             # fails, rather than share, if another run was quicker
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            (folder / ".torchrun").write_text(agent)
        return folder

    def abandon(self) -> None:
        """Take the folder away again if nothing but its beginnings is in it."""
        if self.rank == 0 and not self.checkpoint.exists():
            with contextlib.suppress(OSError):
                for name in ("log.jsonl", ".torchrun"):
                    (self.folder / name).unlink(missing_ok=True)
                (self.folder / "samples").rmdir()
                self.folder.rmdir()

    def start_log(self, step: int) -> None:
        """Keep the log's lines up to this step: what came later is about to be done again."""
        if self.rank == 0:
            kept = [line for line in read_log(self.log) if line["step"] <= step] if step else []
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.log, lambda file: file.write(text.encode()))

    def write(self, record: dict) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(record) + "\n")

    def keep_as(self, path: Path) -> None:
        """Give the checkpoint a second name, under which it outlives the next save: a link where the file
        system has them, which costs nothing, else a copy."""
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        try:
            os.link(self.checkpoint, part)
        except OSError:
            shutil.copyfile(self.checkpoint, part)
        os.replace(part, path)
        part.unlink(missing_ok=True)       # still there if both were names of one file already

    def older(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-[0-9]*.pt"), key=lambda path: int(path.stem.split("-")[1]))


class Meter:
    """What happened between two lines of the log: time, waiting for data, losses by timestep."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.began, self.waited, self.idle, self.steps = time.monotonic(), 0.0, 0.0, 0
        self.losses: dict[str, list[Tensor]] = {task: [] for task in TASKS}
        self.bins: dict[str, list[Tensor]] = {task: [] for task in TASKS}

    @contextlib.contextmanager
    def waiting(self):
        """For time spent waiting for the next batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self):
        """For what is no part of training's speed: saving, drawing, scoring."""
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began

    def add_losses(self, losses: dict, drawn: dict, timesteps: int) -> None:
        self.steps += 1
        for task, t in (("generation", "t_image"), ("alignment", "t_text")):
            if task in losses and t in drawn:
                self.losses[task].append(losses[task].detach())
                self.bins[task].append(drawn[t] * BINS // timesteps)

    def read(self, pairs: float, flops: float) -> dict:
        """pairs: of this rank per step; flops: per pair -> its numbers since the last call."""
        took, peak, result = time.monotonic() - self.began - self.idle, peak_flops(self.device), {}
        speed = self.steps * pairs / took
        for task in TASKS:
            values = torch.cat(self.losses[task]).cpu() if self.losses[task] else torch.zeros(0)
            bins = torch.cat(self.bins[task]) if self.bins[task] else torch.zeros(0, dtype=torch.int64)
            result[f"{task}_sums"] = np.bincount(bins.numpy(), values.double().numpy(), BINS)
            result[f"{task}_counts"] = np.bincount(bins.numpy(), minlength=BINS)
        result |= {"images_per_s": speed, "data_wait": self.waited / took,
                   "memory_gib": memory_gib(self.device),
                   "mfu": round(speed * flops / peak, 4) if peak else None}
        self.restart()
        return result


def read_log(path: Path) -> list[dict]:
    """The lines of a log, those passed over that a killed process or a full disk left incomplete."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return lines


def draw_curves(log: Path, path: Path, size: tuple[int, int] = (480, 240)) -> None:
    """A run's log as a picture: a panel each for the losses, accuracy and held-out scores, over steps."""
    lines = read_log(log)
    if not lines:
        return
    panels = [[name] for name in ("loss_generation", "loss_alignment", "accuracy") if name in lines[-1]]
    scores = sorted({name for line in lines for name in line if name.startswith("val_")})
    panels += [part for part in ([n for n in scores if "error" not in n], [n for n in scores if "error" in n])
               if part]
    width, height, edge = *size, 34
    picture = Image.new("RGB", (2 * width, -(-len(panels) // 2) * height), "white")
    pen, colours = ImageDraw.Draw(picture), ("#1f5fa8", "#c2571a")
    last = max(line["step"] for line in lines)
    for k, names in enumerate(panels):
        left, top = k % 2 * width + edge, k // 2 * height + edge
        right, bottom = left + width - 2 * edge, top + height - 2 * edge
        drawn = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
        values = [value for points in drawn.values() for _, value in points]
        low, high = min(0.0, min(values)), max(values) or 1.0
        pen.rectangle((left, top, right, bottom), outline="#999999")
        pen.text((left - 30, top), f"{high:.3g}", fill="black")
        pen.text((left - 30, bottom - 10), f"{low:.3g}", fill="black")
        pen.text((right - 60, bottom + 4), f"step {last}", fill="black")
        for j, (name, points) in enumerate(drawn.items()):
            pen.text((left + 150 * j, top - 14), name, fill=colours[j % 2])
            at = [(left + (right - left) * step / last,
                   bottom - (bottom - top) * (value - low) / (high - low)) for step, value in points]
            pen.line(at, fill=colours[j % 2], width=2) if len(at) > 1 else pen.point(at, fill=colours[j % 2])
    write_atomically(path, lambda file: picture.save(file, "PNG"))


# ---------------------------------------------------------------- setting up
def say_what_is_there(source: Source, args: argparse.Namespace) -> None:
    """How many samples training has, how many it has lost already, and whether a batch fits."""
    lost = ", ".join(f"{count} {cause}" for cause, count in sorted(source.skipped.items()) if count)
    print(f"data: {len(source):,} samples of {args.data}; left out: {lost or 'none'}")
    if "alignment" in args.tasks and args.batch_size > len(source):
        print(f"warning: a batch of {args.batch_size} out of {len(source)} samples holds some twice, which "
              "the alignment loss takes for different ones: lower --batch-size", file=sys.stderr)


def make_model(args: argparse.Namespace, source: Source, checkpoint: dict | None) -> DiffDis | Clip:
    """A model from scratch, from --init, or as the run's checkpoint describes it
    (weights are loaded later)."""
    torch.manual_seed(args.seed)
    if checkpoint is not None:
        return models.build(checkpoint, "the run's checkpoint")
    if args.init is not None:
        model = models.load(args.init, weights="raw", adapt=lambda config: make_config(config, args))
        if isinstance(model, Clip) != (args.model != "diffdis"):
            raise ValueError(f"--init {args.init} is a {type(model).__name__}, and --model is {args.model}")
        model.tasks = tuple(task for task in TASKS if task in model.tasks or task in args.tasks)
        model.data = args.data if args.data == model.data else None       # None: on more than that
        return model.train().requires_grad_(True)
    config = make_config(PRESETS[args.preset] if args.model == "diffdis" else CLIPS[args.model], args)
    length = config.text.context_length
    if args.tokenizer is not None:
        tokenizer = Tokenizer.from_file(args.tokenizer, length)
    else:
        captions = chain.from_iterable(usable_captions(source, 100_000))
        tokenizer = Tokenizer.learn(captions, config.text.vocab_size, length)
    config = replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))
    model = (DiffDis if args.model == "diffdis" else Clip)(config, tokenizer)
    model.tasks, model.data = args.tasks, args.data
    return model


@torch.no_grad()
def add_latents(source: Source, model: DiffDis, args: argparse.Namespace) -> None:
    """--latents: what the frozen autoencoder makes of all of a source's images, to be read in place of these.

    DIR/NAME.npy holds mean and log-variance, float16 [N, 2C, h, w], mapped, NaN for an unusable image;
    NAME.done.npy says which rows are there. NAME is of data, size and autoencoder: others make others. All
    ranks, which must see the same folder, encode what is missing; a stopped run goes on where it was.
    """
    (rank, world), size, folder = rank_and_world(), model.config.image_size, Path(args.latents)
    digest = hashlib.sha256(repr((len(source), size, model.config.autoencoder)).encode())
    for i in np.linspace(0, len(source) - 1, 1000):        # keys would be the same for many data sets
        with contextlib.suppress(BadSample):
            digest.update(source.content(int(i), "image"))
    for value in model.autoencoder.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    path = folder / f"{digest.hexdigest()[:16]}.npy"
    marks = path.with_suffix(".done.npy")
    if rank == 0 and not marks.exists():
        channels, height, width = model.latent_shape(size, size)
        folder.mkdir(parents=True, exist_ok=True)
        need, free = len(source) * 4 * channels * height * width, shutil.disk_usage(folder).free
        print(f"latents: {path}, {need / 2 ** 30:.1f} GiB")
        if free < need:       # a mapped file would end the program by a signal when the disk is full
            raise ValueError(f"{folder} has {free / 2 ** 30:.1f} GiB left: make room, or name another folder")
        np.lib.format.open_memmap(path, "w+", np.float16, (len(source), 2 * channels, height, width))
        np.lib.format.open_memmap(marks, "w+", bool, (len(source),))
    everybody(None)
    np.load(path, "r")         # raises ValueError on a file cut short, which "r+" would fill up with zeros
    moments, done = np.load(path, "r+"), np.load(marks, "r+")
    todo = np.array_split(np.flatnonzero(~done), world)[rank]
    everybody(None)            # each has its share before any is marked as done
    with tqdm(total=len(todo), unit="image", desc="latents", disable=None if rank == 0 else True) as bar:
        for batch in evaluation_batches(source.subset(todo), size, 32, args.workers):
            rows, images = todo[list(batch.places)], to_float(batch.images.to(model.device))
            moments[rows] = torch.cat(model.autoencoder.moments(images), dim=1).half().cpu().numpy()
            done[rows] = True
            bar.update(batch.visited)
    unusable = todo[~done[todo]]
    moments[unusable], done[unusable] = np.nan, True
    moments.flush()
    done.flush()
    everybody(None)
    source.moments = moments


def check_resume(checkpoint: dict, args: argparse.Namespace) -> None:
    """A resumed run must be the same run. Raises ValueError naming the flags that differ."""
    if checkpoint["training"] is None:
        raise ValueError("--resume: that checkpoint was saved without the state of a training run; "
                         "start a new one from its weights with --init")
    before, now = checkpoint["training"]["args"], run_flags(args)
    differ = [f"--{k.replace('_', '-')} was {before.get(k)}, is {v}"
              for k, v in now.items() if before.get(k) != v]
    if differ:
        raise ValueError(f"--resume with other flags than the run began with: {'; '.join(differ)}")


def run_flags(args: argparse.Namespace) -> dict:
    """The flags that decide what is computed, as plain values."""
    flags = {**vars(args), "latents": args.latents is not None}        # wherever they lie
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flags.items() if k not in FREE_ON_RESUME}


def start_ranks(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if it does -> rank, number of ranks, device."""
    rank, world, device = join_ranks(args.device)
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared evenly by {world} ranks")
    if args.batch_size // world % (args.micro_batch or 1):
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide the {args.batch_size // world} "
                         "pairs of a rank's share of --batch-size")
    return rank, world, device


class Trainer:
    """Everything a run holds, so that saving and resuming are each one method."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.run = Run(args, rank)
        try:
            self.set_up()
        except (ValueError, OSError):
            self.run.abandon()       # a mistake in the flags should not cost a name
            raise

    def set_up(self) -> None:
        """All of it from the flags, or from the run's checkpoint. Raises ValueError or OSError."""
        args, rank, world, device = self.args, self.rank, self.world, self.device
        self.step, self.report = 0, SkipReport(args.max_bad)
        self.total_report = self.report          # over all ranks, as of the last save
        self.best, self.best_step, self.scores = -1.0, -1, {}
        self.stop_signal, self.stopping, self.laid_out = 0, False, False
        checkpoint = models.read_checkpoint(self.run.checkpoint) if self.run.checkpoint.exists() else None
        if checkpoint is not None:
            check_resume(checkpoint, args)
        source = in_turn(lambda: open_source(args.data, "train"))
        check_index(source, args.max_bad)
        if rank == 0 and args.data != "shapes":       # which is made as it is needed
            say_what_is_there(source, args)
        self.source, self.val = hold_out(source, args.val)
        if args.init is not None:
            in_turn(lambda: models.locate(args.init))
        self.model = make_model(args, self.source, checkpoint)
        self.trains_text = args.init is None if args.train_text_encoder is None else args.train_text_encoder
        freeze_unused(self.model, args.tasks, self.trains_text)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
        self.model.to(device, memory_format=torch.channels_last)
        if args.latents:
            add_latents(source, self.model, args)
            self.source, self.val = hold_out(source, args.val)      # again: now they have the latents
        self.optimizer = make_optimizer(self.model, args, pretrained=args.init is not None)
        self.averages = Averages(self.model, args.ema, args.ema_on_cpu)
        if checkpoint is not None:
            self.restore(checkpoint)
        self.flops = count_flops(self.model.config, self.model.tokenizer, args, self.trains_text,
                                 args.batch_size // world, args.latents is not None)
        self.joint = self.loss = make_loss(self.model, args).to(device)
        if world > 1:
            # Every parameter is used in every step, the buffers never change, and gradients need no second
            # copy beside the buckets they are sent in.
            self.loss = DistributedDataParallel(
                self.loss, device_ids=[device.index] if device.type == "cuda" else None,
                find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.meter = Meter(device)
        self.run.start_log(self.step)
        if checkpoint is None:
            self.check_disk()
            self.save()          # what cannot be written is found now, not after hours

    def restore(self, checkpoint: dict) -> None:
        training = checkpoint["training"]
        self.optimizer.load_state_dict(training["optimizer"])
        for name, value in checkpoint["ema"].items():
            self.averages.values[name].copy_(value)
        self.step = training["step"]
        self.best, self.best_step = training.get("best", (-1.0, -1))
        if self.rank == 0 and self.best_step == self.step:       # killed before it had its second name?
            self.run.keep_as(self.run.best)
        if self.rank == 0:       # the others count from 0: theirs is in the sum
            self.report.add(training["skipped"]["skipped"], training["skipped"]["visited"])

    # ------------------------------------------------------------ what is written
    def check_disk(self) -> None:
        """Raises ValueError if the run's checkpoints will not fit; they grow when Adam has seen gradients."""
        whole = sum(p.numel() * 4 for p in self.model.parameters())
        trained = sum(p.numel() * 4 for p in self.averages.live.values())
        # one more is being written while the last is kept, and the best may be another
        need = (whole + 3 * trained) * (self.args.keep + 1 + ("alignment" in self.args.tasks))
        free = shutil.disk_usage(self.run.folder).free
        if self.rank == 0 and free < need:
            raise ValueError(f"{self.run.folder} has {free / 2 ** 30:.1f} GiB left, its checkpoints will "
                             f"need {need / 2 ** 30:.1f}: make room, choose another --out, or lower --keep")

    def save(self, is_best: bool = False) -> None:
        """Write the checkpoint. Every rank calls it: what each has seen is put together."""
        self.total_report = SkipReport(self.args.max_bad)
        for report in everybody(self.report):
            self.total_report.add(report.skipped, report.visited)
        if self.rank == 0:
            if self.args.keep > 1 and self.run.checkpoint.exists():
                step = models.read_checkpoint(self.run.checkpoint)["training"]["step"]
                self.run.keep_as(self.run.folder / f"checkpoint-{step:06d}.pt")
            models.save(self.run.checkpoint, self.model, self.averages.values, {
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "best": (self.best, self.best_step),
                "skipped": self.total_report.counts(), "args": run_flags(self.args)})
            if is_best:
                self.run.keep_as(self.run.best)
            for path in self.run.older()[:-(self.args.keep - 1) or None]:
                path.unlink()

    # ------------------------------------------------------------ one step
    def split(self, batch: Batch) -> list[Part]:
        """A batch of this rank as micro-batches on the device, latents encoded."""
        def move(values: Tensor) -> Tensor:
            values = values.pin_memory() if self.device.type == "cuda" else values
            return values.to(self.device, non_blocking=True)
        size, parts = self.args.micro_batch or len(batch.keys), []
        images, tokens = move(batch.images), move(batch.tokens)
        drawn = {name: move(value) for name, value in (batch.drawn or {}).items()}
        for first in range(0, len(batch.keys), size):
            rows = slice(first, first + size)
            some = {name: value[rows] for name, value in drawn.items()}
            parts.append((self.joint.encode(images[rows], some), tokens[rows], some))
        return parts

    def train_step(self, batch: Batch) -> dict:
        """One gradient step on a batch -> what to log."""
        args, factor = self.args, learning_rate_factor(self.step, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.split(batch)
        if self.world > 2 and not self.laid_out:
            # After its first backward pass DDP lays out its buckets anew, and sums over more than two ranks
            # round by their layout: a pass for nothing, so that a resumed run's first step is as any other.
            backward(self.loss, parts, args.align_weight)
            self.optimizer.zero_grad(set_to_none=True)
            self.laid_out = True
        losses = backward(self.loss, parts, args.align_weight)
        norm = nn.utils.clip_grad_norm_(self.averages.live.values(), args.grad_clip or math.inf)
        record = self.agree(losses, norm)
        if not all(map(math.isfinite, record.values())):
            self.stop_not_finite(losses, batch)
        self.optimizer.step()
        with torch.no_grad():
            # As CLIP. Here and not in the loss, where a clamp would leave no gradient to come back by.
            self.model.logit_scale.clamp_(0, math.log(100))
        self.averages.update(self.step)
        self.meter.add_losses(losses, batch.drawn or {}, getattr(self.model.config, "timesteps", 1))
        self.step += 1
        return {**record, "lr": args.lr * factor}

    def agree(self, losses: dict, norm: Tensor) -> dict:
        """The step's numbers over all ranks, among them whether any has been told to stop; the one place of a
        step that waits for the device."""
        means = {f"loss_{task}": losses[task].mean() for task in self.args.tasks}
        weights = {"loss_generation": 1.0, "loss_alignment": self.args.align_weight}
        record = {"loss": sum(weights[name] * value for name, value in means.items()), **means}
        if "found" in losses:
            record["accuracy"] = losses["found"].float().mean()
        record["stop"] = torch.tensor(float(self.stop_signal > 0), device=self.device)
        values = torch.stack(list(record.values()))
        if self.world > 1:
            dist.all_reduce(values)
        record = dict(zip([*record, "grad_norm", "logit_scale"], torch.cat(
            [values / self.world, torch.stack([norm, self.model.logit_scale.detach()])]).tolist()))
        self.stopping = record.pop("stop") > 0
        return record

    def stop_not_finite(self, losses: dict, batch: Batch) -> None:
        """Raises ValueError naming step, task, timesteps and samples, on every rank; the last checkpoint, the
        weights and the averages are untouched."""
        told = []
        for task, t in (("generation", "t_image"), ("alignment", "t_text")):
            bad = (~torch.isfinite(losses[task])).cpu().nonzero().flatten().tolist() if task in losses else []
            if bad:
                times = [int(batch.drawn[t][i]) for i in bad[:5]] if batch.drawn else "none"
                told.append(f"the {task} loss is not finite for {len(bad)} of {len(batch.keys)} pairs, first "
                            f"at timesteps {times}, samples {[batch.keys[i] for i in bad[:5]]}")
        told = list(chain.from_iterable(everybody(told))) or ["the losses are finite, their gradient is not"]
        raise ValueError(f"step {self.step}: {'; '.join(told)}; {START_OVER}")

    # ------------------------------------------------------------ the loop
    def batches(self):
        args, config, drawn = self.args, self.model.config, None
        if isinstance(self.model, DiffDis):
            shape = self.model.latent_shape(config.image_size, config.image_size)
            drawn = partial(draw, config, shape, args.seed,
                            rows=range(self.rank, args.batch_size, self.world))
        return training_batches(self.source, config.image_size, args.batch_size, args.seed, self.step,
                                args.workers, rank=self.rank, world=self.world, augment=args.augment,
                                tokenizer=self.model.tokenizer, shuffle_buffer=args.shuffle_buffer,
                                draw=drawn)

    def train(self) -> bool:
        """The steps that are left -> whether they were all done; False when a signal said to stop."""
        args, batches = self.args, self.batches()
        before = {number: signal.signal(number, self.note_signal)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=args.steps, initial=self.step, unit="step", disable=None if self.rank == 0 else True)
        try:
            while self.step < args.steps:
                with self.meter.waiting():
                    batch = next(batches)
                self.report.add(batch.skipped, batch.visited)
                self.report.check()
                record = self.train_step(batch)
                bar.update()
                end = self.step == args.steps
                scores, saves = self.step % args.eval_every == 0 or end, self.step % args.save_every == 0
                with self.meter.paused():
                    is_best = scores and self.evaluate()
                # Before each save: what the log sums up must start anew where a resumed run will.
                if self.step % args.log_every == 0 or scores or saves or self.stopping:
                    self.log(record, bar)
                with self.meter.paused():
                    if saves or is_best or end or self.stopping:
                        self.save(is_best)
                    if self.step % args.sample_every == 0 or end:
                        self.draw_samples()
                if self.stopping:
                    break
        finally:
            batches.close()       # its processes ignore signals: they end when told to
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.step == args.steps

    def note_signal(self, number: int, frame) -> None:
        self.stop_signal = number

    def log(self, record: dict, bar: tqdm) -> None:
        """A line of log.jsonl: this step's numbers, and what happened since the last line, over all ranks."""
        mine = self.meter.read(self.args.batch_size / self.world, self.flops)
        ranks = everybody((mine, self.report.skipped))
        if self.rank:
            return
        first, skipped = ranks[0][0], sum((skips for _, skips in ranks), start=Counter())
        losses = {}
        for task in self.args.tasks:
            sums, counts = (sum(r[0][f"{task}_{name}"] for r in ranks) for name in ("sums", "counts"))
            if counts.any():      # a CLIP has no timesteps
                losses[f"loss_{task}_by_t"] = [round(s / n, 6) if n else None for s, n in zip(sums, counts)]
        record = {"step": self.step, **record, **losses,
                  "images_per_s": round(sum(r[0]["images_per_s"] for r in ranks), 1),
                  "data_wait": round(max(r[0]["data_wait"] for r in ranks), 4),
                  "memory_gib": round(max(r[0]["memory_gib"] for r in ranks), 2), "mfu": first["mfu"],
                  "skipped": skipped.total(), "skipped_by_cause": dict(sorted(skipped.items())),
                  **self.scores}
        self.scores = {}
        self.run.write(record)
        bar.set_postfix({name.removeprefix("loss_"): f"{record[name]:.3f}" for name in
                         ("loss_generation", "loss_alignment") if name in record}
                        | {"images/s": f"{record['images_per_s']:.0f}"})

    @contextlib.contextmanager
    def averaged(self):
        """The model in eval mode with its averaged weights, for as long as this lasts."""
        self.averages.swap()
        try:
            yield self.model.eval()
        finally:
            self.averages.swap()
            self.model.train()

    def evaluate(self) -> bool:
        """Scores of the averaged weights on the held-out pairs, by all ranks together -> the best so far?
        The denoising error is that of a hundred of them."""
        task, names = "zeroshot" if self.val.classes else "retrieval", []
        # Training has judged the share of bad samples; this handful is too few to.
        flags = evaluate.parse_args([task, "--seed", str(self.args.seed), "--max-bad", "1",
                                     "--batch-size", str(min(100, self.args.micro_batch or 100))])
        with self.averaged() as model:
            if "alignment" in self.args.tasks:
                result = evaluate.TASKS[task][0](model, self.val, flags)
                names = ["top1"] if task == "zeroshot" else ["i2t_r1", "t2i_r1"]
                self.scores = {f"val_{name}": round(result[name], 6) for name in names}
            if "generation" in self.args.tasks:
                error, _ = evaluate.denoising_error(model, evenly_spaced(self.val, 100), flags)
                self.scores["val_denoising_error"] = round(error, 6)
        if not names:
            return False
        score = sum(self.scores[f"val_{name}"] for name in names) / len(names)
        if score <= self.best:
            return False
        self.best, self.best_step = score, self.step
        return True

    def draw_samples(self, count: int = 32) -> None:
        """A grid for the first validation captions, always the same prompts and noise,
        with the averaged weights."""
        if "generation" not in self.args.tasks or self.rank:
            return
        prompts = [captions[0] for captions in usable_captions(self.val, count)]
        with self.averaged() as model:
            images = draw_images(model, prompts, list(range(len(prompts))), steps=25)
        path = self.run.folder / "samples" / f"step_{self.step:06d}.png"
        make_grid(images, columns=8, scale=max(1, 96 // images.shape[3])).save(path)

    def validate(self) -> None:
        """The run's last word: what the averaged weights can do on pairs that training never saw."""
        print(f"\nvalidation of the averaged weights on {len(self.val)} held-out pairs of {self.args.data}")
        model = models.load(self.run.checkpoint, self.device)
        flags = ["--seed", str(self.args.seed)]
        if "alignment" in self.args.tasks:
            task = "zeroshot" if self.val.classes else "retrieval"
            evaluate.report(task, model, self.val, evaluate.parse_args([task, *flags, "--max-bad", "1"]))
        if "generation" in self.args.tasks and self.args.data == "shapes":
            evaluate.report("checker", model, None, evaluate.parse_args(["checker", *flags]))


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    try:
        args = parse_args(argv)
        rank, world, device = start_ranks(args)
        settle(args, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")       # TF32 for what stays in float32
            torch.backends.cudnn.benchmark = True            # shapes never change: try, then take the fastest
        trainer = Trainer(args, rank, world, device)
        if rank == 0:
            count = sum(p.numel() for p in trainer.averages.live.values())
            print(f"run: {trainer.run.folder}  seed: {args.seed}  device: {device} x {world}  "
                  f"{args.precision}  trainable parameters: {count:,}  step: {trainer.step} of {args.steps}  "
                  f"GFLOPs per pair: {trainer.flops / 1e9:.1f}", flush=True)
        done = trainer.train()
        if rank == 0:
            print(trainer.total_report)
            print(f"{'trained' if done else 'stopped'} after {time.monotonic() - started:.0f} s; "
                  f"wrote {trainer.run.checkpoint}")
            draw_curves(trainer.run.log, trainer.run.folder / "log.png")
            if done and args.validate:
                if dist.is_initialized():      # from here on this rank works alone
                    dist.destroy_process_group()
                trainer.validate()
            elif not done:
                print(f"stopped by {signal.Signals(trainer.stop_signal or signal.SIGTERM).name} after step "
                      f"{trainer.step} of {args.steps}; to go on, give the same command with --resume "
                      f"--out {trainer.run.folder}")
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:       # before or after the steps, which have their own way to stop
        fail("stopped by Ctrl-C", 130)
    finally:
        # DDP holds on to the process group, and a thread of it that still cleans up while Python ends would
        # abort the process: let both go first.
        trainer = None
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
