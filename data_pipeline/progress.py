"""How far long work is."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

T = TypeVar("T")


def track(
    results: Iterable[T],
    total: int,
    stage: str,
    num_clips: Callable[[T], int],
    *,
    unit: str = "episodes",
    clip_s: float = 0.0,
    every_s: float = 10.0,
) -> Iterator[T]:
    """Passes results on and tells how far they are: a bar on a terminal, a log line now and then elsewhere.

    `num_clips` counts the clips of a result, `clip_s` is how much video each of them is.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    console = Console(stderr=True)
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty())
    started = told = time.monotonic()
    clips = 0
    with bar:
        task = bar.add_task(f"{stage} {unit}", total=total, speed="")
        for done, result in enumerate(results, 1):
            clips += num_clips(result)
            now = time.monotonic()
            speed = _speed(clips, now - started, clip_s)
            bar.update(task, completed=done, speed=speed)
            if bar.disable and (done == total or now - told > every_s):
                told = now
                left = (now - started) / done * (total - done)
                rest = f"{left:.0f} s left" if done < total else f"{now - started:.0f} s"
                logger.info("%s: %d of %d %s, %s%s", stage, done, total, unit, f"{speed}, " if speed else "", rest)
            yield result


def _speed(clips: int, seconds: float, clip_s: float) -> str:
    if not clips or seconds <= 0:
        return ""
    per_s = clips / seconds
    return f"{per_s:.1f} clips/s" + (f", {per_s * clip_s:.2g} video-hours/hour" if clip_s else "")
