"""Global batches on paper: exact epochs, exact shares, and the same whatever reads them."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sample_order import Cursor, SampleOrder, ShuffleConfig, Stream, StreamOrder

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
SHUFFLES = st.builds(ShuffleConfig, window_shards=st.integers(1, 4), run_length=st.integers(1, 5))


def order_of(sizes, shuffle=None, seed=0):
    return StreamOrder(np.asarray(sizes), (seed,), shuffle or ShuffleConfig())


def mixture(sizes, weights, batch_sizes, seed=0, **shuffle):
    """`sizes`: {source: {bucket: shard sizes}}."""
    streams = [
        Stream(f"{source}/{bucket}", source, bucket, np.asarray(shards))
        for source, buckets in sizes.items()
        for bucket, shards in buckets.items()
    ]
    return SampleOrder(streams, weights, batch_sizes, seed, ShuffleConfig(**shuffle))


def run(order, num_steps, cursor=None):
    cursor, batches = cursor or Cursor(), []
    for _ in range(num_steps):
        batch, cursor = order.draw(cursor)
        batches.append(batch)
    return batches, cursor


# --- one stream ---------------------------------------------------------------------------------------------------


@given(SIZES, SHUFFLES, st.integers(0, 3))
def test_every_epoch_has_every_sample_once(sizes, shuffle, epoch):
    total = sum(sizes)
    drawn = order_of(sizes, shuffle).draw(epoch * total, total)
    assert sorted(drawn.tolist()) == list(range(total))


@given(SIZES, SHUFFLES, st.integers(0, 100), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_the_sequence_does_not_depend_on_how_it_is_cut(sizes, shuffle, start, cuts):
    whole = order_of(sizes, shuffle).draw(start, sum(cuts))
    starts = start + np.cumsum(cuts) - cuts
    parts = [order_of(sizes, shuffle).draw(int(first), cut) for first, cut in zip(starts, cuts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(SIZES, st.integers(1, 4))
def test_a_window_is_left_before_the_next_one_is_opened(sizes, window_shards):
    """What is read at a time stays small: no more shards than a window has."""
    drawn = order_of(sizes, ShuffleConfig(window_shards=window_shards)).draw(0, sum(sizes))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[drawn]
    used = list(dict.fromkeys(shard_of.tolist()))
    open_until = {shard: int(np.flatnonzero(shard_of == shard)[-1]) for shard in used}
    for place in range(len(drawn)):
        opened = [shard for shard in used if np.flatnonzero(shard_of == shard)[0] <= place <= open_until[shard]]
        assert len(opened) <= window_shards


@given(SIZES, st.integers(1, 6))
def test_runs_stay_together(sizes, run_length):
    drawn = order_of(sizes, ShuffleConfig(run_length=run_length)).draw(0, sum(sizes))
    num_reads = 1 + int((np.diff(drawn) != 1).sum())
    assert num_reads <= sum(-(-size // run_length) for size in sizes)


def test_epochs_and_seeds_differ():
    order = order_of([50, 50])
    assert order.draw(0, 100).tolist() != order.draw(100, 100).tolist()
    assert order.draw(0, 100).tolist() != order_of([50, 50], seed=1).draw(0, 100).tolist()


def test_the_order_is_for_ever():
    """Runs that stand in somebody's checkpoint rely on it."""
    assert order_of([3, 2, 4], ShuffleConfig(window_shards=2)).draw(0, 9).tolist() == [0, 3, 1, 2, 4, 6, 7, 5, 8]


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        order_of([0, 0])


# --- mixtures -----------------------------------------------------------------------------------------------------

THREE = {"robot": {"a": [7, 5, 9]}, "people": {"a": [30, 20]}, "toys": {"a": [4]}}
WEIGHTS = {"robot": 0.5, "people": 0.3, "toys": 0.2}


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 20), st.integers(0, 5))
def test_a_run_goes_on_after_any_stop(batch_size, stop, num_more, seed):
    """The cursor is all it takes, and it survives being written down."""
    order = mixture(THREE, WEIGHTS, {"a": batch_size}, seed, window_shards=2)
    whole, _ = run(order, stop + num_more)
    _, cursor = run(order, stop)
    stored = Cursor.model_validate(json.loads(json.dumps(cursor.model_dump())))
    resumed, _ = run(mixture(THREE, WEIGHTS, {"a": batch_size}, seed, window_shards=2), num_more, stored)
    for one, other in zip(whole[stop:], resumed, strict=True):
        np.testing.assert_array_equal(one.sample, other.sample)
        np.testing.assert_array_equal(one.stream, other.stream)
    assert order.cursor_at(stop) == cursor


