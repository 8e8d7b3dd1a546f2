"""Actions on the clip's clock: exact where the clocks agree, bounded where they do not, grippers never in between."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from data_pipeline.align import (
    ClipClock,
    absolute_actions,
    actions_per_frame,
    align_control,
    nearest_frames,
    relative_actions,
    resample,
    resample_deltas,
    row_times_problem,
    spans,
    spans_mask,
)
from data_pipeline.embodiments import Embodiment, Rotations, RotationSlots, SlotRules
from data_pipeline.rotations import NUM_VALUES, decode, encode

rates = st.sampled_from([5.0, 10.0, 12.5, 15.0, 20.0, 24.0, 25.0, 29.97, 30.0, 50.0, 80.0, 200.0])
formats = st.sampled_from(sorted(NUM_VALUES))
seeds = st.integers(0, 2**32 - 1)


def robot(action_dim, proprio_dim=0, **fields):
    fields = {"action_names": [f"a{i}" for i in range(action_dim)]} | fields
    return Embodiment(name="arm", proprio_names=[f"s{i}" for i in range(proprio_dim)], control_hz=10, **fields)


def apart(one, other):
    """Largest angle between rotations, in radians."""
    return float((one.inv() * other).magnitude().max())


def smooth_rotations(rng, count, step=0.2):
    """A walk that turns by about `step` from row to row, all round the sphere."""
    turns = Rotation.from_rotvec(rng.normal(0, step, (count, 3)))
    walk = [Rotation.random(random_state=int(rng.integers(2**31)))]
    for turn in turns[1:]:
        walk.append(turn * walk[-1])
    return Rotation.concatenate(walk)


@given(st.integers(1, 8), rates, st.integers(0, 40), st.integers(1, 4))
def test_a_whole_ratio_gives_the_recorded_rows(ratio, fps, start, blocks):
    rows = np.random.default_rng(0).standard_normal((600, 3)).astype(np.float32)
    clock = ClipClock(start / fps, fps, 1 + 4 * blocks, ratio)
    aligned = align_control(rows, rows[:, :2], fps * ratio, clock, robot(3, 2, gripper_actions=[2]))
    expected = slice(start * ratio, (start + 4 * blocks) * ratio)
    np.testing.assert_array_equal(aligned.actions, rows[expected])
    np.testing.assert_array_equal(aligned.proprio, rows[expected, :2])
    assert aligned.spans == ((0, 4 * blocks * ratio),)


@given(rates, rates, st.floats(0, 2))
def test_resampling_a_smooth_signal_errs_by_its_curvature(control_hz, fps, start_s):
    """Linear interpolation of sin(t) is off by at most dt^2 / 8."""
    rows = np.sin(np.arange(int(6 * control_hz)) / control_hz)[:, None].astype(np.float32)
    clock = ClipClock(start_s, fps, 5, actions_per_frame(control_hz, fps))
    values, is_valid = resample(rows, control_hz, clock.action_times_s)
    error = np.abs(values[:, 0] - np.sin(clock.action_times_s))
    # SNAP allows a row that is a ten-thousandth of an interval away
    assert is_valid.all() and error.max() <= 1 / (8 * control_hz**2) + 1.1e-4 / control_hz + 1e-5


@given(rates, rates, st.floats(0, 1))
def test_a_gripper_is_held(control_hz, fps, start_s):
    rows = np.zeros((400, 2), dtype=np.float32)
    rows[::2, 1] = 1  # opens and closes with every row
    times = ClipClock(start_s, fps, 5, actions_per_frame(control_hz, fps)).action_times_s
    values, _ = resample(rows, control_hz, times, SlotRules(held=(1,)))
    assert set(np.unique(values[:, 1])) <= {0.0, 1.0}
    np.testing.assert_array_equal(values[:, 1], rows[np.floor(times * control_hz + 1e-4).astype(int), 1])


@given(rates, rates, st.integers(0, 1000))
def test_a_frame_is_at_most_half_a_frame_away(native_fps, fps, start):
    times = ClipClock(start / fps, fps, 17, 1).frame_times_s
    shown = nearest_frames(times, native_fps) / native_fps
    assert np.abs(shown - times).max() <= (0.5 + 1e-3) / native_fps


def test_fifteen_hz_actions_under_ntsc_video():
    """Row i of a 15 Hz recording says i: resampled for 29.97 frames/s it says the time, to half a frame."""
    rows = np.arange(100, dtype=np.float32)[:, None]
    clock = ClipClock(1.0, 30000 / 1001, 17, actions_per_frame(15, 30000 / 1001))
    aligned = align_control(rows, None, 15.0, clock, robot(1))
    assert np.abs(aligned.actions[:, 0] / 15 - clock.action_times_s).max() <= 0.5 / clock.fps
    assert aligned.proprio is None


@pytest.mark.parametrize(
    ("control_hz", "fps", "expected"), [(30, 10, 3), (80, 20, 4), (15, 30, 1), (25, 10, 2), (5, 5, 1)]
)
def test_the_ratio_is_whole(control_hz, fps, expected):
    assert actions_per_frame(control_hz, fps) == expected


def test_missing_and_unusable_rows_are_held_and_marked():
    rows = np.arange(8, dtype=np.float32)[:, None]
    rows[3] = np.nan
    aligned = align_control(rows, None, 10.0, ClipClock(0.0, 10.0, 13, 1), robot(1))
    assert aligned.actions[:, 0].tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 7, 7, 7, 7]
    assert aligned.spans == ((0, 3), (4, 8))
    leading = align_control(np.array([[np.inf], [1.0]], np.float32), None, 10.0, ClipClock(0.0, 10.0, 5, 1), robot(1))
    assert leading.actions[:, 0].tolist() == [0, 1, 1, 1] and leading.spans == ((1, 2),)


@given(st.lists(st.booleans(), max_size=30))
def test_spans_and_masks_are_inverse(mask):
    mask = np.array(mask, dtype=bool)
    np.testing.assert_array_equal(spans_mask(spans(mask), len(mask)), mask)


# --- the recording's own times --------------------------------------------------------------------------------------


@given(rates, st.integers(0, 20), seeds)
def test_own_times_that_are_regular_change_nothing(fps, start, seed):
    rows = np.random.default_rng(seed).standard_normal((60, 2)).astype(np.float32)
    clock = ClipClock(start / fps, fps, 5, 2)
    arm = robot(2, 2, gripper_actions=[1])
    own, constant = (align_control(rows, rows, recorded, clock, arm) for recorded in (np.arange(60) / 20, 20.0))
    np.testing.assert_array_equal(own.actions, constant.actions)
    np.testing.assert_array_equal(own.proprio, constant.proprio)
    assert own.spans == constant.spans


@given(seeds)
def test_rows_come_out_at_their_own_times(seed):
    """The value of every row is its time, so every valid row out says the time it was asked for."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.7, 1.3, 80)) / 20
    asked = np.sort(rng.uniform(0, 5, 50))
    values, is_valid = resample(times[:, None].astype(np.float32), times, asked)
    np.testing.assert_allclose(values[is_valid, 0], np.minimum(asked, times[-1])[is_valid], atol=1e-5)
    is_inside = (asked >= times[0]) & (asked < times[-1])
    assert is_valid[is_inside].all() and not is_valid[asked < times[0] - 1e-3].any()
    np.testing.assert_array_equal(resample(times[:, None].astype(np.float32), times, times)[0][:, 0], np.float32(times))


