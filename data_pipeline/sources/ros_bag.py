"""One ROS recording: its topics, when their messages were recorded, and the messages as numbers and pictures.

ROS 1 `.bag` files, ROS 2 folders and single `.db3` and `.mcap` files are read by the rosbags package, which brings the
message types along. Each format has an index of times, so a topic's times are known without reading its messages.
"""

from __future__ import annotations

import errno
import io
import resource
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from configs.loader import UserError

from .base import SourceError
from .files import bounded_memory, check_file, walk

BAG_SUFFIXES = (".bag", ".mcap", ".db3")
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
RAW_IMAGE = "sensor_msgs/msg/Image"
IMAGE_TYPES = (RAW_IMAGE, COMPRESSED_IMAGE)

_MAX_UNPACKED_RATIO = 50  # raw pictures of a still room shrink to a tenth
_MAX_METADATA_BYTES = 16 * 2**20  # of metadata.yaml, which is read as a whole, and slowly
_MAX_UNWANTED = 8  # messages between two wanted ones that are read along rather than sought over
_LAYOUT_FIELDS = ("header", "layout")  # of a message: about its numbers, not among them
_CHANNELS = {
    "rgb8": (0, 1, 2),
    "bgr8": (2, 1, 0),
    "8UC3": (2, 1, 0),
    "rgba8": (0, 1, 2, 3),
    "bgra8": (2, 1, 0, 3),
    "mono8": (0,),
    "8UC1": (0,),
}  # encoding -> where a stored pixel has red, green, blue (and alpha)


def find_bags(root: Path) -> list[Path]:
    """Recordings at or below `root`, sorted: a ROS 2 folder (it has a metadata.yaml) counts as one."""
    if root.is_file():
        return [root] if root.suffix in BAG_SUFFIXES else []
    found = []
    for folder, folders, names in walk(root):
        stored = [name for name in names if name.endswith((".db3", ".mcap", ".db3.zstd", ".mcap.zstd"))]
        if "metadata.yaml" in names and stored:
            found.append(folder)
            folders.clear()
        else:
            found += [folder / name for name in names if name.endswith(BAG_SUFFIXES)]
    return sorted(found)


def bag_files(path: Path) -> list[Path]:
    """What a recording consists of."""
    return sorted(file for file in path.iterdir() if not file.is_dir()) if path.is_dir() else [path]


