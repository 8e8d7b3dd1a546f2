"""Ends a process that is stuck, and leaves its stacks behind.

Python's `faulthandler` does the work, in a thread that needs no lock of the interpreter's: so it also sees what hangs
in a collective or in a file system. Ranks wait for each other, so all of them end, each with its own stacks.
"""

import faulthandler
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

STACKS = "stacks"

T = TypeVar("T")


class Watchdog:
    """As long as it is entered: whoever has not called `alive` for so long is stuck, and ends with exit code 1."""

    def __init__(self, run_dir: Path, rank: int, stuck_after_s: float | None) -> None:
        self._path, self._stuck_after_s = run_dir / STACKS / f"rank_{rank:05d}_{os.getpid()}.txt", stuck_after_s

    def __enter__(self) -> Self:
        if self._stuck_after_s is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
        self.alive()
        return self

    def alive(self) -> None:
        """Begins to count anew."""
        if self._stuck_after_s is not None:
            faulthandler.dump_traceback_later(self._stuck_after_s, exit=True, file=self._file)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """The same, each a sign of life: for what takes longer than a step."""
        for item in items:
            self.alive()
            yield item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stuck_after_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink(missing_ok=True)
