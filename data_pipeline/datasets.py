"""Several datasets read as one.

Each keeps its folder, its shards and its size of clips. What a model takes for granted has to be the same in all: the
encoders (latents of two codecs mean different things, and nothing but bad pictures would show it), frames and actions
per second, and the layout of a robot that several of them have.

A robot of one name is one robot. Its actions are scaled by one set of statistics, merged from all datasets: the same
motion is then the same number wherever it was recorded, and an export holds all that is needed to use the model.
"""

import json
import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any, Self

import numpy as np

from configs.loader import UserError, dump_config

from .dataset import (
    DATASET_YAML,
    MANIFEST,
    NORM_STATS,
    CodecInfo,
    Counts,
    DatasetDescription,
    DatasetInfo,
    TextEncoderInfo,
)
from .dataset_index import DatasetIndex
from .embodiments import Embodiment
from .encoders import PixelCodec
from .model_inputs import InputConfig, ModelInputs
from .normalize import merge_stats
from .storage import Address, StorageConfig

logger = logging.getLogger(__name__)


class Datasets(DatasetDescription):
    """Datasets by name; a single one may go without, as "". Positions of samples count through all, in their order."""

    def __init__(self, by_name: Mapping[str, DatasetIndex]) -> None:
        self.by_name = dict(by_name)
        self._all = list(by_name.values())
        for one, other in combinations(self._all, 2):
            _check_same_build(one, other)
            _check_same_robots(one, other)
        super().__init__(_merged_info(self.by_name), _merged_stats(self._all))
        self._starts = [0, *accumulate(map(len, self._all))]

    @classmethod
    def open(cls, addresses: Mapping[str, Address], storage: StorageConfig | None = None) -> Self:
        return cls({name: DatasetIndex(address, storage) for name, address in addresses.items()})

    def __str__(self) -> str:
        return " and ".join(map(str, self._all))

    @property
    def first(self) -> DatasetIndex:
        """The one to ask where it is the same in all."""
        return self._all[0]

    def files(self) -> dict[str, str]:
        """The description and the statistics, by file name, as a dataset folder has them."""
        return {DATASET_YAML: dump_config(self.info), NORM_STATS: json.dumps(self.norm_stats, indent=1) + "\n"}

    def inputs(self, config: InputConfig) -> "MixedInputs":
        """What a model that is fed by `config` sees of each; the views are the first dataset's first where none is
        named."""
        views = tuple(self.first.check_view(view) for view in config.views or (None,))
        for dataset in self._all:
            if not set(views) <= dataset.views.keys():
                raise UserError(
                    f"loader.views: {', '.join(views)} of {self.first} are read, but the views of {dataset} are "
                    f"{', '.join(dataset.views)}; choose views that both have, or build one again with the other's."
                )
        return MixedInputs(self, config.model_copy(update={"views": views}))

    def starts(self) -> dict[str, int]:
        """Where the positions of each dataset's samples begin."""
        return dict(zip(self.by_name, self._starts, strict=False))

    def __len__(self) -> int:
        return self._starts[-1]

    def warn_of_small_cache(self, window_shards: int) -> None:
        """What is read in turns should fit: a block that goes and comes again is a long read for a short sample."""
        kept = min(dataset.files.max_kept for dataset in self._all)
        remote = [dataset for dataset in self._all if dataset.files.max_kept < math.inf]
        window = sum(dataset.largest_shards(window_shards) for dataset in remote)
        if window > kept:
            logger.warning(
                "%s: loader.shuffle.window_shards=%d shards are %.3g GB, but loader.storage.cache_gb=%.3g: much will "
                "be fetched several times; raise the one or lower the other",
                *(" and ".join(map(str, remote)), window_shards, window / 2**30, kept / 2**30),
            )

    def check_shards(self, max_bad_fraction: float) -> None:
        """A shard that is missing is told before training, not when the first of its samples comes up."""
        for dataset in self._all:
            missing = dataset.missing_shards()
            if not missing:
                continue
            more = f" and {len(missing) - 1} other shard(s)" if missing[1:] else ""
            problem = f"{dataset}/{missing[0]}{more}: missing, but {MANIFEST} names samples in it"
            if not max_bad_fraction:
                raise UserError(
                    f"{problem}; restore it or build the dataset again, or set loader.max_bad_fraction to the share of "
                    "samples that training may do without."
                )
            logger.warning("%s; they count as bad samples (loader.max_bad_fraction=%g)", problem, max_bad_fraction)

    def find(self, position: int) -> tuple[str, int]:
        """Which dataset a sample is of, and its position there."""
        number = bisect_right(self._starts, position) - 1
        return list(self.by_name)[number], position - self._starts[number]


class MixedInputs:
    """What a model sees of several datasets: `ModelInputs` of each."""

    def __init__(self, dataset: Datasets, config: InputConfig) -> None:
        self.dataset, self.config = dataset, config
        self.by_name = {name: ModelInputs(index, config) for name, index in dataset.by_name.items()}
        first, *others = self.by_name.values()
        for other in others:
            if config.layout != "single" and other.layout != first.layout:
                raise UserError(
                    f"loader.layout={config.layout} puts views of one size together, but {first.dataset} and "
                    f"{other.dataset} have them in several; build one again with the other's views, or read one view."
                )

    @property
    def each(self) -> tuple[ModelInputs, ...]:
        return tuple(self.by_name.values())

    def codec(self) -> PixelCodec:
        return self.each[0].codec()


