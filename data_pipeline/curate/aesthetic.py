"""A score of how pleasing a clip's pictures are, by CLIP and a linear head, both read from this machine.

Any CLIP in transformers' layout, and any head that is linear layers one after the other, such as those of
https://github.com/LAION-AI/aesthetic-predictor and https://github.com/christophschuhmann/improved-aesthetic-predictor
(saved as safetensors: pickled weights are never opened). The embedding also serves to find clips that mean the same.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.loader import StrictConfig, UserError

from ..encoders import find_model_folder
from ..one_thread import one_thread

# What every CLIP was trained with: https://github.com/openai/CLIP/blob/main/clip/clip.py
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SCORED_FRAMES = 3


class AestheticConfig(StrictConfig):
    """Where the weights are."""

    clip: Path = Field(description="folder of a CLIP model in transformers' layout, with safetensors weights")
    head: Path = Field(description="safetensors file of linear layers from its image embedding to one number")


@lru_cache(maxsize=1)
def open_scorer(config: AestheticConfig) -> "AestheticScorer":
    """Once per process."""
    return AestheticScorer(config)


class AestheticScorer:
    def __init__(self, config: AestheticConfig) -> None:
        from transformers import CLIPVisionModelWithProjection

        folder = find_model_folder(config.clip, "image_encoder")
        model: Any = CLIPVisionModelWithProjection
        self._clip = model.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._size: int = self._clip.config.image_size
        self._layers = _read_head(config.head, self._clip.config.projection_dim)

    @torch.inference_mode()
    def embed(self, video: UInt8[np.ndarray, "f h w 3"]) -> Float32[np.ndarray, "f d"]:
        """CLIP's embeddings of a few frames, of length 1."""
        chosen = np.linspace(0, len(video) - 1, min(SCORED_FRAMES, len(video))).round().astype(int)
        pictures = torch.stack([_prepare(frame, self._size) for frame in video[chosen]])
        with one_thread():  # the same score on every machine, and other workers have the other cores
            embeddings = self._clip(pixel_values=pictures).image_embeds
        return torch.nn.functional.normalize(embeddings, dim=-1).numpy()

    def score(self, video: UInt8[np.ndarray, "f h w 3"]) -> float:
        """Mean over a few frames, on the head's own scale (LAION's: 1 to 10)."""
        values = torch.from_numpy(self.embed(video))
        for weight, bias in self._layers:
            values = values @ weight.T + bias
        return float(values.mean())


def _prepare(frame: UInt8[np.ndarray, "h w 3"], size: int) -> Float[Tensor, "3 size size"]:
    """The largest centred square, scaled to what CLIP takes."""
    height, width = frame.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    small = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)
    values = (np.asarray(small, dtype=np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def _read_head(path: Path, width: int) -> list[tuple[Float[Tensor, "o i"], Float[Tensor, "o"]]]:
    """The layers by their numbers (`layers.2.weight`, `layers.2.bias`), or the only one (`weight`, `bias`)."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no safetensors file ({error}); save the aesthetic head as one.") from error
    names = sorted({name.rpartition(".")[0] for name in tensors}, key=_number)
    layers = []
    for name in names:
        prefix = f"{name}." if name else ""
        weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
        if weight is None or bias is None or weight.ndim != 2 or weight.shape[1] != width:
            raise UserError(f"{path}: its layer {name or '(the only one)'} is no linear layer of {width} numbers.")
        layers.append((weight.float(), bias.float()))
        width = weight.shape[0]
    if width != 1 or not layers:
        raise UserError(f"{path}: must lead to one number, not {width if layers else 'nothing'}.")
    return layers


def _number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else 0
