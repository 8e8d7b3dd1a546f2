import io
import os
import pickle
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import video_io
from data_pipeline.video_io import (
    VideoError,
    ViewConfig,
    decode_at_times,
    decode_clip,
    decode_frames,
    encode_video,
    frame_indices_at,
    frame_times,
    prepare_view,
    probe_video,
)
from tests.data_pipeline.recordings import FPS, numbered_frames, read_numbers, rotate_in_header, write_video

NUM_FRAMES = 40
STEADY_MS = [100 * i for i in range(NUM_FRAMES)]
UNEVEN_MS = list(np.cumsum([0, *(np.random.default_rng(0).choice([20, 33, 100, 250], NUM_FRAMES - 1))]))
ENCODINGS = {
    "plain": {},
    "b_frames": {"b_frames": 3, "gop": 12},
    "open_gop": {"b_frames": 3, "gop": 10, "options": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"}},
    "late_start": {"times_ms": [5000 + time for time in STEADY_MS], "b_frames": 2},
    "variable_rate": {"times_ms": UNEVEN_MS, "b_frames": 2},
    "one_keyframe": {"gop": 1000, "options": {"x264-params": "scenecut=0"}},
    "ten_bit": {"pix_fmt": "yuv420p10le"},
    "full_chroma": {"pix_fmt": "yuv444p"},
    "hevc": {"codec": "libx265", "b_frames": 3, "options": {"x265-params": "log-level=none:keyint=10"}},
    "av1": {"codec": "libsvtav1", "gop": 2, "options": {"preset": "12"}},
    "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4_b_frames": {"codec": "mpeg4", "b_frames": 2, "options": {"qscale": "3"}},
}
SUFFIXES = {"plain": (".mp4", ".mkv", ".mov", ".ts", ".avi"), "b_frames": (".mp4", ".mkv", ".ts"), "vp9": (".webm",)}
VIDEOS = [f"{name}{suffix}" for name in ENCODINGS for suffix in SUFFIXES.get(name, (".mp4",))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Frame i of each shows the number i."""
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered_frames(range(NUM_FRAMES))
    return {name: write_video(folder / name, frames, **ENCODINGS[Path(name).stem]) for name in VIDEOS}


def decode_everything(path: Path) -> np.ndarray:
    """The oracle: every frame that comes out of the decoder, in the order in which it comes."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_is_found_by_its_number(videos: dict[str, Path], name: str) -> None:
    info = probe_video(videos[name])
    assert info.num_frames == NUM_FRAMES
    assert read_numbers(decode_frames(videos[name], range(NUM_FRAMES))) == list(range(NUM_FRAMES))
    assert read_numbers(decode_everything(videos[name])) == list(range(NUM_FRAMES))
    for i in (0, 7, 11, 23, NUM_FRAMES - 1):
        assert read_numbers(decode_frames(videos[name], [i])) == [i]


@given(data=st.data())
def test_decoding_some_frames_equals_decoding_all(videos: dict[str, Path], data: st.DataObject) -> None:
    path = videos[data.draw(st.sampled_from(VIDEOS))]
    wanted = data.draw(st.lists(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=6))
    everything = decode_frames(path, range(NUM_FRAMES))
    np.testing.assert_array_equal(decode_frames(path, wanted), everything[wanted])


@given(data=st.data())
def test_the_frame_at_a_time_is_the_nearest(videos: dict[str, Path], data: st.DataObject) -> None:
    path = videos[data.draw(st.sampled_from(["plain.mp4", "variable_rate.mp4", "late_start.mp4", "plain.mkv"]))]
    starts = frame_times(path)
    times = data.draw(st.lists(st.floats(0, float(starts[-1])), min_size=1, max_size=4))
    found = frame_indices_at(path, times)
    distances = np.abs(starts[None] - np.array(times)[:, None])
    np.testing.assert_allclose(distances[np.arange(len(times)), found], distances.min(axis=1), atol=3e-6)
    assert read_numbers(decode_at_times(path, times)) == found.tolist()


def test_between_two_frames_the_earlier_one_is_taken(videos: dict[str, Path]) -> None:
    assert frame_indices_at(videos["plain.mp4"], (np.arange(NUM_FRAMES) + 0.5) / FPS).tolist() == [*range(NUM_FRAMES)]


def test_times_are_relative_to_the_first_frame(videos: dict[str, Path]) -> None:
    np.testing.assert_allclose(frame_times(videos["late_start.mp4"]), np.array(STEADY_MS) / 1000, atol=1e-3)
    np.testing.assert_allclose(frame_times(videos["variable_rate.mp4"]), np.array(UNEVEN_MS) / 1000, atol=1e-3)
    assert probe_video(videos["late_start.mp4"]).start_s == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("rate", [12, 24, 30000 / 1001, 30, 60])
def test_timestamps_rounded_to_milliseconds_hit_their_own_frame(tmp_path: Path, rate: float) -> None:
    path = write_video(
        tmp_path / "rounded.mkv", numbered_frames(range(50)), times_ms=[round(1000 * i / rate) for i in range(50)]
    )
    assert frame_indices_at(path, np.arange(50) / rate).tolist() == list(range(50))


def test_a_time_beyond_the_video_is_refused(videos: dict[str, Path]) -> None:
    assert frame_indices_at(videos["plain.mp4"], [NUM_FRAMES / FPS]).tolist() == [NUM_FRAMES - 1]
    for times in ([-0.2], [NUM_FRAMES / FPS + 0.2]):
        with pytest.raises(VideoError, match="out_of_range"):
            decode_at_times(videos["plain.mp4"], times)
    with pytest.raises(VideoError, match="out_of_range"):
        decode_frames(videos["plain.mp4"], [NUM_FRAMES])


def test_probe_tells_what_decoding_gives(videos: dict[str, Path]) -> None:
    for name in VIDEOS:
        info = probe_video(videos[name])
        assert decode_frames(videos[name], [0]).shape == (1, info.height, info.width, 3)
    info = probe_video(videos["plain.mp4"])
    assert (info.codec, info.fps, info.is_variable_rate) == ("h264", FPS, False)
    assert info.duration_s == pytest.approx(NUM_FRAMES / FPS, abs=0.01)
    assert probe_video(videos["av1.mp4"]).codec == "av1"
    uneven = probe_video(videos["variable_rate.mp4"])
    assert uneven.is_variable_rate
    assert uneven.fps == pytest.approx(1000 * (NUM_FRAMES - 1) / UNEVEN_MS[-1], rel=1e-3)


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)],
)
def test_rotated_and_mirrored_videos_come_out_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    picture = np.zeros((1, 48, 64, 3), dtype=np.uint8)
    picture[:, :24, :32] = (255, 0, 0)  # red at the top left, green beside it, blue below it
    picture[:, :24, 32:] = (0, 255, 0)
    picture[:, 24:, :32] = (0, 0, 255)
    path = write_video(tmp_path / "turned.mp4", picture.repeat(3, axis=0), pix_fmt="yuv444p")
    rotate_in_header(path, matrix)
    shown = decode_frames(path, [1])[0]
    a, b, c, d = matrix
    height, width = (48, 64) if a else (64, 48)
    assert shown.shape == (height, width, 3)
    assert (probe_video(path).width, probe_video(path).height) == (width, height)
    for y, x in ((12, 16), (12, 48), (36, 16), (36, 48)):  # where each stored point must be shown
        shown_x, shown_y = a * x + c * y, b * x + d * y
        shown_x, shown_y = shown_x + (width if a + c < 0 else 0), shown_y + (height if b + d < 0 else 0)
        np.testing.assert_allclose(shown[shown_y, shown_x].astype(int), picture[0, y, x], atol=12)


