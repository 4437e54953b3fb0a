"""Stable Diffusion's files in and out: every layout gives the same networks as diffusers and transformers
have, nothing in a file is run, and what is exported is what those libraries and we read back."""
import gzip
import hashlib
import json
import sys
import types
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (FULL_SIZE, build, diffusers_unet, error_of, give_weights, original_names,
                      put_vocabulary, write_folder)
from PIL import Image

import model as models
import sample
import train
from diffusion import generator_of
from fusion import FusionConfig
from model import AutoencoderConfig, Config, TextConfig, UNetConfig
from sample import draw_images

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is the oracle: pip install -r tests/requirements.txt")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture()
def whole(monkeypatch, tmp_path):
    """Stable Diffusion with random weights, small unless FULL_SIZE; `sd-v1` means its configuration here."""
    model = build(replace(models.PRESETS["sd-v1"], image_size=64) if FULL_SIZE else Config(
        FusionConfig(64, align_blocks=1, head_width=32), UNetConfig((32, 64, 64), (True, True, False), 2, 8),
        TextConfig(560, 77, 64, 2, 4), AutoencoderConfig(channels=(32, 32, 64, 64)), image_size=64))
    monkeypatch.setitem(models.PRESETS, "sd-v1", model.config)
    put_vocabulary(tmp_path / "tokenizer", model.tokenizer)           # beside the files of the tests
    return model.requires_grad_(False)


def same(model, other, only_theirs: bool = True) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items()
               if not (only_theirs and models.is_new(name)))


# ---------------------------------------------------------------- layouts
@pytest.mark.parametrize("layout", ["flat.ckpt", "nested.ckpt", "v_pred.ckpt", "v.safetensors"])
def test_original_layouts(whole, tmp_path, capsys, layout: str) -> None:
    tensors = original_names(whole)
    tensors |= {layout.split(".")[0]: torch.ones(3), "sqrt_one_minus_alphas_cumprod": torch.ones(3),
                "control_model.zero_convs.0.0.weight": torch.ones(1).to(torch.uint16),      # more is no harm
                "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    if layout.endswith(".safetensors"):
        safetensors.save_file({n: value.contiguous() for n, value in tensors.items()}, tmp_path / layout,
                              {"modelspec.prediction_type": "v"})
    else:
        nested = {"state_dict": {"state_dict": tensors}, "global_step": 7}
        torch.save(tensors if layout == "flat.ckpt" else nested, tmp_path / layout)
    loaded = models.load(tmp_path / layout)
    assert same(whole, loaded) and not loaded.training and loaded.tasks == ("generation",)
    assert loaded.config.image_target == {"v": "v"}.get(layout[0], "noise")
    fresh = sum(map(models.is_new, whole.state_dict()))
    assert f"from random weights: {fresh}; ignored: 4" in capsys.readouterr().out
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
    again = models.load((tmp_path / layout).rename(tmp_path / "renamed.pt"))
    assert same(whole, again) and again.config == loaded.config


def test_averages_of_an_original_file(whole, tmp_path) -> None:
    tensors, ours = original_names(whole), whole.state_dict()
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
                for name, value in tensors.items() if name.startswith("model.")}
    averaged["model_ema.decay"] = torch.tensor(0.9)
    for file, gone in (("full.ckpt", "nothing"), ("alone.ckpt", "model.")):
        torch.save({n: v for n, v in (tensors | averaged).items() if not n.startswith(gone)}, tmp_path / file)
        for name, value in models.load(tmp_path / file).state_dict().items():
            expected = ours[name] + name.startswith("unet.")
            assert models.is_new(name) or torch.equal(value, expected), name
    assert same(whole, models.load(tmp_path / "full.ckpt", weights="raw"))
    with pytest.raises(ValueError, match="alone.ckpt is another file"):
        models.load(tmp_path / "alone.ckpt", weights="raw")


def test_folders_that_the_libraries_write(whole, tmp_path) -> None:
    write_folder(whole, tmp_path / "folder")
    assert same(whole, models.load(tmp_path / "folder"))
    file = tmp_path / "folder/vae/diffusion_pytorch_model.safetensors"
    old = safetensors.load_file(file)
    for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {name.replace(f".0.{now}.", f".0.{before}."): value for name, value in old.items()}
    safetensors.save_file(old, file)           # as published in 2022
    assert same(whole, models.load(tmp_path / "folder"))


