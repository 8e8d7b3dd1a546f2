"""LeRobot datasets v2.0, v2.1 and v3.0, without the lerobot package.

What is believed when sources disagree: the video file over info.json, frame counts over timestamps, the table over the
episode list. Each disagreement is a sentence in `Episode.repairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from configs.loader import UserError

from ..embodiments import Embodiment, embodiment_from_features
from ..video_io import VideoError, VideoInfo, frame_times, probe_video
from .base import Episode, SourceConfig, SourceError, VideoSegment, check_dims, content_sha256, key_safe, printable
from .lerobot_metadata import (
    EpisodeRecord,
    LeRobotMetadata,
    VideoPlace,
    claimed_size,
    is_video,
    read_metadata,
    video_properties,
)
from .parquet_tables import UNREADABLE, first_line, open_table, read_columns, row_groups_with
from .video_folder import video_repairs

ACTION_COLUMNS = ("action", "actions")
PROPRIO_COLUMNS = ("observation.state", "state", "observation.states", "observation.proprio", "proprio")
STANDARD_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_SUCCESS_COLUMNS = ("next.success", "success")


class LeRobotConfig(SourceConfig):
    """A LeRobot dataset, v2.0 to v3.0."""

    kind: Literal["lerobot"] = "lerobot"
    action_column: str | None = Field(default=None, description="column with the actions; null: found")
    proprio_column: str | None = Field(default=None, description="column with the proprio; null: found")


class LeRobotSource:
    """Reads one dataset; episodes are called `episode_000012`."""

    def __init__(self, config: LeRobotConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().name)

    @property
    def format_name(self) -> str:
        return f"LeRobot {self._metadata.version}"

    def list_episodes(self) -> list[str]:
        _ = self._columns  # a dataset without readable tables or videos is unusable as a whole
        return [_episode_id(index) for index in sorted(self._metadata.episodes)]

    def repairs(self) -> tuple[str, ...]:
        """What deviates in the dataset as a whole; every episode carries these too."""
        return (*self._metadata.repairs, *self._columns.repairs)

    def embodiment(self) -> Embodiment | None:
        if self._config.embodiment is not None:
            return self._config.embodiment
        columns, metadata = self._columns, self._metadata
        if columns.action is None:
            return None
        name = key_safe(metadata.robot_type) if metadata.robot_type not in (None, "", "unknown") else self.name
        proprio = self._feature(columns.proprio) if columns.proprio else None
        return embodiment_from_features(name, self._feature(columns.action), proprio, metadata.fps)

    def read_episode(self, episode_id: str) -> Episode:
        metadata, columns = self._metadata, self._columns
        index = int(episode_id.rpartition("_")[2]) if episode_id.startswith("episode_") else -1
        if index not in metadata.episodes:
            raise SourceError("unknown_episode", str(metadata.root), f"there is no episode {episode_id}")
        record, notes = metadata.episodes[index], list(self.repairs())
        rows = _read_rows(record, columns, notes)
        _check_clock(rows, metadata.fps, notes)
        actions = _matrix(rows, columns.action, record.table)
        proprio = _matrix(rows, columns.proprio, record.table)
        check_dims(self.embodiment(), actions, proprio, str(record.table))
        instruction = self._config.instruction or _longest_task(record, rows, metadata.tasks, notes)
        segments = self._segments(record, len(rows), notes)
        num_frames = min(len(rows), *(segment.num_frames or 0 for segment in segments.values()))
        if num_frames < len(rows):
            notes.append(f"The table has {len(rows)} rows for {num_frames} frames: the rows at the end are left out.")
        embodiment = self.embodiment()
        arrays = [array[:num_frames] for array in (actions, proprio) if array is not None]
        spans = repr([(name, segment.start_frame, num_frames) for name, segment in segments.items()])
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=f"{metadata.root}#{index}",
            views=segments,
            fps=metadata.fps,
            num_frames=num_frames,
            actions=None if actions is None else actions[:num_frames],
            proprio=None if proprio is None else proprio[:num_frames],
            control_hz=metadata.fps if actions is not None else None,
            embodiment=embodiment.name if embodiment is not None else None,
            instruction=instruction,
            success=_success(rows),
            licence=self._config.licence,
            content_sha256=content_sha256(
                [segment.path for segment in segments.values()],
                spans.encode(),
                (instruction or "").encode(),
                *(array.tobytes() for array in arrays),
            ),
            repairs=tuple(notes),
        )

    # --- the dataset as a whole ---

    @cached_property
    def _metadata(self) -> LeRobotMetadata:
        return read_metadata(self._config.path)

    @cached_property
    def _columns(self) -> _Columns:
        return _choose_columns(self._metadata, self._config)

    def _feature(self, column: str) -> dict[str, Any]:
        """Names from info.json, size from the table: the table is what will be read."""
        declared = self._metadata.features.get(column, {})
        return {**declared, "shape": [self._columns.dims[column]]}

    # --- videos of one episode ---

    def _segments(self, record: EpisodeRecord, num_rows: int, notes: list[str]) -> dict[str, VideoSegment]:
        if not record.videos:
            raise SourceError("missing_video", str(self._metadata.root), f"episode {record.index} has no camera")
        view_names = _view_names(list(self._metadata.cameras))
        segments = {}
        for key, place in record.videos.items():
            try:
                info = probe_video(place.path)
                self._compare_with_claims(key, info, notes)
                notes += video_repairs(f"The video of {view_names[key]}", info)
                start = _start_frame(
                    place, info, self._frames_by_file.get((key, place.path)), num_rows, self._metadata.fps, notes
                )
                num_frames = _usable_frames(place.path, info, start, num_rows, self._metadata.is_v3, notes)
                start_s = float(frame_times(place.path)[start])
            except VideoError as error:
                raise SourceError(error.reason, str(place.path), error.detail) from error
            segments[view_names[key]] = VideoSegment(str(place.path), start_s, num_frames, start)
        return segments

    def _compare_with_claims(self, key: str, info: VideoInfo, notes: list[str]) -> None:
        feature = self._metadata.features.get(key, {})
        codec, size = video_properties(feature).get("codec"), claimed_size(feature)
        if codec is not None and codec != info.codec:
            notes.append(f"info.json says that {key} is {codec}, the video is {info.codec}: the video is believed.")
        if size is not None and size != (info.width, info.height):
            notes.append(
                f"info.json says that {key} is {size[0]}x{size[1]}, the video is {info.width}x{info.height}: the video "
                "is believed."
            )
        if abs(info.fps - self._metadata.fps) > 0.01 * self._metadata.fps:
            notes.append(
                f"The video of {key} runs at {info.fps:g} fps, the table at {self._metadata.fps:g}: frames are matched "
                "by number, one per row."
            )

    @cached_property
    def _frames_by_file(self) -> dict[tuple[str, Path], int]:
        """Frames of each (camera, file) that the metadata's episodes account for (v3)."""
        totals: dict[tuple[str, Path], int] = {}
        for record in self._metadata.episodes.values():
            for key, place in record.videos.items():
                if place.frames_before is not None and record.length is not None:
                    end = place.frames_before + record.length
                    totals[key, place.path] = max(totals.get((key, place.path), 0), end)
        return totals


