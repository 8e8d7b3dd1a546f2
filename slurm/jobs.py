"""What was submitted for a chain: `RUN_DIR/jobs.json`, and what has become of each task."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.loader import UserError, load_config

from .attempts import Attempt, read_attempts
from .chain import ChainConfig, Job, StageName, Task, plan_jobs
from .scheduler import QueuedTask

CHAIN_FILE, JOBS_FILE, LOCK_FILE = "chain.yaml", "jobs.json", ".submitting"


@dataclass(frozen=True)
class Submission:
    """One job in SLURM's queue. A stage that was submitted again has several; the last one with a task counts."""

    stage: StageName
    job_id: str
    tasks: dict[str, str]  # index in the array ("" where it is none) -> name
    depends_on: list[str]  # ids
    submitted: str


@dataclass(frozen=True)
class _Known:
    """The whole file."""

    jobs: list[Submission]
    run_dir: str = ""


_KNOWN = TypeAdapter(_Known)


def read_chain(run_dir: Path) -> ChainConfig:
    """The chain that was submitted into a folder."""
    if not (run_dir / CHAIN_FILE).is_file():
        raise UserError(f"{run_dir}: has no {CHAIN_FILE}; give the run_dir of a chain that slurm.submit has submitted.")
    chain = load_config(ChainConfig, run_dir / CHAIN_FILE)
    _check_place(run_dir, chain.run_dir)
    return chain


def read_submissions(run_dir: Path) -> list[Submission]:
    """In the order of submission; none where nothing was submitted."""
    path = run_dir / JOBS_FILE
    if not path.is_file():
        return []
    try:
        known = _KNOWN.validate_json(path.read_bytes(), strict=True)
    except ValidationError:
        raise UserError(
            f"{path}: is not as slurm.submit writes it; restore it, or submit into another run_dir."
        ) from None
    _check_place(run_dir, Path(known.run_dir or run_dir))
    return known.jobs


def _check_place(run_dir: Path, submitted_as: Path) -> None:
    """Jobs know their folder by its path: they neither follow it when it is moved, nor belong to a copy of it."""
    if not submitted_as.is_dir():
        raise UserError(
            f"{run_dir}: was {submitted_as} when it was submitted, and its jobs look for it there; move it back, or "
            "link it there."
        )
    if not submitted_as.samefile(run_dir):
        raise UserError(
            f"{run_dir}: is a copy of {submitted_as}, to which its jobs belong; give that folder, or submit into a new "
            "one."
        )


def write_submissions(run_dir: Path, submissions: Iterable[Submission]) -> None:
    """Whole or not at all."""
    partial = run_dir / f".{JOBS_FILE}"
    known = {"run_dir": os.path.abspath(run_dir), "jobs": [asdict(one) for one in submissions]}
    partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, run_dir / JOBS_FILE)


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Entered while jobs are submitted: of two commands that ask at the same time what is due, both would submit it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another command is just submitting its jobs; try again in a minute.") from None
        except OSError:  # a file system that has no locks
            pass
        yield


NotDone = Mapping[str, str]
"""Index of a task that is not done yet -> id of the job that does it."""


@dataclass(frozen=True)
class TaskState:
    """Where a task of a stage stands."""

    job: Job
    index: str
    task: Task
    submission: Submission | None  # the last one that has it
    queued: QueuedTask | None
    is_queue_known: bool
    attempts: list[Attempt]

    @property
    def batch_log(self) -> Path:
        """What the batch script itself says."""
        folder = self.task.folder.parent if self.index else self.task.folder
        return folder / (f"batch_{self.index}.log" if self.index else "batch.log")

    @property
    def is_done(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].verdict == "done"

    @property
    def of_this_job(self) -> list[Attempt]:
        """Without those of earlier submissions."""
        job_id = self.submission.job_id if self.submission else None
        return [one for one in self.attempts if one.job_id.split("_")[0] == job_id]

    @property
    def word(self) -> str:
        """done, running, waiting, failed, stopped, lost, cancelled, not submitted or not known."""
        verdict = self.of_this_job[-1].verdict if self.of_this_job else "requeue"  # and yet it is not in the queue
        ended = {"done": "done", "failed": "failed", "stop": "stopped"}.get(verdict or "")
        if self.queued is not None and self.queued.state == "PENDING":
            return "waiting"
        if ended is not None:  # though the job itself may still be at its last lines
            return ended
        if self.queued is not None:
            return "running"
        if self.is_done:
            return "done"
        if self.submission is None:
            return "not submitted"
        if not self.is_queue_known:
            return "not known"
        return "cancelled" if verdict == "requeue" else "lost"


def read_states(chain: ChainConfig, queue: Mapping[tuple[str, str], QueuedTask] | None) -> list[TaskState]:
    """Every task of a chain, in the order of its stages. `queue` is None where it cannot be asked."""
    submissions = read_submissions(chain.run_dir)
    states = []
    for job in plan_jobs(chain):
        of_stage = [one for one in submissions if one.stage == job.stage]
        for index, task in job.tasks.items():
            submission = next((one for one in reversed(of_stage) if one.tasks.get(index) == task.name), None)
            queued = queue.get((submission.job_id, index)) if queue and submission else None
            attempts = read_attempts(task.folder)
            states.append(TaskState(job, index, task, submission, queued, queue is not None, attempts))
    return states


def refuse_changed_tasks(chain: ChainConfig, queue: Mapping[tuple[str, str], QueuedTask]) -> None:
    """An index stands for one run as long as its job is at work, and the parts of a build belong together."""
    file = chain.run_dir / CHAIN_FILE
    for job in plan_jobs(chain):
        of_stage = [one for one in read_submissions(chain.run_dir) if one.stage == job.stage]
        if of_stage and job.stage == "data" and len(of_stage[0].tasks) != len(job.tasks):
            raise UserError(
                f"stage data: had {len(of_stage[0].tasks)} part(s) when it was submitted, and has {len(job.tasks)} "
                f"now; put that back in {file}, or submit into another run_dir."
            )
        at_work = {key: one for one in of_stage for key in one.tasks.items() if (one.job_id, key[0]) in queue}
        for (index, name), one in at_work.items():
            if index not in job.tasks or job.tasks[index].name != name:
                raise UserError(
                    f"stage {job.stage}: {name} is at work as job {one.job_id}, and {file} has other presets or seeds "
                    "now; wait for it, or end it with `python -m slurm.cancel`."
                )


def tasks_at_work(states: Iterable[TaskState]) -> dict[StageName, NotDone]:
    """What waits or works already, by stage."""
    at_work: dict[StageName, dict[str, str]] = {}
    for state in states:
        if state.queued is not None and state.submission is not None:
            at_work.setdefault(state.job.stage, {})[state.index] = state.submission.job_id
    return {**at_work}
