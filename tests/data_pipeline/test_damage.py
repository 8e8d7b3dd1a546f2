"""Frames that decode as garbage are found: damage costs its group of pictures, and sound recordings nothing."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.video_index import VideoError, index_video
from data_pipeline.video_io import VIDEO_SUFFIXES, ViewConfig, decode_frames, decode_view, frame_times, probe_video
from tests.data_pipeline.damaged_videos import (
    ENCODINGS,
    GOP,
    damaged_copies,
    frames_given,
    frames_unchecked,
    moving_frames,
    stored_packets,
)
from tests.data_pipeline.recordings import FPS, numbered_frames, read_numbers, write_video

NUM_FRAMES, NUM_COPIES = 2 * GOP, 10


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return moving_frames(NUM_FRAMES, 240, 320)


def write(folder: Path, name: str, pictures: np.ndarray) -> Path:
    suffix, how = ENCODINGS[name]
    return write_video(folder / f"{name}{suffix}", pictures, gop=GOP, **how)


UNSEEN = {  # the share of damaged frames that is given all the same, rounded up; without any checks it is 0.5 to 1
    "h264": 0.1,
    "hevc": 0.95,
    "hevc_checksums": 0.0,
    "vp9": 0.05,
    "av1": 0.02,
    "mpeg4": 0.2,
    "mpeg2": 0.7,
    "mjpeg": 0.5,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_frames_that_decode_as_garbage_are_not_given(tmp_path: Path, pictures: np.ndarray, name: str) -> None:
    path = write(tmp_path, name, pictures)
    whole, whole_unchecked = frames_given(path, range(NUM_FRAMES)), frames_unchecked(path)
    assert len(whole) == len(whole_unchecked) == NUM_FRAMES
    num_wrong, num_damaged = 0, 0
    for copy, damaged_packet in damaged_copies(path, NUM_COPIES):
        given, unchecked = frames_given(copy, range(NUM_FRAMES)), frames_unchecked(copy)
        wrong = {i for i, frame in given.items() if not np.array_equal(frame, whole[i])}
        missing = whole.keys() - given.keys()
        assert {i // GOP for i in wrong | missing} <= {damaged_packet // GOP}  # others do not suffer
        num_wrong += len(wrong)
        num_damaged += sum(not np.array_equal(unchecked.get(pts), whole_unchecked[pts]) for pts in whole_unchecked)
    assert num_damaged >= NUM_COPIES // 2
    assert num_wrong <= UNSEEN[name] * num_damaged


def test_frames_shown_before_a_keyframe_suffer_from_damage_before_it(tmp_path: Path, pictures: np.ndarray) -> None:
    """An open group of pictures: its first frames are stored after its keyframe and built on what came before it, too.

    Packets: I0 P3 B1 B2 P6 B4 B5 | I9 B7 B8 P12 B10 B11 ...
    """
    options = {"x264-params": "open-gop=1:keyint=9:min-keyint=9:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none:ref=1"}
    path = write_video(tmp_path / "open.mp4", pictures, gop=9, b_frames=2, options=options)
    index = index_video(path)
    assert np.searchsorted(index.pts, index.key_pts).tolist() == [0, 9]
    whole = frames_given(path, range(NUM_FRAMES))
    packets = stored_packets(path)
    path.write_bytes(path.read_bytes().replace(packets[4][20:], bytes(len(packets[4]) - 20)))
    given = frames_given(path, range(NUM_FRAMES))
    assert sorted(whole.keys() - given.keys()) == [4, 5, 6, 7, 8]
    for i, frame in given.items():
        np.testing.assert_array_equal(frame, whole[i])


def test_a_packet_that_cannot_be_split_costs_its_group_alone(tmp_path: Path, pictures: np.ndarray) -> None:
    """Of VP9: an index of several pictures that are larger than the packet (annex B of its specification)."""
    path = write(tmp_path, "vp9", pictures)
    packet = stored_packets(path)[3]
    path.write_bytes(path.read_bytes().replace(packet, packet[:-10] + b"\xd9" + b"\xff" * 8 + b"\xd9"))
    assert sorted(frames_given(path, range(NUM_FRAMES))) == [0, 1, 2, *range(GOP, NUM_FRAMES)]


@pytest.mark.parametrize(
    ("codec", "b_frames", "has_times"),
    [("mpeg4", 0, True), ("mjpeg", 0, True), ("mpeg4", 2, False), ("libx264", 2, False)],
)
def test_damage_moves_no_later_frame(tmp_path: Path, codec: str, b_frames: int, has_times: bool) -> None:
    """AVI has no timestamps: frames are counted where the order of packets does not tell their times either."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    frames = numbered_frames(range(24))
    path = write_video(tmp_path / "counted.avi", frames, codec=codec, gop=6, b_frames=b_frames, pix_fmt=pix_fmt)
    packet = stored_packets(path)[8]
    path.write_bytes(path.read_bytes().replace(packet, packet[:12] + bytes(len(packet) - 12)))
    if has_times:
        times = frame_times(path)
        assert len(times) < 24
        assert read_numbers(decode_frames(path, range(len(times)))) == (times * FPS).round().tolist()
    else:
        with pytest.raises(VideoError, match="no timestamps place those after them"):
            probe_video(path)


@pytest.mark.slow
def test_sound_recordings_are_given_whole(shared_data: Path) -> None:
    """Decoded from their start, and from any keyframe on."""
    view = ViewConfig(height=16, width=16)
    videos = [path for path in sorted(shared_data.rglob("*.*")) if path.suffix in VIDEO_SUFFIXES]
    sound = [path for path in videos if path.parent.name != "odd_derived_by_us"]
    assert len(sound) > 100
    for path in sound:
        positions = np.arange(len(index_video(path).pts))
        for part in np.array_split(positions, 1 + len(positions) // 64):  # VideoError where a frame shows damage
            decode_view(path, part, view)
        decode_view(path, np.random.default_rng(0).choice(positions, 3), view)
