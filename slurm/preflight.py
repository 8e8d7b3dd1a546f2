"""Is every node of an allocation fit to work, and which are not? Asked before each attempt.

    srun --ntasks-per-node=1 --kill-on-bad-exit=0 python -m slurm.preflight check FOLDER/preflight/attempt_001 \\
        --rendezvous HOST:PORT --disk /scratch --gpus 8
    bad=$(python -m slurm.preflight exclude FOLDER --nodes "n1 n2 n3")

`check` runs once on every node, where the ranks will run: it writes to the disks and looks at their space, at memory
and GPUs. If all of them are fit so far, they sum numbers over all GPUs of all nodes (NCCL; gloo without GPUs), and
compare their clocks. Where the sum fails, they try again in pairs, three times with changing partners: a broken node
then fails with everybody, the others only with it. Whatever may hang has a time limit. What a node found is one JSON
row, FOLDER/preflight/attempt_001/<node>.json.

`exclude` runs in the batch script. It writes the nodes to exclude from the next attempt, with commas: those that were
unfit in this or an earlier attempt of the same submission. Its exit code is 1 where this attempt had better not start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from .attempt_files import (
    ALL_REDUCE,
    PREFLIGHT,
    Attempt,
    CommandError,
    Parser,
    attempt_name,
    check_folder,
    given_number,
    node_names,
    preflight_rows,
    read_attempts,
    run,
    utc,
    write_whole,
)

UNFINISHED, CLOCK = "unfinished", "clock"
BETWEEN_NODES = {ALL_REDUCE, CLOCK}
OWN_CHECKS_S = "own_checks_s"
PROBE_BYTES, DISK_LIMIT_S, GPU_LIMIT_S = 16 * 2**20, 60.0, 60.0
NUM_ROUNDS, PAIR_LIMIT_S = 3, 60.0


# --- one node -----------------------------------------------------------------------------------------------------


def check(folder: Path, given: argparse.Namespace) -> int:
    """Checks this node and leaves its row; a problem is a sentence under the name of what was checked."""
    node, node_id, num_nodes = _place()
    row: dict[str, Any] = {"node": node, "node_id": node_id, "time": utc(), "problems": {}}

    def write(**more: Any) -> None:
        write_whole(folder / f"{node}.json", json.dumps({**row, **more}) + "\n")

    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = {UNFINISHED: "did not finish its checks"}  # until it has
    write(problems=unfinished)
    for inspect in (_disks, _memory, _gpus):
        _note(row, inspect(folder, given))
    row[OWN_CHECKS_S] = time.monotonic() - began
    write(problems={**row["problems"], **unfinished})
    if not _wait_for_rows(folder, num_nodes, given.limit_s, lambda other: OWN_CHECKS_S in other):
        _note(row, {"problems": {ALL_REDUCE: f"waited {given.limit_s:g} s for nodes that have not come"}})
    elif num_nodes * max(1, given.gpus) > 1 and _all_are_fit(folder):
        with _store(given.rendezvous, is_here=node_id == 0):
            _note(row, _network(given, node_id, num_nodes))
            write()
            if node_id == 0 and "pairs" in row:  # others may not be done with theirs
                _wait_for_rows(folder, num_nodes, 2 * PAIR_LIMIT_S, lambda other: UNFINISHED not in other["problems"])
    write()
    for problem in row["problems"].values():
        sys.stderr.write(f"{node}: {problem}\n")
    return 1 if row["problems"] else 0


def _all_are_fit(folder: Path) -> bool:
    """As far as each could tell by itself; where not, there is no need to let them add up."""
    return not any(set(row["problems"]) - {UNFINISHED, *BETWEEN_NODES} for row in preflight_rows(folder).values())


def _place() -> tuple[str, int, int]:
    """This node's name, its number, and how many there are; as `srun` says it."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    number = os.environ.get("SLURM_NODEID", "0")
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES", "1")
    return node, int(number), int(nodes)


def _note(row: dict[str, Any], found: dict[str, Any]) -> None:
    row["problems"].update(found.pop("problems", {}))
    row.update(found)


