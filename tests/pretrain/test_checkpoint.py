"""Checkpoints are there whole or not at all, and damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from configs.loader import UserError
from pretrain.checkpoint import find_checkpoints, load_checkpoint, read_weights, save_checkpoint, write_export
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import Engine, EngineConfig, OptimizerConfig, create_engine


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))


def open_run() -> tuple[Engine, ExponentialMovingAverage]:
    config = EngineConfig(kind="accelerate", device="cpu", precision="fp32")
    engine = create_engine(config, TiedModel(), OptimizerConfig())
    return engine, ExponentialMovingAverage(engine, decay=0.5)


def save(folder: Path, step: int, keep_last: int = 10, **state: Any) -> Path:
    engine, ema = open_run()
    return save_checkpoint(
        folder, engine, ema, {"step": step, **state}, texts={"model.yaml": "kind: tied\n"}, keep_last=keep_last
    )


def load(folder: Path) -> dict[str, Any] | None:
    return load_checkpoint(folder, *open_run())


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert load(tmp_path / "checkpoints") is None


def test_state_weights_and_average_come_back(tmp_path: Path) -> None:
    engine, ema = open_run()
    ema.average["embed.weight"].fill_(7.0)
    path = save_checkpoint(tmp_path, engine, ema, {"step": 12, "samples_seen": 96}, texts={}, keep_last=1)
    assert path.name == "step_00000012"
    other_engine, other_ema = open_run()
    assert load_checkpoint(tmp_path, other_engine, other_ema) == {"step": 12, "samples_seen": 96}
    assert torch.equal(other_engine.module.embed.weight, engine.module.embed.weight)
    assert other_ema.average["embed.weight"].eq(7.0).all()


def test_inference_weights_load_strictly_tied_ones_included(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in ("model.safetensors", "ema.safetensors"):
        TiedModel().load_state_dict(read_weights(path / name), strict=True)
    assert (path / "model.yaml").read_text() == "kind: tied\n"


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000004", "step_00000030"]


@pytest.mark.parametrize("name", ["model.safetensors", "engine/rank_00000.safetensors", "state.json", "model.yaml"])
def test_a_changed_byte_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = bytearray((path / name).read_bytes())
    content[-2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: does not match its checksum.*delete the folder .*step_00000002"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = (path / "ema.safetensors").read_bytes()
    (path / "ema.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match=rf"ema.safetensors: has {len(content) - 10} bytes instead of {len(content)}"):
        load(tmp_path)


def test_a_missing_file_and_changed_checksums_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"state.json: is missing"):
        load(tmp_path)
    checksums = json.loads((path / "checksums.json").read_text())
    del checksums["state.json"]
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(UserError, match=r"checksums.json: is missing or does not match COMPLETE"):
        load(tmp_path)


def test_a_file_that_the_run_did_not_write_is_not_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "engine" / "planted.pt").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"planted.pt: was not written by the run"):
        load(tmp_path)


def test_deleting_the_damaged_one_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    for path in sorted((tmp_path / "step_00000002").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    state = load(tmp_path)
    assert state is not None and state["step"] == 1


def test_what_a_kill_left_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "COMPLETE").unlink()
    (tmp_path / ".tmp-step_00000003").mkdir()
    state = load(tmp_path)
    assert state is not None and state["step"] == 1
    save(tmp_path, 2)  # the run takes step 2 again
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_mark_of_completeness_that_is_garbage_is_named(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "COMPLETE").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"checksums.json: is missing or does not match COMPLETE"):
        load(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 80"),  # torch's way to say so
    ],
)
def test_a_failed_save_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    save(tmp_path, 1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("pretrain.checkpoint.save_file", fail)
    with pytest.raises(UserError, match=r"step_00000002: cannot be written \((No space|.*I/O error|the disk is full)"):
        save(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]  # and the half-written one is gone


def test_weights_that_are_not_there_or_not_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_weights(tmp_path / "model.safetensors")


def test_export_stands_on_its_own_and_replaces_an_older_one(tmp_path: Path) -> None:
    codec = tmp_path / "codec"
    codec.mkdir()
    (codec / "config.json").write_text("{}")
    engine, ema = open_run()
    for value in (1.0, 2.0):
        ema.average["head.weight"].fill_(value)
        missing = tmp_path / "there_is_no_such_file"
        write_export(tmp_path / "export", engine, ema, {"model.yaml": "kind: x\n"}, [codec, missing])
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert weights["head.weight"].eq(2.0).all() and weights["scale"].eq(1.0).all()
    assert sorted(path.name for path in (tmp_path / "export").rglob("*") if path.is_file()) == [
        "config.json",
        "model.safetensors",
        "model.yaml",
    ]
