"""A run that is stopped or killed and started again is the run that was left alone."""

import contextlib
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from configs.loader import UserError, load_config
from pretrain.checkpoint import find_checkpoints
from pretrain.checkpoint_files import CheckpointWeights
from pretrain.metrics import read_metrics
from pretrain.run import EXIT_STOPPED, resume_config
from pretrain.steps import TrainState, split_batch
from pretrain.train import MAY_CHANGE, PretrainConfig, resume_run

SCRIPT = Path(__file__).with_name("tiny_training.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUM_KILLS = int(os.environ.get("NUM_KILLS", "3"))
TIMINGS = {"step_s", "samples_per_s", "data_wait_share", "peak_memory_gb", "slowest_rank_s", "median_rank_s"}
tiny = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Every number that is not a measurement of time or memory."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def stop_at(batch: int) -> Callable[[int], None]:
    def terminate(step: int) -> None:
        if step == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    return terminate


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert tiny.tiny_run(tiny.tiny_config(run_dir, 12)) == 0
    return run_dir


def test_a_run_writes_its_folder(uninterrupted: Path) -> None:
    rows = curve(uninterrupted)
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["step"] for row in validation] == [4, 8, 12]
    assert {"loss", "loss/left", "loss/right", "lr", "grad_norm", "skipped_steps", "samples_seen"} <= train[0].keys()
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert [path.name for path in find_checkpoints(uninterrupted / "checkpoints")] == ["step_00000010", "step_00000012"]
    assert load_config(PretrainConfig, uninterrupted / "config.yaml") == tiny.tiny_config(uninterrupted, 12)


def test_the_export_is_the_averaged_weights(uninterrupted: Path) -> None:
    exported = load_file(uninterrupted / "export" / "model.safetensors")
    averaged, latest = (
        CheckpointWeights(uninterrupted / "checkpoints" / "step_00000012", averaged).read_all()
        for averaged in (True, False)
    )
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    assert not torch.equal(exported["head.weight"], latest["head.weight"])
    tiny.build_tiny_model().load_state_dict(exported, strict=True)
    assert (uninterrupted / "export" / "model.yaml").read_text() == tiny.dump_config(tiny.TinyConfig())


def test_sigterm_saves_at_the_step_and_the_run_goes_on_exactly(uninterrupted: Path, tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path, 12)

    # Batch 6 is the seventh: the step in progress is finished first.
    assert tiny.tiny_run(config, on_step=stop_at(6)) == EXIT_STOPPED
    assert find_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000007"
    assert not (tmp_path / "export").exists()
    assert tiny.tiny_run(config) == 0
    assert curve(tmp_path) == curve(uninterrupted)
    exported, expected = (load_file(run / "export" / "model.safetensors") for run in (tmp_path, uninterrupted))
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_a_finished_run_started_again_changes_nothing(uninterrupted: Path) -> None:
    before = curve(uninterrupted)
    assert tiny.tiny_run(tiny.tiny_config(uninterrupted, 12)) == 0
    assert curve(uninterrupted) == before


