"""Write a LeRobot v3.0 dataset: many episodes per file, video apart from the table, statistics beside both.

Layout:  meta/info.json · meta/stats.json · meta/tasks.parquet · meta/episodes/chunk-000/file-000.parquet ·
         data/chunk-000/file-000.parquet (a row per frame) · videos/<view key>/chunk-000/file-000.mp4
Video file n and data file n hold the same episodes, back to back, in order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.video_io import encode_video

FILES_PER_CHUNK = 1000
Columns = dict[str, np.ndarray]  # of one episode: a row per frame
Features = dict[str, "VectorFeature | VideoFeature"]

EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


@dataclass(frozen=True)
class VectorFeature:
    """A column of float32 vectors, one per frame."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class VideoFeature:
    height: int
    width: int


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode but for its pixels, which `write_video_file` has put into file `file_index`."""

    instruction: str
    vectors: dict[str, np.ndarray]  # feature -> float32 [f a]
    next_success: np.ndarray  # bool [f]: is the task solved after this row's action?
    file_index: int
    first_frame: int  # of this episode in that file
    pixel_counts: dict[str, np.ndarray]  # view key -> int64 [3 256], a histogram of each colour channel

    @property
    def num_frames(self) -> int:
        return len(self.next_success)


def write_video_file(folder: Path, view_key: str, file_index: int, episodes: Sequence[np.ndarray], fps: int) -> None:
    """One H.264 file from several episodes, each uint8 [f h w 3]."""
    path = folder / VIDEO_PATH.format(video_key=view_key, **file_position(file_index))
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_video(np.concatenate(episodes), path, fps, crf=18, gop=8)


def count_pixels(frames: np.ndarray) -> np.ndarray:
    """How often each value of each channel occurs: exact statistics of any number of frames, in 3 x 256 numbers."""
    return np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])


def write_tables(
    folder: Path,
    episodes: Sequence[EpisodeRecord],
    features: Features,
    fps: int,
    robot_type: str,
) -> None:
    """Everything but the videos. Episode i of the dataset is `episodes[i]`; file indices must not decrease."""
    instructions = list(dict.fromkeys(episode.instruction for episode in episodes))
    starts = np.concatenate([[0], np.cumsum([episode.num_frames for episode in episodes])])
    columns = [
        _episode_columns(episode, index, int(starts[index]), instructions.index(episode.instruction), fps)
        for index, episode in enumerate(episodes)
    ]
    _write_data_files(folder, episodes, columns, features)
    _write_episodes(folder, episodes, columns, starts, fps)
    _write_tasks(folder, instructions)
    _write_json(folder / "meta/stats.json", _stats(episodes, columns))
    _write_json(folder / "meta/info.json", _info(episodes, features, fps, robot_type, len(instructions)))


def file_position(file_index: int) -> dict[str, int]:
    return {"chunk_index": file_index // FILES_PER_CHUNK, "file_index": file_index % FILES_PER_CHUNK}


def _episode_columns(episode: EpisodeRecord, index: int, start: int, task_index: int, fps: int) -> Columns:
    frame_index = np.arange(episode.num_frames, dtype=np.int64)
    return {
        **episode.vectors,
        "next.success": episode.next_success,
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.full_like(frame_index, index),
        "index": start + frame_index,
        "task_index": np.full_like(frame_index, task_index),
    }


def _write_data_files(
    folder: Path, episodes: Sequence[EpisodeRecord], columns: Sequence[Columns], features: Features
) -> None:
    schema = pa.schema(
        [
            (name, pa.list_(pa.float32(), len(feature.names)))
            for name, feature in features.items()
            if isinstance(feature, VectorFeature)
        ]
        + [("next.success", pa.bool_()), ("timestamp", pa.float32())]
        + [(name, pa.int64()) for name in ("frame_index", "episode_index", "index", "task_index")]
    )
    for file_index in sorted({episode.file_index for episode in episodes}):
        path = folder / DATA_PATH.format(**file_position(file_index))
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema) as writer:
            for episode, values in zip(episodes, columns, strict=True):
                if episode.file_index == file_index:  # a row group per episode, as the reference writer does
                    writer.write_table(pa.table({k: _arrow(v) for k, v in values.items()}, schema=schema))


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def _write_episodes(
    folder: Path, episodes: Sequence[EpisodeRecord], columns: Sequence[Columns], starts: np.ndarray, fps: int
) -> None:
    rows = []
    for index, (episode, values) in enumerate(zip(episodes, columns, strict=True)):
        position = file_position(episode.file_index)
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [episode.instruction],
            "length": episode.num_frames,
            "data/chunk_index": position["chunk_index"],
            "data/file_index": position["file_index"],
            "dataset_from_index": int(starts[index]),
            "dataset_to_index": int(starts[index + 1]),
        }
        for key in episode.pixel_counts:
            row[f"videos/{key}/chunk_index"] = position["chunk_index"]
            row[f"videos/{key}/file_index"] = position["file_index"]
            row[f"videos/{key}/from_timestamp"] = episode.first_frame / fps
            row[f"videos/{key}/to_timestamp"] = (episode.first_frame + episode.num_frames) / fps
        for feature, stats in _stats([episode], [values]).items():
            row |= {f"stats/{feature}/{name}": value for name, value in stats.items()}
        rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    (folder / EPISODES_PATH).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / EPISODES_PATH)


def _write_tasks(folder: Path, instructions: list[str]) -> None:
    # The instruction is the table's pandas *index*; this metadata is how pandas knows, without our needing pandas.
    text = {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object"}
    number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [],
        "columns": [number | {"metadata": None}, text | {"metadata": None}],
        "creator": {"library": "pyarrow", "version": pa.__version__},
    }
    table = pa.table({"task_index": np.arange(len(instructions)), "__index_level_0__": instructions})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), folder / "meta/tasks.parquet")


def _stats(episodes: Sequence[EpisodeRecord], columns: Sequence[Columns]) -> dict[str, dict[str, list]]:
    """Statistics of every feature over these episodes; those of images are [3 1 1], with pixels in 0..1."""
    stats = {name: _vector_stats(np.concatenate([values[name] for values in columns])) for name in columns[0]}
    num_frames = sum(episode.num_frames for episode in episodes)
    for key in episodes[0].pixel_counts:
        counts = np.sum([episode.pixel_counts[key] for episode in episodes], axis=0)
        stats[key] = _image_stats(counts) | {"count": [num_frames]}
    return stats


def _vector_stats(values: np.ndarray) -> dict[str, list]:
    values = values.reshape(len(values), -1).astype(np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    stats |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
    return {name: value.tolist() for name, value in stats.items()} | {"count": [len(values)]}


def _image_stats(counts: np.ndarray) -> dict[str, list]:
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    cumulative = share.cumsum(axis=1)
    mean = share @ levels
    stats = {
        "min": levels[(counts > 0).argmax(axis=1)],
        "max": levels[255 - (counts > 0)[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    stats |= {name: levels[(cumulative >= q - 1e-12).argmax(axis=1)] for name, q in QUANTILES.items()}
    return {name: value[:, None, None].tolist() for name, value in stats.items()}


def _info(
    episodes: Sequence[EpisodeRecord], features: Features, fps: int, robot_type: str, num_tasks: int
) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, VectorFeature):
            described[name] = {"dtype": "float32", "shape": [len(feature.names)], "names": list(feature.names)}
        else:
            info: dict[str, Any] = {"video.height": feature.height, "video.width": feature.width, "video.channels": 3}
            info |= {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.fps": fps}
            info |= {"video.is_depth_map": False, "has_audio": False}
            shape = [feature.height, feature.width, 3]
            described[name] = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"], "info": info}
    described["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    described["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        described[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": len(episodes),
        "total_frames": sum(episode.num_frames for episode in episodes),
        "total_tasks": num_tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": described,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