# --- what has to be the same --------------------------------------------------------------------------------------


def _check_same_build(one: DatasetIndex, other: DatasetIndex) -> None:
    for what, (ours, theirs), next_move in (
        (
            "the video codec",
            (_named(one.info.codec), _named(other.info.codec)),
            "build them as one dataset of several sources, or all with one pretrained codec (an embedded one is fitted "
            "to each dataset)",
        ),
        (
            "the text encoder",
            (_named(one.info.text_encoder), _named(other.info.text_encoder)),
            "build both with the same text_encoder",
        ),
        ("fps", (one.fps, other.fps), f"build {other} again with fps={one.fps:g}"),
        (
            "actions_per_frame",
            (one.info.actions_per_frame, other.info.actions_per_frame),
            f"build {other} again with actions_per_frame={one.info.actions_per_frame}",
        ),
    ):
        if ours != theirs:
            raise UserError(f"loader.dataset: {what} is {ours} in {one}, but {theirs} in {other}; {next_move}.")


def _named(encoder: CodecInfo | TextEncoderInfo) -> str:
    return f"{encoder.name} {encoder.weight_hash[:12]}"


def _check_same_robots(one: DatasetIndex, other: DatasetIndex) -> None:
    for name in one.embodiments.keys() & other.embodiments.keys():
        ours, theirs = one.embodiments[name], other.embodiments[name]
        for field in sorted(Embodiment.model_fields.keys() - {"control_hz"}):  # of the recording: clips have their own
            here, there = getattr(ours, field), getattr(theirs, field)
            if here != there and None not in (here, there):  # None: the recording did not say
                raise UserError(
                    f"loader.dataset: both {one} and {other} have the robot {name}, but its {field} is {_shown(here)} "
                    f"in the one and {_shown(there)} in the other; if they are two robots, build one again "
                    "with another embodiment.name."
                )


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


# --- merged -------------------------------------------------------------------------------------------------------


def _merged_info(by_name: Mapping[str, DatasetIndex]) -> DatasetInfo:
    """As dataset.yaml has it; where clips differ (views, their size and length), the first dataset's."""
    infos = {name: dataset.info for name, dataset in by_name.items()}
    first = next(iter(infos.values()))
    if len(infos) == 1:
        return first
    robots: dict[str, Embodiment] = {}
    for info in infos.values():
        robots = info.embodiments | robots
    counts = {what: sum(getattr(info.counts, what) for info in infos.values()) for what in Counts.model_fields}
    return first.model_copy(
        update={
            "embodiments": robots,
            "captions": None,
            "counts": Counts(**counts),
            "sources": {
                f"{name}/{source}": one for name, info in infos.items() for source, one in info.sources.items()
            },
            "build": {name: info.build for name, info in infos.items()},
        }
    )


def _merged_stats(datasets: Sequence[DatasetIndex]) -> dict[str, Any]:
    """As norm_stats.json has it."""
    if len(datasets) == 1:
        return datasets[0].norm_stats
    by_robot: dict[str, list[dict[str, Any]]] = {}
    for dataset in datasets:
        for name, stats in dataset.norm_stats["embodiments"].items():
            by_robot.setdefault(name, []).append(stats)
    return {
        "embodiments": {
            name: {what: _merged([stats[what] for stats in parts]) for what in parts[0]}
            for name, parts in by_robot.items()
        },
        "latents": _merged_latents(datasets),
    }


def _merged(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """None where the robot reports no proprio."""
    known = [part for part in parts if part is not None]
    return merge_stats(known) if known else None


def _merged_latents(datasets: Sequence[DatasetIndex]) -> dict[str, list[float]]:
    """Per channel. Weighed by how many latents the training clips have; residuals are about zero on average."""
    shapes = [[dataset.latent_shape_of(view) for view in dataset.views] for dataset in datasets]
    num_clips = np.array([len(dataset.indices("train")) for dataset in datasets])
    all_cells = num_clips * [sum(t * h * w for t, _, h, w in views) for views in shapes]
    moved_cells = num_clips * [sum((t - 1) * h * w for t, _, h, w in views) for views in shapes]
    mean, std, residual_std = (
        np.array([dataset.norm_stats["latents"][what] for dataset in datasets])  # datasets x channels
        for what in ("mean", "std", "residual_std")
    )
    all_share = (all_cells / max(all_cells.sum(), 1))[:, None]
    moved_share = (moved_cells / max(moved_cells.sum(), 1))[:, None]
    center = (all_share * mean).sum(0)
    return {
        "mean": center.tolist(),
        "std": np.sqrt((all_share * (std**2 + (mean - center) ** 2)).sum(0)).tolist(),
        "residual_std": np.sqrt((moved_share * residual_std**2).sum(0)).tolist(),
    }
