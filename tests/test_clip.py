"""Published CLIP weights: transformers' folders and OpenCLIP's files give the vectors that those programs
give, and what would change results silently is refused."""
import json

import pytest
import torch
from conftest import build, import_oracle, put_vocabulary, randomise, tiny_clip_config

import model as models
from data import Shapes, Tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is the oracle: pip install -r tests/requirements.txt")
safetensors = pytest.importorskip("safetensors.torch")
CAPTIONS = ["a red circle above a small blue square", "", "a dog", "green " * 40]      # the last is cut


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path / "hub")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn((Shapes().captions(i)[0] for i in range(200)), 560, 16)


def clip_of_transformers(vocab_size: int, activation: str = "quick_gelu", heads: int = 2, text_heads: int = 1,
                         width: int = 128, text_width: int = 64):
    """Random weights; by default heads are 64 wide, as all of OpenAI's are."""
    common = dict(hidden_act=activation, projection_dim=24)
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(common, vocab_size=vocab_size, hidden_size=text_width, max_position_embeddings=16,
                         intermediate_size=4 * text_width, num_hidden_layers=3,
                         num_attention_heads=text_heads,
                         bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=0),
        vision_config=dict(common, hidden_size=width, intermediate_size=4 * width, image_size=32,
                           patch_size=8, num_hidden_layers=2, num_attention_heads=heads),
        projection_dim=24))).eval()


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
                      text_heads=text_heads, width=12 * 8)
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


@pytest.mark.parametrize("towers, name, value, message", [
    ("both", "hidden_act", "gelu_new", "hidden_act 'gelu_new'"), ("text", "hidden_act", "gelu", "hidden_act"),
    ("both", "layer_norm_eps", 1e-6, "layer_norm_eps 1e-06"),
    ("both", "num_attention_heads", 7, "multiples of heads"),
    ("both", "num_attention_heads", "4", "TypeError"), ("both", "num_attention_heads", 0, "ZeroDivision"),
    ("text", "vocab_size", 559, "559 tokens.*vocab.json"), ("none", "model_type", "siglip", "'siglip'"),
    ("none", "text_config", [1], "TypeError")])
def test_configurations_that_would_change_results_are_refused(tokenizer, tmp_path, towers, name, value,
                                                              message) -> None:
    def change(config: dict) -> None:
        for part in {"both": ("vision_config", "text_config"), "text": ("text_config",), "none": ()}[towers]:
            config[part][name] = value
        if towers == "none":
            config[name] = value
    put_clip(tmp_path / "clip", tokenizer, change)
    with pytest.raises(ValueError, match=f"clip.*{message}"):
        models.load(tmp_path / "clip")
    with pytest.raises(ValueError, match="give the folder"):
        models.load(tmp_path / "clip/model.safetensors")


