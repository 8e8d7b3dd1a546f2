"""Work spread over processes with Ray. The only file that imports ray.

Rows carry names and paths, never frames: a worker reads its input from the file system, writes its result there, and
hands back a few numbers. So the object store stays empty, and a lost worker costs one row's time: Ray starts another
and repeats the row, as often as it takes.

Pools have a fixed size: autoscaling them by load is slower for stages whose cost is known.

These are Ray's tasks and actors, not Ray Data, which is made for blocks of data that flow through the object store. A
pool of its actors is new processes for every stage, and each of them imports what the stage needs: two thirds of the
processor time of a small build. Its tasks can stay in their processes, but its own actors cost as much as half a stage.
"""

import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before the import. Ray otherwise reports usage over the network, hides the GPUs from workers that asked for none, and
# warns on the terminal about every actor pool that Ray Data itself makes (set the last to "info" to debug Ray).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray

from configs.loader import UserError
from configs.problems import explain_refusal

Row = dict[str, Any]
"""Small and JSON-like."""

Worker = Callable[[Row], Row]

_REPOSITORY = str(Path(__file__).resolve().parents[1])
# One thread per process: processes are the parallelism, and sums on another number of threads give other bits.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [_REPOSITORY, os.environ.get("PYTHONPATH")])),
}


@contextmanager
def ray_session(address: str | None, num_workers: int, object_store_mb: int) -> Iterator[None]:
    """Ray for the length of a `with`: a cluster's by its address, else a small one on this machine, shut down after.

    Where Ray already runs in this process, it is used and left running.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # "local" never joins a cluster that happens to run here.
        options |= {"address": "local", "num_cpus": num_workers, "include_dashboard": False}
        options |= {"object_store_memory": object_store_mb * 2**20, "_node_ip_address": "127.0.0.1"}
    else:
        _check_answers(address)
        options |= {"address": address, "runtime_env": {"env_vars": _WORKER_ENVIRONMENT}}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        # A Ray that starts here takes the environment over, so that processes it starts ahead can be used.
        with _environment(_WORKER_ENVIRONMENT if address is None else {}):
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"ray_address={address}" if address else "a local Ray"
        raise UserError(f"{where}: cannot be started or reached ({str(error).splitlines()[0]}).") from error
    signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler prints a stack and leaves with code 15
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def address() -> str:
    """Of the Ray that this process uses, for other processes to join."""
    return str(ray.get_runtime_context().gcs_address)


def check_gpus(wanted: int) -> None:
    """Ray would wait for GPUs that are not there for ever."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if wanted > found:
        raise UserError(
            f"gpus={wanted}, but Ray finds {found} here; set gpus to at most {found} (0: encode on the CPU)."
        )


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?(?P<host>.+):(?P<port>\d+)", address)
    if place is None:
        return
    try:
        socket.create_connection((place["host"], int(place["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray_address={address}: nothing answers there ({error}); start Ray on it, or leave ray_address out."
        ) from None


def map_rows(
    rows: Sequence[Row], make_worker: Callable[[], Worker], num_workers: int, *, gpus_each: float = 0
) -> Iterator[Row]:
    """`worker(row)` for every row, in no particular order, by `num_workers` processes that each make one worker.

    Processes without GPUs stay for the next call. What holds a GPU would keep it from the next stage, and ends.
    """
    recipe = [ray.put(make_worker)]  # in a list, or Ray would unpack it anew for every row
    pool = [_GPU_HOLDER.options(num_gpus=gpus_each).remote() for _ in rows[:num_workers]] if gpus_each else []
    free: list[Callable[..., ray.ObjectRef]] = [one.work.remote for one in pool] or [_TASK.remote] * num_workers
    waiting = iter(rows)
    running: dict[ray.ObjectRef, Callable[..., ray.ObjectRef]] = {}
    try:
        while True:
            running |= {start(recipe, row): start for start, row in zip(free, waiting, strict=False)}
            if not running:
                return
            (done,), _ = ray.wait(list(running))
            free = [running.pop(done)]
            result, problem = ray.get(done)
            if problem:
                raise UserError(problem)
            yield result
    finally:
        for one in pool:
            ray.kill(one)
        for task in running if not pool else ():
            ray.cancel(task, force=True)


# --- in a worker's process ----------------------------------------------------------------------------------------

_kept: dict[str, Worker] = {}
"""The one worker that this process has, by the recipe that it was made from."""


def _work_on_row(recipe: Sequence[ray.ObjectRef], row: Row) -> tuple[Row, str]:
    """The result, or a UserError as a value, so that it stays a sentence."""
    try:
        return _worker_of(recipe[0])(row), ""
    except UserError as error:
        return {}, str(error)
    except OSError as error:
        refusal = explain_refusal(error)
        if refusal is None:
            raise
        return {}, refusal


def _worker_of(recipe: ray.ObjectRef) -> Worker:
    name = recipe.hex()
    if name not in _kept:
        _kept.clear()  # what an earlier stage has opened goes before this one opens its own
        _kept[name] = ray.get(recipe)()
    return _kept[name]


class _GpuHolder:
    def work(self, recipe: Sequence[ray.ObjectRef], row: Row) -> tuple[Row, str]:
        return _work_on_row(recipe, row)


_TASK: Any = ray.remote(num_cpus=1, max_retries=-1)(_work_on_row)
# Its GPU is what it waits for: if it waited for a CPU too, fewer CPUs than GPUs would leave its row waiting for ever.
_GPU_HOLDER: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_GpuHolder)
