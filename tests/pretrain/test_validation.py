"""What validation measures: the same every time, of all ranks, and each loss in the band of its flow time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import flow_matching
from pretrain.draws import SampleDraws
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import Engine, EngineConfig, OptimizerConfig, create_engine
from pretrain.flow_matching import FlowTimeConfig
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.validation import FlowTimeBands, validation_row
from pretrain.world_models.base import LossTerms
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

BANDS = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
LOW = FlowTimeConfig(distribution="logit_normal", mean=-4.0)  # training hardly ever draws above 0.25


class FlowTimeIsTheLoss(nn.Module):
    """So that a row shows at which flow times it was measured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def loss(self, batch: dict[str, Any], draws: SampleDraws) -> LossTerms:
        flow_time = flow_matching.sample_flow_time(LOW, draws)
        return LossTerms(self.weight * flow_time.mean(), {}, {} if self.training else {"video": flow_time})


def open_engine(model: nn.Module) -> Engine:
    config = EngineConfig(kind="accelerate", device="cpu", precision="fp32")
    return create_engine(config, model, OptimizerConfig(learning_rate=0.1))


def row_of(engine: Engine, batches: Iterator[dict[str, Any]] | list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    settings = {"num_batches": 3, "seed": 1, "step": 5, **changes}
    row = validation_row(engine, ExponentialMovingAverage(engine, 0.9), batches, **settings)
    assert row is not None
    return row


def test_losses_by_flow_time_cover_all_bands_and_are_the_same_every_time() -> None:
    engine = open_engine(FlowTimeIsTheLoss())
    batches = [{"latents": torch.zeros(8, 1)} for _ in range(3)]
    row = row_of(engine, batches)
    for band in BANDS:
        low, high = map(float, band.split("-"))
        assert low < row[f"loss/video/flow_time_{band}"] < high
    assert row["loss"] < 0.1  # as training draws them
    assert row_of(engine, batches, step=9) == row | {"step": 9}
    assert row_of(engine, batches, seed=2) != row
    assert engine.module.training


def test_empty_bands_are_left_out_and_the_others_are_means() -> None:
    engine = open_engine(FlowTimeIsTheLoss())
    bands = FlowTimeBands()
    bands.add({"video": torch.tensor([1.0, 3.0, 5.0])}, torch.tensor([0.1, 0.2, 1.0]))
    bands.add({"video": torch.tensor([8.0]), "action": torch.tensor([2.0])}, torch.tensor([0.0]))
    bands.add({"action": torch.tensor([torch.nan, 4.0, torch.nan])}, torch.tensor([0.1, 0.2, 0.9]))
    assert bands.means(engine) == {
        "loss/video/flow_time_0.00-0.25": pytest.approx(4.0),
        "loss/video/flow_time_0.75-1.00": pytest.approx(5.0),
        "loss/action/flow_time_0.00-0.25": pytest.approx(3.0),  # without those that have no actions
    }


def test_the_samples_of_a_world_model_average_to_its_loss_and_training_does_without() -> None:
    torch.manual_seed(0)
    video = VideoDiTConfig(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=1,
    )  # fmt: skip
    config = ObservationSpaceConfig(video=video, action_dim=2, actions_per_latent=4, residual_std=0.5)
    model = ObservationSpaceWorldModel(config)
    batch = {
        "latents": torch.randn(4, 3, 4, 4, 4), "text_tokens": torch.randn(4, 3, 8), "actions": torch.randn(4, 8, 2),
        "has_actions": torch.ones(4, dtype=torch.bool),
    }  # fmt: skip
    assert not model.loss(batch, SampleDraws.seeded(0, 0, range(4))).by_sample
    terms = model.eval().loss(batch, SampleDraws.seeded(0, 0, range(4)))
    torch.testing.assert_close(terms.by_sample["video"].mean(), terms.parts["video"])
    # each sample's own: what one of them is does not change the others
    other = {**batch, "latents": batch["latents"].index_fill(0, torch.tensor([1]), 9.0)}
    changed = model.loss(other, SampleDraws.seeded(0, 0, range(4))).by_sample["video"]
    torch.testing.assert_close(changed[[0, 2, 3]], terms.by_sample["video"][[0, 2, 3]])
    assert changed[1] != terms.by_sample["video"][1]
