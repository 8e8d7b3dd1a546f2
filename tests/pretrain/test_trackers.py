"""Trackers get what metrics.jsonl has, and nothing that they cannot do ends a run."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.loader import UserError
from pretrain import trackers
from pretrain.metrics import MetricsLog, read_metrics

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_training.py"))))


class Broken:
    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        pass

    def write(self, step: int, numbers: Any) -> None:
        raise ConnectionError("no route to host")

    close = write


def test_tensorboard_has_the_rows_of_a_run_and_of_what_it_was_resumed_to(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for num_steps in (6, 8):
        assert tiny.tiny_run(tiny.tiny_config(tmp_path, num_steps, trackers=("tensorboard",))) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for split in ("train", "validation"):
        shown = {event.step: event.value for event in events.Scalars(f"{split}/loss")}
        assert shown == pytest.approx({row["step"]: row["loss"] for row in rows if row["split"] == split})
    assert not {"train/step", "train/split"} & set(events.Tags()["scalars"])


def test_wandb_gets_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tiny.tiny_run(tiny.tiny_config(tmp_path, 2, trackers=("wandb",))) == 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_package_that_is_not_there_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package wandb is not installed; pip install wandb"):
        tiny.tiny_run(tiny.tiny_config(tmp_path, 2, trackers=("wandb",)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []  # only whether it can be written was tried


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: "found")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    assert tiny.tiny_run(tiny.tiny_config(tmp_path, 4, trackers=("wandb",))) == 0
    assert caplog.text.count("wandb does not get all of this run (ConnectionError: no route to host)") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_tracker_that_cannot_be_opened_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run_dir: Path, resumed_step: int) -> Broken:
        raise RuntimeError("no account")

    monkeypatch.setattr(trackers, "find_spec", lambda name: "found")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with MetricsLog(tmp_path / "metrics.jsonl", 0, is_main=True, trackers=["wandb"]) as log:
        log.write({"step": 1, "split": "train", "loss": 0.5})
    assert "no account" in caplog.text and len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    caplog.clear()
    MetricsLog(tmp_path / "other.jsonl", 0, is_main=False, trackers=["wandb"]).close()  # other ranks open none
    assert not caplog.text
