"""One clip -> tensors: what the members of a sample become, and how clips become a batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from configs.loader import UserError

from .align import AlignedControl, ClipClock, align_control, nearest_frames, spans, spans_mask
from .augment import Augmentation, AugmentConfig, Place, Shown
from .batch_memory import BatchMemory, Kind, MemoryPool, copy_same_shape
from .dataset import DATASET_YAML, DatasetDescription
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

A batch of the loader lies in one block of memory, which is used again when the last of its tensors has gone.
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

MAX_TOLD = 300
"""Characters of what is wrong with a sample: libraries quote what they have found."""

BadSample = tuple[str, str]
"""Reason and sentence of a sample that cannot be used."""

Clip = Mapping[str, Shaped[np.ndarray, "..."]]
"""A clip's rows in the tensors of a batch (which share their memory)."""


@dataclass(frozen=True)
class Part:
    """A rank's part of a batch, the samples that others stand in for, and the `TRAFFIC` that reading them took."""

    memory: BatchMemory
    keys: list[str]
    bad: list[BadSample]
    traffic: Counter[str]

    def hand_over(self) -> Batch:
        """To be called once."""
        return self.memory.hand_over() | {"keys": self.keys}


class ClipDataset(Dataset[Batch]):
    """Samples of a dataset as tensors, by position in its manifest and place in the global order."""

    def __init__(self, index: DatasetIndex, config: ClipConfig, among: DatasetDescription | None = None) -> None:
        """Robots and their statistics are those of `among`, where the dataset is one of several."""
        self.index, self.config = index, config
        self.described = among or index
        self.inputs = ModelInputs(index, config.inputs)
        self.augmentation = augmentation_of(self.inputs, config)
        self._black = self._black_latents() if config.reads != "video" else {}
        mode = config.normalization
        self.normalizers = {
            name: tuple(self.described.normalizer(name, what, mode) for what in ("actions_absolute", "proprio"))
            for name in index.embodiments
        }

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What a batch holds of one clip."""
        inputs, described, layout = self.inputs, self.described, self.inputs.layout
        views = (layout.num_views,) if layout.kind == "separate" else ()
        # At least one number wide, so that no model needs a case for video without robots, or robots without proprio.
        actions = (inputs.num_actions, max(described.action_dim, 1))
        pictures: dict[str, Kind] = {
            "latents": (np.float32, (*views, *inputs.latent_shape)),
            "video": (np.uint8, (*views, inputs.num_frames, *layout.size, 3)),
        }
        if self.config.reads != "both":
            pictures = {self.config.reads: pictures[self.config.reads]}
        return pictures | {
            "view_is_valid": (np.bool_, (layout.num_views,)),
            "text_tokens": (np.float32, (self.config.text_length, self.index.info.text_encoder.width)),
            "actions": (np.float32, actions),
            "action_is_valid": (np.bool_, actions),
            "has_actions": (np.bool_, ()),
            "proprio": (np.float32, (max(described.proprio_dim, 1),)),
        }

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Batch:
        return self.read(position)

    def read(self, position: int, place: Place | None = None) -> Batch:
        """A sample as it is shown at this place of the order; without one, as it is."""
        memory = BatchMemory(self.kinds, 1, MemoryPool())
        key = self.write({name: rows[0, ...] for name, rows in memory.rows().items()}, position, place)
        return {name: rows[0] for name, rows in memory.hand_over().items()} | {"keys": key}

    def write(self, clip: Clip, position: int, place: Place | None = None) -> str:
        """Writes a sample into the rows of a batch, and gives its key. After an error they may hold anything."""
        members = self.index.read_sample(position, check_sha256=self.config.check_sha256, as_views=True)
        try:
            self._write(clip, members, place)
        except (KeyError, ValueError, RuntimeError, VideoError) as error:
            told = " ".join(str(error).split())[:MAX_TOLD]
            problem = ShardError(f"holds a member that cannot be read ({told})", "damaged_member")
            raise self.index.bad_sample(position, problem) from error
        return members["__key__"]

    def _write(self, clip: Clip, members: Mapping[str, Any], place: Place | None) -> None:
        meta = SampleMeta.model_validate_json(bytes(members["meta.json"]))
        self._check_fits(meta)
        shown = self.augmentation.draw(place, meta.num_frames)
        clock = ClipClock(
            shown.start / meta.fps,
            meta.fps / shown.speed,
            self.inputs.num_frames,
            self.index.info.actions_per_frame,
        )
        if self.config.reads != "video":
            self._write_latents(clip["latents"], members, shown)
        if self.config.reads != "latents":
            self._write_video(clip["video"], members, meta, shown, clock)
        clip["view_is_valid"][:] = shown.view_is_valid
        self._write_text(clip["text_tokens"], members)
        clip["has_actions"][...] = meta.has_actions
        self._write_control(clip, members, meta, clock)

    def _check_fits(self, meta: SampleMeta) -> None:
        info = self.index.info
        found = (meta.num_frames, meta.fps, meta.control_hz)
        promised = (info.num_frames, info.fps, info.control_hz if meta.has_actions else None)
        if found != promised:
            raise ValueError(f"its num_frames, fps and control_hz are {found}, but {DATASET_YAML} says {promised}")
        if meta.has_actions and meta.embodiment not in self.normalizers:
            raise ValueError(f"its embodiment is {meta.embodiment}, which {DATASET_YAML} does not describe")

    def _write_latents(self, picture: np.ndarray, members: Mapping[str, Any], shown: Shown) -> None:
        # A causal codec's first latent frames are those of the first frames, whatever comes after them.
        frames = self.inputs.num_latent_frames
        views = [
            read_tensor("latents", members[f"{view}.latents.safetensors"])[:frames] if is_valid else self._black[view]
            for view, is_valid in zip(shown.views, shown.view_is_valid, strict=True)
        ]
        self.inputs.layout.write(torch.from_numpy(picture), views, LATENTS)

    def _black_latents(self) -> dict[str, Float[Tensor, "t c h w"]]:
        """Of the views that may be dropped: what black video is encoded to."""
        names = [name for name, share in self.config.augment.view_dropout.items() if share > 0]
        codec = self.index.codec() if names else None
        return {
            name: codec.encode(_black_video(1, self.inputs.num_frames, *self._size(name)))[0].to(torch.bfloat16)
            for name in names
            if codec is not None
        }

    def _write_video(
        self, picture: np.ndarray, members: Mapping[str, Any], meta: SampleMeta, shown: Shown, clock: ClipClock
    ) -> None:
        positions = nearest_frames(clock.frame_times_s, meta.fps).clip(max=meta.num_frames - 1)
        views = [
            torch.from_numpy(decode_clip(members[f"{view}.mp4"], positions))
            if is_valid
            else _black_video(len(positions), *self._size(view))
            for view, is_valid in zip(shown.views, shown.view_is_valid, strict=True)
        ]
        self.inputs.layout.write(torch.from_numpy(picture), views, PIXELS)

    def _size(self, view: str) -> tuple[int, int]:
        return self.index.views[view].height, self.index.views[view].width

    def _write_text(self, tokens: np.ndarray, members: Mapping[str, Any]) -> None:
        length = 0
        if "text.safetensors" in members:
            text = read_tensor("text", members["text.safetensors"])[: len(tokens)]
            length = len(text)
            copy_same_shape(torch.from_numpy(tokens[:length]), text)
        tokens[length:] = 0

    def _write_control(self, clip: Clip, members: Mapping[str, Any], meta: SampleMeta, clock: ClipClock) -> None:
        actions, is_valid, proprio = (clip[name] for name in ("actions", "action_is_valid", "proprio"))
        for numbers in (actions, is_valid, proprio):
            numbers[...] = 0
        if not meta.has_actions:
            return
        assert meta.embodiment is not None
        normalize_actions, normalize_proprio = self.normalizers[meta.embodiment]
        control = read_control(members, meta, clock, self.described.embodiments[meta.embodiment])
        row_is_valid = spans_mask(control.spans, len(control.actions))
        if normalize_actions is not None:
            rows = normalize_actions.normalize(control.actions) * row_is_valid[:, None]
            actions[:, : rows.shape[1]] = rows
            is_valid[:, : rows.shape[1]] = row_is_valid[:, None]
        if normalize_proprio is not None and control.proprio is not None:
            first = normalize_proprio.normalize(control.proprio[0])
            proprio[: len(first)] = first


def augmentation_of(inputs: ModelInputs, config: ClipConfig) -> Augmentation:
    """What is drawn of a dataset's samples; what could not be shown is refused."""
    if config.augment.moves_frames and config.reads != "video":
        # Also a start at frame 4, 8, …: the first latent frame of the crop would stand for four frames, and the model
        # has learned that the first one stands for one.
        raise UserError(
            f"loader.augment moves frames (random_start, speed), but loader.reads={config.reads} takes stored latents, "
            "which begin with the clip; set loader.reads=video."
        )
    return Augmentation(inputs, config.augment)


