"""Fixed held-out clips, imagined with the averaged weights while a run goes on, shown and measured.

The true clips are shown and measured as the codec decodes them, so that what the codec loses does not count. With one
denoising step it is the mean prediction that is judged, as in `pretrain.evaluate`: PSNR rewards it, and punishes every
single sample. Fréchet distances compare what may happen with what did, and are fair to samples alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Self, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError
from data_pipeline.video_io import encode_video
from data_pipeline.video_quality import PixelError, moving_pixels

from .engine import Engine
from .steps import num_samples
from .video_metrics.frechet import frechet_distance, latent_features
from .video_metrics.i3d import MIN_FRAMES, I3d
from .video_metrics.lpips import Lpips
from .video_metrics.structural_similarity import structural_similarity
from .world_models.base import Batch
from .world_models.observation_space import ObservationSpaceWorldModel

VALIDATION = "validation"
LATENT_FRECHET = "latent_frechet"

FRAMES_PER_SECOND = 10
"""Of the videos, whatever the clips' own: batches do not know it."""


class ImagineConfig(StrictConfig):
    """Clips of the validation split that are imagined at every validation, always the same ones."""

    clips: int = Field(0, ge=0, description="how many, over all ranks; 0: none")
    videos: int = Field(4, ge=0, description="of those, how many are written as videos into run_dir/validation")
    num_inference_steps: int = Field(
        1,
        ge=1,
        le=1000,
        description="1: the mean prediction, which PSNR rewards; more: samples, which Fréchet distances judge",
    )
    lpips_backbone: Path | None = Field(
        None, description="for LPIPS: weights of AlexNet or VGG16 in torchvision's names, .safetensors or a state dict"
    )
    lpips_heads: Path | None = Field(None, description="for LPIPS: its linear heads (v0.1) for that network")
    i3d: Path | None = Field(None, description="for FVD: weights of I3D, i3d_pretrained_400.pt or as .safetensors")

    @model_validator(mode="after")
    def _networks_measure_something(self) -> Self:
        if (self.lpips_backbone is None) != (self.lpips_heads is None):
            raise ValueError("LPIPS takes two files, so give both of lpips_backbone and lpips_heads, or none")
        if self.lpips_heads is not None and self.clips < 1:
            raise ValueError(f"clips={self.clips} leaves LPIPS nothing to measure; set it to at least 1")
        if self.i3d is not None and self.clips < 2:
            raise ValueError(f"clips={self.clips} leaves FVD no distribution to measure; set it to at least 2")
        return self


@dataclass(frozen=True)
class MetricNetworks:
    """What measures, where its weights are given."""

    lpips: Lpips | None = None
    i3d: I3d | None = None


def ready_to_imagine(
    config: ImagineConfig, model: nn.Module, buckets: Iterable[str], device: torch.device
) -> MetricNetworks:
    """The networks, on this device. A `UserError` where this model or these clips would not do."""
    if not config.clips:
        return MetricNetworks()
    if not isinstance(model, ObservationSpaceWorldModel):
        raise UserError(
            f"imagine.clips={config.clips}, but only a world model of video imagines clips; set it to 0 here."
        )
    lpips = i3d = None
    if config.lpips_backbone is not None and config.lpips_heads is not None:
        lpips = Lpips.load(config.lpips_backbone, config.lpips_heads).to(device)
    if config.i3d is not None:
        i3d = I3d.load(config.i3d).to(device)
    for bucket in buckets:
        _check_size(bucket, lpips, i3d)
    return MetricNetworks(lpips, i3d)


def _check_size(bucket: str, lpips: Lpips | None, i3d: I3d | None) -> None:
    """`bucket` is <height>x<width>x<frames>."""
    height, width, frames = map(int, bucket.split("x"))
    if lpips is not None and min(height, width) < lpips.backbone.smallest_side:
        raise UserError(
            f"imagine.lpips_backbone is {lpips.backbone.name}, which takes pictures of at least "
            f"{lpips.backbone.smallest_side} pixels, but clips are {bucket} (height x width x frames); leave it out."
        )
    if i3d is not None and frames < MIN_FRAMES:
        raise UserError(
            f"imagine.i3d takes clips of at least {MIN_FRAMES} frames, but they are {bucket} (height x width x "
            "frames); leave it out, or raise loader.crop_frames."
        )


FeaturePair = tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]]
"""Of a clip as it was imagined, and as it came."""


@dataclass(frozen=True)
class Judged:
    """What was measured of one clip."""

    squared_error: float  # summed over the future's pixels
    num_values: int
    averaged: dict[str, float]  # metrics that are means over clips
    compared: dict[str, FeaturePair]  # metrics that are distances between sets of clips


