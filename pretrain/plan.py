"""What a pretraining run needs and takes, on paper: parameters, memory, FLOPs, time, and the best way to lay it out.

    python -m pretrain.plan --config configs/pretrain/wan_1_3b.yaml gpu=h200 num_gpus=64 latent_shape=[5,16,32,40]

Takes the config of a pretraining run, and settings of its own beside it. Nothing is launched, and no GPU is needed.
Without `latent_shape` the sizes of clips are those of the dataset. `--json` writes all figures.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from configs.loader import UserError, run_command
from configs.tables import console
from data_pipeline.datasets import Datasets
from data_pipeline.sample_plan import batch_sizes

from .engine import EngineConfig
from .engine.deepspeed import deepspeed_config
from .engine.sequence_parallel import check_split
from .flops import training_flops, world_model_tokens
from .memory import ModelSize, Precision, activation_bytes, model_size, states
from .metrics import read_metrics
from .models.execution import Checkpointing, recomputing
from .models.video_dit import Size
from .plan_report import ClipsPlan, GoodputPlan, GpuPlan, Plan, SettingPlan, StatesPlan, show
from .step_time import (
    GPU_TYPES,
    Clips,
    Cluster,
    GpuName,
    best_interval_s,
    goodput,
    mean_model_flops,
    step_s,
    unfused_s,
)
from .steps import check_micro_batches
from .train import PretrainConfig
from .world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel, resolve

USABLE = 0.9
"""Of a GPU's memory; the rest goes to CUDA, to NCCL and into gaps."""
CHECKPOINT_BYTES = 16  # per weight: itself, its average and two moments
ASSUMED = {"action_dim": 7, "actions_per_latent": 4}
"""Where neither the config nor a dataset says it; a few thousand weights hang on it."""
LEAST_MFU = 1e-4
Count = Annotated[int, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=1e-3, le=1e9)]
"""Hours, seconds or GB/s of a cluster: far beyond any, so what is smaller or larger is a slip of the keyboard."""
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
SHARDINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "deepspeed": tuple(
        {"zero_stage": stage, "offload_optimizer": optimizer, "offload_weights": weights}
        for stage, optimizer, weights in (
            *((1, "none", "none"), (1, "cpu", "none"), (2, "none", "none"), (2, "cpu", "none")),
            *((3, "none", "none"), (3, "cpu", "none"), (3, "cpu", "cpu")),
        )
    ),
    "accelerate": (
        {"sharding": "ddp"},
        {"sharding": "fsdp2", "reshard_after_forward": False},
        {"sharding": "fsdp2", "reshard_after_forward": True},
    ),
}
"""What an engine can do with weights and states, by its kind; the plainest first. `shardings` knows of disks."""


class PlanConfig(PretrainConfig):
    """A pretraining run, and where it is to run."""

    gpu: GpuName = Field("h200", description="type of GPU; what fits on the others is told as well")
    num_gpus: Count = Field(8, description="GPUs of the run, which are its ranks")
    gpus_per_node: Count = Field(8, description="GPUs of a machine")
    latent_shape: tuple[Size, Size, Size, Size] | None = Field(
        None, description="latents of a clip: frames, channels, rows, columns; null: those of loader.dataset"
    )
    mfu: float = Field(
        0.4,
        ge=LEAST_MFU,
        le=1,
        description="share of the peak that a step reaches with this `engine.compile`, no recomputation, on one GPU",
    )
    measured: Path | None = Field(
        None, description="take the MFU from metrics.jsonl of a run like this one, or from benchmarks.gpu's JSON"
    )
    network_gb_s: Rate = Field(50.0, description="GB/s per GPU between machines, one way (400 Gbit/s adapters: 50)")
    node_failure_h: Rate = Field(
        # 419 unexpected interruptions in 54 days on 2048 machines of eight H100: arXiv 2407.21783, section 3.3.4
        6300.0, description="mean hours between failures of one machine"
    )  # fmt: skip
    restart_s: Rate = Field(300.0, description="from a failure until the run computes again")
    disk_gb_s: Rate = Field(2.0, description="GB/s per machine that the checkpoints' disk takes")
    offload_gb_s: Rate = Field(5.0, description="GB/s per machine of the disk with engine.offload_folder")
    as_json: bool = Field(False, alias="json", description="write JSON instead of tables")


