"""Each robot's action and proprio layout, as data.

A new robot is a block of YAML, never a code change: a reader derives the block from what the recording says about
itself, `doctor` proposes the rest from the numbers (`embodiment_proposal.py`), and a config can override it where the
recording is silent or wrong. What each field changes:

- **resampling** to another control rate (`align.py`): targets and velocities are interpolated, rotations on the sphere,
  wrapping joints the short way; grippers keep the last command; deltas are added up over the new, longer step or split
  among shorter ones (rotations: composed), so that the motion stays the same;
- **relative actions** (to the proprio at a clip's first frame): targets that proprio names alike, as a difference, or
  for rotations as the rotation from there. Grippers, deltas and velocities stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from configs.loader import StrictConfig

from .rotations import FORMATS, NUM_VALUES, RotationFormat

PoseFrame = Literal["base", "world", "camera", "tool"]

DEGREES = ("deg", "degree", "degrees", "°")
ANGLE_UNITS = (*DEGREES, "rad", "radian", "radians")


class RotationSlots(StrictConfig):
    """Dimensions that together are one rotation."""

    slots: tuple[int, ...] = Field(description="the dimensions, in the order that the format has them")
    format: RotationFormat = Field(
        description="; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
        + ". Angles in radians, unless the units of the slots are deg"
    )

    @model_validator(mode="after")
    def _size_fits(self) -> RotationSlots:
        if len(self.slots) != NUM_VALUES[self.format]:
            raise ValueError(f"{self.format} takes {NUM_VALUES[self.format]} slots, not {list(self.slots)}")
        return self


@dataclass(frozen=True)
class Rotations:
    """One `RotationSlots`, with its unit."""

    slots: tuple[int, ...]
    format: RotationFormat
    in_degrees: bool


@dataclass(frozen=True)
class SlotRules:
    """How the columns of actions, or of proprio, are resampled. A column that none of this names is interpolated."""

    held: tuple[int, ...] = ()
    deltas: tuple[int, ...] = ()
    turns_with_tool: bool = False  # a rotation delta is about the axes of the tool, not about fixed ones
    full_turn: tuple[tuple[int, float], ...] = ()  # (slot, a full turn in its unit) of what wraps
    rotations: tuple[Rotations, ...] = ()


class Embodiment(StrictConfig):
    """A robot type: what each number of its actions and proprio is, and how often they come. Slots count from 0."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="key of the robot type in samples and statistics")
    action_names: tuple[str, ...] = Field(description="one name per action dimension, in order")
    proprio_names: tuple[str, ...] = Field(description="one name per proprio dimension, in order")
    control_hz: PositiveFloat = Field(description="rate of actions and proprio")
    action_units: tuple[str, ...] | None = Field(
        default=None, description="one unit per action dimension (rad, deg, m, ...); angles without one are radians"
    )
    proprio_units: tuple[str, ...] | None = Field(default=None, description="one unit per proprio dimension")
    gripper_actions: tuple[int, ...] = Field(
        default=(), description="action dimensions that command a gripper: held, never interpolated, when resampled"
    )
    delta_actions: tuple[int, ...] = Field(
        default=(),
        description="action dimensions that command a change per control step, not a target: added up (rotations: "
        "composed) over a longer step, split among shorter ones",
    )
    velocity_actions: tuple[int, ...] = Field(
        default=(), description="action dimensions that command a speed (m/s, rad/s): interpolated, never relative"
    )
    joint_actions: tuple[int, ...] = Field(
        default=(), description="action dimensions that command a joint, not a pose in the pose_frame"
    )
    joint_proprio: tuple[int, ...] = Field(default=(), description="proprio dimensions that are joint positions")
    wrapping_actions: tuple[int, ...] = Field(
        default=(),
        description="action dimensions that are one angle which starts over after a full turn (a continuous joint, a "
        "base's heading): interpolated and subtracted the short way round; all other angles end where they end",
    )
    wrapping_proprio: tuple[int, ...] = Field(default=(), description="proprio dimensions that wrap in the same way")
    action_rotations: tuple[RotationSlots, ...] = Field(
        default=(), description="action dimensions that together are a rotation (a target, or all of them a delta)"
    )
    proprio_rotations: tuple[RotationSlots, ...] = Field(
        default=(), description="proprio dimensions that together are a rotation"
    )
    pose_frame: PoseFrame | None = Field(
        default=None,
        description="the frame that positions and rotations are given in; rotation deltas in the tool frame are "
        "composed about its own axes, in any other about fixed ones; null: unknown, or no poses",
    )

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def proprio_dim(self) -> int:
        return len(self.proprio_names)

    def action_rules(self) -> SlotRules:
        return SlotRules(
            held=self.gripper_actions,
            deltas=self.delta_actions,
            turns_with_tool=self.pose_frame == "tool",
            full_turn=_full_turns(self.wrapping_actions, self.action_units),
            rotations=_with_units(self.action_rotations, self.action_units),
        )

    def proprio_rules(self) -> SlotRules:
        return SlotRules(
            full_turn=_full_turns(self.wrapping_proprio, self.proprio_units),
            rotations=_with_units(self.proprio_rotations, self.proprio_units),
        )

    def relative_slots(self) -> tuple[tuple[int, int], ...]:
        """(action slot, proprio slot) of the single targets that both name alike."""
        left_out = {*self.gripper_actions, *self.delta_actions, *self.velocity_actions, *_slots(self.action_rotations)}
        return tuple(
            (slot, self.proprio_names.index(name))
            for slot, name in enumerate(self.action_names)
            if slot not in left_out and name in self.proprio_names
        )

    def relative_rotations(self) -> tuple[tuple[Rotations, Rotations], ...]:
        """(of actions, of proprio) of the rotation targets that both name alike."""
        sensed = {frozenset(_named(one.slots, self.proprio_names)): one for one in self.proprio_rules().rotations}
        commanded = {frozenset(_named(one.slots, self.action_names)): one for one in self.action_rules().rotations}
        return tuple(
            (one, sensed[names])
            for names, one in commanded.items()
            if names in sensed and one.slots[0] not in self.delta_actions
        )

    @model_validator(mode="after")
    def _is_sound(self) -> Embodiment:
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def _problems(robot: Embodiment) -> Iterator[str]:
    """What contradicts itself, as sentences. Later ones take the earlier ones' promises for granted."""
    yield from _part_problems("action", robot.action_names, robot.action_units, _kinds_of_actions(robot))
    yield from _part_problems("proprio", robot.proprio_names, robot.proprio_units, _kinds_of_proprio(robot))
    for part, units, rotations in (
        ("action", robot.action_units, robot.action_rotations),
        ("proprio", robot.proprio_units, robot.proprio_rotations),
    ):
        for one in rotations:
            if len({_is_degrees(slot, units) for slot in one.slots}) > 1:
                yield f"{part}_units mixes degrees and other units within the rotation {list(one.slots)}"
    for one in robot.action_rotations:
        if 0 < len(set(one.slots) & set(robot.delta_actions)) < len(one.slots):
            yield f"delta_actions holds some of the rotation {list(one.slots)}; it is a delta as a whole or not at all"
    yield from _half_declared_rotations(robot)