class Imagination:
    """Imagines and measures the clips of one validation: of the same global batches always the same ones.

    They are spread evenly over each global batch, and so over the ranks. A clip draws its noise by its number.
    Ranks imagine a clip each at the same time, for each may need what lies on the others: who has none left takes one
    that nobody looks at. Of ranks that share a sequence, and so its clip, the first one measures it and writes it.
    """

    def __init__(
        self,
        config: ImagineConfig,
        networks: MetricNetworks,
        engine: Engine,
        *,
        seed: int,
        step: int,
        run_dir: Path,
        on_clip: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_clip` is called before each clip, which may take longer than a training step: a sign of life."""
        self._config, self._networks, self._engine = config, networks, engine
        self._seed, self._step, self._folder, self._on_clip = seed, step, run_dir / VALIDATION, on_clip
        self._num_chosen = 0
        self._judged: dict[int, Judged] = {}

    def look_at(self, batch: Batch) -> None:
        """This rank's part of the next global batch. Collective."""
        own = num_samples(batch)
        size = own * self._engine.data_world_size
        count = min(size, self._config.clips - self._num_chosen)
        chosen = [divmod(place * size // count, own) for place in range(count)]  # rank, and row of its batch
        mine = [
            (self._num_chosen + place, row)
            for place, (rank, row) in enumerate(chosen)
            if rank == self._engine.data_rank
        ]
        self._num_chosen += count
        for turn in range(max(Counter(rank for rank, _ in chosen).values(), default=0)):
            number, row = mine[turn] if turn < len(mine) else (None, 0)  # only to compute with the others
            self._imagine(number, {name: rows[row : row + 1] for name, rows in batch.items()})

    def figures(self) -> dict[str, float]:
        """Of all ranks' clips, each once: a small split comes around several times. Collective."""
        of_ranks = self._engine.ranks.gather(self._judged)
        by_number = {number: judged for of_rank in of_ranks for number, judged in of_rank.items()}
        in_turn = [by_number[number] for number in sorted(by_number)]
        clips = list({clip.compared[LATENT_FRECHET][1].tobytes(): clip for clip in reversed(in_turn)}.values())
        if not clips:
            return {}
        error = PixelError()
        error.squares, error.count = sum(clip.squared_error for clip in clips), sum(clip.num_values for clip in clips)
        figures = {"imagined_clips": len(clips), "psnr": error.psnr}
        figures |= {name: fmean(clip.averaged[name] for clip in clips) for name in clips[0].averaged}
        if len(clips) > 1:
            figures |= {name: _distance([clip.compared[name] for clip in clips]) for name in clips[0].compared}
        return figures

    @property
    def _world_model(self) -> ObservationSpaceWorldModel:
        return cast(ObservationSpaceWorldModel, self._engine.module)  # `ready_to_imagine` has seen to it

    def _imagine(self, number: int | None, clip: Batch) -> None:
        """Another future, from a clip's first frames, actions and text; one without a number is not looked at."""
        self._on_clip()
        engine, world_model = self._engine, self._world_model
        clip = engine.to_device(clip)
        latents = world_model.latents(clip)
        context, future = world_model.split(latents)
        imagined = engine.call(
            world_model.predict,
            context,
            world_model.future_actions(clip["actions"]),
            clip["text_tokens"],
            has_actions=clip["has_actions"],  # actions are always given: a clip without any takes the same path
            num_latent_frames=future.shape[1],
            num_inference_steps=self._config.num_inference_steps,
            generator=torch.Generator(engine.device).manual_seed(self._seed + (number or 0)),
        )
        if number is not None and engine.sequence_rank == 0:
            self._judge(number, torch.cat([context, imagined.to(context.dtype)], dim=1), latents)

    def _judge(
        self, number: int, latents: Float[Tensor, "1 t c h w"], true_latents: Float[Tensor, "1 t c h w"]
    ) -> None:
        world_model = self._world_model
        videos = world_model.decode(latents), world_model.decode(true_latents)
        if number < self._config.videos:
            self._write(number, *videos)
        future = [video[0, world_model.context_frames :] for video in videos]
        imagined, true = (frames.cpu().numpy() for frames in future)
        error = PixelError()
        error.add(imagined, true, moving_pixels(true))
        averaged = {"ssim": structural_similarity(imagined, true)}
        compared = {
            LATENT_FRECHET: _pair(
                latent_features(of_clip[0], world_model.config.context_latent_frames)
                for of_clip in (latents, true_latents)
            )
        }
        if self._networks.lpips is not None:
            averaged["lpips"] = self._networks.lpips(*future).mean().item()
        if self._networks.i3d is not None:
            compared["fvd"] = _pair(self._networks.i3d(video)[0].cpu().numpy() for video in videos)
        self._judged[number] = Judged(error.squares, error.count, averaged, compared)

    def _write(self, number: int, imagined: UInt8[Tensor, "1 f h w 3"], true: UInt8[Tensor, "1 f h w 3"]) -> None:
        """Left real, right imagined."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{self._step:08d}_clip_{number:03d}.mp4"
        encode_video(torch.cat([true, imagined], dim=3)[0].cpu().numpy(), path, FRAMES_PER_SECOND)


def _pair(features: Iterable[Float[np.ndarray, "d"]]) -> FeaturePair:
    imagined, true = features
    return imagined, true


def _distance(pairs: Sequence[FeaturePair]) -> float:
    imagined, true = (np.stack(features) for features in zip(*pairs, strict=True))
    return frechet_distance(imagined, true)
