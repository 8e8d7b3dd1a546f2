"""What `pretrain.plan` tells: as records, which are its JSON, and as tables."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from configs.tables import side_by_side, table


class StatesPlan(BaseModel):
    """GB on each GPU."""

    sharding: str
    offload: str
    weights: float
    gradients: float
    master_copy: float
    moments: float
    average: float
    in_backward: float
    on_host: float
    on_disk: float
    steady: float


class ClipsPlan(BaseModel):
    """Of one clip; `sequence_parallel` as configured."""

    clips: str
    checkpointing: str
    tokens: int
    forward_tflop: float
    backward_tflop: float
    recomputed_tflop: float
    activations_gb: float


class SettingPlan(BaseModel):
    sharding: str
    offload: str
    sequence_parallel: int
    micro_batch: str  # of each size of clips
    grad_accum_steps: int
    checkpointing: str
    memory_gb: float
    fits: bool
    step_s: float
    samples_per_s: float
    mfu: float  # of the whole: with recomputation and traffic
    days: float
    gpu_hours: float


class GpuPlan(BaseModel):
    gpu: str
    usable_gb: float
    as_configured: str
    best: str
    step_s: float | None
    days: float | None
    gpu_hours: float | None


class GoodputPlan(BaseModel):
    nodes: int
    hours_between_failures: float
    checkpoint_gb: float
    blocked_s: float  # while a checkpoint is copied from the GPUs
    written_s: float  # in the background
    checkpoint_every: int  # steps
    goodput: float
    days_with_failures: float


class Plan(BaseModel):
    parameters: int  # of the video transformer
    parameters_added: int  # of what conditions it on actions
    assumed: dict[str, int]
    gpu: str
    num_gpus: int
    num_steps: int
    mfu: float
    states: list[StatesPlan]
    clips: list[ClipsPlan]
    configured: SettingPlan
    best: SettingPlan
    gpu_types: list[GpuPlan]
    failures: GoodputPlan
    overrides: list[str]  # that make the configured run the best one
    deepspeed: dict[str, Any] | None  # DeepSpeed's JSON of the best one; null: another engine


def show(plan: Plan, out: Console) -> None:
    out.print(
        f"{plan.parameters:,} parameters, and {plan.parameters_added:,} for actions; {plan.num_steps} steps on "
        f"{plan.num_gpus} {plan.gpu} at an MFU of {plan.mfu:.0%}, before recomputation and traffic"
    )
    for name, value in plan.assumed.items():
        out.print(f"model.{name}={value} is assumed, for there is no dataset to ask")
    for part in (
        table(plan.states, "What the engine holds, in GB on each GPU"),
        table(plan.clips, "One clip (latent frames x channels x rows x columns, or a dataset's size)"),
        side_by_side({"as configured": plan.configured, "best": plan.best}, f"On {plan.num_gpus} {plan.gpu}"),
        table(plan.gpu_types, f"On {plan.num_gpus} of each type, at the same MFU"),
        side_by_side({"best": plan.failures}, "When machines fail"),
    ):
        out.print()
        out.print(part)
    out.print(f"\nBest, beside the config: {' '.join(plan.overrides) or 'nothing to change'}")
    if plan.deepspeed is not None:
        out.print(f"DeepSpeed's JSON for it:\n{json.dumps(plan.deepspeed, indent=1)}")
