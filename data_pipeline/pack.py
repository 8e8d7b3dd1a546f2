"""Staged episodes -> the dataset folder: a pure function, so the same staged set gives the same bytes.

Samples are sorted by key within split and bucket. Keys are hashes, so this shuffles: every shard mixes all sources.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.loader import UserError, dump_config

from .align import relative_actions, spans_mask
from .dataset import (
    DATASET_YAML,
    MANIFEST,
    MANIFEST_SCHEMA,
    NORM_STATS,
    REJECTED,
    REJECTED_SCHEMA,
    SHARDS,
    SPLITS,
    Counts,
    DatasetInfo,
    Split,
    bucket_name,
)
from .embodiments import Embodiment
from .normalize import LatentStats, StreamingStats
from .sample import Sample, validate
from .shards import ShardWriter, tar_records
from .staging import EpisodeRecord, StagedClip, Staging


def assign_splits(records: Sequence[EpisodeRecord], validation_share: float) -> dict[str, Split]:
    """Split by what an episode was read from, so that no copy of it can leak into the other split.

    The hash decides; but every source keeps an episode to train on, and an action-labelled one another to validate on.
    """
    splits: dict[str, Split] = {}
    by_source: dict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        if record.clips:
            by_source[record.source].append(record)
            splits[_content(record)] = "validation" if _hash_share(record) < validation_share else "train"
    for source in sorted(by_source):
        episodes = sorted(by_source[source], key=_hash_share)
        chosen = {splits[_content(record)] for record in episodes}
        is_labelled = any(record.has_actions for record in episodes)
        if chosen == {"validation"}:
            splits[_content(episodes[-1])] = "train"
        elif chosen == {"train"} and validation_share > 0 and is_labelled and len(set(map(_content, episodes))) > 1:
            splits[_content(episodes[0])] = "validation"
    return splits


def _content(record: EpisodeRecord) -> str:
    assert record.content_sha256 is not None  # an episode with clips has been read
    return record.content_sha256


def _hash_share(record: EpisodeRecord) -> float:
    """In [0, 1). Hashed once more, because the digest itself may have been used to choose files."""
    return int(hashlib.sha256(f"split {_content(record)}".encode()).hexdigest()[:13], 16) / 16**13


def count(records: Sequence[EpisodeRecord]) -> Counts:
    counts = Counts(
        found=sum(record.found for record in records),
        accepted=sum(len(record.clips) for record in records),
        rejected=sum(len(record.rejected) for record in records),
        episodes=len(records),
    )
    if counts.found != counts.accepted + counts.rejected:
        raise RuntimeError(f"clips were lost: {counts}")  # a defect of ours, never of the input
    return counts


def pack(
    staging: Staging, records: Sequence[EpisodeRecord], splits: dict[str, Split], info: DatasetInfo, max_shard_mb: int
) -> Path:
    """Writes all but the report into the staging folder's `packed/`, and gives it."""
    folder = staging.packed
    folder.mkdir(parents=True)
    statistics = DatasetStatistics(info)
    manifest: list[dict[str, Any]] = []
    for split in SPLITS:
        bucket = bucket_name(next(iter(info.views.values())), info.num_frames)
        with ShardWriter(folder, f"{SHARDS}/{split}/{bucket}", max_shard_mb * 2**20) as writer:
            for placed in _sorted_clips(staging, records, splits, split):
                members = placed.read(staging)
                location = writer.add(_checked_records(members))
                manifest.append(placed.manifest_row(split, bucket) | location.manifest_columns())
                if split == "train":
                    statistics.add(Sample.from_members(members))
    if len({row["key"] for row in manifest}) < len(manifest):
        raise RuntimeError("two samples have the same key")
    _write_table(folder / MANIFEST, manifest, MANIFEST_SCHEMA)
    _write_table(folder / REJECTED, list(_rejected_rows(records)), REJECTED_SCHEMA)
    (folder / NORM_STATS).write_text(json.dumps(statistics.result(), indent=1) + "\n", encoding="utf-8")
    (folder / DATASET_YAML).write_text(dump_config(info), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class _PlacedClip:
    """An accepted clip and where its two halves lie in the staging folder."""

    record: EpisodeRecord
    clip: StagedClip
    encoded_offset: int
    encoded_bytes: int

    def read(self, staging: Staging) -> dict[str, Any]:
        source, episode = self.record.source, self.record.episode
        curated = staging.read_members(staging.curated_tar(source, episode), self.clip.offset, self.clip.num_bytes)
        encoded = staging.read_members(staging.encoded_tar(source, episode), self.encoded_offset, self.encoded_bytes)
        return curated | encoded

    def manifest_row(self, split: Split, bucket: str) -> dict[str, Any]:
        return {
            "key": self.clip.key,
            "split": split,
            "bucket": bucket,
            "source": self.record.source,
            "episode": self.record.episode,
            "embodiment": self.record.embodiment,
            "has_actions": self.record.has_actions,
            "clip_index": self.clip.clip_index,
            "start_s": self.clip.start_s,
            "motion": self.clip.motion,
            "content_sha256": self.record.content_sha256,
        }


def _sorted_clips(
    staging: Staging, records: Sequence[EpisodeRecord], splits: dict[str, Split], split: Split
) -> list[_PlacedClip]:
    placed: list[_PlacedClip] = []
    for record in records:
        if not record.clips or splits[_content(record)] != split:
            continue
        encoded = {
            key: (offset, size) for key, offset, size in staging.read_encoded(record.source, record.episode).clips
        }
        placed += [_PlacedClip(record, clip, *encoded[clip.key]) for clip in record.clips]
    return sorted(placed, key=lambda one: one.clip.key)


def _checked_records(members: dict[str, Any]) -> bytes:
    problems = validate(members)
    if problems:
        raise RuntimeError(f"a sample breaks the contract: {problems[0]}")  # a defect of ours, never of the input
    return tar_records(members)


def _rejected_rows(records: Sequence[EpisodeRecord]) -> Iterator[dict[str, Any]]:
    for record in records:
        for rejection in record.rejected:
            yield {"source": record.source, "episode": record.episode, **rejection.model_dump()}


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


class DatasetStatistics:
    """norm_stats.json, from training clips only."""

    def __init__(self, info: DatasetInfo) -> None:
        self.embodiments = info.embodiments
        self.control = {name: _control_stats(embodiment) for name, embodiment in info.embodiments.items()}
        self.latents = LatentStats(info.codec.latent_channels)

    def add(self, sample: Sample) -> None:
        for latents in sample.latents.values():
            self.latents.add(latents)
        if sample.actions is None:
            return
        assert sample.meta.embodiment is not None
        embodiment, stats = self.embodiments[sample.meta.embodiment], self.control[sample.meta.embodiment]
        is_valid = spans_mask(sample.meta.action_spans, len(sample.actions))
        start = sample.proprio[0] if sample.proprio is not None else None
        relative = relative_actions(sample.actions, start, embodiment)
        stats["actions_absolute"].add(sample.actions[is_valid])
        stats["actions_relative"].add(relative[is_valid])
        if sample.proprio is not None:
            stats["proprio"].add(sample.proprio)

    def result(self) -> dict[str, Any]:
        embodiments = {
            name: {what: one.result() if one.dim and one.count else None for what, one in stats.items()}
            for name, stats in self.control.items()
        }
        for name, stats in embodiments.items():
            if stats["actions_absolute"] is None:
                raise UserError(
                    f"embodiment {name} has no training clip to take norm stats from; lower validation_share."
                )
        return {"embodiments": embodiments, "latents": self.latents.result()}


def _control_stats(embodiment: Embodiment) -> dict[str, StreamingStats]:
    return {
        "actions_absolute": StreamingStats(embodiment.action_dim),
        "actions_relative": StreamingStats(embodiment.action_dim),
        "proprio": StreamingStats(embodiment.proprio_dim),
    }
