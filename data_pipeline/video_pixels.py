"""Decoded frames -> arrays: upright, with square pixels and right colours, cropped and scaled where wanted.

Colours. The stream's own tags (matrix, range, place of the colour samples) decide. Without a matrix, a picture 1280 or
more wide or more than 576 high is BT.709 and a smaller one BT.601, as players assume; without a range, it is limited.
Ten and more bits are rounded to eight. High dynamic range (PQ, HLG) is converted by its matrix and not tone-mapped.

Two kinds of array. **RGB**, uint8 `[f h w 3]`, is what models and people see. **Planes**, uint8 `[f 3h/2 w]`, are what
a clip is stored as: brightness in `h` rows, then the two colour differences in a quarter of the size each (4:2:0);
BT.601, limited range, colours in the middle of their four pixels. Clips are cut, measured and encoded as planes: going
by RGB takes as long as all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

# swscale's default conversion is faster but darkens every picture by one level; these flags leave no bias, and give the
# same bits on every processor.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_UNTAGGED = (2, 3)  # matrix "unspecified" and "reserved", ITU-T H.273 table 4
_HDR_TRANSFERS = (16, 18)  # PQ and HLG, ITU-T H.273 table 3
_SQUARE_TOLERANCE = 0.01  # pixel aspect ratios closer to 1 than this are rounding (224/225), not geometry


class Window(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Picture:
    """How a video's frames are brought upright, with square pixels. The first one settles it for all of them."""

    width: int  # upright, square pixels
    height: int
    stored_width: int
    stored_height: int
    pixel_aspect: float  # width / height of the stored pixels; 1 = square
    rotation: int  # degrees anticlockwise that bring the stored picture upright
    swaps_axes: bool  # rows become columns, before the flips
    flip_x: bool
    flip_y: bool
    pix_fmt: str
    is_hdr: bool

    @property
    def is_upright(self) -> bool:
        """Whether it is stored as it is shown."""
        return not (self.swaps_axes or self.flip_x or self.flip_y)

    @classmethod
    def of(cls, frame: VideoFrame, stream: VideoStream) -> Picture:
        aspect = _pixel_aspect(stream)
        width, height = max(1, round(frame.width * aspect)), frame.height
        swaps_axes, flip_x, flip_y = _orientation(frame)
        return cls(
            width=height if swaps_axes else width,
            height=width if swaps_axes else height,
            stored_width=frame.width,
            stored_height=frame.height,
            pixel_aspect=aspect,
            rotation=frame.rotation % 360,
            swaps_axes=swaps_axes,
            flip_x=flip_x,
            flip_y=flip_y,
            pix_fmt=frame.format.name,
            is_hdr=int(frame.color_trc) in _HDR_TRANSFERS,
        )


class RgbConverter:
    """Turns frames of one video into whole RGB pictures of one size; keeps its scaling tables between frames."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._reformatter = VideoReformatter()
        self.shape = (picture.height, picture.width, 3)

    def convert(self, frame: VideoFrame, rgb: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write the frame's picture into `rgb`, of `shape`."""
        picture = self._picture
        width, height = (picture.width, picture.height) if not picture.swaps_axes else (picture.height, picture.width)
        planar = self._reformatter.reformat(
            frame,
            width,
            height,
            format="gbrp",  # the same levels as packed RGB, computed faster
            src_colorspace=Colorspace.ITU709 if _is_untagged_709(frame, picture) else None,
            interpolation=Interpolation.BILINEAR | EXACT,
            threads=1,
        )
        step_x, step_y = (-1 if flip else 1 for flip in (picture.flip_x, picture.flip_y))
        for plane, channel in zip(planar.planes, (1, 2, 0), strict=True):
            stored = _rows(plane, height, width)
            rgb[..., channel] = (stored.T if picture.swaps_axes else stored)[::step_y, ::step_x]


class PlanesConverter:
    """Turns frames of one video into the planes of a view; keeps its filters between frames.

    `window` is cut out of the upright picture, scaled to `size` (height, width, both even), antialiased, and turned
    upside down where wanted.
    """

    def __init__(self, picture: Picture, window: Window, size: tuple[int, int], rotate_180: bool = False) -> None:
        self._picture = picture
        self._window = window
        self._size = size
        self._flip_x, self._flip_y = picture.flip_x != rotate_180, picture.flip_y != rotate_180
        self._takes: tuple[object, ...] = ()
        self.shape = planes_shape(*size)

    def convert(self, frame: VideoFrame, planes: UInt8[np.ndarray, "p w"]) -> None:
        """Write the view of the frame into `planes`, of `shape`."""
        takes = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if self._takes != takes:
            self._takes, self._graph = takes, self._make_graph(frame)
        self._graph.push(frame)
        shown = self._graph.pull()
        assert isinstance(shown, VideoFrame)
        for plane, target in zip(shown.planes, split_planes(planes), strict=True):
            target[:] = _rows(plane, *target.shape)

    def _make_graph(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        graph.threads = 1
        matrix = "bt709" if _is_untagged_709(frame, self._picture) else "auto"
        height, width = reversed(self._size) if self._picture.swaps_axes else self._size
        buffer = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
            time_base="1/1000",
        )
        scale = (
            f"{width}:{height}:flags=bilinear+accurate_rnd+full_chroma_inp+bitexact:sws_dither=none:"
            f"in_color_matrix={matrix}:out_color_matrix=smpte170m:out_range=limited:out_chroma_loc=center"
        )
        nodes = [buffer, graph.add("scale", scale), graph.add("format", "pix_fmts=yuv420p")]
        window = self._stored_window(frame)
        if window != (0, 0, frame.height, frame.width):
            crop = f"{window.width}:{window.height}:{window.left}:{window.top}:exact=1"
            nodes.insert(1, graph.add("crop", crop))
        if self._picture.swaps_axes:
            nodes.append(graph.add("transpose", "cclock_flip"))  # rows become columns, nothing else
        for flips, name in ((self._flip_x, "hflip"), (self._flip_y, "vflip")):
            if flips:
                nodes.append(graph.add(name))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph

    def _stored_window(self, frame: VideoFrame) -> Window:
        """Where the window lies in the frame as it is stored, to the nearest pixel."""
        picture = self._picture
        top, left, height, width = self._window
        if self._flip_y:
            top = picture.height - top - height
        if self._flip_x:
            left = picture.width - left - width
        if picture.swaps_axes:
            top, left, height, width = left, top, width, height
        square_width, square_height = (
            (picture.height, picture.width) if picture.swaps_axes else (picture.width, picture.height)
        )
        across, down = frame.width / square_width, frame.height / square_height
        return Window(
            round(top * down), round(left * across), max(1, round(height * down)), max(1, round(width * across))
        )


