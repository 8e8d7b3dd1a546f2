"""Looks after the losses and gradient norms of a run: which are out of line, and what is to be done about them.

A value is out of line when it lies further above the median of those before it than `z_score` of their deviations
(1.4826 x the median absolute deviation, which is the standard deviation of a normal distribution; medians, so that one
spike does not hide the next). Only steps that were taken count as "before". What is not finite no engine ever applies.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from configs.loader import StrictConfig, UserError

from .engine import StepReport

MIN_HISTORY = 20
"""Steps before the spread of their values says anything."""

MIN_SPREAD = 0.01
"""Relative to the median: a run whose losses hardly vary is not to be stopped for a hair."""

NONE_AT_ALL = -1.0
"""As the largest gradient norm that may be applied."""


class GuardConfig(StrictConfig):
    """What happens to a step whose loss or gradient norm is far above those before it."""

    on_spike: Literal["log", "skip", "rewind", "stop"] = Field(
        "log",
        description="log: take the step all the same, and tell. skip: leave the weights as they are. rewind: go back "
        "to the last checkpoint, and on with the data behind the spike. stop: end the run",
    )
    z_score: float = Field(10.0, gt=0, description="robust deviations above the median that are out of line")
    window: int = Field(200, ge=MIN_HISTORY, le=100_000, description="steps that a step is compared with")
    max_in_a_row: int = Field(25, ge=1, description="steps in a row that could not be taken before the run is ended")
    max_rewinds: int = Field(5, ge=0, description="times that a run goes back before it is ended")


@dataclass(frozen=True)
class Trouble:
    """What was wrong with a step."""

    reason: Literal["not_finite", "loss_spike", "grad_norm_spike"]
    value: float
    limit: float

    def __str__(self) -> str:
        if self.reason == "not_finite":
            return "its gradients are not finite"
        return f"its {self.reason.removesuffix('_spike')} of {self.value:.4g} is above {self.limit:.4g}"


class Guard:
    """Keeps the values of the last steps that were taken. Its state is part of a checkpoint, so resuming is exact."""

    def __init__(self, config: GuardConfig, state: Mapping[str, Any]) -> None:
        self.config = config
        self._losses = deque(state.get("losses", ()), maxlen=config.window)
        self._grad_norms = deque(state.get("grad_norms", ()), maxlen=config.window)
        self._num_in_a_row = int(state.get("num_in_a_row", 0))

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_in_a_row": self._num_in_a_row,
        }

    def largest_norm(self, loss: float) -> float:
        """Of the gradient, with which a step of this loss, the mean over all ranks, is to be taken."""
        if self.config.on_spike == "log":
            return math.inf
        return NONE_AT_ALL if loss > self._limit(self._losses) else self._limit(self._grad_norms)

    def review(self, loss: float, report: StepReport) -> Trouble | None:
        """What was wrong with a step."""
        trouble = self._find_trouble(loss, report)
        if report.was_applied:
            self._losses.append(loss)
            self._grad_norms.append(report.grad_norm)
            self._num_in_a_row = 0
        else:
            self._num_in_a_row += 1
        return trouble

    def end_run_for(self, trouble: Trouble, step: int) -> None:
        """Raises a `UserError` where the run is to end for it."""
        if trouble.reason != "not_finite" and self.config.on_spike == "stop":
            raise UserError(
                f"Step {step}: {trouble}, and guard.on_spike=stop; look at the samples that events.jsonl names, then "
                "start the same command again to go on from the last checkpoint, with guard.on_spike=skip to leave "
                "them out."
            )
        if self._num_in_a_row >= self.config.max_in_a_row:
            raise UserError(
                f"Step {step}: {trouble}, and none of the last {self._num_in_a_row} steps could be taken "
                "(guard.max_in_a_row); look at the losses in metrics.jsonl, lower the learning rate or mend the data, "
                "and start again from an earlier checkpoint."
            )

    def wants_rewind(self, trouble: Trouble) -> bool:
        return self.config.on_spike == "rewind" and trouble.reason != "not_finite"  # that has left the weights alone

    def _find_trouble(self, loss: float, report: StepReport) -> Trouble | None:
        if not math.isfinite(report.grad_norm):
            return Trouble("not_finite", report.grad_norm, math.inf)
        for reason, value, values in (
            ("loss_spike", loss, self._losses),
            ("grad_norm_spike", report.grad_norm, self._grad_norms),
        ):
            limit = self._limit(values)
            if value > limit:
                return Trouble(reason, value, limit)  # type: ignore[arg-type]  # mypy widens the literals
        return None

    def _limit(self, values: deque[float]) -> float:
        """The line: infinite until there is enough to draw it from."""
        if len(values) < MIN_HISTORY:
            return math.inf
        middle = median(values)
        spread = 1.4826 * median(abs(value - middle) for value in values)
        return middle + self.config.z_score * max(spread, MIN_SPREAD * abs(middle))
