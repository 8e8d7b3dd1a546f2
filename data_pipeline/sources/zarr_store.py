"""A Zarr store (a folder or a zip file, format 2 or 3) as files, and its arrays as rows.

The metadata is looked at before Zarr opens an array: only known codecs may run, because Zarr would also run those that
unpickle, and because a missing chunk (a broken download) would silently read as zeros.
"""

from __future__ import annotations

import itertools
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..video_index import VideoError, file_identity
from .base import SourceError
from .files import MAX_BYTES, bounded_memory, check_file, check_size, parse_json, read_bytes

NUMBER_CODECS = frozenset(
    [
        "adler32",
        "astype",
        "bitround",
        "blosc",
        "bz2",
        "crc32",
        "crc32c",
        "delta",
        "fixedscaleoffset",
        "fletcher32",
        "gzip",
        "jenkins_lookup3",
        "lz4",
        "lzma",
        "packbits",
        "quantize",
        "shuffle",
        "zlib",
        "zstd",
    ]
)
FORMAT_3_CODECS = frozenset(("bytes", "transpose", "sharding_indexed"))
READ_ERRORS = (
    *(ValueError, RuntimeError, KeyError, TypeError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
    SystemError,  # blosc, for a length that is negative
)
"""What Zarr and its codecs raise for a damaged store."""


class StoreFiles:
    """The keys of a store, whichever way they are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist()) if self._zip is not None else frozenset()

    def __contains__(self, key: str) -> bool:
        return key in self._names if self._zip is not None else (self.path / key).is_file()

    def read(self, key: str) -> bytes | None:
        if key not in self:
            return None
        if self._zip is None:
            return read_bytes(self.path / key)
        size = self._zip.getinfo(key).file_size
        check_size(size, self.path, key)
        with self._zip.open(key) as member:
            return member.read(size + 1)  # not all that it unpacks to: its size may be a lie

    def children(self, key: str) -> list[str]:
        """Names of the arrays and groups directly below a group."""
        if self._zip is None:
            folder = self.path / key
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
        below = (name.removeprefix(f"{key}/").split("/") for name in self._names if name.startswith(f"{key}/"))
        return sorted(
            {parts[0] for parts in below if len(parts) == 2 and parts[1] in (".zarray", "zarr.json", ".zgroup")}
        )


@dataclass(frozen=True)
class StoredArray:
    """One array's metadata."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]  # of what one file of the store holds
    chunk_prefix: str
    separator: str

    def _grid(self, first: int, end: int) -> list[range]:
        rows = range(first // self.chunk_shape[0], -(-end // self.chunk_shape[0]))
        others = (range(-(-size // chunk)) for size, chunk in zip(self.shape[1:], self.chunk_shape[1:], strict=True))
        return [rows, *others]

    def num_chunks(self, first: int, end: int) -> int:
        return math.prod(part.stop - part.start for part in self._grid(first, end))  # a length may not fit into `len`

    def chunk_keys(self, first: int, end: int) -> Iterator[str]:
        """The files of the store that hold rows [first, end)."""
        for place in itertools.product(*self._grid(first, end)):
            yield f"{self.key}/{self.chunk_prefix}{self.separator.join(map(str, place))}"


def is_store_with(path: Path, key: str) -> bool:
    """Whether there is a Zarr store at `path` that has an array `key`."""
    if path.is_dir():
        return any((path / key / name).is_file() for name in (".zarray", "zarr.json"))
    try:
        check_file(path)
        files = open_files(path)
    except (*READ_ERRORS, SourceError, OSError, VideoError):  # not a zip file, or none that can be read
        return False
    return f"{key}/.zarray" in files or f"{key}/zarr.json" in files


def open_files(path: Path) -> StoreFiles:
    """Kept open per process: the directory of a large zip file takes seconds to read."""
    return _cached_files(*file_identity(path))


@lru_cache(maxsize=16)
def _cached_files(path: str, size: int, mtime_ns: int) -> StoreFiles:
    return StoreFiles(Path(path))


# --- metadata --------------------------------------------------------------------------------------------------------


def find_arrays(files: StoreFiles, group: str) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Arrays at any depth below a group by their path in it, and why the others cannot be read."""
    arrays: dict[str, StoredArray] = {}
    problems: dict[str, str] = {}
    for name in files.children(group):
        key = f"{group}/{name}"
        try:
            found = read_array(files, key)
        except ValueError as error:
            problems[name] = str(error)
            continue
        if found is not None:
            arrays[name] = found
            continue
        inner, inner_problems = find_arrays(files, key)
        arrays |= {f"{name}/{path}": array for path, array in inner.items()}
        problems |= {f"{name}/{path}": problem for path, problem in inner_problems.items()}
    return arrays, problems


def read_array(files: StoreFiles, key: str) -> StoredArray | None:
    """None where there is no array; ValueError, with the reason, where it cannot be read."""
    old, new = files.read(f"{key}/.zarray"), files.read(f"{key}/zarr.json")
    if old is None and new is None:
        return None
    try:
        metadata = parse_json(old or new or b"", files.path / key)
        if old is None and metadata.get("node_type") != "array":
            return None
        array, codecs = _format_2(key, metadata) if old is not None else _format_3(key, metadata)
    # NumPy parses dtypes as Python.
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError, RecursionError, OverflowError) as error:
        raise ValueError(f"its metadata cannot be understood ({type(error).__name__}: {error})") from error
    except SourceError as error:
        raise ValueError(f"its metadata cannot be understood ({error.detail})") from error
    unknown = ", ".join(sorted(set(codecs) - NUMBER_CODECS - FORMAT_3_CODECS))
    if unknown:
        raise ValueError(f"it has the codec {unknown}, which is not supported; save it again with blosc or zstd")
    if array.dtype.hasobject or array.dtype.fields:
        raise ValueError(f"it holds {array.dtype}, not plain numbers")
    sizes = (*array.shape, *(chunk - 1 for chunk in array.chunk_shape))
    if not array.shape or len(array.shape) != len(array.chunk_shape) or min(sizes) < 0:
        raise ValueError(f"its shape {list(array.shape)} in chunks of {list(array.chunk_shape)} makes no rows")
    if math.prod(array.chunk_shape) * array.dtype.itemsize > MAX_BYTES:
        raise ValueError(f"its chunks of {list(array.chunk_shape)} are too large to unpack")
    if (
        math.prod(-(-size // chunk) for size, chunk in zip(array.shape[1:], array.chunk_shape[1:], strict=True))
        > 10_000
    ):
        raise ValueError(f"its rows {list(array.shape[1:])} are in too many chunks of {list(array.chunk_shape)}")
    return array


def _format_2(key: str, metadata: dict[str, Any]) -> tuple[StoredArray, list[str]]:
    """https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html"""
    codecs = [codec["id"] for codec in [metadata.get("compressor"), *(metadata.get("filters") or [])] if codec]
    separator = metadata.get("dimension_separator", ".")
    shape, chunks = tuple(map(int, metadata["shape"])), tuple(map(int, metadata["chunks"]))
    return StoredArray(key, shape, np.dtype(metadata["dtype"]), chunks, "", separator), codecs


def _format_3(key: str, metadata: dict[str, Any]) -> tuple[StoredArray, list[str]]:
    """https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"""
    shape = tuple(map(int, metadata["shape"]))
    chunks = tuple(map(int, metadata["chunk_grid"]["configuration"]["chunk_shape"]))
    encoding = metadata["chunk_key_encoding"]
    is_default = encoding["name"] == "default"
    separator = (encoding.get("configuration") or {}).get("separator", "/" if is_default else ".")
    prefix = f"c{separator}" if is_default else ""
    codecs = list(_codec_names(metadata["codecs"]))
    return StoredArray(key, shape, np.dtype(metadata["data_type"]), chunks, prefix, separator), codecs


def _codec_names(codecs: Sequence[Any]) -> Iterator[str]:
    for codec in codecs:
        yield codec["name"].removeprefix("numcodecs.")
        for inner in ("codecs", "index_codecs"):  # a shard holds chunks with codecs of their own
            yield from _codec_names((codec.get("configuration") or {}).get(inner, ()))


# --- numbers ---------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path, key: str, rows: Sequence[int]) -> np.ndarray:
    """Rows of an array, increasing. One of READ_ERRORS where the store is damaged."""
    array = _cached_array(*file_identity(path), key)
    is_run = rows[-1] - rows[0] == len(rows) - 1
    with bounded_memory(path):
        return np.asarray(array[rows[0] : rows[-1] + 1] if is_run else array.oindex[np.asarray(rows)])


@lru_cache(maxsize=64)
def _cached_array(path: str, size: int, mtime_ns: int, key: str) -> Any:
    import zarr  # takes most of a second, and few commands meet a store
    from zarr.storage import LocalStore, ZipStore

    class RegularFiles(LocalStore):
        """What is a pipe is not there."""

        async def get(self, key: str, *settings: Any, **named: Any) -> Any:
            return await super().get(key, *settings, **named) if (self.root / key).is_file() else None

    store = RegularFiles(path, read_only=True) if os.path.isdir(path) else ZipStore(path, mode="r")
    return zarr.open_array(store, path=key, mode="r")
