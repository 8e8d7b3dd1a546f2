"""The embedded video codec: a causal linear transform fitted to the dataset, so that nothing has to be downloaded.

Each group of four frames is cut into blocks of `4 x patch x patch` RGB pixels, and each block is projected on the
leading principal components of the dataset's own blocks. The basis is orthonormal, so a squared error in the latents
is a squared error in pixels, and the mean prediction of a model in this space is the mean prediction in pixels.

Frame 0 is encoded alone, as a group of four copies of itself. Latent frame 0 therefore means "the scene stands still
as in frame 0": it lies in the same space as all others, and repeating it is exactly "copy the first frame".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from configs.loader import UserError

from ..encoder_config import TEMPORAL_STRIDE
from .local_weights import load_reference

WEIGHTS = "codec.safetensors"

# A 64-clip batch at once was several times slower than small ones: the blocks fall out of the CPU's caches.
_ENCODE_BATCH = 4


class EmbeddedCodec:
    """Principal components of `4 x patch x patch x 3` pixel blocks; see the module docstring."""

    name = "embedded"
    temporal_stride = TEMPORAL_STRIDE

    def __init__(self, mean: Float[Tensor, "d"], basis: Float[Tensor, "d c"], scale: float, patch: int) -> None:
        self.mean = mean.float().contiguous()
        self.basis = basis.float().contiguous()
        self.scale = scale
        self.spatial_stride = patch
        self.latent_channels = basis.shape[1]

    @classmethod
    def fit(cls, clips: Iterable[UInt8[Tensor, "f h w 3"]], patch: int = 4, channels: int = 48) -> Self:
        """Fit on clips of `1 + 4 n` frames by streaming the blocks' covariance; the order of clips does not matter.

        One scale for all channels (not whitening) keeps the loss of a model on these latents a pixel loss.
        """
        size = TEMPORAL_STRIDE * patch * patch * 3
        if not 1 <= channels <= size:
            raise UserError(f"codec.channels={channels}: a block has {size} numbers; choose 1 to {size}.")
        total = torch.zeros(size, dtype=torch.float64)
        outer = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        for clip in clips:
            blocks = _to_blocks(clip[None], patch).reshape(-1, size)
            total += blocks.sum(0, dtype=torch.float64)
            outer += (blocks.T @ blocks).double()
            count += len(blocks)
        if count == 0:
            raise UserError("The embedded codec has no training clips to be fitted on; check the sources of the build.")
        mean = total / count
        covariance = outer / count - torch.outer(mean, mean)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        basis = eigenvectors[:, -channels:].flip(1)
        # An eigenvector's sign is arbitrary: fix it, so that the same data gives the same bytes.
        basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
        scale = float(eigenvalues[-channels:].clamp_min(0).mean().sqrt().clamp_min(1e-4))
        return cls(mean.float(), basis.float(), scale, patch)

    @property
    def weight_hash(self) -> str:
        digest = hashlib.sha256(f"{self.name} {self.spatial_stride} {self.scale!r}".encode())
        for tensor in (self.mean, self.basis):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        self.mean, self.basis = self.mean.to(device), self.basis.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c hl wl"]:
        return torch.cat([self._encode(part) for part in video.split(_ENCODE_BATCH)])

    def _encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c hl wl"]:
        blocks = _to_blocks(video, self.spatial_stride)
        coefficients = (blocks - self.mean) @ self.basis / self.scale
        return rearrange(coefficients, "b t h w c -> b t c h w")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c hl wl"]) -> UInt8[Tensor, "b f h w 3"]:
        coefficients = rearrange(latents.float(), "b t c h w -> b t h w c") * self.scale
        blocks = coefficients @ self.basis.T + self.mean
        patch = self.spatial_stride
        video = rearrange(
            blocks, "b t h w (s p q c) -> b (t s) (h p) (w q) c", s=TEMPORAL_STRIDE, p=patch, q=patch, c=3
        )
        # The first group is four copies of frame 0: their mean is the best estimate of it.
        video = torch.cat([video[:, :TEMPORAL_STRIDE].mean(1, keepdim=True), video[:, TEMPORAL_STRIDE:]], dim=1)
        return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Not `save_file`: of a full disk it raises an error of its own.
        (folder / WEIGHTS).write_bytes(save({"mean": self.mean.cpu(), "basis": self.basis.cpu()}))
        config = {"kind": self.name, "patch": self.spatial_stride, "scale": self.scale, "weight_hash": self.weight_hash}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = load_reference(folder, fields=("patch", "scale"))
        try:
            tensors = load_file(folder / WEIGHTS)
            codec = cls(tensors["mean"], tensors["basis"], config["scale"], config["patch"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{folder / WEIGHTS}: cannot be read ({error}); restore the file, or build the dataset again."
            ) from error
        if codec.weight_hash != config["weight_hash"]:
            raise UserError(
                f"{folder}: its weights do not match their hash; restore both files, or build the dataset again."
            )
        return codec


def _to_blocks(video: UInt8[Tensor, "b f h w 3"], patch: int) -> Float[Tensor, "b t hl wl d"]:
    """Pixels in [-1, 1], grouped in time as (frame 0 four times), (1-4), (5-8), … and cut into blocks."""
    _, frames, height, width, _ = video.shape
    if (frames - 1) % TEMPORAL_STRIDE:
        raise UserError(f"A clip of {frames} frames cannot be encoded: the codec takes 1, 5, 9, 13, … frames.")
    if height % patch or width % patch:
        raise UserError(f"Frames of {height}x{width} pixels cannot be cut into {patch}x{patch} blocks.")
    pixels = video.float() / 127.5 - 1
    pixels = torch.cat([pixels[:, :1].expand(-1, TEMPORAL_STRIDE, -1, -1, -1), pixels[:, 1:]], dim=1)
    return rearrange(pixels, "b (t s) (h p) (w q) c -> b t h w (s p q c)", s=TEMPORAL_STRIDE, p=patch, q=patch)
