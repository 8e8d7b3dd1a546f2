"""How long a training step takes, on paper: arithmetic, traffic between GPUs, and what failures cost.

Arithmetic goes by a model-FLOPs utilisation (MFU), given or measured, of a step that computes nothing twice and waits
for no other GPU; both are added here. Rough, and on the safe side: of all traffic only half hides behind arithmetic,
and that of ZeRO-1 and 2 not at all, where DeepSpeed does not overlap the two by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .engine.base import EngineConfig
from .flops import PEAK_BF16_FLOPS, TokenCounts, training_flops
from .memory import FLOAT, ModelSize, Precision, layer_bytes
from .models.execution import recomputing
from .models.video_dit import VideoDiTConfig

GpuName = Literal["h100", "h200", "b200", "gb200", "a100-80", "a100-40", "l40s"]

REACHED = 0.8
"""Share of a nominal bandwidth that large transfers get."""
HIDDEN = 0.5
"""Of traffic that is overlapped with arithmetic, where there is as much of that: never all of it is hidden."""
HOST_MEMORY_BYTES_S = 300e9  # of a machine's memory, shared by its GPUs
UPDATE_BYTES = 52  # per weight: AdamW reads four numbers and writes three, the average three, norm and copies three


@dataclass(frozen=True)
class GpuType:
    peak_flops: float  # bf16, dense, per second
    memory_gb: float
    memory_gb_s: float
    link_gb_s: float  # to the other GPUs of its machine, one way
    host_gb_s: float  # to its machine's memory, one way


# NVIDIA's data sheets of the SXM parts: H100 and H200 Tensor Core GPU; DGX B200 and GB200 NVL72, divided by the number
# of their GPUs; A100 80GB and 40GB; L40S (PCIe). There NVLink's figure is the sum of both directions.
GPU_TYPES: dict[GpuName, GpuType] = {
    "h100": GpuType(PEAK_BF16_FLOPS["H100"], 80, 3350, 450, 64),
    "h200": GpuType(PEAK_BF16_FLOPS["H200"], 141, 4800, 450, 64),
    "b200": GpuType(PEAK_BF16_FLOPS["B200"], 180, 8000, 900, 64),
    "gb200": GpuType(PEAK_BF16_FLOPS["GB200"], 186, 8000, 900, 450),
    "a100-80": GpuType(PEAK_BF16_FLOPS["A100"], 80, 2039, 300, 32),
    "a100-40": GpuType(PEAK_BF16_FLOPS["A100"], 40, 1555, 300, 32),
    "l40s": GpuType(PEAK_BF16_FLOPS["L40S"], 48, 864, 32, 32),
}


@dataclass(frozen=True)
class Cluster:
    gpu: GpuType
    num_gpus: int
    gpus_per_node: int
    network_gb_s: float  # of each GPU to other machines, one way
    offload_gb_s: float  # of each machine's disk that GPUs offload to

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)

    def collective_s(self, num_bytes: float) -> float:
        """Of what passes each rank in a ring over all of them: a machine's adapters work for all its GPUs."""
        speed = self.gpu.link_gb_s
        if self.num_gpus > self.gpus_per_node:
            speed = min(speed, self.gpus_per_node * self.network_gb_s)
        return num_bytes / (REACHED * speed * 1e9)

    def exchange_s(self, num_bytes: float, num_ranks: int) -> float:
        """Of what each of so many neighbours sends to the others, to each something else."""
        speed = self.gpu.link_gb_s if num_ranks <= self.gpus_per_node else self.network_gb_s
        return num_bytes / (REACHED * speed * 1e9)

    def host_s(self, num_bytes: float) -> float:
        return num_bytes / (REACHED * self.gpu.host_gb_s * 1e9)

    def disk_s(self, num_bytes: float) -> float:
        """Of what each GPU's share of a machine's disk is read and written."""
        return num_bytes * min(self.num_gpus, self.gpus_per_node) / (self.offload_gb_s * 1e9)


@dataclass(frozen=True)
class Clips:
    """What a step trains on, if it trains on clips of this size."""

    name: str
    counts: TokenCounts
    num_clips: int
    """Of all ranks."""


def step_s(
    video: VideoDiTConfig, size: ModelSize, clips: Clips, engine: EngineConfig, cluster: Cluster, mfu: float,
    precision: Precision = "bf16",
) -> float:  # fmt: skip
    """Seconds of a step."""
    computing = compute_s(video, clips, engine, cluster, mfu, precision)
    weights = weights_traffic_s(size, engine, cluster)
    overlaps = engine.kind == "accelerate" or engine.zero_stage == 3
    hidden = HIDDEN * min(computing, weights) if overlaps else 0.0
    return (
        computing
        + weights
        - hidden
        + sequence_traffic_s(video, clips, engine, cluster, precision)
        + update_s(size, engine, cluster)
    )


