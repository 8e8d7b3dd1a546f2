"""Readers of raw recordings, one file per format, all giving `Episode` objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from configs.loader import UserError

from ..video_io import VIDEO_SUFFIXES
from .base import Episode, Footage, Source, SourceConfig, SourceError, VideoSegment
from .lerobot import LeRobotConfig, LeRobotSource
from .lerobot_metadata import dataset_roots
from .video_folder import VideoFolderConfig, VideoFolderSource, find_videos


@dataclass(frozen=True)
class Format:
    """One raw format: its settings, its reader, and how a folder or file is recognised as being of it."""

    config: type[SourceConfig]
    open: Callable[[Any], Source]
    is_at: Callable[[Path], object]  # true or a non-empty list where it is
    looks_like: str  # what `is_at` looks for, for people


FORMATS: dict[str, Format] = {  # detected in this order: a format that holds video files comes before plain video
    "lerobot": Format(LeRobotConfig, LeRobotSource, dataset_roots, "a LeRobot dataset (meta/info.json)"),
    "video_folder": Format(
        VideoFolderConfig, VideoFolderSource, find_videos, f"video files ({', '.join(VIDEO_SUFFIXES)})"
    ),
}

AnySourceConfig = Annotated[LeRobotConfig | VideoFolderConfig, Field(discriminator="kind")]


def open_source(config: AnySourceConfig) -> Source:
    """The reader for a recording set. Keep it for many episodes: it reads the set's metadata once."""
    return FORMATS[config.kind].open(config)


def detect_kind(path: Path) -> str:
    """The name in FORMATS of what lies at `path`."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path of the recordings.")
    for kind, one in FORMATS.items():
        if one.is_at(path):
            return kind
    expected = " or ".join(one.looks_like for one in FORMATS.values())
    raise UserError(f"{path}: holds no recordings that can be read; expected {expected}.")


__all__ = [
    "FORMATS",
    "AnySourceConfig",
    "Episode",
    "Footage",
    "LeRobotConfig",
    "Source",
    "SourceConfig",
    "SourceError",
    "VideoFolderConfig",
    "VideoSegment",
    "detect_kind",
    "open_source",
]