# --- the run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What has to be computed, wherever."""

    model: ObservationSpaceConfig
    size: ModelSize
    clips: tuple[Clips, ...]
    precision: Precision

    @classmethod
    def of(cls, config: PlanConfig) -> Workload:
        model, shapes = shown(config)
        with torch.device("meta"):
            size = model_size(ObservationSpaceWorldModel(model))
        cells = {name: t * h * w for name, (t, _, h, w) in shapes.items()}
        clips = [
            Clips(
                name,
                world_model_tokens(model.video, (t, h, w), config.loader.text_length, model.context_latent_frames),
                batch_sizes(config.loader, cells)[name],
            )
            for name, (t, _, h, w) in shapes.items()
        ]
        return cls(model, size, tuple(clips), "fp32" if config.engine.precision == "fp32" else "bf16")


@dataclass(frozen=True)
class Price:
    memory: int  # bytes on each GPU
    step_s: float
    fits: bool


def main(config: PlanConfig) -> None:
    found = lay_out(config)
    if config.as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
    else:
        show(found, console())


def lay_out(config: PlanConfig) -> Plan:
    work = Workload.of(config)
    check(config, work)
    mfu = config.mfu if config.measured is None else measured_mfu(config, work)
    best = cheapest(config, work, config.gpu, mfu)
    if best is None:
        raise UserError(_too_large(config, work, mfu))
    parameters = parameters_of_video(work.model)
    told = setting_plan(config, work, best, mfu)
    return Plan(
        parameters=parameters,
        parameters_added=work.size.parameters - parameters,
        assumed=assumed(config),
        gpu=config.gpu,
        num_gpus=config.num_gpus,
        num_steps=config.num_steps,
        mfu=mfu,
        states=[states_plan(config, work, sharding) for sharding in shardings(config.engine)],
        clips=[clips_plan(config, work, clips, mode) for clips in work.clips for mode in MODES],
        configured=setting_plan(config, work, config.engine, mfu),
        best=told,
        gpu_types=[gpu_plan(config, work, gpu, mfu) for gpu in GPU_TYPES],
        failures=goodput_plan(config, work, told),
        overrides=overrides(config.engine, best),
        deepspeed=deepspeed_config(best, config.optimizer, work.precision) if best.kind == "deepspeed" else None,
    )


def shown(config: PlanConfig) -> tuple[ObservationSpaceConfig, dict[str, tuple[int, int, int, int]]]:
    """The model with no field left open, and the latent shape of every size of clips."""
    if config.latent_shape is None:
        try:
            datasets = Datasets.open(config.loader.addresses, config.loader.storage)
        except UserError as error:
            raise UserError(f"{error} To plan without a dataset, give latent_shape=[t,c,h,w].") from None
        inputs = datasets.inputs(config.loader.inputs)
        return resolve(config.model, inputs), {one.bucket: one.latent_shape for one in inputs.each}
    _check_shape(config.model, config.latent_shape)
    settled = config.model.model_copy(update={**assumed(config), "residual_std": 1.0})
    return settled, {"x".join(map(str, config.latent_shape)): config.latent_shape}


def assumed(config: PlanConfig) -> dict[str, int]:
    if config.latent_shape is None:
        return {}
    return {name: value for name, value in ASSUMED.items() if getattr(config.model, name) is None}


def parameters_of_video(model: ObservationSpaceConfig) -> int:
    with torch.device("meta"):
        return model_size(ObservationSpaceWorldModel(model).video).parameters


# --- what cannot be -----------------------------------------------------------------------------------------------


def check(config: PlanConfig, work: Workload) -> None:
    check_split(config.engine.sequence_parallel, work.model.video.num_attention_heads, config.num_gpus)
    check_micro_batches({one.name: one.num_clips for one in work.clips}, config.engine, config.num_gpus)


