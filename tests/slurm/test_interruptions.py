"""A training in SLURM's hands: whatever ends it, it goes on by itself, and is the run that was left alone."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_chain.py"))))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


def pretrain_stage(config: Path, **settings: Any) -> dict[str, Any]:
    return {"config": str(config), "time": "00:10:00", "lead_s": 60, "cpus_per_node": 4, "preflight": False, **settings}


def test_a_training_to_which_everything_happens_is_the_one_that_was_left_alone(
    cluster: Any, dataset: Path, tmp_path: Path
):
    config = tiny.write_training(tmp_path, dataset, engine=tiny.DEEPSPEED)
    stage = pretrain_stage(config, nodes={"min": 1, "max": 2}, overrides=[tiny.HELD])
    chain = tiny.write_chain(cluster, tmp_path, held_at=(40, 80, 120, 160, 200), pretrain=stage)
    task = tiny.pretraining(cluster, chain, tiny.submit(cluster, chain)["pretrain"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen([*torchrun, "-m", "pretrain.train", "--config", config], cwd=tiny.REPOSITORY) as alone:
        for attempt, step in ((1, 40), (2, 80)):
            task.wait_for_step(step, attempt)
            task.signal_before_limit()
        task.wait_for_step(120, attempt=3)
        urgent = cluster.submit("--partition=urgent", "--nodes=2", "--cpus-per-task=4", "--wrap=true", "-o/dev/null")
        task.wait_for_step(160, attempt=4)
        assert cluster.job(urgent)["JobState"] == "COMPLETED"
        task.signal_rank(1, signal.SIGKILL, attempt=4)
        task.wait_for_step(200, attempt=5)
        cluster.lose_node("n2")
        task.wait_for_end("COMPLETED")
        assert alone.wait(timeout=60) == 0

    attempts = task.attempts
    assert [one.verdict for one in attempts] == ["requeue"] * 5 + ["done"]
    assert [one.exit_code for one in attempts][:3] == [75, 75, 75]
    assert [len(one.nodes) for one in attempts] == [2, 2, 2, 2, 2, 1]
    assert attempts[3].exit_code not in (0, 75)
    steps = [one.first_step for one in attempts]
    assert steps == sorted(steps) and steps[:4] == [0, 40, 80, 120]

    ours, theirs = tiny.rows_by_step(task.run_dir), tiny.rows_by_step(tmp_path / "alone")
    assert ours.keys() == theirs.keys() == set(range(1, tiny.NUM_STEPS + 1))
    for step, row in ours.items():
        assert row["samples_seen"] == tiny.BATCH * step
        on_one_node = step > steps[-1]
        assert row == (pytest.approx(theirs[step], rel=1e-3) if on_one_node else theirs[step]), f"step {step}"


def test_a_job_that_gets_nowhere_stops_itself(cluster: Any, dataset: Path, tmp_path: Path):
    """As with a time limit that is too short for the first step."""
    config = tiny.write_training(tmp_path, dataset)
    stage = pretrain_stage(config, launcher="srun", sbatch=["--hold"])
    chain = tiny.write_chain(cluster, tmp_path, pretrain=stage)
    task = tiny.pretraining(cluster, chain, tiny.submit(cluster, chain)["pretrain"])
    config.unlink()
    os.mkfifo(config)  # that nobody writes into: reading it, the rank gets no further
    cluster.run("scontrol", "release", task.job_id)
    for attempt in (1, 2):
        task.wait_for_rank(0, attempt)
        task.signal_before_limit()
        task.wait_for_signal(attempt)
    assert task.wait_for_end("FAILED", "COMPLETED")["ExitCode"] == "93:0"
    assert [one.verdict for one in task.attempts] == ["requeue", "stop"]
    assert "times now without progress" in task.attempts[-1].reason


def test_a_node_that_cannot_work_is_left_out(cluster: Any, dataset: Path, tmp_path: Path):
    config = tiny.write_training(tmp_path, dataset, num_steps=2, validate_every=2)
    stage = pretrain_stage(config, preflight=True, preflight_s=5, nodes={"min": 1, "max": 2})
    chain = tiny.write_chain(cluster, tmp_path, pretrain=stage)
    with cluster.sick_node("n2"):
        task = tiny.pretraining(cluster, chain, tiny.submit(cluster, chain)["pretrain"])
        job = task.wait_for_end("COMPLETED", "FAILED")
    assert [one.verdict for one in task.attempts] == ["requeue", "done"]
    assert [one.nodes for one in task.attempts] == [("n1", "n2"), ("n1",)]
    assert job["ExcNodeList"] == "n2"
    assert len(tiny.rows_by_step(task.run_dir)) == 2


def test_a_real_limit_of_one_minute(cluster: Any, dataset: Path, tmp_path: Path):
    config = tiny.write_training(tmp_path, dataset)
    stage = pretrain_stage(config, launcher="srun", time="00:01:00", lead_s=5, overrides=[tiny.HELD])
    chain = tiny.write_chain(cluster, tmp_path, held_at=(1, 2), pretrain=stage)
    task = tiny.pretraining(cluster, chain, tiny.submit(cluster, chain)["pretrain"])
    task.wait_until(lambda: len(task.attempts) == 2, "the next attempt")
    first, second = task.attempts
    assert (first.exit_code, first.verdict) == (75, "requeue")
    assert second.first_step == first.step
    task.wait_for_step(first.step + 1, attempt=2)
    assert cluster.job(task.job_id)["Restarts"] == "1"
