"""Checkpoints: what is saved is what is loaded, nothing else is accepted,
and nothing is ever half-written."""
import copy
import io
import pickle
import re
import resource
import signal
from dataclasses import replace

import pytest
import torch
from conftest import build, randomise, tiny_config

import model as models
from data import to_float
from model import AutoencoderConfig, Config, TimestepEmbedding, UNet


def test_round_trip_is_bit_exact_and_averages_are_preferred(model, tmp_path) -> None:
    model.data, model.tasks = "photos", ("generation",)
    models.save(tmp_path / "c.pt", model, {"unet.conv_in.bias": torch.full_like(model.unet.conv_in.bias, 7)})
    ema, raw = (models.load(tmp_path / "c.pt", weights=weights) for weights in ("ema", "raw"))
    assert raw.config == model.config and raw.tokenizer.merges == model.tokenizer.merges
    assert raw.data == "photos" and raw.tasks == ("generation",) and not raw.training
    assert torch.equal(raw.null_tokens, model.null_tokens), "another prompt stands for none"
    raw, ema = raw.state_dict(), ema.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, raw[name]), name
        expected = torch.full_like(value, 7) if name == "unet.conv_in.bias" else value
        assert torch.equal(expected, ema[name]), name


def test_what_is_no_checkpoint_of_ours_is_refused_in_one_line(model, tmp_path) -> None:
    models.save(tmp_path / "good.pt", model)
    raw, stripped = (tmp_path / "good.pt").read_bytes(), io.BytesIO()
    torch.save(torch.load(tmp_path / "good.pt", weights_only=True) | {"tasks": None}, stripped)
    cases = {"truncated.pt": raw[:len(raw) // 2], "text.pt": b"hello", "empty.pt": b"",
             "pickle.pt": pickle.dumps({"a": 1}), "stripped.pt": stripped.getvalue()}
    for name, body in cases.items():
        (tmp_path / name).write_bytes(body)
        with pytest.raises(ValueError, match=name) as error:
            models.load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost, more", [("unet.conv_in.bias", "unet.strange"),
                                        ("unet.query_head.predictor.weight", "betas")])      # not: drawn anew
def test_tensors_must_fit_exactly(model, tmp_path, lost: str, more: str) -> None:
    models.save(tmp_path / "c.pt", model)
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    del checkpoint["model"][lost]
    checkpoint["model"][more] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=f"lacks {lost}; unknown {more}"):
        models.load(tmp_path / "c.pt")


def test_a_full_disk_leaves_the_old_checkpoint(model, tmp_path) -> None:
    models.save(tmp_path / "c.pt", model)
    before = (tmp_path / "c.pt").read_bytes()
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing past the limit then fails like a full disk, half way: torch says so in a RuntimeError.
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, old_limit[1]))
        with pytest.raises(OSError, match="disk full.*what was there is intact"):
            models.save(tmp_path / "c.pt", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert (tmp_path / "c.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"], "a half-written file was left behind"


def test_a_field_of_another_version_is_refused() -> None:
    with pytest.raises(TypeError, match="heads_of_another_version"):
        models.from_dict(Config, {"fusion": {"query_width": 4, "heads_of_another_version": 1}})


@torch.no_grad()
def test_patches_lose_nothing_and_keep_the_scale_contract(model) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.read_batch(model.autoencoder.moments(images), torch.randn(2, 192, 4, 4))
    assert torch.allclose(latents.std() / images.std(), torch.tensor(2.0), atol=1e-3)
    assert torch.allclose(model.decode_image(latents), images, atol=1e-6)


@torch.no_grad()
def test_latents_are_drawn_from_the_posterior() -> None:
    """Of pixels, and of stored moments."""
    model = build(tiny_config(autoencoder=AutoencoderConfig("kl", 4, 2, 0.5, (32, 32))))
    model.autoencoder.quant_conv.bias[4:] = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    pixels, noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), torch.randn(2, 4, 16, 16)
    moments = model.autoencoder.moments(to_float(pixels))
    mean, logvar = moments.chunk(2, dim=1)
    expected = 0.5 * torch.distributions.Normal(mean, logvar.exp().sqrt()).icdf(
        torch.distributions.Normal(0, 1).cdf(noise))
    for images in (pixels, moments):
        assert torch.allclose(model.read_batch(images, noise), expected, atol=1e-3)
        assert torch.allclose(model.read_batch(images), 0.5 * mean, atol=1e-6)
    assert torch.allclose(model.encode_image(to_float(pixels)), 0.5 * mean, atol=1e-6)


@torch.no_grad()
def test_half_precision_tells_timesteps_apart() -> None:
    exact = randomise(TimestepEmbedding(32, 32))
    t = torch.tensor([997, 998, 999, 1000])
    assert torch.allclose(copy.deepcopy(exact).bfloat16()(t).float(), exact(t), atol=0.02)


def test_from_scratch_every_residual_branch_starts_at_zero() -> None:
    for name, parameter in UNet(tiny_config()).named_parameters():
        if re.search(r"(conv2|proj_out|^conv_out)\.(weight|bias)$", name):
            assert not parameter.any(), name


def test_the_folder_of_a_run_is_its_checkpoint_and_a_flag_is_no_damage(model, tmp_path) -> None:
    models.save(tmp_path / "checkpoint.pt", model)
    assert models.load(tmp_path).config == model.config
    with pytest.raises(ValueError, match="^size is 33x33"):
        models.load(tmp_path, adapt=lambda config: replace(config, image_size=33))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty \(found: nothing\)"):
        models.load(tmp_path / "empty")