def test_from_the_checkpoint_before_a_damaged_one_the_run_goes_on_exactly(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000012" / "state.json").write_text("{}")
    assert tiny.tiny_run(tiny.tiny_config(tmp_path / "run", 12)) == 0
    assert "step_00000012 is damaged" in caplog.text
    assert curve(tmp_path / "run") == curve(uninterrupted)


def test_a_run_goes_on_with_other_sharding_and_micro_batches(uninterrupted: Path, tmp_path: Path) -> None:
    settings = {"kind": "accelerate", "device": "cpu", "precision": "fp32"}
    tiny.tiny_run(resume_run(tiny.tiny_config(tmp_path, 12, engine=settings)), on_step=stop_at(6))
    engine = {**settings, "sharding": "fsdp2", "grad_accum_steps": 4}
    assert tiny.tiny_run(resume_run(tiny.tiny_config(tmp_path, 12, engine=engine))) == 0
    for row, expected in zip(curve(tmp_path), curve(uninterrupted), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    engine = {"kind": "accelerate", "device": "cpu", "precision": "fp32", "grad_accum_steps": 3}
    with pytest.raises(UserError, match=r"global_batch_size=8 .*grad_accum_steps=3; choose a multiple of 3"):
        tiny.tiny_run(tiny.tiny_config(tmp_path, 6, engine=engine))
    assert not (tmp_path / "config.yaml").exists()  # else the right size would be refused as another than it began with


@pytest.mark.parametrize("in_the_way", ["a file", "a link to a disk that is not there"])
def test_a_run_that_could_not_be_saved_does_not_begin(in_the_way: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    folder.write_text("") if in_the_way == "a file" else folder.symlink_to(tmp_path / "disk" / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints/step_00000000: cannot be written \(.*\); see to the disk"):
        tiny.tiny_run(tiny.tiny_config(folder.parent, 6))
    assert not (folder.parent / "metrics.jsonl").exists()


def test_checkpoints_of_which_nobody_knows_the_config_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"holds checkpoints, but no config\.yaml .*; restore it, or choose another"):
        resume_run(tiny.tiny_config(tmp_path, 12))


def test_an_empty_validation_split_is_left_out(tmp_path: Path) -> None:
    open_batches = tiny.tiny_batches()

    def without_validation(split: str, *args: Any) -> Any:
        return open_batches(split, *args) if split == "train" else None

    with tiny.StopSignal() as stop:
        tiny.train(tiny.tiny_config(tmp_path, 5), tiny.build_tiny_model(), {}, without_validation, stop)
    assert {row["split"] for row in curve(tmp_path)} == {"train"}


def test_skipped_steps_are_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.tiny_run(tiny.tiny_config(tmp_path, 5), scale=lambda batch: math.nan if batch == 2 else 1.0)
    rows = [row for row in curve(tmp_path) if row["split"] == "train"]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["loss"] is None and rows[3]["loss"] is not None
    assert "step 3 was left out: its gradients are not finite" in caplog.text


def test_only_fields_that_leave_the_losses_alone_may_change(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path, 12)
    tiny.tiny_run(config.model_copy(update={"num_steps": 1}))  # writes config.yaml
    resume_config(tmp_path, tiny.tiny_config(tmp_path, 1, log_every=3, checkpoint_every=7), MAY_CHANGE)
    with pytest.raises(UserError, match=r"ema_decay is 0\.5"):
        resume_config(tmp_path, tiny.tiny_config(tmp_path, 1, ema_decay=0.5), MAY_CHANGE)


def test_a_run_can_be_extended_on_the_schedule_it_was_started_with(tmp_path: Path) -> None:
    def extended(num_steps: int, **optimizer: Any) -> PretrainConfig:
        return resume_run(tiny.tiny_config(tmp_path, num_steps, optimizer=optimizer))

    tiny.tiny_run(extended(6))
    assert extended(6).optimizer.decay_steps == 6
    with pytest.raises(UserError, match=r"optimizer\.decay_steps is 12, but .* was started with 6"):
        extended(12)
    tiny.tiny_run(extended(12, decay_steps=6))
    assert curve(tmp_path)[-1]["step"] == 12
    with pytest.raises(UserError, match=r"num_steps is 5, but .* has 12 already"):
        tiny.tiny_run(extended(5, decay_steps=6))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_steps": 10**400}, "num_steps"),
        ({"stuck_after_s": 1e30}, "stuck_after_s"),
        ({"optimizer": {"warmup_steps": 10**400}}, "warmup_steps"),
        ({"optimizer": {"decay_steps": 10**400}}, "decay_steps"),
        ({"optimizer": {"learning_rate": 1e30}}, "learning_rate"),
        ({"optimizer": {"eps": 1e-50}}, "eps"),
        ({"optimizer": {"learning_rate": 1.0, "weight_decay": 1.0}}, "takes away all that there is"),
        ({"guard": {"window": 10**30}}, "window"),
        ({"imagine": {"num_inference_steps": 10**9}}, "num_inference_steps"),
        *(
            ({"model": {"video": {}, "flow_time": {name: value}}}, name)
            for name in ("mean", "std", "alpha", "beta", "shift", "shift_tokens")
            for value in (-(10**18), 10**18)
        ),
        ({"model": {"video": {"eps": 1e-50}}}, "eps"),
        ({"model": {"video": {}, "residual_std": 1e-300}}, "residual_std"),
    ],
)
def test_what_no_run_could_use_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    settings = {"run_dir": tmp_path, "num_steps": 6, **change}
    with pytest.raises(ValidationError, match=complaint):
        tiny.tiny_config(**settings)


def test_a_state_of_another_version_is_refused() -> None:
    state = TrainState(step=3, rewinds=1)
    assert TrainState.restored(asdict(state)) == state
    with pytest.raises(UserError, match=r"holds step, momentum, but this version knows step, .* another run_dir"):
        TrainState.restored({"step": 3, "momentum": 1})


def test_split_batch_keeps_order_and_rows_together() -> None:
    batch = {"x": torch.arange(6), "keys": list("abcdef")}
    parts = list(split_batch(batch, 3))
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part["keys"] for part in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]


# --- real processes -----------------------------------------------------------------------------------------------


def wait_for(condition: Any, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in two minutes"
        time.sleep(0.01)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def kill(torchrun: subprocess.Popen[bytes]) -> None:
    """With its ranks, which are in sessions of their own. It is stopped first, or it might start some meanwhile."""
    torchrun.send_signal(signal.SIGSTOP)
    for process in psutil.Process(torchrun.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    torchrun.kill()
    torchrun.wait()


@pytest.mark.slow
@pytest.mark.timeout(NUM_KILLS * 120)
def test_killed_again_and_again_under_deepspeed_on_two_ranks_it_is_the_same_run(tmp_path: Path) -> None:
    alone, killed, num_steps = tmp_path / "alone", tmp_path / "killed", 60
    reference = subprocess.Popen([*TORCHRUN, SCRIPT, alone, str(num_steps)])
    # At any moment: in a step, while a checkpoint is written, while an old one is dropped.
    for step in sorted(random.sample(range(3, num_steps - 3), NUM_KILLS)):
        victim = subprocess.Popen([*TORCHRUN, SCRIPT, killed, str(num_steps), str(num_steps - 1)])
        try:
            wait_for(lambda: last_step(killed) >= step, victim, f"step {step}")  # noqa: B023
        finally:
            kill(victim)
        assert not (killed / "export").exists()
    assert reference.wait(timeout=120) == 0

    subprocess.run([*TORCHRUN, SCRIPT, killed, str(num_steps)], check=True, timeout=120)
    assert curve(killed) == curve(alone)
    assert json.loads((alone / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    exported, expected = (load_file(run / "export" / "model.safetensors") for run in (killed, alone))
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_sigterm_ends_a_plain_process_with_75(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, SCRIPT, tmp_path, "100000"])
    wait_for(lambda: last_step(tmp_path) >= 2, process, "step 2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert find_checkpoints(tmp_path / "checkpoints")[-1].name == f"step_{last_step(tmp_path):08d}"
