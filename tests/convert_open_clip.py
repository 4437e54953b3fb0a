"""OpenCLIP's weights -> the folder of a transformers CLIP (config.json, model.safetensors), for evaluate.py.

    python tests/convert_open_clip.py open_clip_pytorch_model.bin FOLDER

The model's own open_clip_config.json must lie beside the file: weights do not tell their activation.
"""
import json
import re
import sys
from pathlib import Path

import conftest  # noqa: F401  (which puts the project on the import path)
import safetensors.torch

from model import CLIP_FIELDS, CLIP_MEAN, CLIP_STD, read_file

# OpenCLIP's names of CLIP_FIELDS, in their order, and what an absent one means.
FIELDS = {"vision_cfg": {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16, "image_size": 224},
          "text_cfg": {"vocab_size": 49408, "context_length": 77, "width": 512, "layers": 12, "heads": 8}}
RULES = {r"^module\.": "",                                   # of a training checkpoint
         r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight",
         r"^visual\.": "vision_model.", r"^(?=transformer|positional|token_emb|ln_final)": "text_model.",
         "conv1": "embeddings.patch_embedding", "(token|class)_embedding": r"embeddings.\1_embedding",
         "positional_embedding": "embeddings.position_embedding.weight",
         "transformer.resblocks": "encoder.layers", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm",
         "ln_final": "final_layer_norm", "ln_([12])": r"layer_norm\1", r"\.attn\.": ".self_attn.",
         "c_fc": "fc1", "c_proj": "fc2"}


def convert(file: Path, folder: Path) -> None:
    """Raises ValueError on a configuration that OpenAI's two towers would not obey."""
    said = json.loads((file.parent / "open_clip_config.json").read_text(encoding="utf-8"))
    model, pixels = said["model_cfg"], said.get("preprocess_cfg", {})
    towers = [defaults | model[name] for name, defaults in FIELDS.items()]
    known = {"embed_dim", "quick_gelu", "mlp_ratio", "patch_dropout"}.union(FIELDS, *FIELDS.values())
    strange = [name for name in (*model, *towers[0], *towers[1]) if name not in known]
    strange += [f"{name} {pixels[name]}" for name, value in {"mean": CLIP_MEAN, "std": CLIP_STD}.items()
                if pixels.get(name, [*value]) != [*value]]
    if strange:
        raise ValueError(f"{file} is of another make than OpenAI's: {', '.join(strange)}")
    towers[0]["head_width"] = towers[0]["width"] // towers[0]["head_width"]      # from here on: heads
    config, tensors = {"model_type": "clip", "projection_dim": model["embed_dim"]}, {}
    for (name, fields), tower in zip(CLIP_FIELDS.items(), towers):      # both in the order of FIELDS
        config[name] = dict(zip(fields, tower.values()), intermediate_size=4 * tower["width"],
                            hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu")
    for name, value in read_file(file)[0].items():
        for pattern, spelling in RULES.items():
            name = re.sub(pattern, spelling, name)
        if "in_proj_" in name:
            for part, third in zip("qkv", value.tensor_split(3)):
                tensors[name.replace("in_proj_", f"{part}_proj.")] = third.clone()
        else:
            tensors[name] = value.T.contiguous() if "_projection." in name else value
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
