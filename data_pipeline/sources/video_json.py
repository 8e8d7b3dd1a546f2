"""Video files whose actions, texts and paths stand in JSON: one file per episode, one file for many, or JSON lines.

Which key holds what is said in YAML, or found where a record uses a usual name. A key is written with dots
(`videos.0.video_path` is `record["videos"][0]["video_path"]`; a key that holds dots itself comes first). Instead of a
key there may stand a path with keys in braces, `videos/{episode_id}/state.npy`; `{stem}` is the name of the JSON file
and `{entry}` the record's place in it. Three layouts as sources of a build:

    # Ctrl-World (https://github.com/Robert-gyj/Ctrl-World): video at 5 frames/s, control at DROID's 15 Hz
    droid:
      kind: video_json
      path: ctrlworld_droid/droid_subset
      video_keys: {exterior_1: videos.0.video_path, exterior_2: videos.1.video_path, wrist: videos.2.video_path}
      action_keys: [action.cartesian_position, action.gripper_position]
      proprio_keys: [observation.state.cartesian_position, observation.state.gripper_position]
      control_hz: 15

    # IRASim (https://github.com/bytedance/IRASim): every key has a usual name
    language_table: {kind: video_json, path: irasim_languagetable/languagetable}

    # VPP (https://github.com/roboterax/video-prediction-policy): the files claim 3 frames/s, Bridge was recorded at 5
    bridge: {kind: video_json, path: vpp_mixed/bridge, fps: 5}
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field, PositiveFloat, model_validator

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_io import VIDEO_SUFFIXES, VideoError, VideoInfo, probe_video
from .base import Episode, SourceConfig, SourceError, VideoSegment, content_sha256, key_safe, printable, stable_id
from .files import walk
from .json_records import JSON_SUFFIXES, Entry, Record, below, entries_of
from .video_annotations import CAPTION_KEYS
from .video_folder import video_repairs

ACTION_KEYS = ("actions", "action")
PROPRIO_KEYS = ("states", "state", "proprio", "observation.state", "observations.state")
INSTRUCTION_KEYS = (*CAPTION_KEYS, "texts", "language_instruction", "task")
SUCCESS_KEYS = ("success", "is_success")

_MAX_PEEK_BYTES = 64 * 2**20  # of a file that is only opened to see whether it names videos
_MAX_ROBOT_PEEKS = 50  # records looked at for the robot's layout
_MAX_RATE_PEEKS, _MAX_HZ = 10, 1000  # records and rates tried to find out how fast the actions came


class VideoJsonConfig(SourceConfig):
    """Video files with annotations in JSON."""

    kind: Literal["video_json"] = "video_json"
    records: str | None = Field(
        default=None,
        description="the JSON files, as a pattern such as annotation/**/*.json; null: found by the videos they name",
    )
    video_keys: dict[str, str] | None = Field(
        default=None, description="view name -> key of the video's path; null: every value that names a video"
    )
    action_keys: tuple[str, ...] | None = Field(
        default=None, description="keys of the actions (lists of numbers, or the path of an npy or npz); null: found"
    )
    proprio_keys: tuple[str, ...] | None = Field(default=None, description="keys of the proprio; null: found")
    instruction_key: str | None = Field(default=None, description="key of the instruction; null: found")
    success_key: str | None = Field(default=None, description="key of whether the goal was reached; null: found")
    fps: PositiveFloat | str | None = Field(
        default=None, description="real rate of the frames, or the key that holds it; null: the video file's"
    )
    control_hz: PositiveFloat | str | None = Field(
        default=None,
        description="rate of the actions, or the key that holds it; null: the embodiment block's, or "
        "without one an action per frame",
    )

    @model_validator(mode="after")
    def _says_one_control_rate(self) -> VideoJsonConfig:
        """A key may hold another rate than the block: an episode knows its own."""
        block = self.embodiment
        if block is not None and isinstance(self.control_hz, float) and self.control_hz != block.control_hz:
            raise ValueError(
                f"control_hz={self.control_hz:g} and embodiment.control_hz={block.control_hz:g} are two rates of the "
                "same actions; leave control_hz out, or set both to the rate that was recorded"
            )
        return self


class VideoJsonSource:
    """Reads a folder of video and JSON files."""

    format_name = "video with JSON annotations"

    def __init__(self, config: VideoJsonConfig) -> None:
        self._config = config
        self._root = config.path if config.path.is_dir() else config.path.parent
        self.name = config.name or key_safe(self._root.resolve().name)

    def list_episodes(self) -> list[str]:
        return sorted(self._entries)

    def repairs(self) -> tuple[str, ...]:
        return ()

    def notes(self) -> list[str]:
        """Which lists of numbers nothing reads, and settings to copy where there are no actions yet."""
        left = self.unread_lists()
        if not left:
            return []
        note = f"Lists of numbers that are not read: {', '.join(left)}; action_keys and proprio_keys choose"
        settings = self._suggested_settings(left) if self._recorded_embodiment is None else ""
        return [f"{note}, for example {settings}" if settings else f"{note}."]

    def unread_lists(self) -> list[str]:
        """The lists of numbers in the first readable record that are neither actions nor proprio."""
        for record in self._first_records(1):
            used = {
                *_found_keys(record, self._config.action_keys, ACTION_KEYS),
                *_found_keys(record, self._config.proprio_keys, PROPRIO_KEYS),
            }
            return [key for key, value in record.data.items() if key not in used and _is_matrix(value)]
        return []

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._recorded_embodiment

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._entries:
            raise SourceError("unknown_episode", str(self._root), f"there is no episode {episode_id}")
        record = Record(self._root, self._entries[episode_id])
        videos, notes = self._videos(record), list[str]()
        infos = {view: _probe(path) for view, path in videos.items()}
        for view, info in infos.items():
            notes += video_repairs(f"The video of view {view}", info)
        fps, num_frames, views = _on_one_clock(videos, infos, record.number(self._config.fps))
        block = self._config.embodiment
        control_hz = record.number(self._config.control_hz) or (block.control_hz if block else fps)
        actions, proprio = self._control(record, notes)
        if actions is not None:
            _check_duration(record, len(actions) / control_hz, num_frames / fps, fps, control_hz)
        instruction = self._config.instruction or self._instruction(record)
        embodiment = self.embodiment() if actions is not None else None
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=record.where,
            views=views,
            fps=fps,
            num_frames=num_frames,
            actions=actions,
            proprio=proprio,
            control_hz=control_hz if actions is not None else None,
            embodiment=embodiment.name if embodiment else None,
            instruction=instruction,
            success=self._success(record),
            licence=self._config.licence,
            content_sha256=content_sha256([*videos.values(), *record.files_read], record.canonical()),
            repairs=tuple(notes),
        )

    # --- what a record says ------------------------------------------------------------------------------------------

    def _videos(self, record: Record) -> dict[str, Path]:
        if self._config.video_keys is None:
            found = _name_views(named_videos(record.data, record.file, self._root))
            if not found:
                raise SourceError("missing_video", record.where, "it names no video file that is there")
            return found
        return {view: record.path(key) for view, key in self._config.video_keys.items()}

    def _control(
        self, record: Record, notes: list[str]
    ) -> tuple[Float32[np.ndarray, "n a"] | None, Float32[np.ndarray, "n s"] | None]:
        """Actions and proprio, row for row."""
        action_keys = _found_keys(record, self._config.action_keys, ACTION_KEYS)
        missing = [key for key in action_keys if record.value(key) is None]
        if missing or not action_keys:
            if missing:
                notes.append(f"The record has no {', '.join(missing)}: the episode has no actions.")
            return None, None
        actions = record.matrix(action_keys)
        proprio_keys = _found_keys(record, self._config.proprio_keys, PROPRIO_KEYS)
        if not proprio_keys:
            return actions, None
        proprio = record.matrix(proprio_keys)
        if len(proprio) not in (len(actions), len(actions) + 1):  # one more: the state that the last action led to
            counts = f"{len(actions)} rows of {', '.join(action_keys)}, but {len(proprio)} of {', '.join(proprio_keys)}"
            if self._config.proprio_keys is not None:
                raise SourceError("frame_count_mismatch", record.where, counts)
            notes.append(f"{counts}: they are of another rate, so the episode has no proprio.")
            return actions, None
        return actions, proprio[: len(actions)]

    def _instruction(self, record: Record) -> str | None:
        value = _found_value(record, self._config.instruction_key, INSTRUCTION_KEYS)
        texts = value if isinstance(value, list) else [value]
        return next(
            (" ".join(printable(text).split()) for text in texts if isinstance(text, str) and text.strip()), None
        )

    def _success(self, record: Record) -> bool | None:
        value = _found_value(record, self._config.success_key, SUCCESS_KEYS)
        return bool(value) if isinstance(value, bool | int | float) else None

    def _first_records(self, count: int) -> Iterator[Record]:
        """The first readable ones."""
        for entry in list(self._entries.values())[:_MAX_ROBOT_PEEKS]:
            try:
                record = Record(self._root, entry)
            except SourceError:
                continue
            yield record
            count -= 1
            if not count:
                return

    def _suggested_settings(self, keys: list[str]) -> str:
        """The first list that is named after actions, its gripper, their proprio, and the rate where it is clear."""
        actions = [key for key in keys if "action" in key.lower()]
        actions = [key for key in actions if key == actions[0] or "gripper" in key.lower()]
        if not actions:
            return ""
        ends = [f".{key.rpartition('.')[2]}" for key in actions]
        proprio = [key for end in ends for key in keys if key.endswith(end) and key not in actions]
        settings = [f"settings.action_keys='[{', '.join(actions)}]'"]
        settings += [f"settings.proprio_keys='[{', '.join(proprio)}]'"] if len(proprio) == len(actions) else []
        rate = self._whole_rate(actions)
        return " ".join([*settings, *([f"settings.control_hz={rate}"] if rate else [])])

    def _whole_rate(self, keys: list[str]) -> int | None:
        """The only whole number of rows per second that fits all videos; None where one row goes with each frame."""
        rates = set(range(1, _MAX_HZ + 1))
        has_frame_rate = True
        for record in self._first_records(_MAX_RATE_PEEKS):
            try:
                videos = self._videos(record)
                infos = {view: _probe(path) for view, path in videos.items()}
                fps, num_frames, _ = _on_one_clock(videos, infos, record.number(self._config.fps))
                num_rows = len(record.matrix(keys))
            except SourceError:
                continue
            rates = {hz for hz in rates if _lasts_as_long(num_rows / hz, num_frames / fps, fps, hz)}
            has_frame_rate &= _lasts_as_long(num_rows / fps, num_frames / fps, fps, fps)
        return rates.pop() if len(rates) == 1 and not has_frame_rate else None

    @cached_property
    def _recorded_embodiment(self) -> Embodiment | None:
        """The layout that the first record with actions has."""
        for episode_id in self.list_episodes()[:_MAX_ROBOT_PEEKS]:
            try:
                record = Record(self._root, self._entries[episode_id])
                actions, proprio = self._control(record, [])
                if actions is None:
                    continue
                fps = record.number(self._config.fps) or _probe(next(iter(self._videos(record).values()))).fps
            except SourceError:
                continue
            action_keys = _found_keys(record, self._config.action_keys, ACTION_KEYS)
            proprio_keys = _found_keys(record, self._config.proprio_keys, PROPRIO_KEYS) if proprio is not None else ()
            action_names = _dimension_names(record, action_keys)
            return Embodiment(
                name=self.name,
                action_names=action_names,
                proprio_names=_dimension_names(record, proprio_keys),
                control_hz=record.number(self._config.control_hz) or fps,
                gripper_actions=tuple(i for i, name in enumerate(action_names) if "gripper" in name.lower()),
            )
        return None

    # --- where the records are ---------------------------------------------------------------------------------------

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """Episode id -> record. An id depends only on the file's relative path and the record's place in it."""
        if not self._config.path.exists():
            raise UserError(f"{self._config.path}: there is no such folder; check the path of the recordings.")
        entries = {}
        for file in self._record_files():
            relative = file.relative_to(self._root).as_posix()
            for entry in entries_of(file):
                place = "" if entry.place is None else f"#{entry.place}"
                entries[stable_id(relative + place)] = entry
        if not entries:
            pattern = self._config.records
            problem = f"matches records={pattern}" if pattern else "names a video that is there; set `records`"
            raise UserError(f"{self._config.path}: no JSON file below it {problem}.")
        return entries

    def _record_files(self) -> list[Path]:
        if self._config.path.is_file():
            return [self._config.path]
        builds_paths = any("{" in key for key in (self._config.video_keys or {}).values())
        pattern = self._config.records or ("**/*.json" if builds_paths else None)
        if pattern is None:
            return sorted(find_records(self._root))
        try:
            return sorted(path for path in self._root.glob(pattern) if path.is_file())
        except (ValueError, NotImplementedError) as error:  # an absolute or empty pattern
            raise UserError(f"records={pattern}: {error}; give a pattern below `path`.") from error


def _found_keys(record: Record, keys: tuple[str, ...] | None, usual: Sequence[str]) -> tuple[str, ...]:
    """The keys of the config, or else the first usual one that the record has."""
    if keys is not None:
        return keys
    return next(((key,) for key in usual if record.value(key) not in (None, "", [])), ())


def _found_value(record: Record, key: str | None, usual: Sequence[str]) -> Any:
    keys = _found_keys(record, None if key is None else (key,), usual)
    return record.value(keys[0]) if keys else None


def _is_matrix(value: Any) -> bool:
    row = value[0] if isinstance(value, list) and len(value) > 4 else None
    return isinstance(row[0] if isinstance(row, list) and row else row, int | float)


def _dimension_names(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    """`action.gripper_position` -> `gripper_position`: what actions and proprio both have is named alike in both."""
    short = [re.split(r"[./#]", key.removesuffix(".npy"))[-1] for key in keys]
    names: list[str] = []
    for key, name in zip(keys, short if len(set(short)) == len(short) else keys, strict=True):
        dim = record.numbers(key).shape[1]
        names += [name] if dim == 1 else [f"{name}_{i}" for i in range(dim)]
    return tuple(names)


# --- videos ----------------------------------------------------------------------------------------------------------


def _probe(path: Path) -> VideoInfo:
    try:
        return probe_video(path)
    except VideoError as error:
        raise SourceError(error.reason, str(path), error.detail) from error


def _on_one_clock(
    videos: dict[str, Path], infos: dict[str, VideoInfo], known_fps: float | None
) -> tuple[float, int, dict[str, VideoSegment]]:
    """(fps, frames, views). Frames are counted; in a view of another or a variable rate they are placed by time."""
    first = next(iter(infos.values()))
    fps = known_fps or first.fps
    views, lengths = {}, []
    for view, info in infos.items():
        is_counted = known_fps is not None or (not info.is_variable_rate and abs(info.fps - fps) < 0.01 * fps)
        views[view] = VideoSegment(str(videos[view]), 0.0, info.num_frames, 0 if is_counted else None)
        lengths.append(info.num_frames if is_counted else round(info.duration_s * fps))
    if max(lengths) - min(lengths) > max(2, round(0.02 * max(lengths))):
        shown = ", ".join(f"{view} {length}" for view, length in zip(views, lengths, strict=True))
        raise SourceError(
            "frame_count_mismatch", str(next(iter(videos.values()))), f"its views do not show the same time: {shown}"
        )
    return fps, min(lengths), views


def _lasts_as_long(control_s: float, video_s: float, fps: float, control_hz: float) -> bool:
    """n frames go with n rows or n - 1: none follows the last frame. More difference means that a rate is wrong."""
    slack = max(2 / control_hz, 0.02 * video_s)
    return video_s - 1 / fps - slack <= control_s <= video_s + slack


def _check_duration(record: Record, control_s: float, video_s: float, fps: float, control_hz: float) -> None:
    if not _lasts_as_long(control_s, video_s, fps, control_hz):
        raise SourceError(
            "frame_count_mismatch",
            record.where,
            f"{round(control_s * control_hz)} actions at {control_hz:g} Hz last {control_s:.2f} s, the video "
            f"{video_s:.2f} s: set control_hz or fps",
        )


def named_videos(data: Any, file: Path, root: Path) -> dict[tuple[str, ...], Path]:
    """Key path -> video file, for every text in a record that is the path of one below `root`."""
    found: dict[tuple[str, ...], Path] = {}
    for keys, text in _texts(data, ()):
        if text.lower().endswith(VIDEO_SUFFIXES):
            path = below(root, file, text)
            if path is not None and os.path.isfile(path) and path not in found.values():
                found[keys] = path
    return found


def _texts(data: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(data, str):
        yield keys, data
    elif isinstance(data, dict) or (isinstance(data, list) and data and isinstance(data[0], str | dict)):
        children = data.items() if isinstance(data, dict) else enumerate(data)
        if len(keys) < 4 and len(data) <= 64:
            for key, child in children:
                yield from _texts(child, (*keys, str(key)))


def _name_views(videos: dict[tuple[str, ...], Path]) -> dict[str, Path]:
    """Named after what differs in their keys; an only video is `main`."""
    if len(videos) == 1:
        return {"main": next(iter(videos.values()))}
    named = {}
    for keys, path in videos.items():
        others = [other for other in videos if other != keys]
        own = [part for i, part in enumerate(keys) if any(other[i : i + 1] != (part,) for other in others)]
        name = key_safe("_".join(own))
        named[f"view_{name}" if name.isdecimal() else name] = path
    return named


# --- files -----------------------------------------------------------------------------------------------------------


def names_videos(path: Path) -> bool:
    """Whether a JSON file at or below `path` names a video that is there."""
    if path.is_file():
        return path.suffix.lower() in JSON_SUFFIXES and _names_a_video(path, path.parent)
    return next(find_records(path), None) is not None


def find_records(root: Path) -> Iterator[Path]:
    """The JSON files of every folder at or below `root` in which one of the first three names a video that is there."""
    for folder, _, names in walk(root):
        files = [folder / name for name in names if name.lower().endswith(JSON_SUFFIXES)]
        if any(_names_a_video(file, root) for file in files[:3]):
            yield from files


def _names_a_video(file: Path, root: Path) -> bool:
    try:
        entries = entries_of(file) if file.stat().st_size <= _MAX_PEEK_BYTES else []
        return bool(entries) and bool(named_videos(Record(root, entries[0]).data, file, root))
    except (OSError, SourceError):
        return False
