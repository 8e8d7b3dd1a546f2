"""What an engine holds between two micro-steps, under torchrun: bytes of all live tensors of rank 0, by engine."""

import gc
import json
import sys
from typing import Any

import torch

from pretrain.draws import SampleDraws
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

SIZES = VideoDiTConfig(
    num_attention_heads=4, attention_head_dim=32, text_dim=64, freq_dim=32, ffn_dim=512, num_layers=3
)
MODEL = ObservationSpaceConfig(video=SIZES, action_dim=2, actions_per_latent=4, residual_std=1.0)

ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in (1, 2, 3)},
    **{sharding: {"kind": "accelerate", "sharding": sharding} for sharding in ("ddp", "fsdp2")},
}


def held_bytes() -> int:
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    gradients = [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    storages = (one.untyped_storage() for one in (*tensors, *gradients))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_in_second_step(name: str) -> int:
    settings = {"device": "cpu", "precision": "fp32", "grad_accum_steps": 2, "attention": "sdpa", **ENGINES[name]}
    config = EngineConfig.model_validate(settings)
    before = held_bytes()
    engine = create_engine(config, ObservationSpaceWorldModel(MODEL), OptimizerConfig())
    ema = ExponentialMovingAverage(engine, 0.9)
    batch = {
        "latents": torch.zeros(1, 2, 16, 4, 4), "text_tokens": torch.zeros(1, 1, 64),
        "actions": torch.zeros(1, 4, 2), "has_actions": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip
    for step in (1, 2):
        for micro_step in (1, 2):
            engine.backward(engine.forward_loss(batch, SampleDraws.seeded(0, step, range(1))).total)
            if (step, micro_step) == (2, 1):
                held = held_bytes() - before
        engine.step(1e-4)
        ema.update(engine, step)
    engine.close()
    return held


if __name__ == "__main__":
    measured = held_in_second_step(sys.argv[1])
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(measured) + "\n")
