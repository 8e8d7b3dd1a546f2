"""Trains the tiny model under every engine in one set of ranks and writes what it saw: `engine_ranks.py OUT.json`.

Under torchrun, on two CPU ranks. Each entry: five steps of two micro-batches, the fourth with a NaN in one rank's data;
a save after the third step, and a second engine that loads it and takes the last two steps again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.draws import SampleDraws
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine, learning_rate
from pretrain.engine.base import Engine
from pretrain.steps import forward_backward, sample_draws

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import BATCH, build_tiny_model, global_batch

NUM_STEPS, SAVED_STEP, NAN_STEP = 5, 3, 4
SCHEDULE_STEPS = 10
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, max_grad_norm=0.5)
ENGINES: dict[str, dict[str, Any]] = {
    "deepspeed_1": {"kind": "deepspeed", "zero_stage": 1},
    "deepspeed_2": {"kind": "deepspeed", "zero_stage": 2},
    "deepspeed_3": {"kind": "deepspeed", "zero_stage": 3},
    "ddp": {"kind": "accelerate", "sharding": "ddp"},
    "fsdp2": {"kind": "accelerate", "sharding": "fsdp2"},
    "deepspeed_1_bf16": {"kind": "deepspeed", "zero_stage": 1, "precision": "bf16"},
}


def open_engine(name: str) -> Engine:
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "grad_accum_steps": 2, **ENGINES[name]})
    return create_engine(config, build_tiny_model(), OPTIMIZER)


def take_step(engine: Engine, ema: ExponentialMovingAverage, step: int) -> dict[str, Any]:
    share = BATCH // engine.world_size
    batch = {"latents": global_batch(step)[engine.rank * share :][:share].clone()}
    if step == NAN_STEP and engine.rank == 1:
        batch["latents"][0, 0] = torch.nan
    losses = forward_backward(engine, batch, sample_draws(engine, 0, step, batch))
    report = engine.step(learning_rate(OPTIMIZER, step, SCHEDULE_STEPS))
    if report.was_applied:
        ema.update(engine, step)
    loss = engine.mean_across_ranks({"loss": losses["loss"].item()})["loss"]
    return {"loss": loss, "grad_norm": report.grad_norm, "was_applied": report.was_applied, "lr": report.lr}


def validation_loss(engine: Engine, ema: ExponentialMovingAverage) -> float:
    with ema.swap_in(engine), engine.evaluating():
        total = engine.forward_loss({"latents": global_batch(99)}, SampleDraws.seeded(0, 99, range(BATCH))).total
    return total.item()


def checksum(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.double().sum().item() for name, value in tensors.items()}


def observe(name: str, folder: Path) -> dict[str, Any]:
    engine = open_engine(name)
    ema = ExponentialMovingAverage(engine, decay=0.5)
    rows = []
    for step in range(1, NUM_STEPS + 1):
        rows.append(take_step(engine, ema, step))
        if step == SAVED_STEP:
            if engine.is_main:
                folder.mkdir()
            engine.barrier()
            engine.save(folder)
            saved_average = {key: value.clone() for key, value in ema.average.items()}
            validation = validation_loss(engine, ema)
            weights = checksum(engine.full_state_dict())
            engine.barrier()
    engine.close()

    resumed = open_engine(name)
    ema = ExponentialMovingAverage(resumed, decay=0.5)
    resumed.load(folder)
    ema.restore(saved_average)
    resumed_rows = [take_step(resumed, ema, step) for step in range(SAVED_STEP + 1, NUM_STEPS + 1)]
    any_rank = [resumed.any_rank(resumed.rank == 1), resumed.any_rank(False)]
    resumed.close()
    return {
        "rows": rows,
        "resumed_rows": resumed_rows,
        "validation": validation,
        "weights": weights,
        "any_rank": any_rank,
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    seen = {name: observe(name, out.with_name(f"engine_{name}")) for name in ENGINES}
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(seen, indent=1))
