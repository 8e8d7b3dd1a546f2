"""What a run's weights are before its first step: drawn from its seed, or read from pretrained ones.

Either way every rank takes just the elements that it is in charge of, so that nobody has to hold a whole model.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.loader import UserError
from data_pipeline.dataset import DatasetDescription, DatasetFolder

from .draws import seed_weights
from .evaluate import check_same_encoders
from .exported import MODEL_YAML, VIDEO, WorldModelConfig, fitting_weights, load_model_config
from .models.execution import blocks_of
from .wan_folder import CONFIG_JSON, TRANSFORMER, wan_weights
from .weights import FirstOf, WeightFiles, Weights
from .world_models.observation_space import ObservationSpaceWorldModel

logger = logging.getLogger(__name__)


def starting_weights(
    world_model: ObservationSpaceWorldModel, seed: int, pretrained: Path | None, dataset: DatasetDescription
) -> Weights:
    """Those of a world model, which may be on the meta device: pretrained ones, and for the rest the seed's.

    What Wan has not (the action conditioner) starts so that it adds nothing: the model begins as Wan.
    """
    drawn = SeededWeights(partial(ObservationSpaceWorldModel, world_model.config), seed)
    if pretrained is None:
        return drawn
    logger.info("starting from the weights in %s", pretrained)
    return FirstOf(*pretrained_weights(world_model, pretrained, dataset), drawn)


def pretrained_weights(
    world_model: ObservationSpaceWorldModel, folder: Path, dataset: DatasetDescription
) -> list[WeightFiles]:
    """All of a world model's, or Wan's for its video expert; a `UserError` tells what does not fit."""
    if (folder / MODEL_YAML).is_file():
        check_same_encoders(dataset, DatasetFolder(folder))
        load_model_config(folder, WorldModelConfig)  # refuses the export of a policy
        return fitting_weights(world_model, folder)
    if not any((folder / part / CONFIG_JSON).is_file() for part in ("", TRANSFORMER)):
        raise UserError(
            f"pretrained={folder} {'holds' if folder.is_dir() else 'is no folder that holds'} neither {MODEL_YAML}, as "
            f"export/ of a pretraining run does, nor {CONFIG_JSON}, as a Wan transformer does; give one of those."
        )
    if dataset.info.codec.name != "wan":
        raise UserError(
            f"pretrained={folder} is read as a Wan checkpoint, and those know the latents of Wan's VAE alone, but "
            f"{dataset} was encoded with codec {dataset.info.codec.name}; build the dataset with codec.kind=wan."
        )
    return [wan_weights(world_model.video, folder).renamed(f"{VIDEO}.".__add__)]


class DrawsWeights(Protocol):
    """A module that can be drawn on any device, a part of it while the rest is on the meta device."""

    def init_weights(self) -> None: ...


class SeededWeights:
    """What a model's `init_weights` draws, a block at a time (all that is in no block counts as one).

    Each block has a seed of its own, so the numbers are a pure function of the seed and the model's sizes: whoever
    needs one block draws no other, and how many ranks there are changes nothing.
    """

    def __init__(self, build: Callable[[], nn.Module], seed: int) -> None:
        """`build` makes a model that keeps `DrawsWeights`."""
        with torch.device("meta"):
            self._model = build()
        self._seed = seed
        self.shapes = {name: tuple(one.shape) for name, one in self._model.named_parameters()}
        blocks = [list(block.modules()) for block in blocks_of(self._model)]
        in_blocks = {module for block in blocks for module in block}
        self._units = [[module for module in self._model.modules() if module not in in_blocks], *blocks]
        unit_of = {module: unit for unit, modules in enumerate(self._units) for module in modules}
        self._unit_of = {name: unit_of[self._owner(name)] for name in self.shapes}
        self._drawn: tuple[int, dict[str, Tensor]] | None = None

    def part(self, name: str, start: int, num: int) -> Float[Tensor, "num"]:
        unit = self._unit_of[name]
        if self._drawn is None or self._drawn[0] != unit:
            self._drawn = None  # before the next one is made
            self._drawn = unit, self._draw(unit)
        return self._drawn[1][name].flatten()[start : start + num]

    def _owner(self, name: str) -> nn.Module:
        return self._model.get_submodule(name.rpartition(".")[0])

    def _draw(self, unit: int) -> dict[str, Tensor]:
        for module in self._units[unit]:
            module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            seed_weights(self._seed, unit)
            # Changes the weights of this unit alone: all others are on the meta device.
            cast(DrawsWeights, self._model).init_weights()
        drawn = {name: one.detach() for name, one in self._model.named_parameters() if not one.is_meta}
        for module in self._units[unit]:
            module.to_empty(device="meta", recurse=False)
        return drawn
