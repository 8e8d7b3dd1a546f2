"""FLOPs on paper are those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.encoders import EmbeddedCodec
from data_pipeline.view_layout import LaidOutCodec, ViewLayout
from pretrain.draws import SampleDraws
from pretrain.flops import TokenCounts, peak_flops, training_flops, world_model_tokens
from pretrain.models.execution import Execution, set_execution
from pretrain.models.video_dit import VideoDiT, VideoDiTConfig
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

SIZES = VideoDiTConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=40, num_layers=3,
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_training_step_of_the_transformer(checkpointing):
    model = VideoDiT(SIZES)
    set_execution(model, Execution("math", checkpointing))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 4, 3, 8, 6), torch.tensor([1.0, 2.0]), torch.randn(2, 5, 8)).square().sum().backward()
    tokens = 3 * 4 * 3
    counts = TokenCounts(tokens, tokens**2, rows=1, text=5)
    assert counter.get_total_flops() == 2 * training_flops(SIZES, counts, checkpointing, fused_attention=False).hardware


def test_a_training_step_of_a_world_model():
    """Context that does not look at the future costs less."""
    config = ObservationSpaceConfig(video=SIZES, action_dim=2, actions_per_latent=4, residual_std=1.0)
    model = ObservationSpaceWorldModel(config)
    set_execution(model, Execution("math"))
    batch = {
        "latents": torch.randn(1, 3, 4, 8, 6), "text_tokens": torch.randn(1, 5, 8), "actions": torch.randn(1, 8, 2),
        "has_actions": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, SampleDraws.seeded(0, 0, range(1))).total.backward()
    d, per_frame = 24, 12
    actions = 2 * (2 * 8 * d + 2 * 2 * d * d) + 2 * 2 * d * d  # 2 frames, two linear layers
    counts = world_model_tokens(SIZES, (3, 8, 6), text=5)
    assert counts == TokenCounts(3 * per_frame, per_frame**2 + 2 * 3 * per_frame**2, 3, 5)
    flops = training_flops(SIZES, counts, fused_attention=False)
    # the context's tokens leave the last layer unused: its backward pass there is counted, though not computed
    assert 0 <= flops.hardware + actions - counter.get_total_flops() < 0.15 * flops.hardware


def test_a_world_model_counts_its_work_from_latents_and_from_video():
    codec = EmbeddedCodec(torch.rand(192), torch.rand(192, 4), 1.0, patch=4)
    config = ObservationSpaceConfig(video=SIZES, action_dim=2, actions_per_latent=4, residual_std=1.0)
    model = ObservationSpaceWorldModel(config, codec)
    text = torch.zeros(2, 5, 8)
    counts = world_model_tokens(SIZES, (3, 8, 6), text=5)
    expected = (3 * 12, training_flops(SIZES, counts, "full"))
    assert model.work({"latents": torch.zeros(2, 3, 4, 8, 6), "text_tokens": text}, "full") == expected
    video = {"video": torch.zeros(2, 9, 32, 24, 3), "text_tokens": text}
    assert model.work(video, "full") == expected
    stacked = LaidOutCodec(codec, ViewLayout("stack_height", ("left", "right"), ((16, 24), (16, 24))))
    assert ObservationSpaceWorldModel(config, stacked).work(video, "full") == expected


def test_planning_arithmetic_of_the_survey():
    """1.3B at 81 frames of 480x832: 0.87 PFLOP, of which the attention is two thirds."""
    counts = TokenCounts(32_760, 32_760**2, 1, 512)
    flops = training_flops(VideoDiTConfig(), counts)
    assert flops.model == pytest.approx(0.872e15, rel=0.03)
    assert 12 * counts.pairs * 1536 * 30 / flops.model == pytest.approx(0.68, abs=0.02)


def test_known_gpus():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("a CPU") is None
