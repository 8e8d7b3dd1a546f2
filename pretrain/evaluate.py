"""How well a world model imagines held-out clips, in pixels, beside copying the last frame.

    python -m pretrain.evaluate --checkpoint runs/demo/pretrain/export --dataset runs/demo/dataset

Measured is the mean prediction: PSNR rewards the mean of all possible futures and punishes every single sample. Three
rows per clip: with its own actions, with another clip's ("shuffled"), and its last context frame repeated. A model that
has learned what actions do is better with its own; one that has not shows it here.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command
from data_pipeline.clips import ClipConfig, ClipDataset, collate
from data_pipeline.dataset import DatasetDescription, DatasetFolder
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.model_inputs import InputConfig, ModelInputs
from data_pipeline.storage import Address, StorageConfig
from data_pipeline.video_quality import PixelError, moving_pixels

from .exported import load_world_model
from .world_models.base import Batch
from .world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel, resolve

logger = logging.getLogger(__name__)


class EvaluateConfig(StrictConfig):
    """Held-out evaluation of a world model."""

    checkpoint: Path = Field(description="export/ folder of a pretraining run")
    dataset: Address = Field(description="dataset folder, or the URL of one, whose validation split is imagined")
    storage: StorageConfig = StorageConfig()
    max_clips: int = Field(512, ge=2, description="clips at most, evenly spread over the split")
    batch_size: int = Field(32, ge=2, description="clips at a time")
    num_draws: int = Field(4, ge=1, description="noises averaged in each mean prediction")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise and of the shuffled actions")
    output: Path | None = Field(None, description="where the figures go as JSON; null: only to the terminal")


def main(config: EvaluateConfig) -> None:
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    world_model, model_config, described = load_world_model(config.checkpoint)
    index = DatasetIndex(config.dataset, config.storage)
    check_fits(ModelInputs(index, model_config.inputs), world_model.config, described)
    figures = evaluate(world_model, index, model_config.inputs, config)
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if config.output is not None:
        config.output.write_text(text + "\n")


def evaluate(
    world_model: ObservationSpaceWorldModel, index: DatasetIndex, inputs: InputConfig, config: EvaluateConfig
) -> dict[str, float | int | None]:
    """PSNR in dB over all pixels and over moving ones; the figures' names are those of the demo's results."""
    rows = {name: PixelError() for name in ("model", "shuffled", "copy_last")}
    num_clips = 0
    context_frames = world_model.context_frames
    generator = torch.Generator().manual_seed(config.seed)
    for batch in validation_batches(index, inputs, config.max_clips, config.batch_size, config.seed):
        video = batch["video"].numpy()
        true = video[:, context_frames:]
        moves = moving_pixels(video)[:, context_frames:]
        # Half a batch away: clips come in a random order, so these are another clip's actions, mostly of another task.
        shuffled = batch["actions"].roll(len(true) // 2, 0)
        rows["model"].add(imagine(world_model, batch, batch["actions"], config.num_draws, generator), true, moves)
        rows["shuffled"].add(imagine(world_model, batch, shuffled, config.num_draws, generator), true, moves)
        rows["copy_last"].add(np.broadcast_to(video[:, context_frames - 1][:, None], true.shape), true, moves)
        num_clips += len(true)
    return {
        "psnr_model": rows["model"].psnr,
        "psnr_copy_last": rows["copy_last"].psnr,
        "psnr_shuffled_actions": rows["shuffled"].psnr,
        "psnr_moving_model": rows["model"].psnr_moving,
        "psnr_moving_copy_last": rows["copy_last"].psnr_moving,
        "psnr_moving_shuffled_actions": rows["shuffled"].psnr_moving,
        "num_clips": num_clips,
    }


def imagine(
    world_model: ObservationSpaceWorldModel,
    batch: Batch,
    actions: torch.Tensor,
    num_draws: int,
    generator: torch.Generator,
) -> np.ndarray:
    """The mean future of each clip as pixels, uint8 [b f h w 3], without the context frames."""
    context, _ = world_model.split(batch["latents"])
    actions = world_model.future_actions(actions)
    future = world_model.predict(context, actions, batch["text_tokens"], num_draws=num_draws, generator=generator)
    return world_model.decode(torch.cat([context, future], dim=1)).numpy()[:, world_model.context_frames :]


def validation_batches(
    index: DatasetIndex, inputs: InputConfig, max_clips: int, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Held-out clips that have actions, each once, with their pixels; evenly spread, in a fixed random order."""
    indices = index.indices("validation", only_with_actions=True)
    if len(indices) < 2:
        raise UserError(
            f"{index.address}: its validation split has {len(indices)} clips with actions, too few to evaluate; record "
            "more episodes, or build again with a larger validation_share."
        )
    chosen = indices[np.unique(np.linspace(0, len(indices) - 1, min(max_clips, len(indices))).round().astype(int))]
    chosen = np.random.default_rng(seed).permutation(chosen)
    clips = ClipDataset(index, ClipConfig(reads="both", **inputs.model_dump()))
    # The last batch takes the remainder, so that no clip is alone: its actions could not be shuffled.
    for part in np.array_split(chosen, max(1, len(chosen) // batch_size)):
        yield collate([clips[position] for position in part.tolist()])


def check_fits(inputs: ModelInputs, config: ObservationSpaceConfig, trained_on: DatasetFolder) -> None:
    """Refuse clips that a world model cannot, or must not, be asked about."""
    check_same_encoders(inputs.dataset, trained_on)
    for robot in inputs.dataset.embodiments:
        check_same_robot(inputs.dataset, robot, trained_on)
    resolve(config, inputs)


def check_same_encoders(dataset: DatasetDescription, trained_on: DatasetFolder) -> None:
    """Latents and text of other encoders mean nothing to a model, and nothing would show but bad results."""
    for what, ours, theirs in (
        ("codec", dataset.info.codec, trained_on.info.codec),
        ("text encoder", dataset.info.text_encoder, trained_on.info.text_encoder),
    ):
        if (ours.name, ours.weight_hash) != (theirs.name, theirs.weight_hash):
            raise UserError(
                f"{dataset} was encoded with {what} {ours.name} {ours.weight_hash[:12]}, but {trained_on} "
                f"was trained on {what} {theirs.name} {theirs.weight_hash[:12]}; train on this dataset, or build it "
                f"together with the other recordings (one build, several sources) so that both have one {what}."
            )


def check_same_robot(
    dataset: DatasetFolder, name: str, trained_on: DatasetFolder, *, needs_proprio: bool = False
) -> None:
    """Actions of another robot mean nothing to a model either, even where there are as many of them."""
    if name not in trained_on.embodiments:
        raise UserError(
            f"{dataset.address} has actions of the robot {name}, but {trained_on.address} was trained on "
            f"{', '.join(trained_on.embodiments) or 'none'}; use a dataset of that, or train on this one."
        )
    ours, theirs = dataset.embodiments[name], trained_on.embodiments[name]
    if ours.action_names != theirs.action_names or (needs_proprio and ours.proprio_names != theirs.proprio_names):
        raise UserError(
            f"the actions or proprio of {name} in {dataset.address} have another layout than those that "
            f"{trained_on.address} was trained on; use a dataset with the same, or train on this one."
        )


if __name__ == "__main__":
    run_command(main, EvaluateConfig, description=__doc__)
