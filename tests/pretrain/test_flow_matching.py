"""Flow matching: the direction of time, the algebra between predictions, and that sampling recovers the data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain import flow_matching
from pretrain.draws import SampleDraws
from pretrain.flow_matching import FlowTimeConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flow_time_zero_is_data_and_one_is_noise():
    data, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(flow_matching.add_noise(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow_matching.add_noise(data, noise, torch.ones(2)), noise)
    assert torch.equal(flow_matching.training_target(data, noise, "velocity"), noise - data)


@given(st.floats(0.05, 1.0), st.sampled_from(["velocity", "data"]))
def test_a_perfect_network_gives_back_data_and_velocity(time, prediction):
    data, noise = torch.randn(1, 4, generator=generator(1)), torch.randn(1, 4, generator=generator(2))
    flow_time = torch.tensor([time])
    noised = flow_matching.add_noise(data, noise, flow_time)
    output = flow_matching.training_target(data, noise, prediction)
    torch.testing.assert_close(flow_matching.to_data(output, noised, flow_time, prediction), data, atol=1e-4, rtol=0)
    velocity = flow_matching.to_velocity(output, noised, flow_time, prediction)
    torch.testing.assert_close(velocity, noise - data, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [1, 5, 8])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_with_the_true_velocity_arrives_at_the_data(num_inference_steps, shift):
    data, noise = torch.randn(3, 4), torch.randn(3, 4)
    sample = flow_matching.euler_sample(lambda noised, now: noise - data, noise, num_inference_steps, shift)
    torch.testing.assert_close(sample, data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "mean"),
    [
        (FlowTimeConfig(distribution="uniform"), 0.5),
        (FlowTimeConfig(distribution="logit_normal"), 0.5),
        (FlowTimeConfig(distribution="beta", alpha=3, beta=1), 0.75),
        (FlowTimeConfig(distribution="uniform", pure_noise_share=0.5), 0.75),
    ],
)
def test_draws_have_the_configured_mean_and_range(config, mean):
    draws = flow_matching.sample_flow_time(config, SampleDraws([generator()] * 20_000))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean().item() - mean) < 0.02
    assert abs((draws == 1).float().mean().item() - config.pure_noise_share) < 0.02


def test_draws_are_a_function_of_the_generator_alone():
    config = FlowTimeConfig(distribution="beta")
    torch.manual_seed(1)
    first = flow_matching.sample_flow_time(config, SampleDraws.seeded(3, 1, range(8)))
    torch.manual_seed(2)
    assert torch.equal(first, flow_matching.sample_flow_time(config, SampleDraws.seeded(3, 1, range(8))))


def test_a_shift_above_one_makes_the_draws_noisier():
    times = torch.linspace(0.1, 0.9, 9)
    assert (flow_matching.time_shift(times, 5.0) > times).all()
    assert torch.equal(flow_matching.schedule(4, 5.0)[[0, -1]], torch.tensor([1.0, 0.0]))


def test_guidance_scale_one_is_the_conditional_prediction():
    conditional, unconditional = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(flow_matching.guided(conditional, unconditional, 1.0), conditional)
