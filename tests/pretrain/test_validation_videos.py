"""Which runs may imagine clips while they train, and that the similarity measured is SSIM."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from configs.loader import UserError
from pretrain.engine import EngineConfig
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.structural_similarity import structural_similarity
from pretrain.validation_videos import check_videos
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

VIDEO = VideoDiTConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (EngineConfig(zero_stage=3), r"engine\.zero_stage=3"),
        (EngineConfig(kind="accelerate", sharding="fsdp2"), r"engine\.sharding=fsdp2"),
        (EngineConfig(zero_stage=1, sequence_parallel=2), r"engine\.sequence_parallel=2"),
    ],
)
def test_what_one_rank_cannot_compute_is_refused(engine: EngineConfig, complaint: str) -> None:
    model = ObservationSpaceWorldModel(
        ObservationSpaceConfig(video=VIDEO, action_dim=2, actions_per_latent=4, residual_std=0.5)
    )
    check_videos(0, model, engine)
    check_videos(4, model, EngineConfig(zero_stage=2, sharding="fsdp2"))  # sharding is accelerate's alone
    with pytest.raises(UserError, match=f"validation_videos=4 .* {complaint} cannot compute alone"):
        check_videos(4, model, engine)


def test_what_imagines_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="only a world model of video imagines clips"):
        check_videos(1, nn.Linear(1, 1), EngineConfig())


def test_similarity_is_that_of_windows_computed_one_by_one() -> None:
    drawn = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (2, 3, 11, 11, 3), generator=drawn, dtype=torch.uint8).numpy() for _ in range(2))
    axis = np.exp(-((np.arange(-5, 6) / 1.5) ** 2) / 2)
    window = np.outer(axis, axis) / axis.sum() ** 2

    def at(values: np.ndarray, row: int, column: int) -> np.ndarray:
        """Weighted means around a pixel, borders mirrored; of every frame and colour."""
        padded = np.pad(values, [(0, 0), (0, 0), (5, 5), (5, 5), (0, 0)], mode="symmetric")
        return np.einsum("bfhwc,hw->bfc", padded[:, :, row : row + 11, column : column + 11], window)

    total = 0.0
    for row in range(11):
        for column in range(11):
            a, b = x.astype(float), y.astype(float)
            mean_a, mean_b = at(a, row, column), at(b, row, column)
            var_a, var_b = at(a * a, row, column) - mean_a**2, at(b * b, row, column) - mean_b**2
            both = at(a * b, row, column) - mean_a * mean_b
            c1, c2 = 2.55**2, 7.65**2
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            total += float((luminance * (2 * both + c2) / (var_a + var_b + c2)).mean()) / 121
    assert structural_similarity(x, y) == pytest.approx(total)
    assert math.isclose(structural_similarity(x, x), 1.0)
    assert structural_similarity(x, y) < structural_similarity(x, (0.9 * x).astype(np.uint8)) < 1
