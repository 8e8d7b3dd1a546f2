"""The attempts at a job, and whether there is to be another one: what the batch script asks before and after its work.

    number=$(python -m slurm.attempts begin FOLDER --run-dir RUN)          writes 001
    verdict=$(python -m slurm.attempts end FOLDER --exit-code $code)       writes done, requeue, stop or failed

`end` exits with what the batch script is to exit with: 0 done, 75 requeue, 93 stop, failed the code of the failure. The
rules: a command that stopped cleanly on a signal (75) is requeued, unless that happened twice in a row without progress
(93); a mistake in the input (2) is not; any other end is a failure, and requeued up to `--max-failures` times in a
row. Progress is a checkpoint further than all before it (with `--staging`, more finished records of a build): it resets
both counts, and so does a new submission. Where no progress can be seen, stops are counted as failures are.

Every attempt is two rows of FOLDER/attempts.jsonl. One that has no second row was lost with its node, or ended without
warning: a failure too, which the next `begin` notes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from .attempt_files import (
    BAD_INPUT,
    CLEAN_EXITS,
    DONE,
    ERRORS,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    FAILED,
    LEDGER,
    LOGS,
    PREFLIGHT,
    REQUEUE,
    STOP,
    Attempt,
    CommandError,
    Parser,
    append_row,
    attempt_name,
    attempt_numbers,
    check_folder,
    given_number,
    node_names,
    rank_rows,
    read_attempts,
    run,
    utc,
    whole_number,
    write_whole,
)
from .errors import error_page, first_cause

MAX_FAILURES = 3
MAX_STALLS = 1
"""Clean stops in a row without progress that are requeued: a job may be preempted just as it starts, but not for ever
be given less time than a checkpoint takes."""


@dataclass(frozen=True)
class Standing:
    """Where a job stands after some attempts."""

    best_step: int | None = None
    failures: int = 0  # in a row, without progress in between
    stalls: int = 0  # clean stops, likewise

    def after(self, exit_code: int | None, step: int | None) -> Standing:
        """After one more; `step` is None where progress cannot be seen."""
        is_further = step is not None and (self.best_step is None or step > self.best_step)
        is_stop = exit_code == EXIT_STOPPED
        return Standing(
            best_step=step if is_further else self.best_step,
            failures=(0 if is_further else self.failures) + (not is_stop and exit_code != 0),
            stalls=0 if is_further else self.stalls + is_stop,
        )


def judge(standing: Standing, exit_code: int | None, max_failures: int) -> str:
    """What is to be done after an attempt that ended so; `standing` counts it already."""
    if exit_code == 0:
        return DONE
    if exit_code == BAD_INPUT:
        return FAILED
    max_stalls = max_failures if standing.best_step is None else MAX_STALLS
    if exit_code == EXIT_NO_PROGRESS or standing.stalls > max_stalls:
        return STOP
    return FAILED if standing.failures > max_failures else REQUEUE


# --- the ledger ---------------------------------------------------------------------------------------------------


def standing_before(attempt: Attempt, attempts: list[Attempt]) -> Standing:
    """What counts for an attempt: those before it of the same submission, since somebody last had to look at it."""
    standing = Standing(best_step=None)
    for earlier in attempts:
        if earlier.job_id != attempt.job_id:
            continue
        if standing.best_step is None:
            standing = replace(standing, best_step=earlier.first_step)
        if earlier.number >= attempt.number:
            break
        standing = standing.after(earlier.exit_code, earlier.step)
        if earlier.verdict in (DONE, STOP, FAILED):  # and was requeued all the same, by hand
            standing = Standing(best_step=None)
    return standing


def progress(run_dir: Path | None, staging: Path | None) -> int | None:
    """How far a job is: a number that grows."""
    if run_dir is not None:
        return newest_step(run_dir)
    if staging is None:
        return None
    # Unlike rglob, walk does not mind that another task of the array tidies up meanwhile.
    return sum(name.endswith(".json") for _, _, names in os.walk(staging) for name in names)


def newest_step(run_dir: Path) -> int:
    """Of a run's newest complete checkpoint, 0 where it has none."""
    names = (path.parent.name for path in run_dir.glob("checkpoints/step_*/COMPLETE"))
    return max((whole_number(name.partition("_")[2]) or 0 for name in names), default=0)


