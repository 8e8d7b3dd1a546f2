"""Duplicates: which of several alike is kept does not depend on order, and nothing unlike is dropped."""

import random
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.curate import duplicates
from data_pipeline.curate.duplicates import (
    DuplicateConfig,
    Leak,
    SemanticConfig,
    exact_duplicates,
    find_leaks,
    leaks_sentence,
    near_duplicates,
    semantic_duplicates,
    without_duplicates,
    without_semantic_duplicates,
)
from data_pipeline.staging import EpisodeRecord, StagedClip

NUM_BITS = 256
SHARE = 0.03
MAX_BITS = int(SHARE * NUM_BITS)


def shuffled(mapping, seed):
    items = list(mapping.items())
    random.Random(seed).shuffle(items)
    return dict(items)


def hexadecimal(value):
    return f"{value:0{NUM_BITS // 4}x}"


def distance(one, other):
    return (int(one, 16) ^ int(other, 16)).bit_count()


def flipped(value, bits):
    for bit in bits:
        value ^= 1 << bit
    return value


@st.composite
def families(draw):
    """Hashes around a few centres, some close to each other and some not, with qualities."""
    centres = [draw(st.integers(0, 2**NUM_BITS - 1)) for _ in range(draw(st.integers(1, 3)))]
    values = [
        flipped(draw(st.sampled_from(centres)), draw(st.lists(st.integers(0, NUM_BITS - 1), max_size=12)))
        for _ in range(draw(st.integers(1, 12)))
    ]
    keys = [f"clip{i:02d}" for i in range(len(values))]
    quality = {key: (draw(st.sampled_from([0.0, 1.0])), 2.0) for key in keys[::2]}
    return dict(zip(keys, map(hexadecimal, values), strict=True)), quality


# --- exact --------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.sampled_from("abc")), st.integers(0, 9))
def test_one_of_each_stays(hashes, seed):
    rejected = exact_duplicates(hashes)
    assert rejected == exact_duplicates(shuffled(hashes, seed))
    kept = hashes.keys() - rejected.keys()
    assert sorted(hashes[key] for key in kept) == sorted(set(hashes.values()))
    assert all(first in kept and first < key and hashes[first] == hashes[key] for key, first in rejected.items())


def test_the_best_stays_then_the_smallest_key():
    hashes = {"c": "x", "b": "x", "a": "x", "d": "y"}
    assert exact_duplicates(hashes) == {"b": "a", "c": "a"}
    assert exact_duplicates(hashes, {"c": (1.0,)}) == {"a": "c", "b": "c"}


# --- near ---------------------------------------------------------------------------------------------------------


@given(families(), st.integers(0, 9))
def test_near_duplicates_as_comparing_all_pairs(family, seed):
    phashes, quality = family
    kept, expected = [], {}
    for key in sorted(phashes, key=lambda key: (-quality.get(key, [-1.0])[0], key)):
        close = [(distance(phashes[key], phashes[other]), place, other) for place, other in enumerate(kept)]
        if close and min(close)[0] <= MAX_BITS:
            expected[key] = min(close)[2]
        else:
            kept.append(key)
    assert near_duplicates(phashes, SHARE, quality) == expected
    assert near_duplicates(shuffled(phashes, seed), SHARE, shuffled(quality, seed)) == expected


@pytest.mark.parametrize(("num_flipped", "is_near"), [(0, True), (MAX_BITS, True), (MAX_BITS + 1, False)])
def test_the_limit_is_exact(num_flipped, is_near):
    base = random.Random(0).getrandbits(NUM_BITS)
    for seed in range(50):
        other = flipped(base, random.Random(seed).sample(range(NUM_BITS), num_flipped))
        assert (near_duplicates({"a": hexadecimal(base), "b": hexadecimal(other)}, SHARE) == {"b": "a"}) == is_near


def test_hashes_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        near_duplicates({"a": "00", "b": "0000"}, 0.1)
    assert near_duplicates({}, 0.1) == {}


@given(families(), families())
def test_leaks_are_the_close_pairs(train, validation):
    train_hashes = {f"t{key}": phash for key, phash in train[0].items()}
    pairs = [
        Leak(key, other, distance(phash, train_hashes[other]))
        for key, phash in validation[0].items()
        for other in train_hashes
        if distance(phash, train_hashes[other]) <= MAX_BITS
    ]
    assert find_leaks(train_hashes, validation[0], SHARE) == sorted(pairs)


