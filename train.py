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
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import model as models
from data import SkipReport, Source, Tokenizer, check_index, hold_out, open_source, training_batches, words
from diffusion import (alignment_loss, generation_loss, generator_of, make_alphas_cumprod, make_target,
                       q_sample, read_prediction, signal_and_noise)
from model import PRESETS, SCHEDULES, TARGETS, Config, DiffDis, UNet, is_new
from sample import Parser, draw_images, fail, finite, make_grid, natural, pick_device, positive

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
START_OVER = "the last checkpoint is from before it: start anew from that one with --init and a lower --lr"
# Flags that may differ between a run and its resumption without changing what is computed.
FREE_ON_RESUME = ("resume", "out", "device", "workers", "log_every", "save_every", "sample_every")


# ---------------------------------------------------------------- command line
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train DiffDis.")
    for title, add_flags in (("the run", add_run_flags), ("optimisation", add_optimisation_flags),
                             ("the method and its ablations", add_method_flags)):
        group = parser.add_argument_group(title)

        def add(flag: str, help: str, group=group, **kwargs) -> None:
            field = flag.strip("-").replace("-", "_")
            if field in RECIPES["tiny"]:        # the default depends on the preset: show all three
                help += f" (default: {', '.join(f'{name} {r[field]}' for name, r in RECIPES.items())})"
                kwargs["default"] = argparse.SUPPRESS
            group.add_argument(flag, help=help, **kwargs)
        add_flags(add, dict(action=argparse.BooleanOptionalAction, default=None))
    args = parser.parse_args(argv)
    for field, value in RECIPES[args.preset].items():
        if not hasattr(args, field):
            setattr(args, field, value)
    check_args(args)
    return args


