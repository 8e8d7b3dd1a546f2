"""What names and numbers give away about a robot: recordings made here, whose layout is known, and real ones."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.embodiment_proposal import propose_embodiment
from data_pipeline.embodiments import Embodiment, RotationSlots
from data_pipeline.rotations import Rotation, encode
from data_pipeline.sources import LeRobotConfig, open_source

seeds = st.integers(0, 2**32 - 1)
XYZ = ("x", "y", "z")


def generic(prefix, dim):
    return tuple(f"{prefix}_{i}" for i in range(dim))


def walk(rng, rows, dim, step=0.02):
    return np.cumsum(rng.normal(0, step, (rows, dim)), axis=0)


def turning(rng, rows):
    return Rotation.from_rotvec([0.3, 0, 0]) * Rotation.from_rotvec(walk(rng, rows, 3, 0.15))


def propose(actions, proprio=None, action_names=None, proprio_names=None, hz=10.0, **declared):
    action_names = action_names or generic("action", actions.shape[1])
    if proprio is not None and proprio_names is None:
        proprio_names = generic("proprio", proprio.shape[1])
    episodes = None if proprio is None else [proprio[:40].astype(np.float32), proprio[40:].astype(np.float32)]
    recorded = Embodiment(
        name="arm", action_names=action_names, proprio_names=proprio_names or (), control_hz=hz, **declared
    )
    return propose_embodiment(recorded, [actions[:40].astype(np.float32), actions[40:].astype(np.float32)], episodes)


@given(st.sampled_from(["quaternion_xyzw", "six_d_columns"]), st.integers(0, 3), seeds)
def test_unnamed_rotations_are_found_by_their_shape(form, place, seed):
    rng = np.random.default_rng(seed)
    rotation = encode(turning(rng, 80), form)
    actions = np.concatenate([walk(rng, 80, place), rotation, walk(rng, 80, 2)], axis=1)
    robot, why = propose(actions)
    slots = tuple(range(place, place + rotation.shape[1]))
    assert robot.action_rotations == (RotationSlots(slots=slots, format=form),)
    assert any("check whether" in sentence for sentence in why) and "pose_frame" in why[-1]


@pytest.mark.parametrize(
    ("names", "slots", "form"),
    [
        (("qx", "qy", "qz", "qw"), (0, 1, 2, 3), "quaternion_xyzw"),
        (("left_qw", "left_qx", "left_qy", "left_qz"), (0, 1, 2, 3), "quaternion_wxyz"),
        (("ee.quat.x", "ee.quat.y", "ee.quat.z", "ee.quat.w"), (0, 1, 2, 3), "quaternion_xyzw"),
        (("roll", "pitch", "yaw"), (0, 1, 2), "euler_xyz_extrinsic"),
        (("tcp_rotvec_x", "tcp_rotvec_y", "tcp_rotvec_z"), (0, 1, 2), "axis_angle"),
    ],
)
def test_named_rotations(names, slots, form):
    rows = encode(turning(np.random.default_rng(0), 80), form)
    robot, _ = propose(rows, action_names=names)
    assert robot.action_rotations == (RotationSlots(slots=slots, format=form),)


@pytest.mark.parametrize("form", ["axis_angle", "euler_xyz_extrinsic"])
@pytest.mark.parametrize("in_degrees", [False, True])
def test_rx_ry_rz_are_what_turns_smoothly(form, in_degrees):
    times = np.linspace(0, 6 * np.pi, 200)
    rotations = Rotation.from_rotvec(np.outer(times, [0, 0.6, 0.8])) * Rotation.from_rotvec([np.pi / 2, 0, 0])
    robot, why = propose(encode(rotations, form, in_degrees), action_names=("rx", "ry", "rz"))
    assert [one.format for one in robot.action_rotations] == [form] and "from one row to the next" in why[0]
    assert robot.action_units == (("deg",) * 3 if in_degrees else ("rad",) * 3)


def test_a_wrists_roll_pitch_and_yaw_are_three_joints():
    names = ("kLeftWristRoll", "kLeftWristPitch", "kLeftWristYaw", "left.joint_1.pos")
    robot, _ = propose(walk(np.random.default_rng(0), 80, 4, 0.1), action_names=names)
    assert robot.action_rotations == () and robot.joint_actions == (0, 1, 2, 3) and robot.action_units == ("rad",) * 4


def test_grippers_joints_and_units():
    rng = np.random.default_rng(0)
    actions = np.concatenate(
        [walk(rng, 80, 2), 60 * walk(rng, 80, 1), rng.integers(0, 2, (80, 2)), 300 + walk(rng, 80, 1)], axis=1
    )
    robot, why = propose(actions, action_names=("j1", "shoulder.pos", "j3", "gripper", "mode", "x"))
    assert robot.gripper_actions == (3, 4) and robot.joint_actions == (0, 1, 2)
    assert robot.action_units == ("deg", "deg", "deg", "", "", "mm")
    assert any("only ever has two values" in sentence for sentence in why)


def test_units_are_left_open_where_a_scale_is_its_own():
    rng = np.random.default_rng(0)
    share, byte, arm = rng.uniform(size=80), rng.integers(0, 256, 80), rng.uniform(-2, 2, (80, 2))
    names = ("joint_0", "joint_1", "joint_2", "joint_3", "left_hand.joint_0", "kFingerIndex", "x", "y")
    robot, why = propose(np.column_stack([arm, share, byte, arm, share, byte]), action_names=names)
    assert robot.action_units == ("rad", "rad", *[""] * 6) and robot.joint_actions == (0, 1, 2, 3, 4, 5)
    (reason,) = [sentence for sentence in why if sentence.startswith("units")]
    assert reason.startswith("units of action 0-1: rad, because") and reason.endswith("check.")


def test_positions_have_one_unit():
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.uniform(size=80), rng.uniform(-1, 1, 80), rng.uniform(size=80)])
    assert propose(rows, action_names=XYZ)[0].action_units == ("m", "m", "m")
    assert propose(np.abs(rows), action_names=XYZ)[0].action_units is None


def test_units_are_not_guessed_for_deltas_and_velocities():
    robot, why = propose(walk(np.random.default_rng(0), 80, 2), action_names=("delta_x", "joint_0_vel"))
    assert robot.action_units is None and not any(sentence.startswith("units") for sentence in why)


@pytest.mark.parametrize("unit", ["rad", "deg"])
def test_a_wrapping_joint_is_seen_to_wrap(unit):
    full_turn = 360 if unit == "deg" else 2 * np.pi
    angles = (np.linspace(0, 2.4, 80) % 1 - 0.5) * full_turn
    rows = np.column_stack([angles, 0.4 * full_turn * np.sin(np.linspace(0, 9, 80))])
    robot, why = propose(rows, rows, action_names=("joint_0", "joint_1"), proprio_names=("joint_0", "joint_1"))
    assert robot.wrapping_actions == robot.wrapping_proprio == (0,)
    assert robot.action_units == (unit, unit) and any("wraps" in sentence for sentence in why)


@given(st.sampled_from(["target", "delta", "velocity"]), st.booleans(), seeds)
def test_targets_deltas_and_velocities_are_told_apart(kind, is_named, seed):
    rng = np.random.default_rng(seed)
    state = np.cumsum(walk(rng, 80, 3, 0.005), axis=0)
    change = np.diff(state, axis=0, append=state[-1:])
    actions = {"target": state + change, "delta": 5 * change, "velocity": change * 10.0}[kind]
    actions = actions + rng.normal(0, 0.05 * actions.std(), actions.shape)
    if kind != "target":  # the last row of an episode is followed by none
        actions[39] = actions[-1] = 0
    names = XYZ if is_named else None
    robot, _ = propose(actions, state, action_names=names, proprio_names=names)
    assert robot.delta_actions == ((0, 1, 2) if kind == "delta" else ())
    assert robot.velocity_actions == ((0, 1, 2) if kind == "velocity" else ())


@pytest.mark.parametrize("names", [(*XYZ, "rx", "ry", "rz", "gripper"), generic("action", 7)])
@pytest.mark.parametrize("num_targets", [0, 1, 4])
def test_a_pose_is_a_delta_as_a_whole_or_a_person_is_asked(names, num_targets):
    rng = np.random.default_rng(0)
    state = np.cumsum(walk(rng, 81, 6, 0.005), axis=0)
    actions = 5 * np.diff(state, axis=0)
    actions[:, :num_targets] = state[1:, :num_targets]
    actions[39] = actions[-1] = 0
    robot, why = propose(np.column_stack([actions, np.arange(80) % 2]), state[:80], names, names[:6])
    assert robot.delta_actions == ((0, 1, 2, 3, 4, 5) if num_targets == 0 else ()) and robot.gripper_actions == (6,)
    asked = any("Actions 0-5 look partly like deltas: decide before building" in sentence for sentence in why)
    assert asked == (num_targets > 0)


def test_what_never_moves_is_of_its_poses_kind():
    state = np.cumsum(walk(np.random.default_rng(0), 81, 3, 0.005), axis=0)
    actions = 5 * np.diff(state, axis=0)
    actions[:, 1] = actions[39] = actions[-1] = 0
    robot, _ = propose(actions, state[:80], XYZ, XYZ)
    assert robot.delta_actions == (0, 1, 2)


def test_names_tell_the_kind_too():
    rng = np.random.default_rng(0)
    names = ("delta_x", "d_yaw", "dz", "base_vel_x", "vy", "w_z", "index_0")
    robot, _ = propose(walk(rng, 80, 7), action_names=names)
    assert robot.delta_actions == (0, 2) and robot.velocity_actions == (3, 4)


def test_without_proprio_a_person_is_asked():
    _, why = propose(walk(np.random.default_rng(0), 80, 2))
    assert any("check that it is no delta" in sentence for sentence in why)


@given(st.booleans(), seeds)
def test_a_rotation_is_one_on_both_sides_or_on_neither(is_whole, seed):
    rng = np.random.default_rng(seed)
    rotvec = encode(turning(rng, 80), "axis_angle")
    names = ("rx", "ry", "rz") if is_whole else ("rx", "ry", "force")
    robot, _ = propose(rotvec, np.zeros((80, 3)), action_names=("rx", "ry", "rz"), proprio_names=names)
    assert len(robot.action_rotations) == len(robot.proprio_rotations) == int(is_whole)


@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 40), seeds)
def test_any_numbers_give_a_layout(action_dim, proprio_dim, rows, seed):
    rng = np.random.default_rng(seed)
    words = ["x", "y", "z", "rx", "ry", "rz", "qx", "qy", "qz", "qw", "gripper", "joint", "roll", "pitch", "yaw", "dx"]
    actions, proprio = rng.normal(0, 3, (rows, action_dim)), rng.normal(0, 3, (rows, proprio_dim))
    actions[rng.uniform(size=actions.shape) < 0.02] = np.nan
    propose(
        actions, proprio, tuple(rng.permutation(words)[:action_dim]), tuple(rng.permutation(words)[:proprio_dim])
    )  # fmt: skip


def test_what_the_recording_says_stays_and_is_not_asked_about():
    """robosuite's OSC_POSE: shares of the largest step, so rx, ry and rz are no angles."""
    names = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    rows = walk(np.random.default_rng(0), 80, 7)
    robot, why = propose(rows, action_names=names, delta_actions=tuple(range(6)), gripper_actions=(6,))
    assert (robot.delta_actions, robot.gripper_actions, robot.action_rotations) == (tuple(range(6)), (6,), ())
    assert robot.action_units is None
    assert why[0] == "gripper_actions, delta_actions: as the recording says."
    assert not any("target" in sentence or "because" in sentence for sentence in why)
    described = {"pose_frame": "base", "action_units": ("m",) * 3 + ("deg",) * 3 + ("1",)}
    robot, why = propose(rows, action_names=names, **described)
    assert (robot.pose_frame, robot.action_units) == ("base", described["action_units"])
    assert not any("pose_frame is left open" in sentence for sentence in why)


