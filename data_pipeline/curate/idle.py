"""Idle stretches of a robot's episode: nothing commanded or sensed changes. Half of some recordings is waiting.

A stretch is idle where every action and proprio slot stays within its tolerance for longer than a set time. So a slow
motion is a motion as long as it leads somewhere, and a sensor's noise is none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64
from pydantic import Field, NonNegativeFloat, PositiveFloat

from configs.loader import StrictConfig

from ..embodiments import Embodiment

Span = tuple[float, float]
"""From, until: seconds of the episode."""


class IdleConfig(StrictConfig):
    """Which idle stretches of robot episodes are left out. Off by default: waiting can be what there is to learn."""

    trim: Literal["off", "ends", "everywhere"] = Field(
        "off", description="leave out idle stretches: none, those at an episode's start and end, or pauses too"
    )
    longer_than_s: PositiveFloat = Field(1.0, description="shorter stretches are not idle")
    margin_s: NonNegativeFloat = Field(0.25, description="idle time before a motion that is kept")
    tolerance: NonNegativeFloat = Field(1e-3, description="change of a slot, in its own unit, that is none")
    tolerance_share: NonNegativeFloat = Field(
        0.01, description="the same as a share of the slot's range in the episode; the larger of the two counts"
    )
    tolerances: dict[str, NonNegativeFloat] = Field(
        {}, description="for slots by name, in their own unit: instead of the two above"
    )

    def unknown_slots(self, robots: Iterable[Embodiment]) -> list[str]:
        """Names under `tolerances` that no robot has."""
        return sorted(self.tolerances.keys() - {name for r in robots for name in (*r.action_names, *r.proprio_names)})


@dataclass(frozen=True)
class Activity:
    """An episode without its idle stretches."""

    kept: tuple[Span, ...]  # clips start in these
    left_out: tuple[Span, ...]
    duration_s: float

    def note(self) -> str | None:
        """What was left out, as a sentence for the episode's record."""
        if not self.left_out:
            return None
        starts = sum(end - first for first, end in self.left_out if first <= 0)
        ends = sum(end - first for first, end in self.left_out if first > 0 and end >= self.duration_s)
        pauses = [end - first for first, end in self.left_out if first > 0 and end < self.duration_s]
        parts = [f"{starts:.2f} s at its start"] * (starts > 0) + [f"{ends:.2f} s at its end"] * (ends > 0)
        parts += [f"{sum(pauses):.2f} s in {len(pauses)} pause{'s' * (len(pauses) > 1)}"] * bool(pauses)
        return f"The robot is idle for {', '.join(parts)}, of {self.duration_s:.2f} s: no clip starts there."


def find_activity(
    actions: Float32[np.ndarray, "n a"],
    proprio: Float32[np.ndarray, "n s"] | None,
    times_s: Float64[np.ndarray, "n"],
    duration_s: float,
    robot: Embodiment,
    config: IdleConfig,
) -> Activity:
    """Where a robot's episode of `duration_s` is worth cutting clips from; rows were recorded at `times_s`."""
    values, names = _where_it_is(actions, times_s, robot), list(robot.action_names)
    if proprio is not None and proprio.shape[1]:
        values, names = np.concatenate([values, proprio], axis=1), [*names, *robot.proprio_names]
    idle = idle_spans(values, times_s, _tolerances(values, names, config), config.longer_than_s)
    return keep_active(idle, times_s, duration_s, config)


def idle_spans(
    values: Float64[np.ndarray, "n d"],
    times_s: Float64[np.ndarray, "n"],
    tolerances: Float64[np.ndarray, "d"],
    longer_than_s: float,
) -> list[Span]:
    """Maximal stretches covered by windows of `longer_than_s` in which no value's spread exceeds its tolerance.

    `times_s` is increasing. A row that is not finite is not idle.
    """
    windows = _windows(times_s, longer_than_s)
    if not len(windows):
        return []
    padded = np.concatenate([values, values[-1:]])  # reduceat takes [first, end) from each pair, and end may be n
    edges = np.stack([windows[:, 0], windows[:, 1] + 1], axis=1).ravel()
    highest = np.maximum.reduceat(padded, edges, axis=0)[::2]
    lowest = np.minimum.reduceat(padded, edges, axis=0)[::2]
    is_idle = (highest - lowest <= tolerances).all(axis=1)  # false for NaN
    spans: list[Span] = []
    for first, last in windows[is_idle]:
        start_s, end_s = float(times_s[first]), float(times_s[last])
        if spans and start_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end_s, spans[-1][1]))
        else:
            spans.append((start_s, end_s))
    return spans


def _windows(times_s: Float64[np.ndarray, "n"], length_s: float) -> Int64[np.ndarray, "m 2"]:
    """(first row, last row) of the shortest windows of `length_s` that begin or end with each row, sorted."""
    rows, slack_s = np.arange(len(times_s)), 1e-9
    begin = np.stack([rows, np.searchsorted(times_s, times_s + length_s - slack_s)], axis=1)
    end = np.stack([np.searchsorted(times_s, times_s - length_s + slack_s, side="right") - 1, rows], axis=1)
    windows = np.concatenate([begin[begin[:, 1] < len(rows)], end[end[:, 0] >= 0]])
    return np.unique(windows, axis=0)


def keep_active(idle: list[Span], times_s: Float64[np.ndarray, "n"], duration_s: float, config: IdleConfig) -> Activity:
    """What remains of the episode: outside its rows nothing moves, and the time before a motion is kept."""
    stretched = [
        (0.0 if first <= times_s[0] else first, duration_s if last >= times_s[-1] else last - config.margin_s)
        for first, last in idle
    ]
    left_out = [
        (first, end)
        for first, end in stretched
        if end > first
        and (config.trim == "everywhere" or (config.trim == "ends" and (first <= 0 or end >= duration_s)))
    ]
    edges = [0.0, *(time for span in left_out for time in span), duration_s]
    kept = [(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True) if end > first]
    return Activity(tuple(kept), tuple(left_out), duration_s)


def _where_it_is(
    actions: Float32[np.ndarray, "n a"], times_s: Float64[np.ndarray, "n"], robot: Embodiment
) -> Float64[np.ndarray, "n a"]:
    """Actions with deltas and speeds added up: what they lead to is what changes, however steady they are."""
    values = actions.astype(np.float64)
    is_finite = np.isfinite(values).all(axis=1)
    steps = np.diff(times_s, append=times_s[-1])[:, None]
    for slots, weight in ((robot.delta_actions, 1.0), (robot.velocity_actions, steps)):
        if slots:
            values[:, list(slots)] = np.cumsum(np.nan_to_num(values[:, list(slots)]) * weight, axis=0)
    values[~is_finite] = np.nan
    return values


def _tolerances(values: Float64[np.ndarray, "n d"], names: list[str], config: IdleConfig) -> Float64[np.ndarray, "d"]:
    finite = values[np.isfinite(values).all(axis=1)]
    spread = np.ptp(finite, axis=0) if len(finite) else np.zeros(values.shape[1])
    usual = np.maximum(config.tolerance, config.tolerance_share * spread)
    return np.asarray([config.tolerances.get(name, one) for name, one in zip(names, usual, strict=True)])
