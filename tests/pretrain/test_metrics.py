"""metrics.jsonl: every digit, one continuous curve, no half lines."""

import json
import math
import runpy
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.events import EventLog
from pretrain.flops import peak_flops
from pretrain.metrics import MetricsLog, Progress, StepTimer, peak_memory, read_metrics
from pretrain.steps import forward_backward, rank_times, sample_draws, utilization

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_training.py"))))


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_to_the_last_digit(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    MetricsLog(path, 0, True).write({"step": 1, "loss": value})
    MetricsLog(path, 1, True).close()  # rewritten on resume: still the same digits
    assert repr(read_metrics(path)[0]["loss"]) == repr(value)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 0, True).write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_resume_drops_rows_after_the_step_and_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, True)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    resumed = MetricsLog(path, 3, True)
    resumed.write({"step": 4, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


@pytest.mark.parametrize("line", [b"hello", b"\xff\xfe", b"3", b'{"loss": 1}'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no row of metrics"):
        MetricsLog(path, 1, True)
    assert line in path.read_bytes()


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, is_main=False)
    log.write({"step": 1})
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


class Clock:
    """In place of the machine's, which goes on where a test is not looking."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("pretrain.metrics.time", SimpleNamespace(perf_counter=lambda: self.now))


def test_timer_measures_steps_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = StepTimer()
    for num_samples in (5, 15):  # batches may have several sizes
        with timer.waiting_for_data():
            clock.now += 3
        clock.now += 1
        timer.count_step(num_samples)
    assert timer.read() == {"step_s": 4, "samples_per_s": 2.5, "data_wait_share": 0.75}


def test_a_step_has_its_own_time_of_data_and_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = StepTimer()
    for seconds in (5.0, 1.0):  # the second step knows nothing of the first
        with timer.waiting_for_data():
            clock.now += seconds
        for _ in range(2):
            with timer.computing_forward():
                clock.now += 10 * seconds
            clock.now += 100  # backward, and waiting for others
        assert timer.own_s() == 21 * seconds


@pytest.mark.parametrize(
    ("seconds", "is_told"),
    [
        ([0.1, 0.1, 0.1, 0.2], True),
        ([0.1, 0.1, 0.1, 0.14], False),
        ([0.01, 0.01, 0.01, 0.04], False),  # many times slower, but that is chance
        ([0.2, 0.1, 0.1, 0.1], False),  # another rank's to tell
        ([0.1], False),
    ],
)
def test_the_slowest_rank_tells_of_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seconds: list[float], is_told: bool
) -> None:
    rank = len(seconds) - 1
    engine: Any = SimpleNamespace(rank=rank, ranks=SimpleNamespace(gather=lambda own: [*seconds[:-1], own]))
    timer: Any = SimpleNamespace(own_s=lambda: seconds[-1])
    row = rank_times(engine, timer, EventLog(tmp_path, rank, 7, "layout"))
    assert row == {"slowest_rank_s": max(seconds), "median_rank_s": median(seconds)}
    assert (f"step 7: rank {rank} on" in caplog.text) == is_told
    events = (tmp_path / "events.jsonl").read_text().splitlines() if is_told else []
    assert [json.loads(event)["event"] for event in events] == ["straggler"] * is_told
    assert all(json.loads(event)["host"] and json.loads(event)["rank"] == rank for event in events)


def test_work_per_second_is_that_of_all_steps() -> None:
    timer = StepTimer()
    timer.count_step(4, {"tokens": 100, "model_flops": 10**15})
    timer.count_step(4, {"tokens": 300, "model_flops": 3 * 10**15})
    row = timer.read()
    assert row["tokens_per_s"] == pytest.approx(200 / row["step_s"])
    assert row["model_flops_per_s"] == pytest.approx(2e15 / row["step_s"])
    timer.count_step(4)  # of a model that counts no work
    assert "tokens_per_s" not in timer.read()


@pytest.mark.parametrize("kind", ["accelerate", "deepspeed"])
def test_the_update_norm_is_that_of_what_changed(kind: Literal["accelerate", "deepspeed"]) -> None:
    config = EngineConfig(kind=kind, device="cpu", precision="fp32")
    engine = create_engine(config, tiny.build_tiny_model(), OptimizerConfig(weight_decay=0.5))
    batch = {"latents": tiny.global_batch(0)}
    assert engine.update_norm() == 0
    for step in (1, 2):
        before = tiny.whole_weights(engine)
        forward_backward(engine, batch, sample_draws(engine, 0, step, batch))
        engine.step(0.03)
        after = tiny.whole_weights(engine)
        moved = math.hypot(*[float((after[name] - before[name]).norm()) for name in after])
        assert engine.update_norm() == pytest.approx(moved, rel=1e-4)
    engine.close()


def test_utilization_is_a_share_of_the_peak_of_all_devices() -> None:
    speed = {"model_flops_per_s": 4 * 400e12, "hardware_flops_per_s": 4 * 500e12}
    peak = peak_flops("NVIDIA H200")
    assert utilization(speed, 4, peak) == pytest.approx(
        {"model_tflops_per_device": 400, "mfu": 400 / 989, "hfu": 500 / 989}
    )
    assert utilization(speed, 4, None) == {"model_tflops_per_device": 400}
    assert utilization({}, 4, peak) == {}


def test_peak_memory_is_in_gigabytes() -> None:
    assert 0.01 < peak_memory()["peak_memory_gb"] < 1000


def test_progress_logs_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Progress(num_steps=100, is_main=True).show({"step": 40, "loss": 0.25, "lr": 1e-3, "step_s": 2.0})
    assert "step 40/100" in caplog.text and "2.0 min left" in caplog.text
