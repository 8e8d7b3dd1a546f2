"""Decoded frames -> RGB arrays: upright, with square pixels and right colours, cropped and scaled where wanted.

Colours. The stream's own tags (matrix, range, place of the colour samples) decide. Without a matrix, a picture 1280 or
more wide or more than 576 high is BT.709 and a smaller one BT.601, as players assume; without a range, it is limited.
Ten and more bits are rounded to eight. High dynamic range (PQ, HLG) is converted by its matrix and not tone-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

# swscale's default conversion is faster but darkens every picture by one level; these flags leave no bias, and give the
# same bits on every processor.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_UNTAGGED = (2, 3)  # matrix "unspecified" and "reserved", ITU-T H.273 table 4
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
        )


class RgbConverter:
    """Turns frames of one video into RGB arrays of one size; keeps its scaling tables between frames.

    `window` is cut out of the upright picture and scaled to `size` (height, width), antialiased. What is cut away is
    never converted, and scaling works on the stored planes, so a small view costs a fraction of the full picture.
    """

    def __init__(
        self,
        picture: Picture,
        window: Window | None = None,
        size: tuple[int, int] | None = None,
        rotate_180: bool = False,
    ) -> None:
        whole = Window(0, 0, picture.height, picture.width)
        self._picture = picture
        self._window = None if window in (None, whole) else window
        self._rotate_180 = rotate_180
        self.height, self.width = size or (window or whole)[2:]
        self._reformatter = VideoReformatter()
        self._crop: _Crop | None = None

    def convert(self, frame: VideoFrame, rgb: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write the frame's picture into `rgb`, whose size is `height`, `width`."""
        picture = self._picture
        size = (self.width, self.height) if not picture.swaps_axes else (self.height, self.width)
        is_large = picture.stored_width >= 1280 or picture.stored_height > 576
        is_untagged = frame.colorspace in _UNTAGGED and not frame.format.is_rgb
        planar = self._reformatter.reformat(
            self._cropped(frame),
            *size,
            format="gbrp",  # the same levels as packed RGB, computed faster
            src_colorspace=Colorspace.ITU709 if is_untagged and is_large else None,
            interpolation=Interpolation.BILINEAR | EXACT,
            threads=1,
        )
        step_x = -1 if picture.flip_x != self._rotate_180 else 1
        step_y = -1 if picture.flip_y != self._rotate_180 else 1
        for plane, channel in zip(planar.planes, (1, 2, 0), strict=True):
            stored = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: size[1], : size[0]]
            rgb[..., channel] = (stored.T if picture.swaps_axes else stored)[::step_y, ::step_x]

    def _cropped(self, frame: VideoFrame) -> VideoFrame:
        if self._window is None:
            return frame
        if self._crop is None or not self._crop.fits(frame):
            self._crop = _Crop(frame, self._stored_window(frame))
        return self._crop.apply(frame)

    def _stored_window(self, frame: VideoFrame) -> Window:
        """Where the window lies in the frame as it is stored, to the nearest pixel."""
        assert self._window is not None
        picture = self._picture
        top, left, height, width = self._window
        if picture.flip_y != self._rotate_180:
            top = picture.height - top - height
        if picture.flip_x != self._rotate_180:
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


class _Crop:
    """Cuts a window out of frames of one size and format without copying them."""

    def __init__(self, frame: VideoFrame, window: Window) -> None:
        self._takes = (frame.width, frame.height, frame.format.name)
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        crop = self._graph.add("crop", f"{window.width}:{window.height}:{window.left}:{window.top}:exact=1")
        self._graph.link_nodes(source, crop, self._graph.add("buffersink")).configure()

    def fits(self, frame: VideoFrame) -> bool:
        return self._takes == (frame.width, frame.height, frame.format.name)

    def apply(self, frame: VideoFrame) -> VideoFrame:
        self._graph.push(frame)
        cropped = self._graph.pull()
        assert isinstance(cropped, VideoFrame)
        return cropped


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
