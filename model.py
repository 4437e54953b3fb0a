"""DiffDis: one Stable Diffusion UNet that draws images from text and reads text from images.

What it is: every network of the project, bottom-up: residual block, autoencoder, text encoder, UNet, and the
`DiffDis` module that holds them with their configuration. The `sd-v1` preset has Stable Diffusion v1's exact
shapes; `tiny` and `small` are the same classes with smaller numbers.
What it is not: noise, timesteps' distribution, losses and samplers (diffusion.py), or data (data.py).

The UNet has three entry points. `denoise_image` is Stable Diffusion. `denoise_query` runs only the
*encoder half* (down and middle blocks), with one extra token, the noised text query, in every
attention block (fusion.py).

Parameter names are those of the diffusers / transformers folders of Stable Diffusion v1; what DiffDis adds is
named `query_...`. Read next: diffusion.py.
"""
import argparse
import http.client
import io
import json
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data import CACHE, END, START, Tokenizer, to_float, write_atomically
from fusion import AlignmentTransformer, FusionConfig, SpatialTransformer, TransformerBlock

TARGETS = ("noise", "v", "data")       # what a network may be asked to predict; formulas in diffusion.py
SCHEDULES = ("linear", "cosine")
MAX_SIDE = 4096            # px; a larger image is a slip of the finger


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion's UNet; the defaults are v1's."""
    channels: tuple[int, ...] = (320, 640, 1280, 1280)   # per level; every level but the last halves the side
    attention: tuple[bool, ...] = (True, True, True, False)
    res_blocks: int = 2          # per level on the way down; one more on the way up
    heads: int = 8               # heads per attention, at every width
    depth: int = 1               # K, transformer blocks per attention block

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention):
            raise ValueError(f"{len(self.channels)} levels of channels "
                             f"but {len(self.attention)} of attention")
        if any(c % 32 or c % self.heads for c in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of 32 "
                             f"and of the {self.heads} heads")


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text transformer; the defaults are those of CLIP ViT-L/14."""
    vocab_size: int = 49408
    context_length: int = 77     # L, tokens
    width: int = 768             # D
    layers: int = 12
    heads: int = 12


