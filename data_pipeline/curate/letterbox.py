"""Black bars around a picture, which take room from it and look like no camera."""

from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from ..sources.base import Episode, Footage, read_undamaged
from ..video_io import ViewConfig

BLACK = 24
"""Brightness, of 255, up to which a pixel is black; that of video is often 16, and a codec adds noise."""

BAR_SPREAD = 8
"""Brightness of a letterbox's bars varies by no more than this, over the bar and over time."""

SAMPLED_FRAMES = 8
"""Frames, spread over an episode, that all have to show the same bars."""


def crop_letterbox(
    views: Mapping[str, ViewConfig], footages: Mapping[str, Footage], episode: Episode
) -> tuple[dict[str, ViewConfig], tuple[str, ...]]:
    """The views with a crop to the picture inside the bars, where there are any, and what was done as sentences."""
    times_s = np.linspace(0, (episode.num_frames - 1) / episode.fps, SAMPLED_FRAMES)
    cropped, notes = dict(views), []
    for name, view in views.items():
        if view.crop is not None:
            continue
        positions = np.unique(footages[name].positions(times_s, episode.fps)).tolist()
        sampled = [frame for frame in read_undamaged(footages[name], positions) if frame is not None]
        if not sampled:
            continue
        frames = np.stack(sampled)
        box = picture_box(brightness(frames[:, ::-1, ::-1] if view.rotate_180 else frames))
        if box is not None:
            cropped[name] = view.model_copy(update={"crop": box})
            inside = f"the {box[2]}x{box[3]} picture at row {box[0]}, column {box[1]}"
            height, width = frames.shape[1:3]
            notes.append(f"View {name} has black bars: {inside} of the recorded {height}x{width} is used.")
    return cropped, tuple(notes)


def brightness(video: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f h w"]:
    """BT.601 luma in whole numbers."""
    red, green, blue = (video[..., channel].astype(np.uint16) for channel in range(3))
    return ((77 * red + 150 * green + 29 * blue + 128) >> 8).astype(np.uint8)


def full_range(stored: UInt8[np.ndarray, "f h w"]) -> UInt8[np.ndarray, "f h w"]:
    """The same, from the brightness of a clip's planes, whose black is 16 and whose white is 235."""
    return cv2.LUT(stored.reshape(-1, stored.shape[-1]), _FULL_RANGE).reshape(stored.shape).astype(np.uint8, copy=False)


_FULL_RANGE = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)


def letterbox_share(luma: UInt8[np.ndarray, "f h w"]) -> float:
    box = picture_box(luma)
    return 0.0 if box is None else 1.0 - box[2] * box[3] / (luma.shape[1] * luma.shape[2])


def picture_box(luma: UInt8[np.ndarray, "f h w"]) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of the picture inside black bars; None where there are no bars, or nothing else."""
    lowest, highest = luma.min(axis=0), luma.max(axis=0)
    rows, columns = _bars(lowest, highest), _bars(lowest.T, highest.T)
    top, bottom = _picture(rows)
    left, right = _picture(columns)
    is_whole = (top, left, bottom, right) == (0, 0, *luma.shape[1:])
    return None if is_whole or bottom <= top or right <= left else (top, left, bottom - top, right - left)


def _bars(lowest: UInt8[np.ndarray, "h w"], highest: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h"]:
    """Which rows are black and nearly even, over their length and over time."""
    spread = highest.max(axis=1).astype(int) - lowest.min(axis=1)
    return (highest.max(axis=1) <= BLACK) & (spread <= BAR_SPREAD)


def _picture(is_bar: Bool[np.ndarray, "h"]) -> tuple[int, int]:
    """First and end of what lies between the bars at both ends."""
    inside = np.flatnonzero(~is_bar)
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
