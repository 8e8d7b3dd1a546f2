"""Decode and encode video with PyAV.

One rule governs everything here: **a frame is placed by its presentation time**. Frame `i` of a file is the frame with
the i-th smallest presentation timestamp, whatever the packet order (B-frames), the frame rate (constant or not) or the
first timestamp (often not zero). Arrays are uint8 RGB `[f h w 3]`, upright (rotation and mirroring metadata applied),
with square pixels.

Every function runs on one thread: callers scale by processes, and a decoder that starts its own threads in each of them
is slower, not faster. A file that cannot be used raises `VideoError` with a named reason.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from pydantic import Field, PositiveInt, field_validator

from configs.loader import StrictConfig

from .video_index import (
    OPEN_OPTIONS,
    PathLike,
    VideoError,
    VideoIndex,
    decode_from_key,
    decode_from_start,
    file_identity,
    index_video,
    open_video,
    video_stream,
)

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m4v")

# swscale's default conversion is faster but darkens every picture by one level; these flags leave no bias, and give the
# same bits on every processor.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_MAX_SKIPPED_FRAMES = 8  # decoding up to this many unwanted frames is cheaper than a seek
_SQUARE_TOLERANCE = 0.01  # pixel aspect ratios closer to 1 than this are rounding (224/225), not geometry


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, as its frames will come out of `decode_frames`."""

    codec: str
    pix_fmt: str
    width: int  # upright, square pixels
    height: int
    num_frames: int
    fps: float  # average
    duration_s: float  # from the first frame's start to the last frame's end
    start_s: float  # timestamp of the first frame; every time in this module is relative to it
    rotation: int  # degrees anticlockwise that were needed to bring the stored picture upright
    pixel_aspect: float  # width / height of the stored pixels; 1 = square
    is_variable_rate: bool
    size_bytes: int


# --- reading ---------------------------------------------------------------------------------------------------------


def probe_video(path: PathLike) -> VideoInfo:
    """Properties of a video. Reads every packet header and decodes one frame; VideoError when the file is unusable."""
    return _cached_probe(*file_identity(path))


@lru_cache(maxsize=256)
def _cached_probe(path: str, size: int, mtime_ns: int) -> VideoInfo:
    index = index_video(path)
    with open_video(path) as container:
        stream = video_stream(container, path)
        frame = next(decode_from_start(container, stream), None)
        if frame is None:
            raise VideoError("undecodable_video", path, f"no frame of its {len(index.pts)} decodes")
        width, height = _square_pixel_size(frame, stream)
        if _orientation(frame)[0]:
            width, height = height, width
        fps, is_variable = _frame_rate(index, stream)
        return VideoInfo(
            codec=stream.codec_context.codec.canonical_name,
            pix_fmt=frame.format.name,
            width=width,
            height=height,
            num_frames=len(index.pts),
            fps=fps,
            duration_s=index.duration_s,
            start_s=float(int(index.pts[0]) * index.time_base),
            rotation=frame.rotation % 360,
            pixel_aspect=_pixel_aspect(stream),
            is_variable_rate=is_variable,
            size_bytes=size,
        )


def frame_times(path: PathLike) -> np.ndarray:
    """Start of every frame's presentation interval in seconds, relative to the first frame: float64 [f]."""
    return index_video(path).times_s()