@dataclass(frozen=True)
class ClipConfig:
    """CLIP's two towers; the defaults are ViT-L/14's."""
    width: int = 1024            # of the image tower
    layers: int = 24
    heads: int = 16
    patch: int = 14              # px
    image_size: int = 224        # px
    embedding: int = 768         # what the two towers share
    text: TextConfig = TextConfig()
    activation: str = "quick_gelu"       # OpenAI's; OpenCLIP's own models have "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation is {self.activation!r}, expected quick_gelu or gelu")
        if self.image_size % self.patch or self.width % self.heads or self.text.width % self.text.heads:
            raise ValueError(f"image size {self.image_size} px must be a multiple of the patch "
                             f"{self.patch} px, width {self.width} one of the {self.heads} heads, the text's "
                             f"{self.text.width} one of its {self.text.heads}")

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "ClipConfig":
        """The inverse of `to_dict`. Raises ValueError on fields that this version does not know."""
        try:
            return ClipConfig(**{**values, "text": TextConfig(**values["text"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint's configuration does not fit this version: {error}") from None


@dataclass(frozen=True)
class AutoencoderConfig:
    """`kl`: Stable Diffusion's autoencoder.
    `patch`: a pixel-unshuffle, which has no weights and loses nothing."""
    kind: str = "kl"
    latent_channels: int = 4
    factor: int = 8              # pixels per latent, along a side
    scale: float = 0.18215       # latents are the autoencoder's output times this: about unit variance
    channels: tuple[int, ...] = (128, 256, 512, 512)

    def __post_init__(self) -> None:
        if self.kind not in ("kl", "patch"):
            raise ValueError(f"autoencoder kind is {self.kind!r}, expected 'kl' or 'patch'")
        if self.kind == "patch" and self.latent_channels != 3 * self.factor ** 2:
            raise ValueError(f"patches of {self.factor} px hold {3 * self.factor ** 2} numbers, "
                             f"not {self.latent_channels}")


@dataclass(frozen=True)
class Config:
    """All that a checkpoint must remember to be used: the networks, and what they were trained to predict."""
    fusion: FusionConfig
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    image_size: int = 256        # px, side of the training images
    timesteps: int = 1000        # T
    # t_z while the image is a condition (Table 7); None: T, never drawn
    condition_timestep: int | None = None
    image_target: str = "noise"  # Eq. 4 has noise; small presets predict data
    text_target: str = "data"    # Table 2
    image_schedule: str = "linear"
    text_schedule: str = "cosine"           # Table 3
    gamma: float = 1.0           # γ, scale of the text query inside its noise (Eq. 6)
    guidance_scale: float = 7.5  # 1 + w with which images are drawn unless told otherwise

    def __post_init__(self) -> None:
        if self.condition_timestep is None:
            object.__setattr__(self, "condition_timestep", self.timesteps)
        for name, value, allowed in (("image_target", self.image_target, TARGETS),
                                     ("text_target", self.text_target, TARGETS),
                                     ("image_schedule", self.image_schedule, SCHEDULES),
                                     ("text_schedule", self.text_schedule, SCHEDULES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}, expected a number in (0, 1]")
        if not 0 <= self.condition_timestep <= self.timesteps:
            raise ValueError(f"condition_timestep is {self.condition_timestep}, "
                             f"expected 0 to {self.timesteps}")
        side = self.autoencoder.factor
        if self.image_size % side or not 0 < self.image_size <= MAX_SIDE:
            raise ValueError(f"image size is {self.image_size} px, "
                             f"expected a multiple of {side} up to {MAX_SIDE}")
        if self.fusion.query_width != self.text.width:
            raise ValueError(f"query_width {self.fusion.query_width} is not the text width {self.text.width}")

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Config":
        """The inverse of `to_dict`.

        Raises ValueError on fields that this version does not know, or misses.
        """
        parts = {"fusion": FusionConfig, "unet": UNetConfig, "text": TextConfig,
                 "autoencoder": AutoencoderConfig}
        try:
            built = {name: cls(**{field: tuple(value) if isinstance(value, list) else value
                                  for field, value in values[name].items()}) for name, cls in parts.items()}
            return Config(**{**values, **built})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint's configuration does not fit this version: {error}") from None


def patches(factor: int, scale: float) -> AutoencoderConfig:
    return AutoencoderConfig("patch", 3 * factor ** 2, factor, scale, ())


# `tiny` trains on two CPU cores in minutes, `small` is for one GPU, `sd-v1` is Stable Diffusion v1.
PRESETS = {
    "tiny": Config(
        FusionConfig(query_width=128, align_blocks=2, head_width=32),
        UNetConfig((64, 128), (True, True), 1, 4),
        TextConfig(1024, 24, 128, 2, 8), patches(4, 1.0), image_size=32, image_target="data",
        guidance_scale=2.0),
    "small": Config(
        FusionConfig(query_width=384, align_blocks=4), UNetConfig((192, 384, 576), (True, True, True), 2, 6),
        TextConfig(8192, 48, 384, 6, 6), patches(4, 2.0), image_size=64, image_target="data",
        guidance_scale=2.0),
    "sd-v1": Config(FusionConfig(query_width=768)),
}


# What alignment is compared with (Table 1): the paper's two, and one of like size for each small preset.
CLIPS = {"clip-tiny": ClipConfig(128, 4, 4, 4, 32, 128, PRESETS["tiny"].text),
         "clip-small": ClipConfig(384, 12, 6, 8, 64, 384, PRESETS["small"].text),
         "clip-vit-b32": ClipConfig(768, 12, 12, 32, 224, 512, TextConfig(width=512, heads=8)),
         "clip-vit-l14": ClipConfig()}
LIKE = {"tiny": "clip-tiny", "small": "clip-small", "sd-v1": "clip-vit-l14"}     # preset -> its CLIP


# ---------------------------------------------------------------- shared parts
def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of timesteps t [B] -> float32 [B, width], cosines first (Stable Diffusion's order).

    In float32 whatever the network's type: bfloat16 cannot tell timestep 998 from 1000.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Timesteps [B] -> [B, out]: sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        sinusoid = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the input; the UNet's also add the timestep's embedding in between."""

    def __init__(self, channels: int, out: int, time_width: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels, eps), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps), nn.Conv2d(out, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out) if time_width else None
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, time_width] -> [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halves the side by a strided convolution;
    the autoencoder pads only right and below, the UNet all around."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side, or reaches `size` (an odd one's half was rounded): nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


# ---------------------------------------------------------------- autoencoders
class PatchAutoencoder(nn.Module):
    """Latents without a pretrained network: factor × factor patches of pixels become channels. No weights."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean, log-variance [B, C, H/f, W/f], before scaling; std is 0."""
        mean = F.pixel_unshuffle(images, self.config.factor)
        return mean, torch.full_like(mean, -math.inf)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H/f, W/f] -> images [B, 3, H, W], nominally in [-1, 1]."""
        return F.pixel_shuffle(latents / self.config.scale, self.config.factor)


class AutoencoderAttention(nn.Module):
    """Single-head self-attention over pixels, pre-norm, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                 # [B, H·W, C]
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class AutoencoderLevel(nn.Module):
    """Residual blocks of one width, then at most one change of size. `resample` None, "down" or "up"."""

    def __init__(self, channels: int, out: int, blocks: int, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels if i == 0 else out, out, eps=1e-6) for i in range(blocks))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out, padding=0)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return getattr(self, f"{self.resample}samplers")[0](x) if self.resample else x


class AutoencoderMiddle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, eps=1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([AutoencoderAttention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            AutoencoderLevel(channels[max(i - 1, 0)], c, 2, "down" if i < last else None)
            for i, c in enumerate(channels))
        self.mid_block = AutoencoderMiddle(channels[-1])
        self.conv_norm_out = nn.GroupNorm(32, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, channels: tuple[int, ...], latent_channels: int) -> None:
        super().__init__()
        up = tuple(reversed(channels))
        self.conv_in = nn.Conv2d(latent_channels, up[0], 3, padding=1)
        self.mid_block = AutoencoderMiddle(up[0])
        self.up_blocks = nn.ModuleList(
            AutoencoderLevel(up[max(i - 1, 0)], c, 3, "up" if i < len(up) - 1 else None)
            for i, c in enumerate(up))
        self.conv_norm_out = nn.GroupNorm(32, up[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(up[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class KLAutoencoder(nn.Module):
    """Stable Diffusion's autoencoder (Rombach et al. 2022): images to a Gaussian over latents, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config.channels, 2 * channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config.channels, channels)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean, log-variance [B, 4, H/8, W/8], before scaling."""
        images = images.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, H/8, W/8] -> images [B, 3, H, W], nominally in [-1, 1]."""
        latents = latents.to(self.post_quant_conv.weight.dtype) / self.config.scale
        return self.decoder(self.post_quant_conv(latents))


def make_autoencoder(config: AutoencoderConfig) -> KLAutoencoder | PatchAutoencoder:
    return (KLAutoencoder if config.kind == "kl" else PatchAutoencoder)(config)


# ---------------------------------------------------------------- text encoder
class ClipLayer(nn.Module):
    """CLIP's transformer layer: self-attention (of texts: causal) and an MLP, each pre-norm and residual."""

    def __init__(self, width: int, heads: int, causal: bool, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, activation
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({
            f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        h, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (attn[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + attn["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        # quick GELU: CLIP's own, not PyTorch's
        h = F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h)
        return x + self.mlp["fc2"](h)


def initialise_layers(layers: Iterable[ClipLayer], width: int, depth: int) -> None:
    """CLIP's initialisation of a transformer, for training from scratch."""
    residual = (2 * depth) ** -0.5
    for layer in layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(layer.self_attn[name].weight, std=width ** -0.5)
        nn.init.normal_(layer.self_attn["out_proj"].weight, std=width ** -0.5 * residual)
        nn.init.normal_(layer.mlp["fc1"].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(layer.mlp["fc2"].weight, std=width ** -0.5 * residual)


class TextEncoder(nn.Module):
    """CLIP's text transformer. One pass gives the text condition c and the text query e."""

    def __init__(self, config: TextConfig, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, config.width),
            "position_embedding": nn.Embedding(config.context_length, config.width)})
        self.encoder = nn.ModuleDict({
            "layers": nn.ModuleList(
                ClipLayer(config.width, config.heads, True, activation) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.width)

    def initialise(self) -> None:
        """CLIP's initialisation, for training from scratch."""
        nn.init.normal_(self.embeddings["token_embedding"].weight, std=0.02)
        nn.init.normal_(self.embeddings["position_embedding"].weight, std=0.01)
        initialise_layers(self.encoder["layers"], self.config.width, self.config.layers)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] int64 -> context c [B, L, D]; text query e [B, D], float32, of unit norm.

        e is read at the first end token, which has the largest id: padding with it (as Stable Diffusion does)
        or with anything smaller changes nothing, because attention is causal.
        """
        x = self.embeddings["token_embedding"](tokens)
        x = x + self.embeddings["position_embedding"].weight[:tokens.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        context = self.final_layer_norm(x)
        ends = context[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
        return context, F.normalize(ends.float(), dim=-1)


# ---------------------------------------------------------------- CLIP, to compare with
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # of its training images, pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImageEncoder(nn.Module):
    """CLIP's vision transformer (Radford et al. 2021), names as in transformers: an image to a vector."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, tokens = config.width, (config.image_size // config.patch) ** 2 + 1
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False),
            "position_embedding": nn.Embedding(tokens, width)})
        self.embeddings.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        # The slip in the first name is the published key's own.
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            ClipLayer(width, config.heads, False, config.activation) for _ in range(config.layers))})

    def tokens(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], of CLIP's mean and deviation -> class and patch tokens [B, 1+N, width]."""
        patches = self.embeddings["patch_embedding"](images).flatten(2).transpose(1, 2)       # [B, N, width]
        first = self.embeddings.class_embedding.expand(len(images), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.embeddings["position_embedding"].weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """As `tokens` -> the class token's output [B, width]."""
        return self.post_layernorm(self.tokens(images)[:, 0])


class Clip(nn.Module):
    """Two towers and a temperature: what DiffDis's alignment is compared with (the paper's Table 1).

    train.py and evaluate.py use it as they use a DiffDis that only reads.
    """
    tasks = ("alignment",)

    def __init__(self, config: ClipConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.data: str | None = None          # what its weights were trained on, as --data has it
        self.vision_model, self.text_model = ClipImageEncoder(config), TextEncoder(config.text,
                                                                                   config.activation)
        self.visual_projection = nn.Linear(config.width, config.embedding, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_model.initialise()
        initialise_layers(self.vision_model.encoder["layers"], config.width, config.layers)
        for layer, width in ((self.vision_model.embeddings["position_embedding"], config.width),
                             (self.visual_projection, config.width),
                             (self.text_projection, config.text.width)):
            nn.init.normal_(layer.weight, std=width ** -0.5)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def read_batch(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> [B, 3, S, S] of CLIP's mean and deviation."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return ((to_float(images) + 1) / 2 - mean) / std

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], of CLIP's mean and deviation -> [B, embedding], unit norm, float32."""
        return F.normalize(self.visual_projection(self.vision_model(images)).float(), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, embedding], unit norm, float32."""
        return F.normalize(self.text_projection(self.text_model(tokens)[1]).float(), dim=-1)

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> token-wise output [B, L, D], embeddings [B, embedding] of unit norm."""
        context, ends = self.text_model(self.tokenizer(captions).to(self.device))
        return context, F.normalize(self.text_projection(ends).float(), dim=-1)


# ---------------------------------------------------------------- UNet
class Stages(nn.Module):
    """What the UNet's blocks share: each residual and attention stage may be run again in the backward pass
    instead of keeping all that is inside it (activation checkpointing)."""
    recompute = False            # set by UNet.recompute_activations

    def run(self, stage: nn.Module, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


class TwoTaskBlock(TransformerBlock):
    """For a batch of which only the last rows have a query: both tasks in one pass (UNet.denoise_both)."""

    def self_attention(self, x: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], query [B', 1, C] of its last B' rows, or None -> the same."""
        if query is None or len(query) == len(x):
            return super().self_attention(x, query)
        alone, x = x.tensor_split([len(x) - len(query)])
        x, query = super().self_attention(x, query)
        return torch.cat([super().self_attention(alone, None)[0], x]), query


class DownBlock(Stages):
    def __init__(self, channels: int, out: int, config: "Config", attention: bool, downsample: bool) -> None:
        super().__init__()
        unet, fusion = config.unet, config.fusion if config.fusion.fusion else None
        self.resnets = nn.ModuleList(
            ResBlock(channels if i == 0 else out, out, 4 * unet.channels[0]) for i in range(unet.res_blocks))
        self.attentions = nn.ModuleList(
            SpatialTransformer(out, unet.heads, config.text.width, unet.depth, fusion, TwoTaskBlock)
            for _ in range(unet.res_blocks if attention else 0))
        self.downsamplers = nn.ModuleList([Downsample(out, padding=1)] if downsample else [])

    def forward(self, x, emb, context, query, state, skips):
        """Appends each stage's output to skips; -> x, state (the query's, None when masked)."""
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, emb)
            if self.attentions:
                x, state = self.run(self.attentions[i], x, context, query, state)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, state


class MiddleBlock(Stages):
    def __init__(self, config: "Config") -> None:
        super().__init__()
        unet, fusion = config.unet, config.fusion if config.fusion.fusion else None
        width = unet.channels[-1]
        self.resnets = nn.ModuleList(ResBlock(width, width, 4 * unet.channels[0]) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialTransformer(width, unet.heads, config.text.width, unet.depth, fusion, TwoTaskBlock)])

    def forward(self, x, emb, context, query, state):
        x, state = self.run(self.attentions[0], self.run(self.resnets[0], x, emb), context, query, state)
        return self.run(self.resnets[1], x, emb), state


class UpBlock(Stages):
    """The decoder half's level: plain Stable Diffusion, the query never comes here."""

    def __init__(self, channels: int, skip_channels: list[int], out: int, config: "Config", attention: bool,
                 upsample: bool) -> None:
        super().__init__()
        unet = config.unet
        self.resnets = nn.ModuleList(
            ResBlock((channels if i == 0 else out) + skip, out, 4 * unet.channels[0])
            for i, skip in enumerate(skip_channels))
        self.attentions = nn.ModuleList(
            SpatialTransformer(out, unet.heads, config.text.width, unet.depth)
            for _ in skip_channels if attention)
        self.upsamplers = nn.ModuleList([Upsample(out)] if upsample else [])

    def forward(self, x, emb, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x, _ = self.run(self.attentions[i], x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Φ: Stable Diffusion's UNet (Φ_u), whose encoder half also denoises text queries (Φ_θ)."""

    def __init__(self, config: "Config") -> None:
        super().__init__()
        unet, width = config.unet, config.fusion.query_width
        channels, last = unet.channels, len(unet.channels) - 1
        self.fused, self.condition_timestep = config.fusion.fusion, config.condition_timestep
        latent_channels = config.autoencoder.latent_channels
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], c, config, unet.attention[i], downsample=i < last)
            for i, c in enumerate(channels))
        self.mid_block = MiddleBlock(config)
        skips = [channels[0]] + [
            c for i, c in enumerate(channels) for _ in range(unet.res_blocks + (i < last))]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            taken = [skips.pop() for _ in range(unet.res_blocks + 1)]
            self.up_blocks.append(UpBlock(channels[min(i + 1, last)], taken, channels[i], config,
                                          unet.attention[i], upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(32, channels[0])
        self.conv_out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        self.query_time_embedding = TimestepEmbedding(width, width)
        self.query_head = AlignmentTransformer(channels[-1], config.fusion)
        self.zero_residuals()

    def zero_residuals(self) -> None:
        """From scratch, every residual branch of the generation path starts at zero,
        as in Stable Diffusion."""
        for module in self.modules():
            last = (module.conv2 if isinstance(module, ResBlock) else
                    module.proj_out if isinstance(module, SpatialTransformer) else
                    module.conv_out if module is self else None)
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def recompute_activations(self) -> None:
        """Keep only what passes between stages for the backward pass: a third more work, a fraction of the
        memory."""
        for module in self.modules():
            if isinstance(module, Stages):
                module.recompute = True

    def encode(self, latents: Tensor, t_image: Tensor, context: Tensor, query: Tensor | None = None):
        """The encoder half: latents [B, C, H, W], t_image [B], context [B or 1, L, D], query [B, D] or None
        -> middle features, the skips for the decoder half, timestep embedding, the query's last state.
        A query of fewer rows belongs to the last ones."""
        emb = self.time_embedding(t_image)
        x = self.conv_in(latents.to(self.conv_in.weight.dtype))
        skips, state = [x], None if query is None else torch.zeros_like(query)
        for block in self.down_blocks:
            x, state = block(x, emb, context, query, state, skips)
        x, state = self.mid_block(x, emb, context, query, state)
        return x, skips, emb, state

    def denoise_image(self, noisy_latents: Tensor, t_image: Tensor, context: Tensor) -> Tensor:
        """Φ_u (Eq. 4), the text query masked: what Stable Diffusion computes
        -> prediction, as noisy_latents."""
        x, skips, emb, _ = self.encode(noisy_latents, t_image, context)
        return self.decode(x, skips, emb, context)

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
        """The decoder half: what `encode` returned -> prediction [B, C, H, W]."""
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def denoise_query(self, noisy_query: Tensor, t_text: Tensor, latents: Tensor, null_context: Tensor,
                      image_tokens: bool = False) -> Tensor:
        """Φ_θ (Eq. 7): noisy_query e_t [B, D], t_text [B], the clean image as condition
        -> prediction [B, D]; with image_tokens the alignment transformer's, averaged, instead."""
        query = noisy_query.to(self.conv_in.weight.dtype) + self.query_time_embedding(t_text)
        # The same for all: 0 … T-1 mean noisy images.
        t_image = torch.full_like(t_text, self.condition_timestep)
        features, _, _, state = self.encode(latents, t_image, null_context, query if self.fused else None)
        state = state if self.fused else query
        if image_tokens:
            return self.query_head.tokens(state, features)[:, 1:].mean(dim=1)
        return self.query_head(state, features)

    def denoise_both(self, noisy_latents: Tensor, t_image: Tensor, context: Tensor, noisy_query: Tensor,
                     t_text: Tensor, latents: Tensor, null_context: Tensor) -> tuple[Tensor, Tensor]:
        """`denoise_image` and `denoise_query` of as many pairs each, the encoder half in one pass over all of
        them: its weights are read, and their gradients written, once. -> what the two would return."""
        count = len(noisy_latents)
        query = noisy_query.to(self.conv_in.weight.dtype) + self.query_time_embedding(t_text)
        times = torch.cat([t_image, torch.full_like(t_text, self.condition_timestep)])
        both = torch.cat([context, null_context.expand(len(latents), -1, -1)])
        x, skips, emb, state = self.encode(torch.cat([noisy_latents, latents]), times, both,
                                           query if self.fused else None)
        pred = self.decode(x[:count], [skip[:count] for skip in skips], emb[:count], context)
        return pred, self.query_head(state if self.fused else query, x[count:])

    forward = denoise_image


# ---------------------------------------------------------------- the whole
class DiffDis(nn.Module):
    """The networks, the tokenizer and the configuration: all that sampling, scoring and training need."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.vocab_size != config.text.vocab_size:
            raise ValueError(f"the tokenizer knows {tokenizer.vocab_size} tokens, the text encoder "
                             f"{config.text.vocab_size}")
        self.config, self.tokenizer = config, tokenizer
        self.tasks = ("generation", "alignment")          # what its weights were trained for
        self.data: str | None = None                      # and on, as --data has it; None: not recorded
        self.autoencoder = make_autoencoder(config.autoencoder)
        self.text_encoder = TextEncoder(config.text)
        self.unet = UNet(config)
        # As CLIP: exp of it is 1/temperature.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("null_tokens", tokenizer([""]), persistent=False)
        self.text_encoder.initialise()

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> context [B, L, D], text_query [B, D] of unit norm."""
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    def encode_image(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] in [-1, 1]
        -> latents: the posterior's mean, or a sample if noise is given, scaled."""
        return self.draw_latents(*self.autoencoder.moments(images), noise)

    def draw_latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """The autoencoder's moments, each [B, C, h, w] -> latents."""
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return mean * self.config.autoencoder.scale

    def read_batch(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Batch.images, uint8 pixels or the moments of a latent cache -> latents."""
        if images.dtype == torch.uint8:
            return self.encode_image(to_float(images), noise)
        return self.draw_latents(*images.float().chunk(2, dim=1), noise)

    def decode_image(self, latents: Tensor) -> Tensor:
        """latents -> images [B, 3, H, W], nominally in [-1, 1] (clamp before saving)."""
        return self.autoencoder.decode(latents)

    def denoise_image(self, noisy_latents: Tensor, t_image: Tensor, context: Tensor) -> Tensor:
        """The image target's prediction (ε̂ for `sd-v1`), shape of the latents (Eq. 4)."""
        return self.unet.denoise_image(noisy_latents, t_image, context)

    def image_features(self, noisy_query: Tensor, t_text: Tensor, latents: Tensor) -> Tensor:
        """As `denoise_query` -> the alignment transformer's image tokens, averaged [B, D]: what
        `fid --features` compares images by (our choice)."""
        context = self.text_encoder(self.null_tokens)[0]
        return self.unet.denoise_query(noisy_query, t_text, latents, context, image_tokens=True)

    def denoise_query(self, noisy_query: Tensor, t_text: Tensor, latents: Tensor) -> Tensor:
        """noisy_query [B, D], t_text [B], clean latents -> the text target's prediction [B, D] (Eq. 7).

        There is no argument for a text: the condition c is always the null prompt's,
        so the answer cannot leak.
        """
        return self.unet.denoise_query(noisy_query, t_text, latents, self.text_encoder(self.null_tokens)[0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Image size in px -> (channels, height, width) of its latents.

        Raises ValueError on an unfit size.
        """
        side = self.config.autoencoder.factor
        if height % side or width % side or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise ValueError(f"size is {width}x{height} px, expected multiples of {side} up to {MAX_SIDE}")
        return self.config.autoencoder.latent_channels, height // side, width // side


def is_new(name: str) -> bool:
    """Whether the parameter of this name is DiffDis's own, rather than one Stable Diffusion has."""
    return "query_" in name or name == "logit_scale"


# ---------------------------------------------------------------- Stable Diffusion's names
# Our names are those of a diffusers folder. The original files (CompVis) count through flat lists instead.
PREFIXES = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.",
            "text_encoder": "cond_stage_model.transformer."}
# Part -> its folder, its file, the prefix of names in it.
FOLDERS = {"unet": ("unet", "diffusion_pytorch_model", ""),
           "autoencoder": ("vae", "diffusion_pytorch_model", ""),
           "text_encoder": ("text_encoder", "model", "text_model.")}
QUERY_PREFIX = "diffdis."         # what Stable Diffusion does not have, in files we write under its names
# What such files hold beside the networks.
IGNORED = re.compile(r".*position_ids$|model_ema\.|first_stage_model\.loss\.|"
                     r"(cond_stage_model|text_encoder)\.((transformer\.)?(text_model\.)?"
                     r"(logit_scale|text_projection))|"
                     r"((log_|sqrt_)?(one_minus_|recip(m1)?_)?alphas|betas|posterior_|lvlb_|logvar)[^.]*$")
RES_BLOCK = r"(put_blocks\.\d+\.0|middle_block\.\d)\."
# Spellings that older files have for what is now called otherwise.
OLD_SPELLINGS = [(r"(attentions\.\d\.)query\.", r"\1to_q."), (r"(attentions\.\d\.)key\.", r"\1to_k."),
                 (r"(attentions\.\d\.)value\.", r"\1to_v."),
                 (r"(attentions\.\d\.)proj_attn\.", r"\1to_out.0."), (r"^text_model\.", "")]


def compvis_rules(config: Config) -> dict[str, list]:
    """Part -> [(pattern in our name, CompVis's spelling)], applied one after the other.

    x is a level, i a block within it; a level has n entries in the flat lists.
    """
    n, attention = config.unet.res_blocks + 1, config.unet.attention[::-1]
    top = len(config.autoencoder.channels) - 1
    unet = [
        (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_in\.", "input_blocks.0.0."), (r"^conv_norm_out\.", "out.0."), (r"^conv_out\.", "out.2."),
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda x, i: f"input_blocks.{1 + n * x + i}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda x, i: f"input_blocks.{1 + n * x + i}.1"),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda x: f"input_blocks.{n + n * x}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda i: f"middle_block.{2 * i}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda x, i: f"output_blocks.{n * x + i}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda x, i: f"output_blocks.{n * x + i}.1"),
        (r"^up_blocks\.(\d)\.upsamplers\.0",
         lambda x: f"output_blocks.{n * x + n - 1}.{2 if attention[x] else 1}"),
        (RES_BLOCK + "norm1", r"\1.in_layers.0"), (RES_BLOCK + "conv1", r"\1.in_layers.2"),
        (RES_BLOCK + "time_emb_proj", r"\1.emb_layers.1"),
        (RES_BLOCK + "norm2", r"\1.out_layers.0"), (RES_BLOCK + "conv2", r"\1.out_layers.3"),
        (RES_BLOCK + "conv_shortcut", r"\1.skip_connection")]
    autoencoder = [
        (r"mid_block\.resnets\.(\d)", lambda i: f"mid.block_{i + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"), (r"attn_1\.to_([qkv])", r"attn_1.\1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda x: f"up.{top - x}.block"),     # counted from the finest
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda x: f"up.{top - x}.upsample"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut")]
    return {"unet": unet, "autoencoder": autoencoder, "text_encoder": [("^", "text_model.")]}


def to_compvis(names: Iterable[str], config: Config) -> dict[str, str]:
    """Our names of Stable Diffusion's parameters -> {our name: CompVis's}."""
    rules, found = compvis_rules(config), {}
    for name in names:
        part, spelling = name.split(".", 1)
        for pattern, to in rules[part]:
            new = to if isinstance(to, str) else lambda match, to=to: to(*map(int, match.groups()))
            spelling = re.sub(pattern, new, spelling)
        found[name] = PREFIXES[part] + spelling
    return found


def from_compvis(raw: dict[str, Tensor], names: list[str], config: Config, weights: str) -> dict[str, Tensor]:
    """A CompVis file's tensors under our names; those it has and we know nothing of keep theirs.

    weights: "ema" takes the averages of the UNet where the file has them, "raw" never.
    """
    raw, found = dict(raw), {}
    text = PREFIXES["text_encoder"]
    if not any(name.startswith(text + "text_model.") for name in raw):           # some files leave it out
        raw = {name.replace(text, text + "text_model.", 1): value for name, value in raw.items()}
    has_averages = sum(name.startswith("model_ema.") for name in raw) > 100
    for name, theirs in to_compvis([name for name in names if not is_new(name)], config).items():
        averaged = "model_ema." + theirs.removeprefix("model.").replace(".", "")
        if weights == "ema" and has_averages and averaged in raw:
            found[name] = raw.pop(averaged)
            raw.pop(theirs, None)
        elif theirs in raw:
            found[name] = raw.pop(theirs)
    for name in [name for name in raw if name.startswith(QUERY_PREFIX)]:
        found[name.removeprefix(QUERY_PREFIX)] = raw.pop(name)
    return raw | found


# ---------------------------------------------------------------- CLIP's published names
# Our names are transformers'. OpenAI's files and OpenCLIP's share others; see `from_open_clip`.
OPEN_CLIP_RULES = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"), (r"^text_projection$", "text_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"(layers\.\d+\.)ln_([12])\.", r"\1layer_norm\2."), (r"(layers\.\d+\.)attn\.", r"\1self_attn."),
    (r"(layers\.\d+\.mlp\.)c_fc\.", r"\1fc1."), (r"(layers\.\d+\.mlp\.)c_proj\.", r"\1fc2.")]
# What such files hold beside the weights: masks and numbers that follow from the shapes.
CLIP_IGNORED = re.compile(r"(.*\.)?(position_ids|attn_mask)$|(input_resolution|context_length|vocab_size)$")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The fields of an open_clip_config.json that our two towers obey, or that the tensors' shapes tell anyway.
OPEN_CLIP_FIELDS = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}}


def from_open_clip(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's or OpenAI's tensors under our names; those we know nothing of keep theirs.

    There q, k and v have one weight and one bias, and the projections are [width, embedding], ours
    transposed.
    """
    found = {}
    for theirs, value in raw.items():
        name = theirs
        for pattern, spelling in OPEN_CLIP_RULES:
            name = re.sub(pattern, spelling, name)
        packed = re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", name)
        if packed and value.dim() and len(value) % 3 == 0:
            found |= {f"{packed[1]}{part}_proj.{packed[2]}": third
                      for part, third in zip("qkv", value.chunk(3))}
        elif theirs in ("visual.proj", "text_projection") and value.dim() == 2:
            found[name] = value.t().contiguous()
        else:
            found[name] = value
    return found


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises ValueError, or OSError where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): fetch it again") from None


def section(config: dict, name: str, path: Path, needed: bool) -> dict:
    """The object of this name in a JSON file; {} if it is absent and not needed. Raises ValueError."""
    found = config.get(name) or {}
    if not isinstance(found, dict) or (needed and not found):
        raise ValueError(f"{path} has {config.get(name)!r} for {name}, expected an object: fetch it again")
    return found


def transformers_options(path: Path) -> dict:
    """What shapes do not tell of a transformers CLIPModel, from its config.json
    -> {"activation", "heads", "text_heads"}. A field that is absent has transformers' default there.

    Raises ValueError.
    """
    config, found = read_json(path), {}
    for tower, heads in (("vision", 12), ("text", 8)):
        # Old files write a tower's fields twice; transformers too lets the second win.
        fields = (section(config, f"{tower}_config", path, needed=False)
                  | section(config, f"{tower}_config_dict", path, needed=False))
        found[tower] = fields.get("num_attention_heads", heads), fields.get("hidden_act", "quick_gelu")
        if fields.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{path}: layer_norm_eps of {tower}_config is {fields['layer_norm_eps']}, "
                             "expected 1e-05")
    (heads, activation), (text_heads, other) = found["vision"], found["text"]
    if activation != other:
        raise ValueError(f"{path}: hidden_act is {activation!r} for images and {other!r} for texts, "
                         "expected one for both")
    return {"activation": activation, "heads": heads, "text_heads": text_heads}


def open_clip_options(file: Path, tensors: dict[str, Tensor]) -> dict:
    """What shapes do not tell of a file with OpenCLIP's names -> {"activation", "head_width", "text_heads"}.

    OpenAI's own files, told by the scalar input_resolution in them, have quick GELU, and heads 64 wide.
    Raises FileNotFoundError or ValueError: no open_clip_config.json beside another file, or one that asks for
    what our CLIP is not.
    """
    if "input_resolution" in tensors:
        return {"activation": "quick_gelu"}
    path = file.parent / "open_clip_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{file} has OpenCLIP's names, but its tensors do not tell whether the activation is quick GELU "
            "or GELU, and a wrong guess would change every result without a word: put the model's "
            f"open_clip_config.json beside it, at {path}")
    config = read_json(path)
    fields = {"model_cfg": section(config, "model_cfg", path, needed=True)}
    for part in ("vision_cfg", "text_cfg"):
        fields[part] = section(fields["model_cfg"], part, path, needed=True)
    for part, known in OPEN_CLIP_FIELDS.items():
        if strange := sorted(set(fields[part]) - known):
            raise ValueError(f"{path}: {part} has {', '.join(strange)}, which this CLIP does not know; "
                             f"expected only {', '.join(sorted(known))}")
    pixels = section(config, "preprocess_cfg", path, needed=False)
    for name, ours in (("mean", list(CLIP_MEAN)), ("std", list(CLIP_STD))):
        if pixels.get(name, ours) != ours:
            raise ValueError(f"{path}: preprocess_cfg has {name} {pixels[name]}, expected CLIP's {ours}")
    return {"activation": "quick_gelu" if fields["model_cfg"].get("quick_gelu") else "gelu",
            "head_width": fields["vision_cfg"].get("head_width", 64),
            "text_heads": fields["text_cfg"].get("heads", 8)}          # OpenCLIP's defaults


def clip_config(path: Path, tensors: dict[str, Tensor], options: dict) -> ClipConfig:
    """The configuration of a published CLIP: the shapes of its tensors, under our names, and the options.

    options: of `transformers_options` or `open_clip_options`; heads are 64 wide where they do not say.
    Raises ValueError, naming what does not fit.
    """
    def shape(name: str, dims: int) -> torch.Size:
        if name not in tensors or tensors[name].dim() != dims:
            found = f"has it of shape {tuple(tensors[name].shape)}" if name in tensors else "lacks it"
            raise ValueError(f"{path}: expected {name} of {dims} dimensions, the file {found}; only CLIPs "
                             "that read images with a vision transformer are taken")
        return tensors[name].shape

    def layers(tower: str) -> int:
        pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
        return len({match[1] for match in map(pattern.match, tensors) if match})
    width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    embedding, _ = shape("visual_projection.weight", 2)
    vocab_size, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    length, _ = shape("text_model.embeddings.position_embedding.weight", 2)
    try:
        heads = options.get("heads", width // options.get("head_width", 64))
        text_heads = options.get("text_heads", text_width // 64)
        if not (isinstance(heads, int) and isinstance(text_heads, int) and heads > 0 and text_heads > 0):
            raise ValueError(f"{heads!r} and {text_heads!r} attention heads, expected whole numbers")
        text = TextConfig(vocab_size, length, text_width, layers("text_model"), text_heads)
        # One position is the class token's, the others are a square of patches.
        image_size = patch * math.isqrt(positions - 1)
        return ClipConfig(width, layers("vision_model"), heads, patch, image_size, embedding, text,
                          options["activation"])
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: no CLIP can be built from its shapes and configuration: {error}") from None


def describe_clip(path: Path, tensors: dict[str, Tensor], options: dict) -> dict:
    """What `build` needs for a published CLIP, as `describe` writes it; arguments as `clip_config`."""
    config = clip_config(path, tensors, options)
    tokenizer = find_tokenizer(path, config.text.context_length)
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(f"{path}: its text tower knows {config.text.vocab_size} tokens, the tokenizer found "
                         f"for it {tokenizer.vocab_size}: put its vocab.json and merges.txt beside it")
    return {"network": "clip", "config": config.to_dict(), "tokenizer": tokenizer.to_dict(), "foreign": True}


# ---------------------------------------------------------------- files; nothing in them is ever run
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A .safetensors file -> tensors mapped from the file (read when touched), metadata.

    The format: 8 bytes of header length; a JSON header of name: dtype, shape, byte range; then the bytes.
    Raises ValueError where the ranges do not tile the rest of the file exactly.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{path} is no .safetensors file, or is cut short: "
                             f"its header would have {length} bytes, the file has {size}")
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        metadata = dict(header.pop("__metadata__", {}))
        rows = sorted((*entry["data_offsets"], entry["dtype"], tuple(entry["shape"]), name)
                      for name, entry in header.items())
        tensors, at, start = {}, 0, 8 + length
        for begin, end, kind, shape, name in rows:
            if kind not in DTYPES:
                raise ValueError(f"{name} is of type {kind}, known are {', '.join(DTYPES)}")
            dtype = DTYPES[kind]
            fits = min(shape, default=0) >= 0 and end - begin == math.prod(shape) * dtype.itemsize
            if not fits or begin != at or start + end > size:
                raise ValueError(f"{name}: bytes {begin} to {end} of a file of {size} for {kind} {shape}")
            # One map per tensor: as views of one map, saving a single tensor would write out the whole file.
            flat = torch.empty(0, dtype=torch.uint8) if begin == end else torch.from_numpy(
                np.memmap(path, np.uint8, "c", start + begin, end - begin))
            if flat.data_ptr() % dtype.itemsize:
                flat = flat.clone()          # not aligned in the file
            tensors[name], at = flat.view(dtype).view(shape), end
        if start + at != size:
            raise ValueError(f"{size - start - at} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path}: its header is not usable ({error}): fetch it again") from None
    return tensors, metadata


class Inert(dict):
    """What stands in for an object of another program's class in a checkpoint: it holds nothing."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


class Attributes(dict):
    """What stands in for a module of a TorchScript archive: its attributes by name, and no code."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors in it and in the modules below it, under dotted names."""
        found = {}
        for name, value in self.items():
            if isinstance(value, Attributes):
                found |= value.tensors(f"{prefix}{name}.")
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value.detach()
        return found


def plain(value: object, *kind) -> object:
    """What stands in for TorchScript's functions that give a list or a dict its type: it stays as it is."""
    return value


# Names in a TorchScript archive's pickle begin so; what stands in for them.
SCRIPTED = {"__torch__.": Attributes, "torch.jit._pickle.": plain}
# How files of torch.save before 1.6 begin: a pickled number.
OLD_FORMAT = b"\x80\x02\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
HARMLESS = ("pytorch_lightning.", "lightning.", "numpy.")      # whose objects training programs leave behind


def without_code(path: Path) -> Path | BinaryIO:
    """A TorchScript archive -> what torch.save would have written of it, in memory; another file -> its path.

    Such an archive is a zip of a pickle, the tensors' bytes, and program text that `torch.jit.load` compiles:
    `torch.load` refuses it. The pickle only names classes of that text; `read_torch` has stand-ins for them.
    """
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return path
        kept = io.BytesIO()
        with zipfile.ZipFile(kept, "w") as copy:
            for name in archive.namelist():
                if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|(\.data/)?version|byteorder)", name):
                    copy.writestr(name, archive.read(name))
    kept.seek(0)
    return kept


def read_torch(path: Path) -> object:
    """What torch.save wrote, mapped to CPU memory, without running any code from the file.

    Objects of HARMLESS packages become `Inert`, modules of a TorchScript archive `Attributes`; anything else
    but tensors and plain values is refused. Raises ValueError.
    """
    if path.suffix == ".safetensors":      # torch.load would hand such a name to another library
        raise ValueError(f"{path} is no .safetensors file; if torch.save wrote it, name it .ckpt")
    try:
        with path.open("rb") as file:
            old = file.read(len(OLD_FORMAT)) == OLD_FORMAT
        source = path if old else without_code(path)
        # The old format takes no exceptions, nor can it be mapped: only tensors and plain values are read.
        wanted = [] if old else torch.serialization.get_unsafe_globals_in_checkpoint(source)
        refused = [name for name in wanted if not name.startswith((*HARMLESS, *SCRIPTED))]
        if refused:
            raise ValueError(f"it wants to run {', '.join(refused)}, which is refused")
        stubs = [(next((stub for start, stub in SCRIPTED.items() if name.startswith(start)), Inert), name)
                 for name in wanted]
        if source is not path:
            source.seek(0)               # the line above has read it
        with torch.serialization.safe_globals(stubs):
            return torch.load(source, map_location="cpu", weights_only=True,
                              mmap=not old and source is path)
    except (RuntimeError, ValueError, TypeError, EOFError, OSError, LookupError, AttributeError,
            AssertionError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        # Of torch's own words, only the first sentence: it goes on to advise switching safety off.
        reason = str(error).splitlines()[0].split(". ")[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no readable checkpoint (truncated, or not written by torch.save): "
                         f"{reason}") from None


def part_file(folder: Path, stem: str) -> Path:
    """The file of one part of a diffusers folder: full precision and .safetensors first."""
    old = "pytorch_model" if stem == "model" else stem
    names = [f"{stem}.safetensors", f"{old}.bin", f"{stem}.fp16.safetensors", f"{old}.fp16.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}: expected a folder of Stable "
                            "Diffusion or of transformers' CLIPModel")


def tensors_of(raw: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a TorchScript archive, whatever else is in it. Raises ValueError."""
    if isinstance(raw, Attributes):
        try:
            return raw.tensors()
        except RecursionError:
            raise ValueError(f"{path} is damaged: its modules hold one another") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected a dict of tensors")
    return {name: value for name, value in raw.items() if isinstance(name, str) and isinstance(value, Tensor)}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A file of published weights, .safetensors or torch.save's -> its tensors. Raises ValueError."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)[0]
    raw = read_torch(file)
    return tensors_of(raw.get("state_dict", raw) if isinstance(raw, dict) else raw, file)


def read_open_clip(file: Path, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """A file's tensors under OpenCLIP's names -> what `build` needs, tensors under ours. Raises as `load`."""
    # A training checkpoint has this before every name.
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if custom := [name for name in tensors if name.startswith("text.")]:
        raise ValueError(f"{file} holds {custom[0]}: an OpenCLIP model with a text tower of its own make; "
                         "expected CLIP's (transformer.resblocks..., token_embedding.weight)")
    options, named = open_clip_options(file, tensors), from_open_clip(tensors)
    return describe_clip(file, named, options), named


def read_clip_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """A folder of transformers' CLIPModel or of OpenCLIP -> what `build` needs, tensors under our names.

    Raises FileNotFoundError or ValueError.
    """
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    published = [path / name for name in OPEN_CLIP_FILES if (path / name).is_file()]
    # Some folders are both: OpenCLIP's part is then taken only if it is whole.
    whole = published and (path / "open_clip_config.json").is_file()
    if whole or (published and config.get("model_type") != "clip"):
        return read_open_clip(published[0], read_tensors(published[0]))
    if config.get("model_type") != "clip":
        raise ValueError(f"{path / 'config.json'} says model_type {config.get('model_type')!r}, expected "
                         "'clip': a transformers CLIPModel. (A Stable Diffusion folder has a folder unet.)")
    tensors = read_tensors(part_file(path, "model"))
    return describe_clip(path, tensors, transformers_options(path / "config.json")), tensors


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A diffusers folder's tensors under our names -> tensors, metadata (of our own part, if it has one)."""
    tensors, metadata = {}, {}
    for part, (folder, stem, _) in FOLDERS.items():
        for name, value in read_tensors(part_file(path / folder, stem)).items():
            for old, new in OLD_SPELLINGS:
                name = re.sub(old, new, name)
            tensors[f"{part}.{name}"] = value
    if (path / "diffdis/query.safetensors").is_file():
        query, metadata = read_safetensors(path / "diffdis/query.safetensors")
        tensors |= {name.removeprefix(QUERY_PREFIX): value for name, value in query.items()}
    return tensors, metadata


# ---------------------------------------------------------------- downloads
MODELS = ("sd-v1-5", "sd-v1-4")      # whose licence is CreativeML OpenRAIL-M
DOWNLOADS = {
    "sd-v1-5": ("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
                "v1-5-pruned-emaonly.safetensors",
                "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"),
    "sd-v1-4": ("https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt",
                "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"),
    "vocabulary": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    # Of this one only the beginning of the sha256 is published, in its name.
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth", "6726825d"),
}


def download(name: str) -> Path:
    """The cached file of a name in DOWNLOADS, fetched first if it is not there and its sha256 checked."""
    url, sha256 = DOWNLOADS[name]
    path = CACHE / url.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}")
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise OSError(f"could not download {url} ({error}): try again, "
                          f"or put the file at {path} yourself") from None
    return path


def locate(path: str | Path) -> Path:
    """A path, or the downloaded file of one of MODELS."""
    return download(str(path)) if str(path) in MODELS else Path(path)


def find_tokenizer(path: Path, length: int) -> Tokenizer:
    """CLIP's vocabulary for weights at `path`: in their folder, beside them, in the cache, or downloaded."""
    file = Path(DOWNLOADS["vocabulary"][0]).name
    for folder in (path, path.parent):
        for place in (folder / "tokenizer", folder / file):
            if place.exists():
                return Tokenizer.from_file(place, length)
        if (folder / "vocab.json").is_file():      # transformers keeps a CLIP's in the folder itself
            return Tokenizer.from_file(folder, length)
    return Tokenizer.from_file(download("vocabulary"), length)


# ---------------------------------------------------------------- checkpoints
FORMAT = "diffdis-1"


def describe(model: DiffDis | Clip) -> dict:
    """What a file must remember besides tensors."""
    return {"network": "clip" if isinstance(model, Clip) else "diffdis", "config": model.config.to_dict(),
            "tokenizer": model.tokenizer.to_dict(), "data": model.data, "tasks": list(model.tasks)}


def save(path: str | Path, model: DiffDis | Clip, ema: dict | None = None,
         training: dict | None = None) -> None:
    """Write a checkpoint atomically: it is complete under its name, or the old one is still there.

    ema: averaged parameters by name, preferred by `load`;
    training: what resuming needs (tensors, plain dicts).
    Raises OSError, naming the path, when it cannot be written.
    """
    checkpoint = {"format": FORMAT, **describe(model), "model": model.state_dict(), "ema": ema,
                  "training": training}
    write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of ours to CPU memory (mapped, not copied), without running any code from it.

    Raises FileNotFoundError or ValueError: no file, not a checkpoint, another program's, truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py`, or give --ckpt")
    checkpoint = read_torch(path)
    if not is_ours(checkpoint):
        found = (", ".join(map(str, list(checkpoint)[:4])) if isinstance(checkpoint, dict) else
                 type(checkpoint).__name__)
        raise ValueError(f"{path} is not a DiffDis checkpoint: expected format {FORMAT!r}, "
                         f"found {found or 'nothing'}")
    missing = {"config", "tokenizer", "model", "ema", "training"} - set(checkpoint)
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def is_ours(checkpoint: object) -> bool:
    return isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT


def read_weights(path: Path, weights: str) -> tuple[dict, dict[str, Tensor], bool]:
    """Any file or folder that `load` takes -> what `describe` wrote or {}, tensors, are their names ours."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py`, give a file or "
                                "folder of Stable Diffusion v1 or CLIP, or name one to download: "
                                f"{', '.join(MODELS)}")
    if path.is_dir() and not (path / "unet").is_dir() and any(
            (path / name).is_file() for name in ("config.json", *OPEN_CLIP_FILES)):
        return (*read_clip_folder(path), True)
    if path.is_dir():
        tensors, metadata = read_folder(path)
    elif path.open("rb").read(9)[8:] == b"{":
        tensors, metadata = read_safetensors(path)
    else:
        raw, metadata = read_torch(path), {}
        if is_ours(raw):
            checkpoint = read_checkpoint(path)
            averages = checkpoint["ema"] if weights == "ema" and checkpoint["ema"] is not None else {}
            return checkpoint, tensors_of(checkpoint["model"], path) | tensors_of(averages, path), True
        tensors = tensors_of(raw.get("state_dict", raw) if isinstance(raw, dict) else raw, path)
    if any(name.startswith(("visual.", "module.visual.")) for name in tensors):
        return (*read_open_clip(path, tensors), True)
    if not path.is_dir() and not any(name.startswith(PREFIXES["unet"]) for name in tensors):
        found = ", ".join(list(tensors)[:4]) or "no tensor"
        raise ValueError(f"{path} is not a DiffDis checkpoint (format {FORMAT!r}), nor one of Stable "
                         f"Diffusion ({PREFIXES['unet']}...) or OpenCLIP (visual....): found {found}. "
                         "Of weights under transformers' names give the folder, with its config.json")
    try:
        description = dict(json.loads(metadata.get("diffdis", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its description is no JSON ({error})") from None
    return description, tensors, path.is_dir()


def build(description: dict, path: str | Path, adapt: Callable = lambda config: config) -> DiffDis | Clip:
    """The networks that a file describes, its tensors not yet in them. Raises ValueError."""
    try:
        tokenizer = Tokenizer(**description["tokenizer"])
        kind, config = (Clip, ClipConfig) if description.get("network") == "clip" else (DiffDis, Config)
        model = kind(adapt(config.from_dict(description["config"])), tokenizer)
        model.tasks, model.data = tuple(description.get("tasks", model.tasks)), description.get("data")
        return model
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: no networks can be built from it "
                         f"({type(error).__name__}: {error})") from None


def load(path: str | Path, device: str | torch.device = "cpu", weights: str = "ema",
         dtype: torch.dtype = torch.float32, adapt: Callable[[Config], Config] = lambda config: config,
         only_draw: bool = False) -> DiffDis | Clip:
    """A checkpoint as a model in eval mode, averaged weights preferred.

    path: a file that `save` or `export` wrote; Stable Diffusion v1 as .ckpt, .safetensors (CompVis's names)
    or a diffusers folder; a published CLIP: transformers' folder, OpenCLIP's file or folder, OpenAI's .pt; or
    one of MODELS, downloaded once; weights: "ema" (if the file has them) or "raw"; dtype: of the parameters;
    adapt: changes the configuration before the networks are built. What a Stable Diffusion file does not
    have, the query stream, starts from random weights, and this is said.
    only_draw: leave out what only reading images needs, the query stream and the autoencoder's encoder.
    Raises FileNotFoundError or ValueError: no file, not a checkpoint, truncated, tensors that do not fit.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is {weights!r}, expected 'ema' or 'raw'")
    path = locate(path)
    description, tensors, ours = read_weights(path, weights)
    foreign = not description or description.get("foreign", False)
    if not description:
        config = replace(PRESETS["sd-v1"], image_size=512)       # what Stable Diffusion v1 was trained at
        tokenizer = find_tokenizer(path, config.text.context_length)
        description = {"config": config.to_dict(), "tokenizer": tokenizer.to_dict()}
    with torch.device("meta"):       # no storage: nothing is initialised only to be overwritten
        model = build(description, path, adapt)
    every = list(model.state_dict())
    if not ours:
        tensors = from_compvis(tensors, every, model.config, weights)
    if only_draw and isinstance(model, DiffDis):
        drop_reading_parts(model)
        dropped = set(every) - set(model.state_dict())
        tensors = {name: value for name, value in tensors.items() if name not in dropped}
    put_tensors(model, tensors, path, foreign)
    model.to(device)
    for name, part in model.named_children():
        if name != "autoencoder" or dtype != torch.float16:     # there it overflows: black pictures
            part.to(dtype)
    return model.eval().requires_grad_(False)


def drop_query_stream(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name in [name for name, _ in module.named_children() if name.startswith("query_")]:
            setattr(module, name, None)


def drop_reading_parts(model: DiffDis) -> None:
    """Take away the modules that drawing never runs."""
    drop_query_stream(model)
    if model.config.autoencoder.kind == "kl":
        model.autoencoder.encoder = model.autoencoder.quant_conv = None


def check_fit(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], path: str | Path,
              what: str = "the configuration and flags") -> None:
    """Each tensor of a file must have its place, each place its tensor; what: has the places.

    Raises ValueError naming what does not fit.
    """
    wrong = ([f"lacks {name}" for name in shapes if name not in tensors]
             + [f"has an unknown {name}" for name in tensors if name not in shapes]
             + [f"has {name} as {value.dtype}, {value.layout}" for name, value in tensors.items()
                if name in shapes and not (value.is_floating_point() and value.layout == torch.strided
                                           and value.device.type == "cpu")]
             + [f"has {name} of shape {tuple(value.shape)} instead of {tuple(shapes[name])}"
                for name, value in tensors.items() if name in shapes and value.shape != shapes[name]])
    if wrong:
        raise ValueError(f"{path}: its tensors do not fit {what}: "
                         f"it {'; '.join(wrong[:4])}"
                         + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))


def put_tensors(model: DiffDis | Clip, tensors: dict[str, Tensor], path: str | Path,
                foreign: bool = False) -> None:
    """Make a file's tensors the model's own, without a copy.

    foreign: the file is another program's: it may hold what IGNORED or CLIP_IGNORED names, and Stable
    Diffusion's may lack the query stream.
    Raises ValueError naming what does not fit.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    needless = CLIP_IGNORED if isinstance(model, Clip) else IGNORED
    ignored = [name for name in tensors if foreign and name not in shapes and needless.match(name)]
    # Attention as 1×1 convolutions, half precision: other ways of writing the same.
    tensors = {name: value.flatten(1) if value.dim() == 4 and len(shapes.get(name, ())) == 2 else value
               for name, value in tensors.items() if name not in ignored}
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    fresh = [name for name in shapes if foreign and isinstance(model, DiffDis)
             and name not in tensors and is_new(name)]
    check_fit(tensors, {name: shape for name, shape in shapes.items() if name not in fresh}, path)
    started = start_query_stream(model, set(fresh))
    model.load_state_dict(tensors | started, assign=True)
    if isinstance(model, DiffDis):
        model.null_tokens = model.tokenizer([""])
    if fresh:
        model.tasks = ("generation",)        # a random query stream beside pretrained weights
    if foreign:
        numbers = sum(value.numel() for value in started.values())
        kinds = sorted({re.search(r"query_\w+|logit_scale", name)[0] for name in fresh})
        new = (f"new, from random weights: {len(fresh)} tensors, {numbers:,} numbers "
               f"({', '.join(kinds) or 'none'}); " if isinstance(model, DiffDis) else "")
        print(f"{path}: loaded {len(tensors)} tensors; {new}"
              f"ignored: {len(ignored)} ({', '.join(ignored[:3] + ['...'] * (len(ignored) > 3)) or 'none'})")


def start_query_stream(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Random starts, PyTorch's own, for these parameters of a model without storage."""
    started = {}
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if own and own <= names:
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
            started |= {f"{prefix}.{name}": p.data for name, p in module.named_parameters(recurse=False)}
    if "logit_scale" in names:
        started["logit_scale"] = torch.tensor(math.log(1 / 0.07))
    return started


# ---------------------------------------------------------------- export
def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """tensors in any layout -> a .safetensors file, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [at, at := at + value.numel() * value.dtype.itemsize]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)       # tensors begin at a multiple of 8

    def write(file: BinaryIO) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for value in tensors.values():
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    write_atomically(path, write)


def export(model: DiffDis, out: str | Path) -> None:
    """Write a model for other programs: OUT.safetensors (CompVis's names) or a diffusers folder OUT.

    Stable Diffusion's part is what they expect; the query stream, the configuration and the vocabulary stand
    beside it, under a prefix or in a folder `diffdis`, so that `load` gives the whole model back.
    Raises ValueError for a model that is not of Stable Diffusion v1's make.
    """
    config, out = model.config, Path(out)
    if not isinstance(model, DiffDis):
        raise ValueError("a CLIP is not exported: only DiffDis is")
    made = (config.autoencoder.kind, config.image_target, config.image_schedule)
    if made != ("kl", "noise", "linear"):
        raise ValueError("only a model with Stable Diffusion's autoencoder, target and schedule is exported "
                         f"('kl', 'noise', 'linear'): this one has {made}")
    if out.suffix not in (".safetensors", "") or out.name == "":
        raise ValueError(f"export to {str(out)!r}: expected OUT.safetensors, or a folder without a suffix")
    tensors, metadata = model.state_dict(), {"diffdis": json.dumps(describe(model))}
    query = {QUERY_PREFIX + name: value for name, value in tensors.items() if is_new(name)}
    theirs = {name: value for name, value in tensors.items() if not is_new(name)}
    if out.suffix == ".safetensors":
        names = to_compvis(theirs, config)
        renamed = {names[name]: value[:, :, None, None] if re.search(r"attn_1\.\w+\.weight$", names[name])
                   and value.dim() == 2 else value for name, value in theirs.items()}
        write_safetensors(out, renamed | query, metadata)
        return
    for part, (folder, stem, prefix) in FOLDERS.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        write_safetensors(out / folder / f"{stem}.safetensors", {
            prefix + name.removeprefix(part + "."): value for name, value in theirs.items()
            if name.startswith(part + ".")}, {})
    (out / "diffdis").mkdir(exist_ok=True)
    write_safetensors(out / "diffdis/query.safetensors", query, metadata)
    for name, content in folder_configs(model).items():
        (out / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        write_atomically(out / name, lambda file, text=text: file.write(text.encode()))


def folder_configs(model: DiffDis) -> dict[str, dict | str]:
    """The text files of a diffusers folder, by path."""
    config, tokenizer = model.config, model.tokenizer
    unet, text, vae = config.unet, config.text, config.autoencoder
    levels = len(vae.channels)
    end = tokenizer.vocab_size - 1
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None], "feature_extractor": [None, None],
            "requires_safety_checker": False},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", "in_channels": vae.latent_channels,
            "out_channels": vae.latent_channels, "sample_size": config.image_size // vae.factor,
            "block_out_channels": unet.channels, "layers_per_block": unet.res_blocks,
            "attention_head_dim": unet.heads, "cross_attention_dim": text.width,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in unet.attention[::-1]]},
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "latent_channels": vae.latent_channels,
            "block_out_channels": vae.channels, "layers_per_block": 2, "scaling_factor": vae.scale,
            "sample_size": config.image_size, "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
            "vocab_size": text.vocab_size, "hidden_size": text.width, "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "projection_dim": text.width,
            "max_position_embeddings": text.context_length, "bos_token_id": end - 1, "eos_token_id": end,
            "pad_token_id": end},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "beta_end": 0.012, "num_train_timesteps": config.timesteps, "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"},
        "tokenizer/vocab.json": tokenizer.id,
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *tokenizer.merges]) + "\n",
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length,
            "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END},
    }


def main(argv: list[str] | None = None) -> None:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            print(f"error: {message}; --help explains every flag", file=sys.stderr)
            sys.exit(2)
    parser = Parser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Export a checkpoint for other programs.")
    parser.add_argument("command", choices=("export",), help="what to do")
    parser.add_argument("ckpt", help="a checkpoint that sample.py takes")
    parser.add_argument("out", help="OUT.safetensors (CompVis's names), or a folder in diffusers's layout")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged weights, or the last step's")
    args = parser.parse_args(argv)
    try:
        export(load(args.ckpt, weights=args.weights), args.out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
