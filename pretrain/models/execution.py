"""How blocks are computed: attention kernel, compilation, activation checkpointing. Outputs are equal up to rounding.

An engine sets it on a whole model (`set_execution`); a model by itself runs in plain eager torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .attention import AttentionBackend

Checkpointing = Literal["none", "selective", "full"]
Recomputing = Checkpointing | Literal["products"]
"""What the backward pass computes again; `products`: all but attentions."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Execution:
    """Of a stack of blocks."""

    attention: AttentionBackend = "sdpa"
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False

    def prepare(self, function: FunctionT) -> FunctionT:
        """A part of a block without attention (norms, modulation, rotary, products), fused where that is asked for."""
        return _compiled(function) if self.compile else function

    def run_layer(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """A layer whose activations are kept, or computed again in the backward pass."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return layer(*inputs)
        if self.activation_checkpointing == "full":
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def recomputing(checkpointing: Checkpointing, is_compiled: bool) -> Recomputing:
    """What checkpointing comes to: into what is compiled the selective one cannot look, and keeps no products there."""
    return "products" if checkpointing == "selective" and is_compiled else checkpointing


class Executed(nn.Module):
    """A module that looks at its `execution`."""

    execution = Execution()


def set_execution(model: nn.Module, execution: Execution) -> None:
    for module in model.modules():
        if isinstance(module, Executed):
            module.execution = execution


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of its stacks: what the outer `ModuleList`s hold."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks_of(child)


@cache
def _compiled(function: Any) -> Any:
    """One compiled function for all blocks: their weights are its inputs, so it is compiled once, not once a layer."""
    return torch.compile(function)


aten = torch.ops.aten
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
}
"""What selective checkpointing keeps; norms, modulation, rotary and GELU are cheap to compute again."""


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
