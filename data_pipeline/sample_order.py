"""Which samples form global batch k, on paper: no data is touched.

The order follows from the manifest (how many samples lie in each shard), the mixture's weights, the seed and the sizes
of the global batches alone. Ranks, workers and prefetching read pieces of it and never change it. Where a run stands is
a `Cursor`, a few numbers, and the batch after a cursor is a pure function of it: so a run resumes anywhere at once, on
any number of ranks.

    streams   the samples of one source in one bucket (size of clip), numbered as they lie in the shards
      -> each an endless sequence, epoch after epoch; every sample comes once before any comes twice
      -> mixed by weight into global batches, each of one bucket
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field, PositiveInt

from configs.loader import StrictConfig

# --- one stream ---------------------------------------------------------------------------------------------------


class ShuffleConfig(StrictConfig):
    """How far samples move. Everything within a window of shards is mixed; the shards themselves come in any order."""

    window_shards: PositiveInt = Field(
        16, description="Shards that are read at a time: more mix better, fewer need a smaller cache."
    )
    run_length: PositiveInt = Field(
        1,
        le=2**20,
        description="Neighbours in a shard that stay together, for one long read instead of several; `build` has "
        "shuffled them already.",
    )


class StreamOrder:
    """An endless sequence over a stream's samples, whose numbers go through its shards one after the other.

    Every epoch takes the shards in an order of its own, `window_shards` at a time, and shuffles the runs in a window.
    """

    def __init__(self, shard_sizes: Int64[np.ndarray, "s"], seed: tuple[int, ...], config: ShuffleConfig) -> None:
        self.num_samples = int(shard_sizes.sum())
        if not self.num_samples:
            raise ValueError("there are no samples to draw from")
        self._sizes = shard_sizes
        self._firsts = np.cumsum(shard_sizes) - shard_sizes
        self._seed = seed
        self._config = config
        # Bound to this order, so that they go with it.
        self._windows_of = lru_cache(maxsize=2)(self._make_windows)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def draw(self, start: int, count: int) -> Int64[np.ndarray, "n"]:
        """Samples `start` to `start + count` of the sequence."""
        drawn = np.empty(count, np.int64)
        place = 0
        while place < count:
            epoch, within = divmod(start + place, self.num_samples)
            _, ends = self._windows_of(epoch)
            number = int(np.searchsorted(ends, within, side="right"))
            window = self._window(epoch, number)
            offset = within - int(ends[number]) + len(window)
            part = window[offset : offset + count - place]
            drawn[place : place + len(part)] = part
            place += len(part)
        return drawn

    def _make_windows(self, epoch: int) -> tuple[list[Int64[np.ndarray, "w"]], Int64[np.ndarray, "n"]]:
        """Of an epoch: each window's shards, and where in the epoch each ends."""
        order = shuffled(len(self._sizes), *self._seed, epoch)
        width = self._config.window_shards
        windows = [order[first : first + width] for first in range(0, len(order), width)]
        return windows, np.cumsum([self._sizes[shards].sum() for shards in windows])

    def _shuffle_window(self, epoch: int, number: int) -> Int64[np.ndarray, "n"]:
        shards = self._windows_of(epoch)[0][number]
        length = self._config.run_length
        num_runs = -(-self._sizes[shards] // length)
        run_in_shard = _counted(num_runs)
        firsts = np.repeat(self._firsts[shards], num_runs) + length * run_in_shard
        lengths = np.minimum(length, np.repeat(self._sizes[shards], num_runs) - length * run_in_shard)
        chosen = shuffled(len(firsts), *self._seed, epoch, number)
        return np.repeat(firsts[chosen], lengths[chosen]) + _counted(lengths[chosen])


def _counted(lengths: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """0, 1, … for each of the lengths, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def shuffled(count: int, *seed: int) -> Int64[np.ndarray, "n"]:
    """A permutation. By the raw bits of a bit generator, which are the same in every numpy version;
    `Generator.permutation` is not promised to be."""
    bits = np.random.Philox(np.random.SeedSequence(list(seed))).random_raw(count)
    return np.argsort(bits, kind="stable")


# --- the mixture --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Samples that are drawn as one. The name decides, with the seed, how they are shuffled."""

    name: str
    source: str  # whose weight it shares
    bucket: str
    shard_sizes: Int64[np.ndarray, "s"]

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())


class Cursor(StrictConfig):
    """Where a run stands: all that the samples still to come depend on, besides the dataset and the config."""

    step: int = Field(0, ge=0, description="Global batches drawn.")
    consumed: dict[str, int] = Field({}, description="Samples drawn from each stream.")
    credit: dict[str, float] = Field({}, description="Samples that each stream is behind its weight (ahead: negative).")
    order: dict[str, str] = Field(
        {}, description="What the order follows from, setting by setting; from another one it cannot go on."
    )


@dataclass(frozen=True)
class GlobalBatch:
    bucket: str
    stream: Int64[np.ndarray, "b"]  # number of each sample's stream
    sample: Int64[np.ndarray, "b"]  # number of each sample in its stream

    def part(self, rank: int, world_size: int) -> "GlobalBatch":
        """The r-th of n equal parts."""
        share = len(self.stream) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        return GlobalBatch(self.bucket, self.stream[mine], self.sample[mine])


Weight = float | Mapping[int, float]
"""Of a source: a number, or {step: number, …} with straight lines between the steps."""


class SampleOrder:
    """The global batches of a mixture of streams."""

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Mapping[str, Weight],
        batch_sizes: Mapping[str, int],
        seed: int,
        shuffle: ShuffleConfig,
    ) -> None:
        """`weights` of the sources need not sum to 1; `batch_sizes`: samples of a global batch of each bucket."""
        self.streams = list(streams)
        self.batch_sizes = dict(batch_sizes)
        self._orders = [StreamOrder(stream.shard_sizes, (seed, _number_of(stream.name)), shuffle) for stream in streams]
        self._weights = dict(weights)
        totals: dict[str, int] = {}
        for stream in streams:
            totals[stream.source] = totals.get(stream.source, 0) + stream.num_samples
        self._share = np.array([stream.num_samples / totals[stream.source] for stream in streams])
        self._buckets = {
            bucket: np.flatnonzero([stream.bucket == bucket for stream in streams]) for bucket in batch_sizes
        }

    def weights_at(self, step: int) -> Float64[np.ndarray, "streams"]:
        """Each stream's share of the samples."""
        of_source = {name: weight_at(weight, step) for name, weight in self._weights.items()}
        weights = self._share * np.array([of_source[stream.source] for stream in self.streams])
        return weights / weights.sum()

    def draw(self, cursor: Cursor) -> tuple[GlobalBatch, Cursor]:
        """The next global batch, and the cursor after it."""
        bucket, counts, after = self._allot(cursor)
        used = np.flatnonzero(counts)
        consumed = [cursor.consumed.get(self.streams[i].name, 0) for i in used]
        samples = [self._orders[i].draw(first, counts[i]) for i, first in zip(used, consumed, strict=True)]
        # Evenly interleaved, so that every rank's part holds the mixture.
        places = np.concatenate([(np.arange(counts[i]) + 0.5) / counts[i] for i in used])
        order = np.argsort(places, kind="stable")
        return GlobalBatch(bucket, np.repeat(used, counts[used])[order], np.concatenate(samples)[order]), after

    def cursor_at(self, step: int) -> Cursor:
        """The cursor after so many batches of a run. A stored one costs nothing; this one counts from the start."""
        cursor = Cursor()
        while cursor.step < step:
            cursor = self._allot(cursor)[2]
        return cursor

    def epochs(self, cursor: Cursor) -> dict[str, float]:
        """How often each source has been gone through."""
        drawn: dict[str, int] = {}
        totals: dict[str, int] = {}
        for stream in self.streams:
            drawn[stream.source] = drawn.get(stream.source, 0) + cursor.consumed.get(stream.name, 0)
            totals[stream.source] = totals.get(stream.source, 0) + stream.num_samples
        return {source: drawn[source] / totals[source] for source in totals}

    def _allot(self, cursor: Cursor) -> tuple[str, Int64[np.ndarray, "streams"], Cursor]:
        """The next batch's bucket, how many samples each stream gives to it, and the cursor after it.

        Every stream earns credit by its weight and pays with samples. The bucket that is furthest behind comes next,
        and in it the streams that are; so shares are exact to within a batch, at every moment.
        """
        weights = self.weights_at(cursor.step)
        credit = np.array([cursor.credit.get(stream.name, 0.0) for stream in self.streams])
        behind = {
            bucket: (credit[members].sum() / self.batch_sizes[bucket], weights[members].sum())
            for bucket, members in self._buckets.items()
            if weights[members].sum() > 0
        }
        bucket = max(behind, key=lambda name: behind[name])
        members, size = self._buckets[bucket], self.batch_sizes[bucket]
        credit += weights * size
        own, share = credit[members], weights[members] / weights[members].sum()
        counts = np.zeros(len(self.streams), np.int64)
        counts[members] = _rounded(own + (size - own.sum()) * share, size, share > 0)
        names = [stream.name for stream in self.streams]
        consumed = {name: cursor.consumed.get(name, 0) + int(n) for name, n in zip(names, counts, strict=True)}
        left = dict(zip(names, (credit - counts).tolist(), strict=True))
        after = {"step": cursor.step + 1, "consumed": consumed, "credit": left}
        return bucket, counts, cursor.model_copy(update=after)


def _rounded(wanted: Float64[np.ndarray, "n"], total: int, may_give: np.ndarray) -> Int64[np.ndarray, "n"]:
    """Whole numbers, none negative, that sum to `total` and are nearest to `wanted`, which sums to it too."""
    counts = np.where(may_give, np.floor(np.maximum(wanted, 0)), 0).astype(np.int64)
    while counts.sum() < total:
        counts[np.argmax(np.where(may_give, wanted - counts, -np.inf))] += 1
    while counts.sum() > total:
        counts[np.argmin(np.where(counts > 0, wanted - counts, np.inf))] -= 1
    return counts


def weight_at(weight: Weight, step: int) -> float:
    if not isinstance(weight, Mapping):
        return float(weight)
    steps = sorted(weight)
    return float(np.interp(step, steps, [weight[one] for one in steps]))


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
