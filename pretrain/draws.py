"""The randomness of a training step: each sample of the global batch draws from a generator of its own.

What a sample draws is a pure function of (seed, step, its place in the global batch), so it is the same on any number
of ranks, in micro-batches of any size, and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Stream = Literal["train", "validation"]
_STREAMS: dict[Stream, int] = {"train": 0, "validation": 1}


class SampleDraws:
    """Random numbers for the samples of a batch; a method's `shape` is that of one sample's."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)

    @classmethod
    def seeded(
        cls, seed: int, step: int, places: range, device: torch.device | str = "cpu", stream: Stream = "train"
    ) -> SampleDraws:
        """For the samples at these places of the global batch."""
        states = [_words(_STREAMS[stream], seed, step, place) for place in places]
        return cls([torch.Generator(device).manual_seed(int(state[0])) for state in states])

    def __len__(self) -> int:
        return len(self._generators)

    def __getitem__(self, part: slice) -> SampleDraws:
        """The draws of some of the samples, as a list's slice."""
        return SampleDraws(self._generators[part])

    def normal(self, *shape: int) -> Float[Tensor, "b *shape"]:
        return torch.stack([torch.randn(shape, generator=one, device=one.device) for one in self._generators])

    def uniform(self, *shape: int) -> Float[Tensor, "b *shape"]:
        return torch.stack([torch.rand(shape, generator=one, device=one.device) for one in self._generators])

    def gamma(self, concentration: float) -> Float[Tensor, "b"]:
        # torch.distributions takes no generator.
        parameter = torch.tensor(concentration)
        return torch.stack([torch._standard_gamma(parameter.to(one.device), generator=one) for one in self._generators])


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seeds the default generators, for layers that draw from them (dropout)."""
    torch.manual_seed(int(_words(len(_STREAMS), seed, step, rank)[0]))


def _words(*numbers: int) -> np.ndarray:
    return np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)
