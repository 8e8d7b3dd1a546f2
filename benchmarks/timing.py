"""Alternatives timed side by side: A B A B …, in processor seconds (other jobs count for neither) and on the wall."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping


def cpu_and_wall(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that this process and those it waited for spent on `work`."""
    cpu, wall = _cpu_s(), time.perf_counter()
    work()
    return _cpu_s() - cpu, time.perf_counter() - wall


def _cpu_s() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each, `repeats` times; a first round warms up and is not counted."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            timing = cpu_and_wall(work)
            if repeat:
                timings[name].append(timing)
    return timings


def median_ratio(above: list[tuple[float, float]], below: list[tuple[float, float]], which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(above, below, strict=True))


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201
