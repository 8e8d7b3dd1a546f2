"""SLURM's commands: the only file that calls them. What they refuse is a `UserError` with what they said."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.loader import UserError
from configs.problems import ended, suggest

from .chain import TIME, seconds

TIMEOUT_S = 120  # a controller that is busy may let one wait
MAX_COMPLAINTS = 3
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
            "sbatch is not on the PATH, so this machine knows of no SLURM jobs; run this on a login node, outside of "
            "any container (`slurm.submit --dry-run` works anywhere)."
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
            raise UserError(ended(f"{where}: this cluster has no partition {name}{hint}"))
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
        raise UserError(ended(f"{where}: SLURM refuses {script}: {_reason(process.stderr)}"))


# --- jobs ---------------------------------------------------------------------------------------------------------


def submission(script: Path, dependency: str = "", array: str = "") -> list[str]:
    """The command that submits a file."""
    options = [f"--dependency={dependency}"] if dependency else []
    return ["sbatch", "--parsable", *options, *([array] if array else []), str(script)]


def submit(command: Sequence[str]) -> str:
    """The id of the job that a `submission` makes."""
    said = _run(*command).strip()
    job_id = said.split(";")[0]  # what follows is the cluster's name
    if not job_id.isdigit():
        raise UserError(f"sbatch: says {said!r}, which is no job's id; look with squeue whether it was submitted.")
    return job_id


def read_queue(job_ids: Iterable[str], otherwise: str = "") -> dict[tuple[str, str], QueuedTask]:
    """Jobs of these ids that have not ended, whoever's they are, by id and index in the array ("" where there is none).

    Where SLURM does not say, the `UserError` also tells what is left undone: `otherwise`.
    """
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    listed = ",".join([*wanted, wanted[0]])  # of one alone that has ended, squeue says that it is invalid
    command = ["squeue", "--noheader", "--array", f"--jobs={listed}", f"--format={FIELDS}"]
    try:
        jobs = [_queued(line) for line in _run(*command).splitlines()]
    except UserError as error:
        raise UserError(f"what waits and what works is not known{otherwise}: {error}") from None
    return {key: task for key, task in jobs if key[0] in wanted}


def _queued(line: str) -> tuple[tuple[str, str], QueuedTask]:
    try:
        job_id, array_id, index, state, reason, time_left, nodes = line.strip().split("|")
    except ValueError:
        raise UserError(f"squeue: says {line.strip()!r}, which is no row of jobs.") from None
    return (array_id, index) if index.isdigit() else (job_id, ""), QueuedTask(state, reason, time_left, nodes)


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, or elements of arrays (12_3), whether they wait or work. One that has just ended is no mistake."""
    if jobs:
        _run("scancel", "--quiet", *jobs)


# --- calling ------------------------------------------------------------------------------------------------------


def _run(*command: str) -> str:
    process = _call(*command)
    if process.returncode:
        raise UserError(ended(f"{command[0]}: {_reason(process.stderr)}"))
    return process.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    require()
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM has not answered for {TIMEOUT_S} s; try again later.") from None
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror}); see to this machine's SLURM.") from None


def _reason(text: str) -> str:
    """What a command of SLURM's complains of, the cause first, without its own name, its estimates and its hints."""
    told = [line for line in text.splitlines() if not re.match(r"\w+: Job \d+ to start|Try ", line)]
    errors = [line for line in told if re.match(r"\w+: (?:error|fatal): ", line)] or told
    said = (re.sub(r"^\w+: (?:(?:error|fatal|warning): )?", "", line).strip().rstrip(".") for line in errors)
    in_words = dict.fromkeys(one for one in said if re.search("[A-Za-z]", one))
    return "; ".join(list(in_words)[:MAX_COMPLAINTS]) or "no reason given"