def _is_untagged_709(frame: VideoFrame, picture: Picture) -> bool:
    is_large = picture.stored_width >= 1280 or picture.stored_height > 576
    return is_large and frame.colorspace in _UNTAGGED and not frame.format.is_rgb


def _rows(plane: VideoPlane, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:height, :width]


# --- planes ----------------------------------------------------------------------------------------------------------


def planes_shape(height: int, width: int) -> tuple[int, int]:
    """Of one picture's planes. ValueError where 4:2:0 cannot hold it."""
    if height % 2 or width % 2:
        raise ValueError(f"4:2:0 needs an even height and width, got {height}x{width}: crop or resize the view")
    return height * 3 // 2, width


def split_planes(
    planes: UInt8[np.ndarray, "*b p w"],
) -> tuple[UInt8[np.ndarray, "*b h w"], UInt8[np.ndarray, "*b h/2 w/2"], UInt8[np.ndarray, "*b h/2 w/2"]]:
    """Brightness and the two colour differences (blue, red), without copying; `planes` lie in memory in one piece."""
    *batch, rows, width = planes.shape
    height = rows * 2 // 3
    flat = planes.reshape(*batch, -1)
    ends = height * width, height * width * 5 // 4
    return (
        flat[..., : ends[0]].reshape(*batch, height, width),
        flat[..., ends[0] : ends[1]].reshape(*batch, height // 2, width // 2),
        flat[..., ends[1] :].reshape(*batch, height // 2, width // 2),
    )


def rgb_to_planes(rgb: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f p w"]:
    """ValueError where its height or width is odd."""
    num_frames, height, width, _ = rgb.shape
    planes = np.empty((num_frames, *planes_shape(height, width)), np.uint8)
    picture = VideoFrame(width, height, "rgb24")  # one for all: swscale needs its padding, and a new one costs time
    pixels = np.frombuffer(memoryview(picture.planes[0]), np.uint8).reshape(height, -1)[:, : 3 * width]
    reformatter = VideoReformatter()
    for one, target in zip(rgb, planes, strict=True):
        pixels[:] = one.reshape(height, 3 * width)
        frame = reformatter.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=Colorspace.SMPTE170M,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC | EXACT,
            threads=1,
        )
        for plane, part in zip(frame.planes, split_planes(target), strict=True):
            part[:] = _rows(plane, *part.shape)
    return planes


def planes_to_rgb(planes: UInt8[np.ndarray, "f p w"]) -> UInt8[np.ndarray, "f h w 3"]:
    num_frames, rows, width = planes.shape
    rgb = np.empty((num_frames, rows * 2 // 3, width, 3), np.uint8)
    frame, reformatter = PlanesFrame(rows * 2 // 3, width), VideoReformatter()
    for one, target in zip(planes, rgb, strict=True):
        planar = reformatter.reformat(
            frame.filled(one), format="gbrp", interpolation=Interpolation.BILINEAR | EXACT, threads=1
        )
        for plane, channel in zip(planar.planes, (1, 2, 0), strict=True):
            target[..., channel] = _rows(plane, *target.shape[:2])
    return rgb


class PlanesFrame:
    """A frame for FFmpeg to read, with what its planes mean. One for all: a new one costs more than filling it."""

    def __init__(self, height: int, width: int) -> None:
        self._frame = VideoFrame(width, height, "yuv420p")
        self._frame.colorspace, self._frame.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        self._rows = [
            np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size) for plane in self._frame.planes
        ]

    def filled(self, planes: UInt8[np.ndarray, "p w"]) -> VideoFrame:
        """Valid until the next call."""
        for rows, part in zip(self._rows, split_planes(planes), strict=True):
            rows[: part.shape[0], : part.shape[1]] = part
        return self._frame


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


def _pixel_aspect(stream: VideoStream) -> float:
    ratio = float(stream.sample_aspect_ratio or 1)
    is_square = abs(ratio - 1) < _SQUARE_TOLERANCE or not 0.1 < ratio < 10
    return 1.0 if is_square else ratio
