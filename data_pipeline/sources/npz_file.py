"""The arrays in a .npz archive, read by rows and never unpickled.

An archive is a zip file of .npy members. What was saved without compression is read where it lies; a compressed member
is unpacked from its start up to the wanted rows, and stays open at that place for the rows that come next.
"""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from ..video_index import PathLike, file_identity
from .base import SourceError
from .files import LFS_DETAIL, LFS_POINTER, check_file, check_size, open_file

_READ_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError, struct.error, KeyError),
    *(tokenize.TokenError, SyntaxError),  # NumPy, for a header that it does not understand
)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: the lengths of its name and of its extra field
_BLOCK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**16  # of a .npy; NumPy takes headers of 10,000 bytes, but reads as many as they claim to have


@dataclass(frozen=True)
class StoredArray:
    """One member: what it holds, and where."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool  # columns first: a row is not in one place
    data_start: int  # in the unpacked member
    file_start: int | None  # in the file; None where it is compressed

    @property
    def end(self) -> int:
        """Of the data, in the file or else in the unpacked member."""
        return (self.data_start if self.file_start is None else self.file_start) + self.num_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check_rows(self, path: PathLike, num_axes: int = 1) -> None:
        """SourceError where reading a single row takes too much memory."""
        row_bytes = math.prod(self.shape[num_axes:]) * self.dtype.itemsize
        # Of columns that come first, no row is in one place: all of them are read.
        check_size(self.num_bytes if self.is_fortran else row_bytes, path, f"a row of {self.member}")


@dataclass(frozen=True)
class NpzIndex:
    arrays: dict[str, StoredArray]
    objects: tuple[str, ...]  # arrays of Python objects, left closed


def index_npz(path: PathLike) -> NpzIndex:
    """What the archive holds, from its headers; kept per process. SourceError where it is damaged."""
    check_file(path)
    return _cached_index(*file_identity(path))


@lru_cache(maxsize=1024)
def _cached_index(path: str, size: int, mtime_ns: int) -> NpzIndex:
    arrays: dict[str, StoredArray] = {}
    objects = []
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                name, extension = os.path.splitext(info.filename)
                if extension != ".npy":
                    continue
                array = _read_header(archive, info, file)
                end = info.file_size if array.file_start is None else size
                if array.dtype.hasobject:
                    objects.append(name)
                elif min(array.shape, default=0) < 0 or array.end > end:
                    raise SourceError("truncated_file", path, f"its array {name} ends before its last row")
                else:
                    arrays[name] = array
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's start
            raise
        raise _why_not_opened(path, error) from error
    return NpzIndex(arrays, tuple(objects))


def read_array(path: PathLike, member: str = "") -> np.ndarray:
    """The array in a .npy file, or one in a .npz: the named or the only one. SourceError where it cannot be read."""
    where = str(path)
    with open_file(path) as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            return _read_npy(where, file)
    arrays = index_npz(path).arrays
    names = ", ".join(arrays) or "none"
    if not member and len(arrays) != 1:
        raise SourceError("bad_record", where, f"which array? write {Path(path).name}#NAME, with one of {names}")
    if member and member not in arrays:
        raise SourceError("unreadable_file", where, f"it has no array {member} that can be read, but {names}")
    array = arrays[member or next(iter(arrays))]
    check_size(array.num_bytes, where, f"its array {array.member}")
    if not array.shape or not array.shape[0]:
        return np.empty(array.shape, array.dtype)
    try:
        return read_rows(path, array, range(array.shape[0]))
    except ValueError as error:
        raise SourceError("unreadable_file", where, str(error)) from error


def _read_npy(path: str, file: IO[bytes]) -> np.ndarray:
    try:
        shape, _, dtype, data_start = _read_npy_header(file)
        num_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or num_bytes > os.fstat(file.fileno()).st_size - data_start:
            raise SourceError("truncated_file", path, "it ends before the last row of its array")
        check_size(num_bytes, path, "its array")
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))
    except _READ_ERRORS as error:
        raise SourceError("unreadable_file", path, f"no array can be read from it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether columns come first, dtype, where the data starts)."""
    start = file.read(12)
    is_short = start[6:7] == b"\x01"  # the field that says how long the rest is
    num_bytes = int.from_bytes(start[8:10], "little") + 10 if is_short else int.from_bytes(start[8:12], "little") + 12
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims to have {num_bytes} bytes")
    head = io.BytesIO(start + file.read(max(0, num_bytes - len(start))))
    np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if is_short else np.lib.format.read_array_header_2_0
    return *read(head), head.tell()


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes]) -> StoredArray:
    with archive.open(info) as member:
        shape, is_fortran, dtype, data_start = _read_npy_header(member)
    file_start = None
    if info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset)
        file_start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(file.read(30))) + data_start
    return StoredArray(info.filename, shape, dtype, is_fortran and len(shape) > 1, data_start, file_start)


