"""Records in JSON files: one per file, many in a list or dict, or one per line; and the files that they point to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ..video_index import file_identity
from .base import SourceError, is_rate
from .files import MAX_BYTES, check_file, check_size, open_file, parse_json, read_json
from .npz_file import read_array

JSON_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class Entry:
    """Where a record is: a file, and what to take out of it (None: all of it; a key, index or line number)."""

    file: Path
    place: str | int | None = None
    offset: int = 0  # of its line in a file of JSON lines


def entries_of(file: Path) -> list[Entry]:
    """The records of a file. Only a file that looks as if it held many is read for that."""
    try:
        if file.suffix.lower() == ".jsonl":
            return [Entry(file, number, offset) for number, offset, line in _lines(file) if line.strip()]
        with open_file(file) as opened:
            head = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not re.match(rb'\[|\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{', head):
            return [Entry(file)]
        data = _read_json(file)
    except SourceError:
        return [Entry(file)]  # reading it as an episode says what is wrong
    if isinstance(data, list):
        return [Entry(file, index) for index in range(len(data))]
    if all(isinstance(value, dict) for value in data.values()):
        return [Entry(file, key) for key in data]
    return [Entry(file)]


def _read(entry: Entry, where: str) -> dict[str, Any]:
    if entry.file.suffix.lower() == ".jsonl":
        _, _, line = next(_lines(entry.file, entry.offset))
        data = parse_json(line, where)
    else:
        data = _read_json(entry.file)
        data = data if entry.place is None else data[entry.place]
    if not isinstance(data, dict):
        raise SourceError("bad_record", where, "the record is no JSON object")
    return data


def _lines(file: Path, offset: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, line) of every line from `offset` on. SourceError where one is too long to be read."""
    with open_file(file) as lines:
        lines.seek(offset)
        for number in count():
            line = lines.readline(MAX_BYTES + 1)
            check_size(len(line), file, f"its line {number}")
            if not line and number:
                return
            yield number, offset, line
            offset += len(line)


def _read_json(file: Path) -> Any:
    check_file(file)
    return _cached_json(*file_identity(file))


@lru_cache(maxsize=4)
def _cached_json(path: str, size: int, mtime_ns: int) -> Any:
    return read_json(path)


def below(root: Path, file: Path, text: str) -> Path | None:
    """The file that a record means: relative to its own folder or to one above it, up to `root`; None: outside it.

    Where nothing is there, what it would be relative to `root`.
    """
    top = Path(os.path.abspath(root))
    candidates = []
    for folder in Path(os.path.abspath(file)).parents:
        path = Path(os.path.abspath(folder / text))
        if path.is_relative_to(top):
            candidates.append(path)
        if folder == top:
            break
    return next((path for path in candidates if os.path.isfile(path)), candidates[-1] if candidates else None)


class Record:
    """What one JSON record says, and the files that it points to."""

    def __init__(self, root: Path, entry: Entry) -> None:
        self.root = root
        self.file = entry.file
        self.entry = entry
        self.where = f"{entry.file}" if entry.place is None else f"{entry.file}#{entry.place}"
        self.files_read: list[Path] = []
        self.data = _read(entry, self.where)

    def canonical(self) -> bytes:
        try:
            return json.dumps(self.data, sort_keys=True).encode()
        except RecursionError as error:
            raise SourceError("bad_record", self.where, "the record is nested too deeply") from error

    def value(self, key: str) -> Any:
        """What stands under a key; the filled-in text for a path with keys in braces; None where there is nothing."""
        if "{" in key:
            return re.sub(r"\{([^{}]+)\}", self._fill, key)
        return look_up(self.data, key)

    def _fill(self, match: re.Match[str]) -> str:
        name = match.group(1)
        value = {"stem": self.file.stem, "entry": self.entry.place}.get(name) if name in ("stem", "entry") else None
        value = look_up(self.data, name) if value is None else value
        if not isinstance(value, str | int):
            raise SourceError("bad_record", self.where, f"it has no text or number under {name}")
        return str(value)

    def number(self, setting: float | str | None) -> float | None:
        """A rate: the setting itself, or what stands under the key that it names."""
        if not isinstance(setting, str):
            return setting
        value = self.value(setting)
        if not is_rate(value):
            raise SourceError("bad_record", self.where, f"{setting} is no rate but {str(value)[:40]!r}")
        return float(value)

    def path(self, key: str) -> Path:
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise SourceError("missing_view", self.where, f"it has no path under {key}")
        path = below(self.root, self.file, value)
        if path is None:
            raise SourceError("outside_folder", self.where, f"{key} leads out of {self.root}: {value[:80]!r}")
        if not os.path.isfile(path):
            raise SourceError("missing_video", self.where, f"{key} names no file that is there: {value[:80]!r}")
        return path

    def matrix(self, keys: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """The columns of all keys side by side."""
        parts = {key: self.numbers(key) for key in keys}
        lengths = {len(part) for part in parts.values()}
        if len(lengths) > 1:
            counts = ", ".join(f"{len(part)} rows of {key}" for key, part in parts.items())
            raise SourceError("ragged_values", self.where, counts)
        return np.concatenate(list(parts.values()), axis=1)

    def numbers(self, key: str) -> Float32[np.ndarray, "n d"]:
        value = self.value(key)
        try:
            array = np.asarray(self._load(key, value) if isinstance(value, str) else value, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise SourceError(
                "ragged_values", self.where, f"{key} is no list of equally long rows of numbers"
            ) from error
        if array.ndim == 0 or array.size == 0:
            raise SourceError("ragged_values", self.where, f"{key} holds no rows")
        return array.reshape(len(array), -1)

    def _load(self, key: str, value: str) -> np.ndarray:
        """`file.npy`, `file.npz` with one array, or `file.npz#name`."""
        text, _, member = value.partition("#")
        path = below(self.root, self.file, text)
        if path is None:
            raise SourceError("outside_folder", self.where, f"{key} leads out of {self.root}: {value[:80]!r}")
        if not os.path.isfile(path):
            raise SourceError("unreadable_file", self.where, f"{key} names no file that is there: {text[:80]!r}")
        array = read_array(path, member)
        self.files_read.append(path)
        return array


def look_up(data: Any, key: str) -> Any:
    """`data[key]`, or step by step along the dots of the key; None where there is nothing."""
    if isinstance(data, dict) and key in data:
        return data[key]
    for part in key.split("."):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data
