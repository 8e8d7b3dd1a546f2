"""Which samples of which datasets form which global batches, and what that follows from.

A run that goes on finds the same order, or is refused.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from configs.loader import UserError

from .clips import ClipConfig, augmentation_of
from .dataset import Split
from .datasets import Datasets
from .mixture import MixtureConfig, check_names, group_samples, named_samples, step_without_samples
from .sample_order import Cursor, SampleOrder, ShuffleConfig, Stream, Weight
from .storage import Address, StorageConfig

logger = logging.getLogger(__name__)

DATASET_NAME = re.compile(r"[A-Za-z0-9_-]+")

MAX_BATCH = 2**20
"""Samples of a global batch: more are a slip of the keyboard."""


class PlanConfig(ClipConfig):
    """Which samples of which datasets form the global batches."""

    dataset: Address | dict[str, Address] = Field(
        description="The dataset folder that `data_pipeline.build` wrote, or the s3://, gs://, hf:// or http(s):// "
        "address of a copy; several as {name: folder, …}."
    )
    storage: StorageConfig = StorageConfig()
    split: Split = "train"
    global_batch_size: PositiveInt = Field(64, le=MAX_BATCH, description="Samples per step over all ranks.")
    latent_cells_per_batch: PositiveInt | None = Field(
        None,
        description="Instead of global_batch_size, where clips have several sizes: frames x rows x columns of latents "
        "per step over all ranks, before the model's patches; each size of clip gets as many samples as fit.",
    )
    batch_multiple: PositiveInt = Field(
        8,
        le=MAX_BATCH,
        description="With latent_cells_per_batch: samples are rounded down to a multiple of this, so that ranks x "
        "grad_accum_steps divides them; choose it for every number of ranks that the run may go on with.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the sample order.")
    shuffle: ShuffleConfig = ShuffleConfig()
    mixture: MixtureConfig | None = Field(None, description="null: every sample as often as every other.")
    only_with_actions: bool = Field(False, description="Leave out action-free clips.")

    @field_validator("dataset")
    @classmethod
    def _has_names(cls, dataset: Address | dict[str, Address]) -> Address | dict[str, Address]:
        if dataset == {}:
            raise ValueError("names no dataset; write a folder, or {name: folder, …}")
        for name in dataset if isinstance(dataset, dict) else ():
            if not DATASET_NAME.fullmatch(name):
                raise ValueError(f"has the name {name!r}; letters, digits, _ and - only")
        return dataset

    @property
    def addresses(self) -> dict[str, Address]:
        """The datasets by name; "" is that of one without."""
        return self.dataset if isinstance(self.dataset, dict) else {"": self.dataset}


@dataclass(frozen=True)
class SamplePlan:
    """The order of samples, where they lie, and what both follow from."""

    order: SampleOrder
    positions: list[np.ndarray]  # of each stream's samples in the datasets, as they lie in the shards
    identity: dict[str, str]  # setting -> what it was when the run was started; of a dataset, its digest


def plan_samples(datasets: Datasets, config: PlanConfig, *, may_lack: bool = False) -> SamplePlan | None:
    """`may_lack`: that the split holds none of what a name in the mixture stands for is no mistake; None: nothing."""
    samples = {
        name: dataset.indices(config.split, only_with_actions=config.only_with_actions)
        for name, dataset in datasets.by_name.items()
    }
    if not may_lack and not any(map(len, samples.values())):
        kind = "action-labelled samples" if config.only_with_actions else "samples"
        raise UserError(f"{datasets}: split {config.split} holds no {kind}; use another split or dataset.")
    groups, weights = _groups(datasets, config, samples, may_lack)
    if step_without_samples(weights) is not None:
        return None
    inputs, starts = datasets.inputs(config.inputs).by_name, datasets.starts()
    for one in inputs.values():
        augmentation_of(one, config)
    streams, positions = [], []
    for group, members in groups.items():
        for name, indices in members.items():
            dataset, bucket = datasets.by_name[name], inputs[name].bucket
            placed = dataset.by_place(indices)
            stream_name = "/".join(filter(None, (group, name, bucket)))
            streams.append(Stream(stream_name, group, bucket, dataset.shard_sizes(placed)))
            positions.append(starts[name] + placed)
    used = {stream.bucket for stream in streams}
    sizes = batch_sizes(config, {one.bucket: one.num_latent_cells for one in inputs.values() if one.bucket in used})
    order = SampleOrder(streams, weights, sizes, config.seed, config.shuffle)
    return SamplePlan(order, positions, _identity(datasets, config, sizes))


def _groups(
    datasets: Datasets, config: PlanConfig, samples: Mapping[str, np.ndarray], may_lack: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Weight]]:
    """Group -> dataset -> its samples, none of them empty, and the groups' weights."""
    mixture = config.mixture
    if mixture is None:
        members = {name: indices for name, indices in samples.items() if len(indices)}
        return ({"all": members}, {"all": 1.0}) if members else ({}, {})
    named = named_samples(datasets, mixture, samples)
    if not may_lack:
        check_names(mixture, named, datasets, config.split)
    groups = group_samples(mixture, named)
    left_out = [group for group, members in groups.items() if not members]
    if left_out:
        logger.info("split %s holds nothing of %s, which is left out there", config.split, ", ".join(left_out))
    groups = {group: members for group, members in groups.items() if members}
    return groups, {group: mixture.weights[group] for group in groups}


