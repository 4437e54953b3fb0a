"""What the tests share: the import path, one thread where tests run side by side,
and a model small enough to build anywhere."""
import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

# Downloads and indices of the tests stay out of the user's cache, also those of the processes they start.
os.environ["TORCH_HOME"] = tempfile.mkdtemp(prefix="diffdis-tests-")
atexit.register(shutil.rmtree, os.environ["TORCH_HOME"], ignore_errors=True)

if "PYTEST_XDIST_WORKER" in os.environ:       # as many threads as cores in each would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402  (the environment comes first)
import torch  # noqa: E402

# Comparisons with other libraries at Stable Diffusion v1's own size, 16 GB: DIFFDIS_FULL_SIZE=1
# python -m pytest tests/test_parity.py, and tests/test_weights.py -k "layouts or libraries or exports".
FULL_SIZE = os.environ.get("DIFFDIS_FULL_SIZE") == "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Shapes, Tokenizer  # noqa: E402  (the path comes first)
from fusion import FusionConfig  # noqa: E402
from model import (AutoencoderConfig, Clip, ClipConfig, Config, DiffDis, TextConfig,  # noqa: E402
                   UNetConfig, is_new, to_compvis)


def import_oracle(name: str) -> types.ModuleType:
    """A module of torchvision or pytorch-fid; or skip the test.
    They have a folder of their own (README): a torchvision built for another torch cannot be imported without
    two operators, and transformers would try to where it finds one."""
    with suppress(ImportError, RuntimeError):
        return importlib.import_module(name)       # one that fits this torch
    if not (ROOT / ".oracles").is_dir():
        pytest.skip(f"{name} is not here to compare with: see the README, \"Two commands\"")
    for operator in ("nms", "qnms"):       # all that the import asks for; nothing ever calls them
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores) -> Tensor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT / ".oracles")])
        return pytest.importorskip(name)


def tiny_config(**changes) -> Config:
    """The built-in data's pictures, networks of some 100,000 parameters."""
    values = dict(fusion=FusionConfig(32, align_blocks=1, head_width=16),
                  unet=UNetConfig((32, 32), (True, True), 1, 2), text=TextConfig(514, 24, 32, 1, 2),
                  autoencoder=AutoencoderConfig("patch", 192, 8, 2.0, ()), image_size=32, image_target="v")
    return Config(**{**values, **changes})


def tiny_clip_config() -> ClipConfig:
    return ClipConfig(32, 2, 2, 8, 32, 24, tiny_config().text)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random: convolutions that start at zero would hide whatever comes before them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim():
            scale = 0.5 / max(1, parameter[0].numel()) ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module


def build(config: Config | ClipConfig | None = None, seed: int = 0) -> DiffDis | Clip:
    config = config or tiny_config()
    captions = (Shapes().captions(i)[0] for i in range(200))
    tokenizer = Tokenizer.learn(captions, 560, config.text.context_length)
    config = replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))
    network = Clip if isinstance(config, ClipConfig) else DiffDis
    return randomise(network(config, tokenizer), seed).eval()


def error_of(capsys, main: Callable, argv: list[str], alone: bool = True) -> str:
    """The error line in which main(argv) ends, with status 2; alone: stderr must hold nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and not (alone and before), [*before, error]
    return error


def original_names(model: DiffDis) -> dict[str, torch.Tensor]:
    """Stable Diffusion's part of the model as CompVis's program names it."""
    names = to_compvis(model.state_dict(), model.config)
    return {names[ours]: value[:, :, None, None] if "attn_1." in names[ours] and value.dim() == 2 else value
            for ours, value in model.state_dict().items() if not is_new(ours)}


def put_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.id), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *tokenizer.merges]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def diffusers_unet(config: Config) -> torch.nn.Module:
    import diffusers
    unet, channels = config.unet, config.autoencoder.latent_channels
    return diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=channels, layers_per_block=unet.res_blocks,
        block_out_channels=unet.channels, attention_head_dim=unet.heads,
        cross_attention_dim=config.text.width,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in unet.attention[::-1]])


def diffusers_vae(config: Config) -> torch.nn.Module:
    import diffusers
    vae = config.autoencoder
    return diffusers.AutoencoderKL(
        latent_channels=vae.latent_channels, block_out_channels=vae.channels, layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * len(vae.channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae.channels))


def transformers_text(config: TextConfig) -> torch.nn.Module:
    import transformers
    end = config.vocab_size - 1
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=end + 1, hidden_size=config.width, intermediate_size=4 * config.width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, projection_dim=config.width,
        max_position_embeddings=config.context_length, bos_token_id=end - 1, eos_token_id=end))


def give_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    """The library's network with Stable Diffusion's part of our weights."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in theirs.state_dict()) else ""
    theirs.load_state_dict({prefix + name: value for name, value in ours.state_dict().items()
                            if not is_new(name)})
    return theirs.eval()


@torch.no_grad()
def draw_by_diffusers(unet: torch.nn.Module, vae: torch.nn.Module | None, z: torch.Tensor,
                      context: torch.Tensor, steps: int) -> torch.Tensor:
    """z [B, C, h, w], context [2B, L, D] of the prompts and of "" -> images (without a VAE latents), by
    diffusers' DDIM and its usual loop."""
    import diffusers
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        conditional, unconditional = unet(z.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
        z = scheduler.step(unconditional + 7.5 * (conditional - unconditional), t, z).prev_sample
    return z if vae is None else vae.decode(z / AutoencoderConfig().scale).sample.clamp(-1, 1)


def write_folder(model: DiffDis, folder: Path) -> None:
    """The folder that diffusers and transformers write of a model's Stable Diffusion part."""
    for ours, theirs, name in ((model.unet, diffusers_unet(model.config), "unet"),
                               (model.autoencoder, diffusers_vae(model.config), "vae"),
                               (model.text_encoder, transformers_text(model.config.text), "text_encoder")):
        give_weights(ours, theirs).save_pretrained(folder / name)
    put_vocabulary(folder / "tokenizer", model.tokenizer)


@pytest.fixture()
def model() -> DiffDis:
    return build()


@pytest.fixture(scope="module")
def base() -> DiffDis:
    """A model of `shapes`, for tests that leave it as it is."""
    model = build()
    model.data = "shapes"
    return model
