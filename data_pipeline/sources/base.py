"""What every raw format is turned into: episodes whose views point at video files, and the protocol of a reader.

An episode carries its small data (actions, proprio, instruction) but never pixels: a `VideoSegment` says where they
are, so that an episode can travel between processes and the frames are decoded where they are used.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from configs.loader import StrictConfig

from ..embodiments import Embodiment


@dataclass(frozen=True)
class VideoSegment:
    """The part of a video file that shows one episode from one view."""

    path: str
    start_s: float  # relative to the file's first frame
    num_frames: int | None
    start_frame: int | None  # index in the file, in presentation order; None: place frames by time (variable rate)


@dataclass(frozen=True)
class Episode:
    """One continuous recording from reset to end."""

    source: str
    episode_id: str  # unique in its source, [A-Za-z0-9_-] only
    uri: str  # where it came from, for people
    views: dict[str, VideoSegment]
    fps: float
    num_frames: int
    actions: np.ndarray | None  # float32 [n a], raw physical units; row i is executed from time i/control_hz on
    proprio: np.ndarray | None  # float32 [n s], same clock
    control_hz: float | None
    embodiment: str | None
    instruction: str | None
    success: bool | None
    licence: str | None
    content_sha256: str  # of the bytes it was read from: its video files and its rows
    repairs: tuple[str, ...] = ()  # sentences: what deviated from the format's specification and what was done


class SourceError(Exception):
    """One episode that cannot be read; the others still can. `reason` is a snake_case name that reports group by."""

    def __init__(self, reason: str, where: str, detail: str) -> None:
        super().__init__(f"{reason}: {where}: {detail}")
        self.reason = reason
        self.where = where
        self.detail = detail

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, str]]:  # exceptions cross process borders in Ray
        return SourceError, (self.reason, self.where, self.detail)


class SourceConfig(StrictConfig):
    """One recording set. Everything a reader needs, small enough to travel with each unit of work."""

    kind: Literal["lerobot", "video_folder"] = Field(description="the raw format")
    path: Path = Field(description="folder of the recording set")
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]+$", description="name in keys and reports; default: the folder's name"
    )
    licence: str | None = Field(default=None, description="licence of the recordings, kept with every sample")
    instruction: str | None = Field(
        default=None, description="instruction for every episode, instead of the recorded one"
    )
    view: str = Field(
        default="main", pattern=r"^[A-Za-z0-9_-]+$", description="video_folder only: name of the view the files show"
    )
    action_column: str | None = Field(default=None, description="lerobot only: column with the actions; default: found")
    proprio_column: str | None = Field(
        default=None, description="lerobot only: column with the proprio; default: found"
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


def key_safe(text: str) -> str:
    """`text` with everything but [A-Za-z0-9_-] replaced (a dot in a name would end the sample's key)."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "unnamed"


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
