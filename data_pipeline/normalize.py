"""Streaming statistics of vectors, and the affine maps made from them.

`Normalizer` works per dimension on numpy arrays and torch tensors alike and is exactly invertible: nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import PositiveInt, model_validator

from configs.loader import StrictConfig

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")

NormalizationMode = Literal["quantile", "mean_std", "min_max", "none"]

MAX_ROWS = 2**18
"""Rows kept for quantiles. Up to so many, quantiles are exact; beyond, they come from an even subset."""

_LARGEST = 1e30
"""Of a number, for float32 to hold what is computed with it."""

_CONSTANT = 1e-5
"""A range below this (relative to the values) is rounding noise of a dimension that never moved."""


class VectorStats(StrictConfig):
    """What `StreamingStats` measures: one number per dimension each."""

    count: PositiveInt
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    @property
    def dim(self) -> int:
        return len(self.mean)

    @model_validator(mode="after")
    def _dims_agree(self) -> Self:
        dims = {name: len(values) for name, values in self if isinstance(values, tuple)}
        if len(set(dims.values())) > 1:
            raise ValueError(f"the statistics have different numbers of dimensions: {dims}")
        return self

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        """Else training divides by zero, or by what no float32 holds."""
        for i, (std, low, high) in enumerate(zip(self.std, self.min, self.max, strict=True)):
            if not low <= high or not (std > 0 or low == high) or max(abs(low), abs(high), std) > _LARGEST:
                raise ValueError(f"dimension {i} cannot have a std of {std:g} between {low:g} and {high:g}")
        return self


class StreamingStats:
    """count, mean, std, min, max, q01, q99 per dimension of rows that arrive in batches.

    Deterministic: the same rows in the same order give the same numbers, however they are cut into batches as far as
    count, min, max and quantiles go. When the kept rows reach MAX_ROWS, every second one is dropped and from then on
    only every second new one is kept (and so on), which samples the whole stream evenly with bounded memory.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean = np.zeros(dim)
        self._sum_squares = np.zeros(dim)  # of the deviations from the mean
        self._min = np.full(dim, np.inf)
        self._max = np.full(dim, -np.inf)
        self._kept: list[np.ndarray] = []
        self._num_kept = 0
        self._keep_every = 1

    def add(self, rows: Float[np.ndarray, "n d"]) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"expected rows [n {self.dim}], got {list(rows.shape)}")
        if not len(rows):
            return
        values = rows.astype(np.float64)
        # Chan's update: stable, unlike a running sum of squares
        total = self.count + len(values)
        mean = values.mean(axis=0)
        delta = mean - self._mean
        self._sum_squares += ((values - mean) ** 2).sum(axis=0) + delta**2 * self.count * len(values) / total
        self._mean += delta * len(values) / total
        self._min = np.minimum(self._min, values.min(axis=0))
        self._max = np.maximum(self._max, values.max(axis=0))
        first = -self.count % self._keep_every  # the stream's rows 0, s, 2s, … are kept
        self._keep(rows[first :: self._keep_every])
        self.count = total

    def _keep(self, rows: np.ndarray) -> None:
        self._kept.append(np.array(rows))
        self._num_kept += len(rows)
        while self._num_kept > MAX_ROWS:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._num_kept = len(self._kept[0])
            self._keep_every *= 2

    def result(self) -> dict[str, Any]:
        """As norm_stats.json has it: plain lists, and one count."""
        if not self.count:
            raise ValueError("statistics of no rows")
        q01, q99 = np.quantile(np.concatenate(self._kept).astype(np.float64), [0.01, 0.99], axis=0)
        arrays = {
            "mean": self._mean,
            "std": np.sqrt(self._sum_squares / self.count),
            "min": self._min,
            "max": self._max,
            "q01": q01,
            "q99": q99,
        }
        return {"count": self.count} | {name: [float(x) for x in values] for name, values in arrays.items()}


