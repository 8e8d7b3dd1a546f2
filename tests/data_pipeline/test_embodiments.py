from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.loader import dump_config, load_config
from data_pipeline.embodiments import Embodiment, Rotations, dimension_names, embodiment_from_features

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


POSE: dict[str, Any] = {
    "name": "arm",
    "action_names": ("x", "rx", "ry", "rz", "gripper", "spin"),
    "proprio_names": ("rx", "ry", "rz", "x"),
    "control_hz": 10,
}
ROTATION = {"slots": (1, 2, 3), "format": "axis_angle"}
SENSED = {"slots": (0, 1, 2), "format": "euler_xyz_extrinsic"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"action_rotations": [{"slots": (1, 2), "format": "axis_angle"}]}, r"axis_angle takes 3 slots, not \[1, 2\]"),
        ({"action_rotations": [{"slots": (4, 5, 6), "format": "axis_angle"}]}, r"rotation slots .* must lie in 0..5"),
        ({"action_rotations": [ROTATION, {"slots": (3, 4, 5), "format": "axis_angle"}]}, "name one slot twice"),
        ({"gripper_actions": (4, 4)}, "name one slot twice"),
        ({"gripper_actions": (4,), "delta_actions": (4,)}, r"action slots \[4\] cannot be both gripper and delta"),
        ({"delta_actions": (0,), "velocity_actions": (0,)}, "cannot be both delta and velocity"),
        ({"wrapping_actions": (5,), "delta_actions": (5,)}, "cannot be both delta and wrapping"),
        ({"joint_proprio": (9,)}, r"joint slots \[9\] of proprio must lie in 0..3"),
        ({"action_rotations": [ROTATION], "joint_actions": (1,)}, "cannot be both joint and rotation"),
        (
            {"action_rotations": [ROTATION], "proprio_rotations": [SENSED], "delta_actions": (1,)},
            r"delta_actions holds some of the rotation \[1, 2, 3\]",
        ),
        ({"action_rotations": [ROTATION]}, "declare the same names as one rotation in proprio_rotations too"),
        ({"proprio_rotations": [SENSED]}, "declare the same names as one rotation in action_rotations too"),
        (
            {"wrapping_actions": (5,), "action_units": ("m", "rad", "rad", "rad", "1", "m")},
            "slot 5 wraps, but its unit 'm' is no angle",
        ),
        (
            {
                "action_rotations": [ROTATION],
                "proprio_rotations": [SENSED],
                "action_units": ("m", "deg", "rad", "deg", "1", "rad"),
            },
            "mixes degrees and other units",
        ),
        ({"pose_frame": "elbow"}, "base"),
    ],
)
def test_what_slots_mean_must_agree(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Embodiment(**(POSE | fields))


def test_a_whole_layout_survives_yaml(tmp_path: Path) -> None:
    units = ("m", "deg", "deg", "deg", "1", "deg")
    robot = Embodiment(
        **POSE,
        action_units=units,
        gripper_actions=(4,),
        action_rotations=(ROTATION,),
        proprio_rotations=(SENSED,),
        wrapping_actions=(5,),
        joint_actions=(5,),
        pose_frame="tool",
    )
    path = tmp_path / "robot.yaml"
    path.write_text(dump_config(robot))
    assert load_config(Embodiment, path) == robot
    rules = robot.action_rules()
    assert rules.held == (4,) and rules.full_turn == ((5, 360.0),) and rules.turns_with_tool
    assert rules.rotations == (Rotations((1, 2, 3), "axis_angle", True),)
    assert robot.relative_slots() == ((0, 3),)
    assert robot.relative_rotations() == ((rules.rotations[0], Rotations((0, 1, 2), "euler_xyz_extrinsic", False)),)


def test_a_layout_from_before_these_fields_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(
        "name: arm\naction_names: [x, gripper]\nproprio_names: [x]\ncontrol_hz: 15.0\naction_units: [m, '1']\n"
        "proprio_units: null\ngripper_actions: [1]\n"
    )
    robot = load_config(Embodiment, path)
    assert robot.action_rules().held == (1,) and robot.relative_slots() == ((0, 0),)


def test_a_rotation_delta_needs_no_partner() -> None:
    robot = Embodiment(**POSE, action_rotations=(ROTATION,), delta_actions=(0, 1, 2, 3))
    assert robot.relative_slots() == robot.relative_rotations() == ()
