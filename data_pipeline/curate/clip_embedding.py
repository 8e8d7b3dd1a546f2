"""CLIP's embeddings of a video's frames, for a score of how it looks and to find clips that mean the same.

Any CLIP in transformers' layout, whole or its image half alone, from a folder on this machine.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from configs.loader import UserError

from ..encoders import find_model_folder
from ..encoders.local_weights import CONFIG_NAME, hash_files, load_pretrained, read_json
from ..one_thread import one_thread

# What every CLIP was trained with: https://github.com/openai/CLIP/blob/main/clip/clip.py
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

EXAMPLE = "openai/clip-vit-large-patch14"

MODEL_TYPES = ("clip", "clip_vision_model")


class ClipEmbedder:
    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPVisionModelWithProjection  # seconds to import

        self.folder = _find_clip(folder)
        self._device = device
        self._model = load_pretrained(CLIPVisionModelWithProjection, self.folder, torch.float32).to(device)
        self._size: int = self._model.config.image_size
        self.width: int = self._model.config.projection_dim

    @torch.inference_mode()
    def embed(self, video: UInt8[np.ndarray, "f h w 3"], max_frames: int) -> Float32[np.ndarray, "n d"]:
        """Of at most so many frames, evenly spaced from the first to the last; each of length 1."""
        chosen = np.linspace(0, len(video) - 1, min(max_frames, len(video))).round().astype(int)
        pictures = torch.stack([_prepare(frame, self._size) for frame in video[chosen]]).to(self._device)
        with one_thread():  # the same numbers on every machine, and other workers have the other cores
            embeddings = self._model(pixel_values=pictures).image_embeds
            units = torch.nn.functional.normalize(embeddings, dim=-1).cpu()
        if not bool(units.isfinite().all()):
            raise UserError(f"{self.folder}: its embeddings are no finite numbers; download the weights again.")
        return units.numpy()


def hash_clip(folder: Path) -> str:
    """Of all that its embeddings follow from. Reads all of the weights."""
    found = _find_clip(folder)
    return hash_files([found / CONFIG_NAME, *found.glob("*.safetensors")])


def _find_clip(folder: Path) -> Path:
    found = find_model_folder(folder, "image_encoder", EXAMPLE)
    model_type = read_json(found / CONFIG_NAME).get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{found} holds a {model_type} model, not a CLIP: choose one such as {EXAMPLE}.")
    return found


def _prepare(frame: UInt8[np.ndarray, "h w 3"], size: int) -> Float[Tensor, "3 size size"]:
    """The largest centred square, scaled to what CLIP takes."""
    height, width = frame.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    small = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)
    values = (np.asarray(small, dtype=np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
