"""Runs a command as one rank of a job, and notes how it ended.

    ATTEMPT_LOGS=FOLDER/logs/attempt_001 torchrun … -m slurm.rank pretrain.train --config C
    ATTEMPT_LOGS=FOLDER/logs/attempt_001 srun …  python -m slurm.rank pretrain.train --config C

All output of rank 3 goes to rank_0003.log in that folder; rank_0003.json says where it runs, and in the end with what
exit code, which launchers mix up with those of other ranks. To the launcher a clean stop (75) is a success: it ends
the other ranks when one fails, and those may still be saving. Under srun, one task is one rank. Under torchrun the
ranks of a node share its CPUs: each gets whole cores that lie together.

A signal to stop that comes before the command has its own handler ends it at once, with 75: nothing is lost then.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .attempt_files import EXIT_STOPPED, CommandError, run, write_whole

LOGS_VARIABLE = "ATTEMPT_LOGS"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def main() -> NoReturn:
    if len(sys.argv) < 2 or LOGS_VARIABLE not in os.environ:
        raise CommandError(f"python -m slurm.rank needs a module to run, and {LOGS_VARIABLE}, the folder for its logs.")
    module = sys.argv[1]
    _take_from_slurm()
    _share_cpus()
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    stem = Path(os.environ[LOGS_VARIABLE]) / f"rank_{rank:04d}"
    try:
        _send_output_to(stem.with_suffix(".log"))
        row = {"rank": rank, "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid()}
        row["started"] = time.time()
        _on_signals(_stopper(stem.with_suffix(".json"), row))
        write_whole(stem.with_suffix(".json"), json.dumps(row) + "\n")
    except OSError as error:
        raise CommandError(f"{stem}: cannot be written ({error.strerror}); see to the run folder's space.", 1) from None
    code = _exit_code_of(module, sys.argv[1:])
    _on_signals(signal.SIG_IGN)  # how it ended is no longer to be changed
    if _is_noted(stem.with_suffix(".json"), {**row, "ended": time.time(), "exit_code": code}) and code == EXIT_STOPPED:
        code = 0
    sys.exit(code)


def _exit_code_of(module: str, argv: Sequence[str]) -> int:
    sys.argv = list(argv)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        sys.stderr.write(f"{leaving.code}\n")
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _is_noted(path: Path, row: dict[str, object]) -> bool:
    try:
        write_whole(path, json.dumps(row) + "\n")
    except OSError as error:
        sys.stderr.write(f"{path}: cannot be written ({error.strerror})\n")
        return False
    return True


def _stopper(path: Path, row: dict[str, object]) -> Callable[[int, FrameType | None], NoReturn]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        sys.stderr.write(f"stopped by {signal.Signals(number).name} before it had begun\n")
        if _can_unwind(frame):
            sys.exit(EXIT_STOPPED)
        is_noted = _is_noted(path, {**row, "ended": time.time(), "exit_code": EXIT_STOPPED})
        sys.stderr.flush()
        os._exit(0 if is_noted else EXIT_STOPPED)

    return stop


def _can_unwind(frame: FrameType | None) -> bool:
    """Whether an exception would end the command, and be the one that comes out of it. An extension that is just being
    imported makes an ImportError of it, which may be what an optional package looks like, or a panic."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    is_importing = any(code.co_filename.startswith("<frozen importlib.") for code in codes)
    return _exit_code_of.__code__ in codes and not is_importing


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _send_output_to(path: Path) -> None:
    """Also what libraries, crashes and child processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(log)
    faulthandler.enable()


def _take_from_slurm() -> None:
    """Who this rank is, as torch wants to know it, where srun has started it."""
    given = os.environ
    if "RANK" in given or "SLURM_PROCID" not in given or "MASTER_ADDR" not in given:
        return
    num_local = _tasks_on_node(given.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(given.get("SLURM_NODEID", "0")))
    given["RANK"], given["LOCAL_RANK"] = given["SLURM_PROCID"], given.get("SLURM_LOCALID", "0")
    given["WORLD_SIZE"] = given.get("SLURM_STEP_NUM_TASKS") or given.get("SLURM_NTASKS", "1")
    given["LOCAL_WORLD_SIZE"] = given["LOCAL_SIZE"] = str(num_local)


def _tasks_on_node(text: str, node_id: int) -> int:
    """`2(x3),1`: two on each of the first three nodes, one on the fourth."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts[node_id] if node_id < len(counts) else 1


def _share_cpus() -> None:
    """Under torchrun, this rank's part of the CPUs that all ranks of the node have; srun binds its tasks by itself."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" not in given:
        return
    given.setdefault("LOCAL_SIZE", given["LOCAL_WORLD_SIZE"])
    local_rank, num_ranks = int(given["LOCAL_RANK"]), int(given["LOCAL_WORLD_SIZE"])
    part = cpu_share(sorted(os.sched_getaffinity(0), key=_place_of_cpu), local_rank, num_ranks)
    if part:
        os.sched_setaffinity(0, part)


def cpu_share(cpus: Sequence[int], local_rank: int, num_ranks: int) -> Sequence[int]:
    """Neighbours among CPUs in the order of their places; none where there are fewer CPUs than ranks."""
    num = len(cpus) // num_ranks
    return cpus[local_rank * num : (local_rank + 1) * num]


def _place_of_cpu(cpu: int) -> tuple[int, int, int]:
    """Package and core: two CPUs of one core come after each other."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu


if __name__ == "__main__":
    run(main)
