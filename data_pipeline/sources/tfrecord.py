"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A file is one record after the other: length (uint64), checksum of the length, payload, checksum of the payload, all
little-endian (https://www.tensorflow.org/tutorials/load_data/tfrecord). The payload is a protocol buffer, a map from
names to lists of numbers or byte strings
(https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/feature.proto).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt8

from .base import SourceError
from .files import MAX_BYTES, check_file

_HEADER = struct.Struct("<QI")  # length of the payload, checksum of these eight bytes
_FOOTER = struct.Struct("<I")  # checksum of the payload

_MAX_PLACES = 2**21  # entries of a list that have a place each: steps, not pixels
_BLOCK_VALUES = 2**16

Feature = np.ndarray | list[slice]
"""Numbers (float32 or int64, one axis), or where in the message each byte string lies: pictures stay where they are."""


class RecordError(Exception):
    """A file or record that cannot be used. `reason` is a snake_case name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordIndex:
    """Where the payloads of a file's records lie. A damaged file keeps the records before the damage."""

    starts: Int64[np.ndarray, "n"]
    sizes: Int64[np.ndarray, "n"]
    damage: RecordError | None


@dataclass(frozen=True)
class Record:
    start: int  # of the payload in the file
    data: bytes


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord stores it: a checksum over data that holds checksums would be weak."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def index_records(path: str | os.PathLike[str]) -> RecordIndex:
    """Reads the twelve bytes before each record, nothing else; kept per process. RecordError if there is no file."""
    try:
        check_file(path)
        stat = os.stat(path)
    except SourceError as error:
        raise RecordError(error.reason, error.detail) from error
    return _cached_index(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _cached_index(path: str, size: int, mtime_ns: int) -> RecordIndex:
    starts: list[int] = []
    sizes: list[int] = []
    damage = None
    position = 0
    with open(path, "rb", buffering=0) as file:
        while position < size:
            file.seek(position)
            header = file.read(_HEADER.size)
            damage = _damage(header, len(starts), size - position)
            if damage is not None:
                break
            length = _HEADER.unpack(header)[0]
            starts.append(position + _HEADER.size)
            sizes.append(length)
            position += _HEADER.size + length + _FOOTER.size
    return RecordIndex(np.asarray(starts, np.int64), np.asarray(sizes, np.int64), damage)


def _damage(header: bytes, number: int, bytes_left: int) -> RecordError | None:
    if len(header) < _HEADER.size:
        return RecordError("truncated_file", f"it ends in the middle of record {number}")
    length, checksum = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != checksum:
        if number:
            return RecordError("bad_record", f"the length of record {number} fails its checksum")
        if header.startswith(b"version http"):
            return RecordError("not_a_tfrecord", "it is a Git LFS pointer: fetch the real file with `git lfs pull`")
        if header.startswith(b"\x1f\x8b"):
            return RecordError("not_a_tfrecord", "it is compressed as a whole: unpack it with `gunzip`")
        return RecordError("not_a_tfrecord", "its first bytes are no record")
    if _HEADER.size + length + _FOOTER.size > bytes_left:
        return RecordError("truncated_file", f"it ends in the middle of record {number}")
    return None


def read_record(path: str | os.PathLike[str], number: int) -> Record:
    """One record, its checksum verified."""
    index = index_records(path)
    if number >= len(index.starts):
        raise index.damage or RecordError("missing_record", f"it has {len(index.starts)} records")
    start, size = int(index.starts[number]), int(index.sizes[number])
    if size > MAX_BYTES:
        raise RecordError(
            "too_large", f"record {number} has {size / 2**30:.3g} GB, at most {MAX_BYTES / 2**30:g} are read"
        )
    with open(path, "rb", buffering=0) as file:
        payload = os.pread(file.fileno(), size, start)
        footer = os.pread(file.fileno(), _FOOTER.size, start + size)
    if len(footer) < _FOOTER.size:
        raise RecordError("truncated_file", f"it ends in the middle of record {number}")
    if masked_crc32c(payload) != _FOOTER.unpack(footer)[0]:
        raise RecordError("bad_record", f"record {number} fails its checksum")
    return Record(start, payload)


# --- messages --------------------------------------------------------------------------------------------------------


def parse_example(data: bytes, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Feature]:
    """The wanted features of a `tf.train.Example`. RecordError where the bytes are no such message."""
    features: dict[str, Feature] = {}
    for field, start, end in _fields(data, 0, len(data)):
        if field == 1:
            features |= _features(data, start, end, is_wanted)
    return features


def parse_sequence_example(data: bytes) -> tuple[dict[str, Feature], dict[str, list[Feature]]]:
    """The context of a `tf.train.SequenceExample`, and for each name of its feature lists one feature per step."""
    context: dict[str, Feature] = {}
    lists: dict[str, list[Feature]] = {}
    for field, start, end in _fields(data, 0, len(data)):
        if field == 1:
            context |= _features(data, start, end, lambda name: True)
        elif field == 2:
            for name, first, last in _map_entries(data, start, end):
                lists[name] = [_feature(data, a, b) for number, a, b in _fields(data, first, last) if number == 1]
    return context, lists


def _features(data: bytes, start: int, end: int, is_wanted: Callable[[str], bool]) -> dict[str, Feature]:
    entries = _map_entries(data, start, end)
    return {name: _feature(data, first, last) for name, first, last in entries if is_wanted(name)}


def _map_entries(data: bytes, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(key, start and end of the value) of every entry of a map with text keys."""
    for field, entry_start, entry_end in _fields(data, start, end):
        if field != 1:
            continue
        places = {number: (a, b) for number, a, b in _fields(data, entry_start, entry_end)}
        key_start, key_end = places.get(1, (0, 0))  # protocol buffers leave out what is empty
        yield data[key_start:key_end].decode("utf-8", "replace"), *places.get(2, (0, 0))


def _feature(data: bytes, start: int, end: int) -> Feature:
    kind, list_start, list_end = next(_fields(data, start, end), (0, 0, 0))  # one of three kinds of list, or none
    places = list(islice(_places(data, list_start, list_end), _MAX_PLACES + 1))
    if len(places) > _MAX_PLACES:
        raise RecordError("too_large", f"a list has more than {_MAX_PLACES} entries of their own")
    if kind == 1:
        return places
    packed = b"".join(data[place] for place in places)  # one run of numbers, or each number on its own
    if kind == 2:
        if len(packed) % 4:
            raise RecordError("bad_record", "a list of numbers ends in the middle of one")
        return np.frombuffer(packed, "<f4")
    return _varints(packed)


def _places(data: bytes, start: int, end: int) -> Iterator[slice]:
    return (slice(first, last) for number, first, last in _fields(data, start, end) if number == 1)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start and end of the value) of every field of the message in `data[start:end]`."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        match tag & 7:
            case 0:
                value_end = _varint(data, position, end)[1]
            case 1:
                value_end = position + 8
            case 2:
                size, position = _varint(data, position, end)
                value_end = position + size
            case 5:
                value_end = position + 4
            case wire_type:
                raise RecordError("bad_record", f"its payload is no protocol buffer (wire type {wire_type})")
        if value_end > end:
            raise RecordError("bad_record", "a field of its payload ends outside it")
        yield tag >> 3, position, value_end
        position = value_end


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, low ones first, and where it ends."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        value |= (byte & 127) << shift
        shift += 7
        position += 1
        if byte < 128:
            return value, position
    raise RecordError("bad_record", "a number in its payload has no end")


def _varints(packed: bytes) -> Int64[np.ndarray, "n"]:
    """Many numbers of a packed list at once: a picture stored as a list of integers has a million of them."""
    groups = np.frombuffer(packed, np.uint8)
    num_values = int(np.count_nonzero(groups < 128))
    if 8 * num_values > MAX_BYTES:
        raise RecordError("too_large", f"a list has {num_values} numbers")
    values, first = np.zeros(num_values, np.int64), 0
    for start in range(0, num_values, _BLOCK_VALUES):
        block = groups[first : first + 10 * _BLOCK_VALUES]
        ends = np.flatnonzero(block < 128)[:_BLOCK_VALUES]
        values[start : start + len(ends)] = _block_of_varints(block[: ends[-1] + 1], ends)
        first += int(ends[-1]) + 1
    if first < len(groups):
        raise RecordError("bad_record", "a number in its payload has no end")
    return values


def _block_of_varints(groups: UInt8[np.ndarray, "b"], ends: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    starts = np.concatenate([[0], ends[:-1] + 1])
    if np.max(ends - starts) > 9:
        raise RecordError("bad_record", "a number in its payload has no end")
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    bits = (groups & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)