@pytest.mark.parametrize("ways, lost, message", [
    ([{"variant": "fp16"}], "none", ""), ([{"max_shard_size": "2MB"}], "none", ""),
    ([{"variant": "fp16"}, {"variant": "bf16"}], "none", "unet/diff.*one variant of it.*fp16"),
    ([{"max_shard_size": "2MB"}], "*-00001-*", "it lacks unet"),
    ([{"safe_serialization": False}], "none", "unet/diff.*not \\[\\]; diffusers makes it")])
def test_variants_and_shards_that_diffusers_writes(whole, tmp_path, ways, lost: str, message: str) -> None:
    write_folder(whole, tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    for way in ways:
        give_weights(whole.unet, diffusers_unet(whole.config)).save_pretrained(tmp_path / "unet", **way)
    for file in (tmp_path / "unet").glob(lost):
        file.unlink()
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert same(whole, models.load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_of_other_types_become_float32_or_bfloat16(whole, tmp_path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype).contiguous() for name, value in original_names(whole).items()}
    extra = {"x.alpha": torch.ones(3, dtype=torch.uint16), "first_stage_model.model_ema.decay": torch.ones(1)}
    safetensors.save_file(tensors | extra, tmp_path / "other.safetensors")
    full, half = (models.load(tmp_path / "other.safetensors", precision=kind) for kind in ("fp32", "bf16"))
    ours = whole.state_dict()
    for name, value in full.state_dict().items():
        assert models.is_new(name) or torch.equal(value, ours[name].to(dtype).float()), name
    assert {value.dtype for part in half.children() for value in part.parameters()} == {torch.bfloat16}
    image, exact = (draw_images(model, ["a red circle"], [0], 2, size=(64, 64)) for model in (half, full))
    assert image.dtype == half.logit_scale.dtype == torch.float32 and (image - exact).abs().mean() < 0.1


def test_the_autoencoder_takes_a_picture_of_512_px_at_a_time() -> None:
    network, seen = models.KLAutoencoder(AutoencoderConfig(channels=(32,))), []
    network.encoder, network.decoder = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.ConvTranspose2d(4, 3, 8, 8)
    for part, run, batch in ((network.encoder, network.moments, torch.randn(3, 3, 256, 512)),
                             (network.decoder, network.decode, torch.randn(3, 4, 32, 64))):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        assert torch.allclose(run(batch), torch.cat([run(one[None]) for one in batch]), atol=1e-5)
    assert seen == 2 * [2, 1, 1, 1, 1], "not two of 256 x 512 px, then the third"


@torch.no_grad()
def test_the_query_stream_is_adapted_and_leaves_generation_bit_equal(whole, tmp_path) -> None:
    """Stable Diffusion's weights in a network without the stream, and in one with another."""
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    without, deeper = (models.load(tmp_path / "sd.ckpt", adapt=lambda config: replace(
        config, fusion=replace(config.fusion, **changes)))
        for changes in ({"fusion": False}, {"align_blocks": 3, "own_ffn": False}))
    assert len(deeper.unet.query_head.blocks) == 3 and same(whole, deeper)
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    context = whole.encode_text(["a red circle", "a blue square"])[0]
    before, after = (model.denoise_image(latents, t, context) for model in (without, deeper))
    assert torch.equal(before, after) and before.abs().mean() > 1e-3


# ---------------------------------------------------------------- export
def test_export_and_load_is_bit_exact(whole, tmp_path, capsys) -> None:
    whole.data = "photos"
    models.save(tmp_path / "c.pt", whole)
    models.main(["export", str(tmp_path / "c.pt"), str(tmp_path / "out.safetensors")])
    again = models.load(tmp_path / "out.safetensors")
    assert same(whole, again, only_theirs=False)
    assert again.config == whole.config and again.tokenizer.merges == whole.tokenizer.merges
    assert again.data == "photos" and again.tasks == ("generation", "alignment")
    raw = (tmp_path / "out.safetensors").read_bytes()
    for parameter in again.parameters():         # mapped from the file, never written to it
        parameter.zero_()
    assert (tmp_path / "out.safetensors").read_bytes() == raw
    single = safetensors.load_file(tmp_path / "out.safetensors")
    assert {name for name in single if name.startswith("diffdis.")}, "the query stream is not there"
    for name, value in original_names(whole).items():
        assert single[name].shape == value.shape, "CompVis's program has 1x1 convolutions there"
    models.save(tmp_path / "ours.pt", build())
    argv = ["export", str(tmp_path / "ours.pt"), str(tmp_path / "no.safetensors")]
    assert "autoencoder" in error_of(capsys, models.main, argv)


@torch.no_grad()
def test_exports_draw_the_same_picture_in_diffusers(whole, tmp_path) -> None:
    """Its own converters turn the file's names back into its, and ours: an outside table."""
    prompt, seed = "a red circle above a blue square", 3
    drawn = draw_images(whole, [prompt], [seed], steps=5, guidance_scale=3.0)
    noise = torch.randn(whole.latent_shape(64, 64), generator=generator_of(seed))[None]
    folder, file = tmp_path / "folder", tmp_path / "export.safetensors"
    write_folder(whole, folder)
    models.export(whole, file)
    parts = {name: getattr(diffusers, kind).from_single_file(file, config=str(folder), subfolder=name).eval()
             for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"))}
    for name, network in (("unet", whole.unet), ("vae", whole.autoencoder)):
        theirs, ours = parts[name].state_dict(), network.state_dict()
        assert theirs.keys() == {key for key in ours if not models.is_new(key)}
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items()), "one landed elsewhere"
    pipe = diffusers.StableDiffusionPipeline(
        **parts, text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        safety_checker=None, scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1), feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(prompt, latents=noise.clone(), num_inference_steps=5, guidance_scale=3.0, height=64,
                  width=64, output_type="pt").images * 2 - 1
    assert (drawn - picture).abs().max() < 1e-3, "the picture is not the one diffusers draws"


# ---------------------------------------------------------------- safety
def test_a_file_cannot_run_code(tmp_path) -> None:
    evil = type("Evil", (), {"__reduce__": lambda self: (open, (str(tmp_path / "ran"), "w"))})()
    torch.save({"format": models.FORMAT, "config": evil}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"open"):
        models.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_objects_of_training_programs_become_inert(whole, tmp_path, monkeypatch) -> None:
    """As in the published .ckpt: a dict keyed by a class of a package that is not installed."""
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    Callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    sys.modules["pytorch_lightning.callbacks"].ModelCheckpoint = Callback
    torch.save({"state_dict": original_names(whole), "callbacks": {Callback: {"best": Callback()}},
                "loss": np.float64(0.5)}, tmp_path / "sd.ckpt")
    monkeypatch.undo()
    monkeypatch.setitem(models.PRESETS, "sd-v1", whole.config)
    assert same(whole, models.load(tmp_path / "sd.ckpt"))


def test_damaged_safetensors_are_refused_by_name(tmp_path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.randn(3).bfloat16()}
    safetensors.save_file(tensors, good, {"made": "here"})
    read, metadata = models.read_file(good)
    assert metadata == {"made": "here"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    raw = good.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + length]), raw[8 + length:]
    first = header["a"]["data_offsets"][0]
    cases = [b"", raw[:-10], raw[:40], raw + b"more", (9).to_bytes(8, "little") + b"{not json",
             (2 ** 60).to_bytes(8, "little") + b"{}"]
    for entry in ({"data_offsets": [first, first + 4 * 10 ** 9], "shape": [10 ** 9]},
                  {"data_offsets": [first + 4, first + 28]}, {"data_offsets": [-24, 0]},
                  {"data_offsets": [first, first + 24 + 8]}, {"shape": [3, 3]}):
        text = json.dumps(header | {"a": header["a"] | entry}).encode()
        cases.append(len(text).to_bytes(8, "little") + text + body)
    known = {b"version https://git-lfs": "git lfs pull", b"\n<!DOCTYPE html>": "web page"}
    for i, case in enumerate([*cases, *known]):
        bad.write_bytes(case)
        with pytest.raises(ValueError, match=f"bad.safetensors.*{known.get(case, '')}"):
            models.read_file(bad)
            pytest.fail(f"case {i}: accepted")


UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
YAML = "params:\n  linear_end: 0.0120\n  timesteps: 1000 # parameterization: v\n  num_heads: 8\n"


@pytest.mark.parametrize("place, words, expected", [
    ("", YAML, ("noise", 512)), ("", YAML + 'parameterization: "v"', ("v", 512)),
    ("", YAML.replace("120", "200"), "linear_end"), ("", YAML + "num_head_channels: 64", "num_head_chan"),
    ("scheduler", {"prediction_type": "v_prediction", "trained_betas": None}, ("v", 512)),
    ("scheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction', and we compute epsilon"),
    ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, and we compute False"),
    ("scheduler", {"num_train_timesteps": 500}, "1000"), ("scheduler", {"beta_end": 0.02}, "0.012 alone"),
    ("scheduler", {"beta_schedule": "linear"}, "scaled_linear"), ("vae", {"scaling_factor": 0.13}, "0.18215"),
    *((where, YAML + "parameterization : v", ("v", 512)) for where in ("", ".")),
    ("beside", YAML + "parameterization: v", ("noise", 512)),
    ("unet", {"freq_shift": 0, "attention_head_dim": 8, "num_attention_heads": None}, ("noise", 512)),
    ("image_encoder", {"hidden_act": "gelu"}, ("noise", 512)),
    ("unet", {"center_input_sample": True}, "center"),
    ("unet", {"attention_head_dim": 16}, "16.*compute 8"), ("unet", "{", "unet/config.json .*JSON"),
    ("text_encoder", {"num_attention_heads": 8}, "compute 4"), ("text_encoder", {"hidden_act": ""}, "gelu")])
