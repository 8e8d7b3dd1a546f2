"""What recordings share that are arrays with a row per step (.npz files, Zarr replay buffers).

Such files name their arrays as they please, and say neither which ones are pictures nor how fast the steps came.
Pictures are found by their shape, actions and proprio by the usual names; settings decide where that is not enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from pydantic import Field, PositiveFloat

from configs.loader import UserError

from ..embodiments import Embodiment
from .base import SourceConfig, SourceError, UnknownRateError, as_bytes, key_safe

ACTION_KEYS = ("action", "actions")
PROPRIO_KEYS = ("proprio", "state", "states", "robot_state", "agent_pos", "robot_eef_pose", "qpos")
HAND_HELD_KEYS = re.compile(r"robot\d+_(eef_pos|eef_rot_axis_angle|gripper_width)")
"""The pose and width of each hand-held gripper in the buffers of https://github.com/real-stanford/universal_manipulation_interface"""

MAX_VALUES = 4096  # of an action or of proprio; more are an embedding, or a header that lies
_MIN_SIDE, _MAX_SIDE = 8, 16_384  # of a picture; smaller arrays are poses and matrices
_MAX_STACKED = 16  # pictures on top of each other in one array: a policy's short memory


class StepArraysConfig(SourceConfig):
    """Settings that say what the arrays are."""

    control_hz: PositiveFloat | None = Field(
        default=None, description="steps per second, which the files do not say; null: that of `embodiment`"
    )
    image_keys: list[str] | None = Field(default=None, description="arrays of pictures; null: found by shape")
    action_keys: list[str] | None = Field(
        default=None, description="arrays of actions, joined in this order; null: found by name"
    )
    proprio_keys: list[str] | None = Field(
        default=None, description="arrays of proprio, joined in this order; null: found by name"
    )
    actions_before_frames: bool | None = Field(
        default=None,
        description="row i is the action that led to frame i, as in the replay buffers of dm_env agents; null: where "
        "reward and discount stand beside it and row 0 is zero",
    )
    actions_are_next_proprio: bool | None = Field(
        default=None,
        description="there is no command: the action is the proprio that was reached one step later; null: only for "
        "hand-held grippers (robot0_eef_pos, ...)",
    )

    def steps_per_s(self, where: Path) -> float:
        hz = self.control_hz or (self.embodiment.control_hz if self.embodiment is not None else None)
        if hz is None:
            raise UnknownRateError(
                f"{where}: its files do not say how many steps there are in a second; set control_hz."
            )
        return hz


