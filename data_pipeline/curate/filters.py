"""Which clips are worth training on: measurements of a clip's pixels, and limits on them.

Every clip is measured (`filter_scores` in its meta), whether or not a limit is set, so that limits can be chosen by
looking at the scores of a first build. The defaults reject only what shows nothing at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from configs.loader import StrictConfig

from ..video_quality import moving_pixels
from .aesthetic import AestheticConfig, open_scorer
from .letterbox import BLACK, brightness, letterbox_share

WHITE = 235
"""Brightness, of 255, from which on a pixel is white."""

BLACK_FRAME = 0.99
"""A frame is black where more than this share of its pixels is."""

FLAT_SPREAD = 2.0
"""A frame is flat (one colour: a decoder's grey, a missing camera) where no channel's deviation is larger."""

FLAT_STRIDE = 4

FROZEN_LEVELS = 6
"""A frame repeats the one before where no pixel's brightness differs by more than this: the codec's own noise."""

GREY_LEVELS, COLOURED_PIXELS = 6, 0.01
"""The channels of a grey pixel differ by no more than this; a grey picture has no larger share of others."""

SHARPNESS_SIDE = 128
"""Shorter side at which sharpness is measured: a picture is smoother per pixel the larger it is."""

FEW_FRAMES = 5
"""Frames of a clip that sharpness and depth are measured on."""


class FilterConfig(StrictConfig):
    """Limits that a clip has to keep; null: no limit. Of several views the worst counts, unless it says otherwise."""

    min_resolution: PositiveInt | None = Field(
        None, description="shorter side of the recorded picture, in pixels (of its crop, where the view has one)"
    )
    max_black: float | None = Field(0.5, ge=0, le=1, description="share of frames that are black")
    max_flat: float | None = Field(0.5, ge=0, le=1, description="share of frames that are of one colour all over")
    max_frozen: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of frames that repeat the frame before; a robot that rests repeats them too",
    )
    max_static: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of pixels that never move, in the view where most do; 0.999 rejects clips in which nothing "
        "happens",
    )
    min_motion: float | None = Field(
        None, ge=0, le=1, description="share of pixels that differ from the first frame, mean over frames and views"
    )
    max_motion: float | None = Field(
        None, ge=0, le=1, description="the same; 0.9 rejects a camera that is thrown about"
    )
    min_sharpness: NonNegativeFloat | None = Field(
        None,
        description="variance of the Laplacian of the brightness, 0 to 255, at a shorter side of at most 128 pixels; "
        "try 20 to 100",
    )
    max_dark: float | None = Field(None, ge=0, le=1, description="share of black pixels; 0.8 rejects under-exposure")
    max_bright: float | None = Field(None, ge=0, le=1, description="share of white pixels; 0.5 rejects over-exposure")
    max_letterbox: float | None = Field(
        None, ge=0, le=1, description="share of the picture that black bars take; 0.05 rejects letterboxed clips"
    )
    crop_letterbox: bool = Field(
        False, description="cut black bars off whole episodes first (of views that have no crop of their own)"
    )
    max_depth: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how much a clip looks like depth stored as grey video: 0 where there is colour, else the share of "
        "neighbouring pixels that are equal; try 0.9 to 0.95",
    )
    aesthetic: AestheticConfig | None = Field(None, description="weights for an aesthetic score; null: no such score")
    min_aesthetic: float | None = Field(None, description="that score, on its own scale; LAION's is 1 to 10, try 4")

    @model_validator(mode="after")
    def _has_what_it_limits(self) -> Self:
        if self.min_aesthetic is not None and self.aesthetic is None:
            raise ValueError("min_aesthetic needs aesthetic: the folder of a CLIP model and the file of its head")
        return self


@dataclass(frozen=True)
class _Rule:
    reason: str  # in rejected.parquet
    score: str  # in filter_scores
    limit: str  # in FilterConfig; `min_…` or `max_…`


RULES = (
    _Rule("resolution_too_low", "resolution", "min_resolution"),
    _Rule("black", "black", "max_black"),
    _Rule("flat", "flat", "max_flat"),
    _Rule("frozen", "frozen", "max_frozen"),
    _Rule("static", "static", "max_static"),
    _Rule("motion_too_low", "motion", "min_motion"),
    _Rule("motion_too_high", "motion", "max_motion"),
    _Rule("blurred", "sharpness", "min_sharpness"),
    _Rule("under_exposed", "dark", "max_dark"),
    _Rule("over_exposed", "bright", "max_bright"),
    _Rule("letterboxed", "letterbox", "max_letterbox"),
    _Rule("depth_as_grey", "depth", "max_depth"),
    _Rule("not_aesthetic", "aesthetic", "min_aesthetic"),
)
"""Checked in this order; the first that a clip breaks names its rejection."""

_OVER_VIEWS: dict[str, Callable[[Sequence[float]], float]] = {
    "motion": mean,
    "static": min,
    "sharpness": min,
    "resolution": min,
    "aesthetic": mean,
}  # of the others the maximum


def broken_rule(scores: Mapping[str, float], config: FilterConfig) -> tuple[str, str] | None:
    """(reason, sentence with score and limit) of the first limit that the clip does not keep."""
    for rule in RULES:
        limit = getattr(config, rule.limit)
        if limit is None or rule.score not in scores:
            continue
        score, is_minimum = scores[rule.score], rule.limit.startswith("min_")
        if score < limit if is_minimum else score > limit:
            return rule.reason, f"{rule.score} is {score:g}, {rule.limit} {limit:g}"
    return None


# --- scores -------------------------------------------------------------------------------------------------------


def filter_scores(
    pixels: Mapping[str, UInt8[np.ndarray, "f h w 3"]],
    resolution: Mapping[str, int],
    aesthetic: AestheticConfig | None = None,
) -> dict[str, float]:
    """A clip's measurements over all its views; `resolution`: the shorter side that each was recorded at."""
    views = [view_scores(video) | {"resolution": float(resolution[view])} for view, video in pixels.items()]
    if aesthetic is not None:
        scorer = open_scorer(aesthetic)
        views = [
            scores | {"aesthetic": scorer.score(video)} for scores, video in zip(views, pixels.values(), strict=True)
        ]
    return {name: round(float(_OVER_VIEWS.get(name, max)([scores[name] for scores in views])), 6) for name in views[0]}


def view_scores(video: UInt8[np.ndarray, "f h w 3"]) -> dict[str, float]:
    """The measurements of one view of a clip; `FilterConfig` says what each is."""
    luma = brightness(video)
    is_black = luma <= BLACK
    moves = moving_pixels(video)[1:]
    return {
        "black": float((is_black.mean(axis=(1, 2)) > BLACK_FRAME).mean()),
        "flat": float((video[:, ::FLAT_STRIDE, ::FLAT_STRIDE].std(axis=(1, 2)).max(axis=-1) <= FLAT_SPREAD).mean()),
        "frozen": frozen_share(luma),
        "static": 1.0 - float(moves.any(axis=0).mean()) if len(moves) else 1.0,
        "motion": float(moves.mean()) if len(moves) else 0.0,
        "sharpness": sharpness(luma),
        "dark": float(is_black.mean()),
        "bright": float((luma >= WHITE).mean()),
        "letterbox": letterbox_share(luma),
        "depth": depth_likeness(video, luma),
    }


def frozen_share(luma: UInt8[np.ndarray, "f h w"]) -> float:
    if len(luma) < 2:
        return 0.0
    difference = np.abs(np.diff(luma.astype(np.int16), axis=0))
    return float((difference.max(axis=(1, 2)) <= FROZEN_LEVELS).mean())


def sharpness(luma: UInt8[np.ndarray, "f h w"]) -> float:
    """Variance of the Laplacian, median over a few frames."""
    chosen = luma[_few(len(luma))]
    height, width = luma.shape[1:]
    scale = SHARPNESS_SIDE / min(height, width)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        chosen = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in chosen])
    if min(chosen.shape[1:]) < 3:
        return 0.0
    one = chosen.astype(np.int32)
    laplacian = one[:, :-2, 1:-1] + one[:, 2:, 1:-1] + one[:, 1:-1, :-2] + one[:, 1:-1, 2:] - 4 * one[:, 1:-1, 1:-1]
    return float(np.median(laplacian.var(axis=(1, 2))))


def depth_likeness(video: UInt8[np.ndarray, "f h w 3"], luma: UInt8[np.ndarray, "f h w"]) -> float:
    """Depth has no colour, no texture and no noise: most neighbours are equal, and edges are steep."""
    chosen = _few(len(video))
    red, green, blue = (video[chosen, ..., channel] for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    if (spread > GREY_LEVELS).mean() > COLOURED_PIXELS:
        return 0.0
    grey = luma[chosen].astype(np.int16)
    across = np.abs(np.diff(grey, axis=2)) <= 1
    down = np.abs(np.diff(grey, axis=1)) <= 1
    return float((across.mean() + down.mean()) / 2)


def _few(num_frames: int) -> np.ndarray:
    return np.linspace(0, num_frames - 1, min(FEW_FRAMES, num_frames)).round().astype(int)
