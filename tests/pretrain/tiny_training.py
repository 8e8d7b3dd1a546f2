"""A training small enough for tests: a world model of a few hundred weights and batches made in memory.

As a script it is a pretraining run, `tiny_training.py RUN_DIR NUM_STEPS [HELD_AT]`, under torchrun or alone. One that
is held at a batch takes no further step: however late a test kills it, it is in the middle.
"""

import functools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.loader import StrictConfig, dump_config
from data_pipeline.sample_order import Cursor
from pretrain.draws import SampleDraws
from pretrain.engine import Engine
from pretrain.run import StopSignal
from pretrain.train import PretrainConfig, train
from pretrain.world_models.base import LossTerms

BATCH, WIDTH = 8, 12


class TinyConfig(StrictConfig):
    noise: float = 0.1


class TinyWorldModel(nn.Module):
    """Predicts a linear map of its noised input; has blocks (for FSDP2), frozen weights and a buffer."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))

    def loss(self, batch: dict[str, Any], draws: SampleDraws) -> LossTerms:
        data = batch["latents"]
        x = data + self.noise * draws.normal(*data.shape[1:])
        for block in self.blocks:
            x = x + block(x)
        error = (self.head(x) - self.frozen(data) * self.scale).square()
        return LossTerms(error.mean(), {"left": error[:, :1].mean().detach(), "right": error[:, 1:].mean().detach()})


def build_tiny_model(noise: float = 0.1) -> TinyWorldModel:
    torch.manual_seed(0)
    return TinyWorldModel(noise)


def global_batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The parameters, put together from every rank's shards. Collective."""
    whole = {name: torch.full((math.prod(shape),), torch.nan) for name, shape in engine.shapes.items()}
    parts = {name: (shard.start, shard.values.clone()) for name, shard in engine.shards().items()}
    for of_rank in engine.ranks.gather(parts):
        for name, (start, values) in of_rank.items():
            assert whole[name][start : start + len(values)].isnan().all(), f"two ranks have the same part of {name}"
            whole[name][start : start + len(values)] = values
    return {name: values.view(engine.shapes[name]) for name, values in whole.items()}


class TinyBatches:
    """Made in memory, from a cursor on."""

    def __init__(
        self,
        split: str,
        rank: int,
        world_size: int,
        cursor: Cursor,
        on_step: Callable[[int], None],
        scale: Callable[[int], float],
    ) -> None:
        self.split, self.cursor, self._on_step, self._scale = split, cursor, on_step, scale
        share = BATCH // world_size
        self._part = slice(rank * share, (rank + 1) * share)
        self.bad_samples: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            step = self.cursor.step
            if self.split == "train":
                self._on_step(step)
            batch = global_batch(step) * self._scale(step) if self.split == "train" else global_batch(10_000 + step)
            batch = batch[self._part]
            self.cursor = Cursor(step=step + 1, consumed={"tiny": BATCH * (step + 1)})
            yield {"latents": batch, "keys": [f"{step}-{i}" for i in range(len(batch))]}

    @property
    def batch_sizes(self) -> dict[str, int]:
        return {"tiny": BATCH}

    def epochs(self) -> dict[str, float]:
        return {}


def tiny_batches(
    on_step: Callable[[int], None] = lambda step: None, scale: Callable[[int], float] = lambda step: 1.0
) -> Callable[..., TinyBatches]:
    """`scale` of a training batch, by its number: for data that is out of line, or not finite."""
    return functools.partial(TinyBatches, on_step=on_step, scale=scale)


def tiny_config(run_dir: Path, num_steps: int, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "num_steps": num_steps,
        "model": {"video": {}},
        "loader": {"dataset": "none", "global_batch_size": BATCH},
        "engine": {"kind": "accelerate", "device": "cpu", "precision": "fp32", "attention": "sdpa"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3},
        "ema_decay": 0.9,
        "checkpoint_every": 5,
        "validate_every": 4,
        "validation_batches": 2,
        "log_every": 1,
    }
    return PretrainConfig.model_validate({**settings, **changes})


def tiny_run(
    config: PretrainConfig,
    on_step: Callable[[int], None] = lambda step: None,
    scale: Callable[[int], float] = lambda step: 1.0,
    **kwargs: Any,
) -> int:
    texts = {"model.yaml": dump_config(TinyConfig())}
    with StopSignal() as stop:
        return train(config, build_tiny_model(), texts, tiny_batches(on_step, scale), stop, **kwargs)


if __name__ == "__main__":
    run_dir, held_at = Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / f"pid_{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    config = tiny_config(run_dir, int(sys.argv[2]), engine={"kind": "deepspeed", "device": "cpu", "precision": "fp32"})
    # A step takes a while, so that a test can kill the run in one.
    sys.exit(tiny_run(config, on_step=lambda step: time.sleep(3600 if step == held_at else 0.03)))
