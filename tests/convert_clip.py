"""A CLIP as transformers keeps it -> a checkpoint of ours, for evaluate.py.

    python tests/convert_clip.py FOLDER clip.pt

FOLDER holds config.json, model.safetensors, a vocabulary and, where they were published, how its pictures are
prepared (preprocessor_config.json, open_clip_config.json). OpenCLIP's models come in this form, too."""
import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (which puts the project on the import path)
import torch
from transformers import CLIPConfig

import model as models
from data import Tokenizer
from sample import errors_in_one_line


def convert(folder: Path, out: Path) -> None:
    """Raises ValueError, in one line, on whatever our two towers would not obey."""
    with models.reading(folder):
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: expected a folder of transformers")
        names = ("config", "preprocessor_config", "processor_config", "open_clip_config")
        files = [folder / f"{name}.json" for name in names]
        said, pixels, processor, openclip = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {} for path in files)
        pixels |= processor.get("image_processor") or {}
        theirs = CLIPConfig.from_pretrained(folder, local_files_only=True)     # knows what an absence means
        vision, text = theirs.vision_config, theirs.text_config
        kinds = {(said.get("model_type"), tower.hidden_act, tower.layer_norm_eps) for tower in (vision, text)}
        if kinds not in ({("clip", "quick_gelu", 1e-5)}, {("clip", "gelu", 1e-5)}):
            raise ValueError(f"{folder} has (model_type, hidden_act, layer_norm_eps) {kinds}, expected both "
                             "towers to be ('clip', 'quick_gelu' or 'gelu', 1e-05)")
        wanted = {**dict.fromkeys(("image_mean", "mean"), [*models.CLIP_MEAN]),
                  **dict.fromkeys(("image_std", "std"), [*models.CLIP_STD]),
                  **dict.fromkeys(("size", "crop_size"), vision.image_size), "rescale_factor": 1 / 255,
                  **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
                  "resample": 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        for name, value in (pixels | (openclip.get("preprocess_cfg") or {})).items():
            sides = name == "crop_size" or "shortest_edge" in str(value)     # height and width would squeeze
            given = list(value.values()) if isinstance(value, dict) and sides else [value]
            given = value if isinstance(value, list) and "size" in name else given
            if any(side not in (wanted.get(name, side), None) for side in given):
                raise ValueError(f"{folder} prepares pictures with {name} {value}, expected {wanted[name]}")
        config = models.ClipConfig(
            vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.patch_size,
            vision.image_size, theirs.projection_dim,
            models.TextConfig(text.vocab_size, text.max_position_embeddings, text.hidden_size,
                              text.num_hidden_layers, text.num_attention_heads), vision.hidden_act)
        tokenizer = Tokenizer.from_file(folder, config.text.context_length)
        if tokenizer.vocab_size != config.text.vocab_size:
            raise ValueError(f"{folder}: its text tower knows {config.text.vocab_size} tokens, vocab.json "
                             f"has {tokenizer.vocab_size}")
        with torch.device("meta"):
            model = models.Clip(config, tokenizer)
        tensors = models.read_file(folder / "model.safetensors")[0]
        model.load_state_dict({name: value for name, value in tensors.items()        # old files hold these
                               if not name.endswith(".position_ids")}, assign=True)
    models.save(out, model)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with errors_in_one_line():
        convert(*map(Path, sys.argv[1:]))
