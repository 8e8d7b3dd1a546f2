"""Checkpoints are there whole or not at all, written while training goes on, and damage is told."""

import hashlib
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from configs.loader import UserError
from pretrain.checkpoint import Checkpoints, find_checkpoints, verify_checkpoint, write_export
from pretrain.checkpoint_files import CheckpointWeights, PartFiles, part_file, write_parts
from pretrain.ema import ExponentialMovingAverage
from pretrain.engine import Engine, EngineConfig, OptimizerConfig, create_engine
from pretrain.engine.shards import share


class TiedModel(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight
        self.fixed = nn.Linear(width, 1).requires_grad_(False)
        self.register_buffer("scale", torch.ones(1))


def open_run(model: nn.Module | None = None) -> tuple[Engine, ExponentialMovingAverage]:
    config = EngineConfig(kind="accelerate", device="cpu", precision="fp32")
    engine = create_engine(config, model or TiedModel(), OptimizerConfig())
    return engine, ExponentialMovingAverage(engine, decay=0.5)


def save(folder: Path, *steps: int, keep_last: int = 10, keep_every: int | None = None) -> Path:
    """Of the last step."""
    engine, ema = open_run()
    checkpoints = Checkpoints(folder, engine, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        checkpoints.save(ema, {"step": step}, texts={"model.yaml": "kind: tied\n"})
    checkpoints.settle(wait_for_it=True)
    return folder / f"step_{steps[-1]:08d}"


def load(folder: Path, model: nn.Module | None = None) -> dict[str, Any] | None:
    engine, ema = open_run(model)
    return Checkpoints(folder, engine, keep_last=10).load(ema)


def names(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoints(folder)]


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert load(tmp_path / "checkpoints") is None


def test_state_weights_and_average_come_back(tmp_path: Path) -> None:
    engine, ema = open_run()
    ema.average["embed.weight"].fill_(7.0)
    engine.module.scale.fill_(3.0)
    checkpoints = Checkpoints(tmp_path, engine, keep_last=1)
    checkpoints.save(ema, {"step": 12, "samples_seen": 96}, texts={})
    checkpoints.settle(wait_for_it=True)
    assert checkpoints.newest.name == "step_00000012"
    other_engine, other_ema = open_run()
    state = Checkpoints(tmp_path, other_engine, keep_last=1).load(other_ema)
    assert state == {"step": 12, "samples_seen": 96}
    for name, value in engine.module.state_dict().items():
        assert torch.equal(other_engine.module.state_dict()[name], value), name
    assert other_ema.average["embed.weight"].eq(7.0).all()


def test_a_resume_holds_one_parameter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those it goes into: what is offloaded may be more than memory holds."""
    save(tmp_path, 1)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    seen, read = [], PartFiles.read

    def counted(*arguments: Any) -> torch.Tensor:
        seen.append(len(alive))
        values = read(*arguments)
        alive.add(values)
        return values

    monkeypatch.setattr(PartFiles, "read", counted)
    assert load(tmp_path) == {"step": 1}
    assert len(seen) == 3 + 1 and max(seen) <= 1  # weights, and the average of what is trained


@pytest.mark.parametrize("averaged", [True, False])
def test_whole_weights_load_strictly_tied_ones_included(tmp_path: Path, averaged: bool) -> None:
    path = save(tmp_path, 1)
    TiedModel().load_state_dict(CheckpointWeights(path, averaged).read_all(), strict=True)
    assert (path / "model.yaml").read_text() == "kind: tied\n"


def test_the_newest_few_are_kept_and_every_so_many_steps_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40, 50, keep_last=2, keep_every=20)
    assert names(tmp_path) == ["step_00000020", "step_00000040", "step_00000050"]


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), written_by=st.integers(1, 6), read_by=st.integers(1, 6)
)
def test_parts_of_any_number_of_ranks_are_read_by_any_other(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], written_by: int, read_by: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    whole = {"a": torch.randn(shape), "b": torch.randn(2)}
    for rank in range(written_by):
        places = {name: share(value.numel(), rank, written_by) for name, value in whole.items()}
        parts = {name: whole[name].flatten()[start : start + num].clone() for name, (start, num) in places.items()}
        write_parts(folder / part_file("weights", rank), parts, {name: start for name, (start, _) in places.items()})
    for rank in range(read_by):
        files = PartFiles(folder, "weights", rank)
        for name, value in whole.items():
            start, num = share(value.numel(), rank, read_by)
            assert torch.equal(files.read(name, start, num), value.flatten()[start : start + num])


# --- written while training goes on -------------------------------------------------------------------------------


class SlowDisk:
    """Lets writes of parts wait until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.release = self.gate.set

        def wait_and_write(path: Path, *arguments: Any) -> None:
            assert self.gate.wait(timeout=60)
            write_parts(path, *arguments)

        monkeypatch.setattr("pretrain.checkpoint.write_parts", wait_and_write)


def test_training_goes_on_and_the_checkpoint_holds_the_moment_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, (engine, ema) = SlowDisk(monkeypatch), open_run()
    before = {name: shard.values.clone() for name, shard in engine.shards().items()}
    checkpoints = Checkpoints(tmp_path, engine, keep_last=1)
    checkpoints.save(ema, {"step": 1}, texts={})
    checkpoints.settle()  # not there yet, and nobody waits
    assert names(tmp_path) == []
    engine.assign_shards({name: torch.zeros_like(value) for name, value in before.items()})
    disk.release()
    checkpoints.settle(wait_for_it=True)
    stored = CheckpointWeights(tmp_path / "step_00000001", averaged=False).read_all()
    assert all(torch.equal(stored[name].flatten(), value) for name, value in before.items())


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, (engine, ema) = SlowDisk(monkeypatch), open_run()
    checkpoints = Checkpoints(tmp_path, engine, keep_last=5)
    checkpoints.save(ema, {"step": 1}, texts={})
    threading.Timer(0.2, disk.release).start()
    checkpoints.save(ema, {"step": 2}, texts={})
    assert names(tmp_path) == ["step_00000001"]
    checkpoints.settle(wait_for_it=True)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_failed_write_stops_the_run_at_a_step_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1)
    engine, ema = open_run()
    checkpoints = Checkpoints(tmp_path, engine, keep_last=1)

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("pretrain.checkpoint.write_parts", fail)
    checkpoints.save(ema, {"step": 2}, texts={})
    with pytest.raises(UserError, match=r"step_00000002: cannot be written \((I/O error: )?No space left"):
        checkpoints.settle(wait_for_it=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]  # and the half-written one is gone


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"step_00000001: cannot be written \(Not a directory\)"):
        save(tmp_path / "file", 1)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    engine, ema = open_run()
    checkpoints = Checkpoints(tmp_path, engine, keep_last=1)
    checkpoints.save(ema, {"step": 1}, texts={"model.yaml": None})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        checkpoints.settle(wait_for_it=True)


