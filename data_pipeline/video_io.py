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
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from PIL import Image
from pydantic import Field, field_validator

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
    open_container,
    reading,
    video_stream,
)
from .video_pixels import Picture, PlanesConverter, PlanesFrame, RgbConverter, Window, rgb_to_planes

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m4v")

MAX_SIDE = 2**14
"""Pixels of a picture that decoders and encoders take, and that fits into memory."""

_MAX_SKIPPED_FRAMES = 8  # decoding up to this many unwanted frames is cheaper than a seek
_MAX_OPEN_FILES = 4  # an episode's views; a decoder of 1080p holds up to 60 MB of reference frames


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
    is_hdr: bool
    num_hidden: int  # frames that an edit list cuts away
    num_streams: int  # of video, of which this is one
    size_bytes: int

    @property
    def bits(self) -> int:
        """Of each colour, as stored."""
        return max(component.bits for component in av.VideoFormat(self.pix_fmt).components)


# --- reading ---------------------------------------------------------------------------------------------------------


def probe_video(path: PathLike) -> VideoInfo:
    """Properties of a video. Reads every packet header and decodes one frame; VideoError when the file is unusable."""
    index = index_video(path)
    fps, is_variable = _frame_rate(index)
    return VideoInfo(
        codec=index.codec,
        pix_fmt=index.picture.pix_fmt,
        width=index.picture.width,
        height=index.picture.height,
        num_frames=len(index.pts),
        fps=fps,
        duration_s=index.duration_s,
        start_s=float(int(index.pts[0]) * index.time_base),
        rotation=index.picture.rotation,
        pixel_aspect=index.picture.pixel_aspect,
        is_variable_rate=is_variable,
        is_hdr=index.picture.is_hdr,
        num_hidden=index.num_hidden,
        num_streams=index.num_streams,
        size_bytes=os.path.getsize(path),
    )


def frame_times(path: PathLike) -> np.ndarray:
    """Start of every frame's presentation interval in seconds, relative to the first frame: float64 [f]."""
    return index_video(path).times_s()


