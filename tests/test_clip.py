"""Published CLIP weights: transformers' folders, and those that OpenCLIP's files are converted to, give the
vectors that those programs give, and what would change results silently is refused."""
import json

import pytest
import torch
from conftest import build, import_oracle, put_vocabulary, randomise, tiny_clip_config
from convert_open_clip import convert

import model as models
from data import Shapes, Tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is the oracle: pip install -r tests/requirements.txt")
safetensors = pytest.importorskip("safetensors.torch")
CAPTIONS = ["a red circle above a small blue square", "", "a dog", "green " * 40]      # the last is cut


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn((Shapes().captions(i)[0] for i in range(200)), 560, 16)


def clip_of_transformers(vocab_size: int, activation="quick_gelu", heads: int = 2, text_heads: int = 1):
    """Random weights."""
    common, end = dict(hidden_act=activation, projection_dim=24), vocab_size - 1
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(common, vocab_size=vocab_size, hidden_size=64, max_position_embeddings=16,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=text_heads,
                         bos_token_id=end - 1, eos_token_id=end, pad_token_id=0),
        vision_config=dict(common, hidden_size=96, intermediate_size=384, image_size=32, patch_size=8,
                           num_hidden_layers=2, num_attention_heads=heads), projection_dim=24))).eval()


@torch.no_grad()
def check_same(ours: models.Clip, theirs, tokenizer: Tokenizer) -> None:
    """Vectors of images and of texts of every length, padded our way here and OpenAI's way, with 0, there."""
    assert not ours.training and ours.tasks == ("alignment",) and ours.data is None
    assert ours.tokenizer.merges == tokenizer.merges and ours.tokenizer.context_length == 16
    images, tokens = torch.randn(3, 3, 32, 32), ours.tokenizer(CAPTIONS)
    ends = tokens.argmax(dim=-1)
    assert len(set(ends.tolist())) == 4 and ends.max() == 15
    zeros = torch.where(torch.arange(16) > ends[:, None], 0, tokens)
    expected = theirs(input_ids=zeros, pixel_values=images)
    assert (ours.encode_image(images) - expected.image_embeds).abs().max() < 1e-5
    assert (ours.encode_tokens(tokens) - expected.text_embeds).abs().max() < 1e-5
    assert (ours.encode_text(CAPTIONS)[1] - expected.text_embeds).abs().max() < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_pixels_come_with_the_mean_and_deviation_of_clips_training() -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = (pixels / 255 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    read = build(tiny_clip_config()).read_batch(pixels)
    assert torch.allclose(read, expected.permute(0, 3, 1, 2), atol=1e-5)


# ---------------------------------------------------------------- transformers
def put_clip(folder, tokenizer: Tokenizer, change=lambda config: None, **kinds):
    """A folder that transformers writes, its configuration changed in place -> the model in it."""
    theirs = clip_of_transformers(tokenizer.vocab_size, **kinds)
    theirs.save_pretrained(folder)
    put_vocabulary(folder, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("heads, text_heads", [(2, 1), (12, 8), (3, 4)])
def test_folders_of_transformers(tokenizer, tmp_path, capsys, activation: str, heads: int,
                                 text_heads: int) -> None:
    def leave_defaults_out(config: dict) -> None:
        for tower, default in (("vision_config", 12), ("text_config", 8)):
            for name, value in (("num_attention_heads", default), ("hidden_act", "quick_gelu")):
                if config[tower].get(name) == value:
                    del config[tower][name]
    theirs = put_clip(tmp_path / "clip", tokenizer, leave_defaults_out, activation=activation, heads=heads,
                      text_heads=text_heads)
    ours = models.load(tmp_path / "clip")
    check_same(ours, theirs, tokenizer)
    assert ours.config.heads == heads and ours.config.text.heads == text_heads
    assert f"loaded {len(theirs.state_dict())} tensors" in capsys.readouterr().out


def test_older_folders_of_transformers(tokenizer, tmp_path, capsys) -> None:
    """Position ids are among the tensors, and the configuration writes each tower twice."""
    def twice(config: dict) -> None:
        config["vision_config_dict"] = {"num_attention_heads": config["vision_config"]["num_attention_heads"]}
        config["vision_config"]["num_attention_heads"], config["text_config_dict"] = 2, None
    theirs = put_clip(tmp_path / "clip", tokenizer, twice, heads=4)
    safetensors.save_file(theirs.state_dict() | {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / "clip/model.safetensors")
    check_same(models.load(tmp_path / "clip"), theirs, tokenizer)
    said = capsys.readouterr().out
    assert "ignored: 2" in said and "position_ids" in said


@pytest.mark.parametrize("changes, message", [
    ({tower: {"hidden_act": "gelu_new"} for tower in models.CLIP_FIELDS}, "'gelu_new'"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act"),
    ({tower: {"layer_norm_eps": 1e-6} for tower in models.CLIP_FIELDS}, "layer_norm_eps.*1e-06"),
    ({"text_config": {"num_attention_heads": 7}}, "multiples of heads"),
    ({"text_config": {"num_attention_heads": "4"}}, "TypeError"),
    ({"text_config": {"num_attention_heads": 0}}, "ZeroDivision"),
    ({"text_config": {"vocab_size": 559}}, "559 tokens.*vocab.json"),
    ({"model_type": "siglip"}, "'siglip'"), ({"text_config": [1]}, "TypeError")])
def test_configurations_that_would_change_results_are_refused(tokenizer, tmp_path, changes, message) -> None:
    put_clip(tmp_path / "clip", tokenizer, lambda config: config.update({
        name: config[name] | value if isinstance(value, dict) else value for name, value in changes.items()}))
    with pytest.raises(ValueError, match=f"clip.*{message}"):
        models.load(tmp_path / "clip")


@pytest.mark.parametrize("name, value, message", [
    ("logit_scale", None, "lacks logit_scale"), ("logit_bias", torch.zeros(1), "unknown logit_bias"),
    ("visual_projection.weight", torch.zeros(96, 24), r"visual_projection.weight.*\[96, 24\]")])
def test_what_does_not_fit_is_named(tokenizer, tmp_path, name: str, value, message: str) -> None:
    tensors = put_clip(tmp_path / "clip", tokenizer).state_dict() | {name: value}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    safetensors.save_file(tensors, tmp_path / "clip/model.safetensors")
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "clip")


# ---------------------------------------------------------------- OpenCLIP
def put_open_clip(folder, tokenizer: Tokenizer, said: dict, **vision):
    """What OpenCLIP's model of this configuration is, and its open_clip_config.json with `said` beside."""
    config = {"embed_dim": 24, "vision_cfg": dict(image_size=32, layers=2, width=128, patch_size=8, **vision),
              "text_cfg": dict(context_length=16, vocab_size=tokenizer.vocab_size, width=64, layers=3)}
    config |= {name: value for name, value in said.items() if name == "quick_gelu"}
    theirs = randomise(import_oracle("open_clip").CLIP(**config)).eval()
    for part in ("vision_cfg", "text_cfg"):
        config[part] |= said.get(part, {})
    put_vocabulary(folder, tokenizer)
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": said.get("preprocess_cfg", {"mean": models.CLIP_MEAN})}))
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("name, said, vision", [
    ("open_clip.bin", {}, {}), ("open_clip.safetensors", {"quick_gelu": True}, {}),
    ("epoch_32.pt", {"quick_gelu": False}, {}), ("half.bin", {}, {"head_width": 32})])     # as in ViT-H/14
def test_files_of_open_clip(tokenizer, tmp_path, name: str, said: dict, vision: dict) -> None:
    theirs = put_open_clip(tmp_path, tokenizer, said, **vision)
    tensors = theirs.state_dict()
    if name == "half.bin":
        tensors = {key: value.half() for key, value in tensors.items()}
        theirs.load_state_dict(tensors)
    if name == "epoch_32.pt":
        tensors = {"epoch": 32, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}
    write = safetensors.save_file if name.endswith(".safetensors") else torch.save
    write(tensors, tmp_path / name)
    with pytest.raises(ValueError, match="tests/convert_open_clip.py"):
        models.load(tmp_path / name)
    convert(tmp_path / name, tmp_path / "clip")
    ours, outside = models.load(tmp_path / "clip"), transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    images, tokens = torch.randn(3, 3, 32, 32), tokenizer(CAPTIONS)
    assert (ours.encode_image(images) - theirs.encode_image(images, normalize=True)).abs().max() < 1e-5
    assert (ours.encode_tokens(tokens) - theirs.encode_text(tokens, normalize=True)).abs().max() < 1e-5
    outside = outside.float().eval()(tokens, images)
    assert (ours.encode_image(images) - outside.image_embeds).abs().max() < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("said, message", [
    ({"vision_cfg": {"pool_type": "avg"}}, "make.*pool_type"),
    ({"text_cfg": {"no_causal_mask": True}}, "make.*no_causal_mask"),
    ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, r"make.*mean \[0.5, 0.5, 0.5\]"),
    ({"text_cfg": {"heads": 5}}, "multiples of heads"), (None, "open_clip_config.json")])
def test_open_clips_that_compute_otherwise_are_refused(tokenizer, tmp_path, said, message) -> None:
    theirs = put_open_clip(tmp_path, tokenizer, said or {})
    torch.save(theirs.state_dict(), tmp_path / "oc.bin")
    if said is None:                         # whose activation cannot be known
        (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(tmp_path / "oc.bin", tmp_path / "clip")
        models.load(tmp_path / "clip")
