"""What went wrong in an attempt, on one page: the error that came first, what it did to others, the ends of the logs.

    python -m slurm.errors FOLDER [--attempt 3] [--lines 20]

FOLDER is that of a job, RUN_DIR/slurm/<stage>. One rank's failure ends all others, which then complain of each other:
what a rank says about itself comes first, whoever vanished without a word next, and who merely lost contact last.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .attempt_files import (
    ALL_REDUCE,
    CLEAN_EXITS,
    LEDGER,
    LOGS,
    PREFLIGHT,
    Attempt,
    CommandError,
    Parser,
    attempt_name,
    check_folder,
    given_number,
    preflight_rows,
    rank_rows,
    read_attempts,
    read_rows,
    run,
    utc,
    whole_number,
)

SPOKE, VANISHED, LOST_CONTACT = range(3)
TAIL_BYTES, TAIL_LINES, MAX_WIDTH = 64 * 1024, 20, 400
YEAR_3000 = 32_503_680_000

# In one's own words ("error: ..."), in the last line of a traceback whose head is cut off, of a dying interpreter.
_SENTENCE = re.compile(r"^(?:error: |Fatal Python error: |terminate called |.*\bCUDA error: )")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)(?::|$)")
# Of other ranks' ends. gloo, NCCL and the store say it in plain RuntimeErrors.
_OF_OTHERS = re.compile(r"lost contact with the other ranks|another rank|rank 0 says why|SignalException")
_OF_PEERS = re.compile(r"closed by peer|reset by peer|gloo|nccl|Dist\w*Error|TCPStore|Broken pipe", re.IGNORECASE)
_NOTICE = re.compile(
    r"oom.?kill|out of memory|killed|terminated|node.?fail|time limit|preempt|cancelled|disk quota|no space|unable to|"
    r"cannot|fatal|\berror:",
    re.IGNORECASE,
)
_STEP = re.compile(r"\b[Ss]tep (\d{1,18})\b")
_SHARD = re.compile(r"[^\s'\"(),;]+\.tar\b")
_DEAD_PROCESS = re.compile(r"exitcode\s*: -(\d+) \(pid: (\d+)\)")
_WAITED_FOR = re.compile(r"Unable to shutdown process (\d+) via")
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_UNKNOWN = "without a word, for want of memory, with its node, or because another rank had failed"


@dataclass(frozen=True)
class Ending:
    """How a rank ended that did not end well."""

    rank: int
    host: str
    kind: int  # SPOKE, VANISHED or LOST_CONTACT
    time: float
    step: int | None
    shard: str | None
    sentence: str
    log: Path


def error_page(folder: Path, attempt: Attempt, num_lines: int = TAIL_LINES) -> str:
    """The page of an attempt at the job of this folder."""
    logs = folder / LOGS / attempt_name(attempt.number)
    nodes = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
    parts = [f"{folder}, attempt {attempt.number}{nodes}, begun {attempt.began}", attempt.reason]
    problems = _unfit(folder, attempt)
    parts += _section("before it started", problems)
    endings = find_endings(logs, attempt)
    if endings:
        first, *rest = _alike(endings)
        parts += _section("first", [_describe(first), f"  its log is {endings[0].log}"])
        parts += _section("then", [_describe(group) for group in rest])
    others = [path for path in sorted(logs.glob("*.log")) if not path.name.startswith("rank_")]
    notices = [line for path in others for line in last_lines(path) if _NOTICE.search(line)]
    parts += _section("the launcher and SLURM say", list(dict.fromkeys(notices))[:num_lines])
    if not (problems or endings or notices):
        parts.append("Nothing in its logs looks like an error.")
    for path in [endings[0].log] if endings else []:
        parts += _section(f"the end of {path}", last_lines(path)[-num_lines:])
    for path in others:  # whose tracebacks are of launchers: they say nothing of the command
        parts += _section(
            f"the end of {path}", [line for line in last_lines(path) if not line[0].isspace()][-num_lines:]
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def first_cause(folder: Path, attempt: Attempt) -> str:
    """The page in a sentence; nothing where nobody has said anything for himself."""
    endings = find_endings(folder / LOGS / attempt_name(attempt.number), attempt)
    said = [f"{_who([one])}: {one.sentence.removeprefix('error: ')}" for one in endings[:1] if one.kind == SPOKE]
    return next(iter([*_unfit(folder, attempt), *said]), "")


def _unfit(folder: Path, attempt: Attempt) -> list[str]:
    checks = preflight_rows(folder / PREFLIGHT / attempt_name(attempt.number))
    problems = [(name, node, problem) for node, row in checks.items() for name, problem in row["problems"].items()]
    ordered = sorted(problems, key=lambda item: item[0] == ALL_REDUCE)
    return [f"{node}: {problem}" for _, node, problem in ordered]


def find_endings(logs: Path, attempt: Attempt) -> list[Ending]:
    """Of the ranks that did not end well, the likeliest cause first."""
    rows = {row["rank"]: row for row in rank_rows(logs)}
    for path in logs.glob("rank_*.log"):  # a rank that was gone before it could note where it is
        number = whole_number(path.stem.partition("_")[2])
        if number is not None:
            rows.setdefault(number, {"rank": number})
    failures = _failures(attempt)
    fates = _fates(logs / "launcher.log")
    endings = [
        _ending(logs, row, failures.get(rank, {}), attempt.run_dir, fates)
        for rank, row in rows.items()
        if row.get("exit_code") not in CLEAN_EXITS
    ]
    steps = [ending.step for ending in endings if ending.step is not None]
    if steps:  # ranks go in step: where others were is where the one was that cannot say so any more
        endings = [ending if ending.step is not None else replace(ending, step=max(steps)) for ending in endings]
    return sorted(endings, key=lambda ending: (ending.kind, ending.time, ending.rank))


def _failures(attempt: Attempt) -> dict[int, dict[str, Any]]:
    """By rank, what the run itself has noted of its failures during the attempt."""
    if attempt.run_dir is None:
        return {}
    rows = (row for row in read_rows(attempt.run_dir / "events.jsonl") if row.get("event") == "failed")
    of_attempt = (row for row in rows if attempt.began <= str(row.get("time")) <= (attempt.ended or "9999"))
    return {row["rank"]: row for row in of_attempt if isinstance(row.get("rank"), int)}


def _ending(
    logs: Path, row: dict[str, Any], failure: dict[str, Any], run_dir: Path | None, fates: dict[int, str]
) -> Ending:
    log = logs / f"rank_{row['rank']:04d}.log"
    lines = last_lines(log)
    said = _said(lines)
    kind = SPOKE
    if said is None and isinstance(failure.get("error"), str):
        said = failure["error"]
    if said is None:
        said, kind = _unsaid(row, run_dir, fates)
    elif _OF_OTHERS.search(said) or (not said.startswith("error: ") and _OF_PEERS.search(said)):
        kind = LOST_CONTACT
    steps = _STEP.findall(said) or [failure.get("step")] * ("step" in failure)
    steps = steps or [step for line in lines for step in _STEP.findall(line)][-1:]
    shard = _SHARD.search(said)
    return Ending(
        rank=row["rank"],
        host=str(row.get("host") or failure.get("host") or "an unknown node"),
        kind=kind,
        time=_time(row, log),
        step=whole_number(str(steps[0])) if steps else None,
        shard=shard.group() if shard else None,
        sentence=said,
        log=log,
    )


def _said(lines: Sequence[str]) -> str | None:
    """The last error in a log: in a chain of exceptions, it is the one that ended the process."""
    said, is_traceback = None, False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            is_traceback = True
        elif (is_traceback and not line[0].isspace()) or _SENTENCE.match(line) or _EXCEPTION.match(line):
            said, is_traceback = line, False
    return said


def _unsaid(row: dict[str, Any], run_dir: Path | None, fates: dict[int, str]) -> tuple[str, int]:
    """Of a rank whose log has no error."""
    pid, code = row.get("pid"), row.get("exit_code")
    if run_dir is not None and isinstance(pid, int):
        for stacks in run_dir.glob(f"stacks/rank_*_{pid}.txt"):
            if _size(stacks):
                return f"was stuck, and has left its stacks in {stacks}", VANISHED
    if isinstance(code, int):
        return f"ended with exit code {code} and without an error message", SPOKE
    return fates.get(pid if isinstance(pid, int) else -1, f"was killed {_UNKNOWN}"), VANISHED


def _fates(launcher_log: Path) -> dict[int, str]:
    """By process id, what torchrun saw become of a rank."""
    fates: dict[int, str] = {}
    for line in last_lines(launcher_log):
        died, waited_for = _DEAD_PROCESS.search(line), _WAITED_FOR.search(line)
        if died:
            fates.setdefault(int(died.group(2)), f"was killed by signal {died.group(1)} {_UNKNOWN}")
        if waited_for:
            fates[int(waited_for.group(1))] = "did not end in time when it was asked to, so it was killed"
    return fates


# --- the page -----------------------------------------------------------------------------------------------------


def _describe(group: Sequence[Ending]) -> str:
    first = group[0]
    when = f"last heard of {utc(first.time)}" if first.kind == VANISHED else utc(first.time)
    return f"{_who(group)}, {when}\n    {first.sentence}"


def _who(group: Sequence[Ending]) -> str:
    """Ranks, nodes, and the step and the shard of the first."""
    first = group[0]
    ranks = "rank" if len(group) == 1 else f"{len(group)} ranks:"
    hosts = ", ".join(dict.fromkeys(ending.host for ending in group))
    step = "" if first.step is None else f" at step {first.step}"
    shard = "" if first.shard is None else f", reading {first.shard}"
    return f"{ranks} {_ranges(ending.rank for ending in group)} on {hosts}{step}{shard}"


def _alike(endings: Iterable[Ending]) -> list[list[Ending]]:
    """Ranks that say the same but for numbers and names of nodes: there may be hundreds."""
    groups: dict[tuple[int, str], list[Ending]] = {}
    for ending in endings:
        pattern = re.sub(r"\d+", "#", ending.sentence.replace(ending.host, "NODE"))
        groups.setdefault((ending.kind, pattern), []).append(ending)
    return list(groups.values())


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join([f"{title}:", *(f"  {line}" for line in lines)])] if lines else []


def last_lines(path: Path) -> list[str]:
    """The last lines of a log, as they would be read on a terminal."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = (_UNPRINTABLE.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in text.split("\n"))
    return [line if len(line) <= MAX_WIDTH else f"{line[:MAX_WIDTH]} …" for line in lines if line]


