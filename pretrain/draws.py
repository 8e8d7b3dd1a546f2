"""The randomness of a training step: each sample of the global batch draws from a generator of its own.

What a sample draws is a pure function of (seed, step, its place in the global batch), so it is the same on any number
of ranks, in micro-batches of any size, and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.sample_order import shuffled

Stream = Literal["train", "validation"]
_STREAMS: dict[Stream, int] = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks of a step share."""

    seed: tuple[int, ...]
    size: int


class SampleDraws:
    """Random numbers for the samples of a batch; a method's `shape` is that of one sample's."""

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        places: range | None = None,
        global_batch: GlobalBatch | None = None,
    ) -> None:
        self._generators = list(generators)
        self._places = range(len(self._generators)) if places is None else places
        self._global_batch = GlobalBatch((0,), len(self._generators)) if global_batch is None else global_batch
        self._num_shared = 0  # draws so far that depend on the whole global batch
        self.flow_time: Float[Tensor, "b"] | None = None
        """Where it is given, no law is asked for one: see `at`."""

    @classmethod
    def seeded(
        cls,
        seed: int,
        step: int,
        places: range,
        device: torch.device | str = "cpu",
        stream: Stream = "train",
        global_batch_size: int | None = None,
    ) -> SampleDraws:
        """For the samples at these places of the global batch; by default it ends with the last of them."""
        states = [_words(_STREAMS[stream], seed, step, place) for place in places]
        global_batch = GlobalBatch((_STREAMS[stream], seed, step), global_batch_size or places.stop)
        return cls([torch.Generator(device).manual_seed(int(state[0])) for state in states], places, global_batch)

    def __len__(self) -> int:
        return len(self._generators)

    def __getitem__(self, part: slice) -> SampleDraws:
        """The draws of some of the samples, as a list's slice."""
        draws = SampleDraws(self._generators[part], self._places[part], self._global_batch)
        draws._num_shared = self._num_shared
        draws.flow_time = None if self.flow_time is None else self.flow_time[part]
        return draws

    def at(self, flow_time: Float[Tensor, "b"]) -> SampleDraws:
        """The same draws, at flow times that are given, whatever law training draws them from."""
        draws = self[:]
        draws.flow_time = flow_time
        return draws

    def normal(self, *shape: int) -> Float[Tensor, "b *shape"]:
        return torch.stack([torch.randn(shape, generator=one, device=one.device) for one in self._generators])

    def uniform(self, *shape: int) -> Float[Tensor, "b *shape"]:
        return torch.stack([torch.rand(shape, generator=one, device=one.device) for one in self._generators])

    def gamma(self, concentration: float) -> Float[Tensor, "b"]:
        # torch.distributions takes no generator.
        parameter = torch.tensor(concentration)
        return torch.stack([torch._standard_gamma(parameter.to(one.device), generator=one) for one in self._generators])

    def stratified(self) -> Float[Tensor, "b"]:
        """Uniform numbers, of which each n-th of [0, 1) gets exactly one of the global batch's n samples."""
        size = self._global_batch.size
        strata = shuffled(size, *self._next_shared())[list(self._places)]
        return (torch.from_numpy(strata).to(self._generators[0].device) + self.uniform()) / size

    def one_of(self, choices: Sequence[int]) -> int:
        """The same choice for every sample of the step."""
        return choices[int(_words(*self._next_shared())[0] % np.uint64(len(choices)))]

    def _next_shared(self) -> tuple[int, ...]:
        self._num_shared += 1
        return len(_STREAMS) + 1, *self._global_batch.seed, self._num_shared


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seeds the default generators, for layers that draw from them (dropout)."""
    torch.manual_seed(int(_words(len(_STREAMS), seed, step, rank)[0]))


def seed_weights(seed: int, unit: int) -> None:
    """Seeds the default generators, for the weights that the unit-th part of a model starts with."""
    torch.manual_seed(int(_words(len(_STREAMS) + 2, seed, unit)[0]))


def _words(*numbers: int) -> np.ndarray:
    return np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)
