"""Stable Diffusion's files in and out: every layout gives the same networks as diffusers and transformers
have, nothing in a file is run, and what is exported is what those libraries and we read back."""
import gzip
import hashlib
import http.server
import json
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build, put_vocabulary, randomise, write_folder
from PIL import Image

import evaluate
import model as models
import sample
import train
from data import Shapes, Tokenizer
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
    """A small Stable Diffusion with random weights; `sd-v1` means its configuration here."""
    tokenizer = Tokenizer.learn((Shapes().captions(i)[0] for i in range(200)), 560, 77)
    config = Config(FusionConfig(64, align_blocks=1, head_width=32),
                    UNetConfig((32, 64, 64), (True, True, False), 2, 8),
                    TextConfig(tokenizer.vocab_size, 77, 64, 2, 4),
                    AutoencoderConfig(channels=(32, 32, 64, 64)), image_size=64)
    monkeypatch.setitem(models.PRESETS, "sd-v1", config)
    put_vocabulary(tmp_path / "tokenizer", tokenizer)           # beside the files of the tests
    return randomise(models.DiffDis(config, tokenizer)).eval().requires_grad_(False)


def original_names(model) -> dict[str, torch.Tensor]:
    """Stable Diffusion's part of the model as CompVis's program names it."""
    names = models.to_compvis(model.state_dict(), model.config)
    return {names[ours]: value[:, :, None, None] if "attn_1." in names[ours] and value.dim() == 2 else value
            for ours, value in model.state_dict().items() if not models.is_new(ours)}


def same(model, other, only_theirs: bool = True) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items()
               if not (only_theirs and models.is_new(name)))


def test_names_are_those_that_diffusers_reads(whole, tmp_path) -> None:
    """diffusers' own converters turn our CompVis spelling back into its names: an outside table, not ours."""
    from diffusers.loaders.single_file_utils import (convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint)
    models.export(whole, tmp_path / "export.safetensors")
    write_folder(whole, tmp_path / "folder")
    raw = safetensors.load_file(tmp_path / "export.safetensors")
    unet, vae = (convert(dict(raw), json.loads((tmp_path / f"folder/{part}/config.json").read_text()))
                 for convert, part in ((convert_ldm_unet_checkpoint, "unet"),
                                       (convert_ldm_vae_checkpoint, "vae")))
    for part, found in (("unet", unet), ("autoencoder", vae)):
        expected = {name.removeprefix(part + "."): value for name, value in whole.state_dict().items()
                    if name.startswith(part + ".") and not models.is_new(name)}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name].reshape(value.shape), value), f"{part} {name} landed elsewhere"


REAL_NAMES = """
    model.diffusion_model.time_embed.2.bias
    model.diffusion_model.input_blocks.0.0.weight
    model.diffusion_model.input_blocks.3.0.op.weight
    model.diffusion_model.input_blocks.4.0.skip_connection.bias
    model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight
    model.diffusion_model.input_blocks.11.0.out_layers.3.weight
    model.diffusion_model.middle_block.1.proj_in.weight
    model.diffusion_model.middle_block.2.emb_layers.1.bias
    model.diffusion_model.output_blocks.2.1.conv.weight
    model.diffusion_model.output_blocks.5.2.conv.weight
    model.diffusion_model.output_blocks.8.2.conv.bias
    model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight
    model.diffusion_model.out.0.weight
    model.diffusion_model.out.2.bias
    first_stage_model.encoder.down.0.downsample.conv.weight
    first_stage_model.encoder.mid.attn_1.q.weight
    first_stage_model.encoder.down.2.block.0.nin_shortcut.weight
    first_stage_model.encoder.norm_out.weight
    first_stage_model.decoder.up.3.upsample.conv.bias
    first_stage_model.decoder.up.0.block.2.conv1.weight
    first_stage_model.decoder.mid.attn_1.proj_out.bias
    first_stage_model.quant_conv.weight
    cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight
    cond_stage_model.transformer.text_model.final_layer_norm.bias
"""


