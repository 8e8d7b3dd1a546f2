"""A score of how pleasing a clip's pictures are, by CLIP and a linear head, both read from this machine.

Any CLIP in transformers' layout, and any head that is linear layers one after the other, such as those of
https://github.com/LAION-AI/aesthetic-predictor and https://github.com/christophschuhmann/improved-aesthetic-predictor
(saved as safetensors: pickled weights are never opened).
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from pydantic import Field
from safetensors import SafetensorError

from configs.loader import StrictConfig, UserError

from ..encoder_config import CLIP_FOLDER

SCORED_FRAMES = 3


class AestheticConfig(StrictConfig):
    """Where the weights are."""

    clip: Path = Field(description=CLIP_FOLDER)
    head: Path = Field(description="safetensors file of linear layers from its image embedding to one number")


@lru_cache(maxsize=1)
def open_scorer(config: AestheticConfig) -> "AestheticScorer":
    """Once per process."""
    return AestheticScorer(config)


class AestheticScorer:
    def __init__(self, config: AestheticConfig) -> None:
        from .clip_embedding import ClipEmbedder  # seconds to import, and few want this score

        self._clip = ClipEmbedder(config.clip)
        self._layers = _read_head(config.head, self._clip.width)

    def score(self, video: UInt8[np.ndarray, "f h w 3"]) -> float:
        """Mean over a few frames, on the head's own scale (LAION's: 1 to 10)."""
        values = self._clip.embed(video, SCORED_FRAMES)
        for weight, bias in self._layers:
            values = values @ weight.T + bias
        return float(values.mean())


def _read_head(path: Path, width: int) -> list[tuple[Float32[np.ndarray, "o i"], Float32[np.ndarray, "o"]]]:
    """The layers by their numbers (`layers.2.weight`, `layers.2.bias`), or the only one (`weight`, `bias`)."""
    from safetensors.torch import load_file  # numpy has no bfloat16

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
        layers.append((weight.float().numpy(), bias.float().numpy()))
        width = weight.shape[0]
    if width != 1 or not layers:
        raise UserError(f"{path}: must lead to one number, not {width if layers else 'nothing'}.")
    return layers


def _number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else 0