def test_a_hole_is_invalid_and_one_lost_row_is_bridged():
    times = np.delete(np.arange(30) / 10, [5, 10, 11, 12])  # one lost row, then three in a row
    rows = times[:, None].astype(np.float32)
    asked = np.arange(60) / 20
    values, is_valid = resample(rows, times, asked)
    is_hole = (asked > 0.9 + 1e-6) & (asked < 1.3 - 1e-6)
    np.testing.assert_array_equal(is_valid, ~is_hole)
    np.testing.assert_allclose(values[is_valid, 0], np.minimum(asked, 2.9)[is_valid], atol=1e-6)
    np.testing.assert_allclose(values[is_hole, 0], 0.9, atol=1e-6)  # the last row stays, it is not interpolated across
    clock = ClipClock(0.0, 20.0, 61, 1)
    assert align_control(rows, None, times, clock, robot(1)).spans == ((0, 19), (26, 60))
    deltas = align_control(rows, None, times, clock, robot(1, delta_actions=[0]))
    assert deltas.spans == ((0, 18), (26, 60))  # what happened from 0.9 s on is not known


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        ([0.0, 0.1], "[2] control times for 3 rows"),
        ([0.0, np.nan, 0.2], "some control times are no finite numbers"),
        ([0.0, 0.2, 0.1], "control times run backwards after row 1"),
        ([0.0, 0.0, 0.0], "more than half of the control rows have the time of the row before"),
        ([0.0, 0.1, 0.1], None),
        (None, None),
    ],
)
def test_impossible_times_are_named(times, problem):
    assert row_times_problem(None if times is None else np.array(times), 3) == problem