def _why_not_opened(path: str, error: Exception) -> SourceError:
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return SourceError("unreadable_file", path, "the file is empty")
    if head.startswith(LFS_POINTER):
        return SourceError("unreadable_file", path, LFS_DETAIL)
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return SourceError("truncated_file", path, "its end is missing: copy or download it again")
    return SourceError("unreadable_file", path, f"it is not a readable .npz archive ({error})")


def read_rows(path: PathLike, array: StoredArray, rows: Sequence[int], num_axes: int = 1) -> np.ndarray:
    """Rows of an array, increasing; its first `num_axes` axes count as one. ValueError where they cannot be read."""
    shape = array.shape[num_axes:]
    stride = math.prod(shape) * array.dtype.itemsize
    path, size, mtime_ns = file_identity(path)
    try:
        if array.is_fortran:
            unpacked = _unpacked_member(path, size, mtime_ns, array.member)
            whole = np.frombuffer(unpacked.read(array.data_start, array.num_bytes), array.dtype)
            return whole.reshape(array.shape, order="F").reshape(-1, *shape)[list(rows)]
        result = np.empty((len(rows), *shape), array.dtype)
        for place, (first, end) in _runs(rows):
            if array.file_start is None:
                unpacked = _unpacked_member(path, size, mtime_ns, array.member)
                data = unpacked.read(array.data_start + first * stride, (end - first) * stride)
            else:
                with open(path, "rb", buffering=0) as file:
                    data = os.pread(file.fileno(), (end - first) * stride, array.file_start + first * stride)
            result[place : place + end - first] = np.frombuffer(data, array.dtype).reshape(end - first, *shape)
    except _READ_ERRORS as error:
        _unpacked_member.cache_clear()  # what is open stands somewhere unknown
        raise ValueError(f"rows of {array.member} cannot be read ({error})") from error
    return result


def _runs(rows: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Increasing rows as runs [first, end), each with its place in `rows`."""
    ordered = np.asarray(rows)
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    starts = [0, *breaks.tolist()]
    return [
        (start, (int(run[0]), int(run[-1]) + 1)) for start, run in zip(starts, np.split(ordered, breaks), strict=True)
    ]


class _UnpackedMember:
    """A compressed member that is read mostly forward."""

    def __init__(self, path: str, member: str) -> None:
        self._archive = zipfile.ZipFile(path)
        self._member = member
        self._stream = self._archive.open(member)

    def read(self, start: int, size: int) -> bytes:
        if start < self._stream.tell():
            self._stream = self._archive.open(self._member)
        while (ahead := start - self._stream.tell()) > 0:
            if not self._stream.read(min(ahead, _BLOCK_BYTES)):
                break
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("its end is missing")
        return data


@lru_cache(maxsize=8)
def _unpacked_member(path: str, size: int, mtime_ns: int, member: str) -> _UnpackedMember:
    return _UnpackedMember(path, member)
