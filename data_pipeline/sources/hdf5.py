"""What recordings in HDF5 share: files opened with clear reasons, small arrays read whole, images read by rows.

An HDF5 file can pull in other files by name, in three ways: external links, virtual datasets and external storage. All
are refused, so that a recording can read nothing but itself. Objects are never unpickled: only numbers, texts and
encoded pictures are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from ..video_index import VideoError
from .base import SourceError, StoredImages, as_bytes
from .files import LFS_DETAIL, LFS_POINTER, MACHINE_ERRORS, bounded_memory, check_file, check_size, find_files

HDF5_SUFFIXES = (".hdf5", ".h5")

MAX_SIDE = 16_384
"""Height and width of a picture."""

_BLOCK_BYTES = 64 * 2**20
_CHUNK_CACHE_BYTES = 32 * 2**20  # compressed chunks span many frames: without a cache each frame unpacks its chunk anew
_MAX_SOFT_LINKS = 8
_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
_VIDEO_REASONS = {"missing_file": "missing_video", "truncated_file": "truncated_video"}
_READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeDecodeError)


# --- files -----------------------------------------------------------------------------------------------------------


def any_file(root: Path, is_it: Callable[[h5py.File], object], limit: int = 16) -> bool:
    """Whether one of the first HDF5 files at or below `root` is what `is_it` looks for. For detecting a format."""
    for path in islice(find_files(root, HDF5_SUFFIXES), limit):
        try:
            with open_hdf5(path) as file:
                if is_it(file):
                    return True
        except SourceError:
            continue
    return False


def relative_parts(path: Path, root: Path) -> tuple[str, ...]:
    """`path` below the set's root, without its suffix; a set that is one file has its folder as root."""
    return path.relative_to(root if root.is_dir() else root.parent).with_suffix("").parts


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The open file. Whatever HDF5 raises, here or while it is read, becomes a SourceError."""
    check_file(path)
    try:
        # Nothing is written, and many network file systems have no locks: they would refuse to open.
        file = h5py.File(os.fspath(path), "r", locking=False, rdcc_nbytes=_CHUNK_CACHE_BYTES)
    except _READ_ERRORS as error:
        _raise_if_machine(error)
        raise _why_not_opened(path, error) from error
    with file, bounded_memory(path):
        try:
            yield file
        except _READ_ERRORS as error:
            _raise_if_machine(error)
            raise SourceError("unreadable_file", str(path), f"reading it fails ({_first_line(error)})") from error


def _raise_if_machine(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        raise error


def _why_not_opened(path: Path, error: Exception) -> SourceError:
    where = str(path)
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return SourceError("unreadable_file", where, "the file is empty")
    if head.startswith(LFS_POINTER):
        return SourceError("unreadable_file", where, LFS_DETAIL)
    if "truncated file" in str(error):
        return SourceError("truncated_file", where, "its end is missing: copy or download it again")
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return SourceError("unreadable_file", where, "it is a text file")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return SourceError("unreadable_file", where, f"the HDF5 file is damaged ({_first_line(error)})")
    return SourceError("unreadable_file", where, "it is not an HDF5 file")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- what is in a file -----------------------------------------------------------------------------------------------


def find_object(group: h5py.Group, path: str, hops: int = _MAX_SOFT_LINKS) -> h5py.Group | h5py.Dataset | None:
    """The group or dataset at `path`, None where there is none. SourceError where it leads out of the file.

    h5py's own lookup would open whatever file a link names, even to answer `name in group`.
    """
    found: Any = group
    for name in filter(None, path.split("/")):
        if not isinstance(found, h5py.Group) or not found.id.links.exists(name.encode()):
            return None
        kind = found.id.links.get_info(name.encode()).type
        if kind == h5py.h5l.TYPE_HARD:
            found = found[name]
        elif kind == h5py.h5l.TYPE_SOFT:
            target = found.id.links.get_val(name.encode()).decode()
            if not hops:
                return None
            found = find_object(found.file if target.startswith("/") else found, target, hops - 1)
        else:
            raise _leads_outside(found, f"{name} is a link to another file")
    if isinstance(found, h5py.Dataset):
        if found.is_virtual:
            raise _leads_outside(found, "it is a virtual dataset, put together from others")
        if found.external:
            raise _leads_outside(found, "its values are kept in other files")
        check_size(math.prod(found.chunks or ()) * found.dtype.itemsize, _where(found), "each of its chunks")
    return found if isinstance(found, h5py.Group | h5py.Dataset) else None


def find_group(group: h5py.Group, path: str) -> h5py.Group | None:
    found = find_object(group, path)
    return found if isinstance(found, h5py.Group) else None


def find_dataset(group: h5py.Group, path: str) -> h5py.Dataset | None:
    found = find_object(group, path)
    return found if isinstance(found, h5py.Dataset) else None


def find_all(group: h5py.Group | None) -> dict[str, h5py.Group | h5py.Dataset]:
    """What lies directly in a group, by name, sorted."""
    found = {name: find_object(group, name) for name in sorted(group)} if group is not None else {}
    return {name: one for name, one in found.items() if one is not None}


def read_rows(group: h5py.Group, names: Sequence[str], notes: list[str]) -> Float32[np.ndarray, "n d"]:
    """Datasets of numbers side by side, whatever their inner shape. Each has one row per step."""
    datasets = [_find_numbers(group, name) for name in names]
    num_bytes = sum(math.prod(one.shape) * max(4, one.dtype.itemsize) for one in datasets)  # exact: headers can lie
    check_size(num_bytes, _where(group), f"the rows of {', '.join(names)}")
    columns = [_read_numbers(dataset) for dataset in datasets]
    lengths = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        detail = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise SourceError("bad_record", _where(group), f"the numbers of rows differ: {detail}")
    rows = np.concatenate(columns, axis=1)
    num_bad = int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
    if num_bad:
        notes.append(f"{num_bad} of the {len(rows)} rows of {', '.join(names)} hold NaN or infinity: they are invalid.")
    return rows


def _find_numbers(group: h5py.Group, name: str) -> h5py.Dataset:
    dataset = find_dataset(group, name)
    if dataset is None:
        raise SourceError("bad_record", _where(group), f"it has no dataset {name}")
    where = _where(dataset)
    if dataset.dtype.kind not in "biuf":
        raise SourceError("bad_record", where, f"it holds {dataset.dtype}, not numbers")
    if dataset.ndim == 0 or dataset.size == 0 or dataset.shape[0] == 0:
        raise SourceError("bad_record", where, f"its shape {dataset.shape} holds no rows")
    return dataset


def _read_numbers(dataset: h5py.Dataset) -> Float32[np.ndarray, "n d"]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and its row invalid
        return np.asarray(dataset[()], dtype=np.float32).reshape(dataset.shape[0], -1)


def read_text(attributes: h5py.AttributeManager, name: str) -> str | None:
    """A text attribute, on one line; None where it is absent, empty or no text."""
    value = attributes.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return " ".join(value.split()) or None if isinstance(value, str) else None


def read_json(attributes: h5py.AttributeManager, name: str) -> dict[str, Any]:
    """A JSON object in a text attribute; empty where there is none."""
    try:
        value = json.loads(read_text(attributes, name) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def rows_sha256(dataset: h5py.Dataset) -> bytes:
    """Digest of a dataset's values: for a file that holds many episodes."""
    digest = hashlib.sha256(repr((dataset.shape, dataset.dtype.str)).encode())
    if dataset.dtype.kind == "O":
        for row in range(len(dataset)):
            data = _encoded_bytes(dataset[row])
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()
    step = max(1, _BLOCK_BYTES // max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))))
    for first in range(0, len(dataset), step):
        digest.update(np.ascontiguousarray(dataset[first : first + step]).tobytes())
    return digest.digest()


def _where(found: h5py.Group | h5py.Dataset) -> str:
    return f"{found.file.filename}:{found.name}"


def _leads_outside(found: h5py.Group | h5py.Dataset, what: str) -> SourceError:
    return SourceError("outside_folder", _where(found), f"{what}; only what the file itself holds is read")


# --- checks that the formats share -----------------------------------------------------------------------------------


def usable_frames(lengths: Mapping[str, int], where: str, notes: list[str]) -> int:
    """How many steps all of these have. Recorders lose a row or two at the end; more means that they are no set."""
    least, most = min(lengths.values()), max(lengths.values())
    told = ", ".join(f"{name} {length}" for name, length in lengths.items())
    if most - least > max(2, round(0.02 * most)):
        raise SourceError("frame_count_mismatch", where, f"the numbers of rows and frames do not fit: {told}")
    if least != most:
        notes.append(f"The numbers of rows and frames differ ({told}): the first {least} are used.")
    return least


# --- images ----------------------------------------------------------------------------------------------------------

Layout = Literal["height_width_rgb", "rgb_height_width", "encoded"]


@dataclass(frozen=True)
class Hdf5Images(StoredImages):
    """A dataset whose rows are frames: arrays, or JPEG and PNG bytes (of their own length, or padded with zeros)."""

    dataset: str
    layout: Layout
    stored_as: str
    scale: float = 1.0  # what brings the stored numbers to 0..255
    flip: bool = False  # rows are stored from the bottom up
    swap_red_blue: bool = False

    @property
    def codec(self) -> str:
        return self.stored_as

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        # Opened for each call: an open handle would go on showing what the file held, even after it is written anew.
        try:
            with open_hdf5(Path(self.path)) as file:
                dataset = find_dataset(file, self.dataset)
                if dataset is None:
                    raise SourceError("bad_record", self.path, f"there is no dataset {self.dataset}")
                frames = self._read_checked(dataset, np.asarray(positions, dtype=np.int64))
        except SourceError as error:
            raise VideoError(_VIDEO_REASONS.get(error.reason, "not_a_video"), self.path, error.detail) from error
        frames = frames[:, ::-1] if self.flip else frames
        return np.ascontiguousarray(frames[..., ::-1] if self.swap_red_blue else frames)

    def _read_checked(self, dataset: h5py.Dataset, positions: np.ndarray) -> np.ndarray:
        try:
            return self._read(dataset, positions)
        except _READ_ERRORS as error:
            _raise_if_machine(error)
            raise VideoError("undecodable_video", self.path, f"{self.dataset}: {_first_line(error)}") from error

    def _read(self, dataset: h5py.Dataset, positions: np.ndarray) -> np.ndarray:
        if positions.size == 0:
            raise VideoError("out_of_range", self.path, "no frames were asked for")
        if positions.min() < 0 or positions.max() >= len(dataset):
            detail = f"frame {positions.min()} to {positions.max()} of the {len(dataset)} in {self.dataset}"
            raise VideoError("out_of_range", self.path, detail)
        wanted, row_of_position = np.unique(positions, return_inverse=True)
        if self.layout == "encoded":
            frames = _stack([self._decode(dataset, int(position)) for position in wanted])
        else:
            frames = np.concatenate([dataset[first:end] for first, end in _runs(wanted)])
            frames = np.moveaxis(frames, 1, -1) if self.layout == "rgb_height_width" else frames
        if frames.dtype != np.uint8:
            frames = as_bytes(frames, self.scale)
        return frames if len(wanted) == len(positions) and np.all(wanted == positions) else frames[row_of_position]

    def _decode(self, dataset: h5py.Dataset, position: int) -> np.ndarray:
        data = _encoded_bytes(dataset[position])
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            detail = f"frame {position} of {self.dataset} does not decode ({_first_line(error)})"
            raise VideoError("undecodable_video", self.path, detail) from error


def image_footage(
    dataset: h5py.Dataset, fps: float, *, flip: bool = False, swap_red_blue: bool = False
) -> Hdf5Images | None:
    """The dataset as frames, None where its rows are no colour pictures."""
    layout = _layout(dataset)
    if layout is None:
        return None
    _check_written(dataset)
    stored_as, scale = f"{dataset.dtype.name} array", 1.0
    if layout == "encoded":
        stored_as = _MAGIC[_magic(dataset) or b""]
    elif dataset.dtype.kind == "f":
        shown = [np.nanmax(dataset[row], initial=0.0) for row in (0, len(dataset) // 2, len(dataset) - 1)]
        scale = 255.0 if max(shown) <= 1.0 else 1.0
    return Hdf5Images(
        path=dataset.file.filename,
        num_frames=len(dataset),
        fps=fps,
        dataset=dataset.name,
        layout=layout,
        stored_as=stored_as,
        scale=scale,
        flip=flip,
        swap_red_blue=swap_red_blue,
    )


def _check_written(dataset: h5py.Dataset) -> None:
    """HDF5 reads what was never written as black pictures; no camera sees that, and there can be any number of them."""
    chunks = dataset.chunks or dataset.shape
    expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, chunks, strict=True))
    found = dataset.id.get_num_chunks() if dataset.chunks else int(dataset.id.get_storage_size() > 0)
    if found < expected:
        what = f"{expected - found} of the {expected} chunks of its pictures were never written"
        raise SourceError("missing_chunks", _where(dataset), f"{what}: copy or download the file again")


def _layout(dataset: h5py.Dataset) -> Layout | None:
    if dataset.ndim == 0 or dataset.shape[0] == 0:
        return None
    check_size(math.prod(dataset.shape[1:]) * dataset.dtype.itemsize, _where(dataset), "each of its rows")
    if dataset.ndim == 4 and (dataset.dtype == np.uint8 or dataset.dtype.kind == "f"):
        if max(dataset.shape[1:]) > MAX_SIDE or min(dataset.shape[1:]) < 3:
            return None
        if dataset.shape[3] == 3:
            return "height_width_rgb"
        return "rgb_height_width" if dataset.shape[1] == 3 else None
    is_padded_rows = dataset.ndim == 2 and dataset.dtype == np.uint8
    is_bytes = dataset.ndim == 1 and (dataset.dtype.kind == "S" or _is_variable_bytes(dataset.dtype))
    return "encoded" if (is_padded_rows or is_bytes) and _magic(dataset) else None


def _is_variable_bytes(dtype: np.dtype) -> bool:
    """Of Python objects, h5py keeps bytes, texts and arrays apart by the type's metadata."""
    element = h5py.check_vlen_dtype(dtype)
    is_bytes = element is not None and np.dtype(element) == np.uint8
    return is_bytes or h5py.check_string_dtype(dtype) is not None


def _magic(dataset: h5py.Dataset) -> bytes | None:
    head = _encoded_bytes(dataset[0, :8] if dataset.ndim == 2 else dataset[0])[:8]
    return next((magic for magic in _MAGIC if head.startswith(magic)), None)


def _encoded_bytes(row: Any) -> bytes:
    if isinstance(row, np.ndarray):
        return bytes(row.tobytes())
    return row.encode("utf-8", errors="surrogateescape") if isinstance(row, str) else bytes(row)


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"its pictures have different sizes: {', '.join(map(str, sorted(sizes)))}")
    return np.stack(frames)


def _runs(wanted: np.ndarray) -> list[tuple[int, int]]:
    """Increasing positions as runs [first, end): HDF5 reads a slice in one go, a list of rows one by one."""
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)]
