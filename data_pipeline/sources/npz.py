"""Episodes in NumPy's .npz files: one file is one episode, or a batch of them (arrays [episode, step, ...])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_index import VideoError
from .base import Episode, SourceError, StoredImages, check_dims, content_sha256, key_safe, stable_id
from .files import check_size, find_files
from .npz_file import NpzIndex, StoredArray, index_npz, read_rows
from .step_arrays import (
    ACTION_KEYS,
    PROPRIO_KEYS,
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

SUFFIXES = (".npz",)
INSTRUCTION_KEYS = ("language_instruction", "instruction", "task", "text", "caption")

_NUM_TRIED = 16  # files that are looked into for the layout of the set


class NpzConfig(StepArraysConfig):
    """A folder of .npz files, or one file."""

    kind: Literal["npz"] = "npz"


@dataclass(frozen=True)
class NpzImages(StoredImages):
    """Rows of an array of pictures; in a batch all episodes' rows follow one another."""

    array: StoredArray
    num_axes: int  # leading axes that are not part of a picture: 1, in a batch 2
    first_row: int
    layout: PictureLayout

    @property
    def codec(self) -> str:
        return f"{self.array.dtype.name} array"

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        wanted, row_of_position = np.unique(np.asarray(positions, dtype=np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise VideoError("out_of_range", self.path, f"frames {list(positions)[:3]} of {self.num_frames}")
        try:
            rows = read_rows(self.path, self.array, (self.first_row + wanted).tolist(), self.num_axes)
        except ValueError as error:
            raise VideoError("undecodable_video", self.path, str(error)) from error
        return self.layout.to_rgb(rows)[row_of_position]


class NpzSource:
    """Reads all files below a folder. An episode is called after its file; in a batch, with its number."""

    format_name = "NumPy .npz"

    def __init__(self, config: NpzConfig) -> None:
        self._config = config
        self._root = config.path
        folder = config.path.resolve()
        self.name = config.name or key_safe(folder.stem if folder.is_file() else folder.name)

    def list_episodes(self) -> list[str]:
        _ = self._hz
        if not self._set.is_batch:
            return sorted(self._files)
        return sorted(
            f"{file_id}_{number:06d}" for file_id, path in self._files.items() for number in range(_batch_size(path))
        )

    def repairs(self) -> tuple[str, ...]:
        return ()

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._set.choice.embodiment(self.name, self._hz)

    def read_episode(self, episode_id: str) -> Episode:
        file_id, _, number = episode_id.rpartition("_") if self._set.is_batch else (episode_id, "", "0")
        path = self._files.get(file_id)
        if path is None or not number.isdecimal():
            raise SourceError("unknown_episode", str(self._root), f"there is no episode {episode_id}")
        place = _Place(path, index_npz(path), int(number) if self._set.is_batch else None)
        arrays, notes = place.arrays(), []
        if place.index.objects:
            notes.append(f"Arrays of Python objects are never opened: {', '.join(place.index.objects)}.")
        views = self._views(place, arrays, notes)
        num_frames = min(view.num_frames for view in views.values())
        if any(view.num_frames != num_frames for view in views.values()):
            notes.append(f"The views have different numbers of frames: the first {num_frames} are used.")
        read = partial(place.table, arrays=arrays)
        actions, proprio = read_control(self._set.choice, self._config, arrays, read, num_frames, place.uri, notes)
        embodiment = self.embodiment() if actions is not None else None
        if actions is not None:
            check_dims(embodiment, actions, proprio, place.uri)
        instruction = self._config.instruction or place.instruction()
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=place.uri,
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
            content_sha256=content_sha256([path], str(place.number).encode(), (instruction or "").encode()),
            repairs=tuple(notes),
        )

    def _views(self, place: _Place, arrays: dict[str, ArrayInfo], notes: list[str]) -> dict[str, NpzImages]:
        keys = self._config.image_keys or [key for key, info in arrays.items() if picture_layout(info) is not None]
        views = {}
        for key, view in view_names(keys).items():
            footage = place.footage(key, arrays, self._hz)
            if footage is not None:
                describe_pictures(key, footage.layout, footage.array.dtype, notes)
                views[view] = footage
        if not views:
            raise SourceError("no_images", place.uri, _why_no_images(place, keys))
        return views

    @cached_property
    def _hz(self) -> float:
        return self._config.steps_per_s(self._root)

    @cached_property
    def _files(self) -> dict[str, Path]:
        base = self._root if self._root.is_dir() else self._root.parent
        paths = list(find_files(self._root, SUFFIXES))
        if not paths:
            raise UserError(f"{self._root}: holds no .npz files; check the path of the recordings.")
        return {stable_id(path.relative_to(base).as_posix()): path for path in paths}

    @cached_property
    def _set(self) -> _SetLayout:
        """What the first file with pictures holds is what all are expected to hold."""
        problems = []
        for path in islice(self._files.values(), _NUM_TRIED):
            try:
                index = index_npz(path)
                is_batch = _is_batch(index, str(path))
                arrays = _Place(path, index, 0 if is_batch else None).arrays()
                choice = choose_arrays(arrays, self._config, str(path))
            except SourceError as error:
                problems.append(f"{path.name}: {error.detail}")
                continue
            if choice.images:
                return _SetLayout(is_batch, choice)
            problems.append(f"{path.name}: its arrays are {', '.join(index.arrays) or 'none'}")
        raise UserError(
            f"{self._root}: none of its first {len(problems)} files has an array of colour pictures "
            f"[step, height, width, 3] ({problems[0]})."
        )


@dataclass(frozen=True)
class _SetLayout:
    is_batch: bool
    choice: Choice


def find_npz(path: Path) -> bool:
    """Whether there are .npz files with pictures: others hold calibrations and features beside videos."""
    for file in islice(find_files(path, SUFFIXES), 4):
        try:
            index = index_npz(file)
            place = _Place(file, index, 0 if _is_batch(index, str(file)) else None)
        except SourceError:
            continue
        if any(picture_layout(info) is not None for info in place.arrays().values()):
            return True
    return False


# --- one file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """An episode: a file, and the episode's number where the file is a batch."""

    path: Path
    index: NpzIndex
    number: int | None

    @property
    def uri(self) -> str:
        return str(self.path) if self.number is None else f"{self.path}#{self.number}"

    @property
    def _num_axes(self) -> int:
        return 1 if self.number is None else 2

    def arrays(self) -> dict[str, ArrayInfo]:
        """The arrays with a row per step."""
        axes = self._num_axes
        return {
            name: ArrayInfo(array.shape[axes - 1], array.shape[axes:], array.dtype)
            for name, array in self.index.arrays.items()
            if len(array.shape) >= axes and (self.number is None or array.shape[0] > self.number)
        }

    def rows(self, name: str, rows: Sequence[int], arrays: dict[str, ArrayInfo]) -> np.ndarray:
        first = (self.number or 0) * arrays[name].num_rows
        try:
            return read_rows(self.path, self.index.arrays[name], [first + row for row in rows], self._num_axes)
        except ValueError as error:
            raise SourceError("unreadable_file", self.uri, str(error)) from error

    def table(self, name: str, arrays: dict[str, ArrayInfo]) -> np.ndarray:
        info = arrays[name]
        if not info.is_numbers or info.num_rows == 0:
            raise SourceError(
                "wrong_dims", self.uri, f"{name} has shape {self.index.arrays[name].shape}: no rows of numbers"
            )
        check_size(info.num_rows * info.size * 8, self.uri, name)
        return self.rows(name, range(info.num_rows), arrays)

    def footage(self, name: str, arrays: dict[str, ArrayInfo], fps: float) -> NpzImages | None:
        """The array as frames; None where it has none or is something else."""
        info = arrays.get(name)
        layout = picture_layout(info) if info is not None else None
        if info is None or layout is None or info.num_rows == 0:
            return None
        self.index.arrays[name].check_rows(self.path, self._num_axes)
        is_bytes = info.dtype == np.uint8
        shown = sorted({0, info.num_rows // 2, info.num_rows - 1})
        samples = np.zeros(0) if is_bytes else self.rows(name, shown, arrays)
        layout = with_range(layout, info.dtype, samples)
        if layout is None:
            return None
        first = (self.number or 0) * info.num_rows
        return NpzImages(str(self.path), info.num_rows, fps, self.index.arrays[name], self._num_axes, first, layout)

    def instruction(self) -> str | None:
        for key in INSTRUCTION_KEYS:
            array = self.index.arrays.get(key)
            if array is not None and array.dtype.kind in "US" and 0 < array.num_bytes < 2**16:
                texts = read_rows(self.path, array, range(int(np.prod(array.shape))), len(array.shape))
                text = texts[min(self.number or 0, len(texts) - 1)]
                words = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
                return " ".join(words.split()) or None
        return None


def _is_batch(index: NpzIndex, where: str) -> bool:
    """Pictures with two axes before them are [episode, step, ...], if nothing else contradicts it."""
    shapes = {name: array.shape for name, array in index.arrays.items()}
    dtypes = {name: array.dtype for name, array in index.arrays.items()}
    if any(len(s) == 4 and picture_layout(ArrayInfo(s[0], s[1:], dtypes[n])) is not None for n, s in shapes.items()):
        return False
    pictures = [n for n, s in shapes.items() if len(s) == 5 and picture_layout(ArrayInfo(s[1], s[2:], dtypes[n]))]
    single = [name for name in (*ACTION_KEYS, *PROPRIO_KEYS) if len(shapes.get(name, (0, 0, 0))) < 3]
    if pictures and single:
        detail = f"{pictures[0]} has two axes before its pictures, {single[0]} has one before its numbers"
        raise SourceError("unknown_layout", where, detail)
    return bool(pictures)


def _batch_size(path: Path) -> int:
    """At least one: a file that cannot be read is an episode that cannot be read."""
    try:
        index = index_npz(path)
        if not _is_batch(index, str(path)):
            return 1
        size = max(array.shape[0] for array in index.arrays.values() if len(array.shape) == 5)
        check_size(200 * size, path, "the list of its episodes")
    except SourceError:
        return 1
    return size


def _why_no_images(place: _Place, keys: Sequence[str]) -> str:
    shapes = {name: array.shape for name, array in place.index.arrays.items()}
    single = [
        n for n, s in shapes.items() if len(s) == 3 and picture_layout(ArrayInfo(1, s, place.index.arrays[n].dtype))
    ]
    if single:
        return f"{single[0]} is one picture: files that hold one step each (as those of CALVIN) are not read"
    told = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8])
    return (
        f"none of its arrays ({told or 'none'}) holds colour pictures"
        if not keys
        else f"{', '.join(keys)}: no pictures"
    )
