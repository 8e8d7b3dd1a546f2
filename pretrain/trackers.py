"""Where a person may watch a run, beside metrics.jsonl, which has it all: TensorBoard and Weights & Biases.

What one of them cannot do never ends a run.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from configs.loader import UserError

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb"]

Numbers = Mapping[str, float]
"""`<split>/<name>` of what a row has in numbers."""


class Tracker(Protocol):
    def write(self, step: int, numbers: Numbers) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run_dir/tensorboard`; those of a resumed run hide the steps that it takes again."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=10)

    def write(self, step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder, however often it is started; account, project and mode come from W&B's variables."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        import wandb

        path = run_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        self._run: Any = wandb.init(dir=run_dir, id=path.read_text().strip(), name=run_dir.name, resume="allow")
        # W&B drops rows whose own step is not above the last one, as those of steps taken again are.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Numbers) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[TrackerName, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """A `UserError` where one of them is not installed; each package is named as its tracker."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"trackers has {name}, but the package {name} is not installed; pip install {name}, or leave it out: "
                "metrics.jsonl is always written."
            )


class Trackers:
    """Opened by the main rank alone. What fails is warned of once per tracker."""

    def __init__(self, names: Sequence[TrackerName], run_dir: Path, resumed_step: int) -> None:
        self._opened: dict[TrackerName, Tracker] = {}
        self._warned: set[TrackerName] = set()
        for name in names:
            with self._never_fatal(name):
                self._opened[name] = TRACKERS[name](run_dir, resumed_step)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, tracker in self._opened.items():
            with self._never_fatal(name):
                tracker.write(row["step"], _numbers(row))

    def close(self) -> None:
        for name, tracker in self._opened.items():
            with self._never_fatal(name):
                tracker.close()

    @contextmanager
    def _never_fatal(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a network or a disk comes up with
            if name not in self._warned:
                logger.warning(
                    "%s does not get all of this run (%s: %s); metrics.jsonl has it", name, type(error).__name__, error
                )
            self._warned.add(name)


def _numbers(row: Mapping[str, Any]) -> Numbers:
    named = {f"{row['split']}/{key}": value for key, value in row.items() if key != "step"}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
