"""The metadata of a LeRobot dataset (v2.0, v2.1, v3.0), read tolerantly.

Recordings in the wild deviate from the version they declare. What can be understood anyway is, and each deviation
becomes a sentence in `repairs`; what cannot be understood is a UserError that says where and what to do.

    v2: meta/episodes.jsonl, meta/tasks.jsonl, one parquet and one mp4 per episode (and camera)
    v3: meta/episodes/**/*.parquet, meta/tasks.parquet, many episodes per parquet and mp4
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.loader import UserError
from configs.problems import show

from .base import SourceError, is_rate
from .files import parse_json, read_bytes, read_json
from .parquet_tables import UNREADABLE, first_line, open_table, read_columns

_V2_DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V2_VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_V3_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_V3_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

_TEMPLATE = re.compile(r"([^{}]|\{\w+(:\d{0,2}d?)?\})*")


@dataclass(frozen=True)
class VideoPlace:
    """Where a camera's recording of one episode is, as the metadata says."""

    path: Path
    from_s: float | None = None  # v3: the episode's start in the file
    to_s: float | None = None
    frames_before: int | None = None  # v3: frames of the episodes before it in the same file


@dataclass(frozen=True)
class EpisodeRecord:
    index: int
    length: int | None
    tasks: tuple[str, ...]
    table: Path
    videos: dict[str, VideoPlace]  # by camera key
    first_row: int | None = None  # v3: position of the episode's first row in the table
    is_own_table: bool = True  # v2: every row of the table belongs to the episode


@dataclass
class LeRobotMetadata:
    root: Path
    version: str
    is_v3: bool
    fps: float
    robot_type: str | None
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    cameras: dict[str, str] = field(default_factory=dict)  # camera key -> folder name under videos/
    episodes: dict[int, EpisodeRecord] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)


