"""Action-free video: every video file below a folder is one episode, with a caption from a file beside it.

A caption for `a/b.mp4` is the text of `a/b.txt`, or a string under one of `CAPTION_KEYS` in `a/b.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_io import VIDEO_SUFFIXES, VideoError, VideoInfo, probe_video
from .base import Episode, SourceConfig, SourceError, VideoSegment, content_sha256, key_safe

CAPTION_KEYS = ("instruction", "caption", "text", "description", "label")


class VideoFolderConfig(SourceConfig):
    """Video files in a folder."""

    kind: Literal["video_folder"] = "video_folder"
    view: str = Field(default="main", pattern=r"^[A-Za-z0-9_-]+$", description="name of the view that the files show")


class VideoFolderSource:
    """Reads a folder (or a single file) of mp4, mov, mkv, webm, avi, ts or m4v."""

    format_name = "video folder"

    def __init__(self, config: VideoFolderConfig) -> None:
        self._config = config
        self._root = config.path
        self.name = config.name or key_safe(
            config.path.resolve().stem if config.path.is_file() else config.path.resolve().name
        )

    def list_episodes(self) -> list[str]:
        return sorted(self._files)

    def embodiment(self) -> Embodiment | None:
        return None

    def repairs(self) -> tuple[str, ...]:
        return ()

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._files:
            raise SourceError("unknown_episode", str(self._root), f"there is no episode {episode_id}")
        path = self._files[episode_id]
        try:
            info = probe_video(path)
        except VideoError as error:
            raise SourceError(error.reason, str(path), error.detail) from error
        caption, repairs = _read_caption(path)
        instruction = self._config.instruction or caption
        segment = VideoSegment(str(path), 0.0, info.num_frames, None if info.is_variable_rate else 0)
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=str(path),
            views={self._config.view: segment},
            fps=info.fps,
            num_frames=info.num_frames,
            actions=None,
            proprio=None,
            control_hz=None,
            embodiment=None,
            instruction=instruction,
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256([path], (instruction or "").encode()),
            repairs=(*video_repairs("The video", info), *repairs),
        )

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Episode id -> file. An id depends only on its file's relative path: adding files changes no other id."""
        if not self._root.exists():
            raise UserError(f"{self._root}: there is no such folder; check the path of the video folder.")
        base = self._root if self._root.is_dir() else self._root.parent
        paths = find_videos(self._root)
        if not paths:
            raise UserError(f"{self._root}: holds no video; files ending in {', '.join(VIDEO_SUFFIXES)} are read.")
        return {_episode_id(path.relative_to(base)): path for path in paths}


def find_videos(root: Path) -> list[Path]:
    """Video files at or below `root`, sorted; hidden ones are left out (macOS leaves `._x.mp4` stubs beside files)."""
    if root.is_file():
        return [root] if root.suffix.lower() in VIDEO_SUFFIXES else []
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in names if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def video_repairs(name: str, info: VideoInfo) -> tuple[str, ...]:
    """Sentences about what decoding had to set right."""
    found = []
    if info.is_variable_rate:
        found.append(f"{name} has a variable frame rate: frames are placed by their timestamps.")
    if info.rotation:
        found.append(f"{name} is stored turned by {info.rotation} degrees: frames are turned upright.")
    if info.pixel_aspect != 1:
        found.append(f"{name} has pixels of aspect {info.pixel_aspect:.3f}: frames are scaled to square pixels.")
    return tuple(found)


def _episode_id(relative: Path) -> str:
    readable = key_safe(str(relative.with_suffix("")))[-60:].strip("_")
    return f"{readable}_{hashlib.sha256(relative.as_posix().encode()).hexdigest()[:8]}"


def _read_caption(video: Path) -> tuple[str | None, tuple[str, ...]]:
    text_file, json_file = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        if text_file.is_file():
            return " ".join(text_file.read_text(encoding="utf-8").split()) or None, ()
        if json_file.is_file():
            data = json.loads(json_file.read_text(encoding="utf-8"))
            for key in CAPTION_KEYS if isinstance(data, dict) else ():
                if isinstance(data.get(key), str) and data[key].strip():
                    return " ".join(data[key].split()), ()
    except (OSError, ValueError) as error:
        return None, (f"The caption beside {video.name} cannot be read ({error}): the episode has none.",)
    return None, ()
