"""Where a chain stands: stage by stage what waits, works or has ended, how far it is, and where its logs are.

python -m slurm.status RUN_DIR
"""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command
from configs.yaml_text import parse_yaml

from . import scheduler
from .attempt_files import ERRORS, LOGS, REPORT, attempt_name, finite, read_rows
from .errors import last_lines
from .jobs import TaskState, read_chain, read_states, read_submissions

TAIL_BYTES = 1 << 16  # of metrics.jsonl: enough for its last rows


class StatusConfig(StrictConfig):
    """Which chain."""

    run_dir: Path = Field(description="of the chain")


def main(config: StatusConfig) -> int:
    chain = read_chain(config.run_dir)
    submissions, queue = read_submissions(chain.run_dir), None
    try:
        queue = scheduler.read_queue(one.job_id for one in submissions)
    except UserError as error:  # the files alone tell most of it
        sys.stdout.write(f"{error}\n")
    states = read_states(chain, queue)
    sys.stdout.write("\n".join(report(chain.run_dir, states)) + "\n")
    if (chain.run_dir / REPORT).is_file():
        sys.stdout.write(f"on one page: {chain.run_dir / REPORT}\n")
    return 0


def report(run_dir: Path, states: Sequence[TaskState]) -> Iterator[str]:
    """A line for each task, and below it what there is to know or to do; the parts of a build are counted together."""
    for stage in dict.fromkeys(state.job.stage for state in states):
        of_stage = [state for state in states if state.job.stage == stage]
        if of_stage[0].job.pattern is not None:
            words = Counter(state.word for state in of_stage)
            counts = ", ".join(f"{number} {word}" for word, number in words.items())
            yield f"{stage:9} {counts} of {len(of_stage)} parts"
            of_stage = [state for state in of_stage if state.word in ("running", "failed", "stopped", "lost")]
        for state in of_stage:
            yield f"{stage:9} {'  '.join(filter(None, columns(state)))}"
            yield from (f"{'':9}   {line}" for line in details(state))
    if any(state.word in ("failed", "stopped", "lost", "cancelled", "not submitted") for state in states):
        yield f"\nto go on after a fix: python -m slurm.resubmit {shlex.quote(str(run_dir))}"


def columns(state: TaskState) -> Iterator[str]:
    name = f"{state.task.name} " if state.index else ""
    job = f"job {state.submission.job_id}{f'_{state.index}' if state.index else ''}" if state.submission else ""
    yield f"{name}{state.word}"
    yield job
    if state.queued is not None and state.word == "waiting":
        yield f"for {state.queued.reason}"
    elif state.queued is not None:
        yield f"on {state.queued.nodes}, {state.queued.time_left} left"
    if state.attempts:
        yield f"attempt {state.attempts[-1].number}"
    if state.task.run_dir is not None:
        yield progress(state.task.run_dir)
    if state.task.output is not None and state.is_done:
        yield outcome(state.task.output / "results.json")


def details(state: TaskState) -> Iterator[str]:
    """Why it ended, and where its logs are."""
    if state.word == "cancelled" and not state.of_this_job:
        said = last_line(state)
        yield f"it never began: {f'{state.batch_log} ends with' if said else 'cancelled, or what it waits for failed'}"
        yield from filter(None, [said])
        return
    if not state.attempts:
        return
    last = state.attempts[-1]
    if state.word in ("failed", "stopped", "lost", "cancelled"):
        if last.reason:
            yield last.reason
        errors = state.task.folder / ERRORS
        if errors.is_file():
            yield f"errors: {errors}"
    if state.word != "done":
        yield f"logs: {state.task.folder / LOGS / attempt_name(last.number)}"


def last_line(state: TaskState) -> str:
    """Of what the batch script of this submission said; nothing where it was never started."""
    if state.submission is None:
        return ""
    try:
        written = datetime.fromtimestamp(state.batch_log.stat().st_mtime, UTC).isoformat()
    except OSError:
        return ""
    return next(reversed(last_lines(state.batch_log)), "") if written >= state.submission.submitted else ""


# --- what came out ------------------------------------------------------------------------------------------------


def outcome(results: Path) -> str:
    """How the policy did, in a few words."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        if "pooled" in found:
            low, high = found["pooled"]["policy"]["interval"]
            return f"success {found['pooled']['policy']['rate']:.0%} ({low:.0%} to {high:.0%})"
        return f"action error {found['action_error']['policy']['l1_normalised']:.4g} (L1, normalised)"
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        # Other rows were asked for, or another evaluation wrote it.
        return f"see {results}" if results.is_file() else ""


# --- how far a training is ----------------------------------------------------------------------------------------


def progress(run_dir: Path) -> str:
    """Steps, the newest losses and what is left at the newest pace; nothing where it has not begun."""
    rows = last_rows(run_dir / "metrics.jsonl")
    train = next((row for row in reversed(rows) if row.get("split") == "train"), None)
    if train is None:
        return ""
    losses = (row for row in reversed(rows) if row.get("split") == "validation" and "loss" in row)
    held_out: dict[str, Any] = next(losses, {})
    num_steps, step_s = settled_steps(run_dir / "config.yaml"), finite(train.get("step_s"))
    parts = [f"step {train['step']}" + (f" of {num_steps}" if num_steps else "")]
    for name, loss in (("loss", finite(train.get("loss"))), ("held-out loss", finite(held_out.get("loss")))):
        if loss is not None:
            parts.append(f"{name} {loss:.4f}")
    left_s = (num_steps - train["step"]) * step_s if num_steps and step_s else 0
    if left_s > 0:
        parts.append(f"{left_s / 3600:.1f} h to go" if left_s > 5400 else f"{left_s / 60:.0f} min to go")
    return ", ".join(parts)


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The end of a file of metrics, however long it is."""
    try:
        return [row for row in read_rows(path, TAIL_BYTES) if isinstance(finite(row.get("step")), int)]
    except OSError:
        return []


def settled_steps(path: Path) -> int | None:
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    steps = settings.get("num_steps") if isinstance(settings, dict) else None
    return steps if isinstance(finite(steps), int) else None


if __name__ == "__main__":
    run_command(main, StatusConfig, description=__doc__, positional="run_dir")
