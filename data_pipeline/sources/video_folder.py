"""Action-free video: every video file below a folder is one episode, or every annotated part of one.

A caption for `a/b.mp4` is the text of `a/b.txt`, or a string under one of `CAPTION_KEYS` in `a/b.json`. Or the setting
`annotations` names files that caption many videos, or parts of them: see `video_annotations`.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_io import VIDEO_SUFFIXES, VideoError, VideoInfo, frame_indices_at, frame_times, probe_video
from .base import (
    Episode,
    SourceConfig,
    SourceError,
    VideoSegment,
    content_sha256,
    key_safe,
    printable,
    stable_id,
)
from .files import find_files, read_json, read_text, walk
from .video_annotations import CAPTION_KEYS, Annotation, read_annotations

OTHER_VIDEO_SUFFIXES = (".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".mts", ".m2ts", ".gif", ".swf")
LATE_START_S = 1.0  # muxers and B-frames make a few frames' worth, which is nothing to tell
UNREAD_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".npy", ".npz", ".h5", ".hdf5")


class VideoFolderConfig(SourceConfig):
    """Video files in a folder."""

    kind: Literal["video_folder"] = "video_folder"
    view: str = Field(default="main", pattern=r"^[A-Za-z0-9_-]+$", description="name of the view that the files show")
    annotations: Path | tuple[Path, ...] = Field(
        default=(),
        description="CSV or JSON files with captions of many videos, or of parts of them; relative to `path`",
    )


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
        return sorted(self._parts)

    def embodiment(self) -> Embodiment | None:
        return None

    def repairs(self) -> tuple[str, ...]:
        return ()

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._parts:
            raise SourceError("unknown_episode", str(self._root), f"there is no episode {episode_id}")
        path, annotation = self._parts[episode_id]
        try:
            info = probe_video(path)
            segment, num_frames = _segment(path, info, annotation)
        except VideoError as error:
            raise SourceError(error.reason, str(path), error.detail) from error
        caption, repairs = (annotation.text, ()) if annotation else _read_caption(path)
        instruction = self._config.instruction or caption
        is_part = annotation is not None and annotation.start_s is not None
        span = [repr((segment.start_s, num_frames)).encode()] if is_part else []
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=f"{path}#t={segment.start_s:.2f}" if is_part else str(path),
            views={self._config.view: segment},
            fps=info.fps,
            num_frames=num_frames,
            actions=None,
            proprio=None,
            control_hz=None,
            embodiment=None,
            instruction=instruction,
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256([path], (instruction or "").encode(), *span),
            repairs=(*video_repairs("The video", info), *repairs),
        )

    def notes(self) -> list[str]:
        """What lies in the folder and is not read, as sentences for people."""
        found = _unread_files(self._root, list(self._files.values()))
        if self._config.annotations:
            left_out = len(self._files) - len({path for path, _ in self._parts.values()})
            return [f"{left_out} videos are left out: no annotation names them."] if left_out else []
        return [*found, *_recurring_names(list(self._files.values()))]

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Id -> file. An id depends only on its file's relative path: adding files changes no other id."""
        if not self._root.exists():
            raise UserError(f"{self._root}: there is no such folder; check the path of the video folder.")
        paths = find_videos(self._root)
        if not paths:
            raise UserError(f"{self._root}: holds no video; files ending in {', '.join(VIDEO_SUFFIXES)} are read.")
        return {stable_id(path.relative_to(self._base).as_posix()): path for path in paths}

    @cached_property
    def _parts(self) -> dict[str, tuple[Path, Annotation | None]]:
        """Episode id -> a video, and what is annotated of it."""
        given = self._config.annotations
        files = [given] if isinstance(given, Path) else list(given)
        if not files:
            return {name: (path, None) for name, path in self._files.items()}
        annotations = read_annotations([self._base / file for file in files])
        parts: dict[str, tuple[Path, Annotation | None]] = {}
        for name, path in self._files.items():
            relative = path.relative_to(self._base).with_suffix("").as_posix()
            for number, annotation in enumerate(annotations.get(relative) or annotations.get(path.stem) or ()):
                parts[name if annotation.start_s is None else f"{name}_{number:05d}"] = (path, annotation)
        if not parts:
            named = next(iter(annotations), "none at all")
            raise UserError(
                f"{self._root}: the annotations name none of its {len(self._files)} videos; they name {named}, "
                f"the first video is {next(iter(self._files.values())).stem}."
            )
        return parts

    @property
    def _base(self) -> Path:
        return self._root if self._root.is_dir() else self._root.parent


