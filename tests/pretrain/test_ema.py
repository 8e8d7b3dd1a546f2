"""The average of the weights."""

import pytest
import torch
from torch import nn

from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import Engine, EngineConfig, OptimizerConfig, create_engine


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return create_engine(EngineConfig(kind="accelerate", device="cpu", precision="fp32"), model, OptimizerConfig())


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: shard.values for name, shard in engine.shards().items()}


def move_weights(engine: Engine, value: float) -> None:
    engine.assign_shards({name: torch.full_like(p, value) for name, p in weights(engine).items()})


def test_starts_at_the_weights_and_follows_them_slower_and_slower(engine: Engine) -> None:
    ema = ExponentialMovingAverage(engine, decay=0.9)
    assert all(torch.equal(ema.average[name], p) for name, p in weights(engine).items())
    move_weights(engine, 0.0)
    ema.restore({name: torch.ones_like(value) for name, value in ema.average.items()})
    ema.update(engine, step=1)
    assert ema.average["0.weight"].tolist() == pytest.approx([0.1] * 9)
    ema.update(engine, step=1000)
    assert ema.average["0.weight"].tolist() == pytest.approx([0.09] * 9)


def test_no_decay_is_the_weights_themselves(engine: Engine) -> None:
    ema = ExponentialMovingAverage(engine, decay=0.0)
    move_weights(engine, 3.0)
    ema.update(engine, step=5)
    assert all(value.eq(3.0).all() for value in ema.average.values())


def test_swap_in_gives_the_weights_back_even_after_an_error(engine: Engine) -> None:
    ema = ExponentialMovingAverage(engine, decay=0.9)
    move_weights(engine, 2.0)
    with pytest.raises(RuntimeError, match="inside"), ema.swap_in(engine):
        assert torch.equal(engine.module[0].weight.flatten(), ema.average["0.weight"])
        raise RuntimeError("inside")
    assert engine.module[0].weight.eq(2.0).all()


def test_buffers_and_frozen_weights_are_not_averaged() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    config = EngineConfig(kind="accelerate", device="cpu", precision="fp32")
    engine = create_engine(config, model, OptimizerConfig())
    assert set(ExponentialMovingAverage(engine, 0.9).average) == {"0.weight", "1.weight", "1.bias"}
