"""One run over two datasets with clips of two sizes: resumed to the last digit, exported with all statistics."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import UserError
from data_pipeline.datasets import Datasets
from data_pipeline.embodiments import Embodiment
from data_pipeline.video_io import ViewConfig, decode_clip
from pretrain.exported import load_world_model
from pretrain.metrics import read_metrics
from pretrain.train import PretrainConfig, main
from pretrain.video_metrics.i3d import I3d
from tests.data_pipeline.tiny_dataset import tiny_dataset

DUCK = Embodiment(name="duck", action_names=("yaw",), proprio_names=(), control_hz=20.0)
HIGH = {"front": ViewConfig(height=24, width=16)}
VIDEO = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6,
         "out_channels": 6, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}  # fmt: skip
TIMINGS = {"step_s", "samples_per_s", "data_wait_share", "peak_memory_gb", "model_tflops_per_device"}
TIMINGS |= {"tokens_per_s", "model_flops_per_s", "hardware_flops_per_s", "slowest_rank_s", "median_rank_s"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("several")
    return {
        "lab": tiny_dataset(folder / "lab", (4, 4, 3, 3)),
        "pond": tiny_dataset(folder / "pond", (5, 4), first_episode=30, robot=DUCK, views=HIGH, num_frames=9),
    }


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def run(name: str, num_steps: int, dataset: dict[str, Path] = folders, **changes: Any) -> Path:
        run_dir = tmp_path_factory.getbasetemp() / name
        loader = {
            "dataset": dataset, "text_length": 4, "latent_cells_per_batch": 72 * 4, "batch_multiple": 4,
            "mixture": {"by": "dataset", "weights": {"lab": 1, "pond": 1}},
        }  # fmt: skip
        settings = {
            "run_dir": run_dir, "num_steps": num_steps, "model": {"video": VIDEO}, "loader": loader,
            "engine": {"kind": "accelerate", "device": "cpu", "precision": "fp32"}, "optimizer": {"decay_steps": 8},
            "log_every": 1, "validate_every": 4, "checkpoint_every": 3,
        }  # fmt: skip
        assert main(PretrainConfig.model_validate({**settings, **changes})) == 0
        return run_dir

    return run


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Path:
    return run("whole", 8)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in TIMINGS}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_work_and_losses_by_flow_time_are_measured(whole: Path) -> None:
    train, validation = (
        [row for row in read_metrics(whole / "metrics.jsonl") if row["split"] == split]
        for split in ("train", "validation")
    )
    assert all(0 < row["model_flops_per_s"] < row["hardware_flops_per_s"] for row in train)
    assert all(row["tokens_per_s"] > row["samples_per_s"] for row in train)
    bands = {key for key in validation[-1] if key.startswith("loss/video/flow_time_")}
    assert len(bands) == 4 and all(validation[-1][band] > 0 for band in bands)


def test_clips_are_imagined_at_every_validation(
    run: Callable[..., Path], whole: Path, folders: dict[str, Path]
) -> None:
    run_dir = run("videos", 8, imagine={"clips": 6, "videos": 2})
    names = [path.name for path in sorted((run_dir / "validation").iterdir())]
    assert names == [f"step_{step:08d}_clip_{clip:03d}.mp4" for step in (4, 8) for clip in (0, 1)]
    assert not (whole / "validation").exists()
    shown = rows(run_dir)
    measured = ("psnr", "ssim", "latent_frechet", "imagined_clips")
    figures = [tuple(row.pop(name) for name in measured) for row in shown if row["split"] == "validation"]
    assert all(0 < psnr < 99 and -1 < ssim < 1 and distance > 0 for psnr, ssim, distance, _ in figures)
    assert len(set(figures)) == 2 and 1 < figures[0][3] == figures[1][3] <= 6
    assert shown == rows(whole)  # looking changes nothing
    frames = decode_clip((run_dir / "validation" / names[0]).read_bytes())
    real, imagined = frames[:, :, : frames.shape[2] // 2], frames[:, :, frames.shape[2] // 2 :]
    first, last = (np.abs(real[i].astype(int) - imagined[i]).mean() for i in (0, -1))
    assert first < 4 and first < last  # the context is given, the future is not known


def test_metrics_that_cannot_be_are_refused_before_the_first_step(run: Callable[..., Path], tmp_path: Path) -> None:
    torch.save(I3d().state_dict(), tmp_path / "i3d.pt")
    with pytest.raises(UserError, match=r"imagine\.i3d takes clips of at least 9 frames, but they are 16x16x5"):
        run("no_fvd", 8, imagine={"clips": 2, "i3d": tmp_path / "i3d.pt"})
    with pytest.raises(UserError, match=r"none\.pt: cannot be read \(No such file or directory\)"):
        run("no_file", 8, imagine={"clips": 2, "i3d": tmp_path / "none.pt"})


def test_both_sizes_are_trained_on_and_counted(whole: Path) -> None:
    train = [row for row in rows(whole) if row["split"] == "train"]
    sizes = {after["samples_seen"] - before["samples_seen"] for before, after in pairwise(train)}
    assert sizes == {4, 8}  # 72 latent cells in a long clip, 32 in a short one
    assert train[-1]["epoch/lab"] > 0 and train[-1]["epoch/pond"] > 0
    assert [row["step"] for row in rows(whole) if row["split"] == "validation"] == [4, 8]


def test_it_goes_on_to_the_last_digit(run: Callable[..., Path], whole: Path) -> None:
    run("stopped", 4)
    assert rows(run("stopped", 8)) == rows(whole)


def test_datasets_may_move(run: Callable[..., Path], whole: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    run("moving", 4)
    moved = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    assert rows(run("moving", 8, moved)) == rows(whole)


def test_it_does_not_go_on_over_another_dataset(
    run: Callable[..., Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    mine = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    run("rebuilt", 2, mine)
    shutil.rmtree(mine["lab"])
    shutil.rmtree(tmp_path / "lab.staging", ignore_errors=True)
    tiny_dataset(mine["lab"], (4, 4, 3, 2))
    with pytest.raises(UserError, match=r"loader\.dataset\.lab: \S+ held other samples when .* another run_dir\."):
        run("rebuilt", 4, mine)


def test_the_export_has_the_statistics_of_all(whole: Path, folders: dict[str, Path]) -> None:
    world_model, _, described = load_world_model(whole / "export")
    assert set(described.embodiments) == {"arm", "duck"} and world_model.config.action_dim == 3
    for name, robot in (("lab", "arm"), ("pond", "duck")):
        alone = Datasets.open({"": folders[name]}).norm_stats["embodiments"][robot]
        assert described.norm_stats["embodiments"][robot] == alone
    for shape in ((2, 1, 6, 4, 4), (2, 1, 6, 6, 4)):  # one model imagines either size
        actions = torch.zeros(2, 8, 3)
        assert world_model.predict(torch.zeros(shape), actions, torch.zeros(2, 4, 8)).shape == shape
