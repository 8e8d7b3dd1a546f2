"""The mixture of transformers: one stack of blocks per expert, one attention over all of them.

Each expert keeps its own norms, modulation, text cross-attention and feed-forward, and may have its own width. All
experts share `heads x head_dim`, so that their queries, keys and values are concatenated for one masked attention per
layer. With one expert this is a plain transformer; with the video expert alone it is Wan's, module names and numerics
included (diffusers' `WanTransformerBlock`), so its weights load strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .attention import attend, attention
from .execution import Executed
from .sequence import HeadExchange
from .token_groups import AttentionPlan, GroupHeader, Rotary, TokenGroup, Visibility, attention_plan, header

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
        self.norm_q = FP32RMSNorm(inner, eps=eps)
        self.norm_k = FP32RMSNorm(inner, eps=eps)

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


class ExpertBlock(Executed):
    """One layer of one expert, in the two halves that lie before and after the shared attention."""

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

    def forward(self, *tokens: Float[Tensor, "b n d"], layer: Callable[..., Any]) -> Any:
        """Calls a whole layer that this block is part of. Engines that shard weights gather the block's around it."""
        return layer(*tokens)

    def modulations(self, rows: Float[Tensor, "b m 6 d"]) -> tuple[Modulation, ...]:
        """(shift, scale, gate) of the attention, then of the feed-forward; in float32, as Wan keeps them."""
        return (self.scale_shift_table[:, None].float() + rows.float()).unbind(2)

    def attention_inputs(
        self, x: Float[Tensor, "b n d"], modulations: tuple[Modulation, ...], rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, *_ = modulations
        return self.execution.prepare(_attention_inputs)(self, x, shift, scale, rotary)

    def after_attention(
        self,
        x: Float[Tensor, "b n d"],
        attended: Float[Tensor, "b n h e"],
        text: Float[Tensor, "b l d"],
        modulations: tuple[Modulation, ...],
    ) -> Float[Tensor, "b n d"]:
        _, _, gate, *of_feed_forward = modulations
        prepare = self.execution.prepare
        x, query, key, value = prepare(_text_attention_inputs)(self, x, attended, text, gate)
        read = attention(query, key, value, backend=self.execution.attention)
        return prepare(_feed_forward)(self, x, read, *of_feed_forward)


# The parts of a block between its attentions, as functions: each can be compiled, once for all blocks ----------------


def _attention_inputs(
    block: ExpertBlock, x: Tensor, shift: Modulation, scale: Modulation, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    normed = modulate(block.norm1(x.float()), shift, scale).type_as(x)
    query, (key, value) = block.attn1.queries(normed), block.attn1.keys_values(normed)
    return rotate(query, rotary), rotate(key, rotary), value


def _text_attention_inputs(
    block: ExpertBlock, x: Tensor, attended: Tensor, text: Tensor, gate: Modulation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = (x.float() + per_row(block.attn1.output(attended), gate)).type_as(x)
    return x, block.attn2.queries(block.norm2(x.float()).type_as(x)), *block.attn2.keys_values(text)


def _feed_forward(
    block: ExpertBlock, x: Tensor, read: Tensor, shift: Modulation, scale: Modulation, gate: Modulation
) -> Tensor:
    x = x + block.attn2.output(read)
    fed = block.ffn(modulate(block.norm3(x.float()), shift, scale).type_as(x))
    return (x.float() + per_row(fed.float(), gate)).type_as(x)


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whatever runs around it; Wan is trained that way."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class FP32RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32, with a backward pass written out: in eager torch it takes half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        return cast(Tensor, _RMSNorm.apply(x, self.weight, self.eps))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed)[..., None] / x.shape[-1]
        return grad.addcmul_(normed, along, value=-1).mul_(scale).type_as(x), grad_weight.type_as(weight), None


def per_row(x: Float[Tensor, "b n d"], factor: Modulation) -> Float[Tensor, "b n d"]:
    """Multiply each run of `n / m` tokens by its row of `factor`, by broadcasting (nothing is expanded)."""
    rows = x.unflatten(1, (factor.shape[1], -1))
    return (rows * factor[:, :, None]).flatten(1, 2)


def modulate(x: Float[Tensor, "b n d"], shift: Modulation, scale: Modulation) -> Float[Tensor, "b n d"]:
    rows = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], rows, 1 + scale[:, :, None]).flatten(1, 2)


def rotate(x: Float[Tensor, "b n h e"], rotary: Rotary) -> Float[Tensor, "b n h e"]:
    """Rotary positions on interleaved channel pairs (Wan's convention, not rotate-half), in float32.

    A pair is a complex number and its rotation one complex product: one pass over memory instead of seven. The
    compiler knows no complex numbers, and makes one pass of the written-out product by itself.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rotary[:, None].unbind(-1)
        rotated = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary)[:, None])
    return rotated.flatten(-2).type_as(x)


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
    keep: bool = False,
) -> tuple[list[Float[Tensor, "b n d"]], KeyValueCache]:
    """Run all groups through their experts' blocks; returns each group's tokens and, if asked, keys and values to keep.

    `experts` and `text` (already projected to each expert's width) go by expert name. `past` holds groups that were
    run before (a clean context, say): they are seen where the visibility table lets them be seen, and not recomputed.
    """
    past = past or KeyValueCache()
    headers = [header(group) for group in groups]
    plan = attention_plan(headers, past.headers + headers, visibility, groups[0].tokens.device)
    group_sizes = [(len(group.block_index), group.modulation.shape[1]) for group in groups]
    exchange = HeadExchange(groups[0].sequence, group_sizes, groups[0].tokens.device)
    streams = merged(groups)
    tokens = [stream.tokens for stream in streams]
    present = KeyValueCache(headers=headers if keep else [])
    for layer in range(len(experts[groups[0].expert])):
        blocks = [cast(ExpertBlock, experts[stream.expert][layer]) for stream in streams]
        run = partial(_layer, blocks, streams, text, plan, exchange, past.layers[layer] if past.layers else None, keep)
        run = partial(blocks[0].execution.run_layer, run)
        for block in dict.fromkeys(blocks):
            run = partial(block, layer=run)
        *tokens, keys_values = run(*tokens)
        if keys_values is not None:
            present.layers.append(keys_values)
    return _unmerged(tokens, groups), present


def merged(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Neighbours of one expert as one group, where their modulation rows are as long: fewer and larger products."""
    streams: list[TokenGroup] = []
    for group in groups:
        if streams and _row(streams[-1]) == _row(group):
            group = _joined(streams.pop(), group)
        streams.append(group)
    return streams


def _unmerged(tokens: Sequence[Float[Tensor, "b n d"]], groups: Sequence[TokenGroup]) -> list[Float[Tensor, "b n d"]]:
    """Each group's tokens, of those of the streams."""
    streams, parts = list(tokens), []
    for size in (group.tokens.shape[1] for group in groups):
        part, rest = streams[0].tensor_split([size], 1)
        parts.append(part)
        streams = [rest, *streams[1:]] if rest.shape[1] else streams[1:]
    return parts


def _row(group: TokenGroup) -> tuple[str, int]:
    return group.expert, group.tokens.shape[1] // group.modulation.shape[1]


def _joined(first: TokenGroup, second: TokenGroup) -> TokenGroup:
    return replace(
        first,
        tokens=torch.cat([first.tokens, second.tokens], 1),
        modulation=torch.cat([first.modulation, second.modulation], 1),
        rotary=torch.cat([first.rotary, second.rotary]),
        block_index=torch.cat([first.block_index, second.block_index]),
    )


def _layer(
    blocks: Sequence[ExpertBlock],
    streams: Sequence[TokenGroup],
    text: Mapping[str, Tensor],
    plan: AttentionPlan,
    exchange: HeadExchange,
    past: tuple[Tensor, Tensor] | None,
    keep: bool,
    *tokens: Float[Tensor, "b n d"],
) -> tuple[Any, ...]:
    """One layer of all streams; returns their tokens, and the layer's own keys and values, or None in place of them.

    They are views, of which engines that hook into what a block returns would warn.
    """
    rows = [block.modulations(stream.modulation) for block, stream in zip(blocks, streams, strict=True)]
    inputs = [
        block.attention_inputs(x, row, stream.rotary)
        for block, x, row, stream in zip(blocks, tokens, rows, streams, strict=True)
    ]
    query, key, value = exchange.to_heads(*(torch.cat(parts, 1) for parts in zip(*inputs, strict=True)))
    keys, values = (key, value) if past is None else (torch.cat([past[0], key], 1), torch.cat([past[1], value], 1))
    attended = exchange.to_tokens(attend(query, keys, values, plan, blocks[0].execution.attention))
    parts = attended.split([x.shape[1] for x in tokens], 1)
    after = tuple(
        block.after_attention(x, part, text[stream.expert], row)
        for block, x, part, row, stream in zip(blocks, tokens, parts, rows, streams, strict=True)
    )
    return *after, (key, value) if keep else None
