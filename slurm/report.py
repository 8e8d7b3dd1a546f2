"""A chain on one page: what ran where and when, why each attempt ended, the losses, and what the policies are worth.

    python -m slurm.report RUN_DIR

Jobs write it when they end, and this command at any time. RUN_DIR/report.html is one file without scripts, which
follows from the run folder; its links lead to the logs, models and films there.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from configs.loader import StrictConfig, UserError, run_command

from . import scheduler
from .attempt_files import DONE, ERRORS, EXIT_STOPPED, LOGS, REPORT, Attempt, attempt_name, write_whole
from .chain import REPOSITORY
from .jobs import TaskState, read_chain, read_states, read_submissions
from .loss_curve import LossCurve, loss_curve
from .status import progress

TEMPLATE_FOLDERS = ("slurm", "finetune", "data_pipeline")  # the look is that of the pages of a dataset and of the demo
MAX_ATTEMPTS, MAX_FILMS = 100, 6
IN_TROUBLE = ("failed", "stopped", "lost", "cancelled")


class ReportConfig(StrictConfig):
    """Which chain."""

    run_dir: Path = Field(description="of the chain")


def main(config: ReportConfig) -> int:
    run_dir = read_chain(config.run_dir).run_dir
    states = look(run_dir)
    while True:
        write_whole(run_dir / REPORT, render(run_dir, states))
        before, states = states, look(run_dir)
        if [state.attempts for state in states] == [state.attempts for state in before]:
            break  # else another task has ended meanwhile, and may have written its page before this one
    sys.stdout.write(f"{run_dir / REPORT}\n")
    return 0


def look(run_dir: Path) -> list[TaskState]:
    """Every task as it stands. In a container, nobody can ask for the queue."""
    chain, queue = read_chain(run_dir), None
    if scheduler.is_here():
        try:
            queue = scheduler.read_queue(one.job_id for one in read_submissions(run_dir))
        except UserError as error:  # the files alone tell most of it
            sys.stderr.write(f"{error}\n")
    return read_states(chain, queue)


def render(run_dir: Path, states: Sequence[TaskState]) -> str:
    """The page."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(
            f"the page needs jinja2 ({error}): run this where the stages' packages are, as jobs do."
        ) from None
    loader = jinja2.FileSystemLoader([REPOSITORY / folder for folder in TEMPLATE_FOLDERS])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "moment": moment}
    now = time.time()
    spans = [span(attempt, now) for state in states for attempt in state.attempts]
    policies = [policy for state in states for policy in read_policy(run_dir, state)]
    return environment.get_template("chain_report.html.j2").render(
        name=run_dir.name,
        run_dir=run_dir,
        now=now,
        verdict=verdict(states),
        began=min((began for began, _ in spans), default=None),
        ended=max((ended for _, ended in spans), default=None),
        node_s=sum(
            (ended - began) * len(attempt.nodes)
            for state in states
            for attempt in state.attempts
            for began, ended in [span(attempt, now)]
        ),
        ends=Counter(kind(attempt) for state in states for attempt in state.attempts),
        lanes=list(lanes(run_dir, states, now)),
        curves=list(curves(states)),
        policies=policies,
        best=best(policies),
    )


# --- what ran, where and when -------------------------------------------------------------------------------------


def verdict(states: Sequence[TaskState]) -> dict[str, str]:
    """Of the whole chain: a word, its colour, and which stage it is about."""
    words = [state.word for state in states]
    if all(word == "done" for word in words):
        return {"word": "finished", "kind": "done", "stage": ""}
    for word in (*IN_TROUBLE, "running", "waiting"):
        if word in words:
            stage = states[words.index(word)].job.stage
            return {"word": word, "kind": "failed" if word in IN_TROUBLE else "running", "stage": stage}
    stage = next(state.job.stage for state in states if state.word != "done")
    return {"word": "not finished", "kind": "running", "stage": stage}


def lanes(run_dir: Path, states: Sequence[TaskState], now: float) -> Iterator[dict[str, Any]]:
    """A row of the page for each task; the parts of a build share one."""
    for stage in dict.fromkeys(state.job.stage for state in states):
        of_stage = [state for state in states if state.job.stage == stage]
        if of_stage[0].job.pattern is None:
            for state in of_stage:
                yield lane(run_dir, [state], state.task.name if state.index else "", state.word, now)
        else:
            words = Counter(state.word for state in of_stage)
            word = "done" if set(words) == {"done"} else ", ".join(f"{n} {word}" for word, n in words.items())
            yield lane(run_dir, of_stage, f"{len(of_stage)} parts", word, now)


def lane(run_dir: Path, states: Sequence[TaskState], name: str, word: str, now: float) -> dict[str, Any]:
    first = states[0]
    attempts = [row(run_dir, state, attempt, now) for state in states for attempt in state.attempts]
    # Of many parts those are told that went wrong.
    told = attempts if len(states) == 1 else [one for one in attempts if one["kind"] != "done"]
    found = [(text, path) for text, path in results_of(run_dir, first) if path.exists()]
    kinds = {state.word for state in states}
    return {
        "stage": first.job.stage,
        "name": name,
        "word": word,
        "kind": "done" if kinds == {"done"} else "failed" if kinds & set(IN_TROUBLE) else "running",
        "attempts": attempts,
        "told": told[-MAX_ATTEMPTS:],
        "progress": progress(first.task.run_dir) if first.task.run_dir is not None else "",
        "links": [(text, path.relative_to(run_dir)) for text, path in found],
        "errors": last_errors(first) if first.word in IN_TROUBLE else "",
    }


