"""The world-model protocol: all that training, planners and policy evaluation know about a world model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor

from ..draws import SampleDraws
from ..flops import Flops
from ..models.execution import Recomputing

Batch = dict[str, Any]
"""What `data_pipeline.loader.Loader` yields: latents, text_tokens, actions, proprio, has_actions, action_is_valid."""


@dataclass(frozen=True)
class LossTerms:
    """The loss to minimise and its named parts (detached), each a scalar."""

    total: Tensor
    parts: dict[str, Tensor]
    by_sample: Mapping[str, Tensor] = field(default_factory=dict)
    """In evaluation mode, `[b]`: parts that each sample has its own of, at its own flow time; NaN where it has none."""


@runtime_checkable
class CountsWork(Protocol):
    """A model that knows what training on a clip of a batch costs; all clips of a batch have one size."""

    def work(self, batch: Batch, recomputing: Recomputing) -> tuple[int, Flops]:
        """Tokens and FLOPs of one clip."""
        ...


class WorldModel(Protocol):
    """Predicts future latents from past ones, given actions. Implementations are `nn.Module`s.

    `loss` takes all its randomness from `draws`, so that a training step is a pure function of (weights, batch,
    seed): that is what makes resuming exact.
    """

    def loss(self, batch: Batch, draws: SampleDraws) -> LossTerms: ...

    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c h w"]: ...

    def predict(
        self,
        context: Float[Tensor, "b t c h w"],
        actions: Float[Tensor, "b k a"] | None,
        text: Float[Tensor, "b l d"],
    ) -> Float[Tensor, "b t c h w"]: ...

    def decode(self, latents: Float[Tensor, "b t c h w"]) -> UInt8[Tensor, "b f h w 3"]: ...
