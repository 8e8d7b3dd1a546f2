"""Rows through processes: which stay, which go, what a lost one costs, and how a mistake comes back."""

import errno
import functools
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from configs.loader import UserError
from data_pipeline import ray_job

pytestmark = pytest.mark.usefixtures("ray")

ROWS = [{"number": number} for number in range(6)]


def make_counter(meeting: Path | None = None):
    """A worker that tells its process, its GPU, and how many rows it has had; where two are to meet, it waits for
    the other one with its first row."""
    rows = []

    def worker(row):
        rows.append(row)
        if meeting is not None:
            (meeting / str(os.getpid())).touch()
            while len(os.listdir(meeting)) < 2:
                time.sleep(0.01)
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"number": row["number"], "pid": os.getpid(), "count": len(rows), "gpu": gpu}

    return worker


def pids(results):
    return {result["pid"] for result in results}


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pid: int) -> None:
    while is_running(pid):
        time.sleep(0.05)


def test_processes_are_kept_and_make_a_worker_per_call(tmp_path):
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        results.append(list(ray_job.map_rows(ROWS, functools.partial(make_counter, tmp_path / name), 2)))
    first, second = results
    for rows in (first, second):
        assert sorted(row["number"] for row in rows) == list(range(6))
        assert sum(row["count"] == 1 for row in rows) == len(pids(rows)) == 2
    assert pids(second) == pids(first) and os.getpid() not in pids(first)
    assert list(ray_job.map_rows([], make_counter, 2)) == []


def make_careless(folder: Path):
    """A worker that ends its process with the first row it ever gets, and leaves the other rows a trace."""

    def worker(row):
        with (folder / str(row["number"])).open("a") as trace:
            trace.write(".")
        if row["number"] == 3 and (folder / "3").stat().st_size == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": row["number"], "pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}

    return worker


@pytest.mark.parametrize("gpus_each", [0, 1])
def test_a_lost_process_costs_its_row_one_more_attempt(gpus_each, tmp_path):
    results = list(ray_job.map_rows(ROWS, lambda: make_careless(tmp_path), 2, gpus_each=gpus_each))
    assert sorted(result["number"] for result in results) == list(range(6))
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {str(i): 1 + (i == 3) for i in range(6)}


def test_who_holds_a_gpu_gives_it_back():
    rows = list(ray_job.map_rows(ROWS, make_counter, 2, gpus_each=1))
    assert sorted(row["number"] for row in rows) == list(range(6))
    assert {row["gpu"] for row in rows} == {"0", "1"} and len(pids(rows)) == 2
    for pid in pids(rows):
        wait_until_gone(pid)
    again = list(ray_job.map_rows(ROWS, make_counter, 2, gpus_each=1))  # it would wait for ever
    assert len(again) == 6 and not pids(again) & pids(rows)
    shared = list(ray_job.map_rows(ROWS, make_counter, 4, gpus_each=0.5))  # more processes than this Ray has CPUs
    assert len(shared) == 6 and len(pids(shared)) == 4


@pytest.mark.parametrize("gpus_each", [0, 1])
def test_what_runs_ends_with_the_one_who_asked(gpus_each, tmp_path):
    def worker(row):
        if row["number"]:
            (tmp_path / str(os.getpid())).touch()  # there with its whole name, or not at all
            time.sleep(600)
        return row

    results = ray_job.map_rows(ROWS[:2], lambda: worker, 2, gpus_each=gpus_each)
    assert next(results) == {"number": 0}
    while not (names := os.listdir(tmp_path)):
        time.sleep(0.05)
    results.close()
    wait_until_gone(int(names[0]))


@pytest.mark.parametrize("gpus_each", [0, 1])
def test_a_mistake_comes_back_as_its_sentence(gpus_each):
    def make_worker():
        raise UserError("faiss is not installed; install it.")

    with pytest.raises(UserError, match=r"^faiss is not installed; install it\.$"):
        list(ray_job.map_rows(ROWS, make_worker, 2, gpus_each=gpus_each))
    assert len(list(ray_job.map_rows(ROWS, make_counter, 2))) == 6


def test_what_the_machine_refuses_comes_back_as_a_sentence():
    def worker(row):
        raise OSError(errno.ENOSPC, "No space left on device", "shard.tar")

    with pytest.raises(UserError, match=r"shard\.tar: No space left"):
        list(ray_job.map_rows(ROWS[:1], lambda: worker, 2))


def test_a_cluster_that_does_not_answer_is_told_at_once():
    with pytest.raises(UserError, match=r"ray_address=ray://127\.0\.0\.1:1: nothing answers there"):
        ray_job._check_answers("ray://127.0.0.1:1")


def test_a_defect_comes_back_as_itself():
    def worker(row):
        raise ZeroDivisionError("of ours")

    with pytest.raises(ZeroDivisionError, match="of ours"):
        list(ray_job.map_rows(ROWS, lambda: worker, 2))
