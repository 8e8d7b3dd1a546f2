"""Actions and proprio on a clip's clock: which frames a clip shows, and which control rows belong between them.

A clip has F frames at `fps`, and every frame but the last is followed by `actions_per_frame` actions; so its control
rate is `fps * actions_per_frame`, whatever the robot's was. Where the two agree, resampling is the identity and the
recorded rows come out bit for bit.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

SNAP = 1e-4
"""Times closer to a recorded row than this share of its interval are that row: clocks like 1/30 s are not exact."""


@dataclass(frozen=True)
class ClipClock:
    """The times, in seconds of the episode, of a clip's frames and actions."""

    start_s: float
    fps: float
    num_frames: int
    actions_per_frame: int

    @property
    def control_hz(self) -> float:
        return self.fps * self.actions_per_frame

    @property
    def frame_times_s(self) -> Float64[np.ndarray, "f"]:
        return self.start_s + np.arange(self.num_frames) / self.fps

    @property
    def action_times_s(self) -> Float64[np.ndarray, "k"]:
        return self.start_s + np.arange((self.num_frames - 1) * self.actions_per_frame) / self.control_hz


@dataclass(frozen=True)
class AlignedControl:
    """Control rows of one clip. Rows outside `spans` repeat the last valid value and must not be trained on."""

    actions: Float32[np.ndarray, "k a"]
    proprio: Float32[np.ndarray, "k s"] | None
    spans: tuple[tuple[int, int], ...]


def nearest_frames(times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
    """Index of the recorded frame nearest to each time: at most half a frame away (a tie goes to the earlier one)."""
    return np.ceil(times_s * fps - 0.5 - SNAP).astype(np.int64).clip(min=0)


def actions_per_frame(control_hz: float, fps: float) -> int:
    """The whole number of actions per frame that changes the robot's control rate least, and at least one."""
    return max(1, round(control_hz / fps))


def align_control(
    actions: Float32[np.ndarray, "n a"],
    proprio: Float32[np.ndarray, "n s"] | None,
    control_hz: float,
    clock: ClipClock,
    held: Collection[int] = (),
) -> AlignedControl:
    """Resample an episode's rows at the clip's action times. `held` action slots (grippers) are never interpolated."""
    times = clock.action_times_s
    rows, is_valid = resample(actions, control_hz, times, held)
    states = resample(proprio, control_hz, times)[0] if proprio is not None and proprio.shape[1] else None
    return AlignedControl(rows, states, spans(is_valid))


def resample(
    values: Float32[np.ndarray, "n d"], hz: float, times_s: Float64[np.ndarray, "k"], held: Collection[int] = ()
) -> tuple[Float32[np.ndarray, "k d"], Bool[np.ndarray, "k"]]:
    """Values at `times_s` of rows recorded at 0, 1/hz, 2/hz, …; and which of them rest on recorded, finite rows.

    Linear between rows, except for `held` slots, which keep the last row's value: half a gripper command is neither
    open nor closed. After the last row the last value stays, marked invalid once a row is missing.
    """
    filled, is_finite = _fill_forward(values)
    position = times_s * hz
    lower = np.floor(position + SNAP).astype(np.int64)
    share = np.where(position - lower > SNAP, position - lower, 0.0).astype(np.float32)[:, None]
    first = lower.clip(0, len(values) - 1)
    second = np.where(share[:, 0] > 0, lower + 1, lower).clip(0, len(values) - 1)
    result = filled[first] + share * (filled[second] - filled[first])
    if held:
        columns = sorted(held)
        result[:, columns] = filled[first][:, columns]
    is_valid = (lower < len(values)) & is_finite[first] & is_finite[second]
    return result.astype(np.float32), is_valid


def spans(is_valid: Bool[np.ndarray, "k"]) -> tuple[tuple[int, int], ...]:
    """The runs of True as (first, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_valid, [False]]).astype(np.int8)))
    return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))


def spans_mask(valid: Collection[tuple[int, int]], num_rows: int) -> Bool[np.ndarray, "k"]:
    """The inverse of `spans`."""
    mask = np.zeros(num_rows, dtype=bool)
    for first, end in valid:
        mask[first:end] = True
    return mask


def relative_actions(
    actions: Float32[np.ndarray, "k a"],
    proprio_at_start: Float32[np.ndarray, "s"] | None,
    action_names: tuple[str, ...],
    proprio_names: tuple[str, ...],
) -> Float32[np.ndarray, "k a"]:
    """Actions minus the proprio at the clip's first frame, in the slots that both name alike; the others unchanged."""
    if proprio_at_start is None:
        return actions
    relative = actions.copy()
    for slot, name in enumerate(action_names):
        if name in proprio_names:
            relative[:, slot] -= proprio_at_start[proprio_names.index(name)]
    return relative


def _fill_forward(values: Float32[np.ndarray, "n d"]) -> tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, "n"]]:
    """Rows with NaN or infinity replaced by the last finite row (zeros before the first), and which were finite."""
    is_finite = np.isfinite(values).all(axis=1)
    if is_finite.all():
        return values, is_finite
    last_finite = np.maximum.accumulate(np.where(is_finite, np.arange(len(values)), -1))
    return np.where(last_finite[:, None] >= 0, values[last_finite], np.float32(0)), is_finite
