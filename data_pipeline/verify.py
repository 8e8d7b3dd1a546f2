"""Check every promise that a dataset makes; list what is broken, one line each, and exit with 1 if anything is."""

import hashlib
import io
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command

from .dataset import OPENED, REJECTED, REJECTED_SCHEMA, REPORT, SHARDS, SPLITS, bucket_name, read_info, read_table
from .dataset_index import DatasetIndex
from .one_thread import one_thread
from .pack import DatasetStatistics
from .progress import track
from .sample import KEY, Sample, SampleMeta, validate
from .shards import BLOCK, END_OF_TAR, Bytes, ShardError, index_path, parse_index, read_records
from .storage import Address, StorageConfig, open_files
from .video_io import VideoError, decode_clip

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class VerifyConfig(StrictConfig):
    dataset: Address = Field(description="The dataset folder, or its URL.")
    storage: StorageConfig = StorageConfig()
    decode: bool = Field(True, description="Also decode every clip.")


def main(config: VerifyConfig) -> int:
    with one_thread():
        problems = verify(config.dataset, config.storage, decode=config.decode)
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    if problems:
        logger.error("%s: %d problems", config.dataset, len(problems))
        return 1
    logger.info("%s: every promise holds", config.dataset)
    return 0


def verify(dataset: Address, storage: StorageConfig | None = None, *, decode: bool = True) -> list[str]:
    """Every broken promise, one line each. UserError where this is no dataset at all."""
    read_info(open_files(dataset, storage or StorageConfig()).fetch(OPENED), dataset)
    try:
        index = DatasetIndex(dataset, storage, check_rows=False)
    except UserError as error:
        return [str(error)]
    problems = [*_manifest_problems(index), *_count_problems(index), *_encoder_problems(index)]
    statistics = DatasetStatistics(index.info)
    shards = _rows_by_shard(index)
    problems += _file_problems(index, set(shards))
    checked = ((len(rows), _Shard(index, shard, rows, statistics, decode).problems()) for shard, rows in shards.items())
    shard_problems = [
        problem
        for _, found in track(checked, len(shards), "verify", lambda one: one[0], unit="shards")
        for problem in found
    ]
    if not shard_problems:  # statistics of what can be read say nothing about the whole
        problems += _statistics_problems(index, statistics)
    return problems + shard_problems


def _rows_by_shard(index: DatasetIndex) -> dict[str, list[Row]]:
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in index.manifest.to_pylist():
        by_shard[row["shard"]].append(row)
    return dict(sorted(by_shard.items()))


# --- the tables ---------------------------------------------------------------------------------------------------


def _manifest_problems(index: DatasetIndex) -> Iterator[str]:
    rows = index.manifest.to_pylist()
    bucket = bucket_name(next(iter(index.views.values())), index.num_frames)
    for key, number in Counter(row["key"] for row in rows).items():
        if number > 1:
            yield f"manifest.parquet: {key}: a key must be unique, but {number} rows have it"
    for row in rows:
        key = row["key"]
        if not KEY.fullmatch(key):
            yield f"manifest.parquet: {key}: a key has letters, digits, _ and - only"
        if row["split"] not in SPLITS or row["bucket"] != bucket:
            yield f"manifest.parquet: {key}: expected bucket {bucket}, found {row['bucket']} in {row['split']}"
        if row["shard"].rpartition("/")[0] != f"{SHARDS}/{row['split']}/{row['bucket']}":
            yield f"manifest.parquet: {key}: shard {row['shard']} is not in the folder of its split and bucket"
        if row["has_actions"] != (row["embodiment"] in index.embodiments):
            yield f"manifest.parquet: {key}: has_actions={row['has_actions']} with embodiment {row['embodiment']}"
    for what in ("episode", "content_sha256"):
        splits: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for row in rows:
            splits[(row["source"], row["episode"]) if what == "episode" else (row[what],)].add(row["split"])
        for name in sorted(name for name, found in splits.items() if len(found) > 1):
            yield f"manifest.parquet: {what} {' '.join(name)} is in both train and validation"