def test_one_row_with_a_time_of_its_own():
    values, is_valid = resample(np.ones((1, 1), np.float32), np.array([0.5]), np.array([0.0, 0.5, 1.0]))
    assert values.tolist() == [[1], [1], [1]] and not is_valid[[0, 2]].any()


# --- rotations and wrapping angles ----------------------------------------------------------------------------------


@given(formats, st.booleans(), rates, seeds)
def test_rotations_are_interpolated_on_the_sphere(form, in_degrees, hz, seed):
    rng = np.random.default_rng(seed)
    rotations = smooth_rotations(rng, 20)
    in_degrees = in_degrees and NUM_VALUES[form] == 3
    rows = encode(rotations, form, in_degrees).astype(np.float32)
    group = Rotations(tuple(range(rows.shape[1])), form, in_degrees)
    times = np.sort(rng.uniform(0, 19 / hz, 30))
    values, is_valid = resample(rows, hz, times, SlotRules(rotations=(group,)))
    expected = Slerp(np.arange(20) / hz, decode(rows, form, in_degrees))(times.clip(0, 19 / hz))
    assert is_valid.all() and apart(decode(values, form, in_degrees), expected) < 1e-3
    np.testing.assert_array_equal(resample(rows, hz, np.arange(20) / hz, SlotRules(rotations=(group,)))[0], rows)


@given(formats, seeds)
def test_the_spelling_of_a_rotation_does_not_jump(form, seed):
    """Rows that follow each other closely are followed by the rows between them."""
    rng = np.random.default_rng(seed)
    rotations, spelled = smooth_rotations(rng, 30, step=0.02), []
    for rotation in rotations:
        near = spelled[-1] if spelled else None
        spelled.append(encode(Rotation.concatenate([rotation]), form, near=near))
    rows = np.concatenate(spelled).astype(np.float32)
    group = Rotations(tuple(range(rows.shape[1])), form, False)
    first, second = rows[:-1], rows[1:]
    if (np.abs(second - first) > 0.3).any():  # at a pole of the angles any spelling jumps
        return
    values, _ = resample(rows, 10.0, (np.arange(29) + 0.5) / 10, SlotRules(rotations=(group,)))
    assert np.abs(values - (first + second) / 2).max() < 0.1


@given(st.sampled_from([2 * np.pi, 360.0]), seeds)
def test_a_wrapping_angle_takes_the_short_way(full_turn, seed):
    rng = np.random.default_rng(seed)
    angles = np.cumsum(rng.uniform(-0.3, 0.3, 40)) * full_turn
    rows = ((angles + full_turn / 2) % full_turn - full_turn / 2)[:, None].astype(np.float32)
    times = rng.uniform(0, 3.9, 50)
    values, _ = resample(rows, 10.0, times, SlotRules(full_turn=((0, full_turn),)))
    error = values[:, 0] - np.interp(times, np.arange(40) / 10, angles)
    assert np.abs(error - full_turn * np.round(error / full_turn)).max() < 1e-4 * full_turn
    assert np.abs(values).max() <= 0.65 * full_turn  # at most half a step beyond the recorded range


def test_a_rotation_that_is_none_is_not_a_recorded_row():
    rows = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    arm = robot(4, action_rotations=[RotationSlots(slots=[0, 1, 2, 3], format="quaternion_xyzw")])
    aligned = align_control(rows, None, 10.0, ClipClock(0.0, 20.0, 9, 1), arm)
    assert aligned.spans == ((2, 3), (6, 8))
    assert np.isfinite(aligned.actions).all()


# --- deltas ---------------------------------------------------------------------------------------------------------