def results_of(run_dir: Path, state: TaskState) -> Iterator[tuple[str, Path]]:
    """What a task leaves, by what it is called on the page."""
    if state.job.stage == "data":
        yield "the dataset's page", run_dir / "dataset" / REPORT
    if state.task.run_dir is not None:
        yield "model", state.task.run_dir / "export"
    if state.task.output is not None:
        yield "results.json", state.task.output / "results.json"
    yield "job.sbatch", (state.task.folder.parent if state.index else state.task.folder) / "job.sbatch"
    yield "batch.log", state.batch_log


def row(run_dir: Path, state: TaskState, attempt: Attempt, now: float) -> dict[str, Any]:
    began, ended = span(attempt, now)
    logs = state.task.folder / LOGS / attempt_name(attempt.number)
    links = [("rank 0", logs / "rank_0000.log"), ("launcher", logs / "launcher.log"), ("all", logs)]
    steps = ["" if step is None else f"{step:,}" for step in (attempt.first_step, attempt.step)]
    return {
        "number": attempt.number,
        "task": state.task.name,
        "kind": kind(attempt),
        "nodes": attempt.nodes,
        "began": began,
        "ended": ended,
        "steps": " to ".join(filter(None, steps)),
        "reason": attempt.reason.removeprefix(f"attempt {attempt.number} ").removeprefix("is "),
        "links": [(text, path.relative_to(run_dir)) for text, path in links if path.exists()],
    }


def kind(attempt: Attempt) -> str:
    """How it ended: done, stop (it saved, and goes on), failed, or running."""
    if attempt.verdict is None:
        return "running"
    if attempt.verdict == DONE:
        return "done"
    return "stop" if attempt.exit_code == EXIT_STOPPED else "failed"


def last_errors(state: TaskState) -> str:
    try:
        return (state.task.folder / ERRORS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def curves(states: Sequence[TaskState]) -> Iterator[LossCurve]:
    for state in states:
        if state.task.run_dir is not None:
            name = f"{state.job.stage}, {state.task.name}" if state.index else state.job.stage
            curve = loss_curve(name, state.task.run_dir, state.attempts)
            if curve is not None:
                yield curve


# --- what came out ------------------------------------------------------------------------------------------------


class Successes(BaseModel):
    """Of a row of an evaluation, on a task or on all of them."""

    successes: int
    episodes: int


class Rate(Successes):
    rate: float
    interval: tuple[float, float]


class ActionError(BaseModel):
    l1: float
    mse: float
    l1_normalised: float
    mse_normalised: float


class Evaluation(BaseModel):
    """What the page shows of a results.json."""

    success: dict[str, dict[str, Successes]] = {}
    pooled: dict[str, Rate] = {}
    action_error: dict[str, ActionError] = {}


@dataclass(frozen=True)
class Policy:
    name: str
    evaluation: Evaluation
    links: list[tuple[str, Path]]
    films: list[tuple[str, Path]]


def read_policy(run_dir: Path, state: TaskState) -> Iterator[Policy]:
    """None where its evaluation has not been, or is one that this page does not know."""
    if state.task.output is None:
        return
    try:
        evaluation = Evaluation.model_validate_json((state.task.output / "results.json").read_bytes())
    except (OSError, ValidationError):
        return
    name = state.task.name if state.index else "policy"
    beside = {"model": run_dir / "finetune" / state.task.output.relative_to(run_dir / "evaluate") / "export"}
    beside["results.json"] = state.task.output / "results.json"
    links = [(text, path.relative_to(run_dir)) for text, path in beside.items() if path.exists()]
    films = sorted(state.task.output.glob("films/*.mp4"))[:MAX_FILMS]
    yield Policy(name, evaluation, links, [(film.stem, film.relative_to(run_dir)) for film in films])


def best(policies: Sequence[Policy]) -> Policy | None:
    """By its rate of success, else by its error."""
    acting = [one for one in policies if "policy" in one.evaluation.pooled]
    predicting = [one for one in policies if "policy" in one.evaluation.action_error]
    if acting:
        return max(acting, key=lambda one: one.evaluation.pooled["policy"].rate)
    return min(predicting, key=lambda one: one.evaluation.action_error["policy"].l1_normalised, default=None)


# --- times --------------------------------------------------------------------------------------------------------


def span(attempt: Attempt, now: float) -> tuple[float, float]:
    """Seconds since 1970 at which it began and ended; one at work ends now."""
    began = seconds_of(attempt.began, now)
    return began, max(began, seconds_of(attempt.ended or "", now))


def seconds_of(text: str, otherwise: float) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return otherwise


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """As one would say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{math.floor(hours / 24)} d {hours % 24} h"


if __name__ == "__main__":
    run_command(main, ReportConfig, description=__doc__, positional="run_dir")
