"""What happened to a run besides its steps: `events.jsonl`, a row each, which no resume ever cuts short."""

import json
import logging
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import distributed as dist

from configs.loader import UserError

from .guards import Trouble

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"
RESERVE, RESERVE_BYTES = ".reserve", 1 << 20
"""A file that is given up where the disk is full, so that there is room to say so."""

_LOST_CONTACT = ("closed by peer", "reset by peer", "timed out", "not connected", "broken pipe")
"""What gloo says, in plain RuntimeErrors, when another rank is gone."""


class LostRankError(UserError):
    """Another rank is gone. Not the input's fault, so the exit code is that of a failure."""

    exit_code = 1


class EventLog:
    """As long as it is entered: notes what begins, what goes wrong and how it ends, each rank for itself.

    A row has the time, rank, host and step, what happened, and its details. Noting is never the end of a run.
    """

    def __init__(self, run_dir: Path, rank: int, step: int, layout: str) -> None:
        self._path, self._rank, self._layout = run_dir / EVENTS, rank, layout
        self._reserve = run_dir / RESERVE
        self.step = step

    def note(self, event: str, **details: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"time": now, "rank": self._rank, "host": socket.gethostname(), "step": self.step, "event": event}
        line = json.dumps({**row, **details}, default=str) + "\n"
        try:
            try:
                self._append(line)
            except OSError:
                self._reserve.unlink()  # raises where it is gone as well
                self._append(line)
        except OSError as error:
            logger.warning("%s: %s; not noted: %s", self._path, error.strerror, event)

    def _append(self, line: str) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)  # one write: ranks do not mix theirs
        except OSError:
            os.truncate(self._path, size)  # half a line would spoil the file
            raise

    def _keep_reserve(self) -> None:
        try:
            with self._reserve.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            logger.warning("%s: %s", self._reserve, error.strerror)

    def trouble(self, trouble: Trouble, was_applied: bool, keys: Sequence[str]) -> None:
        """A step that was out of line, and the samples of this rank that were in it."""
        action = "taken all the same" if was_applied else "left out"
        logger.warning("step %d was %s: %s", self.step, action, trouble)
        details = {"value": trouble.value, "limit": trouble.limit, "was_applied": was_applied, "keys": list(keys)}
        self.note(trouble.reason, **{key: _plain(value) for key, value in details.items()})

    def straggler(self, own_s: float, median_s: float) -> None:
        """This rank was the slowest, before it waited for any other."""
        logger.warning(
            "step %d: rank %d on %s took %.2f s for its data and forward pass, the median is %.2f s",
            *(self.step, self._rank, socket.gethostname(), own_s, median_s),
        )
        self.note("straggler", own_s=own_s, median_s=median_s)

    def __enter__(self) -> Self:
        self._keep_reserve()
        self.note("started", layout=self._layout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._reserve.unlink(missing_ok=True)
            return
        said = (str(error).splitlines() or [""])[0]
        is_lost = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST_CONTACT)
        if not is_lost and not isinstance(error, dist.DistError):
            self.note("failed", error=f"{type(error).__name__}: {said}")
            return
        lost = LostRankError(
            f"rank {self._rank} on {socket.gethostname()} lost contact with the other ranks at step {self.step} "
            f"({said}): one of them has ended. Its own log, {self._path} and stacks/ beside it may say why; "
            "the same command goes on from the last checkpoint."
        )
        self.note("failed", error=str(lost))  # at once: a launcher that has seen the other rank end may end this one
        raise lost from error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
