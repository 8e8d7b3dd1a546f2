"""Flow matching: flow times, interpolation, what the network predicts, and the Euler sampler.

Direction, everywhere in this repository: flow time 0 is data, 1 is noise; `noised = (1 - t) * data + t * noise`;
velocity = noise - data. (The π0 paper runs the other way; openpi, torchtitan and Wan agree with this one.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from scipy.special import betaincinv
from torch import Tensor

from configs.loader import StrictConfig

from .draws import SampleDraws

Prediction = Literal["velocity", "data"]
"""What the network's output means. `velocity` is Wan's. A small network learns `data` far more easily: the data lie
near a low-dimensional surface and the noise does not (Li and He, arXiv 2511.13720)."""

MIN_FLOW_TIME = 1e-3
"""Where a velocity is recovered from predicted data, flow time is not taken below this."""

Shape = Annotated[float, Field(ge=0.01, le=1000)]
"""Of a law of flow times: beyond, all draws are 0 or 1 up to rounding."""


class FlowTimeConfig(StrictConfig):
    """How training draws flow times."""

    distribution: Literal["uniform", "logit_normal", "beta"] = Field("logit_normal", description="law of the draws")
    mean: float = Field(0.0, ge=-100, le=100, description="logit_normal: mean of the logit; larger is noisier")
    std: float = Field(1.0, gt=0, le=100, description="logit_normal: standard deviation of the logit")
    alpha: Shape = Field(1.5, description="beta: first parameter; larger is noisier")
    beta: Shape = Field(1.0, description="beta: second parameter")
    shift: Shape = Field(1.0, description="time_shift s: t becomes s t / (1 + (s - 1) t); above 1 is noisier")
    shift_tokens: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="noised tokens at which `shift` holds, else it grows with their root; null: it is fixed",
    )
    pure_noise_share: float = Field(0.0, ge=0, le=1, description="share of draws at flow time 1, the mean prediction")
    high_noise_share: float = Field(0.0, ge=0, le=1, description="share of draws between high_noise_from and 1")
    high_noise_from: float = Field(0.98, ge=0, le=1, description="where very high noise begins")
    stratified: bool = Field(False, description="spread each global batch's draws evenly over the law: less variance")

    @model_validator(mode="after")
    def _shares_leave_something(self) -> Self:
        if self.pure_noise_share + self.high_noise_share > 1:
            raise ValueError(
                f"pure_noise_share {self.pure_noise_share} and high_noise_share {self.high_noise_share} are more than 1"
            )
        return self


def sample_flow_time(config: FlowTimeConfig, draws: SampleDraws, num_tokens: int | None = None) -> Float[Tensor, "b"]:
    """A flow time per sample; `num_tokens`, the noised tokens of one, is needed where the shift depends on it.

    Draws whose flow times are given have those, whatever the law.
    """
    if draws.flow_time is not None:
        return draws.flow_time
    pure, special = config.pure_noise_share, config.pure_noise_share + config.high_noise_share
    if config.stratified:
        chance = draws.stratified()
        flow_time = quantile(config, (chance - special).clamp_min(0) / max(1 - special, 1e-9))
    else:
        flow_time = _draw(config, draws)
        chance = draws.uniform()
    flow_time = time_shift(flow_time, shift_at(config, num_tokens))
    above = (chance - pure) / max(config.high_noise_share, 1e-9)
    flow_time = torch.where(chance < special, config.high_noise_from + (1 - config.high_noise_from) * above, flow_time)
    return torch.where(chance < pure, torch.ones_like(flow_time), flow_time)


def _draw(config: FlowTimeConfig, draws: SampleDraws) -> Float[Tensor, "b"]:
    if config.distribution == "uniform":
        return draws.uniform()
    if config.distribution == "logit_normal":
        return (config.mean + config.std * draws.normal()).sigmoid()
    first, second = draws.gamma(config.alpha), draws.gamma(config.beta)  # Beta(a, b) is X / (X + Y) of two gammas
    return first / (first + second)


def quantile(config: FlowTimeConfig, share: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """The flow time below which this share of the law's draws lies, before any shift."""
    if config.distribution == "uniform":
        return share
    if config.distribution == "logit_normal":
        return (config.mean + config.std * torch.special.ndtri(share)).sigmoid()
    # torch has no inverse of the incomplete beta function
    return torch.from_numpy(betaincinv(config.alpha, config.beta, share.cpu().numpy())).to(share)


def shift_at(config: FlowTimeConfig, num_tokens: int | None) -> float:
    """More tokens show the same picture in more places, so that more noise hides as much of it (arXiv 2403.03206)."""
    if config.shift_tokens is None:
        return config.shift
    if num_tokens is None:
        raise ValueError("the shift depends on the number of tokens: pass num_tokens")
    return config.shift * math.sqrt(num_tokens / config.shift_tokens)


def time_shift(flow_time: Tensor, shift: float) -> Tensor:
    return shift * flow_time / (1 + (shift - 1) * flow_time)


def add_noise(data: Tensor, noise: Tensor, flow_time: Tensor) -> Tensor:
    """`(1 - t) * data + t * noise`; `flow_time` has the leading dims of `data`."""
    flow_time = _trailing(flow_time, data)
    return (1 - flow_time) * data + flow_time * noise


def training_target(data: Tensor, noise: Tensor, prediction: Prediction) -> Tensor:
    return noise - data if prediction == "velocity" else data


def errors_by_sample(output: Float[Tensor, "b *d"], target: Float[Tensor, "b *d"]) -> Float[Tensor, "b"]:
    """Each sample's mean squared error, without a gradient."""
    return (output.detach().float() - target).square().flatten(1).mean(1)


def to_velocity(output: Tensor, noised: Tensor, flow_time: Tensor, prediction: Prediction) -> Tensor:
    """The network's output as a velocity."""
    if prediction == "velocity":
        return output
    return (noised - output) / _trailing(flow_time, noised).clamp_min(MIN_FLOW_TIME)


def to_data(output: Tensor, noised: Tensor, flow_time: Tensor, prediction: Prediction) -> Tensor:
    """The network's output as its estimate of the data (from pure noise: the mean of all futures)."""
    if prediction == "data":
        return output
    return noised - _trailing(flow_time, noised) * output


def schedule(num_inference_steps: int, shift: float = 1.0) -> Float[Tensor, "steps+1"]:
    """Flow times from 1 (noise) to 0 (data), both included."""
    return time_shift(torch.linspace(1, 0, num_inference_steps + 1), shift)


@torch.no_grad()
def euler_sample(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_inference_steps: int, shift: float = 1.0
) -> Tensor:
    """Integrate `velocity(noised, flow_time)` from noise to data in equal (or shifted) Euler steps."""
    times = schedule(num_inference_steps, shift).tolist()
    sample = noise
    for now, following in pairwise(times):
        sample = sample + (following - now) * velocity(sample, now)
    return sample


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in diffusers' convention: scale 1 is the conditional prediction."""
    return unconditional + guidance_scale * (conditional - unconditional)


def _trailing(flow_time: Tensor, like: Tensor) -> Tensor:
    return flow_time.reshape(*flow_time.shape, *[1] * (like.ndim - flow_time.ndim))
