"""Actions on the clip's clock: exact where the clocks agree, bounded where they do not, grippers never in between."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.align import (
    ClipClock,
    actions_per_frame,
    align_control,
    nearest_frames,
    relative_actions,
    resample,
    spans,
    spans_mask,
)

rates = st.sampled_from([5.0, 10.0, 12.5, 15.0, 20.0, 24.0, 25.0, 29.97, 30.0, 50.0, 80.0, 200.0])


@given(st.integers(1, 8), rates, st.integers(0, 40), st.integers(1, 4))
def test_a_whole_ratio_gives_the_recorded_rows(ratio, fps, start, blocks):
    rows = np.random.default_rng(0).standard_normal((600, 3)).astype(np.float32)
    clock = ClipClock(start / fps, fps, 1 + 4 * blocks, ratio)
    aligned = align_control(rows, rows[:, :2], fps * ratio, clock, held=[2])
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
    rows = np.zeros((300, 2), dtype=np.float32)
    rows[::2, 1] = 1  # opens and closes with every row
    times = ClipClock(start_s, fps, 5, actions_per_frame(control_hz, fps)).action_times_s
    values, _ = resample(rows, control_hz, times, held=[1])
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
    aligned = align_control(rows, None, 15.0, clock)
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
    aligned = align_control(rows, None, 10.0, ClipClock(0.0, 10.0, 13, 1))
    assert aligned.actions[:, 0].tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 7, 7, 7, 7]
    assert aligned.spans == ((0, 3), (4, 8))
    leading = align_control(np.array([[np.inf], [1.0]], np.float32), None, 10.0, ClipClock(0.0, 10.0, 5, 1))
    assert leading.actions[:, 0].tolist() == [0, 1, 1, 1] and leading.spans == ((1, 2),)


@given(st.lists(st.booleans(), max_size=30))
def test_spans_and_masks_are_inverse(mask):
    mask = np.array(mask, dtype=bool)
    np.testing.assert_array_equal(spans_mask(spans(mask), len(mask)), mask)


def test_relative_actions_subtract_what_both_name():
    actions = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    proprio = np.array([10, 20], np.float32)
    relative = relative_actions(actions, proprio, ("x", "gripper", "y"), ("y", "x"))
    assert relative.tolist() == [[-19, 2, -7], [-16, 5, -4]]
    assert relative_actions(actions, None, ("x", "gripper", "y"), ()) is actions
