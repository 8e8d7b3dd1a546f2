"""Tiny recordings for tests: videos whose frames carry their own number, and LeRobot datasets made of them."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HEIGHT, WIDTH = 48, 64
FPS = 10


def numbered_frames(numbers: Sequence[int], height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames with their number as ten black or white blocks: readable after any lossy codec. uint8 [f h w 3]."""
    frames = np.full((len(numbers), height, width, 3), 128, dtype=np.uint8)
    columns = np.linspace(0, width, 6).astype(int)
    for frame, number in zip(frames, numbers, strict=True):
        for bit in range(10):
            rows = slice(0, height // 2) if bit < 5 else slice(height // 2, height)
            frame[rows, columns[bit % 5] : columns[bit % 5 + 1]] = 255 * (number >> bit & 1)
    return frames


def read_numbers(frames: np.ndarray) -> list[int]:
    height, width = frames.shape[1:3]
    columns = np.linspace(0, width, 6).astype(int)
    middles = (columns[:-1] + columns[1:]) // 2
    points = [(height // 4, x) for x in middles] + [(3 * height // 4, x) for x in middles]
    bits = [frames[:, y, x].mean(axis=-1) > 127 for y, x in points]
    return [int(sum(int(bit[i]) << k for k, bit in enumerate(bits))) for i in range(len(frames))]


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    b_frames: int = 0,
    gop: int = 6,
    pixel_aspect: Fraction | None = None,
    time_base: Fraction = Fraction(1, 1000),
    options: dict[str, str] | None = None,
) -> Path:
    """A video with the given presentation times (default: FPS, from zero)."""
    times = [round(1000 * i / FPS) for i in range(len(frames))] if times_ms is None else times_ms
    path.parent.mkdir(parents=True, exist_ok=True)
    with ordinary_scheduling(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 3  # else encoders count the machine's cores, and write other bytes on each
        if b_frames:
            stream.codec_context.max_b_frames = b_frames
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.options = options or {}
        for rgb, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@contextlib.contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Afterwards this thread is scheduled as before.

    SVT-AV1 makes the thread that opens it a real-time one (SCHED_FIFO 99) where it may, as root may, and every process
    that it starts from then on is one, too. Ranks that wait by spinning then keep each other, and all else, from ever
    running.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def rotate_in_header(path: Path, matrix: Sequence[int]) -> None:
    """Put a display matrix (a, b, c, d) into an MP4's track header, as phones do."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    data[start : start + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    path.write_bytes(bytes(data))


# --- LeRobot ---------------------------------------------------------------------------------------------------------


def actions_of(index: int, length: int) -> np.ndarray:
    """Actions that say where they belong: [episode, frame, 0.5]."""
    return np.stack([np.full(length, index), np.arange(length), np.full(length, 0.5)], axis=1).astype(np.float32)


def lerobot_info(version: str, lengths: Sequence[int], cameras: Sequence[str], **changes: Any) -> dict[str, Any]:
    features: dict[str, Any] = {
        "action": {"dtype": "float32", "shape": [3], "names": ["x", "y", "gripper"]},
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"axes": ["x", "y"]}},
        **{key: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "info": {"video.codec": "h264"}} for key in cameras},
    }
    info = {
        "codebase_version": version,
        "robot_type": "two joint arm",
        "total_episodes": len(lengths),
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(lengths)}"},
        "features": features,
    }
    return info | changes


def lerobot_columns(index: int, length: int, first_row: int) -> dict[str, Any]:
    actions = actions_of(index, length)
    return {
        "action": list(actions),
        "observation.state": list(actions[:, :2] + 100),
        "timestamp": np.arange(length, dtype=np.float32) / FPS,
        "frame_index": np.arange(length),
        "episode_index": np.full(length, index),
        "index": first_row + np.arange(length),
        "task_index": np.zeros(length, dtype=np.int64),
    }


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = data if isinstance(data, list) else [data]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_table(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(list(values)) for name, values in columns.items()}), path)


def write_lerobot_v21(
    root: Path, lengths: Sequence[int] = (12, 9), cameras: Sequence[str] = ("observation.images.front",), **info: Any
) -> Path:
    """Frame i of episode e shows the number 100 e + i."""
    write_json(root / "meta" / "info.json", lerobot_info("v2.1", lengths, cameras, **info))
    write_json(root / "meta" / "tasks.jsonl", {"task_index": 0, "task": "push the block"})
    rows = [{"episode_index": i, "tasks": ["push the block"], "length": n} for i, n in enumerate(lengths)]
    write_json(root / "meta" / "episodes.jsonl", rows)
    write_json(root / "meta" / "episodes_stats.jsonl", [{"episode_index": i} for i in range(len(lengths))])
    for index, length in enumerate(lengths):
        columns = lerobot_columns(index, length, sum(lengths[:index]))
        write_table(root / f"data/chunk-000/episode_{index:06d}.parquet", columns)
        for key in cameras:
            frames = numbered_frames([100 * index + i for i in range(length)])
            write_video(root / f"videos/chunk-000/{key}/episode_{index:06d}.mp4", frames)
    return root


def write_lerobot_v3(
    root: Path,
    lengths: Sequence[int] = (12, 9, 7),
    cameras: Sequence[str] = ("observation.images.front",),
    from_shift_s: float = 0.0,
    **info: Any,
) -> Path:
    """All episodes in one table and one video file per camera; the texts in a pandas index, as lerobot writes them."""
    write_json(root / "meta" / "info.json", lerobot_info("v3.0", lengths, cameras, **info))
    write_json(root / "meta" / "stats.json", {})
    write_table(root / "meta/tasks.parquet", {"task_index": [0], "__index_level_0__": ["push the block"]})
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    episodes: dict[str, Any] = {
        "episode_index": range(len(lengths)),
        "tasks": [["push the block"]] * len(lengths),
        "length": lengths,
        "data/chunk_index": [0] * len(lengths),
        "data/file_index": [0] * len(lengths),
        "dataset_from_index": starts,
        "dataset_to_index": [start + length for start, length in zip(starts, lengths, strict=True)],
    }
    tables = [lerobot_columns(i, n, start) for i, (n, start) in enumerate(zip(lengths, starts, strict=True))]
    write_table(
        root / "data/chunk-000/file-000.parquet",
        {name: [value for table in tables for value in table[name]] for name in tables[0]},
    )
    numbers = [100 * i + frame for i, length in enumerate(lengths) for frame in range(length)]
    for key in cameras:
        write_video(root / f"videos/{key}/chunk-000/file-000.mp4", numbered_frames(numbers))
        episodes |= {
            f"videos/{key}/chunk_index": [0] * len(lengths),
            f"videos/{key}/file_index": [0] * len(lengths),
            f"videos/{key}/from_timestamp": [start / FPS + from_shift_s for start in starts],
            f"videos/{key}/to_timestamp": [(s + n) / FPS + from_shift_s for s, n in zip(starts, lengths, strict=True)],
        }
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", episodes)
    return root