# --- damage -------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def forge(path: Path, checksums: str) -> None:
    (path / "checksums.json").write_text(checksums)
    (path / "COMPLETE").write_text(hashlib.sha256(checksums.encode()).hexdigest())


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: flip_a_bit(path / "weights_00000.safetensors"), r"weights_00000\.safetensors: does not match"),
    (lambda path: flip_a_bit(path / "exp_avg_00000.safetensors"), r"exp_avg_00000\.safetensors: does not match"),
    (lambda path: flip_a_bit(path / "state.json"), r"state.json: does not match its checksum"),
    (lambda path: flip_a_bit(path / "model.yaml"), r"model.yaml: does not match its checksum"),
    (lambda path: (path / "model.yaml").write_text(""), r"model.yaml: has 0 bytes instead of 11"),
    (lambda path: (path / "state.json").unlink(), r"state.json: is missing"),
    (lambda path: (path / "checksums.json").write_text("{}"), r"checksums.json: is missing or does not match COMPLETE"),
    (lambda path: forge(path, "[1]"), r"checksums.json: is no list of files and their checksums"),
    (lambda path: forge(path, '{"state.json": 3}'), r"checksums.json: is no list of files and their checksums"),
    (lambda path: (path / "COMPLETE").write_bytes(b"\xff\xfe"), r"checksums.json: is missing or does not match COMPL"),
    (lambda path: (path / "weights_00001.safetensors").write_bytes(b""), r"weights_00001.* was not written by the run"),
]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints after an update, so that there are optimizer states."""
    folder, (engine, ema) = tmp_path_factory.mktemp("run"), open_run()
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    engine._micro_step = 1
    engine.step(1e-3)
    checkpoints = Checkpoints(folder, engine, keep_last=10)
    for step in (1, 2):
        checkpoints.save(ema, {"step": step}, texts={"model.yaml": "kind: tied\n"})
    checkpoints.settle(wait_for_it=True)
    return folder


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    saved_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], told: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved_run, folder)
    damage(folder / "step_00000002")
    with pytest.raises(UserError, match=told):
        verify_checkpoint(folder / "step_00000002")
    assert load(folder) == {"step": 1}
    assert "step_00000002 is damaged: it is damaged_step_00000002 now, and the checkpoint before it" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["damaged_step_00000002", "step_00000001"]
    save(folder, 2)  # the run takes step 2 again
    assert load(folder) == {"step": 2}


def test_nothing_but_damaged_checkpoints_is_no_fresh_start(saved_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved_run, folder)
    for path in find_checkpoints(folder):
        flip_a_bit(path / "state.json")
    with pytest.raises(UserError, match=r"each of the 2 checkpoints is damaged; restore one, or choose"):
        load(folder)


def test_what_a_kill_left_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    (save(tmp_path, 1, 2) / "COMPLETE").unlink()
    (tmp_path / ".tmp-step_00000003").mkdir()
    assert load(tmp_path) == {"step": 1}
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_copy_under_another_name_is_neither_used_nor_removed(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "step_00000001.backup")
    save(tmp_path, 2, 99_999_999, 100_000_000, keep_last=1, keep_every=1000)
    assert names(tmp_path) == ["step_100000000"]
    assert (tmp_path / "step_00000001.backup").is_dir()
    assert load(tmp_path) == {"step": 100_000_000}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"another model .*embed\.weight with \[3, 3\] instead of \[4, 4\]"):
        load(tmp_path, TiedModel(width=4))


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "layout.json").unlink()
    checksums = json.loads((path / "checksums.json").read_text())
    del checksums["layout.json"]
    text = json.dumps(checksums)
    (path / "checksums.json").write_text(text)
    (path / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(UserError, match="written by an older version"):
        load(tmp_path)


# --- export -------------------------------------------------------------------------------------------------------


def test_export_stands_on_its_own_and_replaces_an_older_one(tmp_path: Path) -> None:
    codec = tmp_path / "codec"
    codec.mkdir()
    (codec / "config.json").write_text("{}")
    engine, ema = open_run()
    checkpoints = Checkpoints(tmp_path / "checkpoints", engine, keep_last=1)
    for step in (1, 2):
        ema.average["embed.weight"].fill_(step)
        checkpoints.save(ema, {"step": step}, texts={})
        checkpoints.settle(wait_for_it=True)
        missing = tmp_path / "there_is_no_such_file"
        checkpoints.export(tmp_path / "export", {"model.yaml": "kind: x\n"}, [codec, missing])
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert weights["head.weight"].eq(2.0).all() and weights["scale"].eq(1.0).all()
    assert torch.equal(weights["fixed.weight"], engine.module.fixed.weight)
    assert sorted(path.name for path in (tmp_path / "export").rglob("*") if path.is_file()) == [
        "config.json",
        "model.safetensors",
        "model.yaml",
    ]


def test_an_export_that_fails_is_told_and_leaves_the_older_one(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    write_export(tmp_path / "export", path, {}, [])
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"export: cannot be written \(No such file"):
        write_export(tmp_path / "export", path, {"missing/model.yaml": ""}, [])
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
