"""Readers of raw recordings, one file per format, all giving `Episode` objects."""

from __future__ import annotations

from pathlib import Path

from configs.loader import UserError

from ..video_io import VIDEO_SUFFIXES
from .base import Episode, Source, SourceConfig, SourceError, VideoSegment
from .lerobot import LeRobotSource
from .lerobot_metadata import dataset_roots
from .video_folder import VideoFolderSource, find_videos

SOURCES: dict[str, type[LeRobotSource] | type[VideoFolderSource]] = {
    "lerobot": LeRobotSource,
    "video_folder": VideoFolderSource,
}


def open_source(config: SourceConfig) -> Source:
    """The reader for a recording set. Keep it for many episodes: it reads the set's metadata once."""
    return SOURCES[config.kind](config)


def detect_kind(path: Path) -> str:
    """The name in SOURCES of what lies at `path`."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path of the recordings.")
    if dataset_roots(path):
        return "lerobot"
    if find_videos(path):
        return "video_folder"
    raise UserError(
        f"{path}: holds no recordings that can be read; expected a LeRobot dataset (meta/info.json) or video files "
        f"({', '.join(VIDEO_SUFFIXES)})."
    )


__all__ = ["SOURCES", "Episode", "Source", "SourceConfig", "SourceError", "VideoSegment", "detect_kind", "open_source"]
