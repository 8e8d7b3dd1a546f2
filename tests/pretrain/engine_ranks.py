"""Trains the tiny model under several engines in one set of ranks, and prints what it saw as JSON.

Under torchrun, on any number of CPU ranks. An engine takes five steps of two micro-batches, the fourth with a NaN in
one rank's data, and saves into the folder after the third. Engines that resume do so from every checkpoint there, those
of other engines and of other numbers of ranks included, and take the last two steps again.
"""

import argparse
import json
import os
import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from configs.loader import UserError
from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint_files import part_file, write_parts
from pretrain.draws import SampleDraws
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine, disk, learning_rate
from pretrain.engine.base import Engine
from pretrain.steps import forward_backward, sample_draws

sys.path.insert(0, str(Path(__file__).parent))
import sequence_ranks
from tiny_training import BATCH, build_tiny_model, global_batch, whole_weights

NUM_STEPS, SAVED_STEP, NAN_STEP = 5, 3, 4
SCHEDULE_STEPS = 10
OFFLOAD_FOLDER = tempfile.mkdtemp(prefix="offload_")
disk.LEAST = 1  # or so small a model would stay in memory
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, max_grad_norm=0.5)
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero2_offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3_offload": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "offload_optimizer": "cpu",
        "offload_weights": "cpu",
    },
    "zero2_nvme": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "nvme"},
    "zero3_nvme": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "offload_optimizer": "nvme",
        "offload_weights": "nvme",
    },
    "ddp": {"kind": "accelerate", "sharding": "ddp"},
    "fsdp2": {"kind": "accelerate", "sharding": "fsdp2", "reshard_after_forward": False},
    "zero1_bf16": {"kind": "deepspeed", "zero_stage": 1, "precision": "bf16"},
}


def open_engine(name: str) -> Engine:
    settings = {"device": "cpu", "precision": "fp32", "grad_accum_steps": 2, **ENGINES[name]}
    settings["offload_folder"] = OFFLOAD_FOLDER
    return create_engine(EngineConfig.model_validate(settings), build_tiny_model(), OPTIMIZER)


def take_step(engine: Engine, ema: ExponentialMovingAverage, step: int) -> dict[str, Any]:
    share = BATCH // engine.world_size
    batch = {"latents": global_batch(step)[engine.rank * share :][:share].clone()}
    if step == NAN_STEP and engine.rank == engine.world_size - 1:
        batch["latents"][0, 0] = torch.nan
    losses = forward_backward(engine, batch, sample_draws(engine, 0, step, batch))
    report = engine.step(learning_rate(OPTIMIZER, step, SCHEDULE_STEPS))
    if report.was_applied:
        ema.update(engine, step)
    loss = engine.mean_across_ranks({"loss": losses["loss"].item()})["loss"]
    return {"loss": loss, "grad_norm": report.grad_norm, "was_applied": report.was_applied, "lr": report.lr}


def kinds_on_disk(engine: Any, ema: ExponentialMovingAverage, checkpoints: Any) -> list[str]:
    """What lies in files of the offload folder, as this process has them mapped, as a whole."""
    shards, zero = engine.shards().values(), getattr(engine, "_zero", None)
    trained = [shard for shard in shards if shard.is_trained]
    kinds = {
        "master": [shard.holder for shard in trained],
        "gradients": [shard.holder.grad for shard in trained],
        "sums": [*getattr(zero, "accumulated_grads_in_cpu", {}).values()]
        or [getattr(zero, "grad_partitions_flat_buffer", None)],
        "moments": [value for of_kind in engine.optimizer_states().values() for value in of_kind.values()],
        "average": [*ema.average.values()],
        "copies": [checkpoints._copies[f"weights/{name}"] for name in ema.average],
        "weights": [getattr(parameter, "ds_tensor", None) for parameter in engine.module.parameters()],
    }
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if OFFLOAD_FOLDER in line]
    maps = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]

    def is_mapped(values: torch.Tensor | None) -> bool:
        if values is None:
            return False
        return not len(values) or any(low <= values.data_ptr() < high for low, high in maps)

    return [kind for kind, tensors in kinds.items() if all(map(is_mapped, tensors))]


def validation_loss(engine: Engine, ema: ExponentialMovingAverage) -> float:
    with ema.swap_in(engine), engine.evaluating():
        total = engine.forward_loss({"latents": global_batch(99)}, SampleDraws.seeded(0, 99, range(BATCH))).total
    return total.item()


