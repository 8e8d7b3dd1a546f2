"""What a stage's own command makes of its config, asked before anything is submitted: its mistakes are told at once."""

import logging
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.loader import BAD_INPUT, UserError
from configs.yaml_text import parse_yaml

from .chain import Job, Task, TrainingConfig, usable_node_counts
from .environment import Environment
from .render import Place

logger = logging.getLogger(__name__)

Settings = dict[str, Any]


def check_stages(jobs: Sequence[Job], environment: Environment, place: Place) -> list[list[int]]:
    """The numbers of nodes that each job can use, smallest first; a `UserError` tells what cannot be.

    Where packages are in a container, stages are not asked, and every number of the range may do.
    """
    python = Path(environment.cluster.python or place.python)
    can_ask = environment.cluster.container == "none" and python.is_file()
    if can_ask:
        logger.info("asking each stage's command what it makes of its config")
    counts = []
    with ThreadPoolExecutor(4) as pool:
        for job in jobs:
            tasks = [job.pattern] if job.pattern else job.tasks.values()
            answers = list(pool.map(lambda task: _ask(task, python, place), tasks)) if can_ask else [None]
            counts.append(_node_counts(job, answers))
    return counts


def _ask(task: Task, python: Path, place: Place) -> Settings | None:
    """The stage's resolved settings; None where its packages are not installed here."""
    index = "0"  # of an array whose tasks differ in it alone
    command = [word.replace("$SLURM_ARRAY_TASK_ID", index) for word in task.command]
    process = subprocess.run(
        [str(python), "-m", *command, "--print-config"], cwd=place.work_dir, capture_output=True, text=True
    )
    if process.returncode == BAD_INPUT:
        said = process.stderr.strip().splitlines()[-1].removeprefix("error: ")
        raise UserError(f"stage {task.folder.name}, python -m {task.command[0]}: {said}")
    return parse_yaml(process.stdout) if process.returncode == 0 else None


def _node_counts(job: Job, answers: Sequence[Settings | None]) -> list[int]:
    config = job.config
    if not isinstance(config, TrainingConfig):
        return [getattr(config, "nodes", 1) if job.template == "ray.sbatch" else 1]
    usable = [usable_node_counts(f"stage {job.stage}", config, answer) for answer in answers]
    return [count for count in usable[0] if all(count in other for other in usable)]