def _check_shape(model: ObservationSpaceConfig, shape: tuple[int, int, int, int]) -> None:
    (t, c, h, w), (s, p, q) = shape, model.video.patch_size
    if c != model.video.out_channels:
        raise UserError(
            f"latent_shape={list(shape)} has {c} channels, but model.video.out_channels={model.video.out_channels}; "
            "make both the same."
        )
    if t % s or h % p or w % q:
        raise UserError(
            f"model.video.patch_size={[s, p, q]} does not divide latent_shape={list(shape)}; choose multiples of it "
            "as frames, rows and columns."
        )
    context = max(model.context_latent_frames, *(model.drawn_context_latent_frames or (0,)))
    if t <= context:
        raise UserError(
            f"latent_shape={list(shape)} has {t} frames, of which model.context_latent_frames or "
            f"drawn_context_latent_frames={context} leave nothing to predict; give more frames than that."
        )


def _too_large(config: PlanConfig, work: Workload, mfu: float) -> str:
    every = [(price(config, work, one, config.gpu, mfu).memory, one) for one in settings(config, work)]
    memory, engine = min(every, key=lambda pair: pair[0])
    largest = max(work.clips, key=lambda one: one.counts.tokens)
    others = [name for name in GPU_TYPES if cheapest(config, work, name, mfu) is not None]
    where = f"choose gpu={' or '.join(others)}" if others else "take more GPUs"
    return (
        f"Clips of {largest.name} ({largest.counts.tokens} tokens) need at least {memory / 1e9:.1f} GB on each GPU "
        f"({sharding_name(engine)}, engine.sequence_parallel={engine.sequence_parallel}, "
        f"engine.activation_checkpointing={engine.activation_checkpointing}), but gpu={config.gpu} has "
        f"{usable_bytes(config.gpu) / 1e9:.1f} GB to use, whatever is set: {where}, raise num_gpus={config.num_gpus}, "
        "or show less of a clip (loader.crop_frames)."
    )


# --- the best setting ---------------------------------------------------------------------------------------------