# ---------------------------------------------------------------- OpenCLIP
def openai_names(theirs) -> dict[str, torch.Tensor]:
    """A transformers CLIP's tensors as OpenAI's and OpenCLIP's programs name them, written out one by one."""
    state, found = theirs.state_dict(), {}
    for tower, prefix, layers in (("vision_model", "visual.", 2), ("text_model", "", 3)):
        for i in range(layers):
            layer, block = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                found[f"{block}attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"])
                for name, new in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                                  ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")):
                    found[f"{block}{name}.{kind}"] = state[f"{layer}{new}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    image, text = "vision_model.embeddings.", "text_model.embeddings."
    return found | {
        "visual.conv1.weight": state[image + "patch_embedding.weight"],
        "visual.class_embedding": state[image + "class_embedding"],
        "visual.positional_embedding": state[image + "position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "positional_embedding": state[text + "position_embedding.weight"],
        "token_embedding.weight": state[text + "token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"]}


def open_clip_config(vocab_size: int, **changes) -> dict:
    return {"model_cfg": {
        "embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": vocab_size, "width": 64, "heads": 4, "layers": 3},
        **changes}, "preprocess_cfg": {"mean": list(models.CLIP_MEAN), "std": list(models.CLIP_STD)}}


def put_open_clip(folder, tokenizer: Tokenizer, tensors: dict, config: dict | None = None,
                  name: str = "open_clip_pytorch_model.bin"):
    put_vocabulary(folder, tokenizer)
    if config:
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    write = torch.save if not name.endswith(".safetensors") else safetensors.save_file
    write(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["open_clip.bin", "open_clip.safetensors", "epoch_32.pt", "half.bin"])
@pytest.mark.parametrize("quick", [True, False, None])
def test_files_of_open_clip(tokenizer, tmp_path, capsys, name: str, quick: bool | None) -> None:
    theirs = clip_of_transformers(tokenizer.vocab_size, "quick_gelu" if quick else "gelu", text_heads=4)
    config = open_clip_config(tokenizer.vocab_size, **({} if quick is None else {"quick_gelu": quick}))
    if name == "half.bin":
        theirs = theirs.half().float()
    tensors = openai_names(theirs)
    if name == "half.bin":
        tensors = {key: value.half() for key, value in tensors.items()}
    if name == "epoch_32.pt":
        tensors = {"epoch": 32, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}
    file = put_open_clip(tmp_path / "oc", tokenizer, tensors, config, name)
    check_same(models.load(file), theirs, tokenizer)
    assert f"loaded {len(theirs.state_dict())} tensors" in capsys.readouterr().out


def test_heads_of_another_width_in_open_clip(tokenizer, tmp_path) -> None:
    """As in ViT-H/14: vision_cfg.head_width; and text_cfg.heads, which is 8 where it is absent."""
    theirs = clip_of_transformers(tokenizer.vocab_size, "gelu", heads=4, text_heads=8)
    config = open_clip_config(tokenizer.vocab_size)
    config["model_cfg"]["vision_cfg"]["head_width"] = 32
    del config["model_cfg"]["text_cfg"]["heads"]
    file = put_open_clip(tmp_path / "oc", tokenizer, openai_names(theirs), config)
    check_same(models.load(file), theirs, tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_itself_computes_the_same(tokenizer, tmp_path, quick: bool) -> None:
    open_clip = import_oracle("open_clip")
    config = open_clip_config(tokenizer.vocab_size, quick_gelu=quick)
    theirs = randomise(open_clip.CLIP(**config["model_cfg"])).eval()
    file = put_open_clip(tmp_path / "oc", tokenizer, theirs.state_dict(), config)
    images, tokens = torch.randn(3, 3, 32, 32), tokenizer(CAPTIONS)
    ours = models.load(file)
    assert (ours.encode_image(images) - theirs.encode_image(images, normalize=True)).abs().max() < 1e-5
    assert (ours.encode_tokens(tokens) - theirs.encode_text(tokens, normalize=True)).abs().max() < 1e-5


def test_the_activation_is_never_guessed(tokenizer, tmp_path) -> None:
    tensors = openai_names(clip_of_transformers(tokenizer.vocab_size))
    file = put_open_clip(tmp_path / "oc", tokenizer, tensors)
    with pytest.raises(FileNotFoundError, match="quick GELU or GELU.*open_clip_config.json beside it"):
        models.load(file)
    # A file of one model's description without the hub's frame would otherwise mean GELU.
    (tmp_path / "oc/open_clip_config.json").write_text(json.dumps(open_clip_config(560)["model_cfg"]))
    with pytest.raises(ValueError, match="KeyError: 'model_cfg'"):
        models.load(file)


@pytest.mark.parametrize("part, changes, message", [
    ("vision_cfg", {"pool_type": "avg"}, "has pool_type: expected"),
    ("text_cfg", {"no_causal_mask": True}, "has no_causal_mask: expected"),
    ("vision_cfg", {"head_width": 0}, "ZeroDivision"), ("text_cfg", {"heads": 5}, "multiples of heads"),
    ("preprocess_cfg", {"mean": [0.5, 0.5, 0.5]}, r"has mean \[0.5, 0.5, 0.5\]")])
def test_open_clips_that_compute_otherwise_are_refused(tokenizer, tmp_path, part, changes, message) -> None:
    config = open_clip_config(tokenizer.vocab_size)
    {**config, **config["model_cfg"]}[part].update(changes)
    tensors = openai_names(clip_of_transformers(tokenizer.vocab_size))
    file = put_open_clip(tmp_path / "oc", tokenizer, tensors, config)
    with pytest.raises(ValueError, match=message):
        models.load(file)


@pytest.mark.parametrize("name, value, message", [
    ("ln_final.bias", None, "lacks text_model.final_layer_norm.bias"),
    ("logit_scale", None, "lacks logit_scale"), ("logit_bias", torch.zeros(1), "unknown logit_bias"),
    ("visual.attnpool.q.bias", torch.zeros(1), "unknown vision_model.attnpool.q.bias"),
    ("visual.positional_embedding", torch.zeros(19, 128), r"position_embedding.weight.*\[19, 128\]"),
    ("visual.proj", torch.zeros(24, 128), r"visual_projection.weight.*\[128, 24\]"),
    ("transformer.resblocks.1.attn.in_proj_bias", torch.zeros(4), r"_proj.bias.*\[2\]")])
def test_what_does_not_fit_is_named(tokenizer, tmp_path, name: str, value, message: str) -> None:
    tensors = openai_names(clip_of_transformers(tokenizer.vocab_size)) | {name: value}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    file = put_open_clip(tmp_path / "oc", tokenizer, tensors, open_clip_config(tokenizer.vocab_size))
    with pytest.raises(ValueError, match=message):
        models.load(file)