class MixedClips(Dataset[Batch]):
    """Samples of several datasets, by position in all of them and place in the global order."""

    def __init__(self, datasets: Datasets, config: ClipConfig) -> None:
        config = config.model_copy(update={"views": datasets.inputs(config.inputs).config.views})
        self._datasets = datasets
        self._memory = MemoryPool()
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
        found = [self._datasets.find(position) for position, _ in requests]
        memory = BatchMemory(self._clips[found[0][0]].kinds, len(requests), self._memory)
        rows = memory.rows()
        keys: dict[int, str] = {}
        bad: list[BadSample] = []
        for row, ((name, position), (_, place)) in enumerate(zip(found, requests, strict=True)):
            try:
                clip = {tensor: values[row, ...] for tensor, values in rows.items()}
                keys[row] = self._clips[name].write(clip, position, place)
            except BadSampleError as error:
                bad.append((error.reason, str(error)))
        if not keys:
            return UserError(f"None of the {len(requests)} samples of a batch's part can be used. {bad[0][1]}")
        stand_ins = [next((good for good in keys if good >= row), next(iter(keys))) for row in range(len(requests))]
        for row, stand_in in enumerate(stand_ins):
            for values in rows.values() if row != stand_in else ():
                values[row] = values[stand_in]
        return Part(memory, [keys[row] for row in stand_ins], bad, self._take_traffic())

    def _take_traffic(self) -> Counter[str]:
        return sum((index.take_traffic() for index in self._datasets.by_name.values()), Counter())


