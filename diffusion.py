"""The diffusion itself: schedules, noise, targets, losses, guidance, samplers, as functions on tensors.

The same lines noise and denoise images and text queries, so names are generic here: x0 clean, x_t noised,
t timestep, shapes (B, …). There is no network: samplers receive a callable.

Notation: x_t = a x0 + s ε with a = γ √ᾱ_t and s = √(1-ᾱ_t); γ is 1 for images. Schedules are float64 tables.
Read next: fusion.py (where text and image meet); train.py and sample.py use what is here."""
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

SCHEDULES, TARGETS = ("linear", "cosine"), ("noise", "v", "data")      # of β; of what a network predicts
Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]     # (x_t, t [B]) -> (x0_pred, eps_pred)


# ---------------------------------------------------------------- randomness
def generator_of(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone, e.g. (seed, step, row) or (seed, image, draw). All
    noise is drawn this way, on the CPU: it depends on no device, batch layout, rank or earlier draw."""
    # The length goes in because numpy pads a key with zeros: (1,) and (1, 0) would be one.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def noise_of(shape: tuple[int, ...], keys: Iterable[tuple[int, ...]]) -> Tensor:
    """Standard normal noise, a row per key [B, *shape], on the CPU; a row is a function of its key alone."""
    return torch.stack([torch.randn(shape, generator=generator_of(*key)) for key in keys])


# ---------------------------------------------------------------- schedules
def make_alphas_cumprod(kind: str, steps: int) -> Tensor:
    """ᾱ_t = Π (1-β), float64 [T]. "linear" in √β: Stable Diffusion's; "cosine": Nichol & Dhariwal 2021."""
    if kind == "linear":
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps, dtype=torch.float64) ** 2
    elif kind == "cosine":
        u = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
        alpha_bar = torch.cos(u * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule is {kind!r}, expected 'linear' or 'cosine'")
    return torch.cumprod(1 - betas, dim=0)


def signal_and_noise(t: Tensor, like: Tensor, alphas_cumprod: Tensor,
                     gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """a = γ √ᾱ_t and s = √(1-ᾱ_t) for t [B] -> two float32 tensors that broadcast with `like` (B, …)."""
    # Rooted in float64: 1-ᾱ cancels near t = 0.
    alpha_bar = alphas_cumprod[t].view(-1, *[1] * (like.dim() - 1))
    return (gamma * alpha_bar.sqrt()).float(), (1 - alpha_bar).sqrt().float()


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor, gamma: float = 1.0) -> Tensor:
    """x_t = γ √ᾱ_t x0 + √(1-ᾱ_t) ε (Eq. 6; with γ = 1, Eq. 4's z_t). x0, noise (B, …), t [B]."""
    a, s = signal_and_noise(t, x0, alphas_cumprod, gamma)
    return a * x0 + s * noise


# ---------------------------------------------------------------- what the network predicts
def make_target(kind: str, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What a network with target `kind` should say: ε ("noise"), x0 ("data"), or a ε − s x0 ("v")."""
    return noise if kind == "noise" else x0 if kind == "data" else a * noise - s * x0


def read_prediction(kind: str, pred: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `make_target`, given x_t = a x0 + s ε -> (x0_pred, eps_pred)."""
    if kind == "noise":
        return (x_t - s * pred) / a, pred
    if kind == "data":
        return pred, (x_t - a * pred) / s
    norm = a ** 2 + s ** 2      # 1 unless γ < 1
    return (a * x_t - s * pred) / norm, (s * x_t + a * pred) / norm


# ---------------------------------------------------------------- losses
def generation_loss(pred: Tensor, target: Tensor) -> Tensor:
    """‖ target − Φ_u ‖², mean over numbers -> one value per sample [B], float32 (Eq. 4)."""
    return F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def alignment_loss(x0_pred: Tensor, text_query: Tensor, logit_scale: Tensor,
                   dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE between denoised and true text queries, over the batch of all ranks (Eq. 8).

    x0_pred: ê_0 [B, D], any norm; text_query: e [B, D], unit norm; logit_scale: log of the inverse
    temperature; dropped: pairs without their image [B], bool: with nothing to read they have no part in the
    image -> text half. -> this rank's rows of the loss [B], float32 (their mean over all ranks is the global
    loss), and whether each row's own text is the most similar [B], bool."""
    ours, texts = F.normalize(x0_pred.float(), dim=-1), text_query.float()
    all_ours, all_texts, rank = ours, texts, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        # A sum to which each rank brings its own rows, with gradient: N ranks are one large batch.
        rank, after = dist.get_rank(), dist.get_world_size() - 1 - dist.get_rank()
        all_ours, all_texts = (all_reduce(F.pad(rows, (0, 0, rank * len(rows), after * len(rows))))
                               for rows in (ours, texts))
    scale = logit_scale.exp()
    image_logits, text_logits = scale * ours @ all_texts.T, scale * texts @ all_ours.T    # [B, N·B]
    labels = torch.arange(len(ours), device=ours.device) + rank * len(ours)
    loss = [F.cross_entropy(logits, labels, reduction="none") for logits in (image_logits, text_logits)]
    loss[0] = loss[0] if dropped is None else loss[0].masked_fill(dropped, 0.0)
    return (loss[0] + loss[1]) / 2, image_logits.argmax(dim=1) == labels


# ---------------------------------------------------------------- sampling
def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, (1+w) cond − w uncond with scale = 1 + w (Algorithms 2 and 3)."""
    return unconditional + scale * (conditional - unconditional)


def sampling_timesteps(steps: int, total: int, spacing: str) -> list[int]:
    """Which of the T timesteps a sampler visits, from noisy to clean.

    spacing: "leading" is Stable Diffusion's (…, 41, 21, 1 for 50 steps: it never visits T-1);
    "trailing" starts at T-1, where what a sampler starts from, pure noise, is what training showed.
    Raises ValueError on an impossible number of steps."""
    most = total if spacing == "trailing" else total - 1
    if not 1 <= steps <= most:
        raise ValueError(f"sampling steps is {steps}, expected 1 to {most}")
    if spacing == "leading":
        return [i * (total // steps) + 1 for i in reversed(range(steps))]
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def make_denoiser(predict: Callable[[Tensor, Tensor], Tensor], kind: str, alphas_cumprod: Tensor,
                  gamma: float = 1.0, unit_norm: bool = False) -> Denoiser:
    """A network's (guided) prediction as a denoiser. predict: (x_t, t [B]) -> prediction of target `kind`;
    unit_norm: normalise x0_pred, as text queries are, and recompute ε̂ from it (Algorithm 3; our choice)."""
    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = signal_and_noise(t, x_t, alphas_cumprod, gamma)
        x0_pred, eps_pred = read_prediction(kind, predict(x_t, t).float(), x_t, a, s)
        if unit_norm:
            x0_pred = F.normalize(x0_pred, dim=-1)
            eps_pred = (x_t - a * x0_pred) / s
        return x0_pred, eps_pred
    return denoise


def ddim(denoise: Denoiser, x_t: Tensor, timesteps: list[int], alphas_cumprod: Tensor, gamma: float = 1.0,
         final_alpha_cumprod: float = 1.0, progress: Callable = iter, order: int = 1) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 without noise): x_t' = γ √ᾱ_t' x̂0 + √(1-ᾱ_t') ε̂ (Algorithms 2 and 3).

    x_t: (B, …) pure noise; timesteps: decreasing; final_alpha_cumprod: ᾱ after the last step, 1 for clean
    data (Stable Diffusion's own sampler stops at ᾱ_0); progress: wraps the timesteps, e.g. tqdm.
    order: 2, for γ = 1, is DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), good in 20 steps where DDIM needs
    50: x̂0 is taken to change linearly with half the log-SNR, and extrapolated to the middle of the step from
    this step's and the last one's; the first and the last step use this step's alone. -> x0 (B, …)"""
    after = [float(alphas_cumprod[t]) for t in timesteps[1:]] + [final_alpha_cumprod]
    time, x0_before = (torch.logit(alphas_cumprod[timesteps].double()) / 2).tolist(), None     # log-SNR / 2
    for i, (now, alpha_bar) in enumerate(zip(progress(timesteps), after)):
        t = torch.full((len(x_t),), now, device=x_t.device)
        x0_pred, eps_pred = denoise(x_t, t)
        x0, eps = x0_pred, eps_pred
        if order == 2 and 0 < i < len(timesteps) - 1:
            a, s = signal_and_noise(t, x_t, alphas_cumprod)
            x0 = x0_pred + (time[i + 1] - time[i]) / (time[i] - time[i - 1]) / 2 * (x0_pred - x0_before)
            eps = (x_t - a * x0) / s
        x_t, x0_before = gamma * alpha_bar ** 0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps, x0_pred
    return x_t / gamma
