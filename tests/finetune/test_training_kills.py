"""Training that is killed at any moment and started again: no sample is repeated, none skipped, and no loss differs.

The real commands with the real loader, DeepSpeed on two ranks with two reading processes each. What every step read is
noted just before it is taken.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from configs.loader import dump_config
from data_pipeline.datasets import Datasets
from data_pipeline.sample_order import Cursor
from data_pipeline.sample_plan import plan_samples
from finetune.train import FinetuneConfig
from pretrain.metrics import read_metrics
from pretrain.train import PretrainConfig, TrainConfig
from tests.data_pipeline.tiny_dataset import tiny_dataset

NUM_STEPS, CHECKPOINT_EVERY = 30, 3
STEPS_TO_KILL_IN = 6  # a run waits for its kill after these: it may not end before
VICTIMS = ("tree", "rank", "worker")
TIMINGS = {"step_s", "samples_per_s", "data_wait_share", "peak_memory_gb", "model_tflops_per_device"}
TIMINGS |= {"tokens_per_s", "model_flops_per_s", "hardware_flops_per_s", "slowest_rank_s", "median_rank_s"}
VIDEO = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6,
         "out_channels": 6, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1}  # fmt: skip

Steps = dict[int, list[str]]
"""Step -> the keys of its global batch."""


class Starter:
    """Runs of the training commands, one after the other."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("training_starter.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
        )  # fmt: skip

    def start(self, config: TrainConfig, notes: Path, num_ranks: int, last_step: int | None = None) -> list[int]:
        notes.mkdir()
        path = notes.with_suffix(".yaml")
        path.write_text(dump_config(config))
        module = "pretrain.train" if isinstance(config, PretrainConfig) else "finetune.train"
        order = {"module": module, "config": str(path), "notes": str(notes), "num_ranks": num_ranks}
        order["last_step"] = last_step
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def exit_codes(self) -> list[int]:
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        for process in psutil.Process(self._process.pid).children(recursive=True):  # of a test that has failed
            process.kill()
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("starter") / "log")
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "lab": tiny_dataset(folder / "lab", (9, 7, 6, 5, 4)),
        "barn": tiny_dataset(folder / "barn", (4, 3, 5), first_episode=30),
    }


