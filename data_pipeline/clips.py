"""One clip -> tensors: what the members of a sample become, and how clips become a batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from configs.loader import UserError

from .align import AlignedControl, ClipClock, align_control, nearest_frames, spans, spans_mask
from .augment import Augmentation, AugmentConfig, Place, Shown
from .dataset import DatasetDescription
from .dataset_index import BadSampleError, DatasetIndex
from .datasets import Datasets
from .embodiments import Embodiment
from .model_inputs import InputConfig, ModelInputs
from .sample import SampleMeta, read_array, read_tensor
from .shards import ShardError
from .video_io import VideoError, decode_clip
from .view_layout import LATENTS, PIXELS

Batch = dict[str, Any]
"""Tensors of one rank's part of a global batch (dims: b batch, v views that are shown at once, f frames, t latent
frames, h w height and width of the picture that `layout` makes of the views, k actions, l text tokens, …):

    latents          float32 [b t c h w]  with reads=latents or both; [b v t c h w] where layout=separate
    video            uint8   [b f h w 3]  with reads=video or both; [b v f h w 3] where layout=separate
    view_is_valid    bool    [b v]        false: the view was dropped, and is black
    text_tokens      float32 [b l d]      zero-padded; all zero where the clip has no text
    actions          float32 [b k a]      normalised per embodiment; zero where not valid; a and s are at least 1
    action_is_valid  bool    [b k a]      false: no action was recorded, or the robot has fewer dimensions
    has_actions      bool    [b]
    proprio          float32 [b s]        at the first frame, normalised; zero where there is none
    keys             list of b sample keys

All of them speak of the same `crop_frames`: f of them are 1 + (f - 1) / 4 latent frames and (f - 1) * r actions, with r
the dataset's actions per frame; those between frames i and i + 1 are the rows r * i to r * (i + 1).
"""


class ClipConfig(InputConfig):
    """How clips are read."""

    reads: Literal["latents", "video", "both"] = Field(
        "latents",
        description="latents: those that `build` stored. video: pixels, which the model encodes itself, on its own "
        "device; slower, but crops may begin anywhere and the speed may vary.",
    )
    augment: AugmentConfig = AugmentConfig()
    check_sha256: bool = Field(False, description="Compare each sample read with the manifest's checksum.")

    @property
    def inputs(self) -> InputConfig:
        return InputConfig(**{name: getattr(self, name) for name in InputConfig.model_fields})


Request = tuple[int, Place | None]
"""A sample's position in all datasets, and in training its place in the global order."""

BadSample = tuple[str, str]
"""Reason and sentence of a sample that cannot be used."""

Part = tuple[list[Batch], list[BadSample], Counter[str]]
"""A rank's part of a batch: its clips, those that others stand in for, and the `TRAFFIC` that reading them took."""


