"""One sequence on several ranks: each carries some of the tokens, and in the attention some of the heads of all tokens.

An all-to-all turns "my tokens, all heads" into "all tokens, my heads" before the attention, and back after it
(DeepSpeed-Ulysses, arXiv 2309.14509). All else in a block works token by token and notices nothing. A group of tokens
is cut within each of its modulation rows (latent frames), so every rank has tokens of every row and the rows stay as
they are. Where a row cannot be cut equally, its last token stands in for those that are missing, and is dropped again.

Gradients: all ranks of a sequence compute the same loss, of outputs that `whole` has put together. `whole` hands each
rank its part's gradient times the number of ranks, so that the mean of the ranks' gradients, which every engine takes
anyway, is the gradient on one rank: for weights that saw a part of the tokens (the blocks) and for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that share a sequence, and this one's place among them; by default one rank has it all."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def part(self, x: Tensor, rows: int, dim: int) -> Tensor:
        """This rank's tokens, of all tokens along `dim`, which make up `rows` equal rows."""
        if self.size == 1:
            return x
        positions = torch.from_numpy(_positions(x.shape[dim], rows, self.rank, self.size))
        return x.index_select(dim, positions.to(x.device))

    def whole(self, x: Float[Tensor, "b n c"], rows: int, num_tokens: int) -> Float[Tensor, "b num_tokens c"]:
        """All tokens, of which each rank has its `part`."""
        if self.size == 1:
            return x
        parts = _Gather.apply(x.unflatten(1, (rows, -1)), self)  # size b rows n c
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : num_tokens // rows].flatten(1, 2)


ONE_RANK = SequenceRanks()


class SplitsSequence(nn.Module):
    """A network that makes and reads tokens, which lie on several ranks where an engine sets `sequence`."""

    heads: int
    sequence: SequenceRanks = ONE_RANK


class HeadExchange:
    """Between "my tokens, all heads" and "all tokens, my heads", for groups of (number of tokens, rows) in this order.

    All tokens come in their own order, without stand-ins, so that masks and caches are those of one rank.
    """

    def __init__(self, sequence: SequenceRanks, groups: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.sequence = sequence
        if sequence.size > 1:
            slots, order = _layout(tuple(groups), sequence.size)
            self._slots, self._order = (torch.from_numpy(index).to(device) for index in (slots, order))

    def to_heads(self, *parts: Float[Tensor, "b n h e"]) -> tuple[Float[Tensor, "b m g e"], ...]:
        size = self.sequence.size
        if size == 1:
            return parts
        # Autocast leaves normed queries and keys in float32; the attention would cast them as the values are.
        by_head = [x.type_as(parts[-1]).unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for x in parts]
        exchanged = _AllToAll.apply(torch.stack(by_head, 2), self.sequence)  # size n 3 b g e
        return tuple(x.transpose(0, 1) for x in exchanged.flatten(0, 1).index_select(0, self._order).unbind(1))

    def to_tokens(self, x: Float[Tensor, "b m g e"]) -> Float[Tensor, "b n h e"]:
        size = self.sequence.size
        if size == 1:
            return x
        by_rank = x.transpose(0, 1).index_select(0, self._slots).unflatten(0, (size, -1))
        return _AllToAll.apply(by_rank, self.sequence).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _positions(num_tokens: int, rows: int, rank: int, size: int) -> Int[np.ndarray, "n"]:
    """Which tokens a rank carries: of each row the rank-th of equal parts."""
    length = num_tokens // rows
    share = -(-length // size)
    within = np.minimum(np.arange(rank * share, (rank + 1) * share), length - 1)
    return (np.arange(rows)[:, None] * length + within).reshape(-1)


@lru_cache(maxsize=64)
def _layout(groups: tuple[tuple[int, int], ...], size: int) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "m"]]:
    """The token in each slot when all ranks' tokens lie one after the other, and the first slot of each token."""
    first_tokens = np.cumsum([0, *(num_tokens for num_tokens, _ in groups)])
    slots = np.concatenate(
        [
            first + _positions(num_tokens, rows, rank, size)
            for rank in range(size)
            for first, (num_tokens, rows) in zip(first_tokens[:-1], groups, strict=True)
        ]
    )
    return slots, np.unique(slots, return_index=True)[1]


# Collectives with the gradient of what they do -------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    """Piece i of the first axis goes to rank i, and what comes from rank i becomes piece i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceRanks) -> Tensor:
        ctx.sequence = sequence
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=sequence.group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.sequence), None


class _Gather(torch.autograd.Function):
    """Every rank's tensor, in a new first axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceRanks) -> Tensor:
        ctx.sequence = sequence
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(sequence.size)]
        dist.all_gather(parts, x.contiguous(), group=sequence.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the same from the same, so the other ranks' gradients need not travel to be added up.
        return grad[ctx.sequence.rank] * ctx.sequence.size, None
