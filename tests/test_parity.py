"""The networks against diffusers and transformers, with the same random weights, small or at full size."""
import pytest
import torch
from conftest import FULL_SIZE, diffusers_unet, diffusers_vae, give_weights, randomise, transformers_text

from fusion import FusionConfig
from model import (CLIPS, PRESETS, AutoencoderConfig, Clip, Config, KLAutoencoder, TextConfig, TextEncoder,
                   UNet, UNetConfig, is_new)

for package in ("diffusers", "transformers"):
    pytest.importorskip(package, reason=f"{package} is the oracle: pip install -r tests/requirements.txt")

SIZES = {"small": Config(
    FusionConfig(64, align_blocks=1, head_width=32), UNetConfig((32, 64, 64), (True, True, False), 2, 4),
    TextConfig(600, 16, 64, 2, 4), AutoencoderConfig(channels=(32, 32, 64, 64)))}
if FULL_SIZE:
    SIZES["sd-v1"] = PRESETS["sd-v1"]
at_every_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert b.abs().mean() > 1e-3, "the oracle's output vanishes: the comparison would show nothing"
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


@torch.no_grad()
@at_every_size
def test_unet_equals_diffusers(config: Config) -> None:
    ours = randomise(UNet(config))
    theirs = give_weights(ours, diffusers_unet(config))
    ours.double(), theirs.double()          # in float32 rounding would hide a wrong eps
    for height, width in ((8, 8), (7, 9)):          # an odd side is rounded on the way down
        latents, t = torch.randn(2, 4, height, width).double(), torch.tensor([3, 998])
        context = torch.randn(2, config.text.context_length, config.text.width).double()
        worst = difference(ours.denoise_image(latents, t, context), theirs(latents, t, context).sample)
        assert worst < 1e-7, f"the generation path is not Stable Diffusion's UNet: off by {worst}"


@torch.no_grad()
@at_every_size
def test_autoencoder_equals_diffusers(config: Config) -> None:
    ours = randomise(KLAutoencoder(config.autoencoder))
    theirs = give_weights(ours, diffusers_vae(config))
    # Random weights amplify float32's rounding: float64 shows the formula alone.
    ours.double(), theirs.double()
    for network in (ours, theirs):
        network.quant_conv.bias[4:] += torch.tensor([-99, -9, 9, 99])       # beyond what either lets through
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    mean, logvar = ours.moments(images).chunk(2, dim=1)
    assert difference(mean, posterior.mean) < 1e-9 and difference(logvar, posterior.logvar) < 1e-9
    worst = difference(ours.decode(mean * 0.18215), theirs.decode(mean).sample)
    assert worst < 1e-9, f"decoding is off by {worst}"


@torch.no_grad()
@at_every_size
def test_text_encoder_equals_transformers(config: Config) -> None:
    ours, end = randomise(TextEncoder(config.text)), config.text.vocab_size - 1
    theirs = give_weights(ours, transformers_text(config.text))
    tokens = torch.randint(0, end - 1, (3, 16))
    tokens[:, 0], tokens[0, 9:], tokens[1, 4:], tokens[2, 15:] = end - 1, end, end, end
    output = theirs(tokens)
    context, query = ours(tokens)
    assert difference(context, output.last_hidden_state) < 1e-4
    pooled = torch.nn.functional.normalize(output.pooler_output, dim=-1)
    assert difference(query, pooled) < 1e-5, "the text query is not the output at the first end token"


def test_networks_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        config = PRESETS["sd-v1"]
        unet, vae, text = UNet(config), KLAutoencoder(config.autoencoder), TextEncoder(config.text)
        clip = Clip(CLIPS["clip-vit-l14"])
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if not is_new(name))
    assert count(unet) == 859_520_964
    assert count(vae) == 83_653_863
    assert count(text) == 123_060_480
    assert sum(p.numel() for p in clip.parameters()) == 427_616_513, "CLIP ViT-L/14"