def test_what_files_say_is_obeyed_or_refused_by_name(whole, tmp_path, place, words, expected) -> None:
    names = {"": "sd.yaml", ".": "sd.yml", "beside": f"../../{tmp_path.name}.yaml",
             "scheduler": "scheduler_config.json"}
    (tmp_path / place).mkdir(exist_ok=True)
    file = tmp_path / place / names.get(place, "config.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(words if isinstance(words, str) else json.dumps(words))
    with pytest.raises(ValueError, match=expected) if isinstance(expected, str) else nullcontext():
        config = models.obey(tmp_path if place.strip(".") else tmp_path / "sd.ckpt", {})
        assert (config.image_target, config.image_size) == expected


@pytest.mark.parametrize("gone, more, message", [
    ("-", f"{UNET}input_blocks.1.1.transformer_blocks.1.norm1.bias 64", "none; unknown model.diff"),
    ("-", f"{TEXT}encoder.layers.2.layer_norm1.bias 64", "unknown cond_stage_model.transformer.text"),
    ("-", "first_stage_model.decoder.up.3.x 64", "unknown first_stage_model.dec"),
    (f"{UNET}out.2.bias", "x", "lacks unet.conv_out.bias"), ("first_stage", "x", "lacks autoencoder"),
    ("-", f"{UNET}input_blocks.0.0.weight 32 9 3 3", "for inpainting"), ("-", "ztsnr", "of zero SNR"),
    ("-", f"{UNET}input_blocks.0.0.weight 32 8 3 3", "editing"),
    ("-", f"{UNET}x_embedding.cond_proj", "an LCM"),
    ("-", f"{UNET}input_blocks.1.1.proj_in.weight 32 32", "0.proj_in.weight.*32, 32.*32, 32, 1, 1"),
    ("-", "x.attn2.to_k.weight 32 1024", "Diffusion 2"), ("-", "x.attn2.to_k.weight 32 2048", "Diffusion XL"),
    (TEXT, "cond_stage_model.model.x", "Diffusion 2"), (TEXT, "conditioner.embedders.1.x", "Diffusion XL"),
    ("-", "scaled_fp8", "scaled float8"), (".", "a.lora_up.weight", "LoRA"), (".", "emb_params", "textual"),
    (".", "control_model.x", "ControlNet"), (".", "x", "another file, not DiffDis .*it holds x")])
def test_other_networks_are_refused_by_name(whole, tmp_path, gone: str, more: str, message: str) -> None:
    """gone: in names of Stable Diffusion v1 that the file has not; more: what it has, a name and a shape."""
    name, *shape = more.split()
    tensors = {name: value for name, value in original_names(whole).items() if gone not in name}
    torch.save(tensors | {name: torch.zeros([*map(int, shape)])}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=rf"other.ckpt.*{message}") as error:
        models.load(tmp_path / "other.ckpt")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- downloads
def offer(monkeypatch, path, name: str, body: bytes, sha256: str | None = None) -> None:
    """Put a file where it can be downloaded from."""
    monkeypatch.setattr(models, "CACHE", path.parent / "hub")
    path.write_bytes(body)
    monkeypatch.setitem(models.DOWNLOADS, name, (path.as_uri(), sha256 or hashlib.sha256(body).hexdigest()))


def test_without_a_checkpoint_stable_diffusion_comes_once(whole, tmp_path, monkeypatch, capsys) -> None:
    """Saying what, how large and where to; without a network in one line that names the ways to get one."""
    weights, vocabulary = tmp_path / "v1-5.safetensors", tmp_path / "vocabulary.txt.gz"
    safetensors.save_file({n: value.contiguous() for n, value in original_names(whole).items()}, weights)
    offer(monkeypatch, weights, "sd-v1-5", weights.read_bytes())
    offer(monkeypatch, vocabulary, "vocabulary",
          gzip.compress("\n".join(["a header", *whole.tokenizer.merges]).encode()))
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    flags = ["a dog on a beach", "--size", "64", "64", "--steps", "1", "--device", "cpu"]
    sample.main(flags)
    said = capsys.readouterr().out
    assert "checkpoint: sd-v1-5" in said and "hub/v1-5.safetensors" in said
    assert "no --ckpt" in error_of(capsys, sample.main, [*flags, "--best-of", "2"]), "drawn, but not read"
    assert Image.open("sample.png").size == (256, 256)
    weights.unlink()
    assert same(whole, models.load("sd-v1-5")), "the second time from the cache"
    (tmp_path / "hub/v1-5.safetensors").unlink()
    error = error_of(capsys, sample.main, flags)
    assert all(way in error for way in ("could not download", "put the file at", "train.py", "--ckpt"))
    assert {str(models.locate(path)) for path in ("./sd-v1-5", "sd-v1-5/")} == {"sd-v1-5"}, "are paths"
    (tmp_path / "sd-v1-5").write_text("a file as well as a folder")
    assert str(models.locate("sd-v1-5")) == "sd-v1-5", "what is here goes first"


def test_a_broken_download_leaves_nothing(tmp_path, monkeypatch) -> None:
    offer(monkeypatch, tmp_path / "v1-5.safetensors", "sd-v1-5", bytes(100_000), 64 * "0")
    with pytest.raises(OSError, match="could not download.*put the file at"):
        models.load("sd-v1-5")
    assert not [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]


# ---------------------------------------------------------------- from a user's side
def test_stable_diffusion_is_fine_tuned_resumed_and_sampled(whole, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    flags = ["--init", "sd.ckpt", "--preset", "sd-v1", "--batch-size", "4", "--out", "run", "--device", "cpu",
             "--image-size", "64", "--workers", "0", "--val", "4", "--align-blocks", "2", "--steps", "2",
             "--eval-every", "2"]
    monkeypatch.setattr(train.Trainer, "validate", lambda self: None)
    train.main(flags)
    tuned = models.load("run/checkpoint.pt")
    assert len(tuned.unet.query_head.blocks) == 2 and tuned.config.image_size == 64
    stays = {part: same(getattr(whole, part), getattr(tuned, part))
             for part in ("unet", "autoencoder", "text_encoder")}
    assert stays == {"unet": False, "autoencoder": True, "text_encoder": True}
    train.main([*flags, "--resume"])
    capsys.readouterr()
    sample.main(["a dog on a beach", "--ckpt", "run/checkpoint.pt", "--steps", "2", "--sampler", "dpm++",
                 "--precision", "bf16", "--best-of", "2", "--device", "cpu"])
    said = capsys.readouterr()
    assert "grammar" not in said.err, "it was trained on more than shapes"
    assert "Sampler: DPM++ 2M" in Image.open("sample.png").text["parameters"]