def _count_problems(index: DatasetIndex) -> Iterator[str]:
    counts = index.info.counts
    try:
        folder = index.files.fetch([REJECTED])
        rejected = len(read_table(folder / REJECTED, REJECTED_SCHEMA, f"{index.address}/{REJECTED}"))
    except UserError as error:
        yield str(error)
        return
    if (counts.accepted, counts.rejected) != (len(index), rejected):
        yield (
            f"dataset.yaml: counts say {counts.accepted} accepted and {counts.rejected} rejected, but manifest.parquet "
            f"has {len(index)} rows and rejected.parquet {rejected}"
        )
    if counts.found != counts.accepted + counts.rejected:
        yield f"dataset.yaml: found {counts.found} is not {counts.accepted} accepted + {counts.rejected} rejected"


def _encoder_problems(index: DatasetIndex) -> Iterator[str]:
    for load in (index.codec, index.text_encoder):
        try:
            load()
        except (UserError, KeyError, OSError, ValueError) as error:
            yield str(error)


def _file_problems(index: DatasetIndex, shards: set[str]) -> Iterator[str]:
    if not _is_there(index, REPORT):
        yield f"{REPORT}: is missing; write it with `python -m data_pipeline.preview {index.address}`"
    # Remote storage is not asked what else there is: not every server can tell.
    for path in sorted((index.path / SHARDS).rglob("*")):
        name = str(path.relative_to(index.path))
        if path.is_file() and name.removesuffix(".idx") not in shards:
            yield f"{name}: no sample of the manifest is in it"


def _is_there(index: DatasetIndex, name: str) -> bool:
    try:
        index.files.size(name)
    except ShardError as error:
        if error.reason != "missing_shard":
            raise
        return False
    return True


def _statistics_problems(index: DatasetIndex, statistics: DatasetStatistics) -> Iterator[str]:
    try:
        found = _numbers(statistics.result())
    except UserError as error:
        yield str(error)
        return
    stored = _numbers(index.norm_stats)
    for name in sorted(found.keys() ^ stored.keys()):
        yield f"norm_stats.json: {name}: is {'missing' if name in found else 'not of this dataset'}"
    for name in sorted(found.keys() & stored.keys()):
        one, other = np.array(stored[name]), np.array(found[name])
        if one.shape != other.shape or not np.allclose(one, other, rtol=1e-4, atol=1e-6):
            yield f"norm_stats.json: {name}: the training clips give other numbers"


