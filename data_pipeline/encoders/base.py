"""What a frozen encoder promises: the two protocols that every stage after `build` relies on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class PixelCodec(Protocol):
    """What a model needs of a codec: pixels to latents and back, on the device that it was moved to."""

    @property
    def spatial_stride(self) -> int: ...

    def to(self, device: torch.device | str) -> Self: ...

    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c hl wl"]: ...

    def decode(self, latents: Float[Tensor, "b t c hl wl"]) -> UInt8[Tensor, "b f h w 3"]: ...


class VideoCodec(PixelCodec, Protocol):
    """A frozen, causal video autoencoder. Latents are normalised: about zero mean and unit scale."""

    @property
    def name(self) -> str: ...

    @property
    def weight_hash(self) -> str: ...

    @property
    def temporal_stride(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...


class TextEncoder(Protocol):
    """A frozen text encoder. Rows are the true tokens only: whoever batches them pads with zeros (Wan's convention)."""

    @property
    def name(self) -> str: ...

    @property
    def weight_hash(self) -> str: ...

    @property
    def width(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[Float[Tensor, "l d"]]: ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...
