"""Idle stretches: found where nothing moves for long enough, and left out as the config says."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.curate.idle import Activity, IdleConfig, find_activity, idle_spans
from data_pipeline.embodiments import Embodiment

HZ = 10.0
ROBOT = Embodiment(name="arm", action_names=("x", "grip"), proprio_names=("x_sensed",), control_hz=HZ)
EVERYWHERE = IdleConfig(trim="everywhere", longer_than_s=1.0, margin_s=0.2)


def path_of(*parts):
    """(seconds, speed) one after the other -> positions at HZ, float32 [n]."""
    speeds = np.concatenate([np.full(round(seconds * HZ), speed / HZ) for seconds, speed in parts])
    return np.cumsum(speeds).astype(np.float32)


def activity(positions, config=EVERYWHERE, robot=ROBOT, proprio=None, **changes):
    actions = np.stack([positions, np.zeros_like(positions)], axis=1)
    times_s = np.arange(len(positions)) / HZ
    return find_activity(actions, proprio, times_s, len(positions) / HZ, robot, config.model_copy(update=changes))


# --- spans --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6),
    st.floats(0.25, 2.0),
    st.integers(0, 100),
)
def test_spans_are_the_windows_without_change(parts, longer_than_s, seed):
    """Against every pair of rows, on a clock that is not regular."""
    values = path_of(*[(rows / HZ, speed) for rows, speed in parts]).astype(np.float64)[:, None]
    times_s = np.cumsum(np.random.default_rng(seed).uniform(0.05, 0.15, len(values)))
    spans = idle_spans(values, times_s, np.array([0.01]), longer_than_s)
    expected = np.zeros(len(values), dtype=bool)
    for first in range(len(values)):
        for last in range(first, len(values)):
            if times_s[last] - times_s[first] >= longer_than_s - 1e-9 and np.ptp(values[first : last + 1]) <= 0.01:
                expected[first : last + 1] = True
    found = np.zeros(len(values), dtype=bool)
    for start_s, end_s in spans:
        found |= (times_s >= start_s) & (times_s <= end_s)
        assert end_s - start_s >= longer_than_s - 1e-9
    assert (found == expected).all()
    assert all(one[1] < other[0] for one, other in pairwise(spans))


def test_a_slow_motion_is_motion_and_noise_is_none():
    times_s = np.arange(100) / HZ
    slow = 0.02 * times_s[:, None]  # 2 cm/s
    noise = np.random.default_rng(0).uniform(-0.004, 0.004, (100, 1))
    tolerances = np.array([0.01])
    assert idle_spans(slow, times_s, tolerances, 1.0) == []
    assert idle_spans(noise, times_s, tolerances, 1.0) == [(0.0, pytest.approx(9.9))]


def test_a_row_that_is_not_finite_is_not_idle():
    values = np.zeros((50, 1))
    values[25] = np.nan
    spans = idle_spans(values, np.arange(50) / HZ, np.array([0.01]), 1.0)
    assert spans == [(0.0, pytest.approx(2.4)), (pytest.approx(2.6), pytest.approx(4.9))]


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_too_short_to_be_idle(num_rows):
    assert idle_spans(np.zeros((num_rows, 2)), np.arange(num_rows) / HZ, np.full(2, 0.1), 1.0) == []


# --- episodes -----------------------------------------------------------------------------------------------------

WAITS = path_of((2, 0), (1, 1), (3, 0), (1, 1), (0.5, 0), (1, 1), (4, 0))


def test_what_is_kept_begins_a_little_before_each_motion():
    found = activity(WAITS)
    np.testing.assert_allclose(found.kept, [(1.7, 2.9), (5.7, 8.4)], atol=0.01)
    np.testing.assert_allclose(found.left_out, [(0, 1.7), (2.9, 5.7), (8.4, 12.5)], atol=0.01)
    assert found.note() == (
        "The robot is idle for 1.70 s at its start, 4.10 s at its end, 2.80 s in 1 pause, of 12.50 s: "
        "no clip starts there."
    )


def test_only_the_ends():
    found = activity(WAITS, trim="ends")
    np.testing.assert_allclose(found.kept, [(1.7, 8.4)], atol=0.01)
    assert "pause" not in found.note()


def test_pauses_may_be_longer():
    np.testing.assert_allclose(activity(WAITS, longer_than_s=3.5).kept, [(0, 8.4)], atol=0.01)


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6))
def test_kept_and_left_out_are_the_whole(parts):
    found = activity(path_of(*[(rows / HZ, speed) for rows, speed in parts]))
    edges = sorted([*found.kept, *found.left_out])
    assert edges[0][0] == 0 and edges[-1][1] == found.duration_s
    assert all(one[1] == other[0] for one, other in pairwise(edges))
    assert (found.note() is None) == (not found.left_out)


def test_an_episode_in_which_nothing_happens():
    found = activity(np.zeros(50, np.float32))
    assert found.kept == () and found.left_out == ((0.0, 5.0),)


def test_what_is_sensed_moves_too():
    still = np.zeros(50, np.float32)
    proprio = np.zeros((50, 1), np.float32)
    proprio[20:30, 0] = np.arange(10)
    found = activity(still, proprio=proprio)
    assert len(found.kept) == 1 and found.kept[0][0] < 2.0 < found.kept[0][1]


def test_a_steady_delta_or_speed_is_a_motion():
    """The same number in every row: idle only if it is a target."""
    steady = np.full(50, 0.1, np.float32)
    assert activity(steady).kept == ()
    for field in ("delta_actions", "velocity_actions"):
        robot = ROBOT.model_copy(update={field: (0,)})
        assert activity(steady, robot=robot).left_out == ()
        assert activity(0 * steady, robot=robot).kept == ()


def test_tolerances():
    drift = path_of((5, 0.002))  # 2 mm/s, all the motion there is
    assert activity(drift).left_out == ()
    assert activity(drift, tolerance=0.01).kept == ()
    assert activity(drift, tolerances={"x": 0.01}).kept == ()
    assert activity(drift, tolerance_share=0.3).kept == ()
    config = IdleConfig(tolerances={"x": 1.0, "x_sensed": 1.0, "wrist": 1.0})
    assert config.unknown_slots([ROBOT]) == ["wrist"]


def test_off_by_default():
    assert IdleConfig().trim == "off"
    assert activity(WAITS, trim="off") == Activity(((0.0, 12.5),), (), 12.5)


# --- real recordings ----------------------------------------------------------------------------------------------


def test_a_real_arm_waits_before_it_moves(shared_data):
    """Joint angles of teleoperated arms at 15 Hz: what is left out is still, what is kept is most of the episode."""
    paths = sorted(shared_data.glob("ctrlworld_droid/droid_subset/annotation/*/*.json"))
    assert len(paths) == 11
    for path in paths:
        record = json.loads(path.read_text())
        states = np.asarray(record["observation.state.joint_position"], dtype=np.float32)
        names = tuple(f"joint_{i}" for i in range(states.shape[1]))
        robot = Embodiment(name="franka", action_names=names, proprio_names=(), control_hz=15.0)
        times_s = np.arange(len(states)) / 15
        found = find_activity(states, None, times_s, len(states) / 15, robot, EVERYWHERE)
        for first, end in found.left_out:
            rows = states[(times_s >= first) & (times_s <= end)]
            assert np.ptp(rows, axis=0).max() < 0.2
        assert sum(end - first for first, end in found.kept) > 0.3 * found.duration_s