def find_root(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds `meta/info.json`: `path` itself, or the only such folder one or two levels below it."""
    if not path.exists():
        raise UserError(f"{path}: there is no such folder; check the path of the LeRobot dataset.")
    roots = dataset_roots(path)
    if not roots:
        raise UserError(f"{path}: not a LeRobot dataset (no meta/info.json here or up to two folders below).")
    if len(roots) > 1:
        names = ", ".join(str(found.relative_to(path)) for found in roots)
        raise UserError(f"{path}: holds {len(roots)} LeRobot datasets ({names}); give the path of one of them.")
    if roots[0] == path:
        return path, ()
    return roots[0], (f"The dataset was found in the subfolder {roots[0].relative_to(path)}.",)


def dataset_roots(path: Path) -> list[Path]:
    """`path` itself if it holds a meta/info.json, else the folders up to two levels below that do."""
    depths = ("", "*/", "*/*/")
    found = [[info.parent.parent for info in sorted(path.glob(f"{depth}meta/info.json"))] for depth in depths]
    return found[0] or found[1] + found[2]


def read_metadata(path: Path) -> LeRobotMetadata:
    root, repairs = find_root(path)
    info = _read_json(root / "meta" / "info.json")
    version = str(info["codebase_version"]) if "codebase_version" in info else ""
    is_v3 = (root / "meta" / "episodes").is_dir()
    notes = list(repairs)
    if version.startswith("v1"):
        raise UserError(
            f"{root}: LeRobot {version} is not supported; convert it to v2.1 or v3.0 with lerobot's converter."
        )
    if not re.fullmatch(r"v?[23](\.\d+)?", version):
        notes.append(f"info.json gives the version {version or 'nothing'}: read as {'v3.0' if is_v3 else 'v2.1'}.")
        version = "v3.0" if is_v3 else "v2.1"
    elif is_v3 != version.lstrip("v").startswith("3"):
        notes.append(f"info.json says {version}, but the files are laid out as {'v3.0' if is_v3 else 'v2.1'}.")
    metadata = LeRobotMetadata(
        root=root,
        version=version,
        is_v3=is_v3,
        fps=_rate(info, "fps", root),
        robot_type=info["robot_type"] if isinstance(info.get("robot_type"), str) else None,
        features=_features(info, notes),
        tasks=_read_tasks(root, notes),
        repairs=notes,
    )
    metadata.cameras = _find_cameras(metadata)
    records = _v3_records(metadata, info) if is_v3 else _v2_records(metadata, info)
    metadata.episodes = {record.index: record for record in records}
    if not metadata.episodes:
        raise UserError(f"{root}: lists no episodes in meta/ and holds no tables in data/; nothing can be read.")
    _check_totals(metadata, info)
    return metadata


def is_video(feature: dict[str, Any]) -> bool:
    return feature["dtype"] == "video"


def video_properties(feature: dict[str, Any]) -> dict[str, Any]:
    """What info.json claims about a camera: under `info` or (older) `video_info`, often with a "video." prefix."""
    claimed = feature.get("info") or feature.get("video_info")
    return {key.removeprefix("video."): value for key, value in claimed.items()} if isinstance(claimed, dict) else {}


def claimed_size(feature: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) of a camera according to info.json, where it says so."""
    properties, shape = video_properties(feature), feature.get("shape")
    width, height = _count(properties.get("width")), _count(properties.get("height"))
    if (not width or not height) and shape is not None and len(shape) == 3:
        height, width = shape[:2] if shape[2] in (1, 3, 4) else shape[1:]
    return (width, height) if width and height else None


# --- info.json, tasks ------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except SourceError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error.detail}); restore the file.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, found {type(data).__name__}; restore the file.")
    return data


def _read_json_lines(path: Path, index_key: str, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Rows by their index; a line that is no object with an index is left out."""
    rows: dict[int, dict[str, Any]] = {}
    broken = []
    try:
        lines = read_bytes(path).splitlines()
    except SourceError as error:
        raise UserError(f"{path}: cannot be read ({error.detail}); restore the file.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
            rows[_required_count(row[index_key])] = row
        except (SourceError, ValueError, TypeError, KeyError, IndexError):
            broken.append(number)
    if broken:
        notes.append(f"{path.name} has unreadable lines ({broken[0]} first, {len(broken)} in all): they are left out.")
    return rows


def _rate(info: dict[str, Any], key: str, root: Path) -> float:
    value = info.get(key)
    if not is_rate(value):
        problem = f"{key} must be a positive number of at most a million, found {show(value)}"
        raise UserError(f"{root}/meta/info.json: {problem}; correct the file.")
    return float(value)


def _features(info: dict[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    declared = info.get("features")
    if not isinstance(declared, dict):
        notes.append("info.json has no features: columns and cameras are taken from the files.")
        return {}
    features = {}
    for key, feature in declared.items():
        if isinstance(feature, dict):
            shape = feature.get("shape")
            sizes = [_count(size) for size in shape] if isinstance(shape, list) else [None]
            features[key] = {**feature, "dtype": str(feature.get("dtype")), "shape": None if None in sizes else sizes}
    return features


def _read_tasks(root: Path, notes: list[str]) -> dict[int, str]:
    """task_index -> text. v3 files keep the text in the pandas index, in a column of any name, or both."""
    lines, table_file = root / "meta" / "tasks.jsonl", root / "meta" / "tasks.parquet"
    if lines.is_file():
        return {
            index: str(row["task"])
            for index, row in _read_json_lines(lines, "task_index", notes).items()
            if "task" in row
        }
    if not table_file.is_file():
        notes.append(
            "meta/ has no tasks.jsonl or tasks.parquet: episodes have only the task texts they carry themselves."
        )
        return {}
    try:
        parquet = open_table(table_file)
        table = read_columns(table_file, parquet, parquet.schema_arrow.names)
    except UNREADABLE as error:
        notes.append(f"tasks.parquet cannot be read ({first_line(error)}): task texts are missing.")
        return {}
    text_columns = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
    if not text_columns:
        notes.append("tasks.parquet has no text column: task texts are missing.")
        return {}
    if text_columns[0] not in ("task", "__index_level_0__"):
        notes.append(f"tasks.parquet keeps the task text in the column {text_columns[0]}: it is read from there.")
    texts = table[text_columns[0]].to_pylist()
    if "task_index" not in table.column_names:
        notes.append("tasks.parquet has no task_index column: tasks are numbered by their row.")
        return dict(enumerate(texts))
    indices = [_count(value) for value in table["task_index"].to_pylist()]
    return {index: text for index, text in zip(indices, texts, strict=True) if index is not None}


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# --- cameras ---------------------------------------------------------------------------------------------------------


def _find_cameras(metadata: LeRobotMetadata) -> dict[str, str]:
    """Match declared cameras with folders under videos/. Exact names go first: no folder may serve two cameras."""
    notes = metadata.repairs
    folders = sorted(_video_folders(metadata.root, metadata.is_v3))
    declared = [key for key, feature in metadata.features.items() if is_video(feature)]
    depth = [key for key in declared if video_properties(metadata.features[key]).get("is_depth_map") is True]
    found = {key: key for key in declared if key in folders}
    for key in declared:
        free = [name for name in folders if name not in found.values()]
        if key in found:
            continue
        match = _loose_match(key, free, is_last=len(declared) - len(found) == 1)
        if match is None:
            notes.append(f"The camera {key} is declared in info.json but has no videos: it is skipped.")
        else:
            notes.append(f"The videos of the camera {key} are in the folder {match}: they are read from there.")
            found[key] = match
    for name in folders:
        if name not in found.values():
            if metadata.features:
                notes.append(f"The folder videos/…/{name} belongs to no camera in info.json: it is not read.")
            else:
                found[name] = name
    for key in depth:
        if found.pop(key, None):
            notes.append(f"The camera {key} holds depth, not colour: it is skipped.")
    return found


def _video_folders(root: Path, is_v3: bool) -> set[str]:
    pattern = "videos/*/chunk-*" if is_v3 else "videos/chunk-*/*"
    return {(path.parent if is_v3 else path).name for path in root.glob(pattern) if path.is_dir()}


def _loose_match(key: str, folders: list[str], is_last: bool) -> str | None:
    """A folder whose name means the same camera; the only folder left for the only camera left counts as well."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("observation.").removeprefix("images."))

    same = [name for name in folders if plain(name) == plain(key)]
    inside = [name for name in folders if plain(name) and (plain(name) in plain(key) or plain(key) in plain(name))]
    near = difflib.get_close_matches(plain(key), [plain(name) for name in folders], n=1, cutoff=0.8)
    close = [name for name in folders if near and plain(name) == near[0]]
    for candidates in (same, inside, close):
        if len(candidates) == 1:
            return candidates[0]
    return folders[0] if is_last and len(folders) == 1 else None


# --- episodes --------------------------------------------------------------------------------------------------------


def _v2_records(metadata: LeRobotMetadata, info: dict[str, Any]) -> Iterator[EpisodeRecord]:
    root, notes = metadata.root, metadata.repairs
    chunk_size = _count(info.get("chunks_size")) or 1000
    listing = root / "meta" / "episodes.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    if listing.is_file():
        rows = _read_json_lines(listing, "episode_index", notes)
    else:
        notes.append("meta/episodes.jsonl is missing: episodes are listed from the files in data/.")
        rows = {int(path.stem.rpartition("_")[2]): {} for path in root.glob("data/**/episode_*.parquet")}
    for index, row in rows.items():
        place = {"episode_chunk": index // chunk_size, "episode_index": index}
        table = _place(root, info.get("data_path"), _V2_DATA_PATH, place)
        yield EpisodeRecord(
            index=index,
            length=_count(row.get("length")),
            tasks=_texts(row.get("tasks")),
            table=_or_elsewhere(table, root / "data"),
            videos={
                key: VideoPlace(
                    _or_elsewhere(
                        _place(root, info.get("video_path"), _V2_VIDEO_PATH, {**place, "video_key": folder}),
                        root / "videos",
                        folder,
                    )
                )
                for key, folder in metadata.cameras.items()
            },
        )


def _or_elsewhere(path: Path, top: Path, folder: str | None = None) -> Path:
    """`path`, or the only file of that name in another chunk below `top`; `path` again where there is none."""
    if path.exists():
        return path
    pattern = f"*/{folder}/{path.name}" if folder else f"*/{path.name}"
    found = list(top.glob(pattern))
    return found[0] if len(found) == 1 else path


def _v3_records(metadata: LeRobotMetadata, info: dict[str, Any]) -> Iterator[EpisodeRecord]:
    root = metadata.root
    rows = _read_episode_tables(root)
    frames_before = _frames_before(rows, metadata.cameras)
    first_rows = _first_rows(rows)
    for row in rows:
        index = row["episode_index"]
        place = {"chunk_index": row.get("data/chunk_index") or 0, "file_index": row.get("data/file_index") or 0}
        videos = {}
        for key, folder in metadata.cameras.items():
            if row.get(f"videos/{key}/file_index") is None:  # this episode was recorded without that camera
                continue
            video_place = {name: row.get(f"videos/{key}/{name}") or 0 for name in ("chunk_index", "file_index")}
            videos[key] = VideoPlace(
                path=_place(root, info.get("video_path"), _V3_VIDEO_PATH, {**video_place, "video_key": folder}),
                from_s=row.get(f"videos/{key}/from_timestamp"),
                to_s=row.get(f"videos/{key}/to_timestamp"),
                frames_before=frames_before.get((key, index)),
            )
        yield EpisodeRecord(
            index=index,
            length=row.get("length"),
            tasks=_texts(row.get("tasks")),
            table=_place(root, info.get("data_path"), _V3_DATA_PATH, place),
            videos=videos,
            first_row=first_rows[index],
            is_own_table=False,
        )


def _read_episode_tables(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    files = sorted((root / "meta" / "episodes").glob("**/*.parquet"))
    for path in files:
        try:
            parquet = open_table(path)
            columns = [name for name in parquet.schema_arrow.names if not name.startswith("stats/")]
            rows += [_clean(row) for row in read_columns(path, parquet, columns).to_pylist()]
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); restore the file.") from error
    rows = [row for row in rows if row.get("episode_index") is not None]
    if not rows:
        raise UserError(
            f"{root}/meta/episodes: has no rows with an episode_index ({len(files)} parquet files), and without them "
            "nobody knows which part of a video belongs to which episode; restore the folder."
        )
    return sorted(rows, key=lambda row: row["episode_index"])


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    """Indices and lengths as whole numbers, timestamps as finite numbers, None for what is neither."""
    kinds = {"index": _count, "length": _count, "timestamp": _seconds}
    return {
        name: next((convert(value) for ending, convert in kinds.items() if name.endswith(ending)), value)
        for name, value in row.items()
    }


def _count(value: Any) -> int | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
    return int(value) if is_number and value == int(value) else None


def _required_count(value: Any) -> int:
    count = _count(value)
    if count is None:
        raise ValueError(f"{value!r} is not a number of something")
    return count


def _seconds(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _frames_before(rows: list[dict[str, Any]], cameras: dict[str, str]) -> dict[tuple[str, int], int]:
    """(camera, episode) -> frames of earlier episodes in the same video file.

    Lengths are counted, not timestamps: in files that recorders and mergers write, the three clocks (frame_index / fps,
    presentation times, summed durations) drift apart, and only the count stays exact.
    """
    before: dict[tuple[str, int], int] = {}
    for key in cameras:
        ends: dict[tuple[Any, Any], int | None] = {}
        known = [row for row in rows if row.get(f"videos/{key}/file_index") is not None]
        for row in sorted(
            known, key=lambda row: (row.get(f"videos/{key}/from_timestamp") or 0.0, row["episode_index"])
        ):
            file = (row.get(f"videos/{key}/chunk_index"), row[f"videos/{key}/file_index"])
            start = ends.get(file, 0)
            if start is not None:
                before[key, row["episode_index"]] = start
            length = row.get("length")
            ends[file] = None if start is None or length is None else start + length
    return before


def _first_rows(rows: list[dict[str, Any]]) -> dict[int, int | None]:
    """Episode -> its first row in its table, for tables without an episode_index column."""
    bases: dict[tuple[Any, Any], int] = {}
    first: dict[int, int | None] = {}
    for row in rows:
        start = row.get("dataset_from_index")
        base = bases.setdefault((row.get("data/chunk_index"), row.get("data/file_index")), start or 0)
        first[row["episode_index"]] = None if start is None else start - base
    return first


def _place(root: Path, template: Any, default: str, values: dict[str, Any]) -> Path:
    template = template if isinstance(template, str) else default
    try:
        if not _TEMPLATE.fullmatch(template):  # a width may be any number, and an attribute be asked for
            raise ValueError("write {name} or {name:03d}")
        relative = template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"{root}/meta/info.json: the path template {show(template)} cannot be filled in ({error!r})."
        ) from error
    path = os.path.normpath(root / relative)
    if not Path(path).is_relative_to(os.path.normpath(root)):
        raise UserError(f"{root}/meta/info.json: the path template {show(template)} leads out of the dataset's folder.")
    return Path(path)


def _texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(" ".join(text.split()) for text in values if isinstance(text, str) and text.strip())


def _check_totals(metadata: LeRobotMetadata, info: dict[str, Any]) -> None:
    num_episodes, notes = len(metadata.episodes), metadata.repairs
    if isinstance(info.get("total_episodes"), int) and info["total_episodes"] != num_episodes:
        notes.append(
            f"info.json counts {info['total_episodes']} episodes, the metadata lists {num_episodes}: these are read."
        )
    for split, span in (info.get("splits") or {}).items() if isinstance(info.get("splits"), dict) else ():
        end = str(span).rpartition(":")[2]
        if end.isdigit() and int(end) > num_episodes:
            notes.append(f"The split {split} is {span}, but there are {num_episodes} episodes: it is cut off there.")
    indices = sorted(metadata.episodes)
    if indices != list(range(num_episodes)):
        notes.append(
            f"Episode numbers have gaps ({num_episodes} between {indices[0]} and {indices[-1]}): they are kept."
        )
    statistics = {"v2.0": "meta/stats.json", "v2.1": "meta/episodes_stats.jsonl", "v3.0": "meta/stats.json"}
    expected = statistics.get(metadata.version)
    if expected and not (metadata.root / expected).is_file():
        notes.append(f"{expected} is missing: statistics are computed from the data.")
