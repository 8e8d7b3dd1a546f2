"""The video world model: what may influence what, and that it learns what actions do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.loader import UserError
from data_pipeline.encoders import EmbeddedCodec
from pretrain.draws import SampleDraws
from pretrain.flow_matching import FlowTimeConfig
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel, resolve

VIDEO = VideoDiTConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=2,
)  # fmt: skip


def make(codec: EmbeddedCodec | None = None, **changes) -> ObservationSpaceWorldModel:
    torch.manual_seed(0)
    defaults = dict(video=VIDEO, action_dim=2, actions_per_latent=4, residual_std=0.5, predict_residual=True)
    return ObservationSpaceWorldModel(ObservationSpaceConfig(**(defaults | changes)), codec)


def make_batch(size: int = 4, frames: int = 3) -> dict:
    drawn = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(size, frames, 4, 4, 4, generator=drawn),
        "text_tokens": torch.randn(size, 3, 8, generator=drawn),
        "actions": torch.randn(size, 4 * (frames - 1), 2, generator=drawn),
        "has_actions": torch.ones(size, dtype=torch.bool),
    }


def awaken(model: nn.Module) -> nn.Module:
    """Zero-initialised layers hide every dependence: give each weight a say."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def loss(model, batch) -> float:
    return model.loss(batch, SampleDraws.seeded(1, 1, range(len(batch["has_actions"])))).total.item()


def test_the_loss_is_a_function_of_weights_batch_and_generator():
    model, batch = awaken(make(text_dropout=0.5, action_dropout=0.5)), make_batch()
    torch.manual_seed(1)
    first = loss(model, batch)
    torch.manual_seed(2)
    assert loss(model, batch) == first


def test_video_is_encoded_as_stored_latents_were():
    torch.manual_seed(3)
    codec = EmbeddedCodec(torch.rand(192), torch.rand(192, 4), 1.0, patch=4)
    model, batch = awaken(make(codec=codec)), make_batch()
    video = torch.randint(0, 256, (4, 9, 16, 16, 3), dtype=torch.uint8)
    stored = codec.encode(video).to(torch.bfloat16).float()  # as shards hold them
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.latents({"video": video}), stored)
    del batch["latents"]
    assert loss(model, batch | {"video": video}) == loss(model, batch | {"latents": stored})


def test_actions_that_are_not_there_change_nothing():
    model, batch = awaken(make()), make_batch()
    batch["has_actions"] = torch.zeros(4, dtype=torch.bool)
    without = loss(model, batch)
    assert loss(model, batch | {"actions": batch["actions"] * 100}) == without
    assert loss(model, batch | {"has_actions": torch.ones(4, dtype=torch.bool)}) != without


def test_an_untrained_model_with_residuals_predicts_that_nothing_moves():
    model, batch = make(prediction="data"), make_batch()
    context = batch["latents"][:, :1]
    predicted = model.predict(context, batch["actions"], batch["text_tokens"])
    torch.testing.assert_close(predicted, context.expand_as(predicted))