def batch_sizes(config: PlanConfig, cells: Mapping[str, int]) -> dict[str, int]:
    """Samples of a global batch of each size of clip, which has so many latent cells."""
    budget, multiple = config.latent_cells_per_batch, config.batch_multiple
    if budget is None:
        return dict.fromkeys(cells, config.global_batch_size)
    largest = max(cells, key=lambda bucket: cells[bucket])
    if budget < multiple * cells[largest]:
        raise UserError(
            f"loader.latent_cells_per_batch={budget} is less than {multiple} clips of {largest}, which have "
            f"{cells[largest]} latent cells each; set it to at least {multiple * cells[largest]}, or lower "
            "loader.batch_multiple."
        )
    sizes = {bucket: budget // (multiple * size) * multiple for bucket, size in cells.items()}
    most = max(sizes, key=lambda bucket: sizes[bucket])
    if sizes[most] > MAX_BATCH:
        raise UserError(
            f"loader.latent_cells_per_batch={budget} makes batches of {sizes[most]} clips of {most}, but "
            f"{MAX_BATCH} is the most; set it to at most {MAX_BATCH * cells[most]}."
        )
    return sizes


def _identity(datasets: Datasets, config: PlanConfig, batch_sizes: Mapping[str, int]) -> dict[str, str]:
    digests = {f"dataset.{name}".rstrip("."): dataset.digest for name, dataset in datasets.by_name.items()}
    for (one, digest), (other, same) in combinations(digests.items(), 2):
        if digest == same:
            raise UserError(f"loader: {one} and {other} hold the same samples; name them once, with a larger weight.")
    mixture = config.mixture and config.mixture.model_dump_json(exclude_defaults=True)
    return digests | {
        "split": config.split,
        "mixture": str(mixture),
        "only_with_actions": str(config.only_with_actions),
        "global_batch_size": json.dumps(batch_sizes),
        "seed": str(config.seed),
        "shuffle": config.shuffle.model_dump_json(exclude_defaults=True),
    }


def check_same_order(plan: SamplePlan, datasets: Datasets, cursor: Cursor) -> None:
    """Refuse to go on from a cursor that counts samples of another order."""
    if not cursor.order:
        return
    for setting in sorted(plan.identity.keys() | cursor.order.keys()):
        before, now = cursor.order.get(setting), plan.identity.get(setting)
        if before == now:
            continue
        dataset = datasets.by_name.get(setting.removeprefix("dataset").removeprefix("."))
        if before is None or now is None:
            change = f"was {'' if now is None else 'not '}there"
        else:
            change = f"{dataset} held other samples" if setting.startswith("dataset") else f"was {before}, not {now},"
        raise UserError(
            f"loader.{setting}: {change} when this run was started, so that step {cursor.step + 1} would go on in "
            "another order; put back what was there, or start a new run in another run_dir."
        )


def check_ranks(config: PlanConfig, batch_sizes: Mapping[str, int], num_ranks: int) -> None:
    for bucket, size in batch_sizes.items():
        if size % num_ranks == 0:
            continue
        what, next_move = f"global_batch_size={size}", f"choose a multiple of {num_ranks}"
        if config.latent_cells_per_batch is not None:
            what = f"{size} clips of {bucket}, which fit into latent_cells_per_batch={config.latent_cells_per_batch},"
            next_move = f"set loader.batch_multiple to a multiple of {num_ranks}"
        raise UserError(f"{what} cannot be shared equally by {num_ranks} ranks; {next_move}.")
