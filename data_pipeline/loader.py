"""Shards -> batches.

Which samples form global batch k is settled on paper (`sample_order`): the number of ranks, of workers and of batches
read ahead never enters it. After every batch the loader's cursor says where it stands; a run that stored it goes on
from there, on any number of ranks that divides the batch. A sample that cannot be used is replaced within its own
rank's part of the batch, so that nobody else notices.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator
from torch.utils.data import DataLoader, Dataset

from configs.loader import StrictConfig, UserError
from configs.problems import suggest

from .align import spans_mask
from .dataset import Split
from .dataset_index import BadSampleError, DatasetIndex
from .normalize import NormalizationMode
from .sample import SampleMeta, read_array, read_tensor
from .sample_order import Cursor, SampleOrder, ShuffleConfig, Stream, weight_at
from .shards import ShardError
from .video_io import VideoError, decode_clip

logger = logging.getLogger(__name__)

MIN_READ_TO_STOP = 1000
"""Samples read before the share of bad ones says anything about those still to come."""

Batch = dict[str, Any]
"""Tensors of one rank's part of a global batch (dims: b batch, t latent frames, k actions, l text tokens, …):

    latents          float32 [b t c h w]
    text_tokens      float32 [b l d]      zero-padded; all zero where the clip has no text
    actions          float32 [b k a]      normalised per embodiment; zero where not valid; a and s are at least 1
    action_is_valid  bool    [b k a]      false: no action was recorded, or the robot has fewer dimensions
    has_actions      bool    [b]
    proprio          float32 [b s]        at the clip's first frame, normalised; zero where there is none
    video            uint8   [b f h w 3]  with `load_video`
    keys             list of b sample keys
"""


class InputConfig(StrictConfig):
    """What a model is fed; whoever uses the model later has to feed it the same."""

    view: str | None = Field(None, description="Which view's latents (and video); null: the dataset's first.")
    normalization: NormalizationMode = Field("quantile", description="Of actions and proprio, per embodiment.")
    text_length: PositiveInt = Field(32, description="Text tokens per sample: padded with zeros or cut to so many.")


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


class LoaderConfig(InputConfig):
    """How a dataset is read in training."""

    dataset: Path = Field(description="The dataset folder that `data_pipeline.build` wrote.")
    split: Split = "train"
    global_batch_size: PositiveInt = Field(64, description="Samples per step over all ranks.")
    seed: int = Field(0, ge=0, description="Of the sample order.")
    shuffle: ShuffleConfig = ShuffleConfig()
    mixture: MixtureConfig | None = Field(None, description="null: every sample as often as every other.")
    only_with_actions: bool = Field(False, description="Leave out action-free clips.")
    load_video: bool = Field(False, description="Also decode the pixels.")
    num_workers: int = Field(0, ge=0, description="Reading processes per rank; 0: read in the training process.")
    prefetch_factor: PositiveInt = Field(2, description="Batches that each worker reads ahead.")
    check_sha256: bool = Field(False, description="Compare each sample read with the manifest's checksum.")
    max_bad_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples read (at least 1000) that may be unusable: each is told, counted, and "
        "replaced by another of its batch; more stop the run. 0: the first one does.",
    )

    @property
    def inputs(self) -> InputConfig:
        return InputConfig(**{name: getattr(self, name) for name in InputConfig.model_fields})


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
            collate_fn=_collate_part,  # type: ignore[arg-type]  # so will what `__getitems__` gives
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
        )
        for part in batches:
            if isinstance(part, UserError):
                raise part
            batch, bad = part
            self.num_read += len(batch["keys"])
            self._count(bad)
            self.cursor = ahead.popleft()
            yield batch

    def _count(self, bad: "list[_Bad]") -> None:
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
        raise UserError(f"{index.path}: split {config.split} holds no {kind}; use another split or dataset.")
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
                f"loader.mixture.weights: no {config.mixture.by} of split {config.split} in {index.path} is called "
                f"{pattern!r}{suggest(pattern, known)}; there are: {', '.join(known)}."
            )
    return groups


class _Parts:
    """The positions in the manifest of this rank's part of each batch; cursors are noted as they are passed."""

    def __init__(self, loader: Loader, ahead: deque[Cursor]) -> None:
        self._loader, self._ahead = loader, ahead

    def __iter__(self) -> Iterator[list[int]]:
        loader, cursor = self._loader, self._loader.cursor
        while True:
            batch, cursor = loader.order.draw(cursor)
            self._ahead.append(cursor)
            part = batch.part(loader.rank, loader.world_size)
            yield [
                int(loader._positions[stream][sample]) for stream, sample in zip(part.stream, part.sample, strict=True)
            ]