def begin(folder: Path, run_dir: Path | None, staging: Path | None, max_failures: int, nodes: list[str]) -> int:
    """Notes that an attempt begins; gives its number. One before it that was lost is judged first."""
    folder.mkdir(parents=True, exist_ok=True)
    attempts = read_attempts(folder)
    job_id = job_id_in_environment()
    lost = _at_work(attempts, job_id)
    if lost is not None:
        ended = _close(folder, lost, attempts, None)
        if ended.verdict != REQUEUE:
            raise CommandError(f"{folder}: {ended.reason}", exit_code=1)
    # A kill may have cut the row of an attempt whose logs are there.
    number = 1 + max([attempt.number for attempt in attempts] + attempt_numbers(folder / LOGS), default=0)
    for kind in (LOGS, PREFLIGHT):
        (folder / kind / attempt_name(number)).mkdir(parents=True, exist_ok=True)
    row = {"event": "begin", "attempt": number, "time": utc(), "job_id": job_id, "nodes": nodes}
    row["restarts"] = whole_number(os.environ.get("SLURM_RESTART_COUNT", "0"))  # as scontrol counts them
    folders = {"run_dir": run_dir and str(run_dir), "staging": staging and str(staging)}
    append_row(folder / LEDGER, {**row, "max_failures": max_failures, **folders, "step": progress(run_dir, staging)})
    return number


def end(folder: Path, exit_code: int, cause: str = "") -> Attempt:
    """Notes that the attempt at work has ended, and judges it.

    Where the batch script knows the cause, because it ended the ranks itself, its exit code counts and not theirs.
    """
    attempts = read_attempts(folder)
    attempt = _at_work(attempts, job_id_in_environment())
    if attempt is None:
        raise CommandError(f"{folder}: no attempt of this job is at work there; `slurm.attempts begin` comes first.")
    if not cause:
        exit_code = command_exit_code(folder / LOGS / attempt_name(attempt.number), exit_code)
    return _close(folder, attempt, attempts, exit_code, cause)


def _at_work(attempts: list[Attempt], job_id: str) -> Attempt | None:
    """Those of another submission are not ours to close: it may have been cancelled, or wait for this one to end."""
    of_job = [attempt for attempt in attempts if attempt.job_id == job_id]
    return of_job[-1] if of_job and of_job[-1].verdict is None else None


def _close(folder: Path, attempt: Attempt, attempts: list[Attempt], exit_code: int | None, cause: str = "") -> Attempt:
    step = progress(attempt.run_dir, attempt.staging)
    standing = standing_before(attempt, attempts).after(exit_code, step)
    verdict = judge(standing, exit_code, attempt.max_failures)
    ended = replace(attempt, ended=utc(), exit_code=exit_code, step=step, verdict=verdict)
    if not cause and exit_code not in (0, EXIT_STOPPED):
        cause = first_cause(folder, ended)
    ended = replace(ended, reason=f"{_reason(ended, standing)} {cause}".strip())
    row = {"event": "end", "attempt": ended.number, "time": ended.ended, "exit_code": exit_code, "step": step}
    append_row(folder / LEDGER, {**row, "verdict": verdict, "reason": ended.reason})
    return ended


def _reason(attempt: Attempt, standing: Standing) -> str:
    at = "" if attempt.step is None else f" at {'step' if attempt.staging is None else 'record'} {attempt.step}"
    what = {
        None: f"was lost{at}: its node failed, or it was ended without warning",
        0: f"is done{at}",
        BAD_INPUT: f"ended{at} with a mistake in its input, which another attempt would not mend",
        EXIT_NO_PROGRESS: f"ended{at} and says itself that it makes no progress",
        EXIT_STOPPED: f"stopped cleanly{at}",
    }.get(attempt.exit_code, f"failed{at} with exit code {attempt.exit_code}")
    rest = ""
    if attempt.exit_code == EXIT_STOPPED and attempt.verdict == STOP:
        rest = (
            f", as {standing.stalls} times now without progress; give the job more time, or a longer lead between the "
            "signal and its end"
        )
    elif attempt.exit_code not in (0, BAD_INPUT, EXIT_NO_PROGRESS, EXIT_STOPPED):
        limit = "more than" if attempt.verdict == FAILED else "of at most"
        rest = f"; failure {standing.failures} in a row without progress, {limit} {attempt.max_failures}"
    return f"attempt {attempt.number} {what}{rest}."