@given(rates, rates, st.booleans(), seeds)
def test_deltas_lead_to_the_same_place(control_hz, fps, has_own_times, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((int(4 * control_hz), 2)).astype(np.float32)
    recorded = np.arange(len(rows)) / control_hz
    if has_own_times:
        recorded = recorded + rng.uniform(0, 0.4, len(rows)) / control_hz
    clock = ClipClock(0.5, fps, 9, actions_per_frame(control_hz, fps))
    arm = robot(2, delta_actions=[0, 1])
    aligned = align_control(rows, None, recorded if has_own_times else control_hz, clock, arm)
    interval = np.median(np.diff(recorded))
    edges = np.append(recorded, recorded[-1] + interval)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(rows.astype(np.float64), axis=0)])
    ends = np.append(clock.action_times_s, clock.action_times_s[-1] + 1 / clock.control_hz)
    where = np.stack([np.interp(ends, edges, path[:, i]) for i in range(2)], axis=1)
    assert aligned.spans == ((0, len(aligned.actions)),)
    # SNAP moves an end of the path by a ten-thousandth of a row
    np.testing.assert_allclose(aligned.actions, np.diff(where, axis=0), atol=1e-3)
    np.testing.assert_allclose(aligned.actions.sum(axis=0), where[-1] - where[0], atol=2e-3)


@given(formats, st.booleans(), st.sampled_from([1, 2, 3, 5]), seeds)
def test_rotation_deltas_are_composed(form, turns_with_tool, ratio, seed):
    """To a lower rate and back up: the orientation that the robot ends in is the same."""
    rng = np.random.default_rng(seed)
    steps = Rotation.from_rotvec(rng.normal(0, 0.1, (30, 3)))
    rows = encode(steps, form).astype(np.float32)
    group = Rotations(tuple(range(rows.shape[1])), form, False)
    rules = SlotRules(deltas=group.slots, turns_with_tool=turns_with_tool, rotations=(group,))

    def end(values):
        total = Rotation.identity()
        for step in decode(values, form):
            total = total * step if turns_with_tool else step * total
        return total

    for hz in (30 / ratio, 30.0, 30.0 * ratio):
        times = np.arange(round(hz)) / hz
        values, is_valid = resample_deltas(rows, 30.0, times, 1 / hz, rules)
        assert is_valid.all() and apart(end(values), end(rows)) < 1e-4
        if hz == 30:
            np.testing.assert_array_equal(values, rows)