class ClipDataset(Dataset[Batch]):
    """Samples of a dataset as tensors, by position in its manifest and place in the global order."""

    def __init__(self, index: DatasetIndex, config: ClipConfig, among: DatasetDescription | None = None) -> None:
        """Robots and their statistics are those of `among`, where the dataset is one of several."""
        self.index, self.config = index, config
        self.described = among or index
        self.inputs = ModelInputs(index, config.inputs)
        self.augmentation = Augmentation(self.inputs, config.augment)
        if config.augment.moves_frames and config.reads != "video":
            # Also a start at frame 4, 8, …: the first latent frame of the crop would stand for four frames, and the
            # model has learned that the first one stands for one.
            raise UserError(
                f"loader.augment moves frames (random_start, speed), but loader.reads={config.reads} takes stored "
                "latents, which begin with the clip; set loader.reads=video."
            )
        self._black = self._black_latents() if config.reads != "video" else {}
        mode = config.normalization
        self.normalizers = {
            name: tuple(self.described.normalizer(name, what, mode) for what in ("actions_absolute", "proprio"))
            for name in index.embodiments
        }

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Batch:
        return self.read(position)

    def read(self, position: int, place: Place | None = None) -> Batch:
        """A sample as it is shown at this place of the order; without one, as it is."""
        members = self.index.read_sample(position, check_sha256=self.config.check_sha256)
        try:
            return self._tensors(members, place)
        except (KeyError, ValueError, RuntimeError, VideoError) as error:
            problem = ShardError(f"holds a member that cannot be read ({error})", "damaged_member")
            raise self.index.bad_sample(position, problem) from error

    def _tensors(self, members: dict[str, Any], place: Place | None) -> Batch:
        meta = SampleMeta.model_validate_json(members["meta.json"])
        shown = self.augmentation.draw(place, meta.num_frames)
        clock = ClipClock(
            shown.start / meta.fps,
            meta.fps / shown.speed,
            self.inputs.num_frames,
            self.index.info.actions_per_frame,
        )
        clip: Batch = {}
        if self.config.reads != "video":
            clip["latents"] = self._latents(members, shown)
        if self.config.reads != "latents":
            clip["video"] = self._video(members, meta, shown, clock)
        actions, is_valid, proprio = self._control(members, meta, clock)
        return clip | {
            "view_is_valid": torch.tensor(shown.view_is_valid),
            "text_tokens": self._text(members),
            "actions": actions,
            "action_is_valid": is_valid,
            "has_actions": torch.tensor(meta.has_actions),
            "proprio": proprio,
            "keys": members["__key__"],
        }

    def _latents(self, members: Mapping[str, Any], shown: Shown) -> Float[Tensor, "..."]:
        # A causal codec's first latent frames are those of the first frames, whatever comes after them.
        frames = self.inputs.num_latent_frames
        views = [
            read_tensor("latents", members[f"{view}.latents.safetensors"])[:frames] if is_valid else self._black[view]
            for view, is_valid in zip(shown.views, shown.view_is_valid, strict=True)
        ]
        return self.inputs.layout.join(views, LATENTS)

    def _black_latents(self) -> dict[str, Float[Tensor, "t c h w"]]:
        """Of the views that may be dropped: what black video is encoded to."""
        names = [name for name, share in self.config.augment.view_dropout.items() if share > 0]
        codec = self.index.codec() if names else None
        return {
            name: codec.encode(_black_video(1, self.inputs.num_frames, *self._size(name)))[0].to(torch.bfloat16)
            for name in names
            if codec is not None
        }

    def _video(
        self, members: Mapping[str, Any], meta: SampleMeta, shown: Shown, clock: ClipClock
    ) -> UInt8[Tensor, "..."]:
        positions = nearest_frames(clock.frame_times_s, meta.fps).clip(max=meta.num_frames - 1)
        views = [
            torch.from_numpy(decode_clip(members[f"{view}.mp4"], positions))
            if is_valid
            else _black_video(len(positions), *self._size(view))
            for view, is_valid in zip(shown.views, shown.view_is_valid, strict=True)
        ]
        return self.inputs.layout.join(views, PIXELS)

    def _size(self, view: str) -> tuple[int, int]:
        return self.index.views[view].height, self.index.views[view].width

    def _text(self, members: dict[str, Any]) -> torch.Tensor:
        padded = torch.zeros(self.config.text_length, self.index.info.text_encoder.width)
        if "text.safetensors" in members:
            text = read_tensor("text", members["text.safetensors"])[: self.config.text_length]
            padded[: len(text)] = text
        return padded

    def _control(
        self, members: Mapping[str, Any], meta: SampleMeta, clock: ClipClock
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        described = self.described
        # At least one number wide, so that no model needs a case for video without robots, or robots without proprio.
        actions = torch.zeros(self.inputs.num_actions, max(described.action_dim, 1))
        is_valid = torch.zeros(actions.shape, dtype=torch.bool)
        proprio = torch.zeros(max(described.proprio_dim, 1))
        if not meta.has_actions:
            return actions, is_valid, proprio
        assert meta.embodiment is not None
        normalize_actions, normalize_proprio = self.normalizers[meta.embodiment]
        control = read_control(members, meta, clock, described.embodiments[meta.embodiment])
        row_is_valid = spans_mask(control.spans, len(control.actions))
        if normalize_actions is not None:
            rows = normalize_actions.normalize(control.actions) * row_is_valid[:, None]
            actions[:, : rows.shape[1]] = torch.from_numpy(rows)
            is_valid[:, : rows.shape[1]] = torch.from_numpy(row_is_valid)[:, None]
        if normalize_proprio is not None and control.proprio is not None:
            first = normalize_proprio.normalize(control.proprio[0])
            proprio[: len(first)] = torch.from_numpy(first)
        return actions, is_valid, proprio


class MixedClips(Dataset[Batch]):
    """Samples of several datasets, by position in all of them and place in the global order."""

    def __init__(self, datasets: Datasets, config: ClipConfig) -> None:
        config = config.model_copy(update={"views": datasets.inputs(config.inputs).config.views})
        self._datasets = datasets
        self._clips = {name: ClipDataset(index, config, datasets) for name, index in datasets.by_name.items()}

    def __len__(self) -> int:
        return len(self._datasets)

    def announce(self, requests: Sequence[Request]) -> None:
        """That these will be read soon."""
        for position, _ in requests:
            name, position = self._datasets.find(position)
            self._datasets.by_name[name].announce(position)

    def __getitems__(self, requests: Sequence[Request]) -> Part | UserError:
        """A part of a batch, in which the next good sample stands in for a bad one.

        Errors are handed over as values: raised in a worker process, torch would bury their sentence in a traceback.
        """
        clips: list[Batch | None] = []
        bad: list[BadSample] = []
        for position, place in requests:
            try:
                clips.append(self.read(position, place))
            except BadSampleError as error:
                clips.append(None)
                bad.append((error.reason, str(error)))
        good = [i for i, clip in enumerate(clips) if clip is not None]
        if not good:
            return UserError(f"None of the {len(clips)} samples of a batch's part can be used. {bad[0][1]}")
        stand_ins = [clips[next((i for i in good if i >= place), good[0])] for place in range(len(clips))]
        return [clip for clip in stand_ins if clip is not None], bad, self._take_traffic()

    def _take_traffic(self) -> Counter[str]:
        return sum((index.take_traffic() for index in self._datasets.by_name.values()), Counter())

    def read(self, position: int, place: Place | None = None) -> Batch:
        name, position = self._datasets.find(position)
        return self._clips[name].read(position, place)


def read_control(members: Mapping[str, Any], meta: SampleMeta, clock: ClipClock, robot: Embodiment) -> AlignedControl:
    """The actions and proprio of a sample on another clock, whose times count from the sample's first frame."""
    actions = read_array(members["actions.npy"])
    proprio = read_array(members["proprio.npy"]) if "proprio.npy" in members else None
    is_valid = spans_mask(meta.action_spans, len(actions))
    assert meta.control_hz is not None  # of a sample with actions
    if clock.fps == meta.fps:  # the rows as they are, which is what `align_control` finds out in a millisecond
        first = round(clock.start_s * meta.control_hz)
        rows = slice(first, first + (clock.num_frames - 1) * clock.actions_per_frame)
        return AlignedControl(actions[rows], None if proprio is None else proprio[rows], spans(is_valid[rows]))
    recorded = np.where(is_valid[:, None], actions, np.float32(np.nan))
    return align_control(recorded, proprio, meta.control_hz, clock, robot)


def _black_video(*size: int) -> UInt8[Tensor, "... 3"]:
    return torch.zeros(*size, 3, dtype=torch.uint8)


def collate(clips: list[Batch]) -> Batch:
    batch: Batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0] if name != "keys"}
    if "latents" in batch:
        batch["latents"] = batch["latents"].float()
    batch["keys"] = [clip["keys"] for clip in clips]
    return batch


def collate_part(part: Part | UserError) -> tuple[Batch, list[BadSample], Counter[str]] | UserError:
    return part if isinstance(part, UserError) else (collate(part[0]), *part[1:])