def settings(config: PlanConfig, work: Workload) -> Iterator[EngineConfig]:
    """All that the run can be laid out by."""
    for ranks in _divisors(math.gcd(work.model.video.num_attention_heads, config.num_gpus)):
        data_ranks = config.num_gpus // ranks
        if any(one.num_clips % data_ranks for one in work.clips):
            continue
        for micro_steps in _divisors(math.gcd(*(one.num_clips // data_ranks for one in work.clips))):
            for sharding in shardings(config.engine):
                for mode, is_compiled in itertools.product(MODES, {config.engine.compile, False}):
                    changes = {
                        **sharding,
                        "sequence_parallel": ranks,
                        "grad_accum_steps": micro_steps,
                        "activation_checkpointing": mode,
                        "compile": is_compiled,
                    }
                    try:
                        yield EngineConfig.model_validate(config.engine.model_dump() | changes)
                    except ValidationError:  # the engine refuses it
                        continue


def shardings(engine: EngineConfig) -> list[dict[str, Any]]:
    """Where a run offloads to disks, it does so in all of them that offload."""
    place = "nvme" if engine.disk else "cpu"
    return [{name: place if value == "cpu" else value for name, value in one.items()} for one in SHARDINGS[engine.kind]]


def cheapest(config: PlanConfig, work: Workload, gpu: GpuName, mfu: float) -> EngineConfig | None:
    """Of the settings that fit the one with the shortest step; among equals the plainest."""
    priced = ((price(config, work, one, gpu, mfu), one) for one in settings(config, work))
    fitting = [(found.step_s, _plainness(one), one) for found, one in priced if found.fits]
    return min(fitting, key=lambda entry: entry[:2])[2] if fitting else None


def _plainness(engine: EngineConfig) -> tuple[int, ...]:
    every, mode = shardings(engine), MODES.index(engine.activation_checkpointing)
    (sharding,) = (n for n, one in enumerate(every) if all(getattr(engine, name) == one[name] for name in one))
    return engine.sequence_parallel, engine.grad_accum_steps, sharding, mode, engine.compile


def price(config: PlanConfig, work: Workload, engine: EngineConfig, gpu: GpuName, mfu: float) -> Price:
    """The largest memory and the mean time of the sizes of clips."""
    video, cluster = work.model.video, cluster_of(config, gpu)
    held = states(work.size, engine, config.num_gpus, work.precision)
    activations = (
        activation_bytes(
            video,
            clips.counts,
            micro_batch(config, clips, engine),
            recomputing(engine.activation_checkpointing, engine.compile),
            work.precision,
            engine.sequence_parallel,
        )
        for clips in work.clips
    )
    memory = max(map(held.peak, activations))
    seconds = [step_s(video, work.size, clips, engine, cluster, mfu, work.precision) for clips in work.clips]
    if config.engine.compile and not engine.compile:
        seconds += [unfused_s(video, clips, cluster, work.precision) for clips in work.clips]
    return Price(memory, sum(seconds) / len(work.clips), memory <= usable_bytes(gpu))


def micro_batch(config: PlanConfig, clips: Clips, engine: EngineConfig) -> int:
    return clips.num_clips * engine.sequence_parallel // config.num_gpus // engine.grad_accum_steps


def cluster_of(config: PlanConfig, gpu: GpuName) -> Cluster:
    return Cluster(GPU_TYPES[gpu], config.num_gpus, config.gpus_per_node, config.network_gb_s, config.offload_gb_s)


def usable_bytes(gpu: GpuName) -> float:
    return USABLE * GPU_TYPES[gpu].memory_gb * 1e9


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def measured_mfu(config: PlanConfig, work: Workload) -> float:
    """Of a run's metrics.jsonl, or of the benchmark's row whose clips are nearest in size."""
    path = config.measured
    assert path is not None
    if not path.is_file():
        raise UserError(f"measured={path}: no such file; give metrics.jsonl of a run, or the JSON of benchmarks.gpu.")
    try:
        mfu = _mfu_of_run(path) if path.suffix == ".jsonl" else _mfu_of_benchmark(path, work)
    except (ValueError, LookupError, TypeError, ArithmeticError):
        raise UserError(
            f"{path}: no MFU of ours in it; give metrics.jsonl of a run, or what benchmarks.gpu wrote on a GPU."
        ) from None
    if not LEAST_MFU <= mfu <= 1:
        raise UserError(f"{path}: has an MFU of {mfu:g}, which no GPU reaches; give another file, or mfu=0.4 instead.")
    return mfu


def _mfu_of_run(path: Path) -> float:
    shares = [row["mfu"] for row in read_metrics(path) if row.get("mfu")]
    if not shares:
        raise UserError(f"{path}: no training step in it has an mfu; give metrics.jsonl of a run on a known GPU.")
    return float(statistics.median(shares))


def _mfu_of_benchmark(path: Path, work: Workload) -> float:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ours = [row for row in rows if row["who"] == "ours" and row.get("mfu")]
    tokens = statistics.fmean(one.counts.tokens for one in work.clips)
    nearest = min(ours, key=lambda row: (abs(_tokens(row) - tokens), -row["mfu"]))
    return float(nearest["mfu"])


def _tokens(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"] * row["step_s"] / row["batch"])


# --- telling ------------------------------------------------------------------------------------------------------


def states_plan(config: PlanConfig, work: Workload, sharding: dict[str, Any]) -> StatesPlan:
    same = ("kind", "grad_accum_steps", "offload_folder")
    engine = EngineConfig.model_validate({**config.engine.model_dump(include=set(same)), **sharding})
    held = states(work.size, engine, config.num_gpus, work.precision)
    numbers = {name: getattr(held, name) / 1e9 for name in StatesPlan.model_fields if hasattr(held, name)}
    return StatesPlan(sharding=sharding_name(engine), offload=_offload(engine), **numbers)


def sharding_name(engine: EngineConfig) -> str:
    if engine.kind == "deepspeed":
        return f"ZeRO-{engine.zero_stage}"
    if engine.sharding == "ddp":
        return "DDP"
    return "FSDP2" if engine.reshard_after_forward else "FSDP2, not dropped after forward"


def _offload(engine: EngineConfig) -> str:
    what = {"optimizer": engine.offload_optimizer, "weights": engine.offload_weights}
    return ", ".join(name for name, where in what.items() if where != "none") or "none"


def clips_plan(config: PlanConfig, work: Workload, clips: Clips, mode: Checkpointing) -> ClipsPlan:
    video, ranks = work.model.video, config.engine.sequence_parallel
    again = recomputing(mode, config.engine.compile)
    flops = training_flops(video, clips.counts, again)
    return ClipsPlan(
        clips=clips.name,
        checkpointing=mode,
        tokens=clips.counts.tokens,
        forward_tflop=flops.forward / 1e12,
        backward_tflop=flops.backward / 1e12,
        recomputed_tflop=flops.recomputed / 1e12,
        activations_gb=activation_bytes(video, clips.counts, 1, again, work.precision, ranks) / 1e9,
    )


def setting_plan(config: PlanConfig, work: Workload, engine: EngineConfig, mfu: float) -> SettingPlan:
    found = price(config, work, engine, config.gpu, mfu)
    peak = config.num_gpus * GPU_TYPES[config.gpu].peak_flops
    hours = config.num_steps * found.step_s / 3600
    return SettingPlan(
        sharding=sharding_name(engine),
        offload=_offload(engine),
        sequence_parallel=engine.sequence_parallel,
        micro_batch=", ".join(str(micro_batch(config, one, engine)) for one in work.clips),
        grad_accum_steps=engine.grad_accum_steps,
        checkpointing=engine.activation_checkpointing,
        memory_gb=found.memory / 1e9,
        fits=found.fits,
        step_s=found.step_s,
        samples_per_s=statistics.fmean(one.num_clips for one in work.clips) / found.step_s,
        mfu=mean_model_flops(work.model.video, work.clips) / found.step_s / peak,
        days=hours / 24,
        gpu_hours=hours * config.num_gpus,
    )


def gpu_plan(config: PlanConfig, work: Workload, gpu: GpuName, mfu: float) -> GpuPlan:
    now, best = price(config, work, config.engine, gpu, mfu), cheapest(config, work, gpu, mfu)
    told = None if best is None else setting_plan(config.model_copy(update={"gpu": gpu}), work, best, mfu)
    return GpuPlan(
        gpu=gpu,
        usable_gb=usable_bytes(gpu) / 1e9,
        as_configured="fits" if now.fits else f"does not fit ({now.memory / 1e9:.0f} GB)",
        best=" ".join(overrides(config.engine, best)) or "as configured" if best else "does not fit, whatever is set",
        step_s=told and told.step_s,
        days=told and told.days,
        gpu_hours=told and told.gpu_hours,
    )


def overrides(before: EngineConfig, after: EngineConfig) -> list[str]:
    old, new = before.model_dump(), after.model_dump()
    return [f"engine.{name}={str(value).lower()}" for name, value in new.items() if value != old[name]]


def goodput_plan(config: PlanConfig, work: Workload, best: SettingPlan) -> GoodputPlan:
    """A checkpoint is copied from the GPUs while they wait, and written while they compute; what was not yet written
    is lost with what came after it, and the next one waits for it."""
    cluster = cluster_of(config, config.gpu)
    between_s = config.node_failure_h * 3600 / cluster.num_nodes
    num_bytes = CHECKPOINT_BYTES * work.size.parameters
    blocked_s = cluster.host_s(num_bytes / config.num_gpus)
    written_s = num_bytes / cluster.num_nodes / (config.disk_gb_s * 1e9)
    interval_s = max(best_interval_s(blocked_s, between_s), written_s, best.step_s)
    steps = max(1, round(interval_s / best.step_s))
    share = goodput(steps * best.step_s, blocked_s, config.restart_s + written_s, between_s)
    return GoodputPlan(
        nodes=cluster.num_nodes,
        hours_between_failures=between_s / 3600,
        checkpoint_gb=num_bytes / 1e9,
        blocked_s=blocked_s,
        written_s=written_s,
        checkpoint_every=steps,
        goodput=share,
        days_with_failures=best.days / share if share else math.inf,
    )


if __name__ == "__main__":
    run_command(main, PlanConfig, description=__doc__)
