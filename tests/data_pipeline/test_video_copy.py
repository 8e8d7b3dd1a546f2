import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.video_copy import copy_clip
from data_pipeline.video_io import decode_clip, decode_frames, encode_video
from tests.data_pipeline.recordings import FPS, numbered_frames, read_numbers, rotate_in_header, write_video

NUM_FRAMES, GOP = 40, 8
CLOSED = {"x264-params": "keyint=8:min-keyint=8:scenecut=0:open-gop=0:bframes=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copied")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    """What `encode_video` writes; frame i shows the number i."""
    encode_video(numbered_frames(range(NUM_FRAMES)), folder / "plain.mp4", FPS, gop=GOP)
    return folder / "plain.mp4"


@given(key=st.integers(0, 4), num_frames=st.integers(1, 40))
def test_a_copied_clip_shows_the_same_pixels(video: Path, key: int, num_frames: int) -> None:
    data = copy_clip(video, GOP * key, num_frames, FPS, GOP)
    if GOP * key + num_frames > NUM_FRAMES:
        assert data is None
        return
    assert data is not None
    assert data == copy_clip(video, GOP * key, num_frames, FPS, GOP)
    np.testing.assert_array_equal(decode_clip(data), decode_frames(video, range(GOP * key, GOP * key + num_frames)))


def test_a_copied_clip_keeps_the_samples_contract(video: Path) -> None:
    data = copy_clip(video, GOP, 17, FPS, GOP)
    assert data is not None
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert (stream.frames, stream.average_rate, stream.codec_context.pix_fmt) == (17, FPS, "yuv420p")
        assert [packet.is_keyframe for packet in packets] == [i % GOP == 0 for i in range(17)]
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
        assert packets[0].pts == 0
        assert len(set(np.diff([packet.pts for packet in packets]))) == 1


@pytest.mark.parametrize(
    ("suffix", "rate"), [(".mov", Fraction(10)), (".mkv", Fraction(10)), (".mkv", Fraction(30000, 1001))]
)
def test_other_containers_are_copied_too(folder: Path, suffix: str, rate: Fraction) -> None:
    frames = numbered_frames(range(24))
    times = [round(1000 * i / rate) for i in range(24)]
    path = write_video(folder / f"other_{rate.numerator}{suffix}", frames, times_ms=times, options=CLOSED)
    data = copy_clip(path, 8, 9, float(rate), 8)
    assert data is not None
    assert read_numbers(decode_clip(data)) == list(range(8, 17))
    np.testing.assert_array_equal(decode_clip(data), decode_frames(path, range(8, 17)))
    with av.open(io.BytesIO(data), "r") as container:
        assert container.streams.video[0].average_rate == rate


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("b_frames.mp4", {"b_frames": 2, "gop": 8}),
        ("long_gop.mp4", {"gop": 20, "options": {"x264-params": "keyint=20:scenecut=0:bframes=0"}}),
        ("open_gop.mp4", {"b_frames": 2, "options": {"x264-params": "open-gop=1:keyint=8:bframes=2:b-adapt=0"}}),
        ("full_chroma.mp4", {"pix_fmt": "yuv444p", "options": CLOSED}),
        ("full_range.mp4", {"pix_fmt": "yuvj420p", "options": CLOSED}),
        ("ten_bit.mp4", {"pix_fmt": "yuv420p10le", "options": CLOSED}),
        ("wide_pixels.mp4", {"pixel_aspect": Fraction(3, 2), "options": CLOSED}),
        ("other_codec.mp4", {"codec": "mpeg4", "gop": 8}),
        ("no_prefixes.ts", {"options": CLOSED}),
        ("refresh.mkv", {"gop": 8, "options": {"x264-params": "intra-refresh=1:keyint=8:scenecut=0:bframes=0"}}),
        ("uneven.mp4", {"times_ms": [100 * i + 40 * (i % 3 == 1) for i in range(NUM_FRAMES)], "options": CLOSED}),
    ],
)
def test_what_is_stored_otherwise_has_to_be_encoded(folder: Path, name: str, encoding: dict[str, Any]) -> None:
    path = write_video(folder / name, numbered_frames(range(NUM_FRAMES)), **encoding)
    assert copy_clip(path, 8, 17, FPS, GOP) is None


def test_what_is_wanted_otherwise_has_to_be_encoded(video: Path, tmp_path: Path) -> None:
    assert copy_clip(video, 8, 17, FPS, GOP) is not None
    assert copy_clip(video, 9, 17, FPS, GOP) is None  # does not start at a keyframe
    assert copy_clip(video, 8, 17, FPS / 2, GOP) is None
    assert copy_clip(video, 8, 17, FPS + 0.5, GOP) is None
    assert copy_clip(video, 8, 17, FPS, GOP - 1) is None
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(video.read_bytes())
    rotate_in_header(turned, (0, 1, -1, 0))
    assert copy_clip(turned, 8, 17, FPS, GOP) is None


def test_a_hole_in_time_is_not_copied(folder: Path) -> None:
    times = [100 * i + 300 * (i >= 20) for i in range(NUM_FRAMES)]
    path = write_video(folder / "hole.mp4", numbered_frames(range(NUM_FRAMES)), times_ms=times, options=CLOSED)
    assert copy_clip(path, 16, 8, FPS, GOP) is None
    data = copy_clip(path, 24, 16, FPS, GOP)
    assert data is not None
    assert read_numbers(decode_clip(data)) == list(range(24, 40))
