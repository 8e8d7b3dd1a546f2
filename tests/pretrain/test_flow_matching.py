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


LAWS = [
    FlowTimeConfig(distribution="uniform"),
    FlowTimeConfig(distribution="logit_normal", mean=0.5, std=1.5),
    FlowTimeConfig(distribution="beta", alpha=1.5, beta=1.0),
    FlowTimeConfig(distribution="logit_normal", shift=3.0, pure_noise_share=0.25, high_noise_share=0.125),
]


@pytest.mark.parametrize("law", LAWS)
def test_stratified_draws_follow_the_same_law_with_less_variance(law):
    def batches(config: FlowTimeConfig, size: int, count: int) -> torch.Tensor:
        drawn = [
            flow_matching.sample_flow_time(config, SampleDraws.seeded(0, step, range(size))) for step in range(count)
        ]
        return torch.stack(drawn)

    plain, stratified = batches(law, 16, 200), batches(law.model_copy(update={"stratified": True}), 16, 200)
    shares = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(stratified.quantile(shares), plain.quantile(shares), atol=0.04, rtol=0)
    assert stratified.mean(1).std() < 0.35 * plain.mean(1).std()
    # every single batch has its share of special draws
    assert ((stratified == 1).sum(1) == 16 * law.pure_noise_share).all()
    is_high = (stratified >= law.high_noise_from) & (stratified < 1)
    assert (is_high.sum(1) >= 16 * law.high_noise_share).all()


def test_very_high_noise_has_its_share():
    config = FlowTimeConfig(distribution="logit_normal", mean=-2.0, high_noise_share=0.3, high_noise_from=0.9)
    drawn = flow_matching.sample_flow_time(config, SampleDraws([generator()] * 20_000))
    assert abs((drawn >= 0.9).float().mean().item() - 0.3) < 0.02
    assert abs(drawn[drawn >= 0.9].mean().item() - 0.95) < 0.005


def test_the_shift_grows_with_the_root_of_the_tokens():
    config = FlowTimeConfig(shift=2.0, shift_tokens=100)
    assert [flow_matching.shift_at(config, tokens) for tokens in (25, 100, 400)] == [1.0, 2.0, 4.0]
    assert flow_matching.shift_at(FlowTimeConfig(shift=2.0), None) == 2.0
    with pytest.raises(ValueError, match="pass num_tokens"):
        flow_matching.sample_flow_time(config, SampleDraws([generator()]))


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match="are more than 1"):
        FlowTimeConfig(pure_noise_share=0.6, high_noise_share=0.6)
