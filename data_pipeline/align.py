"""Actions and proprio on a clip's clock: which frames a clip shows, and which control rows belong between them.

A clip has F frames at `fps`, and every frame but the last is followed by `actions_per_frame` actions; so its control
rate is `fps * actions_per_frame`, whatever the robot's was. Where the two agree, resampling is the identity and the
recorded rows come out bit for bit. Where they do not, what a slot means decides (`Embodiment`): targets, velocities and
proprio are interpolated at the new times, deltas are added up or split so that they lead to the same place.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from .embodiments import Embodiment, Rotations, SlotRules
from .rotations import Rotation, decode, encode, interpolate, is_rotation

SNAP = 1e-4
"""Times closer to a recorded row than this share of its interval are that row: clocks like 1/30 s are not exact."""

MAX_GAP = 2.5
"""Rows further apart than this many median intervals have a hole between them: one lost row is bridged, two are not."""

RowTimes = float | Float64[np.ndarray, "n"]
"""When an episode's rows were recorded: at a constant rate from time 0 on, or each row's own time in seconds."""

PLAIN = SlotRules()


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
    """Control rows of one clip. Rows outside `spans` repeat the last valid value and must not be trained on.

    (A delta after the recording's end repeats nothing: it is no change.)
    """

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
    recorded: RowTimes,
    clock: ClipClock,
    robot: Embodiment,
) -> AlignedControl:
    """The clip's rows of an episode's, which were `recorded` at a constant rate or at times of their own."""
    times, rules = clock.action_times_s, robot.action_rules()
    rows, is_valid = resample(actions, recorded, times, rules)
    if rules.deltas:
        slots = list(rules.deltas)
        changes, is_complete = resample_deltas(actions, recorded, times, 1 / clock.control_hz, rules)
        rows[:, slots] = changes[:, slots]
        is_valid &= is_complete
    states = None
    if proprio is not None and proprio.shape[1]:
        states, _ = resample(proprio, recorded, times, robot.proprio_rules())
    return AlignedControl(rows, states, spans(is_valid))


def resample(
    values: Float32[np.ndarray, "n d"], recorded: RowTimes, times_s: Float64[np.ndarray, "k"], rules: SlotRules = PLAIN
) -> tuple[Float32[np.ndarray, "k d"], Bool[np.ndarray, "k"]]:
    """Values at `times_s`, and which of them rest on recorded, usable rows.

    Between two rows numbers are interpolated linearly, wrapping angles the short way round and rotations on the sphere;
    `held` slots keep the earlier row's value: half a gripper command is neither open nor closed. In a hole of the
    recording and after its end the last row's values stay, marked invalid.
    """
    filled, is_usable = _fill_forward(values, rules)
    place = _RowClock.of(recorded, len(values)).place(times_s)
    first = place.lower.clip(0, len(values) - 1)
    second = np.where(place.share > 0, place.lower + 1, place.lower).clip(0, len(values) - 1)
    share = np.where(place.is_recorded & (first < second), place.share, 0.0).astype(np.float32)
    start, end = filled[first], filled[second]
    result = start + share[:, None] * (end - start)
    for slot, full_turn in rules.full_turn:
        result[:, slot] = _between_angles(start[:, slot], end[:, slot], share, full_turn)
    between = np.flatnonzero(share)  # elsewhere the recorded rows stay as they are, to the bit
    for group in rules.rotations if len(between) else ():
        turned = interpolate(_decode(start[between], group), _decode(end[between], group), share[between])
        _set(result, between, group, _encode(turned, group, near=start[between]))
    held = list(rules.held)
    result[:, held] = start[:, held]
    return result, place.is_recorded & is_usable[first] & is_usable[second]


def resample_deltas(
    values: Float32[np.ndarray, "n d"],
    recorded: RowTimes,
    times_s: Float64[np.ndarray, "k"],
    step_s: float,
    rules: SlotRules = PLAIN,
) -> tuple[Float32[np.ndarray, "k d"], Bool[np.ndarray, "k"]]:
    """The change in each step from `times_s` on, where row i is the change until row i + 1; and which are complete.

    A row's change is spread evenly over its interval. A longer step adds up the rows, and shares of rows, that fall in
    it; a shorter one takes its share of a row. Rotations are composed: in the tool frame a later turn is about the axes
    that the earlier ones have turned, in every other frame about fixed axes. Positions are added up even in the tool
    frame, although its axes turn a little between the rows: off by no more than the step's length times its angle.
    """
    filled, is_usable = _fill_forward(values, rules)
    clock = _RowClock.of(recorded, len(values))
    begin, end = clock.place(times_s), clock.place(times_s + step_s)
    rows = np.arange(
        begin.lower.min(initial=len(values)).clip(0), end.lower.max(initial=-1).clip(max=len(values) - 1) + 1
    )
    shares = (end.position[:, None] - rows).clip(0, 1) - (begin.position[:, None] - rows).clip(0, 1)  # k m
    result = (shares @ filled[rows].astype(np.float64)).astype(np.float32)
    is_mixed = np.flatnonzero(((shares > 0) & (shares < 1)).any(axis=1) | (np.count_nonzero(shares, axis=1) != 1))
    for group in rules.rotations if len(is_mixed) else ():
        composed = _compose(_decode(filled[rows], group), shares[is_mixed], rules.turns_with_tool)
        _set(result, is_mixed, group, _encode(composed, group, near=result[is_mixed]))
    is_sound = (is_usable & clock.is_unbroken)[rows]
    is_covered = (begin.position >= 0) & (end.position <= len(values))
    return result, is_covered & ~((shares > 0) & ~is_sound).any(axis=1)


def row_times_problem(times_s: Float64[np.ndarray, "n"] | None, num_rows: int) -> str | None:
    """Why rows cannot have been recorded at these times, as a sentence; None if they can."""
    if times_s is None:
        return None
    if times_s.shape != (num_rows,):
        return f"{list(times_s.shape)} control times for {num_rows} rows"
    if not np.isfinite(times_s).all():
        return "some control times are no finite numbers"
    intervals = np.diff(times_s)
    if (intervals < 0).any():
        return f"control times run backwards after row {int(np.argmax(intervals < 0))}"
    if len(intervals) and np.median(intervals) == 0:
        return "more than half of the control rows have the time of the row before"
    return None


def spans(is_valid: Bool[np.ndarray, "k"]) -> tuple[tuple[int, int], ...]:
    """The runs of True as (first, end)."""
    if is_valid.all():  # as nearly always
        return ((0, len(is_valid)),) if len(is_valid) else ()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_valid, [False]]).astype(np.int8)))
    return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))


def spans_mask(valid: Collection[tuple[int, int]], num_rows: int) -> Bool[np.ndarray, "k"]:
    """The inverse of `spans`."""
    mask = np.zeros(num_rows, dtype=bool)
    for first, end in valid:
        mask[first:end] = True
    return mask


def relative_actions(
    actions: Float32[np.ndarray, "k a"], proprio_at_start: Float32[np.ndarray, "s"] | None, robot: Embodiment
) -> Float32[np.ndarray, "k a"]:
    """Targets as seen from the proprio at the clip's first frame, in the slots that both name alike.

    Single numbers are differences (of wrapping angles the short one), rotations the turn from there, start^-1 target.
    Other slots, grippers, deltas and velocities stay as they are.
    """
    if proprio_at_start is None:
        return actions
    relative = actions.copy()
    full_turn = dict(robot.action_rules().full_turn)
    for slot, sensed in robot.relative_slots():
        relative[:, slot] -= proprio_at_start[sensed]
        if slot in full_turn:
            relative[:, slot] = _short_way(relative[:, slot], full_turn[slot])
    for group, sensed_group in robot.relative_rotations():
        turn = _decode(proprio_at_start[None], sensed_group).inv() * _decode(actions, group)
        _set(relative, np.arange(len(actions)), group, _encode(turn, group))
    return relative


def absolute_actions(
    relative: Float32[np.ndarray, "k a"], proprio_at_start: Float32[np.ndarray, "s"] | None, robot: Embodiment
) -> Float32[np.ndarray, "k a"]:
    """The inverse of `relative_actions`: targets that a robot can be sent.

    Angles come back near the proprio they started from, so a wrapping one can be a full turn away from the original.
    """
    if proprio_at_start is None:
        return relative
    actions = relative.copy()
    for slot, sensed in robot.relative_slots():
        actions[:, slot] += proprio_at_start[sensed]
    for group, sensed_group in robot.relative_rotations():
        start = _decode(proprio_at_start[None], sensed_group)
        near = np.zeros_like(relative)
        _set(near, np.arange(len(near)), group, _encode(start, group).repeat(len(near), axis=0))
        _set(actions, np.arange(len(actions)), group, _encode(start * _decode(relative, group), group, near=near))
    return actions


@dataclass(frozen=True)
class _Place:
    """Where times lie among the rows: after the start of row `lower` by `share` of the way to the next."""

    lower: Int64[np.ndarray, "k"]  # -1: before the first row; the number of rows: after the last row's interval
    share: Float64[np.ndarray, "k"]
    is_recorded: Bool[np.ndarray, "k"]  # neither before, nor after, nor in a hole

    @property
    def position(self) -> Float64[np.ndarray, "k"]:
        return self.lower + self.share


@dataclass(frozen=True)
class _RowClock:
    """Row i lasts from `edges_s[i]` to `edges_s[i + 1]`."""

    edges_s: Float64[np.ndarray, "n+1"]
    interval_s: float
    is_unbroken: Bool[np.ndarray, "n"]  # no hole follows the row

    @classmethod
    def of(cls, recorded: RowTimes, num_rows: int) -> Self:
        if isinstance(recorded, np.ndarray):
            interval = float(np.median(np.diff(recorded))) if len(recorded) > 1 else 0.0
            edges = np.append(recorded, recorded[-1] + interval)
        else:
            interval = 1 / recorded
            edges = np.arange(num_rows + 1) / recorded
        return cls(edges, interval, np.diff(edges) <= MAX_GAP * interval)

    def place(self, times_s: Float64[np.ndarray, "k"]) -> _Place:
        snap, num_rows = SNAP * self.interval_s, len(self.is_unbroken)
        lower = np.searchsorted(self.edges_s, times_s + snap, side="right") - 1
        row = lower.clip(0, num_rows - 1)
        offset = times_s - self.edges_s[lower.clip(0)]
        length = np.append(np.diff(self.edges_s), self.interval_s)[lower.clip(0)]
        share = np.where(offset > snap, offset / np.where(length > 0, length, 1.0), 0.0)
        is_recorded = (lower >= 0) & (lower < num_rows) & (self.is_unbroken[row] | (share == 0))
        return _Place(lower, share, is_recorded)


def _fill_forward(
    values: Float32[np.ndarray, "n d"], rules: SlotRules
) -> tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, "n"]]:
    """Unusable rows replaced by the last usable one (zeros before the first), and which were usable.

    Unusable are rows with NaN or infinity, and with a rotation that is none, such as a quaternion of zeros.
    """
    is_usable = np.isfinite(values).all(axis=1)
    for group in rules.rotations:
        is_usable &= is_rotation(values[:, list(group.slots)], group.format)
    if is_usable.all():
        return values, is_usable
    last_usable = np.maximum.accumulate(np.where(is_usable, np.arange(len(values)), -1))
    return np.where(last_usable[:, None] >= 0, values[last_usable], np.float32(0)), is_usable


def _between_angles(
    start: Float32[np.ndarray, "k"], end: Float32[np.ndarray, "k"], share: Float32[np.ndarray, "k"], full_turn: float
) -> Float32[np.ndarray, "k"]:
    """Counted from the nearer end, so that the result stays in the range that the angles are recorded in."""
    way = _short_way(end - start, full_turn)
    return np.where(share < 0.5, start + share * way, end - (1 - share) * way)


def _short_way(difference: Float32[np.ndarray, "k"], full_turn: float) -> Float32[np.ndarray, "k"]:
    return (difference - full_turn * np.round(difference / full_turn)).astype(np.float32)


def _compose(rotations: Rotation, shares: Float64[np.ndarray, "k m"], turns_with_tool: bool) -> Rotation:
    """The m rotations one after the other, of each only a share."""
    total = Rotation.from_rotvec(np.zeros((len(shares), 3)))
    for column, rotvec in enumerate(rotations.as_rotvec()):
        turn = Rotation.from_rotvec(shares[:, column, None] * rotvec)
        total = total * turn if turns_with_tool else turn * total
    return total


def _decode(rows: Float32[np.ndarray, "n d"], group: Rotations) -> Rotation:
    return decode(rows[:, list(group.slots)], group.format, group.in_degrees)


def _encode(
    rotations: Rotation, group: Rotations, near: Float32[np.ndarray, "n d"] | None = None
) -> Float64[np.ndarray, "n g"]:
    values_near = None if near is None else near[:, list(group.slots)]
    return encode(rotations, group.format, group.in_degrees, values_near)


def _set(rows: Float32[np.ndarray, "k d"], which: np.ndarray, group: Rotations, values: np.ndarray) -> None:
    rows[which[:, None], np.array(group.slots)] = values