def add_run_flags(add: Callable, switch: dict) -> None:
    add("--data", "shapes, cc3m, or a folder of tars, class folders or captioned images", default="shapes")
    add("--preset", "size of the networks, and recipe; with --init the recipe alone",
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
    add("--sample-every", "steps between sample grids; without it a quarter of the steps", type=positive)


def add_optimisation_flags(add: Callable, switch: dict) -> None:
    add("--steps", "gradient steps", type=positive)
    add("--batch-size", "image-caption pairs per step, over all ranks", type=positive)
    add("--lr", "peak learning rate of AdamW", type=finite)
    add("--lr-pretrained", "the same for weights that came with --init", type=finite)
    add("--lr-decay", "after warm-up", choices=("cosine", "constant"))
    add("--warmup", "steps over which the learning rate rises", type=natural)
    add("--beta2", "AdamW's decay of squared gradients; beta1 is 0.9", type=finite)
    add("--weight-decay", "AdamW's, on matrices and kernels only", type=finite)
    add("--grad-clip", "largest norm of the gradient; 0: no limit", type=finite, default=1.0)
    add("--ema", "decay of the averaged weights per step", type=finite)


def add_method_flags(add: Callable, switch: dict) -> None:
    add("--align-weight", "λ, weight of the alignment loss", type=finite)
    add("--p-uncond", "share of captions replaced by the empty prompt (generation)", type=finite, default=0.1)
    add("--p-drop-image", "share of images dropped (alignment)", type=finite, default=0.1)
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
    if not args.tasks or set(args.tasks) - set(TASKS):
        raise ValueError(f"--tasks is {','.join(args.tasks)!r}, "
                         "expected generation, alignment, or both with a comma")
    for field, low, high in (("p_uncond", 0, 1), ("p_drop_image", 0, 1), ("ema", 0, 1), ("max_bad", 0, 1),
                             ("lr", 0, math.inf), ("lr_pretrained", 0, math.inf), ("warmup", 0, math.inf),
                             ("weight_decay", 0, math.inf), ("grad_clip", 0, math.inf), ("val", 1, math.inf),
                             ("align_weight", 0, math.inf), ("beta2", 0, 1 - 1e-9)):
        if not low <= getattr(args, field) <= high:
            raise ValueError(f"--{field.replace('_', '-')} is {getattr(args, field)}, "
                             f"expected {low} to {high}")
    if args.init is not None and args.preset == "sd-v1" and args.image_size is None:
        args.image_size = PRESETS["sd-v1"].image_size       # the paper's, not the 512 px of the weights
    if args.init is not None and args.tokenizer is not None:
        raise ValueError("--tokenizer with --init: a checkpoint brings its own, leave one of the two out")
    if "alignment" in args.tasks and args.batch_size < 2:
        raise ValueError("--batch-size is 1, but alignment compares pairs within a batch: 2 or more")


def make_config(base: Config, args: argparse.Namespace) -> Config:
    """The preset's (or checkpoint's) configuration with the flags that were given."""
    def given(*names: str) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
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


class JointLoss(nn.Module):
    """Both tasks in one forward, so that DDP sees every trainable parameter used exactly once a step."""

    def __init__(self, model: DiffDis, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.tasks = model, args.tasks
        self.p_uncond, self.p_drop_image = args.p_uncond, args.p_drop_image
        for name in ("image", "text"):
            table = make_alphas_cumprod(getattr(model.config, f"{name}_schedule"), model.config.timesteps)
            self.register_buffer(f"{name}_alphas", table)
        # Functions of a UNet, not methods bound to this one: a copy of the module must run its own weights.
        self.denoise_image, self.denoise_query = UNet.denoise_image, UNet.denoise_query
        if args.compile:
            self.denoise_image, self.denoise_query = map(
                torch.compile, (UNet.denoise_image, UNet.denoise_query))

    def generation(self, latents: Tensor, context: Tensor, drawn: dict) -> Tensor:
        """L_IG of each pair (Eq. 4), the text query masked."""
        t, noise, kind = drawn["t_image"], drawn["noise"], self.model.config.image_target
        a, s = signal_and_noise(t, latents, self.image_alphas)
        noisy_latents = q_sample(latents, t, noise, self.image_alphas)
        pred = self.denoise_image(self.model.unet, noisy_latents, t, context)
        return generation_loss(pred, make_target(kind, latents, noise, a, s))

    def alignment(self, latents: Tensor, text_query: Tensor, null_context: Tensor, drawn: dict):
        """L_ITA of each pair (Eq. 6-8) and whether it was found;
        the text condition masked, the image clean."""
        t, noise, config = drawn["t_text"], drawn["query_noise"], self.model.config
        noisy_query = q_sample(text_query.detach(), t, noise, self.text_alphas, config.gamma)
        pred = self.denoise_query(self.model.unet, noisy_query, t, latents, null_context)
        a, s = signal_and_noise(t, noisy_query, self.text_alphas, config.gamma)
        x0_pred = read_prediction(config.text_target, pred.float(), noisy_query, a, s)[0]
        return alignment_loss(x0_pred, text_query, self.model.logit_scale)

    def forward(self, images: Tensor, tokens: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """images [B, 3, H, W], tokens [B, L], what `draw` drew -> losses per pair, each [B]."""
        model, losses = self.model, {}
        with torch.no_grad():
            latents = model.encode_image(images, drawn["posterior_noise"])
        context, text_query = model.text_encoder(tokens)
        null_context = model.text_encoder(model.null_tokens)[0]                          # [1, L, D]
        if "generation" in self.tasks:
            dropped = drawn["u"][:, 0] < self.p_uncond
            context = torch.where(dropped[:, None, None], null_context, context)
            losses["generation"] = self.generation(latents, context, drawn)
        if "alignment" in self.tasks:
            dropped = drawn["u"][:, 1] < self.p_drop_image
            condition = torch.where(dropped[:, None, None, None], 0.0, latents)
            losses["alignment"], losses["found"] = self.alignment(condition, text_query, null_context, drawn)
        return losses


# ---------------------------------------------------------------- optimiser
def freeze_unused(model: DiffDis, tasks: tuple[str, ...], train_text_encoder: bool) -> None:
    """Take gradients away from what these tasks never use, and from what is frozen by design."""
    model.autoencoder.requires_grad_(False)
    model.text_encoder.requires_grad_(train_text_encoder)
    for name, parameter in model.named_parameters():
        if "alignment" not in tasks and is_new(name):
            parameter.requires_grad_(False)
        if "generation" not in tasks and name.startswith(
                ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")):
            parameter.requires_grad_(False)


def make_optimizer(model: DiffDis, args: argparse.Namespace, pretrained: bool) -> torch.optim.AdamW:
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

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))     # early on, do not remember the random start
        torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.live.values()], 1 - decay)

    def swap(self) -> None:
        """Exchange averages and live weights; call twice to get back."""
        for name, parameter in self.live.items():
            kept = parameter.data.clone()
            parameter.data.copy_(self.values[name])
            self.values[name].copy_(kept)


