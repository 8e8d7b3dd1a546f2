"""Token groups and the visibility table: which kind of token may look at which.

Every published video-action system differs from its neighbours in a handful of choices. Two of them live here as data:
the groups of tokens in a sequence, and one rule per ordered pair of groups. A pair that is not in the table never sees
each other, so a new group changes nothing until somebody says who may look at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .sequence import ONE_RANK, SequenceRanks

Rotary = Float[Tensor, "n half 2"]
"""Rotation per token and per pair of head channels: cosine and sine, as complex numbers lie in memory."""


@dataclass(frozen=True)
class TokenGroup:
    """One kind of token in the sequence, ready for the blocks of the expert that carries it.

    `modulation` has one row per `n / m` consecutive tokens (for video one row per latent frame), because tokens that
    share a flow time share their modulation; `m` divides `n`.
    """

    name: str
    expert: str
    tokens: Float[Tensor, "b n d"]
    modulation: Float[Tensor, "b m 6 d"]
    rotary: Rotary
    block_index: Int[Tensor, "m"]
    """Temporal chunk of each token, for the rules that compare chunks; of all tokens, on every rank."""
    sequence: SequenceRanks = ONE_RANK
    """Who has the other tokens, where `tokens` and `rotary` are a part."""

    def split(self, sequence: SequenceRanks) -> TokenGroup:
        """This rank's part of a whole group."""
        rows = self.modulation.shape[1]
        tokens, rotary = sequence.part(self.tokens, rows, dim=1), sequence.part(self.rotary, rows, dim=0)
        return replace(self, tokens=tokens, rotary=rotary, sequence=sequence)


class Rule(StrEnum):
    """Which tokens of a key group a query token sees, by temporal chunk."""

    NEVER = "never"
    ALWAYS = "always"
    SAME_BLOCK = "same_block"
    EARLIER_BLOCKS = "earlier_blocks"
    SAME_OR_EARLIER_BLOCKS = "same_or_earlier_blocks"


@dataclass(frozen=True)
class Visible:
    """A rule, optionally limited to key chunks at most `window` chunks away."""

    rule: Rule
    window: int | None = None


Visibility = Mapping[tuple[str, str], Rule | Visible]
"""(query group, key group) -> rule. A missing pair is `never`."""


FAR = 1 << 30
_DISTANCES = {
    Rule.NEVER: (1, 0),
    Rule.ALWAYS: (-FAR, FAR),
    Rule.SAME_BLOCK: (0, 0),
    Rule.EARLIER_BLOCKS: (1, FAR),
    Rule.SAME_OR_EARLIER_BLOCKS: (0, FAR),
}


def distances(rule: Rule | Visible) -> tuple[int, int]:
    """Smallest and largest number of chunks that a key may lie before its query, both included; smallest first."""
    if isinstance(rule, Rule):
        return _DISTANCES[rule]
    low, high = _DISTANCES[rule.rule]
    return (low, high) if rule.window is None else (max(low, -rule.window), min(high, rule.window))


def visible(rule: Rule | Visible, query: Int[Tensor, "q"], key: Int[Tensor, "k"]) -> Bool[Tensor, "q k"]:
    """Apply one rule to the chunk indices of two groups; True means "may look at"."""
    low, high = distances(rule)
    distance = query[:, None] - key[None, :]
    return (low <= distance) & (distance <= high)


GroupHeader = tuple[str, tuple[int, ...]]
"""What a mask depends on: a group's name and the chunk index of each of its tokens."""


def header(group: TokenGroup) -> GroupHeader:
    return group.name, tuple(group.block_index.tolist())


