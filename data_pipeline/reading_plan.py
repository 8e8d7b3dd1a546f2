"""What each rank of a training run would read, on paper: from the manifests alone, no shard is touched.

    python -m data_pipeline.reading_plan --config configs/pretrain/own_data.yaml num_ranks=512

Takes the config of any training run and reads its `loader` section. Draws global batches as the run will draw them,
until every source has been gone through once, and adds up what falls to each rank. `--json` writes all figures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, Field, PositiveInt, model_validator
from rich.console import Console

from configs.loader import StrictConfig, run_command
from configs.tables import console, table

from .datasets import Datasets
from .loader import LoaderConfig
from .mixing_quality import MixingQuality
from .sample_order import Cursor, GlobalBatch, SampleOrder, Stream
from .sample_plan import SamplePlan, check_ranks, plan_samples

MAX_BATCHES = 10_000

OTHER_SETTINGS = frozenset(
    {"run_dir", "seed", "num_steps", "engine", "optimizer", "ema_decay", "checkpoint_every", "keep_last", "keep_every"}
    | {"validate_every", "validation_batches", "imagine", "log_every", "trackers"}
    | {"guard", "stuck_after_s", "model", "pretrained"}
    | {"policy", "embodiment", "execute_steps"}
)
"""Of the configs of training runs, what reading does not depend on."""


class ReadingPlanConfig(StrictConfig):
    """What to lay out. Other settings of a training run may stand beside `loader`."""

    loader: LoaderConfig
    num_ranks: PositiveInt = Field(1, description="Ranks that share a global batch; with sequence_parallel, groups.")
    num_batches: PositiveInt | None = Field(
        None,
        le=1_000_000,
        description=f"Batches to draw; null: until every source was gone through, at most {MAX_BATCHES}.",
    )
    as_json: bool = Field(False, alias="json", description="Write JSON instead of tables.")

    @model_validator(mode="before")
    @classmethod
    def _of_a_training_run(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in OTHER_SETTINGS}


class StreamPlan(BaseModel):
    """One source (or what else the mixture names) in one size of clips, of one dataset."""

    name: str
    bucket: str
    samples: int
    shards: int
    megabytes: float
    share: float  # of all samples that are drawn, at step 0
    drawn: int
    epochs: float
    steps_per_epoch: int | None  # until it was gone through once; null: it was not
    tail: int | None  # of its samples in the last of these steps, those that belong to the epoch that ends there


class BucketPlan(BaseModel):
    bucket: str
    samples_per_batch: int
    samples_per_batch_and_rank: int
    batches: int


class RankPlan(BaseModel):
    """Of a rank, over all batches drawn."""

    samples: int
    megabytes_min: float
    megabytes_mean: float
    megabytes_max: float
    shards_per_batch: float  # that it reads from, on average


class MixingPlan(BaseModel):
    """Share of the pairs of samples in a batch that come from one shard, or one episode; and if all were shuffled."""

    same_shard: float
    same_shard_if_perfect: float
    same_episode: float
    same_episode_if_perfect: float


class ReadingPlan(BaseModel):
    num_ranks: int
    num_batches: int
    streams: list[StreamPlan]
    buckets: list[BucketPlan]
    rank: RankPlan
    shards_per_window: int
    megabytes_in_windows: float  # of all streams: what is read from at a time
    mixing: MixingPlan


@dataclass(frozen=True)
class StreamSamples:
    """What the manifest says of a stream's samples, in its order: int64 [n] each."""

    num_bytes: Int64[np.ndarray, "n"]
    shard: Int64[np.ndarray, "n"]  # numbers, the same ones in every stream
    episode: Int64[np.ndarray, "n"]


def main(config: ReadingPlanConfig) -> None:
    datasets = Datasets.open(config.loader.addresses, config.loader.storage)
    plan = plan_samples(datasets, config.loader)
    assert plan is not None  # it would have been refused
    check_ranks(config.loader, plan.order.batch_sizes, config.num_ranks)
    window_shards = config.loader.shuffle.window_shards
    found = lay_out(plan.order, stream_samples(datasets, plan), window_shards, config.num_ranks, config.num_batches)
    if config.as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
    else:
        show(found, console())


def stream_samples(datasets: Datasets, plan: SamplePlan) -> list[StreamSamples]:
    num_bytes, shard, episode = (np.empty(len(datasets), np.int64) for _ in range(3))
    for name, start in datasets.starts().items():
        index = datasets.by_name[name]
        own = slice(start, start + len(index))
        num_bytes[own] = index.num_bytes(np.arange(len(index)))
        # A dataset has no more shards or episodes than samples, so numbers from its start on are its own.
        shard[own] = start + np.unique(index.column("shard")[1], return_inverse=True)[1]
        source, (episodes, number) = index.column("source")[1], index.column("episode")
        episode[own] = start + np.unique(source * len(episodes) + number, return_inverse=True)[1]
    return [StreamSamples(num_bytes[at], shard[at], episode[at]) for at in plan.positions]


# --- drawing ------------------------------------------------------------------------------------------------------


def lay_out(
    order: SampleOrder,
    samples: Sequence[StreamSamples],
    window_shards: int,
    num_ranks: int,
    num_batches: int | None = None,
) -> ReadingPlan:
    """Draws batches and adds up; for `num_batches` see `ReadingPlanConfig`."""
    tally = _Tally(order, samples, num_ranks)
    for batch, cursor in _draw(order, num_batches):
        tally.add(batch, cursor)
    in_window = [min(1.0, window_shards / len(stream.shard_sizes)) for stream in order.streams]
    return ReadingPlan(
        num_ranks=num_ranks,
        num_batches=tally.cursor.step,
        streams=tally.streams(),
        buckets=tally.buckets(),
        rank=tally.rank(),
        shards_per_window=window_shards,
        megabytes_in_windows=sum(
            share * one.num_bytes.sum() / 1e6 for share, one in zip(in_window, samples, strict=True)
        ),
        mixing=tally.mixing(),
    )