def test_real_names_of_stable_diffusion_v1() -> None:
    """Names of the published file, one of every kind."""
    with torch.device("meta"):
        config = models.PRESETS["sd-v1"]
        ours = [f"unet.{name}" for name in models.UNet(config).state_dict()]
        ours += [f"autoencoder.{name}" for name in models.KLAutoencoder(config.autoencoder).state_dict()]
        ours += [f"text_encoder.{name}" for name in models.TextEncoder(config.text).state_dict()]
    theirs = set(models.to_compvis(ours, config).values())
    assert set(REAL_NAMES.split()) <= theirs and len(theirs) == len(ours)


@pytest.mark.parametrize("layout", ["flat.ckpt", "nested.ckpt", "plain.safetensors"])
def test_original_layouts(whole, tmp_path, capsys, layout: str) -> None:
    tensors = original_names(whole)
    tensors |= {"betas": torch.ones(3), "sqrt_one_minus_alphas_cumprod": torch.ones(3),
                "logvar": torch.ones(1),
                "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    if layout.endswith(".safetensors"):
        safetensors.save_file({n: value.contiguous() for n, value in tensors.items()}, tmp_path / layout)
    else:
        nested = {"state_dict": tensors, "global_step": 7}
        torch.save(tensors if layout == "flat.ckpt" else nested, tmp_path / layout)
    loaded = models.load(tmp_path / layout)
    assert same(whole, loaded) and not loaded.training
    said = capsys.readouterr().out
    fresh = [name for name in whole.state_dict() if models.is_new(name)]
    assert f"from random weights: {len(fresh)};" in said and "ignored: 4" in said
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())


def test_averages_of_an_original_file(whole, tmp_path) -> None:
    tensors = original_names(whole)
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
                for name, value in tensors.items() if name.startswith("model.")}
    averaged["model_ema.decay"] = torch.tensor(0.9)
    torch.save({"state_dict": tensors | averaged}, tmp_path / "full.ckpt")
    raw, ema = (models.load(tmp_path / "full.ckpt", weights=weights) for weights in ("raw", "ema"))
    assert same(whole, raw)
    for name, value in whole.state_dict().items():
        if not models.is_new(name):
            assert torch.equal(ema.state_dict()[name], value + 1 if name.startswith("unet.") else value), name


def test_folders_that_the_libraries_write(whole, tmp_path) -> None:
    write_folder(whole, tmp_path / "folder")
    assert same(whole, models.load(tmp_path / "folder"))
    (tmp_path / "folder/vae/config.json").rename(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="vae/diffusion_pytorch_model.safetensors"):
        models.load(tmp_path / "folder")
    (tmp_path / "folder/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vae/diffusion_pytorch_model.safetensors.*not its .bin"):
        models.load(tmp_path / "folder")


# ---------------------------------------------------------------- export
def test_export_and_load_is_bit_exact(whole, tmp_path) -> None:
    whole.data = "photos"
    models.export(whole, tmp_path / "export.safetensors")
    again = models.load(tmp_path / "export.safetensors")
    assert same(whole, again, only_theirs=False)
    assert again.config == whole.config and again.tokenizer.merges == whole.tokenizer.merges
    assert again.data == "photos" and again.tasks == ("generation", "alignment")
    single = safetensors.load_file(tmp_path / "export.safetensors")
    assert {name for name in single if name.startswith("diffdis.")}, "the query stream is not there"


@torch.no_grad()
def test_exports_draw_the_same_picture_in_diffusers(whole, tmp_path) -> None:
    prompt, seed = "a red circle above a blue square", 3
    ours = draw_images(whole, [prompt], [seed], steps=5, guidance_scale=3.0)
    noise = torch.randn(whole.latent_shape(64, 64), generator=generator_of(seed))[None]
    folder, file = tmp_path / "folder", tmp_path / "export.safetensors"
    write_folder(whole, folder)
    models.export(whole, file)
    parts = {name: getattr(diffusers, kind).from_single_file(file, config=str(folder), subfolder=name).eval()
             for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"))}
    pipe = diffusers.StableDiffusionPipeline(
        **parts, text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        safety_checker=None,
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1), feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt, latents=noise.clone(), num_inference_steps=5, guidance_scale=3.0, height=64,
                  width=64, output_type="pt").images * 2 - 1
    assert (ours - theirs).abs().max() < 1e-3, "the picture is not the one diffusers draws"