def _time(row: dict[str, Any], log: Path) -> float:
    """When it ended; of a rank that was killed, when it last wrote something."""
    ended = row.get("ended")
    if isinstance(ended, (int, float)) and 0 <= ended < YEAR_3000:  # no NaN either
        return float(ended)
    try:
        return log.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- command ------------------------------------------------------------------------------------------------------


def main() -> int:
    given = command_line().parse_args()
    check_folder(given.folder)
    try:
        attempts = {attempt.number: attempt for attempt in read_attempts(given.folder)}
    except OSError as error:
        raise CommandError(f"{error.filename}: cannot be read ({error.strerror}); see to its permissions.") from None
    if not attempts:
        tasks = sorted(path.parent.name for path in given.folder.glob(f"*/{LEDGER}"))
        where = f"of one of its tasks: {', '.join(tasks)}" if tasks else "of a job, RUN_DIR/slurm/<stage>"
        raise CommandError(f"{given.folder}: no attempt has begun there; give the folder {where}.")
    number = max(attempts) if given.attempt is None else given.attempt
    if number not in attempts:
        raise CommandError(f"{given.folder}: has no attempt {number}; its attempts are {_ranges(attempts)}.")
    sys.stdout.write(error_page(given.folder, attempts[number], max(1, given.lines)))
    return 0


def command_line() -> Parser:
    parser = Parser(prog="python -m slurm.errors", description="What went wrong in an attempt at a job, on one page.")
    parser.add_argument("folder", type=Path, help="of the job: RUN_DIR/slurm/<stage>")
    parser.add_argument("--attempt", type=given_number, help="its number; the last one where none is given")
    parser.add_argument("--lines", type=given_number, default=TAIL_LINES, help="of each log (%(default)s)")
    return parser


if __name__ == "__main__":
    run(main)