def _episode_id(index: int) -> str:
    return f"episode_{index:06d}"


def _view_names(keys: Sequence[str]) -> dict[str, str]:
    """`observation.images.cam_high` -> `cam_high`; whole keys where short names would collide."""
    short = {key: key_safe(key.rpartition(".")[2]) for key in keys}
    return short if len(set(short.values())) == len(keys) else {key: key_safe(key) for key in keys}


# --- columns ---------------------------------------------------------------------------------------------------------


class _Columns:
    """Which columns of the tables are read, and how many values each has (from the first table that opens)."""

    def __init__(self, action: str | None, proprio: str | None, dims: dict[str, int], extra: tuple[str, ...]) -> None:
        self.action = action
        self.proprio = proprio
        self.dims = dims
        self.extra = extra  # indices, texts and success flags
        self.repairs: list[str] = []


def _choose_columns(metadata: LeRobotMetadata, config: LeRobotConfig) -> _Columns:
    schema, first_row = _first_table(metadata)
    names = schema.names
    action = _pick(config.action_column, ACTION_COLUMNS, names, "action_column", metadata.root)
    proprio = _pick(config.proprio_column, PROPRIO_COLUMNS, names, "proprio_column", metadata.root)
    dims = {name: np.asarray(first_row[name], dtype=object).size for name in (action, proprio) if name is not None}
    wanted = {*STANDARD_COLUMNS, *_SUCCESS_COLUMNS}
    extra = tuple(
        name
        for name in names
        if name in wanted or (name.startswith("annotation.") and pa.types.is_integer(schema.field(name).type))
    )
    columns = _Columns(action, proprio, dims, extra)
    if action is None:
        columns.repairs.append(
            f"The tables have no column named {' or '.join(ACTION_COLUMNS)}: the episodes are read without actions."
        )
    elif action != ACTION_COLUMNS[0]:
        columns.repairs.append(f"Actions are in the column {action} instead of {ACTION_COLUMNS[0]}.")
    if proprio is not None and proprio != PROPRIO_COLUMNS[0]:
        columns.repairs.append(f"Proprio is in the column {proprio} instead of {PROPRIO_COLUMNS[0]}.")
    for name, size in dims.items():
        declared = metadata.features.get(name, {}).get("shape")
        if declared and int(np.prod(declared)) != size:
            columns.repairs.append(f"info.json says that {name} has shape {declared}, the tables have {size} values.")
    missing = [name for name in STANDARD_COLUMNS if name not in names]
    if missing:
        columns.repairs.append(f"The tables have no column {', '.join(missing)}: derived from the order of the rows.")
    images = [key for key, feature in metadata.features.items() if feature["dtype"] == "image"]
    if images and not metadata.cameras:
        raise UserError(
            f"{metadata.root}: its cameras ({', '.join(images)}) are stored as images inside the tables, which is not "
            "supported; re-encode the dataset with videos (lerobot's use_videos=True)."
        )
    if images:
        columns.repairs.append(f"Cameras stored as images inside the tables are skipped: {', '.join(images)}.")
    if not metadata.cameras:
        declared_cameras = [key for key, feature in metadata.features.items() if is_video(feature)]
        raise UserError(
            f"{metadata.root}: none of its cameras ({', '.join(declared_cameras) or 'none declared'}) has videos; "
            "download the videos/ folder of the dataset."
        )
    return columns


