"""Which stream is shown, what is known to be damaged, and that an open file is gone on with."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import video_io
from data_pipeline.video_index import VideoError
from data_pipeline.video_io import decode_frames, encode_video, probe_video
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_video


def write_streams(path: Path, streams: Sequence[tuple[int, int, Disposition]]) -> Path:
    """A file with a video stream per (first number shown, height, disposition)."""
    with av.open(str(path), "w") as container:
        added = []
        for _, height, disposition in streams:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
            stream.disposition = disposition
            added.append(stream)
        for i in range(5):
            for (first, height, _), stream in zip(streams, added, strict=True):
                frame = av.VideoFrame.from_ndarray(numbered_frames([first + i], height)[0], format="rgb24")
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("streams", "shown"),
    [
        ([(0, 48, 0), (100, 64, 0)], 100),  # the largest picture
        ([(0, 64, 0), (100, 48, 0)], 0),
        ([(0, 48, 0), (100, 48, 0)], 0),  # the first
        ([(0, 64, 0), (100, 48, 1)], 100),  # marked as default
    ],
)
def test_the_main_stream_of_several(tmp_path: Path, streams: list[tuple[int, int, int]], shown: int) -> None:
    path = write_streams(tmp_path / "several.mkv", [(first, height, Disposition(d)) for first, height, d in streams])
    assert read_numbers(decode_frames(path, range(5))) == list(range(shown, shown + 5))


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frames([1])[0], format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(VideoError, match="not_a_video"):
        probe_video(path)


def test_bytes_lost_in_transmission_cost_their_group_of_pictures(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 96, 128, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "whole.ts", frames, gop=10, options={"x264-params": "keyint=10:scenecut=0"})
    data = whole.read_bytes()
    middle = len(data) // 2 // 188
    path = tmp_path / "lossy.ts"
    path.write_bytes(data[: middle * 188] + data[(middle + 3) * 188 :])
    assert probe_video(path).num_frames == 30
    for part in (range(10), range(20, 30)):
        np.testing.assert_array_equal(decode_frames(path, part), decode_frames(whole, part))
    for i in (10, 15, 19):
        with pytest.raises(VideoError, match=f"undecodable_video.*frame {i} is damaged"):
            decode_frames(path, [i])


def test_a_gradual_refresh_is_decoded_from_further_back(tmp_path: Path) -> None:
    """Without full keyframes, a picture is whole only after the refresh has passed over all of it."""
    options = {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}
    path = write_video(tmp_path / "refresh.mkv", numbered_frames(range(40)), gop=10, options=options)
    everything = decode_frames(path, range(40))
    assert read_numbers(everything) == list(range(40))
    for i in (35, 20, 10, 29, 0):
        np.testing.assert_array_equal(decode_frames(path, [i])[0], everything[i])


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("counted")
    frames = numbered_frames(range(60))
    return [
        write_video(folder / "b_frames.mp4", frames, b_frames=3, gop=25),
        write_video(folder / "uncounted.avi", frames, codec="mpeg4", gop=12),
        write_video(folder / "av1.mp4", frames, codec="libsvtav1", gop=20, options={"preset": "12"}),
        *(write_video(folder / f"view_{i}.mkv", frames, gop=30) for i in range(3)),
    ]


@given(requests=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 59), st.integers(1, 9)), max_size=12))
def test_calls_in_any_order_find_their_frames(counted: list[Path], requests: list[tuple[int, int, int]]) -> None:
    """What an earlier call left open, and how far it went, does not show."""
    for file, first, count in requests:
        wanted = list(range(first, min(first + count, 60)))
        assert read_numbers(decode_frames(counted[file], wanted)) == wanted


def test_few_files_stay_open(counted: list[Path]) -> None:
    for path in counted:
        decode_frames(path, [3])
    assert len(video_io._idle_readers) == 4
    with pytest.raises(VideoError):
        decode_frames(counted[-1], [60])
    assert read_numbers(decode_frames(counted[-1], [4])) == [4]


def _read_in_child(path: Path) -> list[int]:
    return read_numbers(decode_frames(path, range(30, 60)))


def test_a_forked_process_has_its_own_place_in_the_file(counted: list[Path]) -> None:
    path = counted[0]
    assert read_numbers(decode_frames(path, range(10))) == list(range(10))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_in_child, (path,)) == list(range(30, 60))
    assert read_numbers(decode_frames(path, range(10, 20))) == list(range(10, 20))


def test_a_rewritten_file_is_not_read_from_what_was_open(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    encode_video(numbered_frames(range(9)), path, 10)
    assert read_numbers(decode_frames(path, [0, 1])) == [0, 1]
    encode_video(numbered_frames(range(50, 65)), path, 10)
    assert read_numbers(decode_frames(path, [2, 14])) == [52, 64]
