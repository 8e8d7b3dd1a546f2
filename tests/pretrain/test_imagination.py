"""Which clips are imagined while a run goes on, by which ranks, and what is measured of them."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs.loader import UserError
from data_pipeline.encoders import EmbeddedCodec
from data_pipeline.video_io import encode_video
from pretrain.imagination import Imagination, ImagineConfig, MetricNetworks, ready_to_imagine
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.video_metrics.frechet import frechet_distance, latent_features
from pretrain.video_metrics.i3d import I3d
from pretrain.video_metrics.lpips import BACKBONES, Lpips
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

VIDEO = VideoDiTConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=1,
)  # fmt: skip
CPU = torch.device("cpu")


def make_model() -> ObservationSpaceWorldModel:
    torch.manual_seed(0)
    codec = EmbeddedCodec(torch.zeros(192), torch.linalg.qr(torch.randn(192, 4))[0], 0.5, patch=4)
    config = ObservationSpaceConfig(video=VIDEO, action_dim=2, actions_per_latent=4, residual_std=0.5)
    return ObservationSpaceWorldModel(config, codec).eval()


def make_batch(size: int = 8) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 3, 4, 4, 4, generator=drawn),
        "text_tokens": torch.randn(size, 3, 8, generator=drawn),
        "actions": torch.randn(size, 8, 2, generator=drawn),
        "has_actions": torch.arange(size) % 3 != 1,
        "keys": [f"key{i}" for i in range(size)],
    }


class Ranks:
    """Stand-ins for processes: each rank's part of what they gather is kept until all have come."""

    def __init__(self, model: nn.Module, size: int, per_sequence: int = 1) -> None:
        self.kept: list[Any] = []
        self.num_calls: Counter[int] = Counter()
        self.engines = [
            SimpleNamespace(
                module=model, data_rank=rank // per_sequence, data_world_size=size // per_sequence,
                sequence_rank=rank % per_sequence, device=CPU, to_device=lambda batch: batch,
                call=partial(self.call, rank), ranks=SimpleNamespace(gather=self.gather),
            )
            for rank in range(size)
        ]  # fmt: skip

    def call(self, rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.num_calls[rank] += 1
        return function(*args, **kwargs)

    def gather(self, value: Any) -> list[Any]:
        self.kept.append(value)
        return self.kept


def figures_of(model: nn.Module, *args: Any, **changes: Any) -> dict[str, float]:
    return figures_of_ranks(Ranks(model, 1), *args, **changes)


@torch.no_grad()
def figures_of_ranks(
    ranks: Ranks,
    batches: list[dict[str, Any]],
    run_dir: Path,
    networks: MetricNetworks = MetricNetworks(),  # noqa: B008
    **changes: Any,
) -> dict[str, float]:
    run_dir.mkdir(exist_ok=True)
    config = ImagineConfig(**({"clips": 5, "videos": 0} | changes))
    figures: dict[str, float] = {}
    for engine in ranks.engines:
        imagination = Imagination(config, networks, engine, seed=3, step=7, run_dir=run_dir)
        for batch in batches:
            own = len(batch["keys"]) // engine.data_world_size
            part = slice(engine.data_rank * own, (engine.data_rank + 1) * own)
            imagination.look_at({name: rows[part] for name, rows in batch.items()})
        figures = imagination.figures()
    return figures


@pytest.mark.parametrize(("num_ranks", "per_sequence"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
def test_any_number_of_ranks_imagines_and_measures_the_same_clips(
    num_ranks: int, per_sequence: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = make_model(), [make_batch()]
    alone = figures_of(model, batches, tmp_path / "alone", videos=2)
    assert alone["imagined_clips"] == 5
    ranks, written = Ranks(model, num_ranks, per_sequence), []
    monkeypatch.setattr("pretrain.imagination.encode_video", lambda *args: written.append(encode_video(*args)))
    assert figures_of_ranks(ranks, batches, tmp_path / "several", videos=2) == alone
    assert len(written) == 2
    shares = [len(judged) for judged in ranks.kept[::per_sequence]]
    assert sum(shares) == sum(map(len, ranks.kept)) == 5 and max(shares) - min(shares) <= 1
    assert ranks.num_calls == dict.fromkeys(range(num_ranks), max(shares))  # whoever is done still computes with all
    several = {path.name: path.read_bytes() for path in (tmp_path / "several" / "validation").iterdir()}
    assert several == {path.name: path.read_bytes() for path in (tmp_path / "alone" / "validation").iterdir()}
    assert sorted(several) == ["step_00000007_clip_000.mp4", "step_00000007_clip_001.mp4"]


def test_more_clips_than_a_batch_has_come_from_the_next_one_and_none_counts_twice(tmp_path: Path) -> None:
    batch = make_batch()
    other = {**batch, "latents": batch["latents"] + 1}
    assert figures_of(make_model(), [batch, other, batch], tmp_path, clips=11)["imagined_clips"] == 11
    assert figures_of(make_model(), [batch, batch], tmp_path, clips=16)["imagined_clips"] == 8
    assert figures_of(make_model(), [batch], tmp_path, clips=16)["imagined_clips"] == 8
    assert "latent_frechet" not in figures_of(make_model(), [batch], tmp_path, clips=1)
    assert figures_of(make_model(), [batch], tmp_path, clips=0) == {}


class Prophet(ObservationSpaceWorldModel):
    """Knows the future: where it is off by `error`, the figures say so."""

    def predict(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = next(row for row in self.latents_to_come if torch.equal(row[:1], context[0]))
        return row[None, 1:] + self.error


def test_distances_are_of_what_was_imagined_to_what_came(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch()
    model.__class__ = Prophet
    model.latents_to_come, model.error = batch["latents"], 0.0
    right = figures_of(model, [batch], tmp_path, clips=8)
    assert right["psnr"] == 99 and right["ssim"] == pytest.approx(1) and right["latent_frechet"] < 1e-9
    model.error = 0.5
    wrong = figures_of(model, [batch], tmp_path, clips=8)
    pairs = [(latents.clone(), latents) for latents in batch["latents"]]
    for imagined, _ in pairs:
        imagined[1:] += 0.5
    features = [np.stack([latent_features(pair[place], 1) for pair in pairs]) for place in (0, 1)]
    assert wrong["latent_frechet"] == pytest.approx(frechet_distance(*features)) and wrong["latent_frechet"] > 0.5
    assert wrong["psnr"] < 99 and wrong["ssim"] < 1


class CountsFrames(nn.Module):
    """In place of I3D: what it is shown."""

    def forward(self, video: Tensor) -> Tensor:
        return torch.cat([video.float().mean((2, 3, 4)), torch.zeros(1, 391)], 1)


def test_networks_measure_where_they_are_given(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch()
    torch.manual_seed(0)
    lpips = Lpips(BACKBONES[1])
    for head in lpips.heads.parameters():
        nn.init.uniform_(head)
    figures = figures_of(model, [batch], tmp_path, networks=MetricNetworks(lpips, CountsFrames()))  # type: ignore[arg-type]
    assert figures.keys() == {"imagined_clips", "psnr", "ssim", "lpips", "latent_frechet", "fvd"}
    assert figures["lpips"] > 0 and figures["fvd"] > 0
    model.__class__ = Prophet
    model.latents_to_come, model.error = batch["latents"], 0.0
    figures = figures_of(model, [batch], tmp_path, networks=MetricNetworks(lpips, CountsFrames()))  # type: ignore[arg-type]
    assert figures["lpips"] == 0 and figures["fvd"] < 1e-9


def test_samples_are_not_the_mean_prediction(tmp_path: Path) -> None:
    model = make_model()
    nn.init.normal_(model.video.proj_out.weight)
    mean = figures_of(model, [make_batch()], tmp_path)
    assert figures_of(model, [make_batch()], tmp_path, num_inference_steps=3) != mean


def test_what_imagines_nothing_is_refused() -> None:
    assert ready_to_imagine(ImagineConfig(), nn.Linear(1, 1), [], CPU) == MetricNetworks()
    with pytest.raises(UserError, match="only a world model of video imagines clips"):
        ready_to_imagine(ImagineConfig(clips=1), nn.Linear(1, 1), [], CPU)
    for settings, complaint in (
        ({"lpips_heads": "alex.pth", "clips": 4}, "give both of lpips_backbone and lpips_heads, or none"),
        ({"lpips_backbone": "a.pth", "lpips_heads": "b.pth"}, "clips=0 leaves LPIPS nothing to measure"),
        ({"i3d": "i3d.pt", "clips": 1}, "clips=1 leaves FVD no distribution to measure; set it to at least 2"),
    ):
        with pytest.raises(ValidationError, match=complaint):
            ImagineConfig.model_validate(settings)


def test_clips_that_a_network_cannot_see_are_refused_before_the_first_step(tmp_path: Path) -> None:
    alexnet, i3d = Lpips(BACKBONES[0]), I3d()
    torch.save({f"features.{name}": value for name, value in alexnet.features.state_dict().items()}, tmp_path / "a.pth")
    torch.save(alexnet.heads.state_dict(), tmp_path / "heads.pth")
    torch.save(i3d.state_dict(), tmp_path / "i3d.pt")
    paths = {"lpips_backbone": tmp_path / "a.pth", "lpips_heads": tmp_path / "heads.pth"}
    model = make_model()
    networks = ready_to_imagine(ImagineConfig(clips=2, **paths), model, ["31x64x5"], CPU)
    assert networks.lpips is not None and networks.i3d is None
    with pytest.raises(UserError, match=r"AlexNet, which takes pictures of at least 31 pixels, but clips are 30x64x5"):
        ready_to_imagine(ImagineConfig(clips=2, **paths), model, ["31x64x5", "30x64x5"], CPU)
    of_fvd = ImagineConfig(clips=2, i3d=tmp_path / "i3d.pt")
    assert ready_to_imagine(of_fvd, model, ["16x16x9"], CPU).i3d is not None
    with pytest.raises(UserError, match=r"imagine\.i3d takes clips of at least 9 frames, but they are 16x16x5"):
        ready_to_imagine(of_fvd, model, ["16x16x5"], CPU)
