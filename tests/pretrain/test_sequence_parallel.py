"""A sequence on several ranks gives the gradients of a sequence on one, under every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from pretrain.engine.ranks import Ranks
from pretrain.engine.sequence_parallel import split_sequence
from pretrain.models.sequence import SplitsSequence, _layout

SCRIPT = Path(__file__).with_name("sequence_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_engine_and_split_takes_the_step_of_one_process(world_size: int, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    command = [*TORCHRUN, "--nproc-per-node", str(world_size), str(SCRIPT), str(out), str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(out.read_text())
    splits = [size for size in (1, 2, 4) if size <= world_size]
    engines = ("zero1", "zero2", "zero3", "ddp", "fsdp2")
    assert seen.keys() == {f"{name}/{size}" for name in engines for size in splits} | {
        "joint",
        "full",
        "selective",
        "bf16",
    }
    bf16 = seen.pop("bf16")
    assert 1e-4 < bf16["loss"] < 0.1 and bf16["weights"] < 0.01  # autocast was on, and changed little
    wrong = {name: worst for name, worst in seen.items() if max(worst.values()) > 1e-5}
    assert not wrong  # gradient norms are about 5, losses about 2, and a step moves weights by about 0.01


@given(groups=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), size=st.integers(2, 5))
def test_every_token_has_a_slot_and_every_rank_as_many(groups: list[tuple[int, int]], size: int) -> None:
    """Groups of (tokens per row, rows)."""
    counts = tuple((length * rows, rows) for length, rows in groups)
    slots, order = _layout(counts, size)
    assert np.array_equal(slots[order], np.arange(sum(count for count, _ in counts)))
    assert len(slots) == size * sum(-(-length // size) * rows for length, rows in groups)


class Network(SplitsSequence):
    heads = 6


@pytest.mark.parametrize(
    ("module", "world_size", "size", "message"),
    [
        (torch.nn.Linear(2, 2), 4, 2, "=2, but this model has no token sequence to split; set it to 1"),
        (Network(), 4, 3, r"=3 does not divide the 4 rank\(s\) of this run"),
        (Network(), 8, 4, "=4 does not divide the 6 attention heads"),
    ],
)
def test_a_split_that_cannot_be_is_refused(module: torch.nn.Module, world_size: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=rf"engine\.sequence_parallel{message}"):
        split_sequence(module, Ranks(0, world_size, 0, torch.device("cpu")), size, timeout_s=1)
