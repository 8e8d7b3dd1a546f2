"""Submits a chain of stages to SLURM: data -> pretrain -> finetune -> evaluate, each as soon as the one before is done.

    python -m slurm.submit --config configs/slurm/demo.yaml --dry-run     prints every file and command, submits nothing
    python -m slurm.submit --config configs/slurm/demo.yaml               submits
    python -m slurm.submit --config … --stage pretrain                    submits one stage, from what is there already
    python -m slurm.status RUN_DIR                                        where it stands

Jobs requeue themselves at their time limit and after failures, and go on where they were. What the cluster is like
stands in slurm/env.sh; the sbatch files are written to RUN_DIR/slurm and can be submitted by hand, too.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from configs.loader import UserError, dump_config, run_command

from . import scheduler
from .chain import REPOSITORY, ChainConfig, DataConfig, Job, StageName, TrainingConfig, plan_jobs, seconds
from .environment import check_ray_folder, filled_in, read_environment
from .jobs import (
    CHAIN_FILE,
    NotDone,
    Submission,
    TaskState,
    only_one,
    read_states,
    read_submissions,
    tasks_at_work,
    write_submissions,
)
from .render import Place, array_option, render, script_path
from .stage_settings import check_stages


class SubmitConfig(ChainConfig):
    """A chain, and what to do with it."""

    stage: StageName | None = Field(None, description="submit this stage alone; what comes before it must be there")
    dry_run: bool = Field(False, description="print every file and every command instead")


@dataclass(frozen=True)
class Script:
    """A job, and the file that was written for it."""

    job: Job
    path: Path
    text: str


def main(config: SubmitConfig) -> int:
    chain = absolute(config)
    for above in (Path.cwd(), REPOSITORY):  # run_dir would be a folder among others there, or hold them all
        if Path(os.path.realpath(above)).is_relative_to(os.path.realpath(chain.run_dir)):
            raise UserError(f"run_dir={config.run_dir} is or holds {above}; choose a folder of its own.")
    jobs = plan_jobs(chain)
    if config.stage is not None:
        jobs = [job for job in jobs if job.stage == config.stage]
        if not jobs:
            raise UserError(f"--stage {config.stage}: the chain has no such stage; add it to stages.")
    if config.dry_run:
        sys.stdout.write(dry_run(write_texts(chain, jobs)))
        return 0
    refuse_what_was_submitted(chain, jobs)
    check_partitions(chain, jobs)
    scripts = write_texts(chain, jobs)
    with only_one(chain.run_dir):
        refuse_what_was_submitted(chain, jobs)  # meanwhile
        submissions = read_submissions(chain.run_dir)
        queue = scheduler.read_queue((one.job_id for one in submissions), ", so nothing is submitted")
        states = read_states(chain, queue)
        for job in jobs:
            if job.after not in {None, *(other.stage for other in jobs)}:
                refuse_without_input(chain, job, states)
        write_files(chain, scripts)
        due = {script.job.stage: list(script.job.tasks) for script in scripts}
        submit_all(chain.run_dir, scripts, due, tasks_at_work(states))
    return 0


def refuse_without_input(chain: ChainConfig, job: Job, states: Sequence[TaskState]) -> None:
    """A stage alone needs what the one before it leaves: there, or at work."""
    for state in states:
        task = state.task
        left = chain.run_dir / "dataset" if task.run_dir is None else task.run_dir / "export"
        if state.job.stage == job.after and state.queued is None and not state.is_done and not left.is_dir():
            which = f"{job.after} {task.name}" if state.index else job.after
            raise UserError(
                f"stage {job.stage}: needs {left}, but {which} is not done ({state.word}); begin with "
                f"`--stage {job.after}`, or where it was submitted, put it right and go on with "
                f"`python -m slurm.resubmit {chain.run_dir}`."
            )


def refuse_what_was_submitted(chain: ChainConfig, jobs: Sequence[Job]) -> None:
    known = {one.stage for one in read_submissions(chain.run_dir)} & {job.stage for job in jobs}
    if known:
        raise UserError(
            f"{chain.run_dir}: {', '.join(sorted(known))} was submitted before; look with `python -m slurm.status`, go "
            f"on with `python -m slurm.resubmit {chain.run_dir}`, or choose another run_dir."
        )


def absolute(config: ChainConfig) -> ChainConfig:
    """The chain alone, with paths that mean the same from anywhere."""
    fields = {name: getattr(config, name) for name in ChainConfig.model_fields}
    fields |= {name: Path(os.path.abspath(fields[name])) for name in ("run_dir", "env")}
    return ChainConfig(**fields)


# --- the files ----------------------------------------------------------------------------------------------------


def check_partitions(chain: ChainConfig, jobs: Sequence[Job]) -> None:
    """Each stage's, for the fewest nodes that it would start on."""
    environment = read_environment(chain.env)
    for job in jobs:
        partition = job.config.partition or filled_in(environment.cluster.partition, str(environment.path))
        fewest = job.config.min_nodes if isinstance(job.config, TrainingConfig) else getattr(job.config, "nodes", 1)
        scheduler.check_partition(partition, fewest, seconds(job.config.time), f"stage {job.stage}")


