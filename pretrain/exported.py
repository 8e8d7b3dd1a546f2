"""Reading what a training run exported: `model.yaml` for the shape, `model.safetensors` for the averaged weights.

An export folder also holds the dataset's description, statistics and encoders (`data_pipeline.dataset.DatasetFolder`
opens them), so a model can be used, served or fine-tuned without the dataset that it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from configs.loader import StrictConfig, UserError, load_config
from data_pipeline.clips import InputConfig
from data_pipeline.dataset import DatasetFolder

from .world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

MODEL_YAML, WEIGHTS = "model.yaml", "model.safetensors"

ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class WorldModelConfig(StrictConfig):
    """`model.yaml` of a pretraining run."""

    world_model: ObservationSpaceConfig
    inputs: InputConfig


def load_model_config(folder: Path, config_class: type[ConfigT]) -> ConfigT:
    path = folder / MODEL_YAML
    if not path.is_file():
        raise UserError(f"{folder}: holds no {MODEL_YAML}; give the export/ folder of a finished run.")
    if ("policy" in config_class.model_fields) != ("\npolicy:" in path.read_text(errors="replace")):
        needed, command = (
            ("policy", "finetune") if "policy" in config_class.model_fields else ("world model", "pretrain")
        )
        raise UserError(f"{folder}: is not the export of a {needed}; give the export/ folder of a {command}.train run.")
    return load_config(config_class, path)


def load_weights(module: nn.Module, folder: Path, described_by: str = MODEL_YAML) -> None:
    """Load strictly: a missing or unknown tensor is an error that names it."""
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the run again.") from None
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    if wrong:
        raise UserError(
            f"{path}: does not fit the model that {folder / described_by} describes; the first of {len(wrong)} "
            f"differences is tensor {wrong[0]!r}; restore both files as their run wrote them."
        )
    module.load_state_dict(weights)


def load_world_model(folder: Path) -> tuple[ObservationSpaceWorldModel, WorldModelConfig, DatasetFolder]:
    """A pretrained world model from its run's `export/` folder, with its codec."""
    config = load_model_config(folder, WorldModelConfig)
    dataset = DatasetFolder(folder)
    world_model = ObservationSpaceWorldModel(config.world_model, dataset.codec())
    load_weights(world_model, folder)
    return world_model.eval(), config, dataset