def test_an_action_reaches_its_own_latent_frame_first():
    """Before any attention mixes frames, an action is added to the frame that it leads to and to no other."""
    model, batch = awaken(make()), make_batch()
    later = batch["actions"].clone()
    later[:, 4:] += 1  # the second future frame's actions
    before, after = (
        model.embed_actions(actions, batch["has_actions"], batch["latents"][:, 1:])
        for actions in (batch["actions"], later)
    )
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("prediction", ["data", "velocity"])
@pytest.mark.parametrize("steps", [1, 3])
def test_predict_has_the_right_shape_and_repeats_for_a_seed(prediction, steps):
    model, batch = awaken(make(prediction=prediction)), make_batch()
    drawn = [
        model.predict(
            batch["latents"][:, :1], batch["actions"], batch["text_tokens"], num_inference_steps=steps,
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert drawn[0].shape == (4, 2, 4, 4, 4)
    assert torch.equal(drawn[0], drawn[1])


def test_the_mean_prediction_of_one_clip_does_not_depend_on_its_neighbours():
    model, batch = awaken(make(prediction="data")), make_batch()
    whole = model.predict(batch["latents"][:, :1], batch["actions"], batch["text_tokens"], num_draws=64)
    alone = model.predict(batch["latents"][:1, :1], batch["actions"][:1], batch["text_tokens"][:1], num_draws=64)
    # other noises, same mean: close, and far closer than two clips are to each other
    assert (whole[0] - alone[0]).abs().mean() < 0.3 * (whole[0] - whole[1]).abs().mean()


@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_it_learns_what_actions_do(prediction):
    """A world where the future is the context plus a pattern times the action."""
    torch.manual_seed(0)
    flow_time = FlowTimeConfig(pure_noise_share=0.5)
    model = make(prediction=prediction, flow_time=flow_time, residual_std=1.0)
    pattern = torch.randn(4, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def sample(size: int) -> dict:
        context = torch.randn(size, 1, 4, 4, 4, generator=generator)
        actions = torch.randn(size, 1, 2, generator=generator).expand(-1, 8, -1)
        future = context + actions[:, :2, :1, None, None] * pattern
        return {
            "latents": torch.cat([context, future], 1), "text_tokens": torch.zeros(size, 1, 8), "actions": actions,
            "has_actions": torch.ones(size, dtype=torch.bool),
        }  # fmt: skip

    for _ in range(150):
        optimizer.zero_grad()
        model.loss(sample(32), SampleDraws([generator] * 32)).total.backward()
        optimizer.step()
    batch = sample(64)
    context, future = batch["latents"][:, :1], batch["latents"][:, 1:]
    predicted = model.predict(context, batch["actions"], batch["text_tokens"], generator=generator)
    shuffled = model.predict(context, batch["actions"].roll(1, 0), batch["text_tokens"], generator=generator)
    copied = (future - context).square().mean()
    # A velocity network of this size is still busy learning to subtract the noise: the reason for predicting data.
    assert (predicted - future).square().mean() < {"data": 0.3, "velocity": 0.9}[prediction] * copied
    assert (shuffled - future).square().mean() > copied


def test_an_image_to_video_model_sees_which_frames_are_given():
    """Wan's 36 channels: latents, a mask, and the latents of the given frames."""
    video = VIDEO.model_copy(update={"in_channels": 2 * 4 + 4})
    model, batch = awaken(make(video=video, residual_std=1.0, predict_residual=False)), make_batch()
    seen = []
    model.video.embed = lambda latents: seen.append(latents) or type(model.video).embed(model.video, latents)
    loss(model, batch)
    future, context = seen
    given = batch["latents"][:, :1]
    assert torch.equal(context, torch.cat([given, torch.ones_like(given), given], dim=2))
    assert torch.equal(future[:, :, 4:], torch.zeros_like(future[:, :, 4:]))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_future_frame_gets_its_own_actions_whatever_the_context(count):
    """Actions 4(i-1) to 4i lead to latent frame i; the first one has none."""
    model, batch = awaken(make(drawn_context_latent_frames=[count], predict_residual=False)), make_batch(frames=4)
    embeddings = []
    model.future_group = lambda noised, context, time, actions: (
        embeddings.append((noised, context, actions)) or type(model).future_group(model, noised, context, time, actions)
    )
    loss(model, batch)
    ((noised, context, actions),) = embeddings
    assert (context.shape[1], noised.shape[1], actions.shape[1]) == (count, 4 - count, 4 - count)
    every = model.action_conditioner(batch["actions"], batch["has_actions"])  # of latent frames 1, 2, 3
    expected = torch.cat([torch.zeros_like(every[:, :1]), every], 1)[:, count:]
    torch.testing.assert_close(actions, expected)
    given = model.future_actions(batch["actions"], count)
    assert torch.equal(given, batch["actions"][:, max(0, 4 * (count - 1)) :])


def test_the_number_of_context_frames_is_drawn_in_training_and_fixed_in_validation():
    model, batch = awaken(make(drawn_context_latent_frames=[0, 1, 2], predict_residual=False)), make_batch()
    fixed = make(predict_residual=False)
    fixed.load_state_dict(model.state_dict())
    model.eval()
    assert loss(model, batch) == loss(fixed, batch)
    model.train()
    losses = {model.loss(batch, SampleDraws.seeded(1, step, range(4))).total.item() for step in range(12)}
    chosen = [SampleDraws.seeded(1, step, range(4)).one_of([0, 1, 2]) for step in range(12)]
    assert set(chosen) == {0, 1, 2} and len(losses) == 12


def test_residuals_need_a_context():
    with pytest.raises(ValueError, match="cannot hold 0"):
        make(drawn_context_latent_frames=[0, 1], predict_residual=True)


def test_more_positions_than_wan_has_are_refused() -> None:
    clips = SimpleNamespace(dataset="DATA", layout=SimpleNamespace(kind="single"), latent_shape=(3, 4, 8, 6))
    config = ObservationSpaceConfig(video=VIDEO.model_copy(update={"rope_max_seq_len": 3}))
    with pytest.raises(UserError, match=r"rope_max_seq_len=3, but a side of the latents of DATA has 4 tokens"):
        resolve(config, SimpleNamespace(dataset="DATA", each=[clips]))