def compute_s(
    video: VideoDiTConfig, clips: Clips, engine: EngineConfig, cluster: Cluster, mfu: float, precision: Precision
) -> float:
    """Arithmetic, with what checkpointing does again: products at the MFU, all else by the memory's bandwidth."""
    again, counts = recomputing(engine.activation_checkpointing, engine.compile), clips.counts
    plain, done = training_flops(video, counts), training_flops(video, counts, again)
    products = (plain.model + done.recomputed - plain.recomputed) / (cluster.gpu.peak_flops * mfu)
    dropped = layer_bytes(video, counts, "none", precision) - layer_bytes(video, counts, again, precision)
    rest = 2 * video.num_layers * dropped / (REACHED * cluster.gpu.memory_gb_s * 1e9)  # written, and read
    return clips.num_clips / cluster.num_gpus * (products + rest)


def unfused_s(video: VideoDiTConfig, clips: Clips, cluster: Cluster, precision: Precision) -> float:
    """What a step takes longer where norms, modulation and rotary are not compiled into one another: what they hand on
    is written and read again, forward and backward."""
    num_bytes = 4 * video.num_layers * layer_bytes(video, clips.counts, "none", precision)
    return clips.num_clips / cluster.num_gpus * num_bytes / (REACHED * cluster.gpu.memory_gb_s * 1e9)


def weights_traffic_s(size: ModelSize, engine: EngineConfig, cluster: Cluster) -> float:
    """Gradients to be added up, and weights to be gathered: float32 numbers, both of them."""
    num, micro_steps = cluster.num_gpus, engine.grad_accum_steps
    once = FLOAT * size.parameters * (num - 1) / num
    passes = _accelerate_passes(engine) if engine.kind == "accelerate" else _deepspeed_passes(engine)
    from_host = 2 * micro_steps * FLOAT * size.parameters / num if engine.offload_weights != "none" else 0
    from_disk = from_host if engine.disk else 0
    return cluster.collective_s(passes * once) + cluster.host_s(from_host) + cluster.disk_s(from_disk)


def _deepspeed_passes(engine: EngineConfig) -> int:
    """Of all weights' worth of numbers through a ring; an all-reduce is two."""
    if engine.zero_stage == 1:  # gradients are reduced in the last micro-step, weights gathered after the update
        return 3
    if engine.zero_stage == 2:  # reduced in every micro-step
        return 2 * engine.grad_accum_steps + 1
    return 3 * engine.grad_accum_steps  # weights for both passes, and gradients to where their weights are


def _accelerate_passes(engine: EngineConfig) -> int:
    """Gradients are added up in the last micro-step: everywhere, or where their weights are."""
    if engine.sharding == "ddp":
        return 2
    return (2 if engine.reshard_after_forward else 1) * engine.grad_accum_steps + 1


def sequence_traffic_s(
    video: VideoDiTConfig, clips: Clips, engine: EngineConfig, cluster: Cluster, precision: Precision
) -> float:
    """Queries, keys, values and results of every layer, to the ranks that have their heads and back."""
    ranks = engine.sequence_parallel
    passes = 2 if engine.activation_checkpointing == "none" else 3  # forward, backward, and forward again
    tokens = clips.num_clips * clips.counts.tokens / cluster.num_gpus
    per_pass = 4 * (2 if precision == "bf16" else FLOAT) * video.width * tokens * (ranks - 1) / ranks
    return cluster.exchange_s(video.num_layers * passes * per_pass, ranks)


def update_s(size: ModelSize, engine: EngineConfig, cluster: Cluster) -> float:
    """The optimizer's update and the average of the weights, each rank on its part; with DDP on all of them."""
    is_whole = engine.kind == "accelerate" and engine.sharding == "ddp"
    part = size.parameters if is_whole else size.parameters / cluster.num_gpus
    if engine.offload_optimizer == "none":
        return UPDATE_BYTES * part / (REACHED * cluster.gpu.memory_gb_s * 1e9)
    on_machine = min(cluster.num_gpus, cluster.gpus_per_node)
    updating = UPDATE_BYTES * part * on_machine / HOST_MEMORY_BYTES_S + cluster.host_s(2 * FLOAT * part)
    return updating + (cluster.disk_s(UPDATE_BYTES * part) if engine.disk else 0)  # as if memory kept nothing of it


# --- failures -----------------------------------------------------------------------------------------------------


def best_interval_s(checkpoint_s: float, between_failures_s: float) -> float:
    """Training between checkpoints that loses the least: Daly's refinement of Young's sqrt(2 * cost * mean time).

    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A
    higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, equation 37.
    """
    if checkpoint_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = checkpoint_s / (2 * between_failures_s)
    return math.sqrt(2 * checkpoint_s * between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def goodput(interval_s: float, checkpoint_s: float, restart_s: float, between_failures_s: float) -> float:
    """Share of the time that is training which was not lost again, under random failures (Daly 2006, equation 20)."""
    mean = between_failures_s
    exponent = (interval_s + checkpoint_s) / mean
    if exponent + restart_s / mean > 500:  # nothing is ever finished
        return 0.0
    return interval_s / (mean * math.exp(restart_s / mean) * math.expm1(exponent))


def mean_model_flops(video: VideoDiTConfig, clips: Sequence[Clips]) -> float:
    """Of a step, where every size of clips is as frequent."""
    return sum(one.num_clips * training_flops(video, one.counts).model for one in clips) / len(clips)
