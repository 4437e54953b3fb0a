"""A CLIP that transformers wrote gives the vectors that transformers gives, after tests/convert_clip.py, and
what would change results silently is refused."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, put_vocabulary, randomise

import model as models
from data import Shapes, Tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is the oracle: pip install -r tests/requirements.txt")
safetensors = pytest.importorskip("safetensors.torch")
from convert_clip import convert  # noqa: E402  (it imports transformers)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # noqa: E402

CAPTIONS = ["a red circle above a small blue square", "", "a dog", "green " * 40]      # the last is cut
TOWERS = ("vision_config", "text_config")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn((Shapes().captions(i)[0] for i in range(200)), 560, 16)


def put_clip(folder, tokenizer: Tokenizer, activation="quick_gelu", heads: int = 2, text_heads: int = 1):
    """The folder that transformers writes of a model with random weights -> that model."""
    common, end = dict(hidden_act=activation, projection_dim=24), tokenizer.vocab_size - 1
    theirs = randomise(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(common, vocab_size=end + 1, hidden_size=64, max_position_embeddings=16,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=text_heads,
                         bos_token_id=end - 1, eos_token_id=end, pad_token_id=0),
        vision_config=dict(common, hidden_size=96, intermediate_size=384, image_size=32, patch_size=8,
                           num_hidden_layers=2, num_attention_heads=heads), projection_dim=24))).eval()
    theirs.save_pretrained(folder)
    put_vocabulary(folder, tokenizer)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("activation, heads, text_heads", [("quick_gelu", 2, 1), ("quick_gelu", 12, 8),
                                                           ("gelu", 3, 4)])
def test_vectors_are_those_of_transformers(tokenizer, tmp_path, activation: str, heads: int,
                                           text_heads: int) -> None:
    """Of images and of texts of every length, padded our way here and OpenAI's way, with 0, there."""
    theirs = put_clip(tmp_path, tokenizer, activation, heads, text_heads)
    config = json.loads((tmp_path / "config.json").read_text())
    for tower, default in zip(TOWERS, (12, 8)):              # published files leave these out
        for name, value in (("num_attention_heads", default), ("hidden_act", "quick_gelu")):
            if config[tower].get(name) == value:
                del config[tower][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.save_file(theirs.state_dict() | {          # as old files have them
        "text_model.embeddings.position_ids": torch.arange(16)[None]}, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "clip.pt")
    ours = models.load(tmp_path / "clip.pt")
    assert not ours.training and ours.tasks == ("alignment",) and ours.data is None
    assert ours.tokenizer.merges == tokenizer.merges and ours.tokenizer.context_length == 16
    pixels, tokens = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8), ours.tokenizer(CAPTIONS)
    prepared = (pixels / 255 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    ends = tokens.argmax(dim=-1)
    assert len(set(ends.tolist())) == 4 and ends.max() == 15
    zeros = torch.where(torch.arange(16) > ends[:, None], 0, tokens)
    expected = theirs(input_ids=zeros, pixel_values=prepared.permute(0, 3, 1, 2))
    image, text = ours.encode_image(ours.read_batch(pixels)), ours.encode_tokens(tokens)
    for got, wanted in ((image, expected.image_embeds), (text, expected.text_embeds),
                        (ours.encode_text(CAPTIONS)[1], expected.text_embeds),
                        (ours.logit_scale.exp() * image @ text.T, expected.logits_per_image)):
        assert (got - wanted).abs().max() < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("file, changes, message", [
    ("config", {tower: {"hidden_act": "gelu_new"} for tower in TOWERS}, "'gelu_new'"),
    ("config", {"text_config": {"hidden_act": "gelu"}}, "hidden_act"),
    ("config", {tower: {"layer_norm_eps": 1e-6} for tower in TOWERS}, "layer_norm_eps.*1e-06"),
    ("config", {"text_config": {"num_attention_heads": 7}}, "multiples? of"),
    ("config", {"text_config": {"vocab_size": 559}}, "559 tokens.*vocab.json"),
    ("config", {"model_type": "siglip"}, "'siglip'"), ("config", {"text_config": [1]}, ""),
    ("preprocessor_config", {"image_mean": [0.5, 0.5, 0.5]}, r"image_mean \[0.5, 0.5, 0.5\]"),
    ("preprocessor_config", {"resample": 2}, "resample 2"),
    ("processor_config", {"image_processor": {"image_mean": [0.5, 0.5, 0.5]}}, "image_mean .*0.5"),
    ("preprocessor_config", {"do_normalize": False}, "do_normalize False"),
    ("preprocessor_config", {"crop_size": {"height": 32, "width": 64}}, "crop_size .*64"),
    ("preprocessor_config", {"size": {"shortest_edge": 48}}, "size .*48"),
    ("open_clip_config", {"preprocess_cfg": {"std": [0.5, 0.5, 0.5]}}, "std .*0.5"),
    ("open_clip_config", {"preprocess_cfg": {"resize_mode": "squash"}}, "resize_mode squash"),
    ("model", {"logit_scale": None}, "Missing.*logit_scale"),
    ("model", {"logit_bias": torch.zeros(1)}, "Unexpected.*logit_bias"),
    ("model", {"visual_projection.weight": torch.zeros(96, 24)}, r"visual_projection.weight.*\[96, 24\]")])
def test_what_would_change_results_is_refused(tokenizer, tmp_path, file: str, changes, message: str) -> None:
    tensors = put_clip(tmp_path, tokenizer).state_dict() | changes
    if file == "model":
        safetensors.save_file({name: value for name, value in tensors.items() if value is not None},
                              tmp_path / "model.safetensors")
    else:
        path = tmp_path / f"{file}.json"
        said = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(said | {
            name: said.get(name, {}) | value if isinstance(value, dict) else value
            for name, value in changes.items()}))
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{message}") as error:
        convert(tmp_path, tmp_path / "clip.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "clip.pt").exists()


def test_a_folder_of_transformers_is_converted_first(tokenizer, tmp_path) -> None:
    put_clip(tmp_path / "clip", tokenizer)
    with pytest.raises(FileNotFoundError, match="found: config.json.*unet/.*tests/convert_clip.py") as error:
        models.load(tmp_path / "clip")
    assert "\n" not in str(error.value)
    for folder, status in (("clip", 0), ("none", 2)):
        done = subprocess.run([sys.executable, ROOT / "tests/convert_clip.py", folder, f"{folder}.pt"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert isinstance(models.load(tmp_path / "clip.pt"), models.Clip)
