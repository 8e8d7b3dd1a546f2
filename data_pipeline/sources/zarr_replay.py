"""Replay buffers in Zarr, as Diffusion Policy and UMI write them: `data/<name>` with a row per step, all episodes one
after the other, and `meta/episode_ends` (https://github.com/real-stanford/diffusion_policy).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_index import VideoError
from .base import Episode, SourceError, StoredImages, check_dims, content_sha256, key_safe
from .files import check_size, walk
from .step_arrays import (
    ArrayInfo,
    Choice,
    PictureLayout,
    StepArraysConfig,
    choose_arrays,
    describe_pictures,
    picture_layout,
    read_control,
    view_names,
    with_range,
)
from .zarr_store import (
    READ_ERRORS,
    StoreFiles,
    find_arrays,
    is_store_with,
    open_files,
    read_array,
    read_rows,
)

ENDS = "meta/episode_ends"
MAX_EPISODES = 10_000_000


class ZarrConfig(StepArraysConfig):
    """A Zarr replay buffer (a folder, or a .zarr.zip), or a folder of them."""

    kind: Literal["zarr"] = "zarr"


@dataclass(frozen=True)
class ZarrImages(StoredImages):
    """The rows of an array of pictures that belong to one episode."""

    key: str
    first_row: int
    layout: PictureLayout
    stored_as: str

    @property
    def codec(self) -> str:
        return self.stored_as

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        wanted, row_of_position = np.unique(np.asarray(positions, dtype=np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise VideoError("out_of_range", self.path, f"frames {list(positions)[:3]} of {self.num_frames}")
        try:
            rows = read_rows(self.path, self.key, (self.first_row + wanted).tolist())
        except (*READ_ERRORS, SourceError) as error:
            raise VideoError("undecodable_video", self.path, f"{self.key}: {error}") from error
        return self.layout.to_rgb(rows)[row_of_position]


class ZarrSource:
    """Reads one or several buffers; episodes are called `<buffer>_000012`."""

    format_name = "Zarr replay buffer"

    def __init__(self, config: ZarrConfig) -> None:
        self._config = config
        self._root = config.path
        self.name = config.name or _buffer_name(config.path.resolve())

    def list_episodes(self) -> list[str]:
        _ = self._hz, self._choice
        return [f"{name}_{i:06d}" for name, buffer in self._buffers.items() for i in range(len(buffer.ends))]

    def repairs(self) -> tuple[str, ...]:
        notes = []
        if self._config.control_hz is None and self._config.embodiment is None:
            notes.append(f"The rate of {self._hz:g} Hz is that of the timestamps.")
        for name, buffer in self._buffers.items():
            notes += [f"{name}: {key} is left out: {problem}." for key, problem in buffer.problems.items()]
        return tuple(notes)

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._choice.embodiment(self.name, self._hz)

    def read_episode(self, episode_id: str) -> Episode:
        name, _, number = episode_id.rpartition("_")
        buffer = self._buffers.get(name)
        if buffer is None or not number.isdecimal() or int(number) >= len(buffer.ends):
            raise SourceError("unknown_episode", str(self._root), f"there is no episode {episode_id}")
        part = _Part(buffer, int(number))
        if part.end == part.first:
            raise SourceError("too_short", part.uri, "it has no steps")
        notes = list(self.repairs())
        views = self._views(part, notes)
        num_frames = part.end - part.first
        actions, proprio = read_control(
            self._choice, self._config, buffer.infos, part.rows, num_frames, part.uri, notes
        )
        if actions is not None:
            part.note_missing_chunks((*self._choice.actions, *self._choice.proprio), notes)
            check_dims(self.embodiment(), actions, proprio, part.uri)
        embodiment = self.embodiment() if actions is not None else None
        instruction = self._config.instruction
        tables = [array.tobytes() for array in (actions, proprio) if array is not None]
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=part.uri,
            views=views,
            fps=self._hz,
            num_frames=num_frames,
            actions=actions,
            proprio=proprio,
            control_hz=self._hz if actions is not None else None,
            embodiment=embodiment.name if embodiment is not None else None,
            instruction=instruction,
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256(
                [], part.pictures_digest([view.key for view in views.values()]), *tables, (instruction or "").encode()
            ),
            repairs=tuple(notes),
        )

    def _views(self, part: _Part, notes: list[str]) -> dict[str, ZarrImages]:
        views = {}
        for name, view in view_names(self._choice.images).items():
            if name not in part.buffer.arrays:
                continue
            part.check_pictures(name)
            array, row_shape = part.buffer.arrays[name], part.buffer.infos[name].shape
            check_size(math.prod(row_shape) * array.dtype.itemsize, part.uri, f"each row of {name}")
            layout = part.buffer.layout(name)
            if layout is not None:
                describe_pictures(name, layout, array.dtype, notes)
                stored_as = f"{array.dtype.name} array"
                views[view] = ZarrImages(
                    str(part.buffer.path), part.end - part.first, self._hz, array.key, part.first, layout, stored_as
                )
        if not views:
            raise SourceError("no_images", part.uri, "none of its arrays holds colour pictures")
        return views

    @cached_property
    def _buffers(self) -> dict[str, _Buffer]:
        paths = find_buffers(self._root)
        if not paths:
            raise UserError(f"{self._root}: holds no Zarr store with data/ and {ENDS}.")
        return {_relative_name(path, self._root): _Buffer(path) for path in paths}

    @cached_property
    def _choice(self) -> Choice:
        """What the first buffer holds is what all are expected to hold."""
        buffer = next(iter(self._buffers.values()))
        choice = choose_arrays(buffer.infos, self._config, str(buffer.path))
        if not choice.images:
            why = "; ".join(f"{key}: {problem}" for key, problem in buffer.problems.items())
            raise UserError(
                f"{buffer.path}: has no array of colour pictures that can be read"
                + (f" ({why})." if why else f" (it has {', '.join(buffer.arrays) or 'none'}).")
            )
        return choice

    @cached_property
    def _hz(self) -> float:
        buffer = next(iter(self._buffers.values()))
        recorded = None if self._config.control_hz or self._config.embodiment else buffer.timestamps_hz()
        return recorded or self._config.steps_per_s(self._root)


def find_buffers(root: Path) -> list[Path]:
    """Replay buffers at or below `root`, sorted."""
    if is_store_with(root, ENDS):
        return [root]
    found = []
    for folder, folders, names in walk(root):
        stores = [name for name in folders if is_store_with(folder / name, ENDS)]
        folders[:] = [name for name in folders if name not in stores]
        archives = [name for name in names if name.endswith(".zarr.zip") and is_store_with(folder / name, ENDS)]
        found += [folder / name for name in (*stores, *archives)]
    return sorted(found)


def _buffer_name(path: Path) -> str:
    return key_safe(path.name.removesuffix(".zip").removesuffix(".zarr"))


def _relative_name(path: Path, root: Path) -> str:
    """A buffer that is added beside others changes no other's name."""
    relative = path.relative_to(root)
    return _buffer_name(path.resolve()) if path == root else key_safe(f"{relative.parent / _buffer_name(path)}")


