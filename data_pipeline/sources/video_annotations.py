"""Captions of many videos in one file, and narrations of parts of long videos.

Which it is, the contents say:

- rows (a CSV with a header, a JSON list, JSON lines) with a video's name and a text: Something-Something
  (https://www.qualcomm.com/developer/software/something-something-v-2-dataset: `id`, `label`), or a table of one's own;
- the same with a start and a stop: EPIC-KITCHENS (https://github.com/epic-kitchens/epic-kitchens-100-annotations:
  `video_id`, `start_timestamp`, `stop_timestamp`, `narration`);
- Ego4D's `narration.json` (https://ego4d-data.org/docs/data/annotations-schemas): texts at points in time.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loader import UserError

from ..video_io import VIDEO_SUFFIXES
from .base import SourceError, printable
from .files import check_file

CAPTION_KEYS = ("instruction", "caption", "text", "description", "label")

_NAME_KEYS = ("video_id", "video_uid", "video", "video_path", "file", "file_name", "filename", "path", "id")
_TEXT_KEYS = (*CAPTION_KEYS, "narration")
_START_KEYS = ("start_timestamp", "start_s", "start_sec", "start_time", "start")
_STOP_KEYS = ("stop_timestamp", "stop_s", "end_s", "end_sec", "end_time", "stop", "end")

MAX_NARRATION_S = 8.0
"""The longest part of a video that a narration of one point in time is taken to be about."""


@dataclass(frozen=True)
class Annotation:
    """A text about a video, or about the part of it from `start_s` to `stop_s`."""

    text: str | None
    start_s: float | None = None  # seconds after the first frame; None: the whole video. NaN where it is no time
    stop_s: float | None = None


def read_annotations(paths: Sequence[Path]) -> dict[str, list[Annotation]]:
    """Annotations by the name of the video (without its suffix), in the order of the files."""
    found: dict[str, list[Annotation]] = {}
    for path in paths:
        data = _read(path)
        narrated = data.get("videos", data) if isinstance(data, dict) else None
        if isinstance(narrated, dict) and any(_narration_passes(video) for video in narrated.values()):
            for name, video in narrated.items():
                found.setdefault(name, []).extend(_narrations(video))
        else:
            for name, annotation in _rows(path, data):
                found.setdefault(name, []).append(annotation)
    return found


def _read(path: Path) -> Any:
    try:
        check_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return list(csv.DictReader(file))
            if path.suffix.lower() == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            return json.load(file)
    except SourceError as error:
        raise UserError(f"{path}: {error.detail}; `annotations` is relative to the folder of videos.") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: these annotations cannot be read ({error}); CSV and JSON are.") from error


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(path: Path, data: Any) -> Iterable[tuple[str, Annotation]]:
    """(video name, annotation) of each row."""
    if isinstance(data, dict):  # {video: row}, or the rows under some key
        lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        data = lists[0] if len(lists) == 1 else [{"id": name, **_as_row(value)} for name, value in data.items()]
    rows = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
    keys = set().union(*(row.keys() for row in rows[:100]))
    name_key, text_key, start_key, stop_key = (
        next((key for key in usual if key in keys), None) for usual in (_NAME_KEYS, _TEXT_KEYS, _START_KEYS, _STOP_KEYS)
    )
    if name_key is None or text_key is None:
        raise UserError(
            f"{path}: no row has a video's name (under {', '.join(_NAME_KEYS)}) and a text (under "
            f"{', '.join(_TEXT_KEYS)}); its columns are {', '.join(sorted(map(str, keys))[:12]) or 'none'}."
        )
    for row in rows:
        text = row.get(text_key)
        start_s = _seconds(row.get(start_key)) if start_key and stop_key else None
        stop_s = _seconds(row.get(stop_key)) if start_key and stop_key else None
        yield _video_name(row.get(name_key)), Annotation(_clean(text), start_s, stop_s)


def _as_row(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"text": value}


def _video_name(value: Any) -> str:
    name = str(value).strip()
    suffix = next((suffix for suffix in VIDEO_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)].removeprefix("./")


def _clean(text: Any) -> str | None:
    return " ".join(printable(text).split()) or None if isinstance(text, str) else None


def _seconds(value: Any) -> float:
    """12.5, "12.5" or "00:00:12.50"; NaN for anything else."""
    try:
        parts = [float(part) for part in str(value).split(":")]
    except ValueError:
        return math.nan
    if len(parts) > 3:
        return math.nan
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


# --- narrations ------------------------------------------------------------------------------------------------------


def _narration_passes(video: Any) -> list[list[dict[str, Any]]]:
    """The narrations of one of Ego4D's videos, by annotator."""
    if not isinstance(video, dict):
        return []
    passes = [video, *(value for value in video.values() if isinstance(value, dict))]
    found = [one["narrations"] for one in passes if isinstance(one.get("narrations"), list)]
    return [[row for row in rows if isinstance(row, dict)] for rows in found]


def _narrations(video: Any) -> list[Annotation]:
    """Each narration is about the time that is nearer to it than to the others of the same annotator.

    Two annotators told the same video: the one who told more is taken.
    """
    told = max(_narration_passes(video), key=len, default=[])
    timed = sorted((_seconds(row.get("timestamp_sec")), str(row.get("narration_text") or "")) for row in told)
    timed = [(time_s, text) for time_s, text in timed if math.isfinite(time_s)]
    annotations = []
    for i, (time_s, text) in enumerate(timed):
        before = (time_s - timed[i - 1][0]) / 2 if i else time_s
        after = (timed[i + 1][0] - time_s) / 2 if i + 1 < len(timed) else MAX_NARRATION_S / 2
        start_s, stop_s = time_s - min(before, MAX_NARRATION_S / 2), time_s + min(after, MAX_NARRATION_S / 2)
        annotations.append(Annotation(_without_tags(text), start_s, stop_s))
    return annotations


def _without_tags(text: str) -> str | None:
    """`#C C picks a cup` -> `C picks a cup`: the tag says whether the camera wearer or another person acts."""
    text = printable(text)
    return " ".join(word for word in text.split() if not (word.startswith("#") and word[1:].isalpha())) or None
