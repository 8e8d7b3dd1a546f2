"""Attention kernels: torch's own back ends, FlexAttention for block masks, and one of ours for bf16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .token_groups import AttentionPlan

AttentionBackend = Literal["sdpa", "cudnn", "flash", "efficient", "math", "blockwise"]
"""`sdpa` leaves the choice to torch; `blockwise` is ours, for bf16 on CPUs where torch's kernel is slow."""

Mask: TypeAlias = Bool[Tensor, "q k"] | BlockMask | None

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(
    query: Float[Tensor, "b q h e"],
    key: Float[Tensor, "b k h e"],
    value: Float[Tensor, "b k h e"],
    plan: AttentionPlan,
    backend: AttentionBackend = "sdpa",
) -> Float[Tensor, "b q h e"]:
    """Attention of a whole sequence of groups, part by part: only what is seen is computed."""
    parts = [
        attention(query[:, part.queries], _rows(key, part.keys), _rows(value, part.keys), part.mask, backend)
        for part in plan
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows(x: Tensor, parts: Sequence[slice]) -> Tensor:
    return x[:, parts[0]] if len(parts) == 1 else torch.cat([x[:, part] for part in parts], 1)


def attention(
    query: Float[Tensor, "b q h e"],
    key: Float[Tensor, "b k h e"],
    value: Float[Tensor, "b k h e"],
    mask: Mask = None,
    backend: AttentionBackend = "sdpa",
) -> Float[Tensor, "b q h e"]:
    """Scaled dot-product attention; True in the mask means visible."""
    if backend == "blockwise" and value.dtype == torch.bfloat16 and not isinstance(mask, BlockMask):
        # Autocast leaves normed queries and keys in float32, and does not know what is computed here.
        with torch.autocast("cpu", enabled=False):
            return _blockwise(query.type_as(value), key.type_as(value), value, mask)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if isinstance(mask, BlockMask):
        out = _flex_attention(query.device.type)(query.type_as(value), key.type_as(value), value, block_mask=mask)
    else:
        with _preferring(backend):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2)


def _preferring(backend: AttentionBackend) -> AbstractContextManager[Any]:
    if backend not in SDPA_BACKENDS:
        return nullcontext()
    # What the kernel cannot do (float32, a mask) falls to the ones that can do everything.
    order = dict.fromkeys([SDPA_BACKENDS[backend], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return sdpa_kernel(list(order), set_priority=True)


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Only compiled does it skip what is masked; uncompiled (on a CPU, in tests) it computes everything."""
    return cast(Callable[..., Any], torch.compile(flex_attention) if device_type == "cuda" else flex_attention)


# --- bf16 on a CPU ------------------------------------------------------------------------------------------------

BLOCK_BYTES = 8 << 20  # of scores at a time: they stay in the cache
KEPT_BYTES = 64 << 20  # of probabilities per call that are kept for the backward pass; beyond it they are recomputed


def _blockwise(
    query: Float[Tensor, "b q h e"],
    key: Float[Tensor, "b k h e"],
    value: Float[Tensor, "b k h e"],
    mask: Bool[Tensor, "q k"] | None,
) -> Float[Tensor, "b q h e"]:
    batch = len(query)
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return _BlockwiseAttention.apply(*heads_first, mask).unflatten(0, (batch, -1)).transpose(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    """Attention as matrix products, a block of queries at a time.

    Where torch's CPU kernel finds no bf16 instructions of its own (it looks for AMX), its small products run at a
    fifth of the speed of oneDNN's; and its backward pass is slow on short sequences everywhere.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        kept = []
        keeps = _score_bytes(query, key) <= KEPT_BYTES
        for rows in _blocks(query, key):
            probabilities = _probabilities(query[:, rows], key, mask if mask is None else mask[rows])
            out[:, rows] = torch.bmm(probabilities, value)
            if keeps:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, mask, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mask, *kept = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))  # sums over blocks
        for number, rows in enumerate(_blocks(query, key)):
            if kept:
                probabilities = kept[number]
            else:
                probabilities = _probabilities(query[:, rows], key, mask if mask is None else mask[rows])
            grad_value += torch.bmm(probabilities.transpose(1, 2), grad[:, rows])
            grad_probabilities = torch.bmm(grad[:, rows], value.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_query[:, rows] = _scaled_product(grad_scores, key, scale)
            grad_key += torch.bmm(grad_scores.transpose(1, 2), query[:, rows])
        return grad_query, grad_key.mul_(scale).type_as(key), grad_value.type_as(value), None


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    count = query.shape[1]
    size = max(16, count * BLOCK_BYTES // _score_bytes(query, key))
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _score_bytes(query: Tensor, key: Tensor) -> int:
    return len(query) * query.shape[1] * key.shape[1] * query.element_size()


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = _scaled_product(query, key.transpose(1, 2), query.shape[-1] ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return torch.softmax(scores, -1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The scale is applied before the product is rounded to bf16."""
    unused = left.new_empty(()).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(unused, left, right, beta=0, alpha=scale)
