"""Each robot's action and proprio layout, as data.

A new robot is a block of YAML, never a code change: a reader derives the block from what the recording says about
itself, and a config can override it where the recording is silent or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveFloat, model_validator

from configs.loader import StrictConfig


class Embodiment(StrictConfig):
    """A robot type: what each number of its actions and proprio is, and how often they come."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="key of the robot type in samples and statistics")
    action_names: tuple[str, ...] = Field(description="one name per action dimension, in order")
    proprio_names: tuple[str, ...] = Field(description="one name per proprio dimension, in order")
    control_hz: PositiveFloat = Field(description="rate of actions and proprio")
    action_units: tuple[str, ...] | None = Field(
        default=None, description="one unit per action dimension (rad, m, ...)"
    )
    proprio_units: tuple[str, ...] | None = Field(default=None, description="one unit per proprio dimension")
    gripper_actions: tuple[int, ...] = Field(
        default=(), description="action dimensions that command a gripper: held, never interpolated, when resampled"
    )

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def proprio_dim(self) -> int:
        return len(self.proprio_names)

    @model_validator(mode="after")
    def _lengths_agree(self) -> Embodiment:
        for units, names, field in (
            (self.action_units, self.action_names, "action_units"),
            (self.proprio_units, self.proprio_names, "proprio_units"),
        ):
            if units is not None and len(units) != len(names):
                raise ValueError(f"{field} has {len(units)} entries for {len(names)} names")
        if any(not 0 <= dim < self.action_dim for dim in self.gripper_actions):
            raise ValueError(f"gripper_actions {self.gripper_actions} must lie in 0..{self.action_dim - 1}")
        return self


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