def test_pixels_are_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", numbered_frames(range(4)), pixel_aspect=Fraction(3, 2))
    info = probe_video(path)
    assert (info.width, info.height, info.pixel_aspect) == (96, 48, 1.5)
    assert read_numbers(decode_frames(path, range(4))) == [0, 1, 2, 3]


def test_odd_sizes_keep_their_last_row_and_column(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mp4", numbered_frames(range(4), 49, 65), pix_fmt="yuv444p")
    assert decode_frames(path, range(4)).shape == (4, 49, 65, 3)


def test_colours_are_kept_without_bias(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    encode_video(picture, tmp_path / "colours.mp4", FPS, crf=1)
    difference = decode_frames(tmp_path / "colours.mp4", [0]).astype(float) - picture
    inside = difference.reshape(6, 8, 8, 8, 3)[:, 2:6, :, 2:6]  # a colour is stored for four pixels: edges blur
    assert np.abs(inside.mean(axis=(0, 1, 2, 3))).max() < 0.5
    assert np.abs(inside).max() < 12


# --- files that are no use -------------------------------------------------------------------------------------------


def reason_of(path: Path) -> str:
    with pytest.raises(VideoError) as caught:
        probe_video(path)
    assert str(path) in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    contents = {
        "text.mp4": b"this is not a video\n" * 50,
        "empty.mp4": b"",
        "pointer.mp4": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nplain.ts\n#EXT-X-ENDLIST\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert reason_of(tmp_path / name) == "not_a_video", name
    assert reason_of(tmp_path / "absent.mp4") == "missing_video"


def test_a_sound_file_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert reason_of(tmp_path / "sound.mp4") == "not_a_video"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_mp4_is_noticed(tmp_path: Path, share: float) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    encode_video(frames, tmp_path / "front.mp4", FPS)  # its index is in front
    write_video(tmp_path / "back.mp4", frames)  # its index is at the end
    for path in (tmp_path / "front.mp4", tmp_path / "back.mp4"):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        assert reason_of(path) == "truncated_video"
        with pytest.raises(VideoError, match="truncated_video"):
            decode_frames(path, [0])


@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_or_complete(videos: dict[str, Path], data: st.DataObject) -> None:
    whole = videos[data.draw(st.sampled_from([name for name in VIDEOS if not name.endswith((".ts", ".avi"))]))]
    content = whole.read_bytes()
    path = whole.with_name(f"cut_{whole.name}")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        numbers = read_numbers(decode_frames(path, range(probe_video(path).num_frames)))
    except VideoError:
        return
    assert numbers == list(range(NUM_FRAMES))


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_truncated_matroska_is_noticed_though_it_counts_no_frames(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / f"cut{suffix}", frames, codec="libvpx-vp9", options={"cpu-used": "8"})
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    assert reason_of(path) == "truncated_video"


def test_matroska_that_lost_the_frames_stored_last_is_noticed(videos: dict[str, Path]) -> None:
    """Frames shown earlier may be stored after the last one shown, so the duration looks whole."""
    whole = videos["b_frames.mkv"].read_bytes()
    path = videos["b_frames.mkv"].with_name("cut_late.mkv")
    for missing in (1, 40, 200):
        path.write_bytes(whole[:-missing])
        with pytest.raises(VideoError, match="truncated_video"):
            probe_video(path)


@given(data=st.data())
def test_damaged_bytes_give_frames_or_a_video_error(videos: dict[str, Path], data: st.DataObject) -> None:
    whole = videos[data.draw(st.sampled_from(VIDEOS))]
    content = bytearray(whole.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=9)
    ):
        content[int(place * len(content))] = value
    path = whole.with_name(f"damaged_{whole.name}")
    path.write_bytes(bytes(content))
    try:
        decode_frames(path, range(min(NUM_FRAMES, probe_video(path).num_frames)))
    except VideoError as error:
        assert error.reason in ("not_a_video", "truncated_video", "undecodable_video")


def test_encoding_av1_leaves_this_process_an_ordinary_one(tmp_path: Path) -> None:
    policy = os.sched_getscheduler(0)
    write_video(tmp_path / "av1.mp4", numbered_frames(range(2)), codec="libsvtav1", options={"preset": "12"})
    assert os.sched_getscheduler(0) == policy


def test_a_hole_in_the_middle_is_noticed_when_it_is_decoded(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "hole.mp4", frames, codec="libsvtav1", gop=5, options={"preset": "12"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(bytes(data))
    with pytest.raises(VideoError, match="undecodable_video"):
        decode_frames(path, range(30))


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    encode_video(numbered_frames(range(5)), path, FPS)
    assert probe_video(path).num_frames == 5
    encode_video(numbered_frames(range(9)), path, FPS)
    assert probe_video(path).num_frames == 9


# --- encoding --------------------------------------------------------------------------------------------------------


def test_encoding_is_deterministic(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (17, 32, 48, 3), dtype=np.uint8)
    data = encode_video(frames, None, FPS)
    assert encode_video(frames, tmp_path / "another_name.mp4", FPS) == data
    assert (tmp_path / "another_name.mp4").read_bytes() == data
    assert encode_video(np.asfortranarray(frames), None, FPS) == data


@settings(max_examples=15)
@given(num_frames=st.integers(1, 25), gop=st.integers(1, 12), fps=st.sampled_from([5, 12.5, 24000 / 1001, 30]))
def test_clips_have_closed_short_gops_and_a_constant_rate(num_frames: int, gop: int, fps: float) -> None:
    data = encode_video(numbered_frames(range(num_frames)), None, fps, gop=gop)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [i % gop == 0 for i in range(num_frames)]
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]  # no B-frames
        assert len(set(np.diff([packet.pts for packet in packets]))) <= 1
        assert float(stream.average_rate) == pytest.approx(fps)
    assert read_numbers(decode_clip(data)) == list(range(num_frames))


@settings(max_examples=25)
@given(
    wanted=st.lists(st.integers(0, 24), min_size=1, max_size=6),
    gop=st.integers(1, 12),
    fps=st.sampled_from([5, 12.5, 24000 / 1001, 30]),
)
def test_wanted_frames_of_a_clip_are_those_of_the_whole(wanted: list[int], gop: int, fps: float) -> None:
    data = encode_video(numbered_frames(range(25)), None, fps, gop=gop)
    np.testing.assert_array_equal(decode_clip(data, wanted), decode_clip(data)[wanted])


def test_no_frame_is_decoded_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_video(numbered_frames(range(25)), None, FPS, gop=8)
    decoded: list[int] = []
    numbered = video_io._numbered_frames

    def counted(*arguments: Any) -> Iterator[tuple[int, av.VideoFrame]]:
        for number, frame in numbered(*arguments):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(video_io, "_numbered_frames", counted)
    decode_clip(data, [20, 18])
    assert decoded == [16, 17, 18, 19, 20]
    with pytest.raises(VideoError, match="1 of the 2 wanted frames"):
        decode_clip(data, [3, 25])


def test_encode_video_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="even height and width, got 47x64"):
        encode_video(np.zeros((3, 47, 64, 3), dtype=np.uint8), None, FPS)
    with pytest.raises(ValueError, match="uint8"):
        encode_video(np.zeros((3, 48, 64, 3), dtype=np.float32), None, FPS)


def test_a_damaged_clip_in_memory_is_a_video_error() -> None:
    data = encode_video(numbered_frames(range(9)), None, FPS)
    for broken in (b"", b"text", data[: len(data) // 2]):
        with pytest.raises(VideoError):
            decode_clip(broken)


# --- views -----------------------------------------------------------------------------------------------------------


def test_prepare_view_crops_then_fits_the_centre() -> None:
    frames = np.zeros((2, 60, 100, 3), dtype=np.uint8)
    frames[:, 10:50, 30:70] = 200  # the square that is left when a 40-high crop is fitted to a square view
    fitted = prepare_view(frames, ViewConfig(height=20, width=20, crop=(10, 0, 40, 100)))
    assert fitted.shape == (2, 20, 20, 3)
    assert (fitted[:, 1:-1, 1:-1] == 200).all()  # at the rim, antialiasing mixes in a little of what is cut away
    assert fitted.min() > 150


def test_prepare_view_turns_before_it_crops() -> None:
    frames = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    frames[:, :2, :3] = 255
    view = ViewConfig(height=2, width=3, crop=(6, 5, 2, 3), rotate_180=True)
    assert (prepare_view(frames, view) == 255).all()


def test_prepare_view_averages_what_it_shrinks() -> None:
    checkerboard = np.indices((64, 64)).sum(axis=0) % 2 * 255
    frames = np.repeat(checkerboard[None, :, :, None], 3, axis=3).astype(np.uint8)
    shrunk = prepare_view(frames, ViewConfig(height=16, width=16))
    assert np.abs(shrunk.astype(int) - 127).max() < 8


@given(
    height=st.integers(2, 90), width=st.integers(2, 90), view_height=st.integers(1, 64), view_width=st.integers(1, 64)
)
def test_prepare_view_always_gives_the_size_asked_for(
    height: int, width: int, view_height: int, view_width: int
) -> None:
    frames = np.full((1, height, width, 3), 77, dtype=np.uint8)
    shown = prepare_view(frames, ViewConfig(height=view_height, width=view_width))
    assert shown.shape == (1, view_height, view_width, 3)
    assert (shown == 77).all()


def test_a_crop_outside_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the 8x8 picture"):
        prepare_view(np.zeros((1, 8, 8, 3), dtype=np.uint8), ViewConfig(height=4, width=4, crop=(5, 0, 4, 4)))
    with pytest.raises(ValueError, match="crop is"):
        ViewConfig(height=4, width=4, crop=(-1, 0, 4, 4))


# --- real recordings -------------------------------------------------------------------------------------------------


def test_recorded_videos_decode_as_a_plain_decoder_does(shared_data: Path) -> None:
    files = sorted(path for path in shared_data.glob("odd_*/**/*") if path.suffix in (".mp4", ".mov", ".mkv", ".webm"))
    assert files
    for path in files:
        if "truncated" in path.name or "zero_length" in path.name:
            continue
        info = probe_video(path)
        with av.open(str(path)) as container:
            times = [frame.time for frame in container.decode(container.streams.best("video"))]
        assert info.num_frames == len(times), path
        np.testing.assert_allclose(frame_times(path), np.array(times) - times[0], atol=1e-6, err_msg=str(path))
        some = [info.num_frames - 1, 0, info.num_frames // 2]
        np.testing.assert_array_equal(
            decode_frames(path, some), decode_frames(path, range(info.num_frames))[some], err_msg=str(path)
        )


def test_recorded_damage_is_named(shared_data: Path) -> None:
    found = {path.name: reason_of(path) for path in sorted((shared_data / "odd_derived_by_us").glob("*.*"))}
    assert found == {
        "truncated_60pct_sam2_03_blocks.mp4": "truncated_video",
        "truncated_60pct_sthv2_1113.webm": "truncated_video",
        "zero_length.mp4": "not_a_video",
    }
