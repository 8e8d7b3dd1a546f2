"""What every raw format is turned into: episodes whose views point at stored frames, and the protocol of a reader.

An episode carries its small data (actions, proprio, instruction) but never pixels: a `Footage` says where they are, so
that an episode can travel between processes and the frames are decoded where they are used.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from pydantic import Field, PositiveInt

from configs.loader import StrictConfig, UserError

from ..align import nearest_frames
from ..embodiments import Embodiment
from ..video_io import (
    VideoError,
    ViewConfig,
    decode_frames,
    decode_view,
    frame_indices_at,
    prepare_view,
    probe_video,
)
from ..video_pixels import rgb_to_planes

MAX_INSTRUCTION_LENGTH = 2000
"""Characters; every clip carries it. Text encoders read a quarter of it."""

MAX_SENTENCE_LENGTH = 1000

MAX_FRAMES = 2**24
"""Of an episode: six days at 30 Hz. What is reckoned for each of them takes memory; more is a header that lies."""


@dataclass(frozen=True)
class FootageInfo:
    """What the stored frames are, as they will come out of `Footage.read`."""

    codec: str  # "h264 yuv420p", "jpeg", "uint8 array", …
    height: int  # upright, square pixels
    width: int
    fps: float


class Footage(Protocol):
    """The frames that show one episode from one view, wherever they are stored. Small: it travels between processes.

    `positions` and `read` raise `VideoError` where the file does not hold what it promised.
    """

    @property
    def path(self) -> str:
        """Of the file that holds them."""
        ...

    def info(self) -> FootageInfo: ...

    def positions(self, times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
        """Which stored frames are nearest to these times of the episode, whose rate is `fps`."""
        ...

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        """The frames at these positions (any order, repeats allowed): RGB, upright, square pixels."""
        ...

    def read_view(self, positions: Sequence[int], view: ViewConfig) -> UInt8[np.ndarray, "f p w"]:
        """The same, cut and scaled to a view of the dataset, as planes (`video_pixels`)."""
        ...


def read_undamaged(footage: Footage, positions: Sequence[int]) -> list[UInt8[np.ndarray, "h w 3"] | None]:
    """The frames at these positions, None for each that is damaged: for samples, which need not be complete."""
    try:
        return list(footage.read(positions))
    except VideoError:
        return [None] if len(positions) == 1 else [read_undamaged(footage, [one])[0] for one in positions]


@dataclass(frozen=True)
class VideoSegment:
    """The part of a video file that shows one episode from one view."""

    path: str
    start_s: float  # relative to the file's first frame
    num_frames: int | None
    start_frame: int | None  # index in the file, in presentation order; None: place frames by time (variable rate)

    def info(self) -> FootageInfo:
        video = probe_video(self.path)
        return FootageInfo(f"{video.codec} {video.pix_fmt}", video.height, video.width, video.fps)

    def positions(self, times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
        if self.start_frame is not None:
            return self.start_frame + nearest_frames(times_s, fps)
        # No frame count to rely on (a variable rate, dropped frames): the file's own timestamps decide.
        return frame_indices_at(self.path, self.start_s + times_s)

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        return decode_frames(self.path, positions)

    def read_view(self, positions: Sequence[int], view: ViewConfig) -> UInt8[np.ndarray, "f p w"]:
        # Scaled while it is decoded: going by the full picture takes five times as long.
        return decode_view(self.path, positions, view)


def as_bytes(frames: np.ndarray, scale: float, offset: float = 0.0) -> UInt8[np.ndarray, "f h w 3"]:
    """Pictures of any numbers, of which `value * scale + offset` is 0 to 255."""
    result = np.empty(frames.shape, np.uint8)
    for some, into in ((frames[i : i + 16], result[i : i + 16]) for i in range(0, len(frames), 16)):
        values = np.nan_to_num(some.astype(np.float32) * np.float32(scale) + np.float32(offset))
        into[...] = np.rint(values).clip(0, 255)
    return result


@dataclass(frozen=True)
class StoredImages(ABC):
    """Frames that a file holds one by one (JPEGs, rows of an array): a format says how to read them."""

    path: str
    num_frames: int
    fps: float

    @abstractmethod
    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]: ...

    def read_view(self, positions: Sequence[int], view: ViewConfig) -> UInt8[np.ndarray, "f p w"]:
        return rgb_to_planes(prepare_view(self.read(positions), view))

    @property
    @abstractmethod
    def codec(self) -> str: ...

    def info(self) -> FootageInfo:
        _, height, width, _ = self.read([0]).shape
        return FootageInfo(self.codec, height, width, self.fps)

    def positions(self, times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
        return nearest_frames(times_s, fps).clip(max=self.num_frames - 1)


@dataclass(frozen=True)
class Episode:
    """One continuous recording from reset to end."""

    source: str
    episode_id: str  # unique in its source, [A-Za-z0-9_-] only
    uri: str  # where it came from, for people
    views: Mapping[str, Footage]
    fps: float
    num_frames: int
    actions: np.ndarray | None  # [n a], in physical units, kept as float32; row i is executed from i/control_hz on
    proprio: np.ndarray | None  # [n s], same clock, kept as float32
    control_hz: float | None
    embodiment: str | None
    instruction: str | None
    success: bool | None
    licence: str | None
    content_sha256: str  # of the bytes it was read from: its video files and its rows
    repairs: tuple[str, ...] = ()  # sentences: what deviated from the format's specification and what was done
    control_times_s: np.ndarray | None = None  # float64 [n] since the first frame, where control has its own clock

    def __post_init__(self) -> None:
        if self.num_frames > MAX_FRAMES:
            raise SourceError("too_large", self.uri, f"it has {self.num_frames} frames, the limit is {MAX_FRAMES}")
        if self.instruction is not None and len(self.instruction) > MAX_INSTRUCTION_LENGTH:
            note = f"The instruction has more than {MAX_INSTRUCTION_LENGTH} characters: the first ones are kept."
            object.__setattr__(self, "instruction", self.instruction[:MAX_INSTRUCTION_LENGTH])
            object.__setattr__(self, "repairs", (*self.repairs, note))
        object.__setattr__(self, "uri", printable(self.uri))
        for name in ("actions", "proprio"):
            object.__setattr__(self, name, _as_rows(getattr(self, name), name, self.uri))
        object.__setattr__(self, "repairs", tuple(map(_sentence, self.repairs)))


class SourceError(Exception):
    """One episode that cannot be read; the others still can. `reason` is a snake_case name that reports group by."""

    def __init__(self, reason: str, where: str, detail: str) -> None:
        where, detail = printable(where), _sentence(detail)
        super().__init__(f"{reason}: {where}: {detail}")
        self.reason = reason
        self.where = where
        self.detail = detail

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, str]]:  # exceptions cross process borders in Ray
        return SourceError, (self.reason, self.where, self.detail)


def _as_rows(numbers: np.ndarray | None, what: str, where: str) -> Float32[np.ndarray, "n d"] | None:
    """As they are stored. SourceError where there is not a row of numbers per step."""
    if numbers is None:
        return None
    if np.ndim(numbers) != 2:
        raise SourceError("wrong_dims", where, f"its {what} have the shape {list(np.shape(numbers))} instead of [n d]")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and its row invalid
        return np.asarray(numbers, dtype=np.float32)


class UnknownRateError(UserError):
    """Neither the recordings nor the settings say how many steps there are in a second; `control_hz` would."""


class SourceConfig(StrictConfig):
    """One recording set; each format adds its `kind` and settings. Small enough to travel with each unit of work."""

    path: Path = Field(description="folder of the recording set")
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]+$", description="name in keys and reports; default: the folder's name"
    )
    licence: str | None = Field(default=None, description="licence of the recordings, kept with every sample")
    instruction: str | None = Field(
        default=None, description="instruction for every episode, instead of the recorded one"
    )
    view_map: dict[str, str] | None = Field(
        default=None, description="recorded view name -> view name in the dataset; null: the same names"
    )
    max_episodes: PositiveInt | None = Field(default=None, description="use only the first so many episodes")
    embodiment_name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]+$", description="name of the robot type; null: the recording's own"
    )
    embodiment: Embodiment | None = Field(
        default=None, description="the robot's layout, where the recording's own description is missing or wrong"
    )


class Source(Protocol):
    """A reader of one raw format."""

    name: str

    @property
    def format_name(self) -> str:
        """The format and its version, for people."""
        ...

    def repairs(self) -> tuple[str, ...]:
        """What deviates in the set as a whole (episodes repeat it), as sentences."""
        ...

    def list_episodes(self) -> list[str]:
        """Episode ids, sorted; cheap (metadata only). UserError when the whole set is unusable."""
        ...

    def read_episode(self, episode_id: str) -> Episode:
        """Everything but the pixels. SourceError when this episode is unusable."""
        ...

    def embodiment(self) -> Embodiment | None:
        """The robot that recorded it, or None for action-free video."""
        ...


def printable(text: str) -> str:
    """`text` without half characters (of names in another encoding, of JSON's `"\\ud800"`): UTF-8 has none."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _sentence(text: str) -> str:
    """For people: what a file says may be quoted in it, however long that is."""
    return printable(text if len(text) <= MAX_SENTENCE_LENGTH else f"{text[:MAX_SENTENCE_LENGTH]} …")


def is_rate(value: Any) -> TypeGuard[float]:
    """Whether something in a file can be a number of things per second: of others, times overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-3 <= value <= 1e6


def key_safe(text: str) -> str:
    """`text` with everything but [A-Za-z0-9_-] replaced (a dot in a name would end the sample's key)."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "unnamed"


def stable_id(*parts: str) -> str:
    """An episode id that follows from a relative path and a name inside the file alone: adding files changes none."""
    whole = "/".join(parts)
    readable = key_safe(os.path.splitext(whole)[0])[-60:].strip("_")
    name_bytes = whole.encode("utf-8", "surrogatepass")  # a name need not be UTF-8
    return f"{readable}_{hashlib.sha256(name_bytes).hexdigest()[:8]}"


def check_dims(
    embodiment: Embodiment | None,
    actions: Float32[np.ndarray, "n a"] | None,
    proprio: Float32[np.ndarray, "n s"] | None,
    where: str,
) -> None:
    """SourceError where an episode has not as many numbers a row as its robot."""
    if embodiment is None or actions is None:
        return
    found = (actions.shape[1], 0 if proprio is None else proprio.shape[1])
    wanted = (embodiment.action_dim, embodiment.proprio_dim)
    if found != wanted:
        detail = (
            f"it has {found[0]} action and {found[1]} proprio values a row, the embodiment {embodiment.name} has "
            f"{wanted[0]} and {wanted[1]}"
        )
        raise SourceError("wrong_dims", where, detail)


def content_sha256(paths: Iterable[str | os.PathLike[str]], *extra: bytes) -> str:
    """Digest of files' bytes and of `extra` (rows read from a table that many episodes share)."""
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        digest.update(_file_sha256(os.fspath(path), stat.st_size, stat.st_mtime_ns))
    for data in extra:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _file_sha256(path: str, size: int, mtime_ns: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