def _first_table(metadata: LeRobotMetadata) -> tuple[pa.Schema, dict[str, Any]]:
    for index in sorted(metadata.episodes):
        try:
            parquet = open_table(metadata.episodes[index].table)
            batch = next(parquet.iter_batches(batch_size=1, use_threads=False), None)
        except UNREADABLE:
            continue
        if batch is not None and batch.num_rows:
            return parquet.schema_arrow, batch.to_pylist()[0]
    raise UserError(
        f"{metadata.root}: none of its tables in data/ can be read; download the data/ folder of the dataset."
    )


def _pick(given: str | None, known: Sequence[str], names: list[str], setting: str, root: Path) -> str | None:
    if given is not None and given not in names:
        raise UserError(f"{root}: {setting} is {given}, but the tables have the columns {', '.join(names)}.")
    return given or next((name for name in known if name in names), None)


# --- rows of one episode ---------------------------------------------------------------------------------------------


class _Rows:
    """The wanted columns of one episode, in frame order."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    def values(self, name: str) -> np.ndarray:
        return np.asarray(self.table[name].to_numpy())


def _read_rows(record: EpisodeRecord, columns: _Columns, notes: list[str]) -> _Rows:
    path = record.table
    if not path.exists():
        raise SourceError("missing_table", str(path), f"there is no table for episode {record.index}")
    wanted = [name for name in (columns.action, columns.proprio, *columns.extra) if name is not None]
    try:
        parquet = open_table(path)
        present = [name for name in wanted if name in parquet.schema_arrow.names]
        if record.is_own_table:
            table = read_columns(path, parquet, present)
        elif "episode_index" in present:
            table = read_columns(path, parquet, present, row_groups_with(parquet, "episode_index", record.index))
            table = table.filter(pc.field("episode_index") == record.index)
        elif record.first_row is not None and record.length is not None:
            table = read_columns(path, parquet, present).slice(record.first_row, record.length)
        else:
            raise SourceError("missing_table", str(path), f"nothing says which of its rows are episode {record.index}")
    except SourceError:
        raise
    except UNREADABLE as error:
        raise SourceError("unreadable_table", str(path), first_line(error)) from error
    lost = [name for name in (columns.action, columns.proprio) if name is not None and name not in present]
    if lost:
        raise SourceError("missing_column", str(path), f"it has no column {', '.join(lost)}, other tables do")
    if table.num_rows == 0:
        raise SourceError("missing_rows", str(path), f"it holds no rows of episode {record.index}")
    unusable = [name for name in columns.extra if name in present and not _holds_numbers(table[name])]
    if unusable:
        notes.append(f"Columns that should hold numbers do not, and are ignored: {', '.join(unusable)}.")
    rows = _Rows(table.drop_columns(unusable))
    if record.length is not None and record.length != len(rows):
        notes.append(
            f"The metadata says {record.length} frames, the table has {len(rows)} rows: the table is believed."
        )
    return _in_frame_order(rows, path, notes)


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(is_number) and column.null_count == 0


def _in_frame_order(rows: _Rows, path: Path, notes: list[str]) -> _Rows:
    if "frame_index" in rows:
        frame_index = rows.values("frame_index")
        if np.any(np.diff(frame_index) < 0):
            notes.append("The rows are not in the order of frame_index: they are sorted.")
            order = np.argsort(frame_index, kind="stable")
            rows = _Rows(rows.table.take(pa.array(order)))
            frame_index = frame_index[order]
        if np.any(np.diff(frame_index) != 1):
            gaps = int(np.count_nonzero(np.diff(frame_index) != 1))
            raise SourceError(
                "missing_rows", str(path), f"frame_index jumps {gaps} times: rows and frames cannot be matched"
            )
    return rows


def _check_clock(rows: _Rows, fps: float, notes: list[str]) -> None:
    if "timestamp" not in rows:
        return
    times = rows.values("timestamp").astype(np.float64).reshape(-1)
    if abs(times[0]) > 0.5 / fps:
        notes.append(f"Timestamps begin at {times[0]:.3f} s instead of 0: they are counted from the first row.")
    drift = np.abs(times - times[0] - np.arange(len(times)) / fps)
    if drift.max() > 0.5 / fps:
        notes.append(
            f"Timestamps leave the {fps:g} Hz grid by up to {drift.max():.3f} s: rows and frames are matched by number."
        )


def _matrix(rows: _Rows, column: str | None, path: Path) -> np.ndarray | None:
    """A column of lists (of any nesting) as float32 [n, values]."""
    if column is None:
        return None
    data = rows.table[column].combine_chunks()
    if data.null_count:
        raise SourceError("missing_values", str(path), f"{data.null_count} rows of {column} are empty")
    try:
        values = np.stack([np.asarray(row, dtype=np.float32).reshape(-1) for row in _rows_of_lists(data)])
    except (TypeError, ValueError) as error:
        raise SourceError(
            "ragged_values", str(path), f"the rows of {column} are not number lists of one length"
        ) from error
    if not np.isfinite(values).all():
        row, dim = np.argwhere(~np.isfinite(values))[0]
        raise SourceError("non_finite_values", str(path), f"{column}[{dim}] is {values[row, dim]} in row {row}")
    return values


def _rows_of_lists(data: pa.Array) -> list[Any]:
    if isinstance(data, pa.ExtensionArray):  # Hugging Face's ArrayND columns keep nested lists below
        data = data.storage
    return data.to_pylist()


def _longest_task(record: EpisodeRecord, rows: _Rows, tasks: dict[int, str], notes: list[str]) -> str | None:
    """The instruction. Recordings mix real texts with labels such as "valid": the longest text is the real one."""
    texts = set(record.tasks)
    for name in rows.table.column_names:
        if name == "task_index" or name.startswith("annotation."):
            texts |= {tasks[index] for index in np.unique(rows.values(name)).tolist() if index in tasks}
    texts = {" ".join(printable(text).split()) for text in texts if text and text.strip()}
    if not texts:
        notes.append("There is no task text: the episode has no instruction.")
        return None
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    if len(ordered) > 1:
        others = ", ".join(f'"{text}"' for text in ordered[1:4])
        notes.append(f"There are {len(ordered)} task texts: the longest is the instruction, not {others}.")
    return ordered[0]


def _success(rows: _Rows) -> bool | None:
    for name in _SUCCESS_COLUMNS:
        if name in rows:
            return bool(np.any(rows.values(name)))
    return None


# --- frames of one episode -------------------------------------------------------------------------------------------


def _start_frame(
    place: VideoPlace, info: VideoInfo, frames_in_file: int | None, num_rows: int, fps: float, notes: list[str]
) -> int:
    """First frame of the episode in its file: by counting the episodes before it, checked against from_timestamp."""
    if place.from_s is None and place.frames_before is None:
        return 0
    if place.from_s is not None and place.to_s is not None:
        surplus = place.to_s - place.from_s - num_rows / fps
        if abs(surplus) > 0.5 / fps:
            notes.append(
                f"to_timestamp of {place.path.name} is off by {surplus:+.3f} s: the number of rows is believed."
            )
    times = frame_times(place.path)
    nearest = int(np.argmin(np.abs(times - place.from_s))) if place.from_s is not None else None
    counted = place.frames_before
    if counted is None or nearest is None:
        return counted if counted is not None else int(nearest or 0)
    if frames_in_file is not None and frames_in_file != info.num_frames:
        notes.append(
            f"{place.path.name} has {info.num_frames} frames, its episodes {frames_in_file}: the start is found by "
            "timestamp."
        )
        return nearest
    if abs(times[min(counted, len(times) - 1)] - place.from_s) > 0.5 / fps:  # type: ignore[operator]
        notes.append(
            f"from_timestamp {place.from_s:.3f} s is frame {nearest} of {place.path.name}, counting gives {counted}: "
            "the timestamp is believed."
        )
        return nearest
    return counted


def _usable_frames(path: Path, info: VideoInfo, start: int, num_rows: int, is_v3: bool, notes: list[str]) -> int:
    """How many rows have a frame. Recorders drop a frame or two at the end; more means that they are no pair."""
    available = info.num_frames - start
    tolerated = max(2, round(0.02 * num_rows))
    if available < num_rows - tolerated or (not is_v3 and available > num_rows + tolerated):
        raise SourceError(
            "frame_count_mismatch", str(path), f"it has {available} frames for {num_rows} rows: they cannot be matched"
        )
    if not is_v3 and available > num_rows:
        notes.append(f"The video has {available} frames for {num_rows} rows: the frames at the end are left out.")
    return min(available, num_rows)
