"""Shards -> batches.

Which samples form global batch k is a pure function of (number of samples, global batch size, seed, k): the number of
ranks, of workers and of prefetched batches never enters it. So a run resumes at any step by asking for that step, on
any number of ranks that divides the batch, and epochs are exact: each sample comes once before any comes twice.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, PositiveInt
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.loader import StrictConfig, UserError

from .align import spans_mask
from .dataset import MANIFEST, MANIFEST_SCHEMA, DatasetFolder, Split, read_table
from .normalize import NormalizationMode
from .sample import SampleMeta, read_array, read_tensor
from .shards import ShardError, ShardReader, read_records
from .video_io import VideoError, decode_clip

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


class LoaderConfig(InputConfig):
    """How a dataset is read in training."""

    dataset: Path = Field(description="The dataset folder that `data_pipeline.build` wrote.")
    split: Split = "train"
    global_batch_size: PositiveInt = Field(64, description="Samples per step over all ranks.")
    seed: int = Field(0, ge=0, description="Of the sample order.")
    only_with_actions: bool = Field(False, description="Leave out action-free clips.")
    load_video: bool = Field(False, description="Also decode the pixels.")
    num_workers: int = Field(0, ge=0, description="Reading processes per rank; 0: read in the training process.")
    prefetch_factor: PositiveInt = Field(2, description="Batches that each worker reads ahead.")
    check_sha256: bool = Field(False, description="Compare each sample read with the manifest's checksum.")

    @property
    def inputs(self) -> InputConfig:
        return InputConfig(**{name: getattr(self, name) for name in InputConfig.model_fields})


# --- sample order -------------------------------------------------------------------------------------------------


def global_batch_indices(num_samples: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of global batch `step`: int64 [global_batch_size].

    Epoch after epoch, each a permutation of its own, forms one endless sequence, and batch k is its k-th piece: a batch
    may end one epoch and begin the next, and nothing is dropped.
    """
    if num_samples < 1:
        raise ValueError("there are no samples to draw from")
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, within = positions // num_samples, positions % num_samples
    parts = [_permutation(num_samples, seed, int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Raw bits of a bit generator are the same in every numpy version; `Generator.permutation` is not promised to be.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


# --- random access ------------------------------------------------------------------------------------------------


class DatasetIndex(DatasetFolder):
    """A dataset opened for reading: what it holds, and any sample of it by position in the manifest."""

    def __init__(self, dataset: Path) -> None:
        super().__init__(dataset)
        self.manifest = read_table(self.path / MANIFEST, MANIFEST_SCHEMA).unify_dictionaries().combine_chunks()
        # Plain arrays: a million Python rows would take a gigabyte, and a lookup in Arrow a microsecond too many.
        self._shard_of = self.manifest["shard"].combine_chunks().indices.to_numpy()
        self._shards: list[str] = self.manifest["shard"].combine_chunks().dictionary.to_pylist()
        self._offsets = self.manifest["offset"].to_numpy()
        self._num_bytes = self.manifest["bytes"].to_numpy()
        self._reader = ShardReader(self.path)

    def __len__(self) -> int:
        return len(self._offsets)

    def indices(self, split: Split | None = None, *, only_with_actions: bool = False) -> np.ndarray:
        """Positions in the manifest, in its order."""
        mask = np.ones(len(self), dtype=bool)
        if split is not None:
            mask &= pc.equal(self.manifest["split"].cast(pa.string()), split).to_numpy()
        if only_with_actions:
            mask &= self.manifest["has_actions"].to_numpy()
        return np.flatnonzero(mask)

    def key(self, i: int) -> str:
        return self.manifest["key"][int(i)].as_py()

    def row(self, i: int) -> dict[str, Any]:
        return self.manifest.slice(int(i), 1).to_pylist()[0]

    def read_sample(self, i: int, *, check_sha256: bool = False) -> dict[str, Any]:
        """The members of sample i: `__key__`, and bytes by suffix (see `sample.py`)."""
        shard = self._shards[self._shard_of[i]]
        try:
            records = self._reader.read(shard, int(self._offsets[i]), int(self._num_bytes[i]))
            if check_sha256:
                self._check_sha256(i, records)
            members = read_records(records)
            if members["__key__"] != self.key(i):
                raise ShardError(f"holds sample {members['__key__']} in its place")
        except ShardError as error:
            raise self.damaged(i, str(error)) from error
        return members

    def _check_sha256(self, i: int, records: bytes) -> None:
        if hashlib.sha256(records).hexdigest() != self.manifest["sha256"][int(i)].as_py():
            raise ShardError("holds other bytes than its checksum promises")

    def damaged(self, i: int, what: str) -> UserError:
        """The one sentence for a sample that cannot be used."""
        shard = self._shards[self._shard_of[i]]
        return UserError(
            f"{self.path / shard}: sample {self.key(i)}: the shard {what}; list everything that is damaged with "
            f"`python -m data_pipeline.verify {self.path}`, then restore the shard or build the dataset again."
        )


# --- batches ------------------------------------------------------------------------------------------------------


class Loader:
    """Endless batches from `start_step` on; rank r of n gets the r-th of n equal parts of each global batch."""

    def __init__(
        self, index: DatasetIndex, config: LoaderConfig, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> None:
        if config.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size={config.global_batch_size} cannot be shared equally by {world_size} ranks; "
                f"choose a multiple of {world_size}."
            )
        indices = index.indices(config.split, only_with_actions=config.only_with_actions)
        if not len(indices):
            kind = "action-labelled samples" if config.only_with_actions else "samples"
            raise UserError(f"{index.path}: split {config.split} holds no {kind}; use another split or dataset.")
        _check_one_bucket(index, indices)
        self.index, self.config = index, config
        self.num_samples = len(indices)
        self.clips = ClipDataset(index, indices, config)
        self.batches = BatchSampler(
            self.num_samples, config.global_batch_size, config.seed, rank, world_size, start_step
        )

    @property
    def steps_per_epoch(self) -> float:
        return self.num_samples / self.config.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        workers = self.config.num_workers
        batches = DataLoader(
            self.clips,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
        )
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class BatchSampler(Sampler[list[int]]):
    """This rank's part of global batch `start_step`, `start_step + 1`, …"""

    def __init__(
        self, num_samples: int, global_batch_size: int, seed: int, rank: int, world_size: int, start_step: int
    ) -> None:
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self.start_step = start_step
        share = global_batch_size // world_size
        self.slice = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield global_batch_indices(self.num_samples, self.global_batch_size, self.seed, step)[self.slice].tolist()
            step += 1


class ClipDataset(Dataset[Batch]):
    """Map-style access to the chosen samples, as tensors."""

    def __init__(self, index: DatasetIndex, indices: np.ndarray, config: LoaderConfig) -> None:
        self.index, self.indices, self.config = index, indices, config
        self.view = index.check_view(config.view)
        mode = config.normalization
        self.normalizers = {
            name: (index.normalizer(name, "actions_absolute", mode), index.normalizer(name, "proprio", mode))
            for name in index.embodiments
        }

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> list[Batch] | UserError:
        # An error is handed over as a value: raised in a worker process, torch would bury its sentence in a traceback.
        try:
            return [self[position] for position in positions]
        except UserError as error:
            return error

    def __getitem__(self, position: int) -> Batch:
        i = int(self.indices[position])
        members = self.index.read_sample(i, check_sha256=self.config.check_sha256)
        try:
            return self._tensors(members)
        except (KeyError, ValueError, RuntimeError, VideoError) as error:
            raise self.index.damaged(i, f"holds a member that cannot be read ({error})") from error

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


def collate(clips: list[Batch] | UserError) -> Batch | UserError:
    if isinstance(clips, UserError):
        return clips
    batch: Batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0] if name != "keys"}
    batch["latents"] = batch["latents"].float()
    batch["keys"] = [clip["keys"] for clip in clips]
    return batch


def _check_one_bucket(index: DatasetIndex, indices: np.ndarray) -> None:
    buckets = pc.unique(index.manifest["bucket"].take(pa.array(indices)).cast(pa.string())).to_pylist()
    if len(buckets) > 1:
        raise UserError(
            f"{index.path}: holds several sizes of clips ({', '.join(buckets)}); build one dataset for each."
        )
