"""How soon a training goes on after SLURM has ended it, and what is left of the time where that happens often.

    python -m benchmarks.slurm [--dataset PATH] [--every-s 300] [--interruptions signal kill kill]
    python tests/slurm/cluster.py .venv/bin/python -m benchmarks.slurm     on a SLURM of two nodes on this machine

signal  what comes before a time limit and before a preemption: the ranks save together, the job requeues itself
kill    the ranks are killed, as where memory runs out: the steps since the last checkpoint are lost

One pretraining job, ended every so many seconds. Its goodput is the share of all the time that went into steps which
it has in the end. Part of an interruption is SLURM's own: a requeued job waits some seconds, and then for its nodes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from slurm.attempt_files import attempt_name, rank_rows, read_attempts, read_rows

from .timing import say

DEMO = Path("runs/demo/dataset")
TIMEOUT_S = 900


@dataclass(frozen=True)
class Interruption:
    """Seconds from its beginning on."""

    kind: str
    saved: float | None  # the checkpoint is complete; None where none was written
    began: float  # the next attempt's batch script is at work
    ranks: float  # its first rank has started
    training: float  # it has taken a step
    lost_steps: int  # which were taken twice


class Run:
    """A pretraining job that goes on until it is cancelled."""

    def __init__(self, folder: Path, dataset: Path, config: Path, overrides: Sequence[str], stage: dict[str, Any]):
        self.folder, self.run_dir = folder / "run" / "slurm" / "pretrain", folder / "run" / "pretrain"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "env.sh").write_text(f"SCRATCH={folder.absolute()}/scratch\n")
        given = [f"loader.dataset={dataset}", "num_steps=10000000", "optimizer.decay_steps=1000", "log_every=1"]
        pretrain = {"config": str(config), "overrides": [*given, *overrides], "time": "04:00:00", **stage}
        chain = {"run_dir": str(folder / "run"), "env": str(folder / "env.sh"), "stages": {"pretrain": pretrain}}
        (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
        _call(sys.executable, "-m", "slurm.submit", "--config", str(folder / "chain.yaml"))
        (job,) = json.loads((folder / "run" / "jobs.json").read_text())["jobs"]
        self.job_id = str(job["job_id"])

    def steps(self) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.run_dir / "metrics.jsonl") if row.get("split") == "train"]

    def wait_for_attempt(self, attempt: int) -> None:
        def has_begun() -> bool:
            attempts = read_attempts(self.folder)
            ended = [one.reason for one in attempts if one.verdict not in (None, "requeue")]
            if ended:
                raise SystemExit(f"the run has ended: {ended[0]} See {self.folder}/errors.txt.")
            return len(attempts) >= attempt

        _wait(has_begun, f"attempt {attempt}")

    def wait_for_step(self, attempt: int) -> None:
        """Until an attempt has taken one."""

        def has_trained() -> bool:
            self.wait_for_attempt(attempt)
            starts = [row for row in read_rows(self.run_dir / "events.jsonl") if row.get("event") == "started"]
            if sum(row["rank"] == 0 for row in starts) < attempt:  # until then the log is the one of the attempt before
                return False
            steps = self.steps()
            return bool(steps) and steps[-1]["step"] > self._first_step(attempt)

        _wait(has_trained, f"a step of attempt {attempt}")

    def interrupt(self, kind: str, attempt: int) -> Interruption:
        before, start = self.steps()[-1]["step"], time.time()
        if kind == "signal":
            _call("scancel", "--signal=USR2", "--batch", self.job_id)
        else:
            steps = _call("squeue", "--noheader", "--steps", f"--jobs={self.job_id}", "--format=%i").split()
            ranks = [step for step in steps if step.rpartition(".")[2].isdigit()]  # and not the batch script
            _call("scancel", "--signal=KILL", *ranks)
        self.wait_for_attempt(attempt + 1)
        began = datetime.fromisoformat(read_attempts(self.folder)[attempt].began).timestamp() - start  # whole seconds
        self.wait_for_step(attempt + 1)
        training = time.time() - start
        first = self._first_step(attempt + 1)
        complete = self.run_dir / "checkpoints" / f"step_{first:08d}" / "COMPLETE"
        saved = complete.stat().st_mtime - start
        ranks_started = rank_rows(self.folder / "logs" / attempt_name(attempt + 1))[0]["started"]
        return Interruption(
            kind=kind,
            saved=saved if saved > 0 else None,
            began=began,
            ranks=ranks_started - start,
            training=training,
            lost_steps=max(0, before - first),
        )

    def _first_step(self, attempt: int) -> int:
        return read_attempts(self.folder)[attempt - 1].first_step or 0


def goodput(run: Run, wall_s: float) -> dict[str, float]:
    """The share of the time that went into steps which the run has in the end."""
    steps = run.steps()
    step_s = [row["step_s"] for row in steps]
    return {"steps": len(steps), "step_s": statistics.median(step_s), "wall_s": wall_s, "goodput": sum(step_s) / wall_s}


def measure(run: Run, kinds: Sequence[str], every_s: float) -> dict[str, Any]:
    """An interruption every so many seconds, the first after so many of training; until the last is over."""
    run.wait_for_step(attempt=1)
    started = time.monotonic()
    interruptions = []
    for number, kind in enumerate(kinds, start=1):
        time.sleep(max(0.0, started + number * every_s - time.monotonic()))
        interruptions.append(run.interrupt(kind, attempt=number))
        say(_row(interruptions[-1]))
    return {"every_s": every_s, "interruptions": interruptions, **goodput(run, time.monotonic() - started)}


# --- output -------------------------------------------------------------------------------------------------------

HEADER = "| interruption | checkpoint complete | next attempt begins | ranks start | training again | steps lost |"


def _row(one: Interruption) -> str:
    moments = ("—" if value is None else f"{value:.1f} s" for value in (one.saved, one.began, one.ranks, one.training))
    return "| " + " | ".join([one.kind, *moments, str(one.lost_steps)]) + " |"


# --- calling ------------------------------------------------------------------------------------------------------


def _call(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {process.stderr.strip()}")
    return process.stdout


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {TIMEOUT_S} s for {what}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DEMO)
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/demo.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_slurm"))
    parser.add_argument("--interruptions", nargs="+", choices=("signal", "kill"), default=["signal", "kill", "signal"])
    parser.add_argument("--every-s", type=float, default=300)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--launcher", choices=("torchrun", "srun"), default="torchrun")
    parser.add_argument("--no-preflight", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value for pretrain.train")
    given = parser.parse_args()
    stage = {"nodes": given.nodes, "launcher": given.launcher, "preflight": not given.no_preflight, "lead_s": 60}
    run = Run(given.folder, given.dataset, given.config, given.overrides, stage)
    try:
        say(HEADER + "\n|" + "---|" * HEADER.count(" |"))
        result = measure(run, given.interruptions, given.every_s)
    finally:
        _call("scancel", run.job_id)
    say(
        f"\ngoodput {result['goodput']:.1%}: {result['steps']} steps of {result['step_s']:.3f} s in "
        f"{result['wall_s']:.0f} s, ended every {given.every_s:.0f} s"
    )
    result["interruptions"] = [asdict(one) for one in result["interruptions"]]
    (given.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
