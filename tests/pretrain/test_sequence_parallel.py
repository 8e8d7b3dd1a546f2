"""How a sequence is split over ranks; that training is the same for it is shown in `test_engine.py`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from pretrain.engine.ranks import Ranks
from pretrain.engine.sequence_parallel import split_sequence
from pretrain.models.sequence import SplitsSequence, _layout


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