def open_bag(path: Path) -> Bag:
    """The open recording, kept per process. SourceError where it cannot be read."""
    try:
        files = bag_files(path)
        for file in files:
            check_file(file)
        stats = [(file, file.stat()) for file in files]
    except OSError as error:
        raise SourceError("unreadable_file", str(path), f"it cannot be opened ({error.strerror})") from error
    if any(file.name == "metadata.yaml" and stat.st_size > _MAX_METADATA_BYTES for file, stat in stats):
        raise SourceError("too_large", str(path), "its metadata.yaml is no list of topics but far larger")
    return _opened(path, tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@lru_cache(maxsize=4)
def _opened(path: Path, identity: tuple[tuple[str, int, int], ...]) -> Bag:
    return Bag(path)


class Bag:
    """An open recording. `types` is topic -> message type, in alphabetical order."""

    def __init__(self, path: Path) -> None:
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise UserError("ROS recordings need an extra: pip install 'foresight-wam[ros]'.") from error
        self.path = path
        with self._damage_named(), _bounded_unpacking(bag_files(path)):
            # Recordings of ROS 2 before Iron name their message types without defining them: Humble's are taken.
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE))
            self._reader.open()
        connections = sorted(self._reader.connections, key=lambda one: one.topic)
        self.types: dict[str, str] = {one.topic: one.msgtype for one in connections}
        self._log_times: dict[str, Int64[np.ndarray, "n"]] = {}
        self._order: dict[tuple[str, bool], tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]] = {}

    def times_ns(self, topic: str, header_times: bool) -> Int64[np.ndarray, "n"]:
        """Of the topic's messages, increasing. From their headers means that all are read."""
        return self._in_order(topic, header_times)[0]

    def messages(self, topic: str) -> Iterator[tuple[int, Any]]:
        """(time of recording, message) of a whole topic."""
        yield from self._between(topic, None, None)

    def messages_at(self, topic: str, positions: Sequence[int], header_times: bool) -> Iterator[tuple[int, Any]]:
        """(position, message) for positions in `times_ns`: no other messages are read, but for a few in between."""
        order, log_times = self._in_order(topic, header_times)[1], self._log_ns(topic)
        position_of = {int(order[position]): int(position) for position in positions}
        wanted = np.asarray(sorted(position_of))
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > _MAX_UNWANTED) + 1):
            first = int(np.searchsorted(log_times, log_times[run[0]]))
            found = self._between(topic, int(log_times[run[0]]), int(log_times[run[-1]]) + 1)
            for index, (_, message) in enumerate(found, start=first):
                if index in position_of:
                    yield position_of[index], message

    def _between(self, topic: str, start_ns: int | None, stop_ns: int | None) -> Iterator[tuple[int, Any]]:
        connections = [one for one in self._reader.connections if one.topic == topic]
        with self._damage_named():
            for connection, time_ns, data in self._reader.messages(connections, start_ns, stop_ns):
                yield time_ns, self._reader.deserialize(data, connection.msgtype)

    def _in_order(self, topic: str, header_times: bool) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """(times, which message of the recording is the i-th in time)."""
        if (topic, header_times) not in self._order:
            times = self._log_ns(topic)
            if header_times:
                times = np.asarray(
                    [header_time_ns(message) or time for time, message in self.messages(topic)], np.int64
                )
            order = np.argsort(times, kind="stable")
            self._order[topic, header_times] = times[order], order
        return self._order[topic, header_times]

    def _log_ns(self, topic: str) -> Int64[np.ndarray, "n"]:
        if topic not in self._log_times:
            with self._damage_named():
                self._log_times[topic] = np.asarray(self._indexed_times(topic), dtype=np.int64)
        if np.any(np.diff(self._log_times[topic]) < 0):
            raise SourceError("bad_record", str(self.path), f"the messages of {topic} are not stored in time order")
        return self._log_times[topic]

    def _indexed_times(self, topic: str) -> list[int]:
        """Times of recording in the order of `messages`, from the format's index where it has one."""
        (reader,) = self._reader.readers
        if hasattr(reader, "indexes"):  # ROS 1
            ids = [one.id for one in self._reader.connections if one.topic == topic]
            return sorted(entry.time for one in ids for entry in reader.indexes[one])
        storages = getattr(reader.storage, "storages", None) or [
            reader.storage
        ]  # a folder's, unpacked, or a file's own
        times: list[int] = []
        for storage in storages:
            indexed = _db3_times if Path(storage.path).suffix == ".db3" else _mcap_times
            found = indexed(Path(storage.path), topic)
            if found is None:
                return [time_ns for time_ns, _ in self.messages(topic)]
            times += found
        return times

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """What parsers of damaged files raise is of many kinds, some of them plain assertions."""
        try:
            with bounded_memory(self.path):
                yield
        except (SourceError, UserError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EFBIG:
                detail = f"it unpacks to more than {_MAX_UNPACKED_RATIO} times its size"
                raise SourceError("too_large", str(self.path), detail) from error
            if isinstance(error, OSError) and error.errno is not None:
                raise  # this machine's fault: a full disk, too many open files
            detail = str(error) or type(error).__name__
            raise SourceError(
                "unreadable_file", str(self.path), f"it is damaged, or no ROS recording ({detail})"
            ) from error


@contextmanager
def _bounded_unpacking(files: Sequence[Path]) -> Iterator[None]:
    """A recording that is compressed as a whole is unpacked into a temporary folder, whatever comes out of it."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = _MAX_UNPACKED_RATIO * max(file.stat().st_size for file in files)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if before == resource.RLIM_INFINITY else min(limit, before), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def _db3_times(path: Path, topic: str) -> list[int]:
    query = "SELECT timestamp FROM messages JOIN topics ON topic_id = topics.id WHERE name = ? ORDER BY timestamp"
    database = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)
    try:
        return [time_ns for (time_ns,) in database.execute(query, [topic])]
    finally:
        database.close()


def _mcap_times(path: Path, topic: str) -> list[int] | None:
    """From the message index behind each chunk; None for a file without. Layout: https://mcap.dev/spec"""
    from mcap.data_stream import ReadDataStream
    from mcap.reader import make_reader
    from mcap.records import MessageIndex

    times: list[int] = []
    with path.open("rb") as file:
        summary = make_reader(file).get_summary()
        if summary is None or not summary.chunk_indexes:
            return None
        for chunk in summary.chunk_indexes:
            if not chunk.message_index_offsets:  # rosbags would take it for a chunk without messages
                raise SourceError(
                    "unreadable_file", str(path), "a part has no message index: `mcap recover IN -o OUT` writes one"
                )
            for channel, offset in chunk.message_index_offsets.items():
                if summary.channels[channel].topic == topic:
                    file.seek(offset + 9)  # after the record's opcode and length
                    times += [time_ns for time_ns, _ in MessageIndex.read(ReadDataStream(file)).records]
    return sorted(times)


# --- messages --------------------------------------------------------------------------------------------------------


def header_time_ns(message: Any) -> int:
    """0 where the message has no header, or nobody has set its time."""
    stamp = getattr(getattr(message, "header", None), "stamp", None)
    return 0 if stamp is None else int(stamp.sec) * 10**9 + int(stamp.nanosec)


class Columns:
    """Which numbers of a topic's messages make a row; the first message decides.

    Without a field: the positions of a JointState, every number of any other message. A JointState's columns follow the
    joints' names, so that the order of joints may change from message to message.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self.names: tuple[str, ...] = ()

    def row(self, message: Any) -> list[float] | None:
        """None for a message that has other names, or more or fewer numbers, than the first."""
        found = self._named_numbers(message)
        if not self.names:
            self.names = tuple(found)
        return [found[name] for name in self.names] if found.keys() == set(self.names) else None

    def _named_numbers(self, message: Any) -> dict[str, float]:
        field = self._field
        joints = getattr(message, "name", None)
        if (
            isinstance(joints, list)
            and hasattr(message, "position")
            and field in ("", "position", "velocity", "effort")
        ):
            values = np.asarray(getattr(message, field or "position"), dtype=np.float64)
            prefix = f"{field}." if field not in ("", "position") else ""
            return {prefix + joint: float(value) for joint, value in zip(joints, values, strict=False)}
        value = message
        for part in field.split(".") if field else ():
            try:
                value = value[int(part)] if part.isdecimal() else getattr(value, part)
            except (AttributeError, IndexError, TypeError):
                return {}
        return dict(_numbers(value, field))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in a message, with the path of its field as its name."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        yield name, float(value)
    elif isinstance(value, list | np.ndarray):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{name}_{i}")
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            if field not in _LAYOUT_FIELDS and not field.startswith("__"):
                yield from _numbers(getattr(value, field), f"{name}.{field}" if name else field)


def decode_image(message: Any) -> UInt8[np.ndarray, "h w 3"]:
    """RGB. ValueError or OSError where it is damaged or of an encoding that is not read."""
    if hasattr(message, "format"):
        with Image.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG")) as image:
            if image.mode not in ("RGB", "RGBA", "L", "P", "1", "CMYK"):
                raise ValueError(f"its pixels are of mode {image.mode}: depth, perhaps")
            return np.asarray(image.convert("RGB"))
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        raise ValueError(f"encoding {message.encoding} is not among {', '.join(_CHANNELS)}")
    rows = np.asarray(message.data, dtype=np.uint8)[: message.height * message.step].reshape(
        message.height, message.step
    )
    pixels = rows[:, : message.width * len(channels)].reshape(message.height, message.width, len(channels))
    return np.ascontiguousarray(pixels[:, :, [channels[i % len(channels)] for i in range(3)]])