def _numbers(record: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts flattened to `a.b.c`."""
    if not isinstance(record, dict):
        return {} if record is None else {name: record}
    return {k: v for key, value in record.items() for k, v in _numbers(value, f"{name}.{key}".strip(".")).items()}


# --- a shard ------------------------------------------------------------------------------------------------------


class _Shard:
    def __init__(
        self, index: DatasetIndex, shard: str, rows: list[Row], statistics: DatasetStatistics, decode: bool
    ) -> None:
        self.index, self.shard, self.decode, self.statistics = index, shard, decode, statistics
        self.rows = sorted(rows, key=lambda row: row["offset"])

    def problems(self) -> list[str]:
        try:
            size = self.index.files.size(self.shard)
            found = [*self._layout_problems(size), *self._sample_problems(size)]
        except ShardError as error:
            if error.reason == "missing_shard":
                return [f"{self.shard}: is missing, and with it {len(self.rows)} samples"]
            return [f"{self.shard}: {error}"]
        return [f"{self.shard}: {problem}" for problem in found]

    def _layout_problems(self, size: int) -> Iterator[str]:
        ends = [row["offset"] + row["bytes"] for row in self.rows]
        starts = [row["offset"] for row in self.rows]
        if starts != [0, *ends[:-1]]:
            yield "the manifest's samples do not lie end to end"
        expected, found = ends[-1] + len(END_OF_TAR), size
        if found < expected:
            lost = sum(end > found for end in ends)
            first = next((row["key"] for row, end in zip(self.rows, ends, strict=True) if end > found), "none")
            yield (
                f"is cut short at byte {found} of {expected}: {lost} of {len(self.rows)} samples are lost, "
                f"from {first} on"
            )
        elif found > expected:
            yield f"has {found} bytes, expected {expected}"
        yield from self._index_problems([*starts, ends[-1]])

    def _index_problems(self, expected: list[int]) -> Iterator[str]:
        index = index_path(Path(self.shard))
        if not _is_there(self.index, str(index)):
            yield f"its index {index.name} is missing"
            return
        data = self.index.files.read(str(index), 0, self.index.files.size(str(index)))
        if len(data) % 8 or parse_index(data).tolist() != expected:
            yield f"its index {index.name} differs from the manifest"

    def _sample_problems(self, size: int) -> Iterator[str]:
        read = self.index.files.read
        end = 0
        for row in self.rows:
            end = row["offset"] + row["bytes"]
            if end > size:
                return  # told already
            yield from self._records_problems(row, read(self.shard, row["offset"], row["bytes"]))
        mark = read(self.shard, end, min(len(END_OF_TAR), size - end))
        if mark != END_OF_TAR and len(mark) % BLOCK == 0:
            yield "does not end with the end mark of a tar"

    def _records_problems(self, row: Row, records: Bytes) -> list[str]:
        if hashlib.sha256(records).hexdigest() != row["sha256"]:
            return [f"{row['key']}: its bytes differ from its checksum"]
        try:
            members = read_records(records)
        except ShardError as error:
            return [f"{row['key']}: {error}"]
        problems = validate(members)
        if not problems:
            sample = Sample.from_members(members)
            problems = [f"{row['key']}: {problem}" for problem in self._content_problems(row, sample)]
            if row["split"] == "train" and not problems:
                self.statistics.add(sample)
        return problems

    def _content_problems(self, row: Row, sample: Sample) -> Iterator[str]:
        """What `validate` cannot know: whether the sample fits its dataset."""
        info, meta = self.index.info, sample.meta
        expected = {
            "key": (row["key"], sample.key),
            "source": (row["source"], meta.source.name),
            "content_sha256": (row["content_sha256"], meta.source.sha256),
            "episode": (row["episode"], meta.episode),
            "clip_index": (row["clip_index"], meta.clip_index),
            "embodiment": (row["embodiment"], meta.embodiment),
            "has_actions": (row["has_actions"], meta.has_actions),
            "num_frames": (info.num_frames, meta.num_frames),
            "fps": (info.fps, meta.fps),
            "control_hz": (info.control_hz if meta.has_actions else None, meta.control_hz),
            "views": (sorted(info.views), sorted(meta.views)),
        }
        if meta.embodiment is not None and meta.embodiment not in info.embodiments:
            yield f"embodiment: {meta.embodiment} is not described in dataset.yaml"
        if sample.text is not None:
            expected["text width"] = (info.text_encoder.width, sample.text.shape[1])
        if sample.actions is not None and meta.embodiment in info.embodiments:
            robot = info.embodiments[meta.embodiment]
            expected["action dim"] = (robot.action_dim, sample.actions.shape[1])
            proprio_dim = 0 if sample.proprio is None else sample.proprio.shape[1]
            expected["proprio dim"] = (robot.proprio_dim, proprio_dim)
        for what, (promised, found) in expected.items():
            if promised != found:
                yield f"{what}: expected {promised}, found {found}"
        for view in sorted(info.views.keys() & sample.latents.keys()):
            shape = tuple(sample.latents[view].shape)
            if shape != self.index.latent_shape_of(view):
                yield f"{view}.latents.safetensors: expected {self.index.latent_shape_of(view)}, found {shape}"
            if self.decode:
                yield from _video_problems(view, sample.video[view], meta)


def _video_problems(view: str, mp4: bytes, meta: SampleMeta) -> Iterator[str]:
    try:
        frames = decode_clip(mp4)
        codec, rate = _codec_and_rate(mp4)
    except (VideoError, av.FFmpegError) as error:
        yield f"{view}.mp4: does not decode ({error})"
        return
    expected = (meta.num_frames, meta.views[view].height, meta.views[view].width, 3)
    if frames.shape != expected:
        yield f"{view}.mp4: expected frames {expected}, found {frames.shape}"
    if codec != "h264" or abs(rate - meta.fps) > 1e-3 * meta.fps:
        yield f"{view}.mp4: expected h264 at {meta.fps:g} frames/s, found {codec} at {rate:g}"


def _codec_and_rate(mp4: bytes) -> tuple[str, float]:
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        return stream.codec_context.name, float(stream.average_rate or 0)


if __name__ == "__main__":
    run_command(main, VerifyConfig, description=__doc__, positional="dataset")
