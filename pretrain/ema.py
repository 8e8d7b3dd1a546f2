"""Exponential moving average of the weights, in float32: what is validated, exported and acted with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import Engine


class ExponentialMovingAverage:
    """The average of an engine's trained parameters; each rank has that of its own shards.

    The decay grows from 0.1 to `decay` over the first steps, so that a short run is not averaged with its start.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        shards = engine.shards()
        self.average: dict[str, Tensor] = {
            name: _copy(engine, shard.values) for name, shard in shards.items() if shard.is_trained
        }

    @torch.no_grad()
    def update(self, engine: Engine, step: int) -> None:
        """Takes in the weights after update number `step` (the first is 1)."""
        shards = engine.shards()
        decay = min(self.decay, step / (step + 9))
        latest = [shards[name].values for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), latest, 1.0 - decay)

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Takes back what a checkpoint holds of this rank's shards."""
        for name, average in self.average.items():
            average.copy_(values[name])

    @contextmanager
    def swap_in(self, engine: Engine) -> Iterator[None]:
        """The engine computes with the averaged weights inside the `with`, and with its own again after it."""
        shards = engine.shards()
        own = {name: _copy(engine, shards[name].values) for name in self.average}
        engine.assign_shards(self.average)
        try:
            yield
        finally:
            engine.assign_shards(own)


def _copy(engine: Engine, values: Tensor) -> Tensor:
    return engine.room_for(values).copy_(values)
