"""How well batches are mixed: how often two samples of a batch come from one shard, or one episode.

Shuffling within a window of shards is cheap to read, and leaves neighbours nearer to each other than a shuffle of
everything would. The figure beside it is what such a perfect shuffle would give, on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64

from .sample_order import GlobalBatch


def share_of_equal_pairs(labels: Int64[np.ndarray, "b"]) -> float:
    """Of all pairs of samples, the share that has one label."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / max(len(labels) * (len(labels) - 1), 1))


@dataclass
class MixingQuality:
    """Measures batches that are drawn from streams whose samples have these labels, int64 [n] of each stream."""

    labels: Sequence[Int64[np.ndarray, "n"]]
    shares: list[float] = field(default_factory=list)  # of equal pairs, in each batch measured
    _counts: dict[str, Float64[np.ndarray, "streams"]] = field(default_factory=dict)  # bucket -> samples of each stream
    _num_batches: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *map(len, self.labels)])[:-1]
        self._all = np.concatenate(list(self.labels))

    def add(self, batch: GlobalBatch) -> None:
        self.shares.append(share_of_equal_pairs(self._all[self._starts[batch.stream] + batch.sample]))
        counts = np.bincount(batch.stream, minlength=len(self.labels)).astype(np.float64)
        self._counts[batch.bucket] = self._counts.get(batch.bucket, 0.0) + counts
        self._num_batches[batch.bucket] = self._num_batches.get(batch.bucket, 0) + 1

    def measured(self) -> float:
        return float(np.mean(self.shares))

    def of_perfect_shuffle(self) -> float:
        """What batches with as many samples of each stream would have, were these drawn from the whole stream."""
        share = 0.0
        for bucket, counts in self._counts.items():
            num_batches = self._num_batches[bucket]
            share += num_batches * self._expected(counts / num_batches)
        return share / len(self.shares)

    def _expected(self, counts: Float64[np.ndarray, "streams"]) -> float:
        """Pairs within a stream are drawn without replacement, pairs of two streams independently."""
        used = [(labels, count) for labels, count in zip(self.labels, counts, strict=True) if count]
        pairs, of_label = 0.0, np.zeros(int(self._all.max()) + 1)
        for labels, count in used:
            found, number = np.unique(labels, return_counts=True)
            mine = count * number / len(labels)
            within = (number * (number - 1)).sum() / max(len(labels) * (len(labels) - 1), 1)
            pairs += count * max(count - 1, 0) * within - (mine**2).sum()
            of_label[found] += mine
        total = sum(count for _, count in used)
        return float((pairs + (of_label**2).sum()) / max(total * (total - 1), 1))
