"""Chains small enough for tests, on a cluster of tests/slurm/cluster.py, and what happens to them there."""

import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from slurm.attempt_files import Attempt, attempt_name, rank_rows, read_attempts

REPOSITORY = Path(__file__).resolve().parents[2]
tiny = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/tiny_dataset.py")))

HELD, HELD_BY = "trackers=[wandb]", REPOSITORY / "tests/slurm/held"

NUM_STEPS, BATCH = 400, 4
DEEPSPEED = {"kind": "deepspeed", "zero_stage": 1, "device": "cpu", "precision": "fp32"}
ACCELERATE = {"kind": "accelerate", "device": "cpu", "precision": "fp32"}  # starts sooner
TRAINING = {
    "num_steps": NUM_STEPS,
    "checkpoint_every": 25,
    "validate_every": NUM_STEPS,
    "validation_batches": 1,
    "log_every": 1,
    "engine": ACCELERATE,
    "model": {
        "prediction": "data",
        "video": {
            "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6,
            "out_channels": 6, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
        },
    },
}  # fmt: skip


def write_training(folder: Path, dataset: Path, **changes: Any) -> Path:
    """The config of a pretraining run of a few hundred steps, each of some hundredths of a second: it may be over
    before a test looks again, unless it is HELD."""
    loader = {"dataset": str(dataset), "global_batch_size": BATCH, "text_length": 4}
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "alone"), "loader": loader, **TRAINING, **changes}))
    return path


def write_chain(cluster: Any, folder: Path, held_at: Sequence[int] = (), **stages: dict[str, Any]) -> Path:
    """A chain into folder/run; a training with the override HELD waits in each attempt, see `held/wandb.py`."""
    scratch = cluster.folder / "scratch"  # Ray's sockets bear no long path
    held = f'export PYTHONPATH={HELD_BY}\nexport HELD_AT="{" ".join(map(str, held_at))}"\n'
    (folder / "env.sh").write_text(f"SCRATCH={scratch}\n{held}")
    chain = {"run_dir": str(folder / "run"), "env": str(folder / "env.sh"), "stages": stages}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(chain))
    return path


def write_dataset(folder: Path) -> Path:
    return tiny.tiny_dataset(folder / "dataset", clips=(4, 4, 3, 3, 3))


def submit(cluster: Any, chain: Path) -> dict[str, str]:
    """By the command that users type; the id of each stage's job."""
    cluster.run(sys.executable, "-m", "slurm.submit", "--config", chain)
    jobs = json.loads((chain.parent / "run" / "jobs.json").read_text())["jobs"]
    return {job["stage"]: job["job_id"] for job in jobs}


def rows_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """What a run computed at each step that it has logged, without what it measured of time and memory."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing, or there twice"
    return {row["step"]: {key: row[key] for key in ("loss", "grad_norm", "samples_seen")} for row in rows}


class WatchedTask:
    """A task of a chain's job that trains."""

    def __init__(self, cluster: Any, job_id: str, folder: Path, run_dir: Path) -> None:
        self.cluster, self.job_id, self.folder, self.run_dir = cluster, job_id, folder, run_dir

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.folder)

    def wait_for_step(self, step: int, attempt: int) -> None:
        def is_there() -> bool:
            attempts = self.attempts
            assert len(attempts) <= attempt, f"an attempt too many: {attempts[-2].reason}\n{self.describe()}"
            ended = [one.reason for one in attempts[attempt - 1 :] if one.verdict is not None]
            assert not ended, f"{ended}\n{self.describe()}"
            return len(attempts) == attempt and max(rows_by_step(self.run_dir), default=0) >= step

        self.wait_until(is_there, f"step {step} in attempt {attempt}")

    def wait_for_rank(self, rank: int, attempt: int) -> None:
        """Until it is at work."""
        self.wait_until(lambda: rank in self._ranks(attempt), f"rank {rank} of attempt {attempt}")

    @property
    def num_signals(self) -> int:
        """That the batch script has passed on."""
        log = self.folder / "batch.log"
        return log.read_text().count("USR2: the job is to end") if log.exists() else 0

    def wait_for_signal(self, number: int) -> None:
        self.wait_until(lambda: self.num_signals >= number, f"SLURM's signal number {number}")

    def wait_for_end(self, *states: str) -> dict[str, str]:
        """The job, once it has ended in one of these states."""
        self.wait_until(lambda: self.cluster.job(self.job_id)["JobState"] in states, f"the job to be {states}")
        return self.cluster.job(self.job_id)

    def wait_until(self, condition: Any, what: str) -> None:
        try:
            self.cluster.wait_until(condition, what, timeout_s=240)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None

    def signal_rank(self, rank: int, number: signal.Signals, attempt: int) -> None:
        os.kill(self._ranks(attempt)[rank]["pid"], number)

    def signal_before_limit(self) -> None:
        """What SLURM does some time before a job's end."""
        self.cluster.run("scancel", "--signal=USR2", "--batch", self.job_id)

    def describe(self) -> str:
        """The ends of all its logs: for messages."""
        logs = [*self.folder.glob("batch*.log"), *self.folder.glob("attempts.jsonl"), *self.folder.glob("logs/*/*.log")]
        texts = (f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(logs))
        return "\n".join(texts)

    def _ranks(self, attempt: int) -> dict[int, dict[str, Any]]:
        return {row["rank"]: row for row in rank_rows(self.folder / "logs" / attempt_name(attempt))}


def pretraining(cluster: Any, chain: Path, job_id: str) -> WatchedTask:
    run_dir = chain.parent / "run"
    return WatchedTask(cluster, job_id, run_dir / "slurm" / "pretrain", run_dir / "pretrain")