def decode_frames(path: PathLike, frame_indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The frames at these positions in presentation order (any order, repeats allowed): uint8 RGB [f h w 3].

    Starts at the nearest keyframe before each run of wanted frames and stops after its last one.
    """
    index = index_video(path)
    positions = np.asarray(frame_indices, dtype=np.int64)
    if positions.size == 0:
        raise VideoError("out_of_range", path, "no frames were asked for")
    if positions.min() < 0 or positions.max() >= len(index.pts):
        raise VideoError(
            "out_of_range",
            path,
            f"frame {positions.min()} to {positions.max()} of a video with {len(index.pts)} frames",
        )
    wanted, row_of_position = np.unique(positions, return_inverse=True)
    with open_video(path) as container:
        stream = video_stream(container, path)
        frames = _collect(container, stream, index, wanted, path)
    is_already_in_order = len(wanted) == len(positions) and bool(np.all(wanted == positions))
    return frames if is_already_in_order else frames[row_of_position]


def decode_at_times(path: PathLike, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """The frame on screen at each time, relative to the first frame: uint8 RGB [f h w 3]."""
    return decode_frames(path, frame_indices_at(path, times_s))


def decode_clip(data: bytes) -> np.ndarray:
    """All frames of a clip in memory, as `encode_video` made it and shards hold it: uint8 RGB [f h w 3]."""
    try:
        with av.open(io.BytesIO(data), "r", options=dict(OPEN_OPTIONS)) as container:
            stream = video_stream(container, "clip")
            writer = _RgbWriter(stream, stream.frames)
            row = 0
            for frame in container.decode(stream):
                writer.write(row, frame)
                row += 1
            if row < stream.frames or row == 0:
                raise VideoError("truncated_video", "clip", f"{row} of its {stream.frames} frames decode")
            return writer.frames
    except (av.FFmpegError, IndexError) as error:
        raise VideoError("undecodable_video", "clip", str(error)) from error


def frame_indices_at(path: PathLike, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the frame whose presentation interval covers each time (relative to the first frame): int64."""
    index = index_video(path)
    starts, end = index.times_s(), index.duration_s
    times = np.asarray(times_s, dtype=np.float64)
    interval = end / len(starts)
    # Timestamps are rounded to ticks (milliseconds in Matroska): without tolerance, t = 2/12 s would fall before 0.167.
    tolerance = min(float(index.time_base), 0.1 * interval) + 1e-9
    if times.size and (times.min() < -tolerance or times.max() > end + 0.5 * interval):
        raise VideoError(
            "out_of_range", path, f"time {times.min():.3f} to {times.max():.3f} s of a video of {end:.3f} s"
        )
    return np.clip(np.searchsorted(starts, times + tolerance, side="right") - 1, 0, len(starts) - 1)


def _collect(
    container: InputContainer, stream: VideoStream, index: VideoIndex, wanted: np.ndarray, path: PathLike
) -> np.ndarray:
    """Decode the wanted positions (sorted, unique) in as few seeks as it takes."""
    writer = _RgbWriter(stream, len(wanted))
    row = 0
    while row < len(wanted):
        if index.can_seek:
            frames = decode_from_key(container, stream, index, index.key_before(wanted[row]), path)
        else:
            frames = decode_from_start(container, stream)
        for count, frame in enumerate(frames):
            position = index.position(frame) if index.can_seek else count
            if position is None or position < wanted[row]:
                continue
            if position > wanted[row] or frame.is_corrupt:
                raise VideoError("undecodable_video", path, f"frame {wanted[row]} is damaged")
            writer.write(row, frame)
            row += 1
            if row == len(wanted) or index.num_skipped(position, wanted[row]) > _MAX_SKIPPED_FRAMES:
                break  # done, or it pays to seek over the gap
        else:
            raise VideoError("undecodable_video", path, f"frame {wanted[row]} does not decode")
    return writer.frames


class _RgbWriter:
    """Converts decoded frames into one preallocated uint8 [f h w 3] array: upright, square pixels, right colours."""

    def __init__(self, stream: VideoStream, num_frames: int) -> None:
        self._stream = stream
        self._reformatter = VideoReformatter()  # keeps its scaling tables between frames
        self._num_frames = num_frames
        self._size: tuple[int, int] | None = None
        self.frames = np.empty((0, 0, 0, 3), dtype=np.uint8)

    def write(self, row: int, frame: VideoFrame) -> None:
        if self._size is None:  # a stream that changes size midway is scaled to the size it starts with
            self._size = _square_pixel_size(frame, self._stream)
        width, height = self._size
        rgb = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BILINEAR | _EXACT, threads=1
        ).to_ndarray()
        swaps_axes, flip_x, flip_y = _orientation(frame)
        if swaps_axes:
            rgb = rgb.swapaxes(0, 1)
        rgb = rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        if row == 0:
            self.frames = np.empty((self._num_frames, *rgb.shape), dtype=np.uint8)
        self.frames[row] = rgb


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(swap axes, flip x, flip y) that bring the stored picture upright, from the display matrix.

    The matrix maps stored (x, y) to shown (a x + c y, b x + d y); only right angles and mirrors are honoured.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5]
    swaps_axes = abs(int(b)) > abs(int(a))
    return swaps_axes, bool((c if swaps_axes else a) < 0), bool((b if swaps_axes else d) < 0)


def _square_pixel_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    return max(1, round(frame.width * _pixel_aspect(stream))), frame.height


def _pixel_aspect(stream: VideoStream) -> float:
    ratio = float(stream.sample_aspect_ratio or 1)
    is_square = abs(ratio - 1) < _SQUARE_TOLERANCE or not 0.1 < ratio < 10
    return 1.0 if is_square else ratio