# --- how a command ended ------------------------------------------------------------------------------------------


def command_exit_code(logs: Path, launcher_code: int) -> int:
    """Of the command that the ranks ran, of which a launcher's own code says little: torchrun's is 1 after any failure,
    srun's may be 0 when the job was cancelled.

    Ranks save together, so a stop is clean where all say so; a rank that failed or was killed has stopped the others.
    """
    codes = {row.get("exit_code") for row in rank_rows(logs)}
    for decisive in (BAD_INPUT, EXIT_NO_PROGRESS):
        if decisive in codes:
            return decisive
    if codes <= CLEAN_EXITS and codes - {0}:
        return EXIT_STOPPED
    return launcher_code or (0 if codes == {0} else 1)


def job_id_in_environment() -> str:
    """Stays the same when a job is requeued; a task of an array has its own."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


# --- commands -----------------------------------------------------------------------------------------------------


def main() -> int:
    given = command_line().parse_args()
    try:
        if given.command == "begin":
            nodes = node_names(given.nodes)
            number = begin(given.folder, given.run_dir, given.staging, given.max_failures, nodes)
            sys.stdout.write(f"{number:03d}\n")
            return 0
        check_folder(given.folder)
        ended = end(given.folder, given.exit_code, given.cause)
    except OSError as error:
        # What cannot be counted is not requeued: it might go round for ever.
        sys.stdout.write(f"{FAILED}\n" if given.command == "end" else "")
        raise CommandError(
            f"{error.filename or given.folder}: the attempt cannot be noted ({error.strerror}), so the job is not "
            "started again; see to the disk's space and permissions, then resubmit.",
            exit_code=1,
        ) from None
    sys.stdout.write(f"{ended.verdict}\n")
    sys.stderr.write(f"{ended.reason}\n")
    if ended.exit_code not in (0, EXIT_STOPPED):
        _write_errors(given.folder, ended)
    return {DONE: 0, REQUEUE: EXIT_STOPPED, STOP: EXIT_NO_PROGRESS}.get(ended.verdict or FAILED, ended.exit_code or 1)


def command_line() -> Parser:
    parser = Parser(prog="python -m slurm.attempts", description="Notes and judges the attempts at a job.")
    commands = parser.add_subparsers(dest="command", required=True)
    beginning = commands.add_parser("begin", help="an attempt begins; writes its number")
    beginning.add_argument("folder", type=Path, help="of the job: RUN_DIR/slurm/<stage>")
    beginning.add_argument("--run-dir", type=Path, help="folder of the training run, whose checkpoints are progress")
    beginning.add_argument("--staging", type=Path, help="folder where a build stages its work, which is progress")
    beginning.add_argument("--max-failures", type=given_number, default=MAX_FAILURES, help="in a row (%(default)s)")
    beginning.add_argument("--nodes", default="", help="names, with spaces or commas between them")
    ending = commands.add_parser("end", help="it has ended; writes done, requeue, stop or failed")
    ending.add_argument("folder", type=Path)
    ending.add_argument("--exit-code", type=_exit_code, required=True, help="of what launched the ranks")
    ending.add_argument("--cause", default="", help="a sentence, where the batch script has ended them and knows why")
    return parser


def _write_errors(folder: Path, attempt: Attempt) -> None:
    """A page that cannot be written is no reason to judge otherwise."""
    try:
        write_whole(folder / ERRORS, error_page(folder, attempt))
        sys.stderr.write(f"What went wrong is in {folder / ERRORS}.\n")
    except OSError as error:
        sys.stderr.write(f"{folder / ERRORS}: cannot be written ({error.strerror}).\n")


def _exit_code(text: str) -> int:
    code = whole_number(text)
    if code is None or code > 255:
        raise CommandError(f"command line: --exit-code {text!r} is none; give a number from 0 to 255.")
    return code


if __name__ == "__main__":
    run(main)