# ---------------------------------------------------------------- run folder, log
class Run:
    """The run's folder: checkpoint, log, pictures. Only rank 0 writes."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.rank, self.started = rank, time.monotonic()
        folder = [self.claim_folder(args) if rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        self.checkpoint, self.log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if self.checkpoint.exists() and not args.resume:
            raise ValueError(f"{self.folder} holds a run: add --resume to go on with it, "
                             "or choose another --out")

    @staticmethod
    def claim_folder(args: argparse.Namespace) -> Path:
        """--out, or runs/NAME, or the first runs/NAME-k that nobody has
        (to resume: the newest that has a checkpoint)."""
        data = Path(args.data).resolve().name if args.data not in ("shapes", "cc3m") else args.data
        names = [Path("runs") / f"{data}-{args.preset}{number}"
                 for number in ("", *(f"-{k}" for k in range(2, 1000)))]
        started = [path for path in names if (path / "checkpoint.pt").exists()]
        if args.out:
            folder = Path(args.out)
        elif args.resume and started:
            folder = max(started, key=lambda path: (path / "checkpoint.pt").stat().st_mtime)
        else:
            folder = next(path for path in names if not path.exists())
            folder.mkdir(parents=True)             # fails, rather than share, if another run was quicker
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        return folder

    def start_log(self, step: int) -> None:
        """Keep the log's lines up to this step: what came later is about to be done again."""
        if self.rank == 0:
            lines = self.log.read_text().splitlines() if self.log.exists() and step else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            text = "".join(line + "\n" for line in kept)
            models.write_atomically(self.log, lambda file: file.write(text.encode()))

    def write(self, record: dict) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------- setting up
def make_model(args: argparse.Namespace, source: Source, checkpoint: dict | None) -> DiffDis:
    """A model from scratch, from --init, or as the run's checkpoint describes it
    (weights are loaded later)."""
    torch.manual_seed(args.seed)
    if checkpoint is not None:
        return models.build(checkpoint, "the run's checkpoint")
    if args.init is not None:
        model = models.load(args.init, weights="raw", adapt=lambda config: make_config(config, args))
        return model.train().requires_grad_(True)
    config = make_config(PRESETS[args.preset], args)
    length = config.text.context_length
    if args.tokenizer is not None:
        tokenizer = Tokenizer.from_file(args.tokenizer, length)
    else:
        captions = chain.from_iterable(source.usable_captions(100_000))
        tokenizer = Tokenizer.learn(captions, config.text.vocab_size, length)
    config = replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))
    model = DiffDis(config, tokenizer)
    model.known_words = frozenset()
    return model


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
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in vars(args).items() if k not in FREE_ON_RESUME}


