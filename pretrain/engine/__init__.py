"""The engines: one protocol over DeepSpeed and accelerate, chosen by `engine.kind`."""

from torch import nn

from ..weights import Weights
from .accelerate import AccelerateEngine
from .base import Engine, EngineConfig, StepReport
from .deepspeed import DeepSpeedEngine
from .optimizer import OptimizerConfig, learning_rate

__all__ = ["ENGINES", "Engine", "EngineConfig", "OptimizerConfig", "StepReport", "create_engine", "learning_rate"]

ENGINES: dict[str, type[AccelerateEngine] | type[DeepSpeedEngine]] = {
    "deepspeed": DeepSpeedEngine,
    "accelerate": AccelerateEngine,
}


def create_engine(
    config: EngineConfig, module: nn.Module, optimizer: OptimizerConfig, weights: Weights | None = None
) -> Engine:
    """Joins the ranks and makes `module` (which has a `loss(batch, generator)`) trainable on them, with these weights.

    One on the meta device needs some, if not from here then from a checkpoint.
    """
    engine = ENGINES[config.kind](config, module, optimizer)
    if weights is not None:
        engine.take(weights)
    return engine
