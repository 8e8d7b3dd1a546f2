"""Work spread over processes with Ray Data. The only file that imports ray.

Rows carry names and paths, never frames: a worker reads its input from the file system, writes its result there, and
hands back a few numbers. So the object store stays empty, and a lost worker costs one row's time: Ray starts another
and repeats the row, as often as it takes.

Actor pools have a fixed size: autoscaling them by load is slower for stages whose cost is known.
"""

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before the import. Ray otherwise reports usage over the network, hides the GPUs from workers that asked for none, and
# warns on the terminal about every actor pool that Ray Data itself makes (set the last to "info" to debug Ray).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data

from configs.loader import UserError
from configs.problems import explain_refusal

Row = dict[str, Any]
"""Small and JSON-like."""

MAX_BLOCKS = 1000

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
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": _WORKER_ENVIRONMENT},
    }
    if address is None:
        # "local" never joins a cluster that happens to run here. One CPU more than workers, for Ray Data's own tasks.
        options |= {"address": "local", "num_cpus": num_workers + 1, "include_dashboard": False}
        options |= {"object_store_memory": object_store_mb * 2**20, "_node_ip_address": "127.0.0.1"}
    else:
        _check_answers(address)
        options["address"] = address
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"ray_address={address}" if address else "a local Ray"
        raise UserError(f"{where}: cannot be started or reached ({str(error).splitlines()[0]}).") from error
    signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler prints a stack and leaves with code 15
    try:
        yield
    finally:
        ray.shutdown()


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
    rows: Sequence[Row], make_worker: Callable[[], Callable[[Row], Row]], num_workers: int, *, gpus_each: float = 0
) -> Iterator[Row]:
    """`worker(row)` for every row, in no particular order, by `num_workers` processes that each make one worker."""
    if not rows:
        return
    _quiet_ray_data()
    items = [{"row": json.dumps(row)} for row in rows]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
        _Worker,  # type: ignore[arg-type]  # a class is allowed: Ray makes one instance per actor
        fn_constructor_args=(make_worker,),
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(items))),
        num_cpus=1,
        num_gpus=gpus_each,
    )
    for result in dataset.iter_rows():
        if result["error"]:
            raise UserError(result["error"])
        yield json.loads(result["result"])


class _Worker:
    """Carries rows as text, so that Arrow guesses no types, and a UserError as a value, so that it stays a sentence."""

    def __init__(self, make_worker: Callable[[], Callable[[Row], Row]]) -> None:
        self._make_worker = make_worker
        self._worker: Callable[[Row], Row] | None = None

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        try:
            if self._worker is None:
                self._worker = self._make_worker()
            return {"result": json.dumps(self._worker(json.loads(item["row"]))), "error": ""}
        except UserError as error:
            return {"result": "", "error": str(error)}
        except OSError as error:
            refusal = explain_refusal(error)
            if refusal is None:
                raise
            return {"result": "", "error": refusal}


def _quiet_ray_data() -> None:
    """Progress is reported by `build`, once; Ray Data's plans and bars are for debugging Ray Data."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
