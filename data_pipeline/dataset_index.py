"""A dataset opened for reading: what it holds, and any sample of it by its place in the manifest."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.loader import UserError
from configs.problems import show

from .dataset import (
    DATASET_YAML,
    MANIFEST,
    MANIFEST_SCHEMA,
    OPENED,
    SHARDS,
    SPLITS,
    DatasetFolder,
    Split,
    bucket_name,
    read_table,
)
from .shards import Bytes, ShardError, read_records
from .storage import Address, StorageConfig, open_files


class BadSampleError(UserError):
    """A sample that cannot be used; `reason` is one of `SHARD_PROBLEMS`."""

    def __init__(self, dataset: Address, shard: str, key: str, error: ShardError) -> None:
        super().__init__(
            f"{dataset}/{shard}: sample {key}: the shard {error}; list everything that is damaged with "
            f"`python -m data_pipeline.verify {dataset}`, then restore the shard or build the dataset again."
        )
        self.reason = error.reason


SHARD_NAME = re.compile(rf"{SHARDS}/[^\0\\]+")

_COLUMNS = ("key", "shard", "offset", "bytes", "split", "bucket", "source", "embodiment", "has_actions")
"""Of the manifest, what finding and reading samples takes; the rest is read when it is asked for."""


class DatasetIndex(DatasetFolder):
    """A dataset opened for reading: what it holds, and any sample of it by position in the manifest."""

    def __init__(self, address: Address, storage: StorageConfig | None = None, *, check_rows: bool = True) -> None:
        """`check_rows`: refuse rows that contradict each other or dataset.yaml; `verify` lists them instead."""
        self.files = open_files(address, storage or StorageConfig())
        super().__init__(self.files.fetch(OPENED), address)
        self._table = self._read_manifest(_COLUMNS)
        self._keys = self._table["key"]
        self._check_places()
        # Plain arrays: a million Python rows would take a gigabyte, and a lookup in Arrow a microsecond too many.
        shards = self._table["shard"].combine_chunks()
        self._shard_of = shards.indices.to_numpy()
        self._shards: list[str] = shards.dictionary.to_pylist()
        self._offsets = self._table["offset"].to_numpy()
        self._num_bytes = self._table["bytes"].to_numpy()
        if check_rows:
            self._check_rows()

    def _check_places(self) -> None:
        """Before a file is opened by a name, or read at a place, that somebody else has written."""
        table = self._table
        for name in _COLUMNS:
            if name != "embodiment" and table[name].null_count:
                raise self._not_as_written(f"{table[name].null_count} of its rows have no {name}")
        for shard in pc.unique(table["shard"].combine_chunks()).to_pylist():
            if not SHARD_NAME.fullmatch(shard or "") or ".." in shard.split("/"):
                raise self._not_as_written(f"the shard {show(shard)} is not below {SHARDS}/")
        offsets, sizes = table["offset"].to_numpy(), table["bytes"].to_numpy()
        impossible = np.flatnonzero((offsets < 0) | (sizes <= 0) | (offsets > np.iinfo(np.int64).max - sizes))
        if len(impossible):
            i = int(impossible[0])
            raise self._not_as_written(f"sample {self.key(i)} cannot be {sizes[i]} bytes at {offsets[i]}")

    def _check_rows(self) -> None:
        """What training would take on without a word. By whole columns, which a million rows take no time in."""
        info = self.info
        if not math.isclose(info.control_hz, info.fps * info.actions_per_frame):
            raise UserError(
                f"{self.address}/{DATASET_YAML}: control_hz={info.control_hz:g} is not fps={info.fps:g} times "
                f"actions_per_frame={info.actions_per_frame}; restore the file or build the dataset again."
            )
        bucket = bucket_name(next(iter(self.views.values())), self.num_frames)
        self._check_names("split", SPLITS)
        self._check_names("bucket", (bucket,))
        self._check_folders(bucket)
        self._check_robots()
        self._check_keys()

    def _check_names(self, column: str, known: Sequence[str]) -> None:
        names, numbers = self.column(column)
        for number, rows in enumerate(np.bincount(numbers)):
            if rows and names[number] not in known:
                raise self._not_as_written(
                    f"{rows} of its rows have the {column} {show(names[number])}, but "
                    f"there can be {' and '.join(known)}"
                )

    def _check_keys(self) -> None:
        keys = self._table["key"]
        in_order = keys.take(pc.sort_indices(keys))  # they nearly are, as `build` writes them
        is_twice = pc.equal(in_order.slice(1), in_order.slice(0, max(len(keys) - 1, 0)))
        if pc.any(is_twice).as_py():
            key = in_order[pc.index(is_twice, True).as_py()]
            rows = pc.sum(pc.equal(keys, key)).as_py()
            raise self._not_as_written(f"{rows} of its rows have the key {str(key)!r}")

    def _check_folders(self, bucket: str) -> None:
        splits, split_of = self.column("split")
        numbers = {f"{SHARDS}/{split}/{bucket}": number for number, split in enumerate(splits)}
        folder_of = np.array([numbers.get((shard or "").rpartition("/")[0], -1) for shard in self._shards])
        for i in np.flatnonzero(folder_of[self._shard_of] != split_of)[:1]:
            where = self._shards[self._shard_of[i]]
            raise self._not_as_written(f"sample {self.key(i)} of split {splits[split_of[i]]} lies in {where}")

    def _check_robots(self) -> None:
        robots, robot_of = self.column("embodiment")
        is_known, has_actions = np.array([robot in self.embodiments for robot in robots]), self._table["has_actions"]
        for i in np.flatnonzero(is_known[robot_of] != has_actions.to_numpy())[:1]:
            raise self._not_as_written(
                f"sample {self.key(i)} has has_actions={has_actions[int(i)]} and the embodiment "
                f"{show(robots[robot_of[i]])}, but {DATASET_YAML} describes {', '.join(self.embodiments) or 'none'}"
            )

    def _not_as_written(self, problem: str) -> UserError:
        return UserError(f"{self.address}/{MANIFEST}: {problem}; restore the file or build the dataset again.")

    @cached_property
    def manifest(self) -> pa.Table:
        """All of it, `MANIFEST_SCHEMA`."""
        return self._read_manifest(MANIFEST_SCHEMA.names)

    @cached_property
    def _sha256(self) -> pa.ChunkedArray:
        return self._read_manifest(["sha256"])["sha256"]

    def _read_manifest(self, columns: Sequence[str]) -> pa.Table:
        schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in columns])
        table = read_table(self.path / MANIFEST, schema, f"{self.address}/{MANIFEST}")
        return table.unify_dictionaries().combine_chunks()

    def __len__(self) -> int:
        return len(self._offsets)

    def indices(self, split: Split | None = None, *, only_with_actions: bool = False) -> np.ndarray:
        """Positions in the manifest, in its order."""
        mask = np.ones(len(self), dtype=bool)
        if split is not None:
            mask &= pc.equal(self._table["split"].cast(pa.string()), split).to_numpy()
        if only_with_actions:
            mask &= self._table["has_actions"].to_numpy()
        return np.flatnonzero(mask)

    def key(self, i: int) -> str:
        return self._keys[int(i)].as_py()

    def largest_shards(self, number: int) -> float:
        """Bytes of so many shards at most."""
        return float(np.sort(np.bincount(self._shard_of, weights=self._num_bytes))[-number:].sum())

    def take_traffic(self) -> Counter[str]:
        """Requests and retries of this process since this was asked last; none where the dataset is local."""
        taken = Counter(self.files.traffic)
        self.files.traffic.clear()
        return taken

    def row(self, i: int) -> dict[str, Any]:
        return self.manifest.slice(int(i), 1).to_pylist()[0]

    def announce(self, i: int) -> None:
        """That sample i will be read soon."""
        self.files.announce(self._shards[self._shard_of[i]], int(self._offsets[i]), int(self._num_bytes[i]))

    def read_sample(self, i: int, *, check_sha256: bool = False, as_views: bool = False) -> dict[str, Any]:
        """The members of sample i: `__key__`, and bytes by suffix (see `sample.py`), or memoryviews of one buffer."""
        shard = self._shards[self._shard_of[i]]
        try:
            records = self.files.read(shard, int(self._offsets[i]), int(self._num_bytes[i]))
            if check_sha256:
                self._check_sha256(i, records)
            members = read_records(memoryview(records) if as_views else records)
            if members["__key__"] != self.key(i):
                raise ShardError(f"holds sample {members['__key__']} in its place")
        except ShardError as error:
            raise self.bad_sample(i, error) from error
        return members

    def _check_sha256(self, i: int, records: Bytes) -> None:
        if hashlib.sha256(records).hexdigest() != self._sha256[int(i)].as_py():
            raise ShardError("holds other bytes than its checksum promises", "wrong_checksum")

    def bad_sample(self, i: int, error: ShardError) -> BadSampleError:
        return BadSampleError(self.address, self._shards[self._shard_of[i]], self.key(i), error)

    def missing_shards(self) -> list[str]:
        """In the manifest's order; none are known of remote storage."""
        return self.files.missing([self._shards[number] for number in np.unique(self._shard_of)])

    def shard_sizes(self, indices: np.ndarray) -> np.ndarray:
        """How many of these samples, which are sorted by `by_place`, lie in each of their shards: int64 [s]."""
        shards = self._shard_of[indices]
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        return np.diff(starts, append=len(shards))

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        """Of each of these samples, as tar records: int64 [n]."""
        return self._num_bytes[indices]

    def by_place(self, indices: np.ndarray) -> np.ndarray:
        """The same samples in the order in which they lie: shard after shard."""
        rank = np.argsort(np.argsort(self._shards))  # the dictionary's order is that of the manifest
        return indices[np.lexsort((self._offsets[indices], rank[self._shard_of[indices]]))]

    def column(self, name: str) -> tuple[list[str | None], np.ndarray]:
        """A column of names: the distinct ones, None (where nothing stands) first, and each sample's number of them."""
        table = self._table if name in _COLUMNS else self._read_manifest([name])
        column = table[name].combine_chunks()
        names: list[str | None] = [None, *column.dictionary.to_pylist()]
        return names, column.indices.fill_null(-1).to_numpy() + 1

    @cached_property
    def digest(self) -> str:
        """Another one where any sample, its place, or what scales it is another: a run cannot go on over it."""
        names = (self.info.codec.weight_hash, self.info.text_encoder.weight_hash, *self._shards)
        digest = hashlib.sha256("\n".join(names).encode())
        digest.update(json.dumps(self.norm_stats, sort_keys=True).encode())
        for numbers in (self._shard_of, self._offsets, self._num_bytes):
            digest.update(numbers.astype("<i8").tobytes())
        for chunk in filter(len, self._table["key"].chunks):
            _, offsets, text = chunk.buffers()
            first, end = np.frombuffer(offsets, "<i4")[[chunk.offset, chunk.offset + len(chunk)]]
            digest.update(memoryview(text)[first:end])
        return digest.hexdigest()