def test_small_models_of_our_own_make_are_no_stable_diffusion(tmp_path) -> None:
    with pytest.raises(ValueError, match="only a DiffDis with Stable Diffusion's"):
        models.export(build(), tmp_path / "x.safetensors")


# ---------------------------------------------------------------- safety
class Exploit:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_cannot_run_code(whole, tmp_path) -> None:
    evil = {"state_dict": original_names(whole), "evil": Exploit(tmp_path / "ran")}
    torch.save(evil, tmp_path / "evil.ckpt")
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


def broken_headers(good: bytes) -> dict[str, bytes]:
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8:8 + length]), good[8 + length:]

    def changed(name: str = "a", **entry) -> bytes:
        other = json.loads(json.dumps(header))
        other[name] |= entry
        text = json.dumps(other).encode()
        return len(text).to_bytes(8, "little") + text + body
    first, size = header["a"]["data_offsets"][0], len(body)
    return {"cut short": good[:-10], "header cut short": good[:40], "too long": good + b"more",
            "beyond the end": changed(data_offsets=[first, first + 4 * 10 ** 9], shape=[10 ** 9]),
            "overlap": changed("b", data_offsets=[first, first + 32]),
            "hole": changed(data_offsets=[first + 4, first + 28]), "past it": changed(
                data_offsets=[size, size + 24]), "negative": changed(data_offsets=[-24, 0]),
            "negative shape": changed(shape=[-2, -3]), "other shape": changed(shape=[3, 3]),
            "other type": changed(dtype="F99"), "no JSON": (9).to_bytes(8, "little") + b"{not json",
            "huge header": (2 ** 60).to_bytes(8, "little") + b"{}"}