class _Tally:
    """Adds up batches in the order in which they are drawn."""

    def __init__(self, order: SampleOrder, samples: Sequence[StreamSamples], num_ranks: int) -> None:
        self.cursor = Cursor()
        self._order, self._samples, self._num_ranks = order, samples, num_ranks
        self._starts = np.cumsum([0, *(len(one.num_bytes) for one in samples)])
        self._num_bytes = np.concatenate([one.num_bytes for one in samples])
        self._shard = np.concatenate([one.shard for one in samples])
        self._num_shards = int(self._shard.max()) + 1
        self._bytes_of_rank = np.zeros(num_ranks, np.int64)
        self._num_opened = 0
        self._batches = dict.fromkeys(order.batch_sizes, 0)
        self._ends: dict[str, tuple[int, int]] = {}  # stream -> step in which its first epoch ends, its samples in it
        self._by_shard = MixingQuality([one.shard for one in samples])
        self._by_episode = MixingQuality([one.episode for one in samples])

    def add(self, batch: GlobalBatch, cursor: Cursor) -> None:
        """A batch, and the cursor behind it."""
        rows = self._starts[batch.stream] + batch.sample
        rank = np.arange(len(rows)) // (len(rows) // self._num_ranks)
        self._bytes_of_rank += self._num_bytes[rows].reshape(self._num_ranks, -1).sum(1)
        self._num_opened += len(np.unique(rank * self._num_shards + self._shard[rows]))
        self._by_shard.add(batch)
        self._by_episode.add(batch)
        self._batches[batch.bucket] += 1
        for stream in self._order.streams:
            left = stream.num_samples - self.cursor.consumed.get(stream.name, 0)
            if left > 0 and cursor.consumed[stream.name] >= stream.num_samples:
                self._ends[stream.name] = (cursor.step, left)
        self.cursor = cursor

    def streams(self) -> list[StreamPlan]:
        shares = self._order.weights_at(0)
        return [self._stream(*one) for one in zip(self._order.streams, self._samples, shares, strict=True)]

    def _stream(self, stream: Stream, samples: StreamSamples, share: float) -> StreamPlan:
        drawn = self.cursor.consumed[stream.name]
        steps, tail = self._ends.get(stream.name, (None, None))
        return StreamPlan(
            name=stream.name.removesuffix(f"/{stream.bucket}"),
            bucket=stream.bucket,
            samples=stream.num_samples,
            shards=len(stream.shard_sizes),
            megabytes=samples.num_bytes.sum() / 1e6,
            share=share,
            drawn=drawn,
            epochs=drawn / stream.num_samples,
            steps_per_epoch=steps,
            tail=tail,
        )

    def buckets(self) -> list[BucketPlan]:
        return [
            BucketPlan(
                bucket=bucket,
                samples_per_batch=size,
                samples_per_batch_and_rank=size // self._num_ranks,
                batches=self._batches[bucket],
            )
            for bucket, size in self._order.batch_sizes.items()
        ]

    def rank(self) -> RankPlan:
        megabytes = self._bytes_of_rank / 1e6
        return RankPlan(
            samples=sum(self.cursor.consumed.values()) // self._num_ranks,
            megabytes_min=megabytes.min(),
            megabytes_mean=megabytes.mean(),
            megabytes_max=megabytes.max(),
            shards_per_batch=self._num_opened / self.cursor.step / self._num_ranks,
        )

    def mixing(self) -> MixingPlan:
        return MixingPlan(
            same_shard=self._by_shard.measured(),
            same_shard_if_perfect=self._by_shard.of_perfect_shuffle(),
            same_episode=self._by_episode.measured(),
            same_episode_if_perfect=self._by_episode.of_perfect_shuffle(),
        )


def _draw(order: SampleOrder, num_batches: int | None) -> Iterator[tuple[GlobalBatch, Cursor]]:
    """Batches with the cursors behind them."""
    cursor = Cursor()
    while cursor.step < (num_batches or MAX_BATCHES):
        batch, cursor = order.draw(cursor)
        yield batch, cursor
        if num_batches is None and _is_gone_through(order, cursor):
            return


def _is_gone_through(order: SampleOrder, cursor: Cursor) -> bool:
    weights = order.weights_at(cursor.step)
    return all(
        cursor.consumed[stream.name] >= stream.num_samples or not weight
        for stream, weight in zip(order.streams, weights, strict=True)
    )


# --- telling ------------------------------------------------------------------------------------------------------


def show(plan: ReadingPlan, out: Console) -> None:
    out.print(f"{plan.num_batches} global batches on {plan.num_ranks} rank(s)\n")
    out.print(table(plan.streams, "What is read; an epoch's tail is what its last batch has of it"))
    out.print(table(plan.buckets, "Global batches, each of one size of clips (height x width x frames)"))
    out.print(table([plan.rank], "A rank, over all these batches"))
    out.print(
        f"Read from at a time: {plan.shards_per_window} shard(s) of each row above, "
        f"{plan.megabytes_in_windows:.1f} MB in all\n"
    )
    out.print(table([plan.mixing], "Share of the pairs of samples in a batch that come from one and the same"))


if __name__ == "__main__":
    run_command(main, ReadingPlanConfig, description=__doc__)
