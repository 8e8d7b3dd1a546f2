from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.embodiments import Embodiment, dimension_names, embodiment_from_features

XYZ = ("x", "y", "z")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y", "z"], XYZ),
        ([["x", "y", "z"]], XYZ),
        ([["x", "y"], ["z"]], XYZ),
        ({"axes": ["x", "y", "z"]}, XYZ),
        ({"motors": ["x", "y"], "hand": ["z"]}, XYZ),
        ({"z": 2, "x": 0, "y": 1}, XYZ),
        (None, ("action_0", "action_1", "action_2")),
        (["only_one"], ("action_0", "action_1", "action_2")),
        (["x", "x", "x"], ("action_0", "action_1", "action_2")),
    ],
)
def test_one_name_per_dimension_however_they_are_written(names: Any, expected: tuple[str, ...]) -> None:
    assert dimension_names({"shape": [3], "names": names}, "action") == expected


def test_the_layout_follows_from_the_features() -> None:
    feature = {"shape": [3], "names": ["x", "left_Gripper", "gripper.pos"]}
    embodiment = embodiment_from_features("arm", feature, None, 20)
    assert (embodiment.action_dim, embodiment.proprio_dim) == (3, 0)
    assert embodiment.gripper_actions == (1, 2)


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    good: dict[str, Any] = {"name": "arm", "action_names": XYZ, "proprio_names": ("a",), "control_hz": 10}
    Embodiment(**good, action_units=("m", "m", "m"), gripper_actions=(2,))
    for wrong in (
        {"action_units": ("m",)},
        {"proprio_units": ("m", "m")},
        {"gripper_actions": (3,)},
        {"control_hz": 0},
        {"name": "an arm.v2"},
    ):
        with pytest.raises(ValidationError):
            Embodiment(**(good | wrong))