def _kinds_of_actions(robot: Embodiment) -> dict[str, tuple[int, ...]]:
    return {
        "gripper": robot.gripper_actions,
        "delta": robot.delta_actions,
        "velocity": robot.velocity_actions,
        "joint": robot.joint_actions,
        "wrapping": robot.wrapping_actions,
        "rotation": _slots(robot.action_rotations),
    }


def _kinds_of_proprio(robot: Embodiment) -> dict[str, tuple[int, ...]]:
    return {
        "joint": robot.joint_proprio,
        "wrapping": robot.wrapping_proprio,
        "rotation": _slots(robot.proprio_rotations),
    }


_MAY_SHARE = ({"joint", "wrapping"}, {"joint", "delta"}, {"joint", "velocity"}, {"delta", "rotation"})


def _part_problems(
    part: str, names: Sequence[str], units: Sequence[str] | None, kinds: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    if units is not None and len(units) != len(names):
        yield f"{part}_units has {len(units)} entries for {len(names)} names"
    for kind, slots in kinds.items():
        if any(not 0 <= slot < len(names) for slot in slots):
            yield f"{kind} slots {list(slots)} of {part} must lie in 0..{len(names) - 1}"
        if len(set(slots)) < len(slots):
            yield f"{kind} slots {list(slots)} of {part} name one slot twice"
    for (one, slots), (other, others) in combinations(kinds.items(), 2):
        both = sorted(set(slots) & set(others))
        if both and {one, other} not in _MAY_SHARE:
            yield f"{part} slots {both} cannot be both {one} and {other}"
    for slot in kinds["wrapping"]:
        if units is not None and units[slot].lower() not in ANGLE_UNITS:
            yield f"{part} slot {slot} wraps, but its unit {units[slot]!r} is no angle (rad, deg)"


def _half_declared_rotations(robot: Embodiment) -> Iterator[str]:
    """A target that is a rotation in the actions and bare numbers in proprio (or the other way) cannot be relative."""
    paired = {name for one, _ in robot.relative_rotations() for name in _named(one.slots, robot.action_names)}
    deltas = {robot.action_names[slot] for slot in (*robot.delta_actions, *robot.velocity_actions)}
    commanded = set(_named(_slots(robot.action_rotations), robot.action_names)) - paired - deltas
    sensed = set(_named(_slots(robot.proprio_rotations), robot.proprio_names)) - paired - deltas
    for names, others, field in (
        (commanded, robot.proprio_names, "proprio_rotations"),
        (sensed, robot.action_names, "action_rotations"),
    ):
        both = sorted(names.intersection(others))
        if both:
            yield (
                f"{', '.join(both)} are part of a rotation on one side and also named on the other: declare the same "
                f"names as one rotation in {field} too, or name them differently"
            )


def _slots(rotations: Sequence[RotationSlots]) -> tuple[int, ...]:
    return tuple(slot for one in rotations for slot in one.slots)


def _named(slots: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names[slot] for slot in slots)


def _is_degrees(slot: int, units: Sequence[str] | None) -> bool:
    return units is not None and units[slot].lower() in DEGREES


def _full_turns(slots: Sequence[int], units: Sequence[str] | None) -> tuple[tuple[int, float], ...]:
    return tuple((slot, 360.0 if _is_degrees(slot, units) else 2 * math.pi) for slot in slots)


def _with_units(rotations: Sequence[RotationSlots], units: Sequence[str] | None) -> tuple[Rotations, ...]:
    return tuple(Rotations(one.slots, one.format, _is_degrees(one.slots[0], units)) for one in rotations)


def embodiment_from_features(
    name: str, action_feature: dict[str, Any], proprio_feature: dict[str, Any] | None, control_hz: float
) -> Embodiment:
    """The layout that a LeRobot `features` block describes: `{"shape": [a], "names": ...}` for actions and proprio."""
    action_names = dimension_names(action_feature, "action")
    return Embodiment(
        name=name,
        action_names=action_names,
        proprio_names=dimension_names(proprio_feature, "proprio") if proprio_feature else (),
        control_hz=control_hz,
        gripper_actions=tuple(i for i, text in enumerate(action_names) if "gripper" in text.lower()),
    )


def dimension_names(feature: dict[str, Any], prefix: str) -> tuple[str, ...]:
    """One name per dimension. Recorders write a list, nested lists, `{"axes": [...]}`, `{name: index}` or nothing."""
    num_dims = 1
    for size in feature.get("shape") or (1,):
        num_dims *= int(size)
    names = _flatten(feature.get("names"))
    if len(names) != num_dims or len(set(names)) != num_dims:
        return tuple(f"{prefix}_{i}" for i in range(num_dims))
    return tuple(names)


def _flatten(names: Any) -> list[str]:
    if isinstance(names, dict):
        if names and all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=lambda key: names[key])
        return [name for value in names.values() for name in _flatten(value)]
    if isinstance(names, Sequence) and not isinstance(names, str):
        return [name for value in names for name in _flatten(value)]
    return [] if names is None else [str(names)]