@dataclass(frozen=True)
class Part:
    """Consecutive queries that look at the same groups of keys; `mask` is None where they see all of those."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Bool[Tensor, "q k"] | BlockMask | None


AttentionPlan = Sequence[Part]
"""The attention of one sequence, so that no product is computed whose result would be hidden."""


_Rules = Mapping[tuple[str, str], tuple[int, int]]
_Table = tuple[tuple[tuple[str, str], tuple[int, int]], ...]


def attention_plan(
    queries: Sequence[GroupHeader], keys: Sequence[GroupHeader], visibility: Visibility, device: torch.device
) -> AttentionPlan:
    """Who looks at whom, group by group: without a mask where whole groups see whole groups.

    A mask is a FlexAttention block mask on a GPU, where it saves the hidden blocks' work, and boolean on a CPU.
    """
    table = tuple(sorted((pair, distances(rule)) for pair, rule in visibility.items()))
    return _plan(tuple(queries), tuple(keys), table, device)


@lru_cache(maxsize=256)
def _plan(
    queries: tuple[GroupHeader, ...], keys: tuple[GroupHeader, ...], table: _Table, device: torch.device
) -> AttentionPlan:
    rules = dict(table)
    key_slices = _slices(keys)
    parts: list[Part] = []
    for query, rows in zip(queries, _slices(queries), strict=True):
        by_chunk = [_mask_of_chunks(query, key, rules) for key in keys]
        if not torch.cat(by_chunk, 1).any(1).all():
            raise ValueError(f"a token of {query[0]} sees nothing: give it a rule for itself in the visibility table")
        seen = [number for number, mask in enumerate(by_chunk) if mask.any()]
        is_whole = all(by_chunk[number].all() for number in seen)
        mask = None if is_whole else _mask(query, [keys[number] for number in seen], rules, device)
        part = Part(rows, _joined([key_slices[number] for number in seen]), mask)
        if parts and parts[-1].mask is None and mask is None and parts[-1].keys == part.keys:
            part = replace(part, queries=slice(parts.pop().queries.start, rows.stop))
        parts.append(part)
    return parts


def _mask_of_chunks(query: GroupHeader, key: GroupHeader, rules: _Rules) -> Bool[Tensor, "q k"]:
    """The rule of two groups on the chunks that occur in them."""
    low, high = rules.get((query[0], key[0]), _DISTANCES[Rule.NEVER])
    distance = torch.tensor(sorted(set(query[1])))[:, None] - torch.tensor(sorted(set(key[1])))
    return (low <= distance) & (distance <= high)


def _mask(
    query: GroupHeader, keys: Sequence[GroupHeader], rules: _Rules, device: torch.device
) -> Bool[Tensor, "q k"] | BlockMask:
    bounds = [rules.get((query[0], name), _DISTANCES[Rule.NEVER]) for name, _ in keys]
    low, high = (
        torch.cat([torch.full((len(chunks),), bound[end]) for bound, (_, chunks) in zip(bounds, keys, strict=True)])
        for end in (0, 1)
    )
    query_chunk, key_chunk = torch.tensor(query[1]), torch.cat([torch.tensor(chunks) for _, chunks in keys])
    low, high, query_chunk, key_chunk = (x.to(device) for x in (low, high, query_chunk, key_chunk))

    def is_visible(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        distance = query_chunk[q] - key_chunk[k]
        return (low[k] <= distance) & (distance <= high[k])

    num_queries, num_keys = len(query_chunk), len(key_chunk)
    if _takes_block_masks(device):
        return create_block_mask(is_visible, None, None, num_queries, num_keys, device=device.type)
    return is_visible(None, None, torch.arange(num_queries)[:, None], torch.arange(num_keys))


def _takes_block_masks(device: torch.device) -> bool:
    return device.type == "cuda"


def _slices(groups: Sequence[GroupHeader]) -> list[slice]:
    ends = list(accumulate(len(chunks) for _, chunks in groups))
    return [slice(end - len(chunks), end) for end, (_, chunks) in zip(ends, groups, strict=True)]


def _joined(parts: Sequence[slice]) -> tuple[slice, ...]:
    """Neighbours as one."""
    joined: list[slice] = []
    for part in parts:
        start = joined.pop().start if joined and joined[-1].stop == part.start else part.start
        joined.append(slice(start, part.stop))
    return tuple(joined)
