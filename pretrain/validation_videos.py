"""Fixed held-out clips, imagined with the averaged weights while a run goes on: left real, right imagined.

As in `pretrain.evaluate` it is the mean prediction that is shown and measured, here beside the real video as the codec
decodes it, so that what the codec loses does not count.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from configs.loader import UserError
from data_pipeline.video_io import encode_video
from data_pipeline.video_quality import PixelError, moving_pixels

from .engine import Engine, EngineConfig
from .structural_similarity import structural_similarity
from .world_models.base import Batch
from .world_models.observation_space import ObservationSpaceWorldModel

VALIDATION = "validation"

FRAMES_PER_SECOND = 10
"""Of the videos, whatever the clips' own: batches do not know it."""


class ValidationVideos:
    """The first clips of the main rank's part of the first validation batch: the same ones every time."""

    def __init__(self, num_clips: int, seed: int, run_dir: Path) -> None:
        self.num_clips, self._seed, self._folder = num_clips, seed, run_dir / VALIDATION

    def show(self, engine: Engine, batch: Batch, step: int) -> dict[str, float]:
        """Writes a video per clip; PSNR and SSIM of what was imagined. The main rank does it alone."""
        world_model = engine.module
        if not self.num_clips or not engine.is_main or not isinstance(world_model, ObservationSpaceWorldModel):
            return {}
        error, similarities = PixelError(), []
        self._folder.mkdir(exist_ok=True)
        for place in range(min(self.num_clips, len(batch["text_tokens"]))):
            clip = engine.to_device({name: rows[place : place + 1] for name, rows in batch.items()})
            real, imagined = imagine_clip(engine, world_model, clip, self._seed + place)
            path = self._folder / f"step_{step:08d}_clip_{place:03d}.mp4"
            encode_video(np.concatenate([real, imagined], axis=2), path, FRAMES_PER_SECOND)
            future = slice(world_model.context_frames, None)
            error.add(imagined[future], real[future], moving_pixels(real)[future])
            similarities.append(structural_similarity(imagined[future], real[future]))
        return {"psnr": error.psnr, "ssim": sum(similarities) / len(similarities)}


def imagine_clip(
    engine: Engine, world_model: ObservationSpaceWorldModel, clip: Batch, seed: int
) -> tuple[UInt8[np.ndarray, "f h w 3"], UInt8[np.ndarray, "f h w 3"]]:
    """A batch of one clip, real and imagined from its first frames; always the same noise."""
    latents = world_model.latents(clip)
    context, future = world_model.split(latents)
    actions = world_model.future_actions(clip["actions"]) if clip["has_actions"].item() else None
    generator = torch.Generator(engine.device).manual_seed(seed)
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.precision == "bf16"):
        imagined = world_model.predict(
            context, actions, clip["text_tokens"], num_latent_frames=future.shape[1], generator=generator
        )
    whole = torch.cat([context, imagined.to(context.dtype)], dim=1)
    return world_model.decode(latents)[0].cpu().numpy(), world_model.decode(whole)[0].cpu().numpy()


def check_videos(num_clips: int, model: nn.Module, config: EngineConfig) -> None:
    """A `UserError` where no rank could imagine a clip by itself."""
    if not num_clips:
        return
    if not isinstance(model, ObservationSpaceWorldModel):
        raise UserError(
            f"validation_videos={num_clips}, but only a world model of video imagines clips; set it to 0 here."
        )
    is_cut = {
        "engine.zero_stage=3": config.kind == "deepspeed" and config.zero_stage == 3,
        "engine.sharding=fsdp2": config.kind == "accelerate" and config.sharding == "fsdp2",
        f"engine.sequence_parallel={config.sequence_parallel}": config.sequence_parallel > 1,
    }
    for setting, applies in is_cut.items():
        if applies:
            raise UserError(
                f"validation_videos={num_clips} are imagined by one rank, which with {setting} cannot compute alone; "
                "set validation_videos=0, and imagine clips with python -m pretrain.rollout from a checkpoint's export."
            )
