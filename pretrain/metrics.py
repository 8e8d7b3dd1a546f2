"""What a run measured: `metrics.jsonl`, always, and the line that a person watches.

A row is one JSON object with `step` and `split` ("train" or "validation"). Floats are written with all their digits,
so that two runs can be compared for equality; a number that is not finite becomes null, which keeps the file JSON.
"""

import errno
import json
import logging
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from configs.loader import UserError

from .trackers import TrackerName, Trackers, check_trackers

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to `metrics.jsonl`, and to the trackers; rank 0 writes, for the others it is silent.

    Opening it at a step drops the rows after that step, and the half line that a kill may have left: a resumed run
    takes those steps again, and its curve is the uninterrupted one.
    """

    def __init__(self, path: Path, resumed_step: int, is_main: bool, trackers: Sequence[TrackerName] = ()) -> None:
        self._path, self._is_main = path, is_main
        check_trackers(trackers)
        self._file: FileIO | None = None
        self.rewind(resumed_step)
        self._trackers = Trackers(trackers if is_main else (), path.parent, resumed_step)

    def write(self, row: Mapping[str, Any] | None) -> None:
        """Appends a row; None, for what could not be measured, writes nothing."""
        if self._file is None or row is None:
            return
        line = json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"
        try:
            num_written = self._file.write(line.encode())
        except OSError as error:
            raise _not_written(self._path, error) from None
        if num_written < len(line):  # what there was room for; the rest would not fit either
            raise _not_written(self._path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._trackers.write(row)

    def rewind(self, step: int) -> None:
        """Drops the rows after a step that a run goes back to."""
        if self._is_main:
            self._close_file()
            _truncate(self._path, step)
            # Without a buffer: a run that is killed keeps every row it logged, and a full disk is told where it is met.
            self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        self._close_file()
        self._trackers.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows in order, without a half-written last one."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is no row of metrics; restore the file or move it away.") from None
        rows.append(row)
    return rows


def _not_written(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror}); see to the disk's space and permissions, then start the same "
        "command again: it goes on from the newest checkpoint that is there."
    )


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepTimer:
    """Time per step, samples and work per second and the share of time spent waiting for data, since last read."""

    def __init__(self) -> None:
        self._own_s = 0.0
        self._forward_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured: call it after work that is not a step."""
        self._since = time.perf_counter()
        self._waited_s = 0.0
        self._steps = 0
        self._samples = 0
        self._work: Counter[str] = Counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """With which a step begins."""
        start = time.perf_counter()
        yield
        self._own_s = time.perf_counter() - start
        self._forward_events = []
        self._waited_s += self._own_s

    @contextmanager
    def computing_forward(self) -> Iterator[None]:
        start = time.perf_counter()
        # A GPU computes on after its calls have returned, so it keeps the time itself: nothing waits for it here.
        events = (_timed_event(), _timed_event()) if torch.cuda.is_initialized() else None
        if events is not None:
            events[0].record()
        yield
        if events is None:
            self._own_s += time.perf_counter() - start
        else:
            events[1].record()
            self._forward_events.append(events)

    def own_s(self) -> float:
        """Seconds that this step's data and forward passes took this rank, before it waited for any other.

        To be asked when the step is done. Where ranks share weights or sequences, they wait in the forward pass too.
        """
        return self._own_s + sum(first.elapsed_time(last) for first, last in self._forward_events) / 1e3

    def count_step(self, num_samples: int, work: Mapping[str, int] | None = None) -> None:
        """`work`: how much of what all ranks did in the step, such as tokens."""
        self._steps += 1
        self._samples += num_samples
        self._work.update(work or {})

    def read(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self._since
        row = {
            "step_s": elapsed_s / max(1, self._steps),
            "samples_per_s": self._samples / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
            **{f"{what}_per_s": amount / elapsed_s for what, amount in self._work.items()},
        }
        self.restart()
        return row


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def peak_memory() -> dict[str, float]:
    """Most memory this process has used so far, in gigabytes: resident in RAM and, where there is one, on its GPU."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return peaks


class Progress:
    """One line that renews itself on a terminal; elsewhere a log line."""

    def __init__(self, num_steps: int, is_main: bool) -> None:
        self.num_steps = num_steps
        self.is_main = is_main
        self._is_terminal = sys.stderr.isatty()

    def show(self, row: Mapping[str, Any]) -> None:
        if not self.is_main:
            return
        left_s = (self.num_steps - row["step"]) * row["step_s"]
        text = (
            f"step {row['step']}/{self.num_steps}  loss {row['loss']:.4f}  lr {row['lr']:.1e}  "
            f"{row['step_s']:.2f} s/step  {left_s / 60:.1f} min left"
        )
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        else:
            logger.info(text)

    def finish(self) -> None:
        if self.is_main and self._is_terminal:
            sys.stderr.write("\n")
