"""The joint paradigm: which loss counts what, what sees what, and that it learns to act on what it sees."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.paradigms.joint_video_action import VISIBILITY, JointVideoAction, JointVideoActionConfig
from pretrain.draws import SampleDraws
from pretrain.flow_matching import FlowTimeConfig
from pretrain.models.action_expert import NOISED_ACTIONS, ActionExpertConfig
from pretrain.models.execution import Execution, set_execution
from pretrain.models.token_groups import Rule
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.world_models.observation_space import (
    CONTEXT,
    FUTURE,
    ObservationSpaceConfig,
    ObservationSpaceWorldModel,
)

VIDEO = VideoDiTConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=48, num_layers=2,
)  # fmt: skip


def make(**changes) -> JointVideoAction:
    torch.manual_seed(0)
    world_model = ObservationSpaceWorldModel(
        ObservationSpaceConfig(
            video=VIDEO, action_dim=2, actions_per_latent=4, residual_std=1.0, predict_residual=True, prediction="data"
        )
    )
    defaults = dict(
        action_expert=ActionExpertConfig(width=20, ffn_dim=40, freq_dim=16), action_horizon=8, proprio_dim=3,
        action_prediction="data", num_inference_steps=3,
    )  # fmt: skip
    return JointVideoAction(JointVideoActionConfig(**(defaults | changes)), world_model)


def make_batch(size: int = 4) -> dict:
    drawn = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(size, 3, 4, 4, 4, generator=drawn),
        "text_tokens": torch.randn(size, 3, 8, generator=drawn),
        "actions": torch.randn(size, 8, 2, generator=drawn),
        "action_is_valid": torch.ones(size, 8, 2, dtype=torch.bool),
        "has_actions": torch.ones(size, dtype=torch.bool),
        "proprio": torch.randn(size, 3, generator=drawn),
    }


def awaken(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def test_all_weights_are_drawn_anew_those_of_actions_as_torch_draws_them():
    model = make()
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    expert = model.action_expert
    for layer in (expert.action_in, expert.proprio_in, expert.blocks[1].attn1.to_q, expert.blocks[0].ffn.net[2]):
        bound = layer.in_features**-0.5
        assert 0.8 * bound < layer.weight.max() < bound and layer.bias.abs().max() < bound
    tables = torch.cat([part.scale_shift_table.flatten() for part in (expert, *expert.blocks)])
    assert tables.std().item() == pytest.approx(20**-0.5, rel=0.2)
    assert not expert.action_out.weight.any() and expert.blocks[0].norm2.weight.eq(1).all()


def losses(model, batch) -> dict[str, float]:
    terms = model.loss(batch, SampleDraws.seeded(1, 1, range(len(batch["latents"]))))
    return {name: part.item() for name, part in terms.parts.items()}


def test_video_and_actions_see_each_other_and_the_context_sees_neither():
    assert VISIBILITY[FUTURE, NOISED_ACTIONS] == VISIBILITY[NOISED_ACTIONS, FUTURE] == Rule.ALWAYS
    assert (CONTEXT, FUTURE) not in VISIBILITY
    assert (CONTEXT, NOISED_ACTIONS) not in VISIBILITY


def test_invalid_actions_do_not_count():
    model, batch = awaken(make()), make_batch()
    batch["action_is_valid"][:, 4:] = False
    model.loss(batch, SampleDraws.seeded(1, 1, range(len(batch["latents"])))).total.backward()
    before = losses(model, batch)
    # What is not valid may hold any number: it is a target of nothing. (It is still an input, as noise is.)
    only_valid = batch | {"action_is_valid": torch.ones_like(batch["action_is_valid"])}
    assert losses(model, only_valid)["action"] != before["action"]
    batch["action_is_valid"][:] = False
    assert losses(model, batch)["action"] == 0


def test_a_clip_without_actions_trains_the_video_alone():
    model, batch = awaken(make()), make_batch()
    batch["has_actions"][:] = False
    batch["action_is_valid"][:] = False
    first = losses(model, batch)
    second = losses(model, batch | {"actions": batch["actions"] + 100})
    assert first["action"] == second["action"] == 0
    assert first["video"] == second["video"] > 0


def test_each_sample_has_its_own_losses_where_it_has_actions():
    model, batch = awaken(make()).eval(), make_batch()
    batch["has_actions"][2] = batch["action_is_valid"][2] = False
    batch["action_is_valid"][0, 4:] = False
    terms = model.loss(batch, SampleDraws.seeded(1, 1, range(4)))
    torch.testing.assert_close(terms.by_sample["video"].mean(), terms.parts["video"])
    action = terms.by_sample["action"]
    assert action.isnan().tolist() == [False, False, True, False]
    weights = torch.tensor([1.0, 2.0, 2.0])  # by how many actions count
    torch.testing.assert_close((action[[0, 1, 3]] * weights).sum() / 5, terms.parts["action"])


def test_whoever_is_told_the_actions_is_not_asked_for_them():
    model, batch = awaken(make(conditioned_video_share=1.0)), make_batch()
    assert losses(model, batch)["action"] == 0


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_its_work_is_what_torch_counts(checkpointing):
    model, batch = awaken(make(action_horizon=4)), make_batch(1)  # the chunk ends before the clip does
    set_execution(model, Execution("math", checkpointing))
    tokens, flops = model.work(batch, checkpointing)
    assert tokens == 3 * 4 + 1 + 4
    layers, heads, width, text = 2, 24, 20, 3
    # What torch does besides: it conditions two latent frames on their actions (two linear layers), and projects the
    # text for proprio and actions separately; but it does not read the context's four tokens of 16 numbers.
    conditioner = 2 * 2 * (8 * heads + heads * heads)
    text_again, unread = layers * 2 * text * 2 * width * heads, 2 * 4 * 16 * heads
    draws = SampleDraws.seeded(0, 0, range(1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.loss(batch, draws)
    assert counter.get_total_flops() == flops.forward + conditioner + text_again - unread
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, draws).total.backward()
    # This attention keeps the scores that fused attention computes again. Context and proprio leave the last layer
    # unused: its backward pass there is counted, though not computed.
    kept = layers * 2 * heads * (4**2 + 8 * 17 + 5 + 4 * 17 + 17 * text)
    computed = counter.get_total_flops() - 3 * (conditioner + text_again)
    assert 0 <= flops.hardware - kept - computed < 0.15 * flops.model


@torch.no_grad()
def test_a_plan_follows_from_its_seed_and_its_inputs():
    model, batch = awaken(make()), make_batch()

    def plan(**changes) -> torch.Tensor:
        inputs = {"context": batch["latents"][:, :1], "proprio": batch["proprio"], "text": batch["text_tokens"]}
        return model.plan(**(inputs | changes), generator=torch.Generator().manual_seed(2))[0]

    actions = plan()
    assert actions.shape == (4, 8, 2)
    assert torch.equal(actions, plan())
    for changed in (
        {"context": batch["latents"][:, 1:2]},
        {"proprio": -batch["proprio"]},
        {"text": -batch["text_tokens"]},
    ):
        assert not torch.allclose(actions, plan(**changed))


@torch.no_grad()
def test_a_plan_also_imagines_the_future_it_leads_to():
    model, batch = awaken(make()), make_batch()
    _, future = model.plan(batch["latents"][:, :1], batch["proprio"], batch["text_tokens"])
    assert future.shape == (4, 2, 4, 4, 4)


def test_the_world_model_inside_keeps_its_own_predictions():
    model, batch = awaken(make()), make_batch()
    world_model = model.world_model
    alone = ObservationSpaceWorldModel(world_model.config)
    alone.load_state_dict(world_model.state_dict())
    arguments = (batch["latents"][:, :1], batch["actions"], batch["text_tokens"])
    drawn = [m.predict(*arguments, generator=torch.Generator().manual_seed(1)) for m in (world_model, alone)]
    assert torch.equal(*drawn)


@pytest.mark.slow
def test_it_learns_to_act_on_what_it_sees():
    """The action to take is written in the context frame: blind, no policy can do better than the mean."""
    model = make(action_flow_time=FlowTimeConfig(pure_noise_share=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def sample(size: int) -> dict:
        latents = torch.randn(size, 1, 4, 4, 4, generator=generator).expand(-1, 3, -1, -1, -1)
        actions = latents[:, 0, 0, :2, 0][:, None].expand(-1, 8, -1)
        return make_batch(size) | {
            "latents": latents, "actions": actions, "text_tokens": torch.zeros(size, 1, 8),
            "proprio": torch.zeros(size, 3),
        }  # fmt: skip

    for _ in range(250):
        optimizer.zero_grad()
        model.loss(sample(32), SampleDraws([generator] * 32)).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    batch = sample(128)

    def error(context: torch.Tensor) -> float:
        actions, _ = model.plan(context, batch["proprio"], batch["text_tokens"], generator)
        return (actions - batch["actions"]).square().mean().item()

    seeing, blind = error(batch["latents"][:, :1]), error(torch.zeros(128, 1, 4, 4, 4))
    assert seeing < 0.3
    assert blind > 0.7
