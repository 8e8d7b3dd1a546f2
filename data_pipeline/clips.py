"""One clip -> tensors: what the members of a sample become, and how clips become a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch.utils.data import Dataset

from configs.loader import StrictConfig, UserError

from .align import spans_mask
from .dataset_index import BadSampleError, DatasetIndex
from .normalize import NormalizationMode
from .sample import SampleMeta, read_array, read_tensor
from .shards import ShardError
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


class ClipConfig(InputConfig):
    """How clips are read."""

    load_video: bool = Field(False, description="Also decode the pixels.")
    check_sha256: bool = Field(False, description="Compare each sample read with the manifest's checksum.")


BadSample = tuple[str, str]
"""Reason and sentence of a sample that cannot be used."""


class ClipDataset(Dataset[Batch]):
    """Samples as tensors, by position in the manifest."""

    def __init__(self, index: DatasetIndex, config: ClipConfig) -> None:
        self.index, self.config = index, config
        self.view = index.check_view(config.view)
        mode = config.normalization
        self.normalizers = {
            name: (index.normalizer(name, "actions_absolute", mode), index.normalizer(name, "proprio", mode))
            for name in index.embodiments
        }

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, positions: Sequence[int]) -> tuple[list[Batch], list[BadSample]] | UserError:
        """A part of a batch, in which the next good sample stands in for a bad one.

        Errors are handed over as values: raised in a worker process, torch would bury their sentence in a traceback.
        """
        clips: list[Batch | None] = []
        bad: list[BadSample] = []
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


def collate_part(part: tuple[list[Batch], list[BadSample]] | UserError) -> tuple[Batch, list[BadSample]] | UserError:
    return part if isinstance(part, UserError) else (collate(part[0]), part[1])
