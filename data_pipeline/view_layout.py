"""Several views as one picture: where each of them lies, in pixels and in latents alike.

Views are encoded one by one and their latents laid out, never the other way round: so `build` has stored them, and a
convolutional codec would mix two views along the line where they touch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from configs.loader import UserError

from .batch_memory import copy_same_shape
from .encoders import VideoCodec
from .video_io import ViewConfig

Layout = Literal["single", "stack_height", "tile", "separate"]

PIXELS, LATENTS = -3, -2
"""Which axis is the height, with the width behind it: of video [… h w 3], of latents [… h w]."""


@dataclass(frozen=True)
class ViewLayout:
    """Of these views: single shows one at a time, stack_height one above another, tile row by row in a grid that is as
    wide as high or one wider (cells that are left over stay zero), separate keeps them apart."""

    kind: Layout
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # height and width of each, in pixels

    @classmethod
    def of(cls, kind: Layout, names: Sequence[str], views: Mapping[str, ViewConfig]) -> Self:
        sizes = tuple((views[name].height, views[name].width) for name in names)
        what = "width" if kind == "stack_height" else "size"
        if len({width if what == "width" else (height, width) for height, width in sizes}) > 1:
            found = ", ".join(f"{name} {height}x{width}" for name, (height, width) in zip(names, sizes, strict=True))
            raise UserError(
                f"layout={kind} takes views of one {what}, but these are {found} (height x width); choose views that "
                f"share it, or build the dataset with one {what} for all."
            )
        return cls(kind, tuple(names), sizes)

    @property
    def num_views(self) -> int:
        """v: how many are shown at once."""
        return 1 if self.kind == "single" else len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture (of one view, where they are kept apart), in pixels."""
        if self.kind == "separate":
            return self.sizes[0]
        return sum(self._row_heights), self._num_columns * self.sizes[0][1]

    def join(self, views: Sequence[Tensor], height_axis: int) -> Tensor:
        """The picture of `num_views` views; kept apart, they get an axis of their own in front."""
        if self.kind == "separate":
            return torch.stack(list(views))
        return self._tiled(views, height_axis)

    def _tiled(self, views: Sequence[Tensor], height_axis: int) -> Tensor:
        columns = self._num_columns
        left_over = [torch.zeros_like(views[0])] * (-len(views) % columns)
        cells = [*views, *left_over]
        rows = [torch.cat(cells[first : first + columns], height_axis + 1) for first in range(0, len(cells), columns)]
        return torch.cat(rows, height_axis)

    def write(self, picture: Tensor, views: Sequence[Tensor], height_axis: int) -> None:
        """Makes a picture what `join` gives. ValueError where a view has another size than its place."""
        if self.kind == "separate":
            places = list(picture)
        else:
            if self.kind == "tile":
                picture.zero_()  # some cells may be left over
            places = self.split(picture, height_axis)
        for place, view in zip(places, views, strict=True):
            copy_same_shape(place, view)

    def split(self, picture: Tensor, height_axis: int) -> list[Tensor]:
        """The views in a picture, with or without a batch axis."""
        if self.num_views == 1:
            return [picture]
        pixels = self.size[0] // picture.shape[height_axis]  # of which each row stands for so many
        rows = picture.split([height // pixels for height in self._row_heights], height_axis)
        cells = [cell for row in rows for cell in row.chunk(self._num_columns, height_axis + 1)]
        return cells[: self.num_views]

    @property
    def _num_columns(self) -> int:
        return math.ceil(math.sqrt(self.num_views)) if self.kind == "tile" else 1

    @property
    def _row_heights(self) -> list[int]:
        return [height for height, _ in self.sizes[: self.num_views : self._num_columns]]


class LaidOutCodec:
    """Encodes and decodes pictures of several views, each view by itself."""

    def __init__(self, codec: VideoCodec, layout: ViewLayout) -> None:
        self.codec, self.layout = codec, layout

    @property
    def spatial_stride(self) -> int:
        return self.codec.spatial_stride

    def to(self, device: torch.device | str) -> Self:
        self.codec.to(device)
        return self

    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c hl wl"]:
        return self.layout.join([self.codec.encode(view) for view in self.layout.split(video, PIXELS)], LATENTS)

    def decode(self, latents: Float[Tensor, "b t c hl wl"]) -> UInt8[Tensor, "b f h w 3"]:
        return self.layout.join([self.codec.decode(view) for view in self.layout.split(latents, LATENTS)], PIXELS)