def _frame_rate(index: VideoIndex, stream: VideoStream) -> tuple[float, bool]:
    """(average fps, whether intervals vary). The header's rate wins where the timestamps agree with it."""
    nominal = float(stream.average_rate or 0)
    if len(index.pts) < 2:
        return nominal or 1.0, False
    intervals = np.diff(index.pts)
    measured = float((len(index.pts) - 1) / (int(index.pts[-1] - index.pts[0]) * index.time_base))
    is_variable = bool(np.ptp(intervals) > max(2, 0.1 * float(np.median(intervals))))
    agrees = not is_variable and abs(nominal - measured) < 0.01 * measured
    return (nominal if agrees else measured), is_variable


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_video(
    frames: np.ndarray,
    path: PathLike | None,
    fps: float,
    *,
    crf: int = 18,
    gop: int = 8,
    pix_fmt: str = "yuv420p",
    preset: str = "veryfast",
) -> bytes:
    """Encode uint8 RGB [f h w 3] as H.264 in MP4 and return the bytes (also written to `path` unless it is None).

    Closed GOPs of `gop` frames, no B-frames, constant rate, index in front (faststart). The same frames and settings
    give the same bytes with the same build of x264: one thread, no dates.
    """
    num_frames, height, width, channels = frames.shape
    if frames.dtype != np.uint8 or channels != 3 or num_frames == 0:
        raise ValueError(f"encode_video takes uint8 [f h w 3] with f > 0, got {frames.dtype} {list(frames.shape)}")
    if pix_fmt == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(f"yuv420p needs an even height and width, got {height}x{width}: crop or resize the view")
    if path is None:
        # faststart rewrites the file in a second pass and therefore needs a real one
        with tempfile.TemporaryDirectory(prefix="encode_video_") as folder:
            return encode_video(
                frames, Path(folder) / "clip.mp4", fps, crf=crf, gop=gop, pix_fmt=pix_fmt, preset=preset
            )
    rate = Fraction(fps).limit_denominator(1001)
    reformatter = VideoReformatter()
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(os.fspath(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = gop
        context.max_b_frames = 0
        # RGB is converted with the BT.601 matrix below; saying so keeps players from guessing BT.709 by size
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 6, 6, 6, ColorRange.MPEG
        stream.options = {
            "crf": str(crf),
            "preset": preset,
            # mbtree: x264's vector code for it is not reproducible, one small clip in a hundred came out different
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:mbtree=0:threads=1"
            ":lookahead-threads=1",
        }
        for position, rgb in enumerate(frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame = reformatter.reformat(
                frame,
                format=pix_fmt,
                dst_colorspace=Colorspace.SMPTE170M,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | _EXACT,
                threads=1,
            )
            frame.pts = position
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path).read_bytes()


# --- views -----------------------------------------------------------------------------------------------------------


class ViewConfig(StrictConfig):
    """How a camera's picture becomes a view of the dataset (and, by the same function, what the policy sees)."""

    height: PositiveInt = Field(description="height of the view in pixels")
    width: PositiveInt = Field(description="width of the view in pixels")
    crop: tuple[int, int, int, int] | None = Field(
        default=None, description="(top, left, height, width) cut out of the upright picture first; none: all of it"
    )
    rotate_180: bool = Field(default=False, description="turn the picture upside down, before the crop")

    @field_validator("crop")
    @classmethod
    def _crop_is_inside(cls, crop: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if crop is not None and (min(crop[:2]) < 0 or min(crop[2:]) < 1):
            raise ValueError("crop is (top, left, height, width) with top, left >= 0 and height, width >= 1")
        return crop


def prepare_view(frames: np.ndarray, view: ViewConfig) -> np.ndarray:
    """Turn, crop, then fit uint8 RGB [f h w 3] to the view's size: uint8 [f height width 3].

    The aspect ratio is kept: the largest centred window of the view's shape is resized, antialiased.
    """
    if view.rotate_180:
        frames = frames[:, ::-1, ::-1]
    if view.crop is not None:
        top, left, crop_height, crop_width = view.crop
        if top + crop_height > frames.shape[1] or left + crop_width > frames.shape[2]:
            raise ValueError(f"crop {view.crop} leaves the {frames.shape[1]}x{frames.shape[2]} picture")
        frames = frames[:, top : top + crop_height, left : left + crop_width]
    height, width = frames.shape[1:3]
    if (height, width) == (view.height, view.width):
        return np.ascontiguousarray(frames)
    scale = min(height / view.height, width / view.width)
    left_edge = max(0.0, (width - view.width * scale) / 2)  # max: rounding can leave -1e-15, which Pillow refuses
    top_edge = max(0.0, (height - view.height * scale) / 2)
    window = (left_edge, top_edge, width - left_edge, height - top_edge)
    resized = np.empty((len(frames), view.height, view.width, 3), dtype=np.uint8)
    for row, rgb in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(rgb))
        resized[row] = np.asarray(image.resize((view.width, view.height), Image.Resampling.BILINEAR, box=window))
    return resized