def _segment(path: Path, info: VideoInfo, annotation: Annotation | None) -> tuple[VideoSegment, int]:
    """The part of the video that an annotation is about, from the frame nearest to its start, and its length."""
    constant_rate_start = None if info.is_variable_rate else 0
    if annotation is None or annotation.start_s is None:
        return VideoSegment(str(path), 0.0, info.num_frames, constant_rate_start), info.num_frames
    start_s, stop_s = max(annotation.start_s, 0.0), annotation.stop_s
    if stop_s is None or not start_s < stop_s:  # not a number, too
        raise SourceError("bad_record", str(path), f"an annotation lasts from {annotation.start_s} to {stop_s} s")
    if start_s >= info.duration_s:
        raise SourceError(
            "out_of_range", str(path), f"an annotation starts at {start_s:.2f} s of a video of {info.duration_s:.2f} s"
        )
    times = frame_times(path)
    first = int(frame_indices_at(path, [start_s])[0])
    if info.is_variable_rate:
        num_frames = max(1, int((min(stop_s, info.duration_s) - start_s) * info.fps))
        return VideoSegment(str(path), start_s, num_frames, None), num_frames
    end = max(first + 1, int(times.searchsorted(stop_s - 0.01 / info.fps)))
    return VideoSegment(str(path), float(times[first]), end - first, first), end - first


def find_videos(root: Path) -> list[Path]:
    """Video files at or below `root`, sorted."""
    return sorted(find_files(root, VIDEO_SUFFIXES))


def video_repairs(name: str, info: VideoInfo) -> tuple[str, ...]:
    """Sentences about what decoding had to set right."""
    found = []
    if info.is_variable_rate:
        found.append(f"{name} has a variable frame rate: frames are placed by their timestamps.")
    if info.rotation:
        turn = "half a turn" if info.rotation == 180 else "a quarter turn"  # in words: numbers are told of one episode
        found.append(f"{name} is stored turned by {turn}: frames are turned upright.")
    if info.pixel_aspect != 1:
        found.append(f"{name} has pixels of aspect {info.pixel_aspect:.3f}: frames are scaled to square pixels.")
    if info.bits > 8:
        found.append(f"{name} has more than 8 bits a colour: they are rounded to 8.")
    if info.is_hdr:
        found.append(f"{name} has a high dynamic range: it is not tone-mapped, so frames look dull.")
    if info.num_hidden:
        found.append(f"{name} hides {info.num_hidden} frames by an edit list: they are left out.")
    if info.num_streams > 1:
        found.append(f"{name} is one of {info.num_streams} in its file: the default one is read, or else the largest.")
    if abs(info.start_s) > LATE_START_S:
        found.append(f"{name} begins at {info.start_s:.2f} s: its times count from its first frame.")
    return tuple(found)


def _read_caption(video: Path) -> tuple[str | None, tuple[str, ...]]:
    text_file, json_file = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        if os.path.isfile(text_file):  # which is false, not an error, where a suffix makes the name too long
            return " ".join(read_text(text_file).split()) or None, ()
        if os.path.isfile(json_file):
            data = read_json(json_file)
            for key in CAPTION_KEYS if isinstance(data, dict) else ():
                if isinstance(data.get(key), str) and data[key].strip():
                    return " ".join(printable(data[key]).split()), ()
    except SourceError as error:
        return None, (f"The caption beside {video.name} cannot be read ({error.detail}): the episode has none.",)
    return None, ()


# --- what is not read ------------------------------------------------------------------------------------------------


def _unread_files(root: Path, videos: list[Path]) -> list[str]:
    """Sentences about annotation files near the videos that nobody reads."""
    captions = {video.with_suffix(".json") for video in videos}
    found: Counter[str] = Counter()
    for folder, _, names in walk(root if root.is_dir() else root.parent):
        paths = [folder / name for name in names]
        found.update(path.suffix.lower() for path in paths if path not in captions)
    counts = ", ".join(f"{found[suffix]} {suffix[1:]}" for suffix in UNREAD_SUFFIXES if found[suffix])
    notes = []
    if counts:
        notes.append(
            f"Files that are not read lie with the videos ({counts}): kind video_json reads actions and texts from "
            "JSON and npy, the setting `annotations` captions and segments from JSON and CSV."
        )
    other = ", ".join(f"{found[suffix]} {suffix[1:]}" for suffix in OTHER_VIDEO_SUFFIXES if found[suffix])
    if other:
        notes.append(
            f"Files that may be videos are not read ({other}): convert them to one of {', '.join(VIDEO_SUFFIXES)}."
        )
    with_numbers = [path for path in sorted(captions) if os.path.isfile(path) and _holds_number_lists(path)][:1]
    if with_numbers:
        notes.append(
            f"{with_numbers[0].name} holds lists of numbers, perhaps actions: only its caption is read. Kind "
            'video_json reads them too, with video_keys: {main: "{stem}' + videos[0].suffix + '"}.'
        )
    return notes


def _holds_number_lists(path: Path) -> bool:
    try:
        data = read_json(path)
    except SourceError:
        return False
    lists = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else []
    return any(len(value) > 4 and isinstance(value[0], int | float | list) for value in lists)


def _recurring_names(videos: list[Path]) -> list[str]:
    """A folder per episode with a file per camera looks like this: the same few names in every folder."""
    by_folder: dict[Path, set[str]] = {}
    for video in videos:
        by_folder.setdefault(video.parent, set()).add(video.name)
    sets = Counter(frozenset(names) for names in by_folder.values())
    names, count = sets.most_common(1)[0]
    if count < 2 or len(names) < 2:
        return []
    return [
        f"{count} folders hold files of the same names ({', '.join(sorted(names)[:4])}), perhaps cameras of one "
        "episode: kind video_folder makes every file an episode of its own."
    ]
