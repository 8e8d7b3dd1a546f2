"""What the attempts at a job leave in its folder, and how that is written and read.

    FOLDER/                     RUN_DIR/slurm/<stage>, with a folder more for each task of an array
      attempts.jsonl            a row where an attempt begins and one where it ends (`slurm.attempts`)
      logs/attempt_001/         rank_0003.log; rank_0003.json, where that rank ran and how it ended; launcher.log
      preflight/attempt_001/    a row per node (`slurm.preflight`)
      errors.txt                the last failure on one page (`slurm.errors`)

A batch script works with these outside the container of its job, where Python may be the system's: this file and the
commands that use it need nothing but the standard library of Python 3.9.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

LEDGER, ERRORS, REPORT = "attempts.jsonl", "errors.txt", "report.html"
LOGS, PREFLIGHT = "logs", "preflight"
ALL_REDUCE = "all_reduce"  # what goes wrong with it may be another node's fault
DONE, REQUEUE, STOP, FAILED = "done", "requeue", "stop", "failed"
BAD_INPUT, EXIT_STOPPED, EXIT_NO_PROGRESS, EXIT_INTERRUPTED = 2, 75, 93, 130
BEYOND_REASON = 10**18
CLEAN_EXITS = frozenset({0, EXIT_STOPPED, EXIT_INTERRUPTED})


class CommandError(Exception):
    """Its text is one sentence for the user; the command prints it and exits with its code."""

    def __init__(self, sentence: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one sentence, as every command here does."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"command line: {message}; see --help.")


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its code."""
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may be no UTF-8, and terminals may speak another code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except CommandError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        code = error.exit_code
    except BrokenPipeError:  # as after `| head`; the interpreter flushes once more when it exits, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def check_folder(path: Path) -> None:
    """A path that is not there is mostly a misspelt one."""
    if not path.is_dir():
        raise CommandError(f"{path}: {'is a file' if path.exists() else 'no such folder'}; give the folder of a job.")


def given_number(text: str) -> int:
    """Of the command line."""
    number = whole_number(text)
    if number is None:
        raise CommandError(f"command line: {text!r} is not a whole number; give one from 0 on.")
    return number


# --- files --------------------------------------------------------------------------------------------------------


def read_rows(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, or of its end; none where there is no file. What a kill has cut short is no row."""
    try:
        with path.open("rb") as file:
            start = 0 if tail_bytes is None else max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.split("\n")[bool(start) :]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """At once and to the disk: the next thing that happens may be the end of this node."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        is_cut = False
        if end:
            file.seek(end - 1)
            is_cut = file.read(1) != b"\n"
        file.write(b"\n" * is_cut + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """A small file that is there whole or not at all."""
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def utc(seconds: float | None = None) -> str:
    """A moment (now, where none is given) as `pretrain.events` writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


def whole_number(text: str) -> int | None:
    """From 0 on; None where the text is anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


# --- attempts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """As the ledger has it. What has not happened yet is None."""

    number: int
    job_id: str
    nodes: tuple[str, ...]
    run_dir: Path | None
    staging: Path | None
    max_failures: int
    began: str
    first_step: int | None  # progress when it began: the newest checkpoint's step, or records; None: it cannot be seen
    ended: str | None = None
    exit_code: int | None = None  # None also for an attempt that was lost
    step: int | None = None  # progress when it ended
    verdict: str | None = None  # None: it is at work, or was lost and is not noted yet
    reason: str = ""


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts at a job, over all its submissions; none where it has not begun."""
    attempts: dict[int, Attempt] = {}
    for row in read_rows(folder / LEDGER):
        number, nodes = row.get("attempt"), row.get("nodes")
        if not isinstance(number, int):
            continue
        if row.get("event") == "begin":
            attempts[number] = Attempt(
                number=number,
                job_id=str(row.get("job_id", "")),
                nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
                run_dir=_path(row.get("run_dir")),
                staging=_path(row.get("staging")),
                max_failures=_integer(row.get("max_failures")) or 0,
                began=str(row.get("time", "")),
                first_step=_integer(row.get("step")),
            )
        elif row.get("event") == "end" and number in attempts:
            attempts[number] = replace(
                attempts[number],
                ended=str(row.get("time", "")),
                exit_code=_integer(row.get("exit_code")),
                step=_integer(row.get("step")),
                verdict=str(row.get("verdict", FAILED)),
                reason=str(row.get("reason", "")),
            )
    return [attempts[number] for number in sorted(attempts)]


def attempt_name(number: int) -> str:
    """Of an attempt's folders."""
    return f"attempt_{number:03d}"


def attempt_numbers(folder: Path) -> list[int]:
    """Of the attempts that have a folder in `folder`, ascending."""
    numbers = (whole_number(path.name.partition("_")[2]) for path in folder.glob("attempt_*"))
    return sorted(number for number in numbers if number is not None)


def rank_rows(logs: Path) -> list[dict[str, Any]]:
    """How the ranks of an attempt ended, in their order: what `slurm.rank` has noted, without what cannot be read."""
    rows = [row for path in logs.glob("rank_*.json") for row in read_rows(path)[:1] if isinstance(row.get("rank"), int)]
    readable = [{**row, "exit_code": _integer(row.get("exit_code"))} for row in rows]
    return sorted(readable, key=lambda row: row["rank"])


def preflight_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """By node, what `slurm.preflight` has noted before an attempt; `problems` is a sentence for each failed check."""
    rows = {path.stem: row for path in sorted(folder.glob("*.json")) for row in read_rows(path)[:1]}
    return {node: row for node, row in rows.items() if isinstance(row.get("problems"), dict)}


def node_names(text: str) -> list[str]:
    """Of a list with spaces or commas between them."""
    return text.replace(",", " ").split()


def finite(value: Any) -> float | None:
    """A value of a row that one can reckon with; None where it is anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < BEYOND_REASON else None  # no NaN either


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and "\0" not in value else None
