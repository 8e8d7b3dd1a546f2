"""Memory of batches is used again, and never while anybody can still see what is in it."""

import os

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch_memory import MAX_BLOCKS, BatchMemory, MemoryPool

KINDS = {
    "numbers": (np.float32, (3, 5)),
    "is_valid": (np.bool_, ()),
    "nothing": (np.float32, (0, 2)),
    "words": (np.uint8, (7,)),
}
VIEWS = {
    "a tensor": lambda batch: batch["numbers"],
    "a row": lambda batch: batch["words"][1],
    "columns of a flat view": lambda batch: batch["numbers"].flatten(0, 1)[:, 1:3],
    "an array": lambda batch: batch["numbers"].numpy()[0],
}


def batch_of(number: int, pool: MemoryPool) -> dict[str, torch.Tensor]:
    memory = BatchMemory(KINDS, 4, pool)
    for rows in memory.rows().values():
        rows[...] = number
    return memory.hand_over()


def test_a_batch_is_one_piece_of_memory():
    batch = batch_of(1, MemoryPool())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "numbers": (torch.float32, (4, 3, 5)),
        "is_valid": (torch.bool, (4,)),
        "nothing": (torch.float32, (4, 0, 2)),
        "words": (torch.uint8, (4, 7)),
    }
    places = [tensor.data_ptr() for tensor in batch.values() if tensor.numel()]
    assert max(places) - min(places) < 4 * (60 + 1 + 7) + 4 * 64 and all(place % 4 == 0 for place in places)
    assert all((tensor == 1).all() and tensor.is_contiguous() for tensor in batch.values())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([None, *VIEWS]), st.integers(0, 9)), max_size=40))
def test_what_is_kept_stays_as_it_is(steps):
    """Of some batches a view is kept, and some views are dropped."""
    pool, kept = MemoryPool(), []
    for number, (view, dropped) in enumerate(steps):
        batch = batch_of(number, pool)
        if view is not None:
            kept.append((number, VIEWS[view](batch)))
        del batch
        del kept[dropped : dropped + 1]
        assert all((values == kept_number).all() for kept_number, values in kept)


def test_memory_is_used_again_when_nobody_sees_it():
    pool = MemoryPool()

    def place(batch):
        return batch["numbers"].data_ptr()

    assert len({place(batch_of(number, pool)) for number in range(20)}) == 1
    kept = [batch_of(number, pool) for number in range(2 * MAX_BLOCKS)]
    assert len(set(map(place, kept))) == len(kept) and len(pool._blocks) == MAX_BLOCKS
    last = place(kept.pop())
    assert place(batch_of(0, pool)) == last
    other = BatchMemory(KINDS, 5, pool).hand_over()
    assert place(other) != last and (kept[0]["numbers"] == 0).all()


def test_a_fork_gives_nothing_back():
    pool = MemoryPool()
    batch_of(0, pool)
    pool._blocks[0].share_memory_()  # so that what a fork writes is seen here
    batch = batch_of(1, pool)
    pid = os.fork()
    if not pid:
        del batch
        os._exit(0)
    os.waitpid(pid, 0)
    assert pool._blocks[0][-1] and (batch["numbers"] == 1).all()
