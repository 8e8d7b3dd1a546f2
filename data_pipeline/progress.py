"""How far long work is."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def track(
    results: Iterable[T], total: int, stage: str, num_clips: Callable[[T], int], every_s: float = 10.0
) -> Iterator[T]:
    """Passes results on and tells how far they are: a moving line on a terminal, now and then a log line elsewhere."""
    started = told = time.monotonic()
    on_terminal = sys.stderr.isatty()
    clips = 0
    for done, result in enumerate(results, 1):
        clips += num_clips(result)
        now = time.monotonic()
        is_last = done == total
        if is_last or now - told > (0.2 if on_terminal else every_s):
            told = now
            rate = f", {clips / (now - started):.1f} clips/s" if clips else ""
            left = (
                f", {(now - started) / done * (total - done):.0f} s left" if not is_last else f", {now - started:.0f} s"
            )
            line = f"{stage}: {done} of {total}{rate}{left}"
            if on_terminal:
                sys.stderr.write(f"\r\033[K{line}" + "\n" * is_last)
                sys.stderr.flush()
            else:
                logger.info(line)
        yield result
