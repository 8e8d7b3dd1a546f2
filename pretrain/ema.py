"""Exponential moving average of the weights, in float32: what is validated, exported and acted with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import Engine


class ExponentialMovingAverage:
    """The average of an engine's parameters, whole on every rank.

    The decay grows from 0.1 to `decay` over the first steps, so that a short run is not averaged with its start.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in engine.full_parameters().items()
        }

    @torch.no_grad()
    def update(self, engine: Engine, step: int) -> None:
        """Takes in the weights after update number `step` (the first is 1). Collective."""
        parameters = engine.full_parameters()
        decay = min(self.decay, step / (step + 9))
        latest = [parameters[name].float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), latest, 1.0 - decay)

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Takes back what a checkpoint holds; further entries, such as buffers, are not averaged and are left out."""
        for name, average in self.average.items():
            average.copy_(values[name])

    @contextmanager
    def swap_in(self, engine: Engine) -> Iterator[None]:
        """The engine computes with the averaged weights inside the `with`, and with its own again after it."""
        own = {name: parameter.detach().clone() for name, parameter in engine.full_parameters().items()}
        engine.assign_parameters(self.average)
        try:
            yield
        finally:
            engine.assign_parameters(own)
