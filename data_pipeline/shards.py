"""WebDataset shards: plain USTAR tars whose bytes depend on nothing but their samples, and reading them by byte range.

The format is written by hand because `webdataset.ShardWriter` stamps the time and writes under the final name, so that
a crash leaves a half tar that looks whole. Here mtime and owner are 0 and a shard is renamed into place when complete.
Beside each tar lies an index, `000000.tar.idx`: little-endian uint64, the start of each sample and then the end of the
last one (the layout that Megatron Energon writes).
"""

import hashlib
import os
import resource
import struct
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)

Bytes = bytes | bytearray | memoryview


SHARD_PROBLEMS = {
    "missing_shard": "there is no such file",
    "unreadable_shard": "the file system or the server refuses it",
    "truncated_shard": "it ends too early",
    "wrong_checksum": "it holds other bytes than the manifest promises",
    "damaged_records": "its bytes are not the tar records of the sample",
    "damaged_member": "a member of the sample cannot be read",
}


class ShardError(Exception):
    """A shard is not what it should be. The text says where and how, but not what to do about it."""

    def __init__(self, what: str, reason: str = "damaged_records") -> None:
        assert reason in SHARD_PROBLEMS
        super().__init__(what)
        self.reason = reason


def tar_records(members: Mapping[str, Any]) -> bytes:
    """A sample (`__key__` and bytes by suffix) as USTAR records, members in sorted order."""
    parts: list[bytes] = []
    for suffix in sorted(suffix for suffix in members if not suffix.startswith("__")):
        data = members[suffix]
        info = tarfile.TarInfo(f"{members['__key__']}.{suffix}")
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]
    return b"".join(parts)


def read_records(records: Bytes) -> dict[str, Any]:
    """The inverse of `tar_records`; members are what slices of `records` are.

    Raises ShardError where the bytes are not the records of exactly one sample.
    """
    members: dict[str, Any] = {}
    for key, suffix, start, size in _members(records):
        if members.setdefault("__key__", key) != key:
            raise ShardError(f"holds member {suffix} of sample {key} inside sample {members['__key__']}")
        members[suffix] = records[start : start + size]
    if not members:
        raise ShardError("holds no member")
    return members


def _members(records: Bytes) -> Iterator[tuple[str, str, int, int]]:
    position = 0
    while position < len(records):
        key, suffix, size = _parse_header(records[position : position + BLOCK])
        position += BLOCK
        if position + size > len(records):
            raise ShardError(f"ends inside member {key}.{suffix}")
        yield key, suffix, position, size
        position += size + -size % BLOCK


_HEADER = struct.Struct("100s24x12s12x8s101x6s82x155s12x")  # name, size, checksum, magic word, prefix of the name


def _parse_header(header: Bytes) -> tuple[str, str, int]:
    """Key, suffix and size. By hand: `tarfile` spends ten times as long on what a fixed layout tells at once."""
    name, octal_size, checksum, magic, prefix = _HEADER.unpack(header) if len(header) == BLOCK else (b"",) * 5
    if magic != b"ustar\0":
        raise ShardError("has no USTAR header where a member should start")
    try:
        # The checksum counts its own eight bytes as spaces.
        total = _sum(header[:148]) + _sum(header[156:400]) + _sum(header[400:]) + 8 * ord(" ")
        is_whole = int(checksum[:6], 8) == total
        prefix, name = prefix.rstrip(b"\0"), name.rstrip(b"\0")
        key, _, suffix = (prefix + b"/" * bool(prefix) + name).decode().partition(".")
        size = int(octal_size[:11], 8)
    except ValueError:
        is_whole = False
    if not is_whole or size < 0:
        raise ShardError("has a damaged member header")
    return key, suffix, size


