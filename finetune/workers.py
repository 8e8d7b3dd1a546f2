"""Run jobs in fresh processes, a few at a time: a simulator's GL context wants a process of its own."""

import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, TypeVar

from configs.loader import UserError

Result = TypeVar("Result")


def run_jobs(jobs: Sequence[tuple[Callable[..., Result], tuple[Any, ...]]], num_workers: int) -> list[Result]:
    """Results in the order of the jobs. The first job that fails is raised here, after those that run were ended."""
    # spawn: a forked child would inherit locked threads of torch and of the GL driver
    pool = ProcessPoolExecutor(
        min(num_workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(logging.getLogger().getEffectiveLevel(),),
        max_tasks_per_child=1,
    )
    others = multiprocessing.active_children()
    try:
        # A terminal sends Ctrl-C to all. Workers inherit that they do not hear it; this process does, and ends them.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()  # raises what the job raised
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died without a Python error, usually for want of memory: try num_workers=1"
        ) from error
    except BaseException:
        # Until all is over: the pool may just be replacing a worker that has ended, and a new one would wait for ever
        # if another was ended while it held the lock of the queue between them.
        stopping = Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
        stopping.start()
        while stopping.is_alive():
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()
            stopping.join(timeout=0.1)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(log_level: int) -> None:
    logging.basicConfig(level=log_level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
