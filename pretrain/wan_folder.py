"""Folders of Wan transformers: read into our video expert strictly, and written so that diffusers opens them.

    config.json                                     sizes, named as in `VideoDiTConfig`
    diffusion_pytorch_model.safetensors             or in shards, see `pretrain.weights`

Read are folders that diffusers saved (or a whole pipeline, whose `transformer/` is taken) and those of Wan's own
release, whose tensors have other names. Source of the renames: diffusers' `convert_wan_to_diffusers.py` (Apache-2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.loader import UserError

from .models.video_dit import VideoDiT, VideoDiTConfig
from .weights import WeightFiles, misfit

CONFIG_JSON, STEM, TRANSFORMER = "config.json", "diffusion_pytorch_model", "transformer"

ORIGINAL_SIZES = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
"""config.json of Wan's own release -> `VideoDiTConfig`; the rest follows (`dim`) or has one value for all models."""

ORIGINAL_NAMES = (
    # norm2 and norm3 swap: in the release norm3 is the one before the cross-attention, the only one with weights.
    (r"\.norm3\.", ".norm2."),
    (r"\.(self_attn|cross_attn)\.([qkv])\.", r".\1.to_\2."),
    (r"\.(self_attn|cross_attn)\.o\.", r".\1.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"^head\.scale_shift_table$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
)
"""Tensors of Wan's own release -> diffusers' names, applied one after the other."""

IMAGE_ENCODER = re.compile(r"img_emb\.|image_embedder\.|k_img|add_k_proj")
"""Tensors of the CLIP image encoder that Wan 2.1's image-to-video models look through."""


def wan_weights(video: VideoDiT, folder: Path) -> WeightFiles:
    """A Wan checkpoint's tensors under the video expert's names; a `UserError` tells what does not fit it."""
    folder = _transformer_folder(folder)
    files = WeightFiles(folder, STEM)
    if any(IMAGE_ENCODER.search(name) for name in files.shapes):
        raise UserError(
            f"{folder}: this checkpoint looks at its first frame through a CLIP image encoder too, which is not "
            "supported; Wan 2.2's image-to-video models have none, start from one of those."
        )
    _check_sizes(folder, video.config)
    if any(".self_attn." in name for name in files.shapes):
        files = files.renamed(from_original)
    problem = misfit(video, files)
    if problem:
        raise UserError(f"{folder}: does not fit model.video: {problem}; give the folder of that very model.")
    return files


def write_wan_config(folder: Path, config: VideoDiTConfig) -> None:
    """config.json as `WanTransformer3DModel.from_pretrained` reads it."""
    sizes = {"_class_name": "WanTransformer3DModel", **config.model_dump(mode="json")}
    (folder / CONFIG_JSON).write_text(json.dumps(sizes, indent=2) + "\n")


def from_original(name: str) -> str:
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _transformer_folder(folder: Path) -> Path:
    for found in (folder / TRANSFORMER, folder):
        if (found / CONFIG_JSON).is_file():
            return found
    raise UserError(f"{folder}: holds no {CONFIG_JSON}; give the folder of a Wan transformer, or of a whole pipeline.")


def _check_sizes(folder: Path, config: VideoDiTConfig) -> None:
    path = folder / CONFIG_JSON
    try:
        given = json.loads(path.read_text())
        sizes = _sizes(given)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError):
        raise UserError(f"{path}: is not the config of a Wan transformer; copy the folder again.") from None
    configured = config.model_dump(mode="json")
    for name, value in sizes.items():
        if name in configured and configured[name] != value:
            raise UserError(
                f"model.video.{name}={configured[name]}, but {path} says {value}; set it to {value}, or give the "
                "folder of another checkpoint."
            )
        if name not in configured and value is not None:
            raise UserError(f"{path}: sets {name} to {value!r}, which is not supported; give a plain Wan transformer.")


def _sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's sizes under the names of `VideoDiTConfig`; what is not known is kept under its own."""
    if "num_heads" not in given:
        return {name: value for name, value in given.items() if not name.startswith("_")}
    sizes = {ours: given[name] for name, ours in ORIGINAL_SIZES.items() if name in given}
    return {**sizes, "attention_head_dim": given["dim"] // given["num_heads"]}