def write_texts(chain: ChainConfig, jobs: Sequence[Job]) -> list[Script]:
    """Every job's file, after all has been checked that can be without SLURM."""
    environment, place = read_environment(chain.env), Place.here()
    if any(isinstance(job.config, DataConfig) and job.config.kind == "ray" for job in jobs):
        check_ray_folder(environment)
    node_counts = check_stages(jobs, environment, place)
    scripts = [
        Script(job, script_path(job, chain), render(job, chain, environment, place, counts))
        for job, counts in zip(jobs, node_counts, strict=True)
    ]
    for script in scripts:
        if not _is_utf_8(script.text):
            raise UserError(f"stage {script.job.stage}: a path in it is not UTF-8; rename it, or link it elsewhere.")
    return scripts


def _is_utf_8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()


def dry_run(scripts: Sequence[Script]) -> str:
    """Every file, and the commands that would submit them, with ids where they are not known yet."""
    parts = [f"==> {script.path}\n{script.text}" for script in scripts]
    stages = [script.job.stage for script in scripts]
    commands = []
    for script in scripts:
        job = script.job
        parents = dict.fromkeys(job.tasks, f"${job.after}_job") if job.after in stages else {}
        command = scheduler.submission(script.path, dependency(job, list(job.tasks), parents))
        shown = " ".join(word if "$" in word else shlex.quote(word) for word in command)
        commands.append(f"{job.stage}_job=$({shown})")
    return "\n".join([*parts, "==> commands", *commands]) + "\n"


def write_files(chain: ChainConfig, scripts: Sequence[Script]) -> None:
    """Into the run folder, once SLURM has found nothing wrong with them."""
    try:
        for script in scripts:
            script.path.parent.mkdir(parents=True, exist_ok=True)
            for task in script.job.tasks.values():
                task.folder.mkdir(parents=True, exist_ok=True)
            script.path.write_text(script.text, encoding="utf-8")
            script.path.chmod(0o755)
        (chain.run_dir / CHAIN_FILE).write_text(dump_config(chain), encoding="utf-8")
    except OSError as error:
        where = error.filename or chain.run_dir
        raise UserError(
            f"{where}: cannot be written ({error.strerror}); make room, or choose another run_dir."
        ) from None
    for script in scripts:
        scheduler.check_script(script.path, f"stage {script.job.stage}")


# --- submission ---------------------------------------------------------------------------------------------------


def submit_all(
    run_dir: Path,
    scripts: Sequence[Script],
    due: Mapping[StageName, Sequence[str]],
    at_work: Mapping[StageName, NotDone],
) -> None:
    """Submits the tasks that are due, each behind those that it needs: of the same submission, or at work already."""
    submissions = read_submissions(run_dir)
    not_done = {stage: dict(tasks) for stage, tasks in at_work.items()}
    for script in scripts:
        job = script.job
        parents = not_done.get(job.after, {}) if job.after else {}
        for indices in groups(job, due.get(job.stage, ()), parents):
            waits_for = dependency(job, indices, parents)
            array = array_option(indices, job) if job.is_array and len(indices) < len(job.tasks) else ""
            job_id = _submit(run_dir, job, scheduler.submission(script.path, waits_for, array))
            submission = Submission(
                stage=job.stage,
                job_id=job_id,
                tasks={index: job.tasks[index].name for index in indices},
                depends_on=waits_for.split(":")[1:],
                submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            submissions.append(submission)
            _note(run_dir, submissions)  # at once: whatever comes next, this one is in the queue
            not_done.setdefault(job.stage, {}).update(dict.fromkeys(indices, job_id))
            sys.stdout.write(f"{job.stage:9} job {job_id}{f' ({waits_for})' if waits_for else ''}\n")
    sys.stdout.write(f"\npython -m slurm.status {shlex.quote(str(run_dir))}\n")


def _submit(run_dir: Path, job: Job, command: Sequence[str]) -> str:
    try:
        return scheduler.submit(command)
    except UserError as error:
        raise UserError(
            f"stage {job.stage} could not be submitted ({str(error).rstrip('.')}); whatever came before it was: after "
            f"a fix, `python -m slurm.resubmit {shlex.quote(str(run_dir))}` submits the rest."
        ) from None


def _note(run_dir: Path, submissions: Sequence[Submission]) -> None:
    """A job that is in no list is one that nobody would look after."""
    try:
        write_submissions(run_dir, submissions)
    except OSError as error:
        scheduler.cancel([submissions[-1].job_id])
        raise UserError(
            f"{run_dir}: job {submissions[-1].job_id} cannot be noted ({error.strerror}), so it was cancelled; see to "
            f"its disk's space and permissions, then `python -m slurm.resubmit {run_dir}`."
        ) from None


def groups(job: Job, indices: Sequence[str], parents: NotDone) -> Iterator[list[str]]:
    """Tasks that can be submitted together: those that wait for tasks of one job."""
    if not job.follows_task_by_task:
        if indices:
            yield list(indices)
        return
    by_parent: dict[str, list[str]] = {}
    for index in indices:
        by_parent.setdefault(parents.get(index, ""), []).append(index)
    yield from by_parent.values()


def dependency(job: Job, indices: Sequence[str], parents: NotDone) -> str:
    """As sbatch takes it; empty where nothing is to be waited for."""
    if job.follows_task_by_task:
        kind, ids = "aftercorr", [parents[index] for index in indices if index in parents]
    else:
        kind, ids = "afterok", list(parents.values())
    return ":".join([kind, *dict.fromkeys(ids)]) if ids else ""


if __name__ == "__main__":
    run_command(main, SubmitConfig, description=__doc__)