def _disks(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    problems, free = {}, {}
    for disk in dict.fromkeys([folder, *given.disk]):
        free[str(disk)], problem = _in_time(
            partial(_probe_disk, disk, given.min_free_gb), DISK_LIMIT_S, f"{disk}: does not answer"
        )
        if problem:
            problems[f"disk {disk}"] = problem
    return {"free_gb": free, "problems": problems}


def _probe_disk(disk: Path, min_free_gb: float) -> tuple[float | None, str | None]:
    """Gigabytes that are free, and what is wrong. A quota shows only when one writes."""
    probe = disk / f".preflight-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(PROBE_BYTES)
    try:
        disk.mkdir(parents=True, exist_ok=True)
        free_gb = shutil.disk_usage(disk).free / 1e9
        if free_gb < min_free_gb:
            return free_gb, f"{disk}: has {free_gb:.1f} GB free, less than {min_free_gb:g}"
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != content:
            return free_gb, f"{disk}: gives back other bytes than were written"
        return free_gb, None
    except OSError as error:
        return None, f"{disk}: cannot be written ({error.strerror})"
    finally:
        with suppress(OSError):
            probe.unlink()


def _in_time(work: Callable[[], tuple[Any, str | None]], limit_s: float, complaint: str) -> tuple[Any, str | None]:
    """The result of work that may hang where no timeout reaches: in a system call to a dead file server."""
    results: list[tuple[Any, str | None]] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else (None, f"{complaint} within {limit_s:g} s")


def _memory(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    memory_gb = int(found.group(1)) * 1024 / 1e9 if found else None
    problems = {}
    if memory_gb is not None and memory_gb < given.min_memory_gb:
        problems["memory"] = f"has {memory_gb:.1f} GB of memory available, less than {given.min_memory_gb:g}"
    return {"memory_gb": memory_gb, "problems": problems}


def _gpus(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What nvidia-smi lists. Where it is absent there are none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GPU_LIMIT_S
        )
        num_gpus, said = len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE)), _last_line(listed.stderr)
        failed = f" (nvidia-smi fails: {said or _last_line(listed.stdout)})" if listed.returncode else ""
    except FileNotFoundError:
        num_gpus, failed = 0, " (there is no nvidia-smi)"
    except subprocess.TimeoutExpired:
        num_gpus, failed = 0, f" (nvidia-smi does not answer within {GPU_LIMIT_S:g} s)"
    problems = {}
    if num_gpus < given.gpus or (given.gpus and failed):
        problems["gpus"] = f"shows {num_gpus} GPUs of the {given.gpus} that are needed{failed}"
    return {"gpus": num_gpus, "problems": problems}


# --- between nodes ------------------------------------------------------------------------------------------------


def _network(given: argparse.Namespace, node_id: int, num_nodes: int) -> dict[str, Any]:
    """The sum over all nodes, and where that fails, in pairs."""
    pairs_begin = time.monotonic() + given.limit_s
    answer, problem = _sum(given, "all", node_id, num_nodes, given.limit_s)
    if problem is None:
        offset_s = _clock_offset(answer["clocks"][:: max(1, given.gpus)], node_id)
        problems = {}
        if abs(offset_s) > given.max_clock_skew_s:
            problems[CLOCK] = f"its clock is off by {offset_s:+.1f} s, more than {given.max_clock_skew_s:g}"
        return {"all_reduce_s": answer["all_reduce_s"], "clock_offset_s": offset_s, "problems": problems}
    found: dict[str, Any] = {"problems": {ALL_REDUCE: problem}}
    return found if num_nodes <= 2 else {**found, "pairs": _pairs(given, node_id, num_nodes, pairs_begin)}


def _pairs(given: argparse.Namespace, node_id: int, num_nodes: int, begin: float) -> dict[str, bool]:
    """By the number of the other node, whether a sum of the two came off.

    A round has its time: a node that has failed at once would otherwise be done before the others begin.
    """
    limit_s = min(PAIR_LIMIT_S, given.limit_s)
    came_off = {}
    for number in range(NUM_ROUNDS):
        other = partner(node_id, num_nodes, number)
        if other is not None:
            time.sleep(max(0.0, begin + number * limit_s - time.monotonic()))
            name = f"round {number}, {min(node_id, other)} and {max(node_id, other)}"
            came_off[str(other)] = _sum(given, name, int(node_id > other), 2, limit_s)[1] is None
    return came_off


