"""Reading what a training run exported: `model.yaml` for the shape, `model.safetensors` for the averaged weights.

An export folder also holds the dataset's description, statistics and encoders (`data_pipeline.dataset.DatasetFolder`
opens them), so a model can be used, served or fine-tuned without the dataset that it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from configs.loader import StrictConfig, UserError, load_config
from data_pipeline.dataset import DatasetFolder
from data_pipeline.model_inputs import InputConfig, ModelInputs

from .wan_folder import STEM as WAN_STEM
from .weights import WeightFiles, load_into, misfit
from .world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

MODEL_YAML, WEIGHTS, ADDED_WEIGHTS = "model.yaml", "model.safetensors", "added.safetensors"
VIDEO, WORLD_MODEL = "video", "world_model"  # names of the video expert in a world model, and of that in a policy

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
    """Load strictly: a tensor that is missing, unknown or of another shape is an error that names it."""
    load_into(module, *fitting_weights(module, folder, described_by))


def fitting_weights(module: nn.Module, folder: Path, described_by: str = MODEL_YAML) -> list[WeightFiles]:
    """An export's weights, if they are those of such a module, which may be on the meta device."""
    files = weight_files(folder)
    problem = misfit(module, *files)
    if problem:
        raise UserError(
            f"{folder}: does not fit the model that {folder / described_by} describes: {problem}; restore "
            "the folder as it was written."
        )
    return files


def weight_files(folder: Path) -> list[WeightFiles]:
    """An export's weights: in one file, or as `pretrain.export` lays them out, Wan's apart from what we add to it."""
    if not (folder / ADDED_WEIGHTS).is_file():
        return [WeightFiles(folder, Path(WEIGHTS).stem)]
    added = WeightFiles(folder, Path(ADDED_WEIGHTS).stem)
    is_policy = any(name.startswith(f"{WORLD_MODEL}.") for name in added.shapes)
    prefix = f"{WORLD_MODEL}.{VIDEO}." if is_policy else f"{VIDEO}."
    return [WeightFiles(folder, WAN_STEM).renamed(prefix.__add__), added]


def load_world_model(folder: Path) -> tuple[ObservationSpaceWorldModel, WorldModelConfig, DatasetFolder]:
    """A pretrained world model from its run's `export/` folder, with its codec."""
    config = load_model_config(folder, WorldModelConfig)
    dataset = DatasetFolder(folder)
    codec = ModelInputs(dataset, config.inputs).codec()
    world_model = ObservationSpaceWorldModel(config.world_model, codec)
    load_weights(world_model, folder)
    return world_model.eval(), config, dataset
