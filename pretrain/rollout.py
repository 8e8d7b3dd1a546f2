"""Imagined futures of held-out clips beside the real ones, to look at.

    python -m pretrain.rollout --checkpoint runs/demo/pretrain/export --dataset runs/demo/dataset --output rollouts

Writes one mp4 per clip (left real, right imagined) and `strips.png`: per clip a row of real frames, a row of imagined
ones, and a row imagined under another clip's actions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from configs.loader import StrictConfig, run_command
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.model_inputs import ModelInputs
from data_pipeline.storage import Address, StorageConfig
from data_pipeline.video_io import encode_video

from .evaluate import check_fits, imagine, validation_batches
from .exported import load_world_model

logger = logging.getLogger(__name__)

GAP = 4  # white pixels between the rows of one clip; three times as many between clips
LABEL_WIDTH = 150


class RolloutConfig(StrictConfig):
    """Pictures of what a world model imagines."""

    checkpoint: Path = Field(description="export/ folder of a pretraining run")
    dataset: Address = Field(description="dataset folder, or the URL of one, whose validation split is imagined")
    storage: StorageConfig = StorageConfig()
    output: Path = Field(description="folder for the mp4 files and strips.png")
    num_clips: int = Field(5, ge=2, description="clips to imagine")
    num_draws: int = Field(4, ge=1, description="noises averaged in each mean prediction")
    enlarge: int = Field(3, ge=1, description="each pixel becomes so many in the pictures")
    seed: int = Field(0, ge=0, lt=2**63, description="which clips, and their noise")


def main(config: RolloutConfig) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    world_model, model_config, described = load_world_model(config.checkpoint)
    index = DatasetIndex(config.dataset, config.storage)
    check_fits(ModelInputs(index, model_config.inputs), world_model.config, described)
    generator = torch.Generator().manual_seed(config.seed)
    (batch,) = validation_batches(index, model_config.inputs, config.num_clips, config.num_clips, config.seed)
    context_frames = world_model.context_frames
    real = batch["video"].numpy()
    shuffled = batch["actions"].roll(len(real) // 2, 0)
    imagined = [
        np.concatenate(
            [real[:, :context_frames], imagine(world_model, batch, actions, config.num_draws, generator)], axis=1
        )
        for actions in (batch["actions"], shuffled)
    ]
    for number, (true, predicted) in enumerate(zip(real, imagined[0], strict=True)):
        side_by_side = enlarged(np.concatenate([true, predicted], axis=2), config.enlarge)
        encode_video(side_by_side, config.output / f"clip_{number:03d}.mp4", index.fps)
    rows = {"real": real, "imagined": imagined[0], "other actions": imagined[1]}
    strips(rows, num_columns=5, enlarge=config.enlarge).save(config.output / "strips.png")
    logger.info("wrote %d clips and strips.png to %s", len(real), config.output)


def strips(rows: Mapping[str, UInt8[np.ndarray, "b f h w 3"]], num_columns: int, enlarge: int) -> Image.Image:
    """Per clip one labelled row of frames from each video, the rows of a clip close together."""
    videos = list(rows.values())
    columns = np.unique(np.linspace(0, videos[0].shape[1] - 1, num_columns).round().astype(int))
    height = enlarge * videos[0].shape[2]
    tops = [
        clip * (len(rows) * (height + GAP) + 2 * GAP) + row * (height + GAP)
        for clip in range(len(videos[0]))
        for row in range(len(rows))
    ]
    picture = Image.new("RGB", (LABEL_WIDTH + enlarge * videos[0].shape[3] * len(columns), tops[-1] + height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    cells = ((label, video[clip, columns]) for clip in range(len(videos[0])) for label, video in rows.items())
    for top, (label, frames) in zip(tops, cells, strict=True):
        draw.text((4, top + height // 2 - 9), label, fill="black", font=font)
        picture.paste(Image.fromarray(np.concatenate(list(enlarged(frames, enlarge)), axis=1)), (LABEL_WIDTH, top))
    return picture


def enlarged(video: UInt8[np.ndarray, "f h w 3"], factor: int) -> UInt8[np.ndarray, "f h2 w2 3"]:
    """Nearest-neighbour, so that what the model made stays visible."""
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


if __name__ == "__main__":
    run_command(main, RolloutConfig, description=__doc__)