@given(st.integers(0, 12), st.integers(0, 8), st.integers(0, 40), seeds)
def test_no_guess_contradicts_the_recording(action_dim, proprio_dim, rows, seed):
    rng = np.random.default_rng(seed)
    words = ["x", "y", "z", "rx", "ry", "rz", "qx", "qy", "qz", "qw", "gripper", "joint", "roll", "pitch", "yaw", "dx"]
    action_names, proprio_names = (
        tuple(rng.permutation(words)[:action_dim]),
        tuple(rng.permutation(words)[:proprio_dim]),
    )
    kinds = rng.choice(["", "gripper", "delta", "velocity", "joint", "wrapping"], action_dim)
    declared = {f"{kind}_actions": tuple(np.flatnonzero(kinds == kind).tolist()) for kind in set(kinds) - {""}}
    declared["joint_proprio"] = tuple(np.flatnonzero(rng.uniform(size=proprio_dim) < 0.2).tolist())
    if rng.uniform() < 0.5:
        declared["action_units"] = tuple(rng.choice(["", "m", "rad", "deg"], action_dim).tolist())
    if rng.uniform() < 0.5 and proprio_dim > 2:
        declared["proprio_rotations"] = (RotationSlots(slots=(0, 1, 2), format="axis_angle"),)
    try:
        Embodiment(name="arm", action_names=action_names, proprio_names=proprio_names, control_hz=10, **declared)
    except ValidationError:
        reject()
    sawtooth = np.linspace(-np.pi, 9, rows)[:, None] % (2 * np.pi)
    actions, proprio = rng.normal(0, 3, (rows, action_dim)), rng.normal(0, 3, (rows, proprio_dim))
    actions = np.where(rng.uniform(size=action_dim) < 0.3, sawtooth, actions)
    robot, _ = propose(actions, proprio, action_names, proprio_names, **declared)
    assert {field: getattr(robot, field) for field, value in declared.items() if value} == {
        field: value for field, value in declared.items() if value
    }


def test_nothing_recorded():
    robot, why = propose(np.zeros((0, 2)), action_names=("x", "gripper"))
    assert robot.gripper_actions == (1,) and why


@pytest.mark.parametrize(
    ("folder", "unit", "num_joints"),
    [
        ("g1_real_lerobot_v21_trim", "rad", 26),
        ("gr00t_pnp_lerobot_v2", "rad", 39),
        ("open50_lerobot_v30_trim", "deg", 34),
    ],
)
def test_real_robots(shared_data: Path, folder: str, unit: str, num_joints: int):
    source = open_source(LeRobotConfig(path=shared_data / folder))
    episodes = [source.read_episode(episode_id) for episode_id in source.list_episodes()]
    known = source.embodiment()
    robot, _ = propose_embodiment(
        known,
        [episode.actions for episode in episodes],
        [episode.proprio for episode in episodes],
    )
    assert len(robot.joint_actions) == num_joints and set(robot.action_units) == {unit, ""}
    is_hand = ["hand" in name.lower() for name in known.action_names]
    assert not any(unit for unit, hand in zip(robot.action_units, is_hand, strict=True) if hand)
    assert robot.action_rotations == robot.delta_actions == robot.velocity_actions == robot.wrapping_actions == ()
