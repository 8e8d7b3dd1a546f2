"""Steps that are out of line, runs that are stuck, ranks that die: the run does what it was told, and says so."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import UserError
from pretrain.checkpoint import find_checkpoints
from pretrain.checkpoint_files import CheckpointWeights
from pretrain.engine import StepReport
from pretrain.guards import MIN_HISTORY, Guard, GuardConfig
from pretrain.metrics import read_metrics

SCRIPT = Path(__file__).with_name("tiny_training.py")
tiny = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
ENGINES = [{"kind": "accelerate"}, {"kind": "deepspeed", "zero_stage": 1}, {"kind": "deepspeed", "zero_stage": 3}]
SPIKE = 30  # the batch that is out of line, which is that of step 31


def taken(loss: float, grad_norm: float = 1.0) -> tuple[float, StepReport]:
    return loss, StepReport(grad_norm, True, 1e-3)


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


# --- which values are out of line ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), level=st.floats(1e-3, 1e3), slope=st.floats(-0.002, 0.0))
@settings(max_examples=50, deadline=None)
def test_a_noisy_loss_that_falls_is_in_line_and_a_jump_is_not(seed: int, level: float, slope: float) -> None:
    noise = random.Random(seed)
    guard = Guard(GuardConfig(on_spike="skip", z_score=10), {})
    for step in range(300):
        loss = level * math.exp(slope * step) * (1 + 0.1 * noise.uniform(-1, 1))
        assert guard.largest_norm(loss) > 0
        assert guard.review(*taken(loss)) is None
    assert guard.largest_norm(5 * level) < 0
    trouble = guard.review(*taken(5 * level))
    assert trouble is not None and trouble.reason == "loss_spike" and trouble.limit < 5 * level


def test_nothing_is_out_of_line_before_there_is_enough_to_compare_with() -> None:
    guard = Guard(GuardConfig(on_spike="skip"), {})
    for step in range(MIN_HISTORY):
        assert guard.largest_norm(10.0**step) == math.inf
        assert guard.review(*taken(10.0**step)) is None


def test_one_spike_does_not_hide_the_next() -> None:
    guard = Guard(GuardConfig(on_spike="log"), {})
    for _ in range(MIN_HISTORY):
        guard.review(*taken(1.0))
    assert all(guard.review(*taken(100.0)) is not None for _ in range(5))


def test_its_state_says_all_it_knows() -> None:
    first = Guard(GuardConfig(on_spike="skip"), {})
    for step in range(40):
        first.review(*taken(1.0 + step % 3, 2.0 + step % 5))
    second = Guard(first.config, json.loads(json.dumps(first.state())))
    assert second.largest_norm(1.0) == first.largest_norm(1.0) < math.inf
    assert second.state() == first.state()


# --- what a run does about them -----------------------------------------------------------------------------------


def run(run_dir: Path, scale: Callable[[int], float], engine: dict[str, Any] | None = None, **guard: Any) -> int:
    engine = {"device": "cpu", "precision": "fp32"} | (engine or ENGINES[0])
    config = tiny.tiny_config(run_dir, 40, engine=engine, guard=guard, optimizer={"learning_rate": 1e-3})
    return tiny.tiny_run(config, scale=scale)


def spiked(batch: int) -> float:
    return 30.0 if batch == SPIKE else 1.0


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return CheckpointWeights(find_checkpoints(run_dir / "checkpoints")[-1], averaged=False).read_all()


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine['kind']}{engine.get('zero_stage', '')}")
def test_a_skipped_step_leaves_the_weights_as_they_were(engine: dict[str, Any], tmp_path: Path) -> None:
    """It is the step with gradients that are not finite, which every engine leaves out by itself."""
    assert run(tmp_path / "spike", spiked, engine, on_spike="skip") == 0
    assert run(tmp_path / "nan", lambda batch: math.nan if batch == SPIKE else 1.0, engine) == 0
    rows = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("spike", "nan")}
    assert [row["skipped_steps"] for row in rows["spike"] if row["split"] == "train"] == [0] * SPIKE + [1] * 10
    after = [[row["loss"] for row in rows[name] if row["step"] > SPIKE + 1] for name in rows]
    assert after[0] == after[1]
    assert all(
        torch.equal(value, weights(tmp_path / "nan")[name]) for name, value in weights(tmp_path / "spike").items()
    )

    spike, nan = (
        next(event for event in events(tmp_path / name) if event["event"] != "started") for name in ("spike", "nan")
    )
    assert (spike["event"], spike["step"], spike["was_applied"]) == ("loss_spike", SPIKE + 1, False)
    assert spike["value"] > spike["limit"] and spike["keys"] == [f"{SPIKE}-{i}" for i in range(tiny.BATCH)]
    assert (nan["event"], nan["step"], nan["value"]) == ("not_finite", SPIKE + 1, "inf")


@pytest.mark.parametrize("engine", ENGINES[1:], ids=("deepspeed1", "deepspeed3"))
def test_a_gradient_that_is_too_large_is_not_applied(engine: dict[str, Any]) -> None:
    from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
    from pretrain.steps import forward_backward, sample_draws

    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", **engine})
    built = create_engine(config, tiny.build_tiny_model(), OptimizerConfig())
    batch = {"latents": tiny.global_batch(0)}
    norms, before = [], tiny.whole_weights(built)
    for largest in (1e-9, math.inf):
        forward_backward(built, batch, sample_draws(built, 0, 1, batch))
        report = built.step(1e-2, largest)
        norms.append(report.grad_norm)
        assert report.was_applied == (largest == math.inf)
        assert torch.equal(tiny.whole_weights(built)["head.weight"], before["head.weight"]) != report.was_applied
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    built.close()  # or DeepSpeed would keep torch's linear layer replaced in the tests after this one


def test_by_default_a_spike_is_told_and_taken(tmp_path: Path) -> None:
    assert run(tmp_path, spiked) == 0
    kinds = [event["event"] for event in events(tmp_path)]
    assert kinds[:2] == ["started", "loss_spike"]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 40


def test_a_run_rewinds_to_its_checkpoint_and_leaves_the_spike_behind(tmp_path: Path) -> None:
    seen: list[int] = []
    config = tiny.tiny_config(tmp_path, 40, guard={"on_spike": "rewind"}, checkpoint_every=8)
    assert tiny.tiny_run(config, on_step=seen.append, scale=spiked) == 0
    rewound = next(event for event in events(tmp_path) if event["event"] == "rewound")
    assert (rewound["step"], rewound["to_step"]) == (SPIKE + 1, 24)
    # Steps 25 to 31 are taken again, with the batches behind the spike.
    assert seen == list(range(SPIKE + 1 + 16))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[24]["samples_seen"] == tiny.BATCH * (SPIKE + 2)


def test_without_a_checkpoint_to_rewind_to_the_step_is_left_out(tmp_path: Path) -> None:
    """Also the last one, whose checkpoint is what is exported."""
    config = tiny.tiny_config(tmp_path, SPIKE + 1, guard={"on_spike": "rewind"}, checkpoint_every=100)
    assert tiny.tiny_run(config, scale=spiked) == 0
    assert [event["event"] for event in events(tmp_path)] == ["started", "loss_spike"]
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_run_rewinds_so_often_and_no_more(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path, 60, guard={"on_spike": "rewind", "max_rewinds": 2}, checkpoint_every=8)
    with pytest.raises(UserError, match=r"max_rewinds=2"):
        tiny.tiny_run(config, scale=lambda batch: 30.0 if batch >= SPIKE else 1.0)
    assert [event["event"] for event in events(tmp_path)].count("rewound") == 2


def test_a_run_can_stop_at_a_spike_and_go_on_without_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"Step {SPIKE + 1}: its loss of .* guard.on_spike=stop"):
        run(tmp_path, spiked, on_spike="stop")
    assert find_checkpoints(tmp_path / "checkpoints")[-1].name == f"step_{SPIKE:08d}"  # written when the spike came
    assert run(tmp_path, spiked, on_spike="skip") == 0
    assert [event["event"] for event in events(tmp_path)] == [
        *("started", "loss_spike", "failed"),
        *("started", "loss_spike"),
    ]


def test_a_run_that_is_never_finite_ends(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the last 7 steps could be taken"):
        run(tmp_path, lambda batch: math.inf if batch > 3 else 1.0, max_in_a_row=7)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 6
    assert [event["event"] for event in events(tmp_path)] == ["started", *["not_finite"] * 7, "failed"]
    assert "none of the last 7 steps could be taken" in events(tmp_path)[-1]["error"]


def test_each_batch_of_a_validation_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, none may be taken for a step that is stuck."""
    signs: list[float] = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **_: signs.append(seconds))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: None)
    counts = []
    for num_batches in (2, 9):
        signs.clear()
        run_dir = tmp_path / str(num_batches)
        config = tiny.tiny_config(run_dir, 3, validate_every=3, validation_batches=num_batches, stuck_after_s=77)
        assert tiny.tiny_run(config) == 0
        counts.append(len(signs))
    assert counts[1] - counts[0] == 9 - 2 and set(signs) == {77}


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stuck_run_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    code = f"""
import runpy, sys, time
from pathlib import Path
tiny = runpy.run_path({str(SCRIPT)!r})
config = tiny["tiny_config"](Path({str(tmp_path)!r}), 10, stuck_after_s=5.0)
def hang_in_here(step):
    if step == 6:
        time.sleep(60)
tiny["tiny_run"](config, on_step=hang_in_here)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, capture_output=True)
    assert ended.returncode == 1
    stacks = next((tmp_path / "stacks").iterdir()).read_text()
    assert "hang_in_here" in stacks


@pytest.mark.slow
def test_when_a_rank_dies_the_others_say_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*command, str(SCRIPT), str(tmp_path), "2000"], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path / "metrics.jsonl"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGKILL)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    failed = [event for event in events(tmp_path) if event["event"] == "failed"]
    assert [event["rank"] for event in failed] == [0]
    sentence = f"lost contact with the other ranks at step {failed[0]['step']}"
    assert sentence in failed[0]["error"]
    assert sentence in told


OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]


def may_mount() -> bool:
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="a small disk cannot be mounted here")
def test_a_run_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    script = SCRIPT.with_name("full_disk.py")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [*OWN_MOUNTS, sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])

    run, noted = seen["train"], seen["note"]
    assert "step_00000010: cannot be written" in run["told"] and "No space left on device" in run["told"]
    assert run["left"] == ["step_00000005"]
    assert run["again"] == 0
    assert [event["event"] for event in run["events"]] == ["started", "failed", "started"]
    assert "No space left on device" in run["events"][1]["error"]

    assert "metrics.jsonl: cannot be written (No space left on device)" in noted["told"]
    assert noted["events"] == 101 and noted["had_room"]  # none was lost: room was kept for them
    assert noted["metrics"][0] == noted["metrics"][1] > 0
