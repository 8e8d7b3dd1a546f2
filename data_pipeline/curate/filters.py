"""Which clips are worth training on: measurements of a clip's pixels, and limits on them.

Every clip is measured (`filter_scores` in its meta), whether or not a limit is set, so that limits can be chosen by
looking at the scores of a first build. The defaults reject only what shows nothing at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Self

import numpy as np
from jaxtyping import Bool, Float64, UInt8
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from configs.loader import StrictConfig

from ..video_pixels import planes_to_rgb, split_planes
from ..video_quality import MOVING_THRESHOLD
from .aesthetic import AestheticConfig, open_scorer
from .letterbox import BLACK, full_range, letterbox_share
from .text_cover import TextDetectorConfig, open_text_detector

WHITE = 235
"""Brightness, of 255, from which on a pixel is white."""

BLACK_FRAME = 0.99
"""A frame is black where more than this share of its pixels is."""

FLAT_SPREAD = 2.0
"""A frame is flat (one colour: a decoder's grey, a missing camera) where neither its brightness nor a colour difference
deviates by more."""

FROZEN_LEVELS = 6
"""A frame repeats the one before where no pixel's brightness differs by more than this: the codec's own noise."""

GREY_LEVELS, COLOURED_PIXELS = 3, 0.01
"""The colour differences of a grey pixel are no larger than this; a grey picture has no larger share of others."""

NO_COLOUR = 128
"""Colour difference of a grey pixel."""

GRID_SIDE = 64
"""What is counted pixel by pixel is counted on an even grid of at least so many in height and width, if there are."""

FLAT_SIDE = 32
"""Flatness takes this much of the grid in height and width, or all it has: a small bright spot is something to see."""

SHARPNESS_SIDE = 128
"""Shorter side at which sharpness is measured: a picture is smoother per pixel the larger it is."""

FEW_FRAMES = 3
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
    text: TextDetectorConfig | None = Field(None, description="a text detector for the next two; null: no such scores")
    max_text: float | None = Field(None, ge=0, le=1, description="share of the picture that text covers; try 0.05")
    max_watermark: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the picture that is text in the first, middle and last frame (captions, logos); try "
        "0.005, but not where a camera stands still: labels stay there, too",
    )

    @model_validator(mode="after")
    def _has_what_it_limits(self) -> Self:
        if self.min_aesthetic is not None and self.aesthetic is None:
            raise ValueError("min_aesthetic needs aesthetic: the folder of a CLIP model and the file of its head")
        if (self.max_text, self.max_watermark) != (None, None) and self.text is None:
            raise ValueError("max_text and max_watermark need text: the ONNX file of a text detector")
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
    _Rule("watermarked", "watermark", "max_watermark"),
    _Rule("too_much_text", "text", "max_text"),
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
    pixels: Mapping[str, UInt8[np.ndarray, "f p w"]],
    resolution: Mapping[str, int],
    aesthetic: AestheticConfig | None = None,
    text: TextDetectorConfig | None = None,
) -> dict[str, float]:
    """A clip's measurements over all its views, which come as planes; `resolution`: the shorter side that each was
    recorded at."""
    views = [view_scores(planes) | {"resolution": float(resolution[view])} for view, planes in pixels.items()]
    if aesthetic is not None:
        scorer = open_scorer(aesthetic)
        views = [
            scores | {"aesthetic": scorer.score(planes_to_rgb(planes))}
            for scores, planes in zip(views, pixels.values(), strict=True)
        ]
    if text is not None:
        detector = open_text_detector(text)
        views = [
            scores | detector.score(planes_to_rgb(planes))
            for scores, planes in zip(views, pixels.values(), strict=True)
        ]
    return {name: round(float(_OVER_VIEWS.get(name, max)([scores[name] for scores in views])), 6) for name in views[0]}


def view_scores(planes: UInt8[np.ndarray, "f p w"]) -> dict[str, float]:
    """The measurements of one view of a clip; `FilterConfig` says what each is."""
    stored, *colours = split_planes(planes)
    step = max(1, min(stored.shape[1:]) // (2 * GRID_SIDE))  # of the colours' pixels, each of which is four of stored
    luma = full_range(stored[:, :: 2 * step, :: 2 * step])
    grids = [luma, *(np.ascontiguousarray(colour[:, ::step, ::step]) for colour in colours)]
    few = np.linspace(0, len(stored) - 1, min(FEW_FRAMES, len(stored))).round().astype(int)
    few_luma, extremes = full_range(stored[few]), full_range(np.stack([stored.min(axis=0), stored.max(axis=0)]))
    is_black, is_white, moves = luma <= BLACK, luma >= WHITE, np.logical_or.reduce([_moves(one) for one in grids])[1:]
    return {
        "black": float((_shares(is_black) > BLACK_FRAME).mean()),
        "flat": float((np.max([_deviations(one) for one in grids], axis=0) <= FLAT_SPREAD).mean()),
        "frozen": frozen_share(luma),
        "static": 1.0 - float(_shares(moves.any(axis=0)[None])[0]) if len(moves) else 1.0,
        "motion": float(_shares(moves).mean()) if len(moves) else 0.0,
        "sharpness": sharpness(few_luma),
        "dark": float(_shares(is_black).mean()),
        "bright": float(_shares(is_white).mean()),
        "letterbox": letterbox_share(extremes),
        "depth": depth_likeness(few_luma, [one[few] for one in grids[1:]]),
    }


def _shares(chosen: Bool[np.ndarray, "f h w"]) -> Float64[np.ndarray, "f"]:
    return np.count_nonzero(chosen, axis=(1, 2)) / (chosen.shape[1] * chosen.shape[2])


def _deviations(values: UInt8[np.ndarray, "f h w"]) -> Float64[np.ndarray, "f"]:
    step = max(1, min(values.shape[1:]) // FLAT_SIDE)
    return values[:, ::step, ::step].std(axis=(1, 2))


def _moves(values: UInt8[np.ndarray, "f h w"]) -> Bool[np.ndarray, "f h w"]:
    """Where a clip differs from its first frame by more than `MOVING_THRESHOLD`."""
    return np.maximum(values, values[:1]) - np.minimum(values, values[:1]) > int(MOVING_THRESHOLD * 127.5)


def frozen_share(luma: UInt8[np.ndarray, "f h w"]) -> float:
    if len(luma) < 2:
        return 0.0
    difference = np.maximum(luma[1:], luma[:-1]) - np.minimum(luma[1:], luma[:-1])
    return float((difference.max(axis=(1, 2)) <= FROZEN_LEVELS).mean())


def sharpness(luma: UInt8[np.ndarray, "f h w"]) -> float:
    """Variance of the Laplacian, median over the frames."""
    chosen = luma
    height, width = luma.shape[1:]
    scale = SHARPNESS_SIDE / min(height, width)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        chosen = np.stack([_reduced(one, size) for one in chosen])
    if min(chosen.shape[1:]) < 3:
        return 0.0
    one = chosen.astype(np.int16)
    laplacian = one[:, :-2, 1:-1] + one[:, 2:, 1:-1] + one[:, 1:-1, :-2] + one[:, 1:-1, 2:] - 4 * one[:, 1:-1, 1:-1]
    return float(np.median(laplacian.astype(np.float32).var(axis=(1, 2), dtype=np.float64)))


def _reduced(luma: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "v u"]:
    return np.asarray(Image.fromarray(luma).resize(size, Image.Resampling.BOX, reducing_gap=1.0))


def depth_likeness(luma: UInt8[np.ndarray, "f h w"], colours: Sequence[UInt8[np.ndarray, "f u v"]]) -> float:
    """Depth has no colour, no texture and no noise: most neighbours are equal, and edges are steep."""
    is_coloured = np.logical_or.reduce([np.abs(one.astype(np.int16) - NO_COLOUR) > GREY_LEVELS for one in colours])
    if is_coloured.mean() > COLOURED_PIXELS:
        return 0.0
    grey = luma.astype(np.int16)
    across = np.abs(np.diff(grey, axis=2)) <= 1
    down = np.abs(np.diff(grey, axis=1)) <= 1
    return float((across.mean() + down.mean()) / 2)