def partner(node_id: int, num_nodes: int, number: int) -> int | None:
    """Of a node in a round: everybody meets everybody once in n - 1 rounds; None: it has nobody in this one."""
    circle = num_nodes - 1 + num_nodes % 2  # an odd number: the last of the even number of places stands still
    number %= circle
    if node_id == circle:
        other = number * (circle + 1) // 2 % circle  # half of `number` on the circle
    else:
        other = (number - node_id) % circle
        other = circle if other == node_id else other
    return other if other < num_nodes else None


def _sum(
    given: argparse.Namespace, name: str, place: int, num_places: int, limit_s: float
) -> tuple[dict[str, Any], str | None]:
    """One process per GPU takes part in `slurm.all_reduce`: what the first one says, and what went wrong."""
    per_node = max(1, given.gpus)
    deadline = time.monotonic() + limit_s
    command = [sys.executable, "-m", "slurm.all_reduce", "join", given.rendezvous, name, f"--limit-s={limit_s}"]
    command += [f"--world-size={num_places * per_node}", f"--backend={'nccl' if given.gpus else 'gloo'}"]
    processes = [
        _start([*command, f"--rank={place * per_node + local_rank}", f"--local-rank={local_rank}"])
        for local_rank in range(per_node)
    ]
    outputs = [_output(process, deadline) for process in processes]
    for process, (out, said) in zip(processes, outputs):  # noqa: B905 # Python 3.9 has no `strict`
        if process.returncode != 0 or not out:
            how = said or f"ended with exit code {process.returncode}"
            return {}, f"the all-reduce ({'NCCL' if given.gpus else 'gloo'}) failed: {how}"
    return json.loads(outputs[0][0]), None


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=Path(__file__).parent.parent)


def _output(process: subprocess.Popen[str], deadline: float) -> tuple[str, str]:
    """The last lines of both outputs, once it has ended or had to be."""
    try:
        out, error = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        return _last_line(out), _last_line(error)
    except subprocess.TimeoutExpired:
        process.kill()
        return "", "it takes too long"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


@contextmanager
def _store(rendezvous: str, is_here: bool) -> Iterator[None]:
    """Where the processes meet: on the first node, as long as it may be needed."""
    process = _start([sys.executable, "-m", "slurm.all_reduce", "serve", rendezvous]) if is_here else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.communicate()