def decode_frames(path: PathLike, frame_indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The frames at these positions in presentation order (any order, repeats allowed): uint8 RGB [f h w 3].

    Decodes from the nearest keyframe before each run of wanted frames to its last one; a call that asks for what comes
    next goes on where the last one stopped.
    """
    index = index_video(path)
    return _decode(path, index, frame_indices, RgbConverter(index.picture))


def decode_view(path: PathLike, frame_indices: Sequence[int] | np.ndarray, view: ViewConfig) -> np.ndarray:
    """The view of these frames, as planes (`video_pixels`): uint8 [f 3h/2 w].

    What `prepare_view` makes of the frames, for a fraction of its time: both scale the same window, but round
    differently (by a level, by more at hard edges between colours).
    """
    index = index_video(path)
    window = view_window(index.picture.height, index.picture.width, view)
    return _decode(
        path, index, frame_indices, PlanesConverter(index.picture, window, (view.height, view.width), view.rotate_180)
    )


def _decode(
    path: PathLike,
    index: VideoIndex,
    frame_indices: Sequence[int] | np.ndarray,
    converter: RgbConverter | PlanesConverter,
) -> np.ndarray:
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
    frames = np.empty((len(wanted), *converter.shape), dtype=np.uint8)
    with _reader(path, index) as reader:
        for row, position in enumerate(wanted.tolist()):
            converter.convert(reader.frame(position), frames[row])
    return _as_asked(frames, row_of_position)


def _as_asked(frames: np.ndarray, row_of_position: np.ndarray) -> np.ndarray:
    """Each wanted frame once, in order -> as often and in the order that they were asked for."""
    is_already = np.array_equal(row_of_position, np.arange(len(frames)))
    return frames if is_already else frames[row_of_position]


def decode_at_times(path: PathLike, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """The frame that starts nearest to each time, relative to the first frame: uint8 RGB [f h w 3]."""
    return decode_frames(path, frame_indices_at(path, times_s))


def decode_clip(data: bytes, positions: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Frames of a clip in memory, as `encode_video` made it and shards hold it: uint8 RGB [f h w 3].

    All of them, or those at these positions (any order, repeats allowed): decoding begins at the keyframe before the
    first of them and ends with the last.
    """
    try:
        with av.open(io.BytesIO(data), "r", options=dict(OPEN_OPTIONS)) as container:
            stream = video_stream(container, "clip")
            wanted, row_of_position = np.unique(
                np.arange(stream.frames) if positions is None else np.asarray(positions), return_inverse=True
            )
            frames = np.empty((0, 0, 0, 3), dtype=np.uint8)
            row = 0
            for number, frame in _numbered_frames(container, stream, int(wanted[0])):
                if number < wanted[row]:
                    continue
                if number > wanted[row]:
                    break
                if row == 0:
                    converter = RgbConverter(Picture.of(frame, stream))
                    frames = np.empty((len(wanted), *converter.shape), dtype=np.uint8)
                converter.convert(frame, frames[row])
                row += 1
                if row == len(wanted):
                    return _as_asked(frames, row_of_position)
            raise VideoError("truncated_video", "clip", f"{row} of the {len(wanted)} wanted frames decode")
    except (av.FFmpegError, IndexError) as error:
        raise VideoError("undecodable_video", "clip", str(error)) from error


def _numbered_frames(container: InputContainer, stream: VideoStream, first: int) -> Iterator[tuple[int, VideoFrame]]:
    """A clip's frames from the last keyframe before frame `first` on; their constant rate tells their numbers."""
    time_base, rate = stream.time_base, stream.average_rate
    if time_base is None or rate is None:
        raise VideoError("undecodable_video", "clip", "it states no frame rate")
    start = stream.start_time or 0
    if first >= GOP:
        container.seek(start + round(first / rate / time_base), stream=stream)
    for frame in decode_from_start(container, stream):
        if frame.pts is not None:
            yield round((frame.pts - start) * time_base * rate), frame


def frame_indices_at(path: PathLike, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the frame that starts nearest to each time (relative to the first frame; a tie: the earlier): int64.

    Nearest, not the one on screen: a player shows a frame until the next one comes, so what it shows was captured up to
    a whole interval ago (and longer where frames were dropped), the nearest one at most half of it.
    """
    index = index_video(path)
    starts, end = index.times_s(), index.duration_s
    times = np.asarray(times_s, dtype=np.float64)
    interval = end / len(starts)
    tolerance = min(float(index.time_base), 0.1 * interval) + 1e-9  # timestamps are rounded to ticks
    if times.size and (times.min() < -tolerance or times.max() > end + 0.5 * interval):
        raise VideoError(
            "out_of_range", path, f"time {times.min():.3f} to {times.max():.3f} s of a video of {end:.3f} s"
        )
    return np.searchsorted((starts[1:] + starts[:-1]) / 2, times - 1e-6)  # rounding noise breaks no tie


class _Reader:
    """An open video and how far it has been decoded: what comes next costs no seek."""

    def __init__(self, path: PathLike, index: VideoIndex) -> None:
        self._path = path
        self._index = index
        self._open()

    def _open(self) -> None:
        self._container = open_container(self._path)
        self._stream = video_stream(self._container, self._path)
        self._frames = enumerate(decode_from_start(self._container, self._stream))
        self._current: VideoFrame | None = None
        self._position = -1  # of the current frame

    def close(self) -> None:
        self._container.close()

    def frame(self, position: int) -> VideoFrame:
        key = self._index.key_before(position)
        if key not in self._index.damaged_keys:
            is_ahead = position >= self._position
            if not is_ahead or self._index.num_skipped(self._position, position) > _MAX_SKIPPED_FRAMES:
                self._go_to(key)
            frame = self._decode_up_to(position)
            if frame is None and key > 0:
                # Some keyframes only begin a gradual refresh: the picture is whole a group of pictures later.
                self._go_to(key - 1)
                frame = self._decode_up_to(position)
            if frame is not None:
                return frame
        raise VideoError("undecodable_video", self._path, f"frame {position} is damaged")

    def _go_to(self, key: int) -> None:
        if not self._index.can_seek:  # no timestamps to seek by: frames are counted from the start
            self.close()
            self._open()
            return
        self._current, self._position = None, -1
        self._frames = enumerate(decode_from_key(self._container, self._stream, self._index, key, self._path))

    def _decode_up_to(self, position: int) -> VideoFrame | None:
        """The frame at this position, which lies ahead; None where it does not decode."""
        while self._position < position:
            count, self._current = next(self._frames, (0, None))
            if self._current is None:
                self._position = len(self._index.pts)
                return None
            place = self._index.position(self._current) if self._index.can_seek else count
            self._position = self._position if place is None else place
        return self._current if self._position == position else None


_idle_readers: OrderedDict[tuple[str, int, int], _Reader] = OrderedDict()
os.register_at_fork(after_in_child=_idle_readers.clear)  # parent and child would move each other's place in the file


@contextmanager
def _reader(path: PathLike, index: VideoIndex) -> Iterator[_Reader]:
    """A reader of this file for one caller; afterwards it stays open for the next one."""
    identity = file_identity(path)
    reader = _idle_readers.pop(identity, None)
    with reading(path):
        reader = reader or _Reader(path, index)
        try:
            yield reader
        except VideoError:  # of a damaged frame; the reader can go on
            _keep_open(identity, reader)
            raise
        except BaseException:
            reader.close()
            raise
    _keep_open(identity, reader)


def _keep_open(identity: tuple[str, int, int], reader: _Reader) -> None:
    _idle_readers[identity] = reader
    while len(_idle_readers) > _MAX_OPEN_FILES:
        _idle_readers.popitem(last=False)[1].close()


def _frame_rate(index: VideoIndex) -> tuple[float, bool]:
    """(average fps, whether intervals vary). The header's rate wins where the timestamps agree with it."""
    nominal = index.average_rate
    if len(index.pts) < 2:
        return nominal or 1.0, False
    intervals = np.diff(index.pts)
    measured = float((len(index.pts) - 1) / (int(index.pts[-1] - index.pts[0]) * index.time_base))
    is_variable = bool(np.ptp(intervals) > max(2, 0.1 * float(np.median(intervals))))
    agrees = not is_variable and abs(nominal - measured) < 0.01 * measured
    return (nominal if agrees else measured), is_variable


# --- writing ---------------------------------------------------------------------------------------------------------


GOP = 8
"""Frames of a group of pictures in the clips of a dataset."""


def encode_video(
    frames: np.ndarray, path: PathLike | None, fps: float, *, crf: int = 18, gop: int = GOP, preset: str = "veryfast"
) -> bytes:
    """Encode uint8 RGB [f h w 3] (h and w even) as H.264 in MP4 and return the bytes (also written to `path` unless
    it is None). As `encode_planes`."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"encode_video takes uint8 [f h w 3] with f > 0, got {frames.dtype} {list(frames.shape)}")
    return encode_planes(rgb_to_planes(frames), path, fps, crf=crf, gop=gop, preset=preset)


def encode_planes(
    planes: np.ndarray, path: PathLike | None, fps: float, *, crf: int = 18, gop: int = GOP, preset: str = "veryfast"
) -> bytes:
    """Encode uint8 planes [f 3h/2 w] (`video_pixels`) as H.264 in MP4.

    Closed GOPs of `gop` frames, no B-frames, constant rate, index in front (faststart). The same frames and settings
    give the same bytes with the same build of x264: one thread, no dates.
    """
    if path is None:
        # faststart rewrites the file in a second pass and therefore needs a real one
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            return encode_planes(planes, file.name, fps, crf=crf, gop=gop, preset=preset)
    rate = Fraction(fps).limit_denominator(1001)
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(os.fspath(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        height, width = planes.shape[1] * 2 // 3, planes.shape[2]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = gop
        context.max_b_frames = 0
        # the planes are BT.601; saying so keeps players from guessing BT.709 by size
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 6, 6, 6, ColorRange.MPEG
        stream.options = {
            "crf": str(crf),
            "preset": preset,
            # mbtree: x264's vector code for it is not reproducible, one small clip in a hundred came out different
            # chromaloc: colours lie in the centre of their 2x2 pixels, not at the left as H.264 assumes; unsaid, they
            # would move by half a pixel
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:mbtree=0:threads=1"
            ":lookahead-threads=1:chromaloc=1",
        }
        picture = PlanesFrame(height, width)  # x264 copies what it is given
        for position, one in enumerate(planes):
            frame = picture.filled(one)
            frame.pts = position
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path).read_bytes()


# --- views -----------------------------------------------------------------------------------------------------------


class ViewConfig(StrictConfig):
    """How a camera's picture becomes a view of the dataset (and, by the same function, what the policy sees)."""

    height: int = Field(gt=0, le=MAX_SIDE, description="height of the view in pixels")
    width: int = Field(gt=0, le=MAX_SIDE, description="width of the view in pixels")
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

    def is_whole(self, height: int, width: int) -> bool:
        """Whether it shows a picture of this size as it is."""
        size = (height, width)
        return (self.height, self.width) == size and self.crop in (None, (0, 0, *size)) and not self.rotate_180


def prepare_view(frames: np.ndarray, view: ViewConfig) -> np.ndarray:
    """Turn, crop, then fit uint8 RGB [f h w 3] to the view's size: uint8 [f height width 3].

    The aspect ratio is kept: the largest centred window of the view's shape is resized, antialiased.
    """
    if view.rotate_180:
        frames = frames[:, ::-1, ::-1]
    top, left, height, width = view_window(frames.shape[1], frames.shape[2], view)
    frames = frames[:, top : top + height, left : left + width]
    if (height, width) == (view.height, view.width):
        return np.ascontiguousarray(frames)
    resized = np.empty((len(frames), view.height, view.width, 3), dtype=np.uint8)
    for row, rgb in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(rgb))
        resized[row] = np.asarray(image.resize((view.width, view.height), Image.Resampling.BILINEAR))
    return resized


def view_window(height: int, width: int, view: ViewConfig) -> Window:
    """The part of an upright (and, if the view says so, turned) picture that the view shows.

    The largest centred one of the view's shape. Its corner lies at even pixels, where H.264 has its colour samples.
    """
    top, left, crop_height, crop_width = view.crop or (0, 0, height, width)
    if top + crop_height > height or left + crop_width > width:
        raise ValueError(f"crop {view.crop} leaves the {height}x{width} picture")
    scale = min(crop_height / view.height, crop_width / view.width)
    window_height = min(crop_height, max(1, round(view.height * scale)))
    window_width = min(crop_width, max(1, round(view.width * scale)))
    top += (crop_height - window_height) // 4 * 2
    left += (crop_width - window_width) // 4 * 2
    return Window(top, left, window_height, window_width)
