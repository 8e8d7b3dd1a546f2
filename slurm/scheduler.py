"""SLURM's commands: the only file that calls them. What they refuse is a `UserError` with what they said."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.loader import UserError
from configs.problems import suggest

from .chain import TIME, seconds

TIMEOUT_S = 120  # a controller that is busy may let one wait
FIELDS = "%A|%F|%K|%T|%r|%L|%N"


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of it."""

    name: str
    nodes: int
    limit: str  # of a job's time
    is_default: bool


@dataclass(frozen=True)
class QueuedTask:
    """A job, or an element of an array, that is waiting or at work."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    time_left: str
    nodes: str


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def require() -> None:
    if not is_here():
        raise UserError(
            "sbatch is not on the PATH, so this machine submits no SLURM jobs; run this on a login node, outside of "
            "any container, or only look with --dry-run."
        )


# --- before submission --------------------------------------------------------------------------------------------


def read_partitions() -> list[Partition]:
    """Every partition that this user may see."""
    found: dict[str, Partition] = {}
    for line in _run("sinfo", "--noheader", "--format=%P|%D|%l").splitlines():  # a line per kind of node
        name, nodes, limit = line.strip().split("|")
        known = found.get(name.rstrip("*"))
        total = int(nodes) + (known.nodes if known else 0)
        found[name.rstrip("*")] = Partition(name.rstrip("*"), total, limit, name.endswith("*"))
    return list(found.values())


def check_partition(partition: str, num_nodes: int, time_s: int, where: str) -> None:
    """Says what SLURM would say, and what there is instead. `partition` may name several, or none: the default."""
    partitions = {one.name: one for one in read_partitions()}
    default = [one.name for one in partitions.values() if one.is_default]
    names = [name for name in partition.split(",") if name] or default
    for name in names:
        if name not in partitions:
            hint = suggest(name, sorted(partitions))
            raise UserError(f"{where}: this cluster has no partition {name}{hint}{'' if hint.endswith('?') else '.'}")
    if not names:
        return
    largest = max((partitions[name] for name in names), key=lambda one: one.nodes)
    if num_nodes > largest.nodes:
        raise UserError(
            f"{where}: needs {num_nodes} nodes, but partition {largest.name} has {largest.nodes}; lower nodes, or "
            "choose another partition."
        )
    limits = [partitions[name].limit for name in names]
    if all(TIME.fullmatch(limit) and seconds(limit) < time_s for limit in limits):
        raise UserError(
            f"{where}: its time is more than partition {names[0]} allows ({limits[0]}); lower time: the job goes on by "
            "itself after each limit."
        )


def check_script(script: Path, where: str) -> None:
    """Lets SLURM look at a file without submitting it."""
    process = _call("sbatch", "--test-only", str(script))
    if process.returncode:
        raise UserError(f"{where}: SLURM refuses {script}: {_reason(process.stderr)}.")


# --- jobs ---------------------------------------------------------------------------------------------------------


def submission(script: Path, dependency: str = "", array: str = "") -> list[str]:
    """The command that submits a file."""
    options = [f"--dependency={dependency}"] if dependency else []
    return ["sbatch", "--parsable", *options, *([array] if array else []), str(script)]


def submit(command: Sequence[str]) -> str:
    """The id of the job that a `submission` makes."""
    return _run(*command).strip().split(";")[0]  # what follows is the cluster's name


def read_queue(job_ids: Iterable[str]) -> dict[tuple[str, str], QueuedTask]:
    """This user's jobs of these ids that have not ended, by id and index in the array ("" where there is none)."""
    wanted = set(job_ids)
    found = {}
    lines = _run("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", f"--format={FIELDS}").splitlines()
    for line in lines:
        job_id, array_id, index, state, reason, time_left, nodes = line.strip().split("|")
        is_element = index.isdigit()
        key = (array_id, index) if is_element else (job_id, "")
        if key[0] in wanted:
            found[key] = QueuedTask(state, reason, time_left, nodes)
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, or elements of arrays (12_3), whether they wait or work."""
    if jobs:
        _run("scancel", *jobs)


# --- calling ------------------------------------------------------------------------------------------------------


def _run(*command: str) -> str:
    process = _call(*command)
    if process.returncode:
        raise UserError(f"{command[0]}: {_reason(process.stderr)}.")
    return process.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    require()
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM has not answered for {TIMEOUT_S} s; try again later.") from None


def _reason(text: str) -> str:
    """What a command of SLURM's said last, without its own name, its estimates and its hints."""
    said = [re.sub(r"^\w+: (?:error|fatal): ", "", line) for line in text.splitlines() if " " in line]
    told = [line for line in said if not re.match(r"\w+: Job \d+ to start|Try ", line)]
    return (told or ["no reason given"])[-1].rstrip(".")