@dataclass(frozen=True)
class ArrayInfo:
    """One array of an episode, without its numbers."""

    num_rows: int
    shape: tuple[int, ...]  # of one row
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_numbers(self) -> bool:
        """Whether a row of it can be an action or proprio."""
        return self.dtype.kind in "biuf" and 0 < self.size <= MAX_VALUES and picture_layout(self) is None


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureLayout:
    """How one row of an array holds a picture."""

    has_channels_first: bool
    num_channels: int  # 3, 4 (the last is transparency), or several pictures of 3, the newest last
    scale: float = 1.0  # value * scale + offset is 0..255
    offset: float = 0.0

    @property
    def num_stacked(self) -> int:
        return max(1, self.num_channels // 3)

    def to_rgb(self, rows: np.ndarray) -> UInt8[np.ndarray, "f h w 3"]:
        frames = np.moveaxis(rows, 1, -1) if self.has_channels_first else rows
        frames = frames[..., :3] if self.num_channels == 4 else frames[..., -3:]
        if frames.dtype != np.uint8:
            frames = as_bytes(frames, self.scale, self.offset)
        return np.ascontiguousarray(frames)


def picture_layout(info: ArrayInfo) -> PictureLayout | None:
    """By shape alone; None for what cannot be colour pictures (one channel is depth or a mask)."""
    if len(info.shape) != 3 or info.dtype.kind not in "iuf" or max(info.shape) > _MAX_SIDE:
        return None
    for axis in (2, 0):
        num_channels = info.shape[axis]
        is_colour = num_channels == 4 or (num_channels % 3 == 0 and 3 <= num_channels <= 3 * _MAX_STACKED)
        if is_colour and min(info.shape[:axis] + info.shape[axis + 1 :]) >= max(_MIN_SIDE, num_channels):
            return PictureLayout(axis == 0, num_channels)
    return None


def with_range(layout: PictureLayout, dtype: np.dtype, samples: np.ndarray) -> PictureLayout | None:
    """The layout with the scale of its numbers, which a few rows show: 0..255, 0..1 or -1..1. None: no pictures."""
    if dtype == np.uint8:
        return layout
    low, high = (float(samples.min()), float(samples.max())) if samples.size else (0.0, 0.0)
    if dtype.kind == "f" and low >= -1 and high <= 1:
        is_signed = low < 0
        scale, offset = (127.5, 127.5) if is_signed else (255.0, 0.0)
        return PictureLayout(layout.has_channels_first, layout.num_channels, scale, offset)
    return layout if low >= 0 and high <= 255 and (dtype.kind != "f" or high > 16) else None  # else points, or depth


def describe_pictures(name: str, layout: PictureLayout, dtype: np.dtype, notes: list[str]) -> None:
    if dtype != np.uint8:
        spans = {(1.0, 0.0): "0 to 255", (255.0, 0.0): "0 to 1", (127.5, 127.5): "-1 to 1"}
        notes.append(f"The pictures of {name} are {dtype.name} from {spans[layout.scale, layout.offset]}.")
    if layout.num_stacked > 1:
        notes.append(f"Each row of {name} holds {layout.num_stacked} pictures, the last is taken: it is the newest.")


# --- which array is what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The arrays to read."""

    images: tuple[str, ...]
    actions: tuple[str, ...]
    proprio: tuple[str, ...]
    actions_are_next_proprio: bool
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]

    def embodiment(self, name: str, control_hz: float) -> Embodiment | None:
        if not self.action_names:
            return None
        return Embodiment(
            name=name,
            action_names=self.action_names,
            proprio_names=self.proprio_names,
            control_hz=control_hz,
            gripper_actions=tuple(i for i, text in enumerate(self.action_names) if "gripper" in text.lower()),
        )