def test_a_delta_at_twice_the_rate_is_halved_and_a_velocity_is_not():
    rows = np.array([[1, 1, 1], [3, 3, 3], [0, 0, 0]], np.float32)
    arm = robot(3, delta_actions=[0], velocity_actions=[1], gripper_actions=[2])
    aligned = align_control(rows, None, 10.0, ClipClock(0.0, 20.0, 5, 1), arm)
    assert aligned.actions.T.tolist() == [[0.5, 0.5, 1.5, 1.5], [1, 2, 3, 1.5], [1, 1, 3, 3]]
    slower = align_control(rows, None, 10.0, ClipClock(0.0, 5.0, 5, 1), arm)
    assert slower.actions.T.tolist() == [[4, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert slower.spans == ((0, 1),)  # the second step ends after the recording does


def test_deltas_with_missing_rows_or_none_at_all():
    rows = np.array([[1], [np.nan], [1], [1]], np.float32)
    arm = robot(1, delta_actions=[0])
    assert align_control(rows, None, 10.0, ClipClock(0.0, 5.0, 5, 1), arm).spans == ((1, 2),)
    late = align_control(rows, None, 10.0, ClipClock(3.0, 10.0, 5, 1), arm)
    assert late.spans == () and late.actions.tolist() == [[0]] * 4
    still = align_control(rows, None, 10.0, ClipClock(0.0, 10.0, 1, 1), arm)
    assert still.actions.shape == (0, 1) and still.spans == ()
    turning = robot(3, delta_actions=[0, 1, 2], action_rotations=[{"slots": (0, 1, 2), "format": "axis_angle"}])
    beyond = align_control(np.ones((4, 3), np.float32), None, 10.0, ClipClock(3.0, 10.0, 5, 1), turning)
    assert beyond.actions.tolist() == [[0, 0, 0]] * 4


# --- relative -------------------------------------------------------------------------------------------------------


def test_relative_actions_subtract_what_both_name():
    actions = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    proprio = np.array([10, 20], np.float32)
    arm = Embodiment(name="arm", action_names=("x", "gripper", "y"), proprio_names=("y", "x"), control_hz=10)
    relative = relative_actions(actions, proprio, arm)
    assert relative.tolist() == [[-19, 2, -7], [-16, 5, -4]]
    assert absolute_actions(relative, proprio, arm).tolist() == actions.tolist()
    assert relative_actions(actions, None, arm) is actions and absolute_actions(actions, None, arm) is actions


@pytest.mark.parametrize("kind", ["gripper_actions", "delta_actions", "velocity_actions"])
def test_what_is_no_target_is_never_relative(kind):
    arm = Embodiment(name="arm", action_names=("x", "y"), proprio_names=("x", "y"), control_hz=10, **{kind: (1,)})
    rows = np.array([[1, 2]], np.float32)
    assert relative_actions(rows, np.array([5, 5], np.float32), arm).tolist() == [[-4, 2]]


def pose_robot(action_form, proprio_form, units):
    """x, an arm's rotation and a wrist that wraps; proprio has them in another order, after a number of its own."""
    names = [f"r{i}" for i in range(NUM_VALUES[action_form])]
    size = len(names)
    return Embodiment(
        name="arm",
        action_names=("x", *names, "wrist"),
        proprio_names=("force", "wrist", *names, "x"),
        control_hz=10,
        action_units=("m", *[units] * size, units),
        action_rotations=[RotationSlots(slots=range(1, 1 + size), format=action_form)],
        proprio_rotations=[RotationSlots(slots=range(2, 2 + size), format=proprio_form)],
        wrapping_actions=(1 + size,),
    )


SAME_SIZE = [(one, other) for one in NUM_VALUES for other in NUM_VALUES if NUM_VALUES[one] == NUM_VALUES[other]]


@given(st.sampled_from(SAME_SIZE), st.sampled_from(["rad", "deg"]), seeds)
def test_relative_actions_round_trip(forms, units, seed):
    arm, rng = pose_robot(*forms, units), np.random.default_rng(seed)
    full_turn = 360 if units == "deg" else 2 * np.pi
    in_degrees = units == "deg"
    targets = Rotation.random(12, random_state=seed)
    start = Rotation.random(1, random_state=seed + 1 if seed < 2**32 - 1 else 0)
    angles = encode(targets, forms[0], in_degrees)
    wrist = rng.uniform(-0.5, 0.5, (12, 1)) * full_turn
    actions = np.concatenate([rng.normal(0, 1, (12, 1)), angles, wrist], axis=1).astype(np.float32)
    proprio = np.concatenate([[9.0, 0.4 * full_turn], encode(start, forms[1])[0], [0.5]]).astype(np.float32)
    rotation = slice(1, 1 + NUM_VALUES[forms[0]])

    relative = relative_actions(actions, proprio, arm)
    turn = decode(relative[:, rotation], forms[0], in_degrees)
    assert apart(turn, start.inv() * targets) < 1e-3
    assert np.abs(relative[:, -1]).max() <= full_turn / 2 * 1.0001
    again = absolute_actions(relative, proprio, arm)
    np.testing.assert_allclose(again[:, 0], actions[:, 0], atol=1e-5)
    assert apart(decode(again[:, rotation], forms[0], in_degrees), targets) < 1e-3
    turns = (again[:, -1] - actions[:, -1]) / full_turn
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-5)


@given(formats, seeds)
def test_targets_near_the_start_come_back_as_they_were(form, seed):
    """The same spelling, not only the same rotation."""
    rng, arm = np.random.default_rng(seed), pose_robot(form, form, "rad")
    start = Rotation.from_rotvec(rng.normal(0, 0.3, (1, 3)))
    targets = encode(start * Rotation.from_rotvec(rng.normal(0, 0.2, (12, 3))), form)
    actions = np.concatenate([np.zeros((12, 1)), targets, np.zeros((12, 1))], axis=1).astype(np.float32)
    proprio = np.concatenate([[0, 0], encode(start, form)[0], [0]]).astype(np.float32)
    again = absolute_actions(relative_actions(actions, proprio, arm), proprio, arm)
    np.testing.assert_allclose(again, actions, atol=2e-5)
