"""What makes a clip: where it starts in its episode and what it is called. Pure functions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int64

from ..align import SNAP
from ..video_io import ViewConfig

MIN_RATE_SHARE = 0.75
"""A recording slower than this share of the clip's fps would show most frames twice: no motion to learn from."""


Range = tuple[int, int]
"""Frames [first, end) of an episode, counted at the clips' fps."""


def num_clip_frames(num_frames: int, native_fps: float, fps: float) -> int:
    """How many frames at `fps` an episode of `num_frames` recorded at `native_fps` has."""
    last_time_s = (num_frames - 0.5 + SNAP) / native_fps  # up to which the last frame is the nearest one
    return int(np.floor(last_time_s * fps)) + 1


def clip_starts(shots: Sequence[Range], active: Sequence[Range], clip_frames: int, stride: int) -> list[int]:
    """First frames of the clips: each lies within one of the `shots` and starts in one of the `active` ranges.

    Both are sorted and do not overlap. A clip starts with each active range, or as late in its shot as it fits, and
    every `stride` frames from there; two starts are never closer than that.
    """
    starts: list[int] = []
    for first, end in shots:
        earliest = first
        for active_first, active_end in active:
            start = max(earliest, min(active_first, end - clip_frames))
            while start < min(active_end, end - clip_frames + 1) and active_first < end:
                starts.append(start)
                start = earliest = start + stride
    return starts


def shot_ranges(
    shown: Mapping[str, Int64[np.ndarray, "f"]], cuts: Mapping[str, Int64[np.ndarray, "n"]], num_frames: int
) -> list[Range]:
    """The runs of an episode's frames that show one shot in every view.

    `shown[view]` are the stored frames that the episode's show, `cuts[view]` the first stored frames of new shots.
    """
    is_new = np.zeros(num_frames, dtype=bool)
    for view, positions in cuts.items():
        is_new[1:] |= np.diff(np.searchsorted(positions, shown[view], side="right")) != 0
    edges = [0, *np.flatnonzero(is_new).tolist(), num_frames]
    return list(pairwise(edges))


def frame_ranges(spans_s: Sequence[tuple[float, float]], fps: float, num_frames: int) -> list[Range]:
    """The frames whose times lie in [from, until) of each span in seconds; a span to the end takes the last frame."""
    edges = np.ceil(np.asarray(spans_s).reshape(-1, 2) * fps - SNAP).astype(int).clip(0, num_frames)
    return [(int(first), int(end)) for first, end in edges if first < end]


def clip_key(
    source: str,
    content_sha256: str,
    episode_id: str,
    start: int,
    fps: float,
    num_frames: int,
    views: Mapping[str, ViewConfig],
) -> str:
    """Follows from what is in the clip, not from where its files lie. Uniform, so sorting by key is a fair shuffle."""
    sizes = {name: view.model_dump(mode="json") for name, view in views.items()}
    identity = json.dumps([source, content_sha256, episode_id, start, fps, num_frames, sizes], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def view_role(name: str) -> str:
    """A guess for people and for picking views; nothing depends on it."""
    if any(word in name for word in ("wrist", "hand", "gripper")):
        return "wrist"
    return "head" if any(word in name for word in ("head", "ego")) else "external"
