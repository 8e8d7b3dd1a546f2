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

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from .sequence import ONE_RANK, SequenceRanks

Rotary = Complex[Tensor, "n half"]
"""Rotation per token and per pair of head channels, as complex numbers of modulus 1."""


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


def visible(rule: Rule | Visible, query: Int[Tensor, "q"], key: Int[Tensor, "k"]) -> Bool[Tensor, "q k"]:
    """Apply one rule to the chunk indices of two groups; True means "may look at"."""
    if isinstance(rule, Rule):
        rule = Visible(rule)
    query, key = query[:, None], key[None, :]
    distance = query - key
    mask = {
        Rule.NEVER: torch.zeros_like(distance, dtype=torch.bool),
        Rule.ALWAYS: torch.ones_like(distance, dtype=torch.bool),
        Rule.SAME_BLOCK: distance == 0,
        Rule.EARLIER_BLOCKS: distance > 0,
        Rule.SAME_OR_EARLIER_BLOCKS: distance >= 0,
    }[rule.rule]
    return mask if rule.window is None else mask & (distance.abs() <= rule.window)


GroupHeader = tuple[str, tuple[int, ...]]
"""What a mask depends on: a group's name and the chunk index of each of its tokens."""


def header(group: TokenGroup) -> GroupHeader:
    return group.name, tuple(group.block_index.tolist())


def attention_mask(
    queries: Sequence[GroupHeader], keys: Sequence[GroupHeader], visibility: Visibility, device: torch.device
) -> Bool[Tensor, "q k"] | None:
    """The mask of one sequence, True = visible; None when every token sees every token (so fast paths apply)."""
    rules = tuple(sorted((pair, _as_visible(rule)) for pair, rule in visibility.items()))
    mask = _compiled_mask(tuple(queries), tuple(keys), rules)
    return None if mask is None else mask.to(device)


def _as_visible(rule: Rule | Visible) -> tuple[str, int]:
    rule = Visible(rule) if isinstance(rule, Rule) else rule
    return rule.rule.value, -1 if rule.window is None else rule.window


@lru_cache(maxsize=256)
def _compiled_mask(
    queries: tuple[GroupHeader, ...],
    keys: tuple[GroupHeader, ...],
    rules: tuple[tuple[tuple[str, str], tuple[str, int]], ...],
) -> Bool[Tensor, "q k"] | None:
    table = {pair: Visible(Rule(rule), None if window < 0 else window) for pair, (rule, window) in rules}
    rows = [
        torch.cat(
            [
                visible(table.get((query, key), Rule.NEVER), torch.tensor(query_blocks), torch.tensor(key_blocks))
                for key, key_blocks in keys
            ],
            dim=1,
        )
        for query, query_blocks in queries
    ]
    mask = torch.cat(rows)
    if not mask.any(1).all():
        blind = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"token {blind} sees nothing: give its group a rule for itself in the visibility table")
    return None if mask.all() else mask