def config_of(kind: type[TrainConfig], folders: dict[str, Path], run_dir: Path, **changes: Any) -> TrainConfig:
    weights = {"lab": {0: 1, 10: 3, 22: 0.2}, "barn": 1}
    settings = {
        "run_dir": run_dir, "num_steps": NUM_STEPS, "log_every": 1, "validate_every": 14, "validation_batches": 1,
        "checkpoint_every": CHECKPOINT_EVERY, "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3},
        "loader": {
            "dataset": folders, "text_length": 4, "global_batch_size": 6, "num_workers": 2,
            "mixture": {"by": "dataset", "weights": weights}, "shuffle": {"window_shards": 1},
        },
        "engine": {"kind": "deepspeed", "device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    return kind.model_validate(settings | changes)


# --- what was read ------------------------------------------------------------------------------------------------


def steps_taken(notes: Path) -> Steps:
    """Of one start, in their order: what all ranks that noted a step have read for it."""
    ranks = [path.read_text().splitlines(keepends=True) for path in sorted(notes.glob("rank_*.jsonl"))]
    taken: Steps = {}
    for lines in ranks:
        for row in (json.loads(line) for line in lines if line.endswith("\n")):
            taken.setdefault(row["step"], []).extend(row["keys"])
    return taken


def steps_on_paper(config: TrainConfig) -> Steps:
    datasets = Datasets.open(config.loader.addresses)
    plan = plan_samples(datasets, config.loader)
    assert plan is not None
    cursor, steps = Cursor(), {}
    for step in range(1, NUM_STEPS + 1):
        batch, cursor = plan.order.draw(cursor)
        found = (datasets.find(plan.positions[i][n]) for i, n in zip(batch.stream, batch.sample, strict=True))
        steps[step] = [datasets.by_name[name].key(position) for name, position in found]
    return steps


def check_epochs(steps: Steps, config: TrainConfig) -> None:
    """Of each dataset every training sample comes once before any comes twice."""
    drawn = [key for step in sorted(steps) for key in steps[step]]
    for index in Datasets.open(config.loader.addresses).by_name.values():
        samples = {index.key(i) for i in index.indices("train")}
        own = [key for key in drawn if key in samples]
        epochs = [own[start : start + len(samples)] for start in range(0, len(own), len(samples))]
        assert len(epochs) > 2 and all(set(epoch) == samples for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Every number that is not a measurement of time or memory."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


# --- killing ------------------------------------------------------------------------------------------------------


def wait_for_step(step: int, notes: Path, pids: list[int], log: Path) -> None:
    deadline = time.monotonic() + 120
    while max(steps_taken(notes), default=0) < step:
        assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids), log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no step {step} in two minutes"
        time.sleep(0.01)


def kill(victim: str, ranks: list[int]) -> None:
    """All of a run at once, or one of its processes: the others have to notice."""
    children = [one for rank in ranks for one in psutil.Process(rank).children()]
    # The oldest read what is trained on; those of a validation come and go.
    workers = [one.pid for one in sorted(children, key=psutil.Process.create_time)]
    chosen = {"tree": [*ranks, *workers], "rank": [random.choice(ranks)], "worker": [workers[0]]}[victim]
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


def run_with_kills(starter: Starter, config: TrainConfig, folder: Path, victims: list[str], num_ranks: int) -> None:
    """Starts the run until it is done; `folder` gets the notes of every start."""
    moments = sorted(random.sample(range(2, NUM_STEPS - 8), len(victims)))
    for number, (step, victim) in enumerate(zip(moments, victims, strict=True)):
        notes = folder / f"start_{number}"
        pids = starter.start(config, notes, num_ranks, step + STEPS_TO_KILL_IN)
        wait_for_step(step, notes, pids, starter.log)
        time.sleep(random.uniform(0, 0.1))  # in a step, while a checkpoint is written, while an old one is dropped
        kill(victim, pids)
        (notes / "killed").touch()
        assert 0 not in starter.exit_codes(), f"{victim} was killed in vain"
        assert not (config.run_dir / "export").exists()
    starter.start(config, folder / f"start_{len(victims)}", num_ranks)
    assert set(starter.exit_codes()) == {0}, starter.log.read_text()[-3000:]


def check_the_same_run(alone: TrainConfig, killed: TrainConfig, folder: Path) -> None:
    """`folder` holds what every start of the killed one noted."""
    expected = steps_on_paper(alone)
    starts = [steps_taken(notes) for notes in sorted(folder.glob("start_*/"))]
    for before, after in pairwise(starts):
        first = min(after)
        assert (first - 1) % CHECKPOINT_EVERY == 0 and first <= max(before) + 1  # from a checkpoint, and behind no gap
    for start in starts:
        steps = sorted(start)
        assert steps == list(range(steps[0], steps[-1] + 1))
        # The step in which it was killed may not have been noted by all ranks.
        assert {step: start[step] for step in steps[:-1]} == {step: expected[step] for step in steps[:-1]}
    lineage = {step: keys for start in starts for step, keys in start.items()}  # what a later start took again
    assert lineage == expected
    check_epochs(lineage, killed)
    assert curve(killed.run_dir) == curve(alone.run_dir)
    exported, same = (load_file(one.run_dir / "export" / "model.safetensors") for one in (killed, alone))
    assert all(torch.equal(exported[name], same[name]) for name in same)


@pytest.fixture(scope="module")
def pretrained(starter: Starter, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A run that is left alone."""
    folder = tmp_path_factory.mktemp("alone")
    config = config_of(PretrainConfig, folders, folder / "run", model={"video": VIDEO})
    starter.start(config, folder / "notes", 2)
    assert starter.exit_codes() == [0, 0], starter.log.read_text()[-3000:]
    assert steps_taken(folder / "notes") == steps_on_paper(config)
    return config


@pytest.mark.slow
@pytest.mark.timeout(600)  # it starts processes again and again, on a machine that may have other work
def test_pretraining_killed_again_and_again(
    starter: Starter, folders: dict[str, Path], pretrained: PretrainConfig, tmp_path: Path
) -> None:
    config = config_of(PretrainConfig, folders, tmp_path / "run", model={"video": VIDEO})
    run_with_kills(starter, config, tmp_path, random.sample(VICTIMS, len(VICTIMS)), 2)
    check_the_same_run(pretrained, config, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)  # it starts processes again and again, on a machine that may have other work
def test_fine_tuning_killed(
    starter: Starter, folders: dict[str, Path], pretrained: PretrainConfig, tmp_path: Path
) -> None:
    settings = {
        "pretrained": pretrained.run_dir / "export",
        "policy": {"action_expert": {"width": 16, "ffn_dim": 24, "freq_dim": 8}},
        "engine": {"kind": "accelerate", "device": "cpu", "precision": "fp32"},
    }
    alone, killed = (config_of(FinetuneConfig, folders, tmp_path / name, **settings) for name in ("alone", "killed"))
    starter.start(alone, tmp_path / "notes", 1)
    assert starter.exit_codes() == [0], starter.log.read_text()[-3000:]
    run_with_kills(starter, killed, tmp_path, ["tree"], 1)
    check_the_same_run(alone, killed, tmp_path)
