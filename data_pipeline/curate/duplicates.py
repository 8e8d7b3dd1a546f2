"""Which of several alike recordings or clips to keep: exact copies, near copies, and ones that mean the same.

Every function takes what is to be compared by key and returns what to drop: rejected key -> the key that it is a
duplicate of. Of several alike the one of the highest quality stays, then the one with the smallest key. So the result
depends on nothing else: not on the order of the input, nor on how many workers made it.

A robot's episodes look alike: of a fixed camera's, clips of different episodes are often as close as copies. So those
are compared exactly only, unless one asks for more.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt64
from pydantic import Field, PositiveInt

from configs.loader import StrictConfig, UserError

from ..encoder_config import CLIP_FOLDER
from ..staging import EpisodeRecord, Rejection

SEED = 0
NEAR_TO_TRY = 0.03
"""The share of a perceptual hash's bits to begin with."""

CLUSTER_SIZE = 1000
"""Embeddings per cluster, on average; only those of one cluster are compared."""


class SemanticConfig(StrictConfig):
    """How clips are compared by what they mean: by CLIP's embeddings of a few frames of every view."""

    clip: Path = Field(description=CLIP_FOLDER)
    min_cosine: float = Field(
        0.97,
        ge=0,
        lt=1,
        description="reject clips whose embedding has a larger cosine to that of one that stays; rejected.parquet "
        "says which cosine each has",
    )
    frames: PositiveInt = Field(3, description="frames per view that are looked at, evenly spaced")


class DuplicateConfig(StrictConfig):
    """What counts as a duplicate: exact copies of whole recordings, near copies of clips, clips that mean the same."""

    exact: bool = Field(
        True, description="reject recordings whose compressed video is that of another, in whatever container"
    )
    near: float | None = Field(
        None,
        ge=0,
        le=0.25,
        description="reject clips whose perceptual hashes differ in no larger share of bits; "
        f"try {NEAR_TO_TRY}; null: keep them",
    )
    semantic: SemanticConfig | None = Field(
        None,
        description="reject clips that mean the same, by a CLIP on this machine (extra `similarity`); null: keep them",
    )
    compare: Literal["without_actions", "all"] = Field(
        "without_actions",
        description="which clips `near` and `semantic` compare; a robot's episodes look alike and are left alone, "
        "unless you say all",
    )
    leak: float = Field(
        0.0,
        ge=0,
        le=0.25,
        description="warn of training and validation clips whose perceptual hashes differ in no larger share of bits",
    )


Quality = Mapping[str, tuple[float, ...]]
"""Higher is better, compared number by number; a key that is absent is the worst."""


def exact_duplicates(hashes: Mapping[str, str], quality: Quality | None = None) -> dict[str, str]:
    """Keys whose hash another one has."""
    kept: dict[str, str] = {}
    rejected: dict[str, str] = {}
    for key in _best_first(hashes, quality):
        first = kept.setdefault(hashes[key], key)
        if first != key:
            rejected[key] = first
    return rejected


def without_duplicates(records: Sequence[EpisodeRecord], config: DuplicateConfig) -> list[EpisodeRecord]:
    """The records, their exact and near copies rejected. Of two alike, the better one stays (`_quality`).

    What only means the same is for `without_semantic_duplicates`, among what this leaves.
    """
    if config.exact:
        quality = {_name(record): _quality(record) for record in records}
        hashes = {_name(one): one.video_sha256 or one.content_sha256 or "" for one in records if one.clips}
        copies = exact_duplicates(hashes, quality)
        of_clips = {clip.key: copies[_name(one)] for one in records if _name(one) in copies for clip in one.clips}
        records = [_reject(one, "duplicate", of_clips) for one in records]
    if config.near is not None:
        compared = compared_records(records, config)
        phashes = {clip.key: clip.phash for record in compared for clip in record.clips}
        close = near_duplicates(phashes, config.near, _clip_quality(compared))
        details = {
            key: f"{other} ({_differing_share(phashes[key], phashes[other]):.3f} of the bits differ, near "
            f"{config.near:g})"
            for key, other in close.items()
        }
        records = [_reject(one, "near_duplicate", details) for one in records]
    return list(records)


def compared_records(records: Iterable[EpisodeRecord], config: DuplicateConfig) -> list[EpisodeRecord]:
    """Those whose clips may be near or semantic duplicates."""
    return [one for one in records if config.compare == "all" or not one.has_actions]


