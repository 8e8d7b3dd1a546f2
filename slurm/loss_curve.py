"""The loss of a training over all its attempts, as points that a page can draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .attempt_files import EXIT_STOPPED, Attempt, finite, read_rows

WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 508, 22, 182
"""Of the plot in it."""

MAX_POINTS = 200  # of a line: a pixel or two each


@dataclass(frozen=True)
class Mark:
    """Where one attempt or several went on from."""

    x: float
    label: str
    kind: str  # of the end before: stop or failed


@dataclass(frozen=True)
class LossCurve:
    """In pixels of a WIDTH x HEIGHT picture, whose y grows downwards."""

    name: str
    line: str  # means, as SVG's points
    band: str  # smallest to largest
    held_out: list[tuple[float, float]]
    marks: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: float
    last_held_out: float | None


def loss_curve(name: str, run_dir: Path, attempts: Sequence[Attempt]) -> LossCurve | None:
    """None where there is no line to draw yet."""
    train, held_out = _losses(run_dir, "train"), _losses(run_dir, "validation")
    if len(train) < 2:
        return None
    number = min(len(train), MAX_POINTS)
    chunks = [train[i * len(train) // number : (i + 1) * len(train) // number] for i in range(number)]
    steps = [sum(step for step, _ in chunk) / len(chunk) for chunk in chunks]
    means = [sum(loss for _, loss in chunk) / len(chunk) for chunk in chunks]
    # What it falls from is not what one wants to see: it may leave the picture at the top.
    settled = means[len(means) // 20 :] + [loss for _, loss in held_out]
    low, largest = min(0.0, *settled), max(settled)
    high = largest + (0.1 * (largest - low) or 1.0)
    last_step = max(step for step, _ in train + held_out)

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last_step, 1)

    def y(loss: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (loss - low) / (high - low), 1)

    def points(losses: Sequence[float]) -> list[str]:
        return [f"{x(step)},{y(loss)}" for step, loss in zip(steps, losses, strict=True)]

    lows, highs = ([pick(loss for _, loss in chunk) for chunk in chunks] for pick in (min, max))
    return LossCurve(
        name=name,
        line=" ".join(points(means)),
        band=" ".join(points(lows) + points(highs)[::-1]),
        held_out=[(x(step), y(loss)) for step, loss in held_out],
        marks=[Mark(x(step), label, kind) for step, label, kind in _restarts(attempts) if step <= last_step],
        x_ticks=[(x(step), f"{step:,.0f}") for step in (0, last_step / 2, last_step)],
        y_ticks=[(y(loss), f"{loss:.3g}") for loss in (low, (low + largest) / 2, largest)],
        last=means[-1],
        last_held_out=held_out[-1][1] if held_out else None,
    )


def _losses(run_dir: Path, split: str) -> list[tuple[int, float]]:
    """By step; what is no number is left out."""
    try:
        rows = read_rows(run_dir / "metrics.jsonl")
    except OSError:
        return []
    pairs = ((finite(row.get("step")), finite(row.get("loss"))) for row in rows if row.get("split") == split)
    return [(int(step), loss) for step, loss in pairs if step is not None and step > 0 and loss is not None]


def _restarts(attempts: Sequence[Attempt]) -> list[tuple[int, str, str]]:
    """Step, which attempts went on from it, and how the one before them ended."""
    at: dict[int, list[int]] = {}
    kinds: dict[int, str] = {}
    for before, attempt in pairwise(attempts):
        if attempt.first_step is not None:
            at.setdefault(attempt.first_step, []).append(attempt.number)
            kinds.setdefault(attempt.first_step, "stop" if before.exit_code == EXIT_STOPPED else "failed")
    spans = {step: (min(numbers), max(numbers)) for step, numbers in at.items()}
    return [(step, str(a) if a == b else f"{a}–{b}", kinds[step]) for step, (a, b) in spans.items()]