def train(name: str, folder: Path) -> dict[str, Any]:
    engine = open_engine(name)
    ema = ExponentialMovingAverage(engine, decay=0.5)
    checkpoints = Checkpoints(folder, engine, keep_last=1)
    rows = []
    for step in range(1, NUM_STEPS + 1):
        rows.append(take_step(engine, ema, step))
        checkpoints.settle()
        if step == SAVED_STEP:
            validation = validation_loss(engine, ema)
            weights = whole_weights(engine)
            checkpoints.save(ema, {"step": step}, texts={})  # written while the next steps change the weights
            on_disk = engine.ranks.gather(kinds_on_disk(engine, ema, checkpoints))
    checkpoints.settle(wait_for_it=True)
    any_rank = [engine.any_rank(engine.rank == engine.world_size - 1), engine.any_rank(False)]
    engine.close()
    sums = {parameter: value.double().sum().item() for parameter, value in weights.items()}
    return {"rows": rows, "validation": validation, "weights": sums, "any_rank": any_rank, "on_disk": on_disk}


def resume(name: str, folder: Path) -> dict[str, Any]:
    """The last steps again, after a validation: that puts the average in, and the restored weights back."""
    engine = open_engine(name)
    ema = ExponentialMovingAverage(engine, decay=0.5)
    state = Checkpoints(folder, engine, keep_last=1).load(ema)
    assert state == {"step": SAVED_STEP}
    validation = validation_loss(engine, ema)
    rows = [take_step(engine, ema, step) for step in range(SAVED_STEP + 1, NUM_STEPS + 1)]
    engine.close()
    return {"rows": rows, "validation": validation}


def fail_on_the_last_rank(folder: Path) -> dict[str, Any]:
    """What every rank is told when the last one's disk is full, and which step each goes on from when that rank alone
    reads a damaged file.
    """
    engine = open_engine("ddp")
    ema = ExponentialMovingAverage(engine, decay=0.5)
    checkpoints = Checkpoints(folder, engine, keep_last=5)
    is_last = engine.rank == engine.world_size - 1
    for step in (1, 2):
        checkpoints.save(ema, {"step": step}, texts={})
    checkpoints.settle(wait_for_it=True)

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with unittest.mock.patch("pretrain.checkpoint.write_parts", refuse if is_last else write_parts):
        checkpoints.save(ema, {"step": 3}, texts={})
        try:
            checkpoints.settle(wait_for_it=True)
            told = ""
        except UserError as error:
            told = str(error)
    left = sorted(path.name for path in folder.iterdir())
    engine.barrier()
    if engine.is_main:  # of two files of parts, the last rank checks the last
        (folder / "step_00000002" / part_file("weights", engine.world_size - 1)).write_bytes(b"")
    engine.barrier()
    state = checkpoints.load(ema)
    seen = {"told": engine.ranks.gather(told), "left": left, "states": engine.ranks.gather(state)}
    engine.close()
    return seen


def is_tried(name: str, source: str, world_size: int) -> bool:
    """Of what was saved on as many ranks: each engine's own and zero1's on each, and all on ddp; else all layouts'."""
    writer, _, num_ranks = source.rpartition("_on_")
    if "bf16" in name or "bf16" in writer:
        return name == writer
    if int(num_ranks) != world_size:
        return writer in ("zero1", "zero3", "fsdp2")
    return writer in (name, "zero1") or name == "ddp"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", nargs="*", default=[], help="engines that train and save")
    parser.add_argument("--resume", nargs="*", default=[], help="engines that resume")
    parser.add_argument("--saved-on", nargs="*", default=[], help="by how many ranks the checkpoints were written")
    parser.add_argument("--sequence", action="store_true", help="also train with sequences split")
    options = parser.parse_args()
    world_size = int(os.environ["WORLD_SIZE"])
    sequence = sequence_ranks.distances(world_size) if options.sequence else {}
    gathers = [sequence_ranks.num_gathers(reshard) for reshard in (True, False)] if options.sequence else []
    seen = {name: train(name, options.folder / f"{name}_on_{world_size}") for name in options.train}
    saved = sorted(path.name for ranks in options.saved_on for path in options.folder.glob(f"*_on_{ranks}"))
    resumed = {
        f"{source} on {name}": resume(name, options.folder / source)
        for name in options.resume
        for source in saved
        if is_tried(name, source, world_size)
    }
    failed = fail_on_the_last_rank(options.folder / f"failing_{world_size}") if options.train else {}
    os.rmdir(OFFLOAD_FOLDER)  # fails where something was left in it
    if torch.distributed.get_rank() == 0:
        found = {"trained": seen, "resumed": resumed, "sequence": sequence, "failed": failed, "gathers": gathers}
        print(json.dumps(found))  # noqa: T201