def _wait_for_rows(folder: Path, number: int, limit_s: float, counts: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether so many come in time: some nodes may still load their container's image."""
    deadline = time.monotonic() + limit_s
    while sum(counts(row) for row in preflight_rows(folder).values()) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _clock_offset(clocks: Sequence[float], node_id: int) -> float:
    """From the median of all clocks. Of two clocks, the first node's is the one that is right."""
    ordered = sorted(clocks)
    return clocks[node_id] - (ordered[len(ordered) // 2] if len(ordered) > 2 else clocks[0])


# --- the verdict --------------------------------------------------------------------------------------------------


def unfit_nodes(folder: Path, nodes: Sequence[str]) -> dict[str, list[str]]:
    """By node of an attempt, what speaks against it; none where the attempt had no checks."""
    rows = preflight_rows(folder)
    if not rows:
        return {}
    reasons = {node: list(rows[node]["problems"].values()) if node in rows else ["did not answer"] for node in nodes}
    return {node: sentences for node, sentences in reasons.items() if sentences}


def nodes_to_exclude(folder: Path, nodes: Sequence[str]) -> list[str]:
    """Of an attempt's nodes, those that are at fault. What goes wrong on all of several is no fault of a node."""
    rows = preflight_rows(folder)
    if not rows:
        return []
    bad = {node for node in nodes if node not in rows or set(rows[node]["problems"]) - {ALL_REDUCE}}
    if not bad:
        bad = _unreachable(rows)
    return [node for node in nodes if node in bad] if len(nodes) == 1 or len(bad) < len(nodes) else []


def _unreachable(rows: dict[str, dict[str, Any]]) -> set[str]:
    """Nodes with which no sum came off, where others had some."""
    names = {str(row.get("node_id")): node for node, row in rows.items()}
    met: set[str] = set()
    tried: set[str] = set()
    for node, row in rows.items():
        pairs = row.get("pairs")
        for other, came_off in (pairs if isinstance(pairs, dict) else {}).items():
            both = {node, names.get(other, node)}
            tried |= both
            met |= both if came_off else set()
    return tried - met if met else set()


def exclude(folder: Path, nodes: Sequence[str]) -> int:
    attempts = read_attempts(folder)
    if not attempts:
        raise CommandError(f"{folder}: no attempt has begun there; `slurm.attempts begin` comes first.")
    now = attempts[-1]
    earlier = [attempt for attempt in attempts[:-1] if attempt.job_id == now.job_id]
    here = folder / PREFLIGHT / attempt_name(now.number)
    nodes = nodes or now.nodes
    bad = [node for attempt in earlier for node in _of_attempt(folder, attempt)] + nodes_to_exclude(here, nodes)
    sys.stdout.write(",".join(sorted(set(bad))) + "\n")
    unfit = unfit_nodes(here, nodes)
    for node, sentences in unfit.items():
        for sentence in sentences:
            sys.stderr.write(f"{node}: {sentence}\n")
    if not preflight_rows(here):
        sys.stderr.write(f"{here}: no node has left a row there; what srun says of the pre-flight tells why.\n")
        return 1
    return 1 if unfit else 0


def _of_attempt(folder: Path, attempt: Attempt) -> list[str]:
    return nodes_to_exclude(folder / PREFLIGHT / attempt_name(attempt.number), attempt.nodes)


# --- commands -----------------------------------------------------------------------------------------------------


def main() -> int:
    given = command_line().parse_args()
    if given.command == "exclude":
        check_folder(given.folder)
        return exclude(given.folder, node_names(given.nodes))
    try:
        return check(given.folder, given)
    except OSError as error:
        raise CommandError(
            f"{error.filename or given.folder}: the row of this node cannot be written ({error.strerror}); see to the "
            "space and permissions of the run folder.",
            exit_code=1,
        ) from None


def command_line() -> Parser:
    parser = Parser(prog="python -m slurm.preflight", description="Which nodes of an allocation are fit to work?")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="on every node, under srun: leaves its row")
    checking.add_argument("folder", type=Path, help="for the rows: FOLDER/preflight/attempt_001")
    checking.add_argument("--rendezvous", type=_address, required=True, help="HOST:PORT on the first node")
    checking.add_argument("--disk", type=Path, action="append", default=[], help="to be written to; may be repeated")
    checking.add_argument("--min-free-gb", type=_amount, default=1.0, help="on each disk (%(default)s)")
    checking.add_argument("--min-memory-gb", type=_amount, default=0.0, help="available (%(default)s)")
    checking.add_argument("--gpus", type=given_number, default=0, help="per node (%(default)s: none, and gloo)")
    checking.add_argument("--max-clock-skew-s", type=_amount, default=2.0, help="between nodes (%(default)s)")
    checking.add_argument("--limit-s", type=_amount, default=120.0, help="for nodes, and for their sum (%(default)s)")
    excluding = commands.add_parser("exclude", help="in the batch script: writes the nodes to exclude")
    excluding.add_argument("folder", type=Path, help="of the job: RUN_DIR/slurm/<stage>")
    excluding.add_argument("--nodes", default="", help="of this attempt; those that `attempts begin` was told, if none")
    return parser


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise CommandError(f"command line: {text!r} is no amount; give a number from 0 on.")
    return amount


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise CommandError(f"command line: --rendezvous {text!r} is no address; give HOST:PORT, as in n1:29500.")
    return text


if __name__ == "__main__":
    run(main)