def choose_arrays(arrays: Mapping[str, ArrayInfo], config: StepArraysConfig, where: str) -> Choice:
    """UserError where a setting names an array that is not there, or that is something else."""
    pictures = [key for key, info in arrays.items() if picture_layout(info) is not None]
    numbers = [key for key, info in arrays.items() if info.is_numbers]
    hand_held = sorted(key for key in numbers if HAND_HELD_KEYS.fullmatch(_last(key)))
    proprio = tuple(hand_held) or _first_named(numbers, PROPRIO_KEYS)
    actions = _first_named(numbers, ACTION_KEYS)
    if config.proprio_keys is not None:
        proprio = _given("proprio_keys", config.proprio_keys, numbers, where)
    if config.action_keys is not None:
        actions = _given("action_keys", config.action_keys, numbers, where)
    is_next = config.actions_are_next_proprio
    if is_next is None:
        is_next = not actions and config.proprio_keys is None and bool(hand_held)
    actions = () if is_next else actions
    action_names = _dimension_names(proprio if is_next else actions, arrays)
    return Choice(
        images=tuple(pictures)
        if config.image_keys is None
        else _given("image_keys", config.image_keys, pictures, where),
        actions=actions,
        proprio=proprio,
        actions_are_next_proprio=is_next,
        action_names=action_names,
        proprio_names=_dimension_names(proprio, arrays) if action_names else (),
    )


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _first_named(keys: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    found = [key for name in names for key in keys if _last(key) == name]
    return tuple(found[:1])


def _given(setting: str, given: Sequence[str], usable: Sequence[str], where: str) -> tuple[str, ...]:
    unknown = [key for key in given if key not in usable]
    if unknown:
        raise UserError(f"{where}: {setting} has {', '.join(unknown)}; there are {', '.join(usable) or 'none'}.")
    return tuple(given)


def _dimension_names(keys: Sequence[str], arrays: Mapping[str, ArrayInfo]) -> tuple[str, ...]:
    names: list[str] = []
    for key in keys:
        size = arrays[key].size
        names += [key_safe(key)] if size == 1 else [f"{key_safe(key)}_{i}" for i in range(size)]
    return tuple(names)


def view_names(keys: Sequence[str]) -> dict[str, str]:
    """Array -> view: the last part of its name, or all of it where that would not be unique."""
    short = {key: key_safe(_last(key)) for key in keys}
    return short if len(set(short.values())) == len(keys) else {key: key_safe(key) for key in keys}


# --- actions and proprio ---------------------------------------------------------------------------------------------


def read_control(
    choice: Choice,
    config: StepArraysConfig,
    arrays: Mapping[str, ArrayInfo],
    rows: Callable[[str], np.ndarray],
    num_frames: int,
    where: str,
    notes: list[str],
) -> tuple[Float32[np.ndarray, "n a"] | None, Float32[np.ndarray, "n s"] | None]:
    """Actions and proprio with a row per frame; a row that was not recorded is NaN. `rows` reads one array."""
    missing = [key for key in (*choice.actions, *choice.proprio) if key not in arrays]
    if not choice.action_names or missing:
        what = f"There is no array {', '.join(missing)}" if missing else "No array is known as the action"
        notes.append(f"{what}: the episode is read without actions.")
        return None, None
    proprio = _joined(choice.proprio, rows, num_frames, where, notes) if choice.proprio else None
    if choice.actions_are_next_proprio:
        assert proprio is not None
        notes.append(f"Nothing was commanded: the action is the {', '.join(choice.proprio)} one step later.")
        actions = _one_row_earlier(proprio)
    else:
        actions = _joined(choice.actions, rows, num_frames, where, notes)
        if _is_before_frames(config, arrays, actions):
            notes.append("Row i of the action led to frame i: the rows are moved to the frames that they follow.")
            actions = _one_row_earlier(actions)
    return actions, proprio


def _joined(
    keys: Sequence[str], rows: Callable[[str], np.ndarray], num_frames: int, where: str, notes: list[str]
) -> Float32[np.ndarray, "n d"]:
    columns = []
    for key in keys:
        values = rows(key)
        missing = num_frames - len(values)
        if abs(missing) > max(2, round(0.02 * num_frames)):
            detail = f"{key} has {len(values)} rows for {num_frames} frames: they cannot be matched"
            raise SourceError("frame_count_mismatch", where, detail)
        if missing:
            notes.append(f"{key} has {len(values)} rows for {num_frames} frames: they are matched from the start.")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and its row invalid
            column = values.reshape(len(values), -1)[:num_frames].astype(np.float32)
        if not np.isfinite(column).all():
            num_bad = int(np.count_nonzero(~np.isfinite(column).all(axis=1)))
            notes.append(f"{num_bad} rows of {key} are not finite numbers and do not count as recorded.")
        columns.append(np.pad(column, ((0, max(0, missing)), (0, 0)), constant_values=np.nan))
    return np.concatenate(columns, axis=1)


def _one_row_earlier(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return np.pad(rows[1:], ((0, 1), (0, 0)), constant_values=np.nan)


def _is_before_frames(config: StepArraysConfig, arrays: Mapping[str, ArrayInfo], actions: np.ndarray) -> bool:
    """A dm_env episode starts with a step that nothing led to: its action is filled with zeros."""
    if config.actions_before_frames is not None:
        return config.actions_before_frames
    return {"reward", "discount"} <= arrays.keys() and not actions[0].any()
