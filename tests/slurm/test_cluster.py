"""The cluster that the tests of slurm/ run on is a real one, and leaves nothing behind."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

parts = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("cluster.py"))))

pytestmark = pytest.mark.slow


def batch_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}")
    return path


def test_a_job_runs_on_both_nodes(cluster: Any, tmp_path: Path):
    script = batch_script(tmp_path / "job", "srun --ntasks-per-node=1 printenv SLURMD_NODENAME\n")
    job = cluster.submit("--nodes=2", f"--output={tmp_path}/out", script)
    cluster.wait_for_state(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().split()) == ["n1", "n2"]


def test_a_signalled_job_requeues_itself(cluster: Any, tmp_path: Path):
    script = batch_script(
        tmp_path / "job",
        'echo "attempt $((${SLURM_RESTART_COUNT:-0} + 1))"\n'
        '[ -z "$SLURM_RESTART_COUNT" ] || exit 0\n'
        "trap 'scontrol requeue $SLURM_JOB_ID; exit 0' USR2\n"
        "sleep 600 & wait\n",
    )
    out = tmp_path / "out"
    job = cluster.submit("--requeue", "--open-mode=append", "--signal=B:USR2@60", f"--output={out}", script)
    cluster.wait_until(lambda: out.exists() and "attempt 1" in out.read_text(), "attempt 1")
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "PENDING", "the requeued job")
    cluster.start_soon(job)
    assert cluster.wait_for_state(job, "COMPLETED")["Restarts"] == "1"
    said = [line for line in out.read_text().splitlines() if not line.startswith("slurmstepd")]
    assert said == ["attempt 1", "attempt 2"]


def test_a_job_goes_on_without_a_lost_node_and_may_have_it_when_it_is_back(cluster: Any, tmp_path: Path):
    out = tmp_path / "out"
    script = batch_script(
        tmp_path / "job",
        '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || srun --ntasks-per-node=1 sleep 600\n'
        "srun --ntasks-per-node=1 printenv SLURMD_NODENAME\n",
    )
    # With --ntasks-per-node here, SLURM would take the smallest number of nodes for enough.
    job = cluster.submit("--nodes=1-2", "--requeue", f"--output={out}", script)
    cluster.wait_until(lambda: len(cluster.processes("n2")) >= 2, "tasks on n2")
    cluster.lose_node("n2")
    assert cluster.processes("n2") == []
    assert cluster.wait_for_state(job, "COMPLETED")["NumNodes"] == "1"
    assert out.read_text().split() == ["n1"]
    cluster.return_node("n2")
    assert cluster.run("srun", "--nodes=2", "true") == ""


def test_nothing_outlives_a_cluster_even_where_a_test_fails(running_cluster: Any, tmp_path: Path):
    def fail() -> None:
        with parts.Cluster() as cluster:  # a second one, at the same time
            folders.append(cluster.folder)
            cluster.submit("--nodes=2", "--output=/dev/null", batch_script(tmp_path / "job", "srun sleep 600\n"))
            cluster.wait_until(lambda: len(cluster.processes("n2")) >= 2, "a task on n2")
            raise RuntimeError("a test failed")

    folders: list[Path] = []
    with pytest.raises(RuntimeError, match="a test failed"):
        fail()
    (folder,) = folders
    assert not folder.exists()
    assert parts._processes_with(f"SLURM_CONF={folder}") == set()
    assert "n1" in running_cluster.run("sinfo", "-N")
