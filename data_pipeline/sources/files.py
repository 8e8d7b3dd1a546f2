"""Files of recordings that nobody vouches for: only regular ones are opened, and only so much of one is held.

A pipe or a device may never end, a few bytes can unpack to any size, and a header can promise any number of rows. So
readers find and open their files here, and compare what they are about to hold with `MAX_BYTES` before they do.
"""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .base import SourceError

MAX_BYTES = 2**29
"""What a reader may hold of a recording at once: rows of numbers, an unpacked chunk, a text, a picture.

The actions of a whole day at 50 Hz with 30 joints would fit. More is a header that lies, or a file made to fill memory.
"""

MAX_GROWTH_BYTES = 2 * MAX_BYTES
"""How much the process may grow while it reads (`bounded_memory`)."""

MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)
"""Errors that are this machine's fault, not the recording's."""

LFS_POINTER = b"version https://git-lfs"
LFS_DETAIL = "it is a Git LFS pointer: fetch the real file with `git lfs pull`"

PathLike = str | os.PathLike[str]


# --- finding ---------------------------------------------------------------------------------------------------------


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of the folders in it, names of its files), top down, in order, without hidden ones.

    Without pipes, sockets and devices, too. A link to nothing is a file that is rejected by name when it is opened.
    As with `os.walk`, a name that is taken out of the list of folders is not entered, and nor are links to folders.
    """
    ahead = [root]
    while ahead:
        folder = ahead.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # a file, or a folder that may not be read
            continue
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if _is_folder(entry)]
        files = [entry.name for entry in entries if _may_be_file(entry)]
        yield folder, folders, files
        ahead += [folder / name for name in reversed(folders) if not os.path.islink(folder / name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """The folder itself says it, without another look at the disk: a store has millions of files."""
    if entry.is_symlink():
        return os.path.isfile(entry) or not os.path.exists(entry)
    return entry.is_file()


def find_files(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files at or below `root` that end so, folder by folder in order (`walk`)."""
    if root.is_file():
        if root.name.lower().endswith(tuple(suffixes)):
            yield root
        return
    for folder, _, names in walk(root):
        yield from (folder / name for name in names if name.lower().endswith(tuple(suffixes)))


# --- opening ---------------------------------------------------------------------------------------------------------


def check_file(path: PathLike) -> None:
    """SourceError where it is no regular file: opening a pipe would wait for whoever writes into it."""
    if not os.path.exists(path):
        raise SourceError("missing_file", str(path), "there is no such file")
    if not os.path.isfile(path):
        raise SourceError("not_a_file", str(path), "it is no file but a folder, a pipe or a device")


def open_file(path: PathLike) -> BinaryIO:
    """The open file. SourceError where there is none that can be read."""
    check_file(path)
    try:
        return open(path, "rb")
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise SourceError("unreadable_file", str(path), f"it cannot be opened ({error.strerror})") from error


def check_size(num_bytes: int, where: PathLike, what: str) -> None:
    """SourceError where this is more than `MAX_BYTES`: to be called before memory is taken."""
    if num_bytes > MAX_BYTES:
        detail = f"{what} would take {num_bytes / 2**30:.3g} GB of memory, the limit is {MAX_BYTES / 2**30:g} GB"
        raise SourceError("too_large", str(where), detail)


@contextmanager
def bounded_memory(where: PathLike) -> Iterator[None]:
    """SourceError where reading takes more than `MAX_GROWTH_BYTES`, rather than a machine that swaps or kills.

    For what no header tells beforehand: HDF5, Zarr and rosbags unpack a chunk to whatever size comes out of it.
    """
    _memory_bound.enter()
    try:
        yield
    except MemoryError as error:
        detail = f"reading it takes more than {MAX_GROWTH_BYTES / 2**30:g} GB of memory"
        raise SourceError("too_large", str(where), detail) from error
    finally:
        _memory_bound.leave()


class _MemoryBound:
    """The process's own limit, set by the first who enters and taken back by the last who leaves."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def enter(self) -> None:
        self._num_inside += 1
        if self._num_inside > 1:
            return
        self._before = before, hard = resource.getrlimit(resource.RLIMIT_DATA)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[5])  # that can be written, shared ones apart
        except OSError:  # no Linux: nothing to count from
            return
        wanted = pages * resource.getpagesize() + MAX_GROWTH_BYTES
        known = [limit for limit in (before, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), hard))

    def leave(self) -> None:
        self._num_inside -= 1
        if not self._num_inside:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)


_memory_bound = _MemoryBound()


def read_bytes(path: PathLike, what: str = "it") -> bytes:
    with open_file(path) as file:
        check_size(os.fstat(file.fileno()).st_size, path, what)
        return file.read()


def read_text(path: PathLike) -> str:
    """Of a file in UTF-8, with or without byte order mark."""
    return _decode(read_bytes(path), path)


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: PathLike) -> Any:
    """What a JSON file holds. SourceError, and no other error, where that cannot be said."""
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes, where: PathLike) -> Any:
    check_size(_size_as_objects(data), where, "its JSON")
    if data.startswith(LFS_POINTER):
        raise SourceError("unreadable_file", str(where), LFS_DETAIL)
    try:
        return json.loads(_decode(data, where))
    except RecursionError as error:
        raise SourceError("unreadable_file", str(where), "its JSON is nested too deeply") from error
    except ValueError as error:
        raise SourceError("unreadable_file", str(where), f"it is no JSON ({error})") from error


def _decode(data: bytes, where: PathLike) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError("unreadable_file", str(where), f"it is no text (byte {error.start} is not UTF-8)") from error


def _size_as_objects(data: bytes) -> int:
    """What the objects that JSON becomes take in CPython, roughly: up to thirty times the text."""
    return (
        len(data)
        + 232 * data.count(b"{")
        + 72 * data.count(b"[")
        + 32 * data.count(b",")  # numbers, and their places in a list
        + 25 * data.count(b'"')
    )