def _sum(part: Bytes) -> int:
    """Of at most 256 bytes, which the lower half of Adler-32 counts from 1 on (modulo 65521); `sum` takes ten times as
    long."""
    return (zlib.adler32(part) & 0xFFFF) - 1


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where a sample lies: records [offset, offset + num_bytes) of a shard, and their sha256."""

    shard: str
    offset: int
    num_bytes: int
    sha256: str

    def manifest_columns(self) -> dict[str, str | int]:
        return {"shard": self.shard, "offset": self.offset, "bytes": self.num_bytes, "sha256": self.sha256}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an error of writing it: that a disk is full, the system says without saying where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class TarWriter:
    """One tar, written beside its final name and renamed when closed without an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = [0]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        self._file = self._partial.open("wb")

    @property
    def size(self) -> int:
        return self.offsets[-1]

    def add(self, records: bytes) -> int:
        """Appends the records of one sample; gives their offset."""
        with naming(self.path):
            self._file.write(records)
        self.offsets.append(self.size + len(records))
        return self.offsets[-2]

    def close(self) -> None:
        try:
            with naming(self.path):
                self._file.write(END_OF_TAR)
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        with suppress(OSError):  # a full disk does not take what is still to be written either
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()


class ShardWriter:
    """Shards `<folder>/000000.tar`, `000001.tar`, … of at most `max_bytes` (or one sample, if it is larger)."""

    def __init__(self, root: Path, folder: str, max_bytes: int) -> None:
        self.root, self.folder, self.max_bytes = root, folder, max_bytes
        self._count = 0
        self._tar: TarWriter | None = None

    def add(self, records: bytes) -> Location:
        if self._tar is not None and self._tar.size + len(records) > self.max_bytes:
            self.close()
        if self._tar is None:
            self._tar = TarWriter(self.root / self.folder / f"{self._count:06d}.tar")
            self._count += 1
        offset = self._tar.add(records)
        shard = str(self._tar.path.relative_to(self.root))
        return Location(shard, offset, len(records), hashlib.sha256(records).hexdigest())

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            write_atomic(index_path(self._tar.path), np.array(self._tar.offsets, dtype="<u8").tobytes())
            self._tar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self._tar is not None:
            self._tar.discard()


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".idx")


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# --- reading ------------------------------------------------------------------------------------------------------


class ShardReader:
    """Reads byte ranges; a bounded number of files stays open.

    `preadv` takes its position as an argument, so the open files may be shared by threads and by forked workers.
    """

    def __init__(self, root: Path, max_open: int | None = None) -> None:
        """`max_open`: by default 128, but no more than a quarter of what the process may have."""
        self.root = root
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_open = max_open or (128 if limit == resource.RLIM_INFINITY else min(128, max(1, limit // 4)))
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, offset: int, num_bytes: int) -> bytearray:
        size, end = self.size(shard), offset + num_bytes
        try:
            # No more than there is: memory is taken before anything is read, and the manifest may promise any size.
            data = bytearray(max(0, min(end, size) - offset))
            num_read = os.preadv(self._file(shard), [data], offset)
        except OSError as error:
            raise ShardError(f"cannot be read ({error.strerror})", "unreadable_shard") from error
        if num_read < num_bytes:
            raise ShardError(f"ends at byte {size}, but this sample should reach to byte {end}", "truncated_shard")
        return data

    def announce(self, shard: str, offset: int, num_bytes: int) -> None:
        """That these bytes will be read soon: the disk fetches them meanwhile, many such ranges at once."""
        # Errors are told when they are read; macOS has no such call.
        with suppress(ShardError, OSError, AttributeError):
            os.posix_fadvise(self._file(shard), offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def size(self, shard: str) -> int:
        return os.fstat(self._file(shard)).st_size

    def _file(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            file = os.open(self.root / shard, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        except OSError as error:
            reason = "missing_shard" if isinstance(error, FileNotFoundError) else "unreadable_shard"
            raise ShardError(f"cannot be opened ({error.strerror})", reason) from error
        self._files[shard] = file
        if len(self._files) > self.max_open:
            os.close(self._files.popitem(last=False)[1])
        return file

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A spawned process opens its own files."""
        return {"root": self.root, "max_open": self.max_open, "_files": OrderedDict()}


def parse_index(data: Bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<u8")
