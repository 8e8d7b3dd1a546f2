"""What a stage's own command makes of its config, asked before anything is submitted: its mistakes are told at once."""

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
        asked = [[pool.submit(_ask, job.stage, task, python, place) for task in _that_differ(job)] for job in jobs]
        return [_node_counts(job, [one.result() for one in answers]) for job, answers in zip(jobs, asked, strict=True)]


def _that_differ(job: Job) -> Iterable[Task]:
    """Tasks that differ in more than their folders and seeds: an answer takes seconds."""
    if job.pattern is not None:
        return [job.pattern]
    return {
        tuple(word for word in task.command if word.partition("=")[0] not in WHERE_AND_SEED): task
        for task in job.tasks.values()
    }.values()


def _ask(stage: str, task: Task, python: str, place: Place) -> Settings | None:
    """The task's resolved settings; None where its packages are not installed here."""
    command = [word.replace(ARRAY_INDEX, "0") for word in task.command]
    process = subprocess.run(
        [python, "-m", *command, "--print-config"], cwd=place.work_dir, capture_output=True, text=True
    )
    said = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    if process.returncode == BAD_INPUT:
        raise UserError(f"stage {stage}, python -m {task.command[0]}: {said[0].removeprefix('error: ')}")
    if process.returncode:
        logger.warning("stage %s could not be asked here, so its config is not checked: %s", stage, said[0])
        return None
    return parse_yaml(process.stdout)


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
