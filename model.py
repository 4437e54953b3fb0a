"""The networks: Stable Diffusion's UNet with a text query in its encoder half, and all that stands around it.

What it is: the UNet first, then what only serves it (autoencoder, text encoder), `DiffDis`, which holds the
three, CLIP, with which the paper compares, and last the files: published weights in, checkpoints in and out.
What it is not: attention blocks (fusion.py), noise, losses and samplers (diffusion.py), or data (data.py).
Parameters are named as in diffusers' folders; what DiffDis adds: see `is_new`. Read next: sample.py."""
import argparse
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import zip_longest
from os import getenv
from pathlib import Path
from shutil import which

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import CACHE, Tokenizer, to_float, write_atomically
from fusion import AlignmentTransformer, Attention, FusionConfig, SpatialTransformer


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion's UNet; the defaults are v1's."""
    channels: tuple[int, ...] = (320, 640, 1280, 1280)   # per level; every level but the last halves the side
    attention: tuple[bool, ...] = (True, True, True, False)
    res_blocks: int = 2          # per level on the way down; one more on the way up
    heads: int = 8               # heads per attention, at every width
    depth: int = 1               # K, transformer blocks per attention block


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text transformer; the defaults are those of CLIP ViT-L/14."""
    vocab_size: int = 49408
    context_length: int = 77     # L, tokens
    width: int = 768             # D
    layers: int = 12
    heads: int = 12


@dataclass(frozen=True)
class AutoencoderConfig:
    """`kl`: Stable Diffusion's autoencoder. `patch`: a pixel-unshuffle, without weights and without loss."""
    kind: str = "kl"
    latent_channels: int = 4
    factor: int = 8              # pixels per latent, along a side
    scale: float = 0.18215       # latents are the autoencoder's output times this: about unit variance
    channels: tuple[int, ...] = (128, 256, 512, 512)


@dataclass(frozen=True)
class Config:
    """All that a checkpoint must remember to be used: the networks, and what they were trained to predict."""
    fusion: FusionConfig
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    image_size: int = 256        # px, side of the training images
    timesteps: int = 1000        # T
    condition_timestep: int = timesteps     # t_z of a condition (Table 7): T, at which no image is ever noisy
    image_target: str = "noise"  # Eq. 4 has noise; small presets predict data
    text_target: str = "data"    # Table 2
    image_schedule: str = "linear"
    text_schedule: str = "cosine"           # Table 3
    gamma: float = 1.0           # γ, scale of the text query inside its noise (Eq. 6)
    guidance_scale: float = 7.5  # 1 + w with which images are drawn unless another is given


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
        if self.width % self.heads or self.text.width % self.text.heads or self.image_size % self.patch:
            raise ValueError(f"{self}: widths must be multiples of heads, image_size of patch")


