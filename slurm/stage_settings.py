"""What a stage's own command makes of its config, asked before anything is submitted: its mistakes are told at once."""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs.loader import BAD_INPUT, UserError
from configs.yaml_text import parse_yaml

from .chain import ARRAY_INDEX, DataConfig, Job, Task, TrainingConfig, usable_node_counts
from .environment import Environment
from .print_configs import Answer
from .render import Place

logger = logging.getLogger(__name__)

Settings = dict[str, Any]

WHERE_AND_SEED = {"run_dir", "output", "checkpoint", "seed"}


def check_stages(jobs: Sequence[Job], environment: Environment, place: Place) -> list[list[int]]:
    """The numbers of nodes that each job can use, smallest first; a `UserError` tells what cannot be.

    Where packages are in a container, stages are not asked, and every number of the range may do.
    """
    python = os.path.expandvars(environment.cluster.python or str(place.python))
    if environment.cluster.container != "none" or shutil.which(python) is None:
        return [_node_counts(job, [None]) for job in jobs]
    logger.info("asking each stage's command what it makes of its config")
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda job: _node_counts(job, _ask(job, python, place)), jobs))


def _that_differ(job: Job) -> Iterable[Task]:
    """Tasks that differ in more than their folders and seeds: an answer takes seconds."""
    if job.pattern is not None:
        return [job.pattern]
    return {
        tuple(word for word in task.command if word.partition("=")[0] not in WHERE_AND_SEED): task
        for task in job.tasks.values()
    }.values()


def _ask(job: Job, python: str, place: Place) -> list[Settings | None]:
    """The resolved settings of the job's tasks; None where the packages of its command are not installed here."""
    tasks = list(_that_differ(job))
    commands = [[word.replace(ARRAY_INDEX, "0") for word in task.command] for task in tasks]
    process = subprocess.run(
        [python, "-m", "slurm.print_configs"],
        input=json.dumps(commands),
        cwd=place.work_dir,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        _warn(job, process.stderr, process.returncode)
        return [None]
    answers = [Answer(*answer) for answer in json.loads(process.stdout)]
    return [_settings(job, task, answer) for task, answer in zip(tasks, answers, strict=True)]


def _settings(job: Job, task: Task, answer: Answer) -> Settings | None:
    if answer.exit_code == BAD_INPUT:
        which = f"{task.name}, " if len(job.tasks) > 1 and job.pattern is None else ""
        said = _last_line(answer.errors, BAD_INPUT).removeprefix("error: ")
        raise UserError(f"stage {job.stage}, {which}python -m {task.command[0]}: {said}")
    if answer.exit_code:
        _warn(job, answer.errors, answer.exit_code)
        return None
    return parse_yaml(answer.output)


def _warn(job: Job, errors: str, code: int) -> None:
    logger.warning(
        "stage %s could not be asked here, so its config is not checked: %s", job.stage, _last_line(errors, code)
    )


def _last_line(errors: str, code: int) -> str:
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def _node_counts(job: Job, answers: Sequence[Settings | None]) -> list[int]:
    config = job.config
    if not isinstance(config, TrainingConfig):
        return [config.nodes if isinstance(config, DataConfig) and config.kind == "ray" else 1]
    usable = [usable_node_counts(f"stage {job.stage}", config, answer) for answer in answers]
    counts = [count for count in usable[0] if all(count in other for other in usable)]
    if not counts:
        raise UserError(
            f"stage {job.stage}: no number of nodes suits the batches of all presets; change nodes or them."
        )
    return counts
