"""What makes a clip: where it starts in its episode, how much moves in it, what it is called. Pure functions."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from ..align import SNAP
from ..video_io import ViewConfig
from ..video_quality import moving_pixels

MIN_RATE_SHARE = 0.75
"""A recording slower than this share of the clip's fps would show most frames twice: no motion to learn from."""


def clip_starts(num_frames: int, native_fps: float, fps: float, clip_frames: int, stride: int) -> list[int]:
    """First frames, counted at the clips' `fps`, of the clips that fit into `num_frames` recorded at `native_fps`."""
    last_time_s = (num_frames - 0.5 + SNAP) / native_fps  # up to which the last frame is the nearest one
    available = int(np.floor(last_time_s * fps)) + 1
    return list(range(0, available - clip_frames + 1, stride))


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


def motion_score(video: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Share of moving pixels in the frames after the first."""
    return float(moving_pixels(video)[1:].mean()) if len(video) > 1 else 0.0


def view_role(name: str) -> str:
    """A guess for people and for picking views; nothing depends on it."""
    if any(word in name for word in ("wrist", "hand", "gripper")):
        return "wrist"
    return "head" if any(word in name for word in ("head", "ego")) else "external"
