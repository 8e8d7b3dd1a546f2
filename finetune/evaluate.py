"""Measure a policy: closed loop in a simulator, or open loop on the held-out episodes of a dataset.

    python -m finetune.evaluate --checkpoint RUN/export --config configs/finetune/evaluate_demo.yaml

Writes `<output>/results.json` and, in closed loop, `<output>/films/*.mp4`; prints the table. Rows: the policy; `blind`,
the same policy with its image black; `bc`, behaviour cloning on the same data; `random` and the scripted `expert`.
Read a success rate against the blind row: an easy task is half solved without looking.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command
from pretrain.exported import load_model_config

from .baselines import BehaviourCloning
from .closed_loop import ClosedLoopConfig, Row, evaluate_closed_loop
from .open_loop import OPEN_LOOP_ROWS, OpenLoopConfig, evaluate_open_loop
from .policy import PolicyModelConfig

log = logging.getLogger(__name__)

RESULTS = "results.json"

DEFAULT_ROWS: dict[str, tuple[Row, ...]] = {
    "closed_loop": ("policy", "random", "blind", "bc", "expert"),
    "open_loop": ("policy", "blind"),
}


class EvaluateConfig(StrictConfig):
    mode: Literal["closed_loop", "open_loop"] = Field(
        "closed_loop", description="act, or compare with recorded actions"
    )
    checkpoint: Path | None = Field(None, description="folder of the policy; rows policy and blind need it")
    behaviour_cloning: Path | None = Field(None, description="folder of finetune.baselines; row bc needs it")
    rows: tuple[Row, ...] | None = Field(
        None, min_length=1, description="what to measure; null: all five, in open loop policy and blind"
    )
    output: Path = Field(description="folder for results.json and films; earlier results in it are replaced")
    closed_loop: ClosedLoopConfig = ClosedLoopConfig()
    open_loop: OpenLoopConfig = OpenLoopConfig()
    num_workers: int = Field(2, ge=1, description="processes, each on one core")


def main(config: EvaluateConfig) -> None:
    started = time.monotonic()
    rows = tuple(dict.fromkeys(config.rows or DEFAULT_ROWS[config.mode]))  # each once
    _check(config, rows)
    config.output.mkdir(parents=True, exist_ok=True)
    if config.mode == "closed_loop":
        results = evaluate_closed_loop(
            config.closed_loop,
            rows,
            config.checkpoint,
            config.behaviour_cloning,
            config.output / "films",
            config.num_workers,
        )
        table = closed_loop_table(results, rows)
    else:
        results = evaluate_open_loop(config.open_loop, rows, config.checkpoint, config.behaviour_cloning)
        table = open_loop_table(results)
    results |= {"config": config.model_dump(mode="json"), "seconds": round(time.monotonic() - started, 1)}
    unfinished = config.output / f".{RESULTS}"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(config.output / RESULTS)
    sys.stdout.write(f"{table}\n{config.output / RESULTS}\n")


def _check(config: EvaluateConfig, rows: tuple[Row, ...]) -> None:
    """Say what is missing before minutes are spent on the rows that are there."""
    unknown = [row for row in rows if config.mode == "open_loop" and row not in OPEN_LOOP_ROWS]
    if unknown:
        raise UserError(
            f"rows: {', '.join(unknown)} cannot be measured in open loop; choose {', '.join(OPEN_LOOP_ROWS)}."
        )
    for row, key in (("policy", "checkpoint"), ("blind", "checkpoint"), ("bc", "behaviour_cloning")):
        folder = getattr(config, key)
        if row in rows and folder is None:
            raise UserError(f"row {row!r} needs {key}=FOLDER: give it, or leave the row out of rows")
        if row in rows and not folder.is_dir():
            raise UserError(f"{key}={folder}: there is no such folder")
        if row in rows and key == "checkpoint":
            load_model_config(folder, PolicyModelConfig)
        elif row in rows:
            BehaviourCloning.load(folder)


def closed_loop_table(results: dict[str, Any], rows: tuple[Row, ...]) -> str:
    """Successes of episodes per task, and the pooled rate with its 95 % interval."""
    tasks = list(results["success"])
    width = max(len(task) for task in tasks) + 2
    lines = ["".join([f"{'':8}", *(f"{task:>{width}}" for task in tasks), f"{'pooled':>24}"])]
    for row in rows:
        cells = [results["success"][task][row] for task in tasks]
        counts = [f"{cell['successes']}/{cell['episodes']}".rjust(width) for cell in cells]
        pooled = results["pooled"][row]
        low, high = pooled["interval"]
        lines.append(f"{row:8}" + "".join(counts) + f"{pooled['rate']:>12.0%} ({low:>4.0%}-{high:>4.0%})")
    return "\n".join(lines)


def open_loop_table(results: dict[str, Any]) -> str:
    lines = [f"{'':18}{'L1':>12}{'MSE':>12}{'L1 normalised':>16}{'MSE normalised':>16}"]
    for row, errors in results["action_error"].items():
        numbers = f"{errors['l1']:>12.4g}{errors['mse']:>12.4g}"
        lines.append(f"{row:18}{numbers}{errors['l1_normalised']:>16.4g}{errors['mse_normalised']:>16.4g}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, EvaluateConfig, description=__doc__ or "")