def merge_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `StreamingStats` would have found over all rows; of two quantiles the outer one, so that at least the share
    of every part's rows that was between them stays between them."""
    count = sum(part["count"] for part in parts)
    share = np.array([part["count"] / count for part in parts])[:, None]
    of = {name: np.array([part[name] for part in parts]) for name in _NEEDED}
    mean = (share * of["mean"]).sum(0)
    arrays = {
        "mean": mean,
        "std": np.sqrt((share * (of["std"] ** 2 + (of["mean"] - mean) ** 2)).sum(0)),
        **{name: of[name].min(0) for name in ("min", "q01")},
        **{name: of[name].max(0) for name in ("max", "q99")},
    }
    return {"count": count} | {name: [float(x) for x in arrays[name]] for name in _NEEDED}


class Normalizer:
    """(x - center) / scale per dimension; built from one entry of norm_stats.json.

    quantile: q01..q99 -> [-1, 1] · min_max: min..max -> [-1, 1] · mean_std: zero mean, unit std · none: unchanged.
    """

    def __init__(self, stats: Mapping[str, Sequence[float]], mode: NormalizationMode) -> None:
        self.mode = mode
        numbers = {name: np.asarray(stats[name], dtype=np.float64) for name in _NEEDED}
        center, scale = _CENTER_AND_SCALE[mode](numbers)
        self.center = center.astype(np.float32)  # d
        self.scale = scale.astype(np.float32)  # d

    def normalize(self, x: Array) -> Array:
        center, scale = self._like(x)
        return (x - center) / scale

    def unnormalize(self, x: Array) -> Array:
        center, scale = self._like(x)
        return x * scale + center

    def _like(self, x: Array) -> tuple[Array, Array]:
        if isinstance(x, np.ndarray):
            return self.center, self.scale
        return x.new_tensor(self.center), x.new_tensor(self.scale)


def _between(low: np.ndarray, high: np.ndarray, numbers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """low..high -> [-1, 1]. A dimension that stands still between them (a gripper that closes in one frame of a
    hundred, a joint that is never used) falls back to its full range, and then to unit scale."""
    is_flat = _is_constant(low, high)
    low = np.where(is_flat, numbers["min"], low)
    high = np.where(is_flat, numbers["max"], high)
    scale = np.where(_is_constant(low, high), 1.0, (high - low) / 2)
    return (low + high) / 2, scale


def _is_constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return high - low <= _CONSTANT * np.maximum(1e-3, np.maximum(np.abs(low), np.abs(high)))


def _standardise(numbers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return numbers["mean"], np.where(_is_constant(numbers["min"], numbers["max"]), 1.0, numbers["std"])


_NEEDED = ("mean", "std", "min", "max", "q01", "q99")
_CENTER_AND_SCALE = {
    "quantile": lambda n: _between(n["q01"], n["q99"], n),
    "min_max": lambda n: _between(n["min"], n["max"], n),
    "mean_std": _standardise,
    "none": lambda n: (np.zeros_like(n["mean"]), np.ones_like(n["mean"])),
}


class LatentStats:
    """Mean and std per channel of latents, and of their residuals to the clip's first latent frame."""

    def __init__(self, channels: int) -> None:
        self._all = _Moments(channels)
        self._residual = _Moments(channels)

    def add(self, latents: Float[Tensor, "t c h w"]) -> None:
        values = latents.double()
        self._all.add(values)
        self._residual.add(values[1:] - values[:1])

    def result(self) -> dict[str, list[float]]:
        mean, std = self._all.result()
        return {"mean": mean, "std": std, "residual_std": self._residual.result()[1]}


class _Moments:
    def __init__(self, channels: int) -> None:
        # Plain sums are safe here: latents are about zero mean and unit scale, and the sums are float64.
        self._count, self._sum, self._squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, values: Float[Tensor, "t c h w"]) -> None:
        self._count += values.numel() // len(self._sum)
        self._sum += values.sum((0, 2, 3)).numpy()
        self._squares += (values**2).sum((0, 2, 3)).numpy()

    def result(self) -> tuple[list[float], list[float]]:
        mean = self._sum / max(self._count, 1)
        std = np.sqrt(np.maximum(self._squares / max(self._count, 1) - mean**2, 0.0))
        return mean.tolist(), std.tolist()