@given(st.dictionaries(st.sampled_from("bcdef"), st.floats(0.01, 10), min_size=1), st.integers(1, 64))
def test_shares_are_exact_at_every_moment(weights, batch_size):
    order = mixture({name: {"a": [11, 5]} for name in weights}, weights, {"a": batch_size})
    cursor = Cursor()
    for step in range(1, 20):
        _, cursor = order.draw(cursor)
        assert sum(cursor.consumed.values()) == step * batch_size
        for stream, weight in zip(order.streams, order.weights_at(0), strict=True):
            assert abs(cursor.consumed[stream.name] - weight * step * batch_size) < len(weights)


def test_shares_over_a_hundred_thousand_draws():
    order = mixture(THREE, WEIGHTS, {"a": 250})
    _, cursor = run(order, 400)
    for name, weight in WEIGHTS.items():
        assert cursor.consumed[f"{name}/a"] / 100_000 == pytest.approx(weight, rel=0.01)
    assert order.epochs(cursor) == pytest.approx({"robot": 50_000 / 21, "people": 30_000 / 50, "toys": 20_000 / 4})


def test_each_source_keeps_its_own_epochs():
    order = mixture(THREE, WEIGHTS, {"a": 10})
    batches, _ = run(order, 40)
    for number, stream in enumerate(order.streams):
        drawn = np.concatenate([batch.sample[batch.stream == number] for batch in batches])
        for first in range(0, len(drawn) - stream.num_samples + 1, stream.num_samples):
            assert sorted(drawn[first : first + stream.num_samples]) == list(range(stream.num_samples))


def test_every_part_of_a_batch_holds_the_mixture():
    (batch,), _ = run(mixture(THREE, WEIGHTS, {"a": 40}), 1)
    for rank in range(4):
        assert Counter(batch.part(rank, 4).stream.tolist()) == {0: 5, 1: 3, 2: 2}


def test_weights_follow_a_schedule():
    order = mixture(THREE, {"robot": {0: 0.0, 100: 1.0}, "people": {0: 1.0, 100: 0.0}, "toys": 0.0}, {"a": 20})
    counts = [np.bincount(batch.stream, minlength=3) for batch in run(order, 120)[0]]
    assert counts[0].tolist() == [0, 20, 0] and counts[-1].tolist() == [20, 0, 0]
    assert 8 <= counts[50][0] <= 12
    assert all(count[2] == 0 for count in counts)


# --- buckets ------------------------------------------------------------------------------------------------------

BUCKETS = {"robot": {"small": [40, 40], "large": [20]}, "people": {"large": [60, 30]}}


@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.05, 5))
def test_a_batch_has_one_bucket_and_all_get_their_share(small, large, weight):
    order = mixture(BUCKETS, {"robot": 1.0, "people": weight}, {"small": small, "large": large})
    batches, cursor = run(order, 60)
    for batch in batches:
        assert {order.streams[i].bucket for i in batch.stream} == {batch.bucket}
        assert len(batch.sample) == {"small": small, "large": large}[batch.bucket]
    total = sum(cursor.consumed.values())
    for stream, share in zip(order.streams, order.weights_at(0), strict=True):
        assert abs(cursor.consumed[stream.name] - share * total) <= small + large + 3


# --- on paper -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_512_ranks_read_ten_million_samples_once_an_epoch():
    sizes = np.full(5000, 2000)
    order = mixture({"all": {"a": sizes}}, {"all": 1.0}, {"a": 512 * 16})
    num_steps = -(-int(sizes.sum()) // (512 * 16))
    times_read, cursor = np.zeros(int(sizes.sum()), np.int8), Cursor()
    shards_of_rank: dict[int, set[int]] = {0: set(), 511: set()}
    for _ in range(num_steps):
        batch, cursor = order.draw(cursor)
        left = int(sizes.sum()) - (cursor.step - 1) * len(batch.sample)
        np.add.at(times_read, batch.sample[:left], 1)
        for rank, shards in shards_of_rank.items():
            shards.update((batch.part(rank, 512).sample // 2000).tolist())
    assert (times_read == 1).all()
    assert all(len(shards) > 4000 for shards in shards_of_rank.values())  # each sees of every shard a little