def start_ranks(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if it does -> rank, number of ranks, device."""
    device = pick_device(args.device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared evenly by {world} ranks")
    return rank, world, device


class Trainer:
    """Everything a run holds, so that saving and resuming are each one method."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.run = Run(args, rank)
        self.step, self.words, self.report = 0, set(), SkipReport(args.max_bad)
        self.total_report = self.report          # over all ranks, as of the last save
        checkpoint = models.read_checkpoint(self.run.checkpoint) if self.run.checkpoint.exists() else None
        if checkpoint is not None:
            check_resume(checkpoint, args)
        source = open_source(args.data, "train")
        check_index(source, args.max_bad)
        self.source, self.val = hold_out(source, args.val)
        self.model = make_model(args, self.source, checkpoint)
        train_text = args.init is None if args.train_text_encoder is None else args.train_text_encoder
        freeze_unused(self.model, args.tasks, train_text)
        self.model.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, args, pretrained=args.init is not None)
        self.averages = Averages(self.model, args.ema)
        if checkpoint is not None:
            self.restore(checkpoint)
        # None: the weights knew more words than this training will see, and nobody has listed them.
        self.lists_words = self.model.known_words is not None
        self.words |= self.model.known_words or set()
        self.loss = JointLoss(self.model, args).to(device)
        if world > 1:
            self.loss = DistributedDataParallel(
                self.loss, device_ids=[device.index] if device.type == "cuda" else None)
        self.run.start_log(self.step)

    def restore(self, checkpoint: dict) -> None:
        training = checkpoint["training"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(training["optimizer"])
        for name, value in checkpoint["ema"].items():
            self.averages.values[name].copy_(value)
        self.step = training["step"]
        self.model.known_words = None if checkpoint["words"] is None else frozenset(checkpoint["words"])
        if self.rank == 0:       # the others count from 0: theirs is in the sum
            self.report.load(training["skipped"])

    def save(self) -> None:
        """Write the checkpoint. Every rank calls it: what each has seen is put together."""
        seen = [(self.words, self.report)]
        if self.world > 1:
            seen = [None] * self.world
            dist.all_gather_object(seen, (self.words, self.report))
        if self.lists_words:
            self.model.known_words = frozenset().union(*(words for words, _ in seen))
        self.total_report = SkipReport(self.args.max_bad)
        for _, report in seen:
            self.total_report.add(report.skipped, report.visited)
        if self.rank == 0:
            models.save(self.run.checkpoint, self.model, self.averages.values, {
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "skipped": self.total_report.to_dict(), "args": run_flags(self.args)})

    # ------------------------------------------------------------ one step
    def train_step(self, batch) -> dict:
        """One gradient step on a batch -> what to log."""
        args = self.args
        drawn = draw(self.model.config, self.model.latent_shape(*batch.images.shape[2:]), args.seed,
                     self.step, range(self.rank, args.batch_size, self.world))
        move = dict(device=self.device, non_blocking=True)
        factor = learning_rate_factor(self.step, args)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            losses = self.loss(batch.images.to(**move, memory_format=torch.channels_last),
                               self.model.tokenizer(batch.captions).to(**move),
                               {name: value.to(**move) for name, value in drawn.items()})
        self.stop_if_not_finite(losses, drawn, batch.keys)
        means = {task: losses[task].mean() for task in args.tasks}
        total = means.get("generation", 0) + args.align_weight * means.get("alignment", 0)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.averages.live.values(), args.grad_clip or math.inf)
        if not torch.isfinite(norm):
            raise ValueError(f"step {self.step}: the losses are finite, their gradient is not; {START_OVER}")
        self.optimizer.step()
        with torch.no_grad():
            # As CLIP. Here and not in the loss, where a clamp would leave no gradient to come back by.
            self.model.logit_scale.clamp_(0, math.log(100))
        self.averages.update(self.step)
        self.step += 1
        record = {"loss": total.detach(), **{f"loss_{task}": value.detach() for task, value in means.items()}}
        if "found" in losses:
            record["accuracy"] = losses["found"].float().mean()
        if self.world > 1:      # what is logged is the global batch's mean
            values = torch.stack(list(record.values()))
            dist.all_reduce(values)
            record = dict(zip(record, values / self.world))
        return {**record, "grad_norm": norm, "lr": args.lr * factor,
                "logit_scale": self.model.logit_scale.detach()}

    def stop_if_not_finite(self, losses: dict, drawn: dict, keys: list[str]) -> None:
        """Raises ValueError naming step, task, timesteps and samples; the last checkpoint is untouched."""
        for task, t in (("generation", "t_image"), ("alignment", "t_text")):
            bad = ~torch.isfinite(losses[task]).cpu() if task in losses else torch.zeros(1)
            if bad.any():
                rows = bad.nonzero().flatten().tolist()[:5]
                raise ValueError(
                    f"step {self.step}: the {task} loss is not finite at timesteps "
                    f"{[int(drawn[t][i]) for i in rows]}, samples {[keys[i] for i in rows]}; {START_OVER}")

    # ------------------------------------------------------------ the loop
    def train(self) -> None:
        args = self.args
        batches = training_batches(self.source, self.model.config.image_size, args.batch_size, args.seed,
                                   self.step, self.rank, self.world, args.workers)
        bar = tqdm(total=args.steps, initial=self.step, unit="step", disable=None if self.rank == 0 else True)
        clock, logged = time.monotonic(), self.step
        while self.step < args.steps:
            batch = next(batches)
            self.report.add(batch.skipped, batch.visited)
            self.report.check()
            for caption in batch.captions:
                self.words.update(words(caption))
            record = self.train_step(batch)
            bar.update()
            if self.step % args.log_every == 0 or self.step == args.steps:
                record = {name: float(value) for name, value in record.items()}      # waits for the device
                speed = args.batch_size * (self.step - logged) / (time.monotonic() - clock)
                clock, logged = time.monotonic(), self.step
                self.log(record, speed, bar)
            paused = time.monotonic()
            if self.step % args.save_every == 0 or self.step == args.steps:
                self.save()
            if self.rank == 0 and (self.step % args.sample_every == 0 or self.step == args.steps):
                self.draw_samples()
            clock += time.monotonic() - paused        # saving and drawing are no part of images/s
        bar.close()

    def log(self, record: dict, speed: float, bar: tqdm) -> None:
        skipped = torch.tensor(self.report.skipped.total(), device=self.device)
        if self.world > 1:
            dist.all_reduce(skipped)
        if self.rank == 0:
            self.run.write({"step": self.step, **record, "images_per_s": round(speed, 1),
                            "skipped": int(skipped)})
            bar.set_postfix({name.removeprefix("loss_"): f"{record[name]:.3f}"
                             for name in record if "loss_" in name} | {"images/s": f"{speed:.0f}"})

    def draw_samples(self, count: int = 32) -> None:
        """A grid for the first validation captions, always the same prompts and noise,
        with the averaged weights."""
        if "generation" not in self.args.tasks:
            return
        prompts = [captions[0] for captions in self.val.usable_captions(count)]
        self.averages.swap()
        images = draw_images(self.model.eval(), prompts, list(range(len(prompts))), steps=25)
        self.averages.swap()
        self.model.train()
        path = self.run.folder / "samples" / f"step_{self.step:06d}.png"
        make_grid(images, columns=8, scale=max(1, 96 // images.shape[3])).save(path)

    def validate(self) -> None:
        """The run's last word: what the averaged weights can do on pairs that training never saw."""
        print(f"\nvalidation of the averaged weights on {len(self.val)} held-out pairs of {self.args.data}")
        model = models.load(self.run.checkpoint, self.device)
        flags = ["--seed", str(self.args.seed)]
        if "alignment" in self.args.tasks:
            task = "zeroshot" if self.val.classes else "retrieval"
            # Training has judged the share of bad samples; this handful is too few to.
            evaluate.report(task, model, self.val, evaluate.parse_args([task, *flags, "--max-bad", "1"]))
        if "generation" in self.args.tasks and self.args.data == "shapes":
            evaluate.report("checker", model, None, evaluate.parse_args(["checker", *flags]))


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    try:
        args = parse_args(argv)
        rank, world, device = start_ranks(args)
        args.precision = (args.precision if args.precision != "auto" else
                          "bf16" if device.type == "cuda" else "fp32")
        args.compile = device.type == "cuda" if args.compile is None else args.compile
        args.workers = args.workers if args.workers is not None else 0 if args.data == "shapes" else 2
        args.sample_every = args.sample_every or max(1, args.steps // 4)
        trainer = Trainer(args, rank, world, device)
        if rank == 0:
            count = sum(p.numel() for p in trainer.averages.live.values())
            print(f"run: {trainer.run.folder}  seed: {args.seed}  device: {device} x {world}  "
                  f"{args.precision}  trainable parameters: {count:,}  step: {trainer.step} of {args.steps}",
                  flush=True)
        trainer.train()
        if rank == 0:
            print(trainer.total_report)
            print(f"trained in {time.monotonic() - started:.0f} s; wrote {trainer.run.checkpoint}")
            trainer.validate()
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