def without_semantic_duplicates(
    records: Sequence[EpisodeRecord], embeddings: Mapping[str, Float32[np.ndarray, "d"]], config: DuplicateConfig
) -> list[EpisodeRecord]:
    """The same for clips that mean the same; `embeddings` by key, of all clips that are compared and perhaps others."""
    quality = _clip_quality(compared_records(records, config))
    if not quality or config.semantic is None:
        return list(records)
    min_cosine = config.semantic.min_cosine
    vectors = np.stack([embeddings[key] for key in quality])
    alike = semantic_duplicates(list(quality), vectors, min_cosine, quality)
    details = {
        key: f"{other} (cosine {float(embeddings[key] @ embeddings[other]):.3f}, min_cosine {min_cosine:g})"
        for key, other in alike.items()
    }
    return [_reject(one, "semantic_duplicate", details) for one in records]


def _quality(record: EpisodeRecord) -> tuple[float, ...]:
    """Actions first, for nothing else gives them back; then an instruction; then pixels."""
    return (record.has_actions, record.has_instruction, record.resolution)


def _clip_quality(records: Iterable[EpisodeRecord]) -> dict[str, tuple[float, ...]]:
    return {clip.key: _quality(record) for record in records for clip in record.clips}


def _name(record: EpisodeRecord) -> str:
    return f"{record.source}/{record.episode}"


def _reject(record: EpisodeRecord, reason: str, duplicate_of: Mapping[str, str]) -> EpisodeRecord:
    rejected = tuple(
        Rejection(
            where=f"{_name(record)}: clip {clip.clip_index}",
            reason=reason,
            detail=f"duplicate_of {duplicate_of[clip.key]}",
            clip_index=clip.clip_index,
        )
        for clip in record.clips
        if clip.key in duplicate_of
    )
    kept = tuple(clip for clip in record.clips if clip.key not in duplicate_of)
    return record.model_copy(update={"clips": kept, "rejected": (*record.rejected, *rejected)})


# --- near ---------------------------------------------------------------------------------------------------------


def near_duplicates(phashes: Mapping[str, str], max_share: float, quality: Quality | None = None) -> dict[str, str]:
    """Keys whose perceptual hash (hexadecimal, all of one length) is close to that of one that is kept.

    Two are close if at most `max_share` of their bits differ. No two that are kept are close.
    """
    index = _HashIndex(phashes.values(), max_share)
    rejected: dict[str, str] = {}
    for key in _best_first(phashes, quality):
        nearest = index.find(phashes[key])
        if nearest:
            rejected[key] = nearest[0].key
        else:
            index.add(key, phashes[key])
    return rejected


@dataclass(frozen=True, order=True)
class Leak:
    """A validation clip that training has as good as seen."""

    validation: str
    train: str
    differing_bits: int


def find_leaks(train: Mapping[str, str], validation: Mapping[str, str], max_share: float) -> list[Leak]:
    """All pairs of training and validation clips with close perceptual hashes, sorted."""
    index = _HashIndex([*train.values(), *validation.values()], max_share)
    for key, phash in train.items():
        index.add(key, phash)
    return sorted(
        Leak(key, found.key, found.differing_bits) for key, phash in validation.items() for found in index.find(phash)
    )


def leaks_sentence(leaks: Sequence[Leak], config: DuplicateConfig) -> str:
    """What they are, and the settings that would have rejected all of them."""
    first = leaks[0]
    pairs = "pair" if len(leaks) == 1 else "pairs"
    for_robots = "" if config.compare == "all" else ", where robots are among them with duplicates.compare=all,"
    return (
        f"{len(leaks)} {pairs} of a training and a validation clip look alike, such as {first.train} and "
        f"{first.validation} ({first.differing_bits} bits of their hashes differ); set duplicates.near="
        f"{max(config.leak, NEAR_TO_TRY):g}{for_robots} to reject copies, or expect validation to look too good."
    )


@dataclass(frozen=True)
class _Found:
    differing_bits: int
    key: str


class _HashIndex:
    """Hashes by their bands: two that differ in at most n bits agree in at least one of n + 1 bands."""

    def __init__(self, phashes: Iterable[str], max_share: float) -> None:
        lengths = {len(phash) for phash in phashes}
        if len(lengths) > 1:
            raise ValueError(f"perceptual hashes of {sorted(lengths)} hexadecimal digits cannot be compared")
        self._num_bits = 4 * max(lengths, default=0)
        self.max_bits = int(max_share * self._num_bits)
        self._edges = np.linspace(0, self._num_bits, self.max_bits + 2).round().astype(int)
        self._bands: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self._keys: list[str] = []
        self._words: list[UInt64[np.ndarray, "w"]] = []

    def add(self, key: str, phash: str) -> None:
        for band in self._bands_of(phash):
            self._bands[band].append(len(self._keys))
        self._keys.append(key)
        self._words.append(_words(phash))

    def find(self, phash: str) -> list[_Found]:
        """What was added and is close, the closest first; of equally close ones the first added."""
        candidates = sorted({row for band in self._bands_of(phash) for row in self._bands.get(band, ())})
        if not candidates:
            return []
        differing = np.bitwise_count(np.stack([self._words[row] for row in candidates]) ^ _words(phash)).sum(axis=1)
        close = [(int(bits), row) for bits, row in zip(differing, candidates, strict=True) if bits <= self.max_bits]
        return [_Found(bits, self._keys[row]) for bits, row in sorted(close)]

    def _bands_of(self, phash: str) -> list[tuple[int, int]]:
        value = int(phash, 16)
        return [
            (band, value >> int(first) & (1 << int(end - first)) - 1)
            for band, (first, end) in enumerate(zip(self._edges, self._edges[1:], strict=False))
        ]


