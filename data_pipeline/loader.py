"""Shards -> batches.

Which samples form global batch k is settled on paper (`sample_order`): the number of ranks, of workers and of batches
read ahead never enters it. After every batch the loader's cursor says where it stands; a run that stored it goes on
from there, on any number of ranks that divides the batch. A sample that cannot be used is replaced within its own
rank's part of the batch, so that nobody else notices.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator
from torch.utils.data import DataLoader

from configs.loader import StrictConfig, UserError
from configs.problems import suggest

from .augment import Place
from .clips import BadSample, Batch, ClipConfig, ClipDataset, collate_part
from .dataset import Split
from .dataset_index import DatasetIndex
from .sample_order import Cursor, SampleOrder, ShuffleConfig, Stream, weight_at
from .storage import Address, StorageConfig

logger = logging.getLogger(__name__)

MIN_READ_TO_STOP = 1000
"""Samples read before the share of bad ones says anything about those still to come."""

Weight = NonNegativeFloat | Annotated[dict[NonNegativeInt, NonNegativeFloat], Field(min_length=1)]


class MixtureConfig(StrictConfig):
    """What is drawn how often. What no name stands for is left out."""

    by: Literal["source", "embodiment"] = Field(
        "source", description="What the names name; the embodiment of clips without actions is `none`."
    )
    weights: dict[str, Weight] = Field(
        min_length=1,
        description="Name -> share of the samples, as a number or as {step: number, …} with straight lines between. "
        "A name with wildcards, such as bridge_*, is one group; of several that fit the first one counts.",
    )

    @field_validator("weights")
    @classmethod
    def _something_is_drawn(cls, weights: dict[str, Weight]) -> dict[str, Weight]:
        # Between two steps weights are mixed: they can be zero together only at a step that is named.
        steps = {step for weight in weights.values() if isinstance(weight, dict) for step in weight}
        for step in sorted(steps) or [0]:
            if not any(weight_at(weight, step) for weight in weights.values()):
                raise ValueError(f"at step {step} every weight is zero")
        return weights


class LoaderConfig(ClipConfig):
    """How a dataset is read in training."""

    dataset: Address = Field(
        description="The dataset folder that `data_pipeline.build` wrote, or the s3://, gs://, hf:// or http(s):// "
        "address of a copy."
    )
    storage: StorageConfig = StorageConfig()
    split: Split = "train"
    global_batch_size: PositiveInt = Field(64, description="Samples per step over all ranks.")
    seed: int = Field(0, ge=0, description="Of the sample order.")
    shuffle: ShuffleConfig = ShuffleConfig()
    mixture: MixtureConfig | None = Field(None, description="null: every sample as often as every other.")
    only_with_actions: bool = Field(False, description="Leave out action-free clips.")
    num_workers: int = Field(0, ge=0, description="Reading processes per rank; 0: read in the training process.")
    prefetch_factor: PositiveInt = Field(2, description="Batches that each worker reads ahead.")
    max_bad_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples read (at least 1000) that may be unusable: each is told, counted, and "
        "replaced by another of its batch; more stop the run. 0: the first one does.",
    )


# --- batches ------------------------------------------------------------------------------------------------------


class Loader:
    """Endless batches from the cursor on; rank r of n gets the r-th of n equal parts of each global batch."""

    def __init__(
        self,
        index: DatasetIndex,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
    ) -> None:
        if config.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size={config.global_batch_size} cannot be shared equally by {world_size} ranks; "
                f"choose a multiple of {world_size}."
            )
        self.index, self.config, self.rank, self.world_size = index, config, rank, world_size
        groups = _groups(index, config)
        bucket = _only_bucket(index, np.concatenate(list(groups.values())))
        self._positions = [index.by_place(positions) for positions in groups.values()]
        streams = [
            Stream(f"{name}/{bucket}", name, bucket, index.shard_sizes(positions))
            for name, positions in zip(groups, self._positions, strict=True)
        ]
        weights = config.mixture.weights if config.mixture else dict.fromkeys(groups, 1.0)
        self.order = SampleOrder(streams, weights, {bucket: config.global_batch_size}, config.seed, config.shuffle)
        self.cursor = cursor or Cursor()
        self.num_read = 0
        self.bad_samples: Counter[str] = Counter()  # reason -> number, on this rank since the start
        self.traffic: Counter[str] = Counter()  # requests and retries, likewise
        self.clips = ClipDataset(index, config)

    def epochs(self) -> dict[str, float]:
        """How often each source of the mixture has been gone through."""
        return self.order.epochs(self.cursor)

    def __iter__(self) -> Iterator[Batch]:
        """After each batch, `cursor` stands behind it, however far workers have read ahead."""
        ahead: deque[Cursor] = deque()
        workers = self.config.num_workers
        batches = DataLoader(
            self.clips,
            batch_sampler=_Parts(self, ahead),  # type: ignore[arg-type]  # any iterable of lists will do
            collate_fn=collate_part,  # type: ignore[arg-type]  # so will what `__getitems__` gives
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
        )
        for part in batches:
            if isinstance(part, UserError):
                raise part
            batch, bad, traffic = part
            self.num_read += len(batch["keys"])
            self.traffic += traffic
            self._count(bad)
            self.cursor = ahead.popleft()
            yield batch

    def _count(self, bad: list[BadSample]) -> None:
        for reason, sentence in bad:
            self.bad_samples[reason] += 1
            logger.warning("%s", sentence)
        allowed = self.config.max_bad_fraction
        num_bad = self.bad_samples.total()
        if bad and num_bad > allowed * max(self.num_read, MIN_READ_TO_STOP):
            raise UserError(
                f"{num_bad} of the {self.num_read} samples read cannot be used, more than "
                f"loader.max_bad_fraction={allowed:g} allows. {bad[-1][1]}"
                if allowed
                else bad[0][1]
            )


def _groups(index: DatasetIndex, config: LoaderConfig) -> dict[str, np.ndarray]:
    """What the mixture weighs: name -> its samples."""
    indices = index.indices(config.split, only_with_actions=config.only_with_actions)
    if not len(indices):
        kind = "action-labelled samples" if config.only_with_actions else "samples"
        raise UserError(f"{index.address}: split {config.split} holds no {kind}; use another split or dataset.")
    if config.mixture is None:
        return {"all": indices}
    names, name_of = index.column(config.mixture.by)
    patterns = list(config.mixture.weights)
    group_of = [
        next((i for i, pattern in enumerate(patterns) if fnmatchcase(name or "none", pattern)), -1) for name in names
    ]
    group_of_sample = np.asarray(group_of)[name_of[indices]]
    groups = {pattern: indices[group_of_sample == i] for i, pattern in enumerate(patterns)}
    for pattern, members in groups.items():
        if not len(members):
            known = [name or "none" for i, name in enumerate(names) if np.any(name_of[indices] == i)]
            raise UserError(
                f"loader.mixture.weights: no {config.mixture.by} of split {config.split} in {index.address} is called "
                f"{pattern!r}{suggest(pattern, known)}; there are: {', '.join(known)}."
            )
    return groups


class _Parts:
    """What this rank reads of each batch: positions in the manifest, and in training their places in the order.

    Cursors are noted as they are passed.
    """

    def __init__(self, loader: Loader, ahead: deque[Cursor]) -> None:
        self._loader, self._ahead = loader, ahead

    def __iter__(self) -> Iterator[list[tuple[int, Place | None]]]:
        loader, config, cursor = self._loader, self._loader.config, self._loader.cursor
        while True:
            step = cursor.step
            batch, cursor = loader.order.draw(cursor)
            self._ahead.append(cursor)
            part = batch.part(loader.rank, loader.world_size)
            first_row = loader.rank * len(part.sample)
            yield [
                (
                    int(loader._positions[stream][sample]),
                    (config.seed, step, first_row + row) if config.split == "train" else None,
                )
                for row, (stream, sample) in enumerate(zip(part.stream, part.sample, strict=True))
            ]


def _only_bucket(index: DatasetIndex, indices: np.ndarray) -> str:
    names, bucket_of = index.column("bucket")
    buckets = [str(names[i]) for i in np.unique(bucket_of[indices])]
    if len(buckets) > 1:
        raise UserError(
            f"{index.address}: holds several sizes of clips ({', '.join(buckets)}); build one dataset for each."
        )
    return buckets[0]