def test_damaged_safetensors_are_refused_by_name(tmp_path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.randn(3).bfloat16()}
    safetensors.save_file(tensors, tmp_path / "good.safetensors", {"made": "here"})
    read, metadata = models.read_file(tmp_path / "good.safetensors")
    assert metadata == {"made": "here"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    for name, body in broken_headers((tmp_path / "good.safetensors").read_bytes()).items():
        (tmp_path / "bad.safetensors").write_bytes(body)
        with pytest.raises(ValueError, match="bad.safetensors"):
            models.read_file(tmp_path / "bad.safetensors")
            pytest.fail(f"{name}: accepted")


def test_what_does_not_fit_is_named(whole, tmp_path) -> None:
    tensors = original_names(whole)
    del tensors["model.diffusion_model.out.2.bias"]
    tensors["model.diffusion_model.strange"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt.*lacks unet.conv_out.bias.*strange"):
        models.load(tmp_path / "other.ckpt")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)      # inpainting
    torch.save(tensors, tmp_path / "inpainting.ckpt")
    with pytest.raises(ValueError, match=r"inpainting.ckpt.*unet.conv_in.weight.*32, 9, 3, 3"):
        models.load(tmp_path / "inpainting.ckpt")


@pytest.mark.parametrize("name", ["v_pred", "first_stage_model.encoder.lora_down.weight",
                                  "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias"])
def test_what_nobody_here_would_obey_is_refused(whole, tmp_path, name: str) -> None:
    """A mark of another target, an adapter, one layer more: without them the picture would be another."""
    torch.save(original_names(whole) | {name: torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=rf"unknown {name}"):
        models.load(tmp_path / "other.ckpt")


def test_half_precision_spares_the_autoencoder(whole, tmp_path) -> None:
    models.export(whole, tmp_path / "export.safetensors")
    half = models.load(tmp_path / "export.safetensors", dtype=torch.float16)
    for name, value in whole.autoencoder.state_dict().items():
        assert torch.equal(half.autoencoder.state_dict()[name], value), "rounded on the way"
    assert half.unet.conv_in.weight.dtype == torch.float16
    assert half.autoencoder.decoder.conv_in.weight.dtype == torch.float32
    image = half.decode_image(torch.randn(1, 4, 8, 8).half())
    assert image.dtype == torch.float32 and torch.isfinite(image).all()


def test_adapting_the_query_stream_of_foreign_weights(whole, tmp_path) -> None:
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    adapt = lambda config: replace(config, fusion=replace(config.fusion, align_blocks=3, own_ffn=False))
    loaded = models.load(tmp_path / "sd.ckpt", adapt=adapt)
    assert len(loaded.unet.query_head.blocks) == 3 and same(whole, loaded)


# ---------------------------------------------------------------- downloads
@pytest.fixture()
def server(tmp_path, monkeypatch):
    """A local web server; `server.files` maps paths to bodies, `server.asked` lists what was asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            body, cut = served.files[self.path], self.path.startswith("/cut/")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if cut else body)

        def log_message(self, *args) -> None:
            pass
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.asked = {}, []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(models, "CACHE", tmp_path / "hub")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield served
    served.shutdown()


def offer(server, monkeypatch, name: str, path: str, body: bytes, sha256: str | None = None) -> None:
    server.files[path] = body
    url = f"http://127.0.0.1:{server.server_port}{path}"
    monkeypatch.setitem(models.DOWNLOADS, name, (url, sha256 or hashlib.sha256(body).hexdigest()))


def test_named_weights_are_downloaded_once(whole, tmp_path, server, monkeypatch) -> None:
    tensors = {name: value.contiguous() for name, value in original_names(whole).items()}
    safetensors.save_file(tensors, tmp_path / "sd.bin")
    vocabulary = "\n".join(["a header", *whole.tokenizer.merges]).encode()
    offer(server, monkeypatch, "sd-v1-5", "/v1-5.safetensors", (tmp_path / "sd.bin").read_bytes())
    offer(server, monkeypatch, "vocabulary", "/vocabulary.txt.gz", gzip.compress(vocabulary))
    for _ in range(2):
        assert same(whole, models.load("sd-v1-5"))
    assert sorted(server.asked) == ["/v1-5.safetensors", "/vocabulary.txt.gz"]


@pytest.mark.parametrize("path, sha256", [("/cut/v1-5.safetensors", None), ("/v1-5.safetensors", 64 * "0")])
def test_a_broken_download_leaves_nothing(tmp_path, server, monkeypatch, path: str, sha256) -> None:
    offer(server, monkeypatch, "sd-v1-5", path, bytes(100_000), sha256)
    with pytest.raises(OSError, match="could not download.*put the file at"):
        models.load("sd-v1-5")
    assert not [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]


def test_without_a_checkpoint_stable_diffusion_comes(whole, tmp_path, server, monkeypatch, capsys) -> None:
    """Saying what, how large and where to; without a network in one line that names the ways to get one."""
    tensors = {name: value.contiguous() for name, value in original_names(whole).items()}
    safetensors.save_file(tensors, tmp_path / "sd.bin")
    offer(server, monkeypatch, "sd-v1-5", "/v1-5.safetensors", (tmp_path / "sd.bin").read_bytes())
    (tmp_path / "hub").mkdir()
    (tmp_path / "tokenizer").rename(tmp_path / "hub/tokenizer")
    monkeypatch.chdir(tmp_path)
    flags = ["a dog on a beach", "--size", "64x64", "--steps", "1", "--device", "cpu"]
    sample.main(flags)
    said = capsys.readouterr().out
    assert "taking sd-v1-5" in said and "4.3 GB" in said and "hub/v1-5.safetensors" in said
    assert Image.open("sample.png").size == (256, 256)
    (tmp_path / "hub/v1-5.safetensors").unlink()
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit) as stop:
        sample.main(flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    assert all(way in error for way in ("could not download", "put the file at", "train.py", "--ckpt"))


@torch.no_grad()
def test_the_query_stream_leaves_generation_bit_equal(whole, tmp_path) -> None:
    """Stable Diffusion's weights in a network without the stream, and in one with it."""
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    without = models.load(tmp_path / "sd.ckpt", adapt=lambda config: replace(
        config, fusion=replace(config.fusion, fusion=False)))
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    context = whole.encode_text(["a red circle", "a blue square"])[0]
    before = without.denoise_image(latents, t, context)
    after = models.load(tmp_path / "sd.ckpt").denoise_image(latents, t, context)
    assert torch.equal(before, after) and before.abs().mean() > 1e-3


def test_export_on_the_command_line(whole, tmp_path, capsys) -> None:
    models.save(tmp_path / "c.pt", whole)
    models.main(["export", str(tmp_path / "c.pt"), str(tmp_path / "out.safetensors")])
    assert same(whole, models.load(tmp_path / "out.safetensors"), only_theirs=False)
    models.save(tmp_path / "ours.pt", build())
    with pytest.raises(SystemExit) as stop:
        models.main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "no.safetensors")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "autoencoder" in error and "\n" not in error


# ---------------------------------------------------------------- from a user's side
def test_stable_diffusion_is_fine_tuned_resumed_and_sampled(whole, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    flags = ["--init", "sd.ckpt", "--preset", "sd-v1", "--batch-size", "4", "--out", "run", "--device", "cpu",
             "--image-size", "64", "--workers", "0", "--val", "4", "--save-every", "1", "--align-blocks", "2"]
    monkeypatch.setattr(train.Trainer, "validate", lambda self: None)
    train.main([*flags, "--steps", "2"])
    tuned = models.load("run/checkpoint.pt")
    assert len(tuned.unet.query_head.blocks) == 2 and tuned.config.image_size == 64
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    assert any(not torch.equal(value, whole.state_dict()[name]) for name, value in before.items()
               if name.startswith("unet.down_blocks") and not models.is_new(name)), "nothing was trained"
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in before.items()
               if name.startswith(("autoencoder.", "text_encoder."))), "these stay as they came"
    train.main([*flags, "--steps", "2", "--resume"])
    capsys.readouterr()
    sample.main(["a dog on a beach", "--ckpt", "run/checkpoint.pt", "--steps", "2", "--sampler", "dpm++",
                 "--dtype", "bf16", "--best-of", "2", "--device", "cpu"])
    said = capsys.readouterr()
    assert "grammar" not in said.err, "it was trained on more than shapes"
    text = Image.open("sample.png").text
    digest = hashlib.sha256((tmp_path / "run/checkpoint.pt").read_bytes()).hexdigest()
    assert text["sampler"] == "dpm++" and text["checkpoint"] == digest[:10]


def test_weights_that_only_draw_are_not_asked_to_read(whole, tmp_path, capsys) -> None:
    torch.save(original_names(whole), tmp_path / "sd.ckpt")
    loaded = models.load(tmp_path / "sd.ckpt")
    assert loaded.config.image_size == 512 and loaded.tasks == ("generation",)
    for run in (lambda: sample.main(["a dog", "--ckpt", str(tmp_path / "sd.ckpt"), "--best-of", "2",
                                     "--device", "cpu", "--out", str(tmp_path / "x.png")]),
                lambda: evaluate.main(["retrieval", "--ckpt", str(tmp_path / "sd.ckpt"), "--device", "cpu"])):
        with pytest.raises(SystemExit) as stop:
            run()
        assert stop.value.code == 2 and "train.py --init" in capsys.readouterr().err


def test_the_sampler_that_is_asked_for_draws(whole) -> None:
    drawn = [draw_images(whole, ["a red circle"], [0], 4, size=(64, 64), sampler=sampler)
             for sampler in ("ddim", "ddim", "dpm++")]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3, "the argument changed nothing"