_Bad = tuple[str, str]
"""Reason and sentence of a sample that cannot be used."""


class ClipDataset(Dataset[Batch]):
    """Samples as tensors, by position in the manifest."""

    def __init__(self, index: DatasetIndex, config: LoaderConfig) -> None:
        self.index, self.config = index, config
        self.view = index.check_view(config.view)
        mode = config.normalization
        self.normalizers = {
            name: (index.normalizer(name, "actions_absolute", mode), index.normalizer(name, "proprio", mode))
            for name in index.embodiments
        }

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, positions: Sequence[int]) -> "tuple[list[Batch], list[_Bad]] | UserError":
        """A part of a batch, in which the next good sample stands in for a bad one.

        Errors are handed over as values: raised in a worker process, torch would bury their sentence in a traceback.
        """
        clips: list[Batch | None] = []
        bad: list[_Bad] = []
        for position in positions:
            try:
                clips.append(self[position])
            except BadSampleError as error:
                clips.append(None)
                bad.append((error.reason, str(error)))
        good = [i for i, clip in enumerate(clips) if clip is not None]
        if not good:
            return UserError(f"None of the {len(clips)} samples of a batch's part can be used. {bad[0][1]}")
        stand_ins = [clips[next((i for i in good if i >= place), good[0])] for place in range(len(clips))]
        return [clip for clip in stand_ins if clip is not None], bad

    def __getitem__(self, position: int) -> Batch:
        members = self.index.read_sample(position, check_sha256=self.config.check_sha256)
        try:
            return self._tensors(members)
        except (KeyError, ValueError, RuntimeError, VideoError) as error:
            problem = ShardError(f"holds a member that cannot be read ({error})", "damaged_member")
            raise self.index.bad_sample(position, problem) from error

    def _tensors(self, members: dict[str, Any]) -> Batch:
        meta = SampleMeta.model_validate_json(members["meta.json"])
        actions, is_valid, proprio = self._control(members, meta)
        clip = {
            "latents": read_tensor("latents", members[f"{self.view}.latents.safetensors"]),
            "text_tokens": self._text(members),
            "actions": actions,
            "action_is_valid": is_valid,
            "has_actions": torch.tensor(meta.has_actions),
            "proprio": proprio,
            "keys": members["__key__"],
        }
        if self.config.load_video:
            clip["video"] = torch.from_numpy(decode_clip(members[f"{self.view}.mp4"]))
        return clip

    def _text(self, members: dict[str, Any]) -> torch.Tensor:
        padded = torch.zeros(self.config.text_length, self.index.info.text_encoder.width)
        if "text.safetensors" in members:
            text = read_tensor("text", members["text.safetensors"])[: self.config.text_length]
            padded[: len(text)] = text
        return padded

    def _control(self, members: dict[str, Any], meta: SampleMeta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = self.index
        # At least one number wide, so that no model needs a case for video without robots, or robots without proprio.
        actions = torch.zeros(index.num_actions, max(index.action_dim, 1))
        is_valid = torch.zeros(actions.shape, dtype=torch.bool)
        proprio = torch.zeros(max(index.proprio_dim, 1))
        if not meta.has_actions:
            return actions, is_valid, proprio
        assert meta.embodiment is not None
        normalize_actions, normalize_proprio = self.normalizers[meta.embodiment]
        rows = read_array(members["actions.npy"])
        row_is_valid = spans_mask(meta.action_spans, len(rows))
        if normalize_actions is not None:
            rows = normalize_actions.normalize(rows) * row_is_valid[:, None]
            actions[:, : rows.shape[1]] = torch.from_numpy(rows)
            is_valid[:, : rows.shape[1]] = torch.from_numpy(row_is_valid)[:, None]
        if normalize_proprio is not None:
            first = normalize_proprio.normalize(read_array(members["proprio.npy"])[0])
            proprio[: len(first)] = torch.from_numpy(first)
        return actions, is_valid, proprio


def collate(clips: list[Batch]) -> Batch:
    batch: Batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0] if name != "keys"}
    batch["latents"] = batch["latents"].float()
    batch["keys"] = [clip["keys"] for clip in clips]
    return batch


def _collate_part(part: "tuple[list[Batch], list[_Bad]] | UserError") -> "tuple[Batch, list[_Bad]] | UserError":
    return part if isinstance(part, UserError) else (collate(part[0]), part[1])


def _only_bucket(index: DatasetIndex, indices: np.ndarray) -> str:
    names, bucket_of = index.column("bucket")
    buckets = [str(names[i]) for i in np.unique(bucket_of[indices])]
    if len(buckets) > 1:
        raise UserError(
            f"{index.path}: holds several sizes of clips ({', '.join(buckets)}); build one dataset for each."
        )
    return buckets[0]