def read_control(members: Mapping[str, Any], meta: SampleMeta, clock: ClipClock, robot: Embodiment) -> AlignedControl:
    """The actions and proprio of a sample on another clock, whose times count from the sample's first frame."""
    assert meta.control_hz is not None  # of a sample with actions
    num_rows = round((meta.num_frames - 1) * meta.control_hz / meta.fps)
    actions = _read_rows(members, "actions.npy", (num_rows, robot.action_dim))
    proprio = _read_rows(members, "proprio.npy", (num_rows, robot.proprio_dim)) if "proprio.npy" in members else None
    is_valid = spans_mask(meta.action_spans, num_rows)
    if clock.fps == meta.fps:  # the rows as they are, which is what `align_control` finds out in a millisecond
        first = round(clock.start_s * meta.control_hz)
        rows = slice(first, first + (clock.num_frames - 1) * clock.actions_per_frame)
        return AlignedControl(actions[rows], None if proprio is None else proprio[rows], spans(is_valid[rows]))
    recorded = np.where(is_valid[:, None], actions, np.float32(np.nan))
    return align_control(recorded, proprio, meta.control_hz, clock, robot)


def _read_rows(members: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Float32[np.ndarray, "k d"]:
    rows = read_array(members[name])
    if rows.dtype != np.float32 or rows.shape != shape:
        raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}, not float32 {list(shape)}")
    return rows


def _black_video(*size: int) -> UInt8[Tensor, "... 3"]:
    return torch.zeros(*size, 3, dtype=torch.uint8)


def collate(clips: list[Batch]) -> Batch:
    batch: Batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0] if name != "keys"}
    batch["keys"] = [clip["keys"] for clip in clips]
    return batch