def test_leaks_are_told_with_what_to_do():
    leaks = [Leak("v1", "t2", 7), Leak("v3", "t2", 0)]
    assert leaks_sentence(leaks, DuplicateConfig(leak=0.06)) == (
        "2 pairs of a training and a validation clip look alike, such as t2 and v1 (7 bits of their hashes differ); "
        "set duplicates.near=0.06, where robots are among them with duplicates.compare=all, to reject copies, or "
        "expect validation to look too good."
    )
    sentence = leaks_sentence(leaks[:1], DuplicateConfig(compare="all"))
    assert sentence.startswith("1 pair of") and "set duplicates.near=0.03 to reject" in sentence


# --- semantic -----------------------------------------------------------------------------------------------------


def groups(num_groups, size, dim=32, spread=0.01, seed=0):
    """`size` embeddings around each of some random directions, by key."""
    generator = np.random.default_rng(seed)
    centres = np.repeat(generator.normal(size=(num_groups, dim)), size, axis=0)
    vectors = centres + spread * generator.normal(size=centres.shape)
    lengths = generator.uniform(0.5, 2.0, (len(vectors), 1))  # only directions count
    keys = [f"{group:03d}-{one}" for group in range(num_groups) for one in range(size)]
    return keys, (lengths * vectors).astype(np.float32)


@pytest.mark.parametrize("cluster_size", [1000, 30])
def test_one_of_each_meaning_stays(cluster_size):
    keys, embeddings = groups(60, 3)
    rejected = semantic_duplicates(keys, embeddings, 0.95, cluster_size=cluster_size)
    assert rejected == {key: f"{key[:3]}-0" for key in keys if not key.endswith("-0")}
    assert semantic_duplicates(keys, embeddings, 0.9999999, cluster_size=cluster_size) == {}


@pytest.mark.parametrize("cluster_size", [1000, 30])
def test_the_order_does_not_matter(cluster_size):
    keys, embeddings = groups(40, 4, spread=0.15)
    quality = {key: (float(key.endswith("-2")),) for key in keys}
    order = np.random.default_rng(1).permutation(len(keys))
    first = semantic_duplicates(keys, embeddings, 0.97, quality, cluster_size)
    again = semantic_duplicates([keys[i] for i in order], embeddings[order], 0.97, quality, cluster_size)
    assert 0 < len(first) < len(keys) and first == again
    assert all(kept not in first for kept in first.values())


def test_two_thousand_clips_are_clustered_by_faiss(monkeypatch):
    """And fewer are compared pair by pair, whatever is installed."""
    keys, embeddings = groups(1000, 2)
    with monkeypatch.context() as without_faiss:
        without_faiss.setitem(sys.modules, "faiss", None)
        assert len(semantic_duplicates(keys[:1998], embeddings[:1998], 0.97)) == 999
        with pytest.raises(UserError, match="needs faiss"):
            semantic_duplicates(keys, embeddings, 0.97)
    faiss = duplicates.import_faiss()
    monkeypatch.setattr(faiss, "Kmeans", trained := mock.Mock(wraps=faiss.Kmeans))
    rejected = semantic_duplicates(keys, embeddings, 0.97)
    assert trained.call_args.args == (32, 2) and 990 < len(rejected) <= 1000
    assert semantic_duplicates(keys, embeddings, 0.97) == rejected


def test_bad_embeddings_are_refused():
    with pytest.raises(ValueError, match="2 different keys of 3"):
        semantic_duplicates(["a", "a", "b"], np.ones((3, 2), np.float32), 0.9)
    with pytest.raises(ValueError, match="not finite"):
        semantic_duplicates(["a", "b"], np.full((2, 2), np.nan, np.float32), 0.9)
    assert semantic_duplicates([], np.zeros((0, 4), np.float32), 0.9) == {}
    assert semantic_duplicates(["a", "b"], np.zeros((2, 4), np.float32), 0.9) == {}


def record(source, episode, *, has_actions=False, has_instruction=False, resolution=64, phashes=("0" * 64,), video="a"):
    clips = [
        StagedClip(key=f"{source}{episode}{n}", clip_index=n, start_s=n, motion=0, offset=0, num_bytes=0, phash=phash)
        for n, phash in enumerate(phashes)
    ]
    common = {"content_sha256": source, "embodiment": None, "repairs": (), "rejected": (), "video_sha256": video}
    common |= {"has_actions": has_actions, "has_instruction": has_instruction, "resolution": resolution}
    return EpisodeRecord(source=source, episode=episode, found=len(clips), clips=clips, **common)


