"""A CLIP of a few thousand random weights, written by transformers itself."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, SIZE = 12, 32
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SIZES, "image_size": SIZE, "patch_size": 8, "projection_dim": WIDTH}


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Its image half, as `CLIPVisionModelWithProjection` saves it."""
    torch.manual_seed(seed)
    return _write(CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION)), folder)


def write_whole_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    text = {**_SIZES, "vocab_size": 20, "projection_dim": WIDTH}
    return _write(CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=WIDTH)), folder)


def _write(model: torch.nn.Module, folder: Path) -> Path:
    for parameter in model.parameters():  # larger than they are made, or it says nearly the same of every picture
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    model.save_pretrained(folder)
    return folder
