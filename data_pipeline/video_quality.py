"""How close two videos are, over all pixels and over those that move: a still background flatters every model."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, UInt8

MOVING_THRESHOLD = 0.12
"""A pixel moves where any of its colours differs from the clip's first frame by more than this, in [-1, 1]."""

PERFECT_PSNR = 99.0
"""What is reported for an exact copy, whose PSNR is infinite."""


def moving_pixels(video: UInt8[np.ndarray, "*b f h w 3"]) -> Bool[np.ndarray, "*b f h w"]:
    first = video[..., :1, :, :, :]
    moves = np.maximum(video, first) - np.minimum(video, first) > int(MOVING_THRESHOLD * 127.5)  # whole levels
    return moves[..., 0] | moves[..., 1] | moves[..., 2]  # ten times faster than any(axis=-1)


class PixelError:
    """Squared errors of 8-bit video, pooled over everything added: PSNR of the pool, not the mean of PSNRs."""

    def __init__(self) -> None:
        self.squares = self.moving_squares = 0.0
        self.count = self.moving_count = 0

    def add(
        self,
        predicted: UInt8[np.ndarray, "*b f h w 3"],
        true: UInt8[np.ndarray, "*b f h w 3"],
        moves: Bool[np.ndarray, "*b f h w"],
    ) -> None:
        squares = (predicted.astype(np.float64) - true) ** 2
        self.squares += float(squares.sum())
        self.count += squares.size
        self.moving_squares += float(squares[moves].sum())
        self.moving_count += squares[moves].size

    @property
    def psnr(self) -> float:
        """dB over all pixels."""
        return _decibel(self.squares, self.count)

    @property
    def psnr_moving(self) -> float | None:
        """dB over moving pixels; None where nothing moved."""
        return _decibel(self.moving_squares, self.moving_count) if self.moving_count else None


def _decibel(squares: float, count: int) -> float:
    if count == 0:
        raise ValueError("no video was added, so there is no error to report")
    mean = squares / count
    return PERFECT_PSNR if mean == 0 else round(min(PERFECT_PSNR, 10 * math.log10(255.0**2 / mean)), 3)