def test_of_two_copies_the_one_with_actions_stays():
    copies = [record("a", "1"), record("b", "1", has_actions=True), record("c", "1", video="other")]
    kept = without_duplicates(copies, DuplicateConfig())
    assert [len(one.clips) for one in kept] == [0, 1, 1]
    (rejection,) = kept[0].rejected
    assert (rejection.reason, rejection.detail, rejection.clip_index) == ("duplicate", "duplicate_of b/1", 0)
    assert all(one.found == len(one.clips) + len(one.rejected) for one in kept)
    assert without_duplicates(copies, DuplicateConfig(exact=False)) == copies


def test_near_copies_go_only_where_that_is_asked_for():
    near = "0" * 63 + "f"
    clips = [record("a", "1", phashes=("0" * 64, "f" * 64)), record("b", "1", video="b", phashes=(near,))]
    assert without_duplicates(clips, DuplicateConfig()) == clips
    kept = without_duplicates(clips, DuplicateConfig(near=0.02))
    assert [len(one.clips) for one in kept] == [2, 0]
    (rejection,) = kept[1].rejected
    detail = "duplicate_of a10 (0.016 of the bits differ, near 0.02)"
    assert (rejection.reason, rejection.detail) == ("near_duplicate", detail)


WORST_FIRST = (
    {"resolution": 64},
    {"resolution": 1080},
    {"resolution": 64, "has_instruction": True},
    {"resolution": 128, "has_instruction": True},
    {"resolution": 64, "has_actions": True},
    {"resolution": 64, "has_actions": True, "has_instruction": True},
)


@pytest.mark.parametrize("worse", range(len(WORST_FIRST) - 1))
def test_the_better_copy_stays_by_whatever_the_two_are_alike(worse):
    """Keys speak for the worse one, so that quality alone can save the better."""
    clips = [record("a", "1", video="a", **WORST_FIRST[worse]), record("b", "1", video="b", **WORST_FIRST[worse + 1])]
    copies = [one.model_copy(update={"video_sha256": "a"}) for one in clips]
    near = DuplicateConfig(near=0.0, compare="all")
    semantic = DuplicateConfig(semantic=SemanticConfig(clip="clip"), compare="all")
    meaning = np.eye(4, dtype=np.float32)[0]
    for kept in (
        without_duplicates(copies, DuplicateConfig()),
        without_duplicates(clips, near),
        without_semantic_duplicates(clips, {"a10": meaning, "b10": meaning}, semantic),
    ):
        assert [len(one.clips) for one in kept] == [0, 1]


def test_what_means_the_same_goes_last():
    """Three clips of one meaning: an exact copy is named so, and of the others the one with actions stays."""
    clips = [
        record("a", "1"),
        record("b", "1"),
        record("c", "1", video="c", has_actions=True),
        record("d", "1", video="d"),
    ]
    meaning, other = np.eye(4, dtype=np.float32)[:2]
    embeddings = {"a10": meaning, "b10": meaning, "c10": meaning, "d10": other}
    config = DuplicateConfig(semantic=SemanticConfig(clip="clip"), compare="all")
    left = without_duplicates(clips, config)
    kept = without_semantic_duplicates(left, embeddings, config)
    assert [len(one.clips) for one in kept] == [0, 0, 1, 1]
    found = [(rejection.reason, rejection.detail) for one in kept for rejection in one.rejected]
    assert found == [
        ("semantic_duplicate", "duplicate_of c10 (cosine 1.000, min_cosine 0.97)"),
        ("duplicate", "duplicate_of a/1"),
    ]
    assert all(one.found == len(one.clips) + len(one.rejected) for one in kept)
    nothing = [one.model_copy(update={"clips": ()}) for one in clips]
    assert without_semantic_duplicates(nothing, {}, config) == nothing


def test_robots_are_compared_exactly_only_unless_one_asks_for_more():
    """Their episodes look alike, and each is worth learning from."""
    near, meaning = "0" * 63 + "1", np.ones(4, dtype=np.float32) / 2
    clips = [
        record("a", "1", video="a", has_actions=True),
        record("b", "1", video="b", has_actions=True, phashes=[near]),
    ]
    embeddings = {"a10": meaning, "b10": meaning}
    for compare, num_left in (("without_actions", [1, 1]), ("all", [1, 0])):
        config = DuplicateConfig(near=0.02, semantic=SemanticConfig(clip="clip"), compare=compare)
        assert [len(one.clips) for one in without_duplicates(clips, config)] == num_left
        assert [len(one.clips) for one in without_semantic_duplicates(clips, embeddings, config)] == num_left