def _differing_share(one: str, other: str) -> float:
    return (int(one, 16) ^ int(other, 16)).bit_count() / (4 * len(one))


def _words(phash: str) -> UInt64[np.ndarray, "w"]:
    digits = -len(phash) % 16 * "0" + phash
    return np.frombuffer(bytes.fromhex(digits), dtype=np.uint64)


# --- semantic -----------------------------------------------------------------------------------------------------


def semantic_duplicates(
    keys: Sequence[str],
    embeddings: Float32[np.ndarray, "n d"],
    min_cosine: float,
    quality: Quality | None = None,
    cluster_size: int = CLUSTER_SIZE,
) -> dict[str, str]:
    """Keys whose embedding has a cosine above `min_cosine` to that of one that is kept, in the same cluster.

    As SemDeDup (https://arxiv.org/abs/2303.09540): k-means first, so that not all pairs are compared. A pair that the
    border of two clusters parts is missed; below `2 * cluster_size` embeddings there is one cluster and none is.
    """
    if len(set(keys)) != len(keys) or embeddings.shape[0] != len(keys):
        raise ValueError(f"{len(set(keys))} different keys of {len(keys)} for {embeddings.shape[0]} embeddings")
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings hold numbers that are not finite")
    by_key = np.argsort(np.asarray(keys, dtype=np.str_))  # k-means depends on the order
    vectors = np.ascontiguousarray(embeddings[by_key], dtype=np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    clusters = _clusters(vectors, cluster_size)
    place = {keys[row]: number for number, row in enumerate(by_key)}
    members: defaultdict[int, list[str]] = defaultdict(list)
    for key in _best_first(place, quality):
        members[int(clusters[place[key]])].append(key)
    rejected: dict[str, str] = {}
    for cluster in sorted(members):
        rows = np.asarray([place[key] for key in members[cluster]])
        rejected |= _too_similar(members[cluster], vectors[rows], min_cosine)
    return rejected


def _too_similar(keys: Sequence[str], vectors: Float32[np.ndarray, "n d"], min_cosine: float) -> dict[str, str]:
    """Of keys in the order of preference: those too similar to an earlier one that is kept, the most similar."""
    kept_keys: list[str] = []
    kept_vectors = np.empty_like(vectors)
    rejected: dict[str, str] = {}
    for key, vector in zip(keys, vectors, strict=True):
        # `einsum` works on one thread: a product's sums on another number of threads are taken in another order.
        cosines = np.einsum("nd,d->n", kept_vectors[: len(kept_keys)], vector)
        if len(cosines) and float(cosines.max()) > min_cosine:
            rejected[key] = kept_keys[int(cosines.argmax())]
        else:
            kept_vectors[len(kept_keys)] = vector
            kept_keys.append(key)
    return rejected


def _clusters(vectors: Float32[np.ndarray, "n d"], cluster_size: int) -> Int64[np.ndarray, "n"]:
    num_clusters = len(vectors) // cluster_size
    if num_clusters < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    faiss = import_faiss()
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums on another number of threads are taken in another order
    try:
        kmeans = faiss.Kmeans(vectors.shape[1], num_clusters, seed=SEED, spherical=True, min_points_per_centroid=1)
        kmeans.train(vectors)
        return kmeans.index.search(vectors, 1)[1][:, 0]
    finally:
        faiss.omp_set_num_threads(num_threads)


def import_faiss() -> Any:
    """UserError where it is not installed."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # each build of it that this processor cannot run
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "Comparing embeddings needs faiss: pip install 'foresight-wam[similarity]', or leave duplicates.semantic "
            "null."
        ) from error
    return faiss


def _best_first(keys: Iterable[str], quality: Quality | None) -> list[str]:
    by_key = sorted(keys)  # and of one quality they stay so, in reverse too
    return sorted(by_key, key=lambda key: (quality or {}).get(key, ()), reverse=True)
