"""A bounded cache on the local disk, shared by all processes of a machine that name its folder.

<folder>/blocks/ab/abcd…          bytes, and after them a crc32 of every `CHUNK` of them
<folder>/groups/abcd…/files/…     files that belong together and are opened by their names
<folder>/groups/abcd…/sha256/…    of each of them
<folder>/groups/abcd…/in_use      locked (shared) by every process that has opened them
<folder>/used                     bytes that all of this takes
<folder>/lock                     its bytes are locks: one for `used`, and one for each key that is being fetched

Everything is written beside its name and renamed, so whoever reads finds all of it or nothing; what was damaged later
is noticed and counts as absent. What was used longest ago goes first.
"""

import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

CHUNK = 1 << 16
"""Bytes that share a checksum: a read checks those that it touches, not the whole block."""

KEPT_SHARE = 0.9
"""Of the bound, what is left after making room: so that not every write has to look for what is oldest."""

_ROOM = 0  # the byte of `lock` that guards `used`


class DiskCache:
    """Blocks are kept within `max_bytes`, which the groups that are in use take a part of."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        (folder / "blocks").mkdir(parents=True, exist_ok=True)
        (folder / "groups").mkdir(exist_ok=True)
        self._lock = _lock_file(folder / "lock")
        with self._locked(_ROOM):  # some network file systems have no locks
            pass
        self._held: list[BinaryIO] = []

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Of all processes that want what this key stands for, one at a time."""
        with self._locked(1 + int(key[:14], 16)):
            yield

    # --- blocks ---------------------------------------------------------------------------------------------------

    def read(self, key: str, size: int, begin: int, end: int) -> bytes | None:
        """Bytes [begin, end) of a block of that size; None where it is absent, damaged or cannot be read."""
        try:
            file = os.open(self._block(key), os.O_RDONLY)
        except OSError:
            return None
        try:
            data = _checked(file, size, begin, end)
            if data is not None:
                os.utime(file)  # the time of its last use
            return data
        except OSError:
            return None
        finally:
            os.close(file)

    def write(self, key: str, block: bytes) -> None:
        """Keeps a block, if there is room for it."""
        sums = [zlib.crc32(block[first : first + CHUNK]) for first in range(0, len(block), CHUNK)]
        parts = [block, np.array(sums, "<u4").tobytes()]
        with self._locked(_ROOM):  # until it is written, for nobody could count it before
            if self._make_room(sum(map(len, parts))):
                _write(self._block(key), parts)

    def _block(self, key: str) -> Path:
        return self.folder / "blocks" / key[:2] / key

    # --- groups of files ------------------------------------------------------------------------------------------

    def hold(self, key: str) -> Path:
        """The folder of a group of files, which stays as long as this cache is open."""
        group = self.folder / "groups" / key
        while True:
            (group / "files").mkdir(parents=True, exist_ok=True)
            try:
                in_use = (group / "in_use").open("ab")
                # Not a record lock: this one is to be inherited, for workers read these files too.
                fcntl.flock(in_use, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(in_use.fileno()), (group / "in_use").stat()):
                    break
            except FileNotFoundError:  # another process has just removed it
                continue
        os.utime(group)
        self._held.append(in_use)
        return group

    def has(self, group: Path, name: str) -> bool:
        """Whether a file of a group is there and whole."""
        try:
            with (group / "files" / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return digest == (group / "sha256" / name).read_text()
        except FileNotFoundError:
            return False

    def put(self, group: Path, name: str, parts: Iterable[bytes]) -> None:
        """Writes a file of a group, for which `make_room` has found room."""
        digest = hashlib.sha256()

        def passed() -> Iterator[bytes]:
            for part in parts:
                digest.update(part)
                yield part

        _write(group / "files" / name, passed())
        _write(group / "sha256" / name, [digest.hexdigest().encode()])

    # --- the bound ------------------------------------------------------------------------------------------------

    def make_room(self, num_bytes: int) -> bool:
        """Takes so many bytes of the bound, in exchange for what was used longest ago; False where all is in use."""
        with self._locked(_ROOM):
            return self._make_room(num_bytes)

    def _make_room(self, num_bytes: int) -> bool:
        used = self._used() + num_bytes
        if used > self.max_bytes:
            used = self._evict(int(KEPT_SHARE * self.max_bytes) - num_bytes) + num_bytes
        if used <= self.max_bytes:
            _write(self.folder / "used", [str(used).encode()])
        return used <= self.max_bytes

    def _used(self) -> int:
        try:
            return int((self.folder / "used").read_text())
        except (FileNotFoundError, ValueError):
            return sum(size for _, size, _ in self._entries())

    def _evict(self, target: int) -> int:
        """Removes entries until they take no more than `target` bytes; gives how many they take."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= target:
                break
            if _remove(path):
                total -= size
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each block (also half-written ones) and each group."""
        for path in (self.folder / "blocks").glob("*/*"):
            if (status := _status(path)) is not None:
                yield status.st_mtime_ns, status.st_size, path
        for path in (self.folder / "groups").glob("*"):
            if (status := _status(path)) is not None:
                sizes = (inside.st_size for file in path.rglob("*") if (inside := _status(file)) is not None)
                yield status.st_mtime_ns, sum(sizes), path

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, byte)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, byte)

    def __getstate__(self) -> dict[str, Any]:
        """A spawned process opens its own files. What its parent holds stays held as long as the parent lives."""
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@cache
def _lock_file(path: Path) -> BinaryIO:
    """Record locks belong to a process and are not inherited, so forked workers may use the same open file. They are
    lost when their process closes *any* open file of that name: so all caches share one, which stays open."""
    return path.open("ab")


def _checked(file: int, size: int, begin: int, end: int) -> bytes | None:
    num_chunks = -(-size // CHUNK)
    if os.fstat(file).st_size != size + 4 * num_chunks:
        return None
    first, last = begin // CHUNK, -(-end // CHUNK)
    sums = np.frombuffer(os.pread(file, 4 * (last - first), size + 4 * first), "<u4")
    data = memoryview(os.pread(file, min(last * CHUNK, size) - first * CHUNK, first * CHUNK))
    for number, expected in enumerate(sums):
        if zlib.crc32(data[number * CHUNK : (number + 1) * CHUNK]) != expected:
            return None
    return bytes(data[begin - first * CHUNK : end - first * CHUNK])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """Whole or not at all. Without fsync: what a power cut damages is noticed and fetched again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # renamed or removed by another process
        return None


def _remove(path: Path) -> bool:
    """False where a running process holds it. A block may go at any time: whoever has it open still reads it."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    with (path / "in_use").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path, ignore_errors=True)
    return True
