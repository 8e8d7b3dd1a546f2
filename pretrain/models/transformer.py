"""The mixture of transformers: one stack of blocks per expert, one attention over all of them.

Each expert keeps its own norms, modulation, text cross-attention and feed-forward, and may have its own width. All
experts share `heads x head_dim`, so that their queries, keys and values are concatenated for one masked attention per
layer. With one expert this is a plain transformer; with the video expert alone it is Wan's, module names and numerics
included (diffusers' `WanTransformerBlock`), so its weights load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .sequence import HeadExchange
from .token_groups import GroupHeader, Rotary, TokenGroup, Visibility, attention_mask, header

Modulation = Float[Tensor, "b m d"]


class Attention(nn.Module):
    """Projections and query-key norm of one attention; RMSNorm runs over all heads at once, as in Wan."""

    def __init__(self, width: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])  # a list because diffusers' has dropout as item 1
        self.norm_q = nn.RMSNorm(inner, eps=eps)
        self.norm_k = nn.RMSNorm(inner, eps=eps)

    def queries(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n h e"]:
        return self.norm_q(self.to_q(x)).unflatten(2, (self.heads, -1))

    def keys_values(self, x: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n h e"], Float[Tensor, "b n h e"]]:
        return self.norm_k(self.to_k(x)).unflatten(2, (self.heads, -1)), self.to_v(x).unflatten(2, (self.heads, -1))

    def output(self, x: Float[Tensor, "b n h e"]) -> Float[Tensor, "b n d"]:
        return self.to_out[0](x.flatten(2))


class GeluProjection(nn.Module):
    """Linear then tanh-GELU; its one parameter name (`proj`) is diffusers'."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class ExpertBlock(nn.Module):
    """One layer of one expert, in the two halves that lie before and after the shared attention."""

    entry_points = ("modulations", "attention_inputs", "after_attention")  # it has no forward for FSDP2 to hook into

    def __init__(
        self, width: int, ffn_dim: int, heads: int, head_dim: int, eps: float = 1e-6, cross_attn_norm: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, heads, head_dim, eps)
        self.attn2 = Attention(width, heads, head_dim, eps)
        self.norm2 = FP32LayerNorm(width, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, ffn_dim)
        self.norm3 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def modulations(self, rows: Float[Tensor, "b m 6 d"]) -> tuple[Modulation, ...]:
        """(shift, scale, gate) of the attention, then of the feed-forward; in float32, as Wan keeps them."""
        return (self.scale_shift_table[:, None].float() + rows.float()).unbind(2)

    def attention_inputs(self, x: Float[Tensor, "b n d"], shift: Modulation, scale: Modulation) -> tuple[Tensor, ...]:
        normed = modulate(self.norm1(x.float()), shift, scale).type_as(x)
        return self.attn1.queries(normed), *self.attn1.keys_values(normed)

    def after_attention(
        self,
        x: Float[Tensor, "b n d"],
        attended: Float[Tensor, "b n h e"],
        text: Float[Tensor, "b l d"],
        modulations: tuple[Modulation, ...],
    ) -> Float[Tensor, "b n d"]:
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = modulations
        x = (x.float() + per_row(self.attn1.output(attended), gate)).type_as(x)
        query = self.attn2.queries(self.norm2(x.float()).type_as(x))
        x = x + self.attn2.output(attention(query, *self.attn2.keys_values(text)))
        fed = self.ffn(modulate(self.norm3(x.float()), ffn_shift, ffn_scale).type_as(x))
        return (x.float() + per_row(fed.float(), ffn_gate)).type_as(x)


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whatever runs around it; Wan is trained that way."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


def per_row(x: Float[Tensor, "b n d"], factor: Modulation) -> Float[Tensor, "b n d"]:
    """Multiply each run of `n / m` tokens by its row of `factor`, by broadcasting (nothing is expanded)."""
    rows = x.unflatten(1, (factor.shape[1], -1))
    return (rows * factor[:, :, None]).flatten(1, 2)


def modulate(x: Float[Tensor, "b n d"], shift: Modulation, scale: Modulation) -> Float[Tensor, "b n d"]:
    rows = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], rows, 1 + scale[:, :, None]).flatten(1, 2)


def rotate(x: Float[Tensor, "b n h e"], rotary: Rotary) -> Float[Tensor, "b n h e"]:
    """Rotary positions on interleaved channel pairs (Wan's convention, not rotate-half), in float32.

    A pair is a complex number and its rotation one complex product: one pass over memory instead of seven.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[:, None]).flatten(-2).type_as(x)


def attention(
    query: Float[Tensor, "b q h e"],
    key: Float[Tensor, "b k h e"],
    value: Float[Tensor, "b k h e"],
    mask: Bool[Tensor, "q k"] | None = None,
) -> Float[Tensor, "b q h e"]:
    """Scaled dot-product attention; True in the mask means visible."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@dataclass
class KeyValueCache:
    """Keys and values of groups that no later group can change, one pair per layer."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    headers: list[GroupHeader] = field(default_factory=list)

    def repeat(self, count: int) -> KeyValueCache:
        """The same cache for `count` sequences per sample, consecutively (several futures from one context)."""
        layers = [(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in self.layers]
        return KeyValueCache(layers, list(self.headers))


def run_experts(
    experts: Mapping[str, nn.ModuleList],
    text: Mapping[str, Float[Tensor, "b l d"]],
    groups: Sequence[TokenGroup],
    visibility: Visibility,
    past: KeyValueCache | None = None,
) -> tuple[list[Float[Tensor, "b n d"]], KeyValueCache]:
    """Run all groups through their experts' blocks; returns each group's tokens and this call's keys and values.

    `experts` and `text` (already projected to each expert's width) go by expert name. `past` holds groups that were
    run before (a clean context, say): they are seen where the visibility table lets them be seen, and not recomputed.
    """
    past = past or KeyValueCache()
    headers = [header(group) for group in groups]
    mask = attention_mask(headers, past.headers + headers, visibility, groups[0].tokens.device)
    group_sizes = [(len(group.block_index), group.modulation.shape[1]) for group in groups]
    exchange = HeadExchange(groups[0].sequence, group_sizes, groups[0].tokens.device)
    sizes = [group.tokens.shape[1] for group in groups]
    tokens = [group.tokens for group in groups]
    present = KeyValueCache(headers=headers)
    for layer in range(len(experts[groups[0].expert])):
        blocks = [cast(ExpertBlock, experts[group.expert][layer]) for group in groups]
        modulations = [block.modulations(group.modulation) for block, group in zip(blocks, groups, strict=True)]
        queries, keys, values = [], [], []
        for block, x, rows, group in zip(blocks, tokens, modulations, groups, strict=True):
            query, key, value = block.attention_inputs(x, rows[0], rows[1])
            queries.append(rotate(query, group.rotary))
            keys.append(rotate(key, group.rotary))
            values.append(value)
        query, key, value = exchange.to_heads(*(torch.cat(parts, 1) for parts in (queries, keys, values)))
        present.layers.append((key, value))
        if past.layers:
            key = torch.cat([past.layers[layer][0], key], 1)
            value = torch.cat([past.layers[layer][1], value], 1)
        attended = exchange.to_tokens(attention(query, key, value, mask)).split(sizes, dim=1)
        tokens = [
            block.after_attention(x, part, text[group.expert], rows)
            for block, x, part, rows, group in zip(blocks, tokens, attended, modulations, groups, strict=True)
        ]
    return tokens, present
