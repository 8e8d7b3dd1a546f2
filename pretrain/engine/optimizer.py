"""The optimizer and its learning-rate schedule, the same under every engine."""

import math
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import nn

from configs.loader import StrictConfig

Steps = Annotated[int, Field(le=10**12)]
"""Of a run; more are a slip of the keyboard."""
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictConfig):
    """AdamW with linear warm-up, then a cosine down to `min_learning_rate`."""

    learning_rate: float = Field(3e-4, gt=0, le=100, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end of the cosine and after it")
    warmup_steps: Steps = Field(100, ge=0, description="steps of linear warm-up from zero")
    decay_steps: Steps | None = Field(
        None, ge=1, description="step at which the cosine ends; null: the num_steps that the run is started with"
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99), description="AdamW's decay rates of gradient mean and variance"
    )
    eps: float = Field(1e-8, ge=1e-30, description="AdamW's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of matrices; vectors have none")
    max_grad_norm: float = Field(1.0, ge=0, description="global gradient norm above which gradients are scaled; 0: off")

    @model_validator(mode="after")
    def _min_is_below_peak(self) -> "OptimizerConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> "OptimizerConfig":
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay {self.weight_decay} at learning_rate {self.learning_rate} takes away all that there is, "
                "for a step takes their product; choose smaller ones"
            )
        return self


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Of update number `step` (the first is 1). A pure function, so there is no schedule to resume."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    decay_steps = config.decay_steps or num_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, decay_steps - config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.AdamW:
    """Plain torch AdamW. DeepSpeed's own CPUAdam is compiled at first use, which races when several ranks start."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if _num_axes(parameter) >= 2]
    vectors = [parameter for parameter in trained if _num_axes(parameter) < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # The fused kernel is three to ten times faster than the default loop, on a CPU too.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _num_axes(parameter: nn.Parameter) -> int:
    """Of a parameter that ZeRO-3 may have cut already: what is left of that has one axis."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