def from_dict(config: type, values: dict):
    """The inverse of `asdict`, also after JSON, where tuples are lists. Raises TypeError on other fields."""
    kinds = {field.name: field.type for field in fields(config)}
    return config(**{name: from_dict(kinds[name], value) if is_dataclass(kinds.get(name)) else
                     tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# `tiny` trains on two CPU cores in minutes, `small` is for one GPU, `sd-v1` is Stable Diffusion v1.
PRESETS = {
    "tiny": Config(
        FusionConfig(query_width=128, align_blocks=2, head_width=32),
        UNetConfig((64, 128), (True, True), 1, 4), TextConfig(1024, 24, 128, 2, 8), image_size=32, gamma=0.1,
        autoencoder=AutoencoderConfig("patch", 48, 4, 1.0, ()), image_target="data", guidance_scale=2.0),
    "small": Config(
        FusionConfig(query_width=384, align_blocks=4),
        UNetConfig((192, 384, 576), (True, True, True), 2, 6), TextConfig(8192, 48, 384, 6, 6),
        AutoencoderConfig("patch", 48, 4, 2.0, ()), image_size=64, image_target="data", guidance_scale=2.0),
    "sd-v1": Config(FusionConfig(query_width=768))}
# What alignment is compared with (Table 1): the paper's two, and one of like size for each small preset.
CLIPS = {"clip-tiny": ClipConfig(128, 4, 4, 4, 32, 128, PRESETS["tiny"].text),
         "clip-small": ClipConfig(384, 12, 6, 8, 64, 384, PRESETS["small"].text),
         "clip-vit-b32": ClipConfig(768, 12, 12, 32, 224, 512, TextConfig(width=512, heads=8)),
         "clip-vit-l14": ClipConfig()}


# ---------------------------------------------------------------- shared parts
def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under these names."""
    return nn.Sequential(OrderedDict(layers))


class TimestepEmbedding(nn.Module):
    """Timesteps [B] -> [B, out]: sinusoids (cosines first, as Stable Diffusion), linear, SiLU, linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the network's type: bfloat16 cannot tell timestep 998 from 1000.
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


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


# ---------------------------------------------------------------- UNet
class Level(nn.Module):
    """Residual blocks with these channels into each, an attention block after the first `attentions` of them:
    a level of the UNet, or its middle. Where `fused` the text query passes through (section 3.3)."""

    def __init__(self, config: Config, inputs: list[int], width: int, attentions: int, fused: bool) -> None:
        super().__init__()
        unet, fusion = config.unet, config.fusion if fused else None
        self.resnets = nn.ModuleList(ResBlock(channels, width, 4 * unet.channels[0]) for channels in inputs)
        self.attentions = nn.ModuleList(SpatialTransformer(
            width, unet.heads, config.text.width, unet.depth, fusion) for _ in range(attentions))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()      # one in all, or none


class UNet(nn.Module):
    """Φ: Stable Diffusion's UNet (Φ_u), whose encoder half also denoises text queries (Φ_θ)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        unet, channels, blocks = config.unet, config.unet.channels, config.unet.res_blocks
        self.fused, self.condition_timestep = config.fusion.fusion, config.condition_timestep
        latent_channels = config.autoencoder.latent_channels
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.down_blocks = nn.ModuleList()
        before, skips = channels[0], [channels[0]]            # channels of what `encode` keeps for `decode`
        for c, attention in zip(channels, unet.attention):
            level = Level(config, [before] + [c] * (blocks - 1), c, blocks * attention, self.fused)
            self.down_blocks.append(level)
            if len(self.down_blocks) < len(channels):
                level.downsamplers.append(chain(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))
            skips += [c] * (blocks + len(level.downsamplers))
            before = c
        self.mid_block = Level(config, [before, before], before, 1, self.fused)
        self.up_blocks = nn.ModuleList()
        for c, attention in zip(channels[::-1], unet.attention[::-1]):     # the query never comes here
            inputs = [skips.pop() + (c if i else before) for i in range(blocks + 1)]
            level = Level(config, inputs, c, len(inputs) * attention, fused=False)
            self.up_blocks.append(level)
            if skips:
                level.upsamplers.append(chain(conv=nn.Conv2d(c, c, 3, padding=1)))
            before = c
        self.conv_norm_out = nn.GroupNorm(32, channels[0])
        self.conv_out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        self.query_time_embedding = TimestepEmbedding(config.fusion.query_width, config.fusion.query_width)
        self.query_head = AlignmentTransformer(channels[-1], config.fusion)
        # From scratch, every residual branch of the generation path starts at zero, as in Stable Diffusion.
        for name, parameter in self.named_parameters():
            if name.split(".")[-2] in ("conv2", "proj_out", "conv_out"):
                nn.init.zeros_(parameter)

    def encode(self, latents: Tensor, t_image: Tensor, context: Tensor, noisy_query: Tensor | None = None,
               t_text: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        """The encoder half: latents [B, C, H, W], t_image [B], context [B or 1, L, D], and e_t [B, D] with
        t_text [B], or neither -> middle features, skips for `decode`, timestep embedding, query state h_e."""
        emb, dtype, query, state = self.time_embedding(t_image), self.conv_in.weight.dtype, None, None
        if noisy_query is not None:
            query = noisy_query.to(dtype) + self.query_time_embedding(t_text)
            state = torch.zeros_like(query)
        x = self.conv_in(latents.to(dtype))
        skips = [x]
        for level in (*self.down_blocks, self.mid_block):
            for resnet, attention in zip_longest(level.resnets, level.attentions):
                x = resnet(x, emb)
                if attention is not None:
                    x, state = attention(x, context, query if self.fused else None, state)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        return x, skips[:-len(self.mid_block.resnets)], emb, state if self.fused else query

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
        """The decoder half: what `encode` returned -> prediction [B, C, H, W]. Takes the skips away."""
        for level in self.up_blocks:
            for resnet, attention in zip_longest(level.resnets, level.attentions):
                x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
                if attention is not None:
                    x, _ = attention(x, context)
            for upsample in level.upsamplers:       # to the size on the way down: odd ones were rounded
                x = upsample(F.interpolate(x, skips[-1].shape[2:]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def denoise_image(self, noisy_latents: Tensor, t_image: Tensor, context: Tensor) -> Tensor:
        """Φ_u (Eq. 4), the text query masked: Stable Diffusion -> prediction, as noisy_latents."""
        x, skips, emb, _ = self.encode(noisy_latents, t_image, context)
        return self.decode(x, skips, emb, context)

    def denoise_query(self, noisy_query: Tensor, t_text: Tensor, latents: Tensor, null: Tensor) -> Tensor:
        """Φ_θ (Eq. 7): e_t [B, D], t_text [B], clean latents, null: c of "" [1, L, D] -> answer [B, D]."""
        t_image = torch.full_like(t_text, self.condition_timestep)      # T: 0 … T-1 mean noisy images
        features, _, _, state = self.encode(latents, t_image, null, noisy_query, t_text)
        return self.query_head(state, features)


# ---------------------------------------------------------------- autoencoders
class PatchAutoencoder(nn.Module):
    """Latents without a pretrained network: factor × factor patches of pixels become channels. No weights."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    def moments(self, images: Tensor) -> Tensor:
        """As KLAutoencoder's, of deviation 0."""
        mean = F.pixel_unshuffle(images, self.config.factor)
        return torch.cat([mean, torch.full_like(mean, -math.inf)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents / self.config.scale, self.config.factor)


class AutoencoderMiddle(nn.Module):
    """Residual block, single-head self-attention over pixels (pre-norm, residual), residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, eps=1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, heads=1, bias=True)])
        self.attentions[0].group_norm = nn.GroupNorm(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x, attention = self.resnets[0](x), self.attentions[0]
        tokens = attention(attention.group_norm(x).flatten(2).transpose(1, 2))       # [B, H·W, C]
        return self.resnets[1](x + tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def autoencoder_levels(widths: tuple[int, ...], down: bool) -> nn.Sequential:
    """Residual blocks of each width; between widths the side is halved on the way down, else doubled."""
    levels = nn.Sequential()
    for before, width in zip((widths[0], *widths), widths):
        inputs = [before, width] if down else [before, width, width]
        levels.append(chain(resnets=nn.Sequential(*(ResBlock(c, width, eps=1e-6) for c in inputs))))
        if len(levels) == len(widths):
            return levels
        name, resize, step = (("downsamplers", nn.ZeroPad2d((0, 1, 0, 1)), dict(stride=2)) if down else
                              ("upsamplers", nn.Upsample(scale_factor=2), dict(padding=1)))
        conv = nn.Conv2d(width, width, 3, **step)
        levels[-1].add_module(name, nn.Sequential(chain(resize=resize, conv=conv)))


class KLAutoencoder(nn.Module):
    """Stable Diffusion's autoencoder (Rombach et al. 2022): images to a Gaussian over latents, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, channels, widths = config, config.latent_channels, config.channels

        def half(inputs: int, widths: tuple[int, ...], outputs: int, **blocks: nn.Module) -> nn.Sequential:
            return chain(conv_in=nn.Conv2d(inputs, widths[0], 3, padding=1), **blocks,
                         conv_norm_out=nn.GroupNorm(32, widths[-1], eps=1e-6), silu=nn.SiLU(),
                         conv_out=nn.Conv2d(widths[-1], outputs, 3, padding=1))
        self.encoder = half(3, widths, 2 * channels, down_blocks=autoencoder_levels(widths, down=True),
                            mid_block=AutoencoderMiddle(widths[-1]))
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = half(channels, widths[::-1], 3, mid_block=AutoencoderMiddle(widths[-1]),
                            up_blocks=autoencoder_levels(widths[::-1], down=False))

    def moments(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> mean and log-variance [B, 2C, H/f, W/f], before scaling."""
        # One picture of 512 x 512 px at a time, or as many pixels: a batch takes no more memory.
        parts = images.to(self.quant_conv.weight.dtype).split(max(1, 512 ** 2 // images[0, 0].numel()))
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in parts])
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(-30, 20)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H/f, W/f] -> images [B, 3, H, W], nominally in [-1, 1]."""
        latents = latents.to(self.post_quant_conv.weight.dtype) / self.config.scale
        parts = latents.split(max(1, (512 // self.config.factor) ** 2 // latents[0, 0].numel()))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])


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
        """x [B, N, width] -> the same."""
        h, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (attn[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + attn["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        h = F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h)       # CLIP's quick GELU
        return x + self.mlp["fc2"](h)


def initialise(tower: nn.Module, config: TextConfig | ClipConfig) -> None:
    """CLIP's start, for training from scratch, of embeddings and layers."""
    inner, residual = config.width ** -0.5, (2 * config.layers) ** -0.5
    deviations = {"token_embedding": 0.02, "position_embedding": 0.01, "fc1": (2 * config.width) ** -0.5,
                  **dict.fromkeys(("q_proj", "k_proj", "v_proj"), inner),
                  **dict.fromkeys(("out_proj", "fc2"), inner * residual)}
    for name, layer in tower.named_modules():
        if (kind := name.split(".")[-1]) in deviations:
            nn.init.normal_(layer.weight, std=deviations[kind])


class TextEncoder(nn.Module):
    """CLIP's text transformer. One pass gives the text condition c and the text query e."""

    def __init__(self, config: TextConfig, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, config.width),
            "position_embedding": nn.Embedding(config.context_length, config.width)})
        self.encoder = chain(layers=nn.Sequential(*(
            ClipLayer(config.width, config.heads, True, activation) for _ in range(config.layers))))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] int64 -> context c [B, L, D]; text query e [B, D], float32, of unit norm: read at the
        first end token, which has the largest id. Attention is causal: no padding after it changes e."""
        x = self.embeddings["token_embedding"](tokens)
        x = x + self.embeddings["position_embedding"].weight[:tokens.shape[1]]
        context = self.final_layer_norm(self.encoder(x))
        ends = context[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
        return context, F.normalize(ends.float(), dim=-1)


# ---------------------------------------------------------------- the whole
LOGIT_SCALE = math.log(1 / 0.07)         # CLIP's start; exp of it is 1/temperature


class DiffDis(nn.Module):
    """The networks, the tokenizer and the configuration: all that sampling, scoring and training need."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.tasks: tuple[str, ...] = ("generation", "alignment")     # what its weights were trained for
        self.data: str | None = None                      # and on, as --data has it; None: not recorded
        autoencoder = KLAutoencoder if config.autoencoder.kind == "kl" else PatchAutoencoder
        self.autoencoder = autoencoder(config.autoencoder)
        self.text_encoder = TextEncoder(config.text)
        self.unet = UNet(config)
        self.latent_shape(config.image_size, config.image_size)       # refuses a size that does not fit
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.register_buffer("null_tokens", tokenizer([""]), persistent=False)
        initialise(self.text_encoder, config.text)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> context [B, L, D], text_query [B, D] of unit norm."""
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the posterior's mean, scaled."""
        return self.read_batch(self.autoencoder.moments(images))

    def read_batch(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Batch.images, uint8 pixels or the autoencoder's moments, and noise of the latents' shape
        -> latents: a sample of the posterior, or without noise its mean, scaled."""
        is_pixels = images.dtype == torch.uint8
        moments = self.autoencoder.moments(to_float(images)) if is_pixels else images.float()
        mean, logvar = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return mean * self.config.autoencoder.scale

    def decode_image(self, latents: Tensor) -> Tensor:
        """latents -> images [B, 3, H, W], nominally in [-1, 1] (clamp before saving)."""
        return self.autoencoder.decode(latents)

    def denoise_image(self, noisy_latents: Tensor, t_image: Tensor, context: Tensor) -> Tensor:
        """The image target's prediction (ε̂ for `sd-v1`), shape of the latents (Eq. 4)."""
        return self.unet.denoise_image(noisy_latents, t_image, context)

    def denoise_query(self, noisy_query: Tensor, t_text: Tensor, latents: Tensor) -> Tensor:
        """noisy_query [B, D], t_text [B], clean latents -> the text target's prediction [B, D] (Eq. 7). No
        text goes in, c is the empty prompt's: the answer cannot leak."""
        return self.unet.denoise_query(noisy_query, t_text, latents, self.text_encoder(self.null_tokens)[0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Image size in px -> (channels, height, width) of its latents. Raises ValueError."""
        side = self.config.autoencoder.factor
        if height % side or width % side or not (height > 0 and width > 0):
            raise ValueError(f"size is {width}x{height} px, expected multiples of {side}")
        return self.config.autoencoder.latent_channels, height // side, width // side


def is_new(name: str) -> bool:
    """Whether the parameter of this name is DiffDis's own, rather than one Stable Diffusion has."""
    return "query_" in name or name == "logit_scale"


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
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)   # published so
        self.encoder = chain(layers=nn.Sequential(*(
            ClipLayer(width, config.heads, False, config.activation) for _ in range(config.layers))))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], of CLIP's mean and deviation -> the class token's output [B, width]."""
        patches = self.embeddings["patch_embedding"](images).flatten(2).transpose(1, 2)       # [B, N, width]
        first = self.embeddings.class_embedding.expand(len(images), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.embeddings["position_embedding"].weight
        return self.post_layernorm(self.encoder(self.pre_layrnorm(x))[:, 0])


class Clip(nn.Module):
    """Two towers and a temperature (Table 1), used as a DiffDis that only reads."""

    def __init__(self, config: ClipConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.tasks: tuple[str, ...] = ("alignment",)
        self.data: str | None = None          # what its weights were trained on, as --data has it
        self.vision_model = ClipImageEncoder(config)
        self.text_model = TextEncoder(config.text, config.activation)
        self.visual_projection = nn.Linear(config.width, config.embedding, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        initialise(self.text_model, config.text)
        initialise(self.vision_model.encoder, config)
        for layer in (self.vision_model.embeddings["position_embedding"], self.visual_projection):
            nn.init.normal_(layer.weight, std=config.width ** -0.5)
        nn.init.normal_(self.text_projection.weight, std=config.text.width ** -0.5)

    device, read_batch = DiffDis.device, staticmethod(to_float)       # the same property; pixels are read

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> [B, embedding], unit norm, float32."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        pixels = (((images + 1) / 2 - mean) / std).to(self.visual_projection.weight.dtype)
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, embedding], unit norm, float32."""
        return F.normalize(self.text_projection(self.text_model(tokens)[1]).float(), dim=-1)

    def encode_text(self, captions: list[str]) -> tuple[None, Tensor]:
        """Captions -> no text condition, embeddings [B, embedding] of unit norm."""
        return None, self.encode_tokens(self.tokenizer(captions).to(self.device))


def wrap_blocks(network: nn.Module, wrapper: Callable[[Callable], Callable] | None = None) -> None:
    """Each block's forward becomes wrapper(forward), or is compiled. Raises ValueError without compiler."""
    is_cuda = next(network.parameters()).is_cuda            # Triton needs one of C, on a CPU inductor of C++
    given, usual = (getenv("CC"), "gcc clang") if is_cuda else (getenv("CXX"), "g++")
    if wrapper is None and not any(map(which, (given or usual).split())):
        raise ValueError("torch.compile finds no compiler: install g++, or give --no-compile")
    torch._dynamo.config.recompile_limit = 100         # sd-v1's residual blocks have 14 shapes
    wrapper = wrapper or partial(torch.compile, dynamic=False)      # block by block: whole takes minutes
    for block in network.modules():
        if isinstance(block, (ResBlock, SpatialTransformer, ClipLayer)):
            block.forward = wrapper(block.forward)


# ---------------------------------------------------------------- names in published files
# Ours are those of a diffusers folder; its vae/ of 2022 and the original files (CompVis) have others.
PARTS = {"unet": "unet/diffusion_pytorch_model", "autoencoder": "vae/diffusion_pytorch_model",
         "text_encoder": "text_encoder/model"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PREFIXES = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.",
            "text_encoder": "cond_stage_model.transformer.text_model."}
RES_BLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
             "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def to_compvis(names: Iterable[str], config: Config) -> dict[str, str]:
    """Our names -> {ours: CompVis's; of what is not theirs "diffdis." and ours}, by one rule after another: a
    pattern, and its new spelling or a function of the numbers in it, of level x and block i in the level.
    CompVis's UNet counts through flat lists, where a level has n entries."""
    n, attention = config.unet.res_blocks + 1, config.unet.attention[::-1]
    top = len(config.autoencoder.channels) - 1
    unet = [
        *((rf"(resnets\.\d)\.{ours}", rf"\1.{theirs}") for ours, theirs in RES_BLOCK.items()),
        (r"^time_embedding\.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
        (r"resnets\.(\d)", r"\1.0"), (r"attentions\.(\d)", r"\1.1"),
        (r"^down_blocks\.(\d)\.(\d)", lambda x, i: f"input_blocks.{1 + n * x + i}"),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda x: f"input_blocks.{n + n * x}.0.op"),
        (r"^mid_block\.(\d)\.(\d)", lambda i, j: f"middle_block.{2 * i + j}"),
        (r"^up_blocks\.(\d)\.(\d)", lambda x, i: f"output_blocks.{n * x + i}"),
        (r"^up_blocks\.(\d)\.upsamplers\.0", lambda x: f"output_blocks.{n * x + n - 1}.{1 + attention[x]}")]
    autoencoder = [
        (r"mid_block\.resnets\.(\d)", lambda i: f"mid.block_{i + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"),
        (r"to_([qkv])", r"\1"), (r"to_out\.0", "proj_out"), (r"resnets", "block"), (r"samplers\.0", "sample"),
        (r"down_blocks", "down"), (r"up_blocks\.(\d)", lambda x: f"up.{top - x}"),     # from the finest
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut")]
    rules, spellings = {"unet": unet, "autoencoder": autoencoder, "text_encoder": []}, {}
    for name in names:
        part, _, rest = name.partition(".")
        for pattern, to in rules.get(part, []):
            new = to if isinstance(to, str) else lambda match: to(*map(int, match.groups()))
            rest = re.sub(pattern, new, rest)
        spellings[name] = "diffdis." + name if is_new(name) else PREFIXES[part] + rest
    return spellings


def from_compvis(raw: dict[str, Tensor], model: DiffDis, weights: str) -> dict[str, Tensor]:
    """A CompVis file's tensors under our names; whatever else there is keeps its name. weights: "ema" prefers
    the UNet's averages where the file has them, "raw" leaves them aside."""
    tensors, raw = {}, dict(raw)
    for name, theirs in to_compvis(model.state_dict(), model.config).items():
        averaged = "model_ema." + theirs.removeprefix("model.").replace(".", "")
        for spelling in (theirs, averaged) if weights == "ema" else (theirs,):
            if spelling in raw:
                value = raw.pop(spelling)
                tensors[name] = value.squeeze() if "attn_1." in theirs else value    # 1×1 convolutions there
    return raw | tensors


# What a refused file is, by part of a tensor's name and shape; the last only where no UNet is beside it.
KINDS = {
    "scaled float8": "scaled_fp8|scale_weight", "an LCM": r"embedding\.cond_proj",
    "Stable Diffusion XL": r"conditioner\.|attn2\.to_k\.weight \[\d+, 2048",
    "Stable Diffusion 2": r"cond_stage_model\.model\.|attn2\.to_k\.weight \[\d+, 1024",
    "for inpainting or editing": r"(conv_in|input_blocks\.0\.0)\.weight \[\d+, [89],", "of zero SNR": "ztsnr",
    "LoRA, ControlNet or textual inversion": r"(?s)\A(?!.*(n_model|unet)\.).*(lora|control|string_t|emb_p)"}


def obey(path: Path, said: dict) -> Config:
    """Stable Diffusion v1 with the target that its files ask for: a folder's configurations, a file's
    metadata, a .yaml or .yml beside. Raises ValueError where a word is for another computation."""
    config = PRESETS["sd-v1"]
    heads, scale, steps = config.unet.heads, config.autoencoder.scale, config.timesteps
    ours = {"prediction_type": "epsilon v_prediction v", "predict_key": "epsilon v", "beta_start": "0.00085",
            "parameterization": "eps v", "v_parameterization": "False True", "trained_betas": "None",
            "beta_schedule": "scaled_linear", "linear_start": "0.00085 8.5e-4", "linear_end": "0.012 0.0120",
            "beta_end": "0.012", "rescale_betas_zero_snr": "False", "num_train_timesteps": steps,
            "timesteps": steps, "scaling_factor": scale, "scale_factor": scale, "shift_factor": "None",
            "attention_head_dim": heads, "num_heads": heads, "num_head_channels": "-1", "freq_shift": "0",
            "num_attention_heads": f"None {heads}", "text_encoder/num_attention_heads": config.text.heads,
            "act_fn": "silu", "norm_num_groups": "32", "norm_eps": "1e-05", "layer_norm_eps": "1e-05",
            "flip_sin_to_cos": "True", "resnet_time_scale_shift": "default", "center_input_sample": "False",
            "hidden_act": "quick_gelu", "architecture": "stable-diffusion-v1"}
    words = [(path, word[1], value) for key, value in said.items()
             if (word := re.match(r"(?:modelspec\.|ss_)(\w+)", str(key)))]
    files = [path / f"{p}config.json" for p in ("scheduler/scheduler_", "vae/", "unet/", "text_encoder/")]
    for file in filter(Path.is_file, files if path.is_dir() else map(path.with_suffix, (".yaml", ".yml"))):
        with reading(file):
            text, is_json = file.read_text("utf-8-sig"), file.suffix == ".json"
            words += [(file, *word) for word in (json.loads(text).items() if is_json else re.findall(
                r"(\w+)[ \t]*:[ \t]*([\w.+-]+)", re.sub("#.*|['\"]", "", text)))]
    for file, key, value in words:
        fits = str(ours.get(f"{file.parent.name}/{key}", ours.get(key, "any"))).split()
        if not {"any", str(value)} & {*fits}:
            raise ValueError(f"{file}: {key} is {value!r}, and we compute {' or '.join(fits)} alone")
    is_v = any(str(value) in ("v", "v_prediction", "True") for _, key, value in words if key in
               ("prediction_type", "predict_key", "parameterization", "v_parameterization"))
    return replace(config, image_target="v" if is_v else "noise", image_size=512)


# ---------------------------------------------------------------- files; nothing in them is ever run
FORMAT = "diffdis-1"
Network = DiffDis | Clip               # the whole model, of either kind: what is trained and saved
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64}
HARMLESS = ("pytorch_lightning.", "lightning.", "numpy.")      # whose objects training programs leave behind


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong within means that a file is damaged or another program's: a ValueError of one line
    that begins with its path. What already begins with it passes."""
    try:
        yield
    except Exception as error:                   # of any kind: torch's, json's, of what is not where expected
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        # Of torch's own words only the first sentence: it goes on to advise switching safety off.
        reason = " ".join(str(error).split()).split(". ")[0][:400]
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {reason}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A .safetensors file (8 bytes of header length; a JSON header of name: dtype, shape, byte range; then
    bytes, which the ranges must tile) -> tensors mapped from the file (read when touched), metadata."""
    mapped = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(mapped[:8].numpy().tobytes(), "little")
    header, tensors = json.loads(mapped[8:start].numpy().tobytes()), {}
    metadata = header.pop("__metadata__", {})
    begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
    if (*begins, len(mapped) - start) != (0, *ends):
        raise ValueError(f"{path} is cut short or damaged: its tensors do not fill it; fetch it again")
    for name, entry in header.items():
        (begin, end), kind = entry["data_offsets"], entry["dtype"]
        dtype, shape = (DTYPES[kind], entry["shape"]) if kind in DTYPES else (torch.uint8, [-1])
        values = mapped[start + begin:start + end]
        is_aligned = values.storage_offset() % dtype.itemsize == 0
        tensors[name] = (values if is_aligned else values.clone()).view(dtype).view(shape)
    return tensors, metadata


class Inert(dict):
    """What stands in for an object of another program's class in a checkpoint: it holds nothing."""
    __init__ = __setstate__ = lambda self, *_, **__: None


def read_torch(path: Path) -> dict:
    """The dict that torch.save wrote, mapped to CPU memory, without running any code from the file: objects
    of HARMLESS packages become `Inert`, anything else but tensors and plain values is refused."""
    mapped = zipfile.is_zipfile(path)        # a file of torch before 1.6 is none, and takes no exceptions
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
    if refused := [name for name in classes if not name.startswith(HARMLESS)]:
        raise ValueError(f"{path} wants to run {', '.join(refused)}, which is refused")
    with torch.serialization.safe_globals([(Inert, name) for name in classes]):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A .safetensors file or torch.save's -> its tensors by name, what else it says. Raises ValueError."""
    with reading(path), path.open("rb") as file:
        start = file.read(64)
        if re.match(rb"version https://git-lfs|\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
            raise ValueError(f"{path} is a git-lfs pointer (run `git lfs pull`) or a web page: fetch it")
        is_safe = path.suffix == ".safetensors" or start[8:9] == b"{"           # or renamed
        tensors, said = read_safetensors(path) if is_safe else (read_torch(path),) * 2
        for _ in range(2):                         # programs nest it
            tensors = tensors.get("state_dict", tensors)
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, said


# ---------------------------------------------------------------- downloads
DOWNLOADS = {                                # the first: 4.3 GB, under the licence CreativeML OpenRAIL-M
    "sd-v1-5": ("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
                "v1-5-pruned-emaonly.safetensors",
                "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"),
    "vocabulary": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth", "6726825d")}       # all that is published of it


def download(name: str) -> Path:
    """The cached file of a name in DOWNLOADS, fetched first if it is not there and its sha256 checked."""
    url, sha256 = DOWNLOADS[name]
    path = CACHE / url.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} ({'4.3 GB' if name == 'sd-v1-5' else 'small'}) to {path}")
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"could not download {url} ({error}): put the file at {path} yourself, or "
                          "give weights that are here as --ckpt or --features; train.py makes some") from None
    return path


def locate(path: str | Path) -> Path:
    """A path, the checkpoint in a run's folder, or, where nothing is called so, the download "sd-v1-5"."""
    path, run, wanted = Path(path), Path(path) / "checkpoint.pt", str(path) == "sd-v1-5"
    return download("sd-v1-5") if wanted and not path.exists() else run if run.is_file() else path


# ---------------------------------------------------------------- save, load, export
def describe(model: Network) -> dict:
    """What a file must remember besides tensors."""
    return {"config": asdict(model.config), "tokenizer": asdict(model.tokenizer), "data": model.data,
            "tasks": list(model.tasks)}


def save(path: str | Path, model: Network, ema: dict | None = None, training: dict | None = None) -> None:
    """Write a checkpoint, or leave the old one and raise OSError. ema: averaged parameters by name, preferred
    by `load`; training: what resuming needs, tensors and dicts."""
    held = describe(model) | {"format": FORMAT, "model": model.state_dict(), "ema": ema, "training": training}
    write_atomically(Path(path), lambda file: torch.save(held, file))


def read_weights(path: Path, weights: str) -> tuple[dict, dict[str, Tensor]]:
    """What `load` takes -> a description as `describe` writes it, tensors under our names or CompVis's."""
    tensors, said, starts = {}, {}, ("unet.", PREFIXES["unet"], *["model_ema.diff"] * (weights == "ema"))
    if path.is_dir():
        for part, stem in PARTS.items():
            files = [*path.glob(f"{stem}.safetensors")] or [*path.glob(f"{stem}[.-]*safetensors")]
            if len({re.sub(r"-\d+-of", "", file.name) for file in files}) != 1:
                raise ValueError(f"{path / stem}.safetensors, one variant of it, or its shards are expected, "
                                 f"not {[file.name for file in files]}; diffusers makes it of .bin")
            tensors |= {f"{part}.{name.removeprefix('text_model.')}": value for file in files
                        for name, value in read_file(file)[0].items()}
        for old, new in OLD_ATTENTION.items():
            tensors = {name.replace(f".0.{old}.", f".0.{new}."): value for name, value in tensors.items()}
    else:
        tensors, said = read_file(path)
        if said.get("format") == FORMAT:                       # what `save` wrote
            return said, said["model"] | ((weights == "ema" and said["ema"]) or {})
        if "diffdis" in said:                                  # what `export` wrote
            return json.loads(said["diffdis"]), tensors
    lines = "\n".join(f"{name} {[*getattr(value, 'shape', ())]}" for name, value in (tensors or said).items())
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, lines)), None)
    if kind or not any(name.startswith(starts) for name in tensors):
        raise ValueError(f"{path} is {kind or 'another file'}, not DiffDis ({FORMAT!r}) or Stable Diffusion "
                         f"v1: it holds {', '.join(sorted(tensors)[-4:]) or 'no tensor'}")
    config = obey(path, said | ({"modelspec.prediction_type": "v"} if "v_pred" in tensors else {}))
    folders = [folder / name for folder in (path, path.parent) for name in ("tokenizer", "")]
    given = [place for place in folders if {*place.glob("vocab.json"), *place.glob("tokenizer.json")}]
    tokenizer = Tokenizer.from_file(given[0] if given else download("vocabulary"), config.text.context_length)
    return {"config": asdict(config), "tokenizer": asdict(tokenizer), "data": None, "foreign": True,
            "tasks": ["generation"]}, tensors


def load(path: str | Path, device: str | torch.device = "cpu", weights: str = "ema",
         precision: str | None = "fp32", adapt: Callable[[Config], Config] = lambda given: given) -> Network:
    """A checkpoint as a model in eval mode. Raises FileNotFoundError or ValueError.

    path: what `save` or `export` wrote; or, its query stream from random weights, Stable Diffusion v1: .ckpt,
    .safetensors, diffusers folder, or "sd-v1-5", downloaded once; weights: "ema", averaged ones if the file
    has them, or "raw"; precision: of weights, fp32, bf16, or None, bf16 on CUDA (in fp16 the autoencoder
    overflows); adapt: changes the configuration before the networks are built."""
    path = locate(path)
    if not (path.is_file() or (path / "unet").is_dir()):
        held = ", ".join(sorted(entry.name for entry in path.glob("*"))[:4]) or "nothing"
        raise FileNotFoundError(
            f"no checkpoint at {path} (found: {held}): train one with `python train.py`, or give Stable "
            "Diffusion v1, a file, a folder with unet/ or sd-v1-5; tests/convert_clip.py converts a CLIP's")
    with reading(path):
        said, tensors = read_weights(path, weights)
        network, kind = (DiffDis, Config) if "fusion" in said["config"] else (Clip, ClipConfig)
        config, tokenizer = from_dict(kind, said["config"]), Tokenizer(**said["tokenizer"])
        if tokenizer.vocab_size != config.text.vocab_size:
            raise ValueError(f"{path}: its text encoder knows {config.text.vocab_size} tokens, the tokenizer "
                             f"{tokenizer.vocab_size}: put its own vocab.json and merges.txt beside it")
    config = adapt(config)           # whose mistakes are the flags', not the file's
    with torch.device("meta"):       # no storage: nothing is initialised only to be overwritten
        model = network(config, tokenizer)
    with reading(path):
        model.tasks, model.data = tuple(said["tasks"]), said["data"]
        if network is DiffDis:
            tensors = from_compvis(tensors, model, weights)
        put_tensors(model, tensors, path, "foreign" in said)
    is_half = precision == "bf16" or precision is None and torch.device(device).type == "cuda"
    model.to(device, torch.float32)              # files may hold half precision
    for part in model.children() if is_half else ():
        part.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def put_tensors(model: Network, tensors: dict[str, Tensor], path: Path, foreign: bool) -> None:
    """Make a file's tensors the model's own, without a copy, or raise ValueError naming what does not fit.
    foreign: another program's file may hold more, which is listed, and lacks the query stream."""
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)      # other shapes raise
    lacking = [name for name in missing if not (foreign and is_new(name))]
    larger = [name for name in unknown if not foreign or re.match(    # than ours: a layer more would be lost
        r"unet\.|model\.diff|(text_encoder|cond_.*model)\.encoder|(autoenc.*|first_.*)\.(en|de)coder", name)]
    if lacking or larger:
        raise ValueError(f"{path}: its tensors do not fit the configuration and flags: it lacks "
                         f"{', '.join(lacking[:3]) or 'none'}; unknown {', '.join(larger[:3]) or 'is none'}")
    if isinstance(model, DiffDis):
        model.null_tokens = model.tokenizer([""])
    if missing:                                  # the query stream starts as PyTorch starts its layers
        model.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False).reset_parameters()
    if foreign:
        print(f"{path}: loaded {len(tensors) - len(unknown)} tensors, predicts {model.config.image_target}; "
              f"from random weights: {len(missing)}; ignored: {len(unknown)} {unknown[:3]}")


def export(model: DiffDis, path: Path) -> None:
    """Write a model for other programs, under CompVis's names; the query stream under a prefix, the rest in
    the metadata, for `load` to give all back. Raises ValueError if it is not of Stable Diffusion's make."""
    config = model.config
    if isinstance(model, Clip) or path.suffix != ".safetensors" or (
            config.autoencoder.kind, config.image_target, config.image_schedule) != ("kl", "noise", "linear"):
        raise ValueError("Stable Diffusion's autoencoder and target alone are exported, to a .safetensors")
    tensors, types, end = model.state_dict(), {dtype: name for name, dtype in DTYPES.items()}, 0
    names = to_compvis(tensors, config)
    header: dict = {"__metadata__": {"format": "pt", "diffdis": json.dumps(describe(model))}}
    for name, value in tensors.items():
        # Attention of the autoencoder is written as 1×1 convolutions.
        square = [1, 1] if "attn_1." in names[name] and value.dim() == 2 else []
        header[names[name]] = {"dtype": types[value.dtype], "shape": [*value.shape, *square],
                               "data_offsets": [end, end := end + value.numel() * value.itemsize]}
    head = json.dumps(header).encode()
    head = head.ljust(-(-len(head) // 8) * 8)        # tensors begin at a multiple of 8
    bodies = (value.cpu().contiguous().flatten().view(torch.uint8).numpy() for value in tensors.values())
    write_atomically(path, lambda file: file.writelines([len(head).to_bytes(8, "little"), head, *bodies]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint for other programs.")
    parser.add_argument("command", choices=("export",), help="what to do")
    parser.add_argument("ckpt", help="a checkpoint that sample.py takes")
    parser.add_argument("out", type=Path, help="OUT.safetensors, under Stable Diffusion's original names")
    parser.error = lambda error: parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    args = parser.parse_args(argv)
    try:
        export(load(args.ckpt), args.out)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