# --- one buffer ------------------------------------------------------------------------------------------------------


class _Buffer:
    """A store: its arrays, and where its episodes end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.files: StoreFiles = open_files(path)
            self.arrays, self.problems = find_arrays(self.files, "data")
            ends = read_array(self.files, ENDS)
            if ends is None or len(ends.shape) != 1 or ends.shape[0] > MAX_EPISODES or ends.dtype.kind not in "iu":
                raise ValueError(f"{ENDS} is no list of row numbers")
            if not all(key in self.files for key in ends.chunk_keys(0, ends.shape[0])):
                raise ValueError(f"a part of {ENDS} is missing; copy or download it again")
            self.ends: Int64[np.ndarray, "n"] = (
                read_rows(path, ENDS, range(ends.shape[0])).astype(np.int64) if ends.shape[0] else np.zeros(0, np.int64)
            )
        except (*READ_ERRORS, SourceError, OSError, VideoError) as error:
            raise UserError(f"{path}: its episodes cannot be read: {error}.") from error
        if np.any(np.diff(self.ends, prepend=0) < 0):
            raise UserError(f"{path}: {ENDS} goes backwards; the store is damaged.")
        self.infos = {
            name: ArrayInfo(array.shape[0], array.shape[1:], array.dtype) for name, array in self.arrays.items()
        }
        self._layouts: dict[str, PictureLayout | None] = {}

    def layout(self, name: str) -> PictureLayout | None:
        """How the pictures are stored; the range of their numbers is judged once, for all episodes."""
        if name not in self._layouts:
            array, layout = self.arrays[name], picture_layout(self.infos[name])
            if layout is not None and array.dtype != np.uint8:
                rows = sorted({0, int(self.ends[-1]) // 2, int(self.ends[-1]) - 1})
                layout = with_range(layout, array.dtype, self.read(name, rows))
            self._layouts[name] = layout
        return self._layouts[name]

    def read(self, name: str, rows: Sequence[int]) -> np.ndarray:
        try:
            return read_rows(self.path, self.arrays[name].key, rows)
        except READ_ERRORS as error:
            raise SourceError("unreadable_file", str(self.path), f"{name}: {error}") from error

    def timestamps_hz(self) -> float | None:
        """Steps per second by `data/timestamp` (in seconds), which buffers of real robots have."""
        info = self.infos.get("timestamp")
        num_rows = min(int(self.ends[0]), 10_000) if len(self.ends) else 0
        if info is None or info.size != 1 or num_rows < 2 or info.num_rows < num_rows:
            return None
        interval = float(np.median(np.diff(self.read("timestamp", range(num_rows)).reshape(-1))))
        return round(1 / interval, 3) if 1e-3 < interval < 60 else None


class _Part:
    """One episode: rows [first, end) of every array."""

    def __init__(self, buffer: _Buffer, number: int) -> None:
        self.buffer = buffer
        self.first, self.end = int(buffer.ends[number - 1]) if number else 0, int(buffer.ends[number])
        self.uri = f"{buffer.path}#{number}"

    def rows(self, name: str) -> np.ndarray:
        self._check_length(name)
        info = self.buffer.infos[name]
        check_size((self.end - self.first) * info.size * info.dtype.itemsize, self.uri, f"its part of {name}")
        return self.buffer.read(name, range(self.first, self.end))

    def check_pictures(self, name: str) -> None:
        """Zarr reads a chunk that is not there as zeros; no camera sees that."""
        self._check_length(name)
        missing = self._missing_chunks(name)
        if missing:
            detail = f"{len(missing)} chunks of {name} are not there ({missing[0]}): copy or download the store again"
            raise SourceError("missing_chunks", self.uri, detail)

    def note_missing_chunks(self, names: Sequence[str], notes: list[str]) -> None:
        """Numbers that are all zero are often not written."""
        for name in names:
            missing = self._missing_chunks(name)
            if missing:
                notes.append(f"{len(missing)} chunks of {name} are not stored: their rows read as the fill value.")

    def pictures_digest(self, keys: Sequence[str]) -> bytes:
        """Of the chunks as they are stored: cheaper than of the pixels, and as telling."""
        digest = hashlib.sha256(f"{self.first} {self.end}".encode())
        chunks = [
            chunk
            for array in self.buffer.arrays.values()
            if array.key in keys
            for chunk in array.chunk_keys(self.first, self.end)
        ]
        for chunk in chunks:
            try:
                digest.update(hashlib.sha256(self.buffer.files.read(chunk) or b"").digest())
            except READ_ERRORS as error:
                raise SourceError("unreadable_file", self.uri, f"{chunk}: {error}") from error
        return digest.digest()

    def _missing_chunks(self, name: str) -> list[str]:
        array = self.buffer.arrays[name]
        check_size(100 * array.num_chunks(self.first, self.end), self.uri, f"the list of the chunks of {name}")
        return [key for key in array.chunk_keys(self.first, self.end) if key not in self.buffer.files]

    def _check_length(self, name: str) -> None:
        num_rows = self.buffer.infos[name].num_rows
        if num_rows < self.end:
            detail = f"{name} has {num_rows} rows, the episode ends at row {self.end}"
            raise SourceError("missing_rows", self.uri, detail)
