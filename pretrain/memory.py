"""Bytes that a training step needs on each GPU, on paper: what an engine holds of the weights, and activations.

Weights are float32 under either precision (`pretrain.engine`), so a weight has four bytes in every copy.
Activations are what autograd saves for the backward pass, tensor by tensor as the blocks of `pretrain.models` are
written. Compiled, they save less: what is counted here is then an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from .engine.base import EngineConfig
from .engine.deepspeed import REDUCE_BUCKET
from .flops import TokenCounts
from .models.execution import Recomputing, blocks_of
from .models.video_dit import VideoDiTConfig

FLOAT = 4  # bytes
LIVE_WEIGHTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered rather than gather them again soon: DeepSpeed's stage3_max_live_parameters."""

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    cast: int
    """Of them those in matrix products, of which autocast makes copies."""
    block: int = 0
    """Those of the largest block."""
    outside: int = 0
    """Those of no block."""


def model_size(model: nn.Module) -> ModelSize:
    """Of a model that may be on the meta device."""
    products = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    blocks = [_num_weights(block) for block in blocks_of(model)]
    total = _num_weights(model)
    return ModelSize(total, sum(one.numel() for one in products), max(blocks, default=0), total - sum(blocks))


def _num_weights(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


# --- weights and what goes with them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Bytes on one GPU. What is offloaded is not here, but `on_host` or `on_disk`: a GPU's share of its machine's."""

    weights: int
    gradients: int
    master_copy: int
    moments: int
    average: int
    on_host: int
    on_disk: int
    in_backward: int
    """Buffers of the backward pass: buckets of gradients, gathered weights, bf16 copies."""
    in_update: int
    """Buffers of the optimizer's update, when activations are gone."""

    @property
    def steady(self) -> int:
        return self.weights + self.gradients + self.master_copy + self.moments + self.average

    def peak(self, activations: int) -> int:
        return self.steady + max(self.in_backward + activations, self.in_update)


def states(size: ModelSize, engine: EngineConfig, num_gpus: int, precision: Precision) -> States:
    """The ranks of a sequence shard like all others."""
    if engine.kind == "deepspeed":
        return _deepspeed_states(size, engine, num_gpus, precision)
    if engine.sharding == "ddp":
        return _ddp_states(size, num_gpus, precision)
    return _fsdp_states(size, engine, num_gpus, precision)


def _deepspeed_states(size: ModelSize, engine: EngineConfig, num_gpus: int, precision: Precision) -> States:
    """Small weights, which ZeRO-3 never cuts, are left out."""
    whole, stage = FLOAT * size.parameters, engine.zero_stage
    part = _part(size, num_gpus)
    offloads, offloads_weights = engine.offload_optimizer != "none", engine.offload_weights != "none"
    offloaded = part * (6 * offloads + offloads_weights)  # gradients twice: summed up, and of the last micro-step
    # On a disk also what a checkpoint is written from, and weights while their average stands in for them.
    kept_aside = part * 5 * offloads
    # Gradients are reduced as they come, and go to the CPU where the optimizer is; ZeRO-1 keeps all of its own between
    # micro-steps. Over one micro-batch it holds what ZeRO-2 does.
    partitioned = 0 if offloads else part
    bucket = FLOAT * REDUCE_BUCKET
    gathered = min(FLOAT * LIVE_WEIGHTS, whole) if stage == 3 else 0
    # DeepSpeed's own linear layer under ZeRO-3 lets the copies go at once; else autocast keeps them for the step.
    copies = _copies(size, precision) if stage < 3 else 0
    return States(
        weights=whole if stage < 3 else 0 if offloads_weights else part,
        gradients=whole if stage == 1 and engine.grad_accum_steps > 1 else partitioned,
        master_copy=0 if offloads else part,
        moments=0 if offloads else 2 * part,
        average=0 if offloads else part,
        on_host=0 if engine.disk else offloaded,
        on_disk=offloaded + kept_aside if engine.disk else 0,
        in_backward=bucket * (2 if stage == 3 else 1) + gathered + copies,  # ZeRO-3 fills one as it reduces the other
        in_update=part if stage < 3 and not offloads else 0,  # the partition's gradients, laid end to end
    )


def _ddp_states(size: ModelSize, num_gpus: int, precision: Precision) -> States:
    whole = FLOAT * size.parameters
    return States(
        weights=whole,
        gradients=whole if num_gpus == 1 else 2 * whole,  # DDP adds them up in buckets of its own
        master_copy=0,
        moments=2 * whole,
        average=_part(size, num_gpus),
        on_host=0,
        on_disk=0,
        in_backward=_copies(size, precision),
        in_update=0,
    )


def _fsdp_states(size: ModelSize, engine: EngineConfig, num_gpus: int, precision: Precision) -> States:
    part, whole = _part(size, num_gpus), FLOAT * size.parameters
    # Two blocks, of which one is fetched while the other computes; whole gradients of a block, and laid end to end.
    gathered = FLOAT * (2 * size.block + size.outside) if engine.reshard_after_forward else whole
    return States(
        weights=part,
        gradients=whole if engine.grad_accum_steps > 1 else part,  # they are added up in the last micro-step alone
        master_copy=0,
        moments=2 * part,
        average=part,
        on_host=0,
        on_disk=0,
        in_backward=gathered + FLOAT * (2 * size.block + size.outside) + _copies(size, precision),
        in_update=0,
    )


def _part(size: ModelSize, num_gpus: int) -> int:
    return FLOAT * math.ceil(size.parameters / num_gpus)


def _copies(size: ModelSize, precision: Precision) -> int:
    """Of weights in bfloat16, which autocast makes and keeps for the step."""
    return 2 * size.cast if precision == "bf16" else 0


# --- activations --------------------------------------------------------------------------------------------------


def activation_bytes(
    config: VideoDiTConfig,
    counts: TokenCounts,
    num_clips: int,
    recomputing: Recomputing = "none",
    precision: Precision = "bf16",
    sequence_parallel: int = 1,
) -> int:
    """Most bytes at a time, of a micro-batch of clips: what is kept, and what one layer's backward pass makes."""
    own = _own_tokens(counts, sequence_parallel)
    kept = kept_bytes(config, own, recomputing, precision)
    return num_clips * (kept + working_bytes(config, own, recomputing, precision))


def _own_tokens(counts: TokenCounts, sequence_parallel: int) -> TokenCounts:
    """Of one of the ranks that share a sequence, which is cut within each latent frame."""
    per_row = math.ceil(counts.tokens / counts.rows / sequence_parallel)
    return replace(counts, tokens=per_row * counts.rows)


def kept_bytes(config: VideoDiTConfig, counts: TokenCounts, recomputing: Recomputing, precision: Precision) -> int:
    """What the forward pass of one clip leaves for the backward pass."""
    layers = config.num_layers * layer_bytes(config, counts, recomputing, precision)
    return layers + outer_bytes(config, counts, precision)


def layer_bytes(config: VideoDiTConfig, counts: TokenCounts, recomputing: Recomputing, precision: Precision) -> int:
    """What one layer saves of one clip."""
    d, f, heads = config.width, config.ffn_dim, config.num_attention_heads
    a = 2 if precision == "bf16" else FLOAT
    if recomputing == "full":
        return counts.tokens * a * d
    sums = 8 * heads  # of both attentions' softmax
    if recomputing == "products":
        return counts.tokens * (3 * a * d + sums)  # the layer's input, and what both attentions give
    if recomputing == "selective":
        # the layer's input; queries, keys, values; both attentions and what is made of them; text queries; feed-forward
        return counts.tokens * (a * (10 * d + f) + sums) + counts.text * 2 * a * d
    norms = 3 * 8 + 3 * 4  # mean and deviation of each layer norm, scale of each query-key norm
    # In float32: inputs of three layer norms, two normed inputs before their modulation, the feed-forward's output.
    # In the products' type: what queries, keys and values are made of (3) and the norms of queries and keys read (3),
    # what both attentions read (4) and give, the first one's in two copies (3), what is gated (1); and twice the
    # feed-forward's inner rows, before and after GELU.
    per_token = 6 * FLOAT * d + a * (14 * d + 2 * f) + sums + norms
    modulation = 8 * FLOAT * d
    return counts.tokens * per_token + counts.text * 3 * a * d + counts.rows * modulation


def outer_bytes(config: VideoDiTConfig, counts: TokenCounts, precision: Precision) -> int:
    """What embeddings, head and loss save of one clip, as if all of it was to be predicted."""
    d, a = config.width, 2 if precision == "bf16" else FLOAT
    patch = math.prod(config.patch_size)
    latents, given = config.out_channels * patch, config.in_channels * patch
    per_token = (2 * FLOAT + a) * d + a * given + 2 * FLOAT * latents
    per_text = a * config.text_dim + 4 * a * d
    per_row = FLOAT * (config.freq_dim + 12 * d)
    return counts.tokens * per_token + counts.text * per_text + counts.rows * per_row


def working_bytes(config: VideoDiTConfig, counts: TokenCounts, recomputing: Recomputing, precision: Precision) -> int:
    """What one layer's backward pass makes: its activations again, where they were not kept, and gradients."""
    again = layer_bytes(config, counts, "none", precision) - layer_bytes(config, counts, recomputing, precision)
    a = 2 if precision == "bf16" else FLOAT
    return again + counts.tokens * (4 * FLOAT * config.width + 2 * a * config.ffn_dim)
