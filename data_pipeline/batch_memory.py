"""The tensors of a batch, in one block of memory that is used again.

A reading process hands a batch over in shared memory. Each piece of it costs a connection between the two processes,
which takes as long as reading several samples: so a batch is one piece. And fresh memory costs a page fault for every
4 KiB, which takes longer than to write them: so a block is used again when nobody has a tensor in it any more.
"""

import math
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import get_worker_info

Kind = tuple[DTypeLike, tuple[int, ...]]
"""Type and shape of what a batch holds of one clip."""

ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of every number's size."""

MAX_BLOCKS = 8
"""A few are on their way, one or two in use; of whoever keeps more batches than that, the pool forgets the first."""

Block = UInt8[Tensor, "n"]
"""Its last byte says whether somebody may have a tensor in it: of shared memory, both processes see that."""


class MemoryPool:
    """The blocks that this process has made."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def take(self, num_bytes: int) -> Block:
        """One more byte than that."""
        block = next((one for one in self._blocks if len(one) == num_bytes + 1 and not one[-1]), None)
        if block is None:
            block = _new_block(num_bytes + 1)
            self._blocks = [*self._blocks, block][-MAX_BLOCKS:]
        block[-1] = True
        return block

    def __getstate__(self) -> dict[str, Any]:
        """A spawned process makes its own."""
        return {"_blocks": []}


def _new_block(num_bytes: int) -> Block:
    if get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))


class BatchMemory:
    """Room for `num_rows` clips, by name of the tensor. What has not been written may be anything."""

    def __init__(self, kinds: Mapping[str, Kind], num_rows: int, pool: MemoryPool) -> None:
        self._kinds, self._num_rows = dict(kinds), num_rows
        self._block = pool.take(sum(_aligned(self._num_bytes(kind)) for kind in kinds.values()))

    def rows(self) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        """To be written, before the memory is handed over."""
        return self._arrays(self._block.numpy())

    def hand_over(self) -> dict[str, Shaped[Tensor, "b ..."]]:
        """To be called once. When these tensors and all views of them have gone, the pool has its block back."""
        root = self._block.numpy()  # which they all keep
        weakref.finalize(root, _give_back, self._block, os.getpid()).atexit = False
        return {name: torch.from_numpy(rows) for name, rows in self._arrays(root).items()}

    def _arrays(self, block: UInt8[np.ndarray, "n"]) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        arrays, first = {}, 0
        for name, kind in self._kinds.items():
            num_bytes = self._num_bytes(kind)
            rows = block[first : first + num_bytes].view(kind[0])
            arrays[name] = rows.reshape(self._num_rows, *kind[1])
            first += _aligned(num_bytes)
        return arrays

    def _num_bytes(self, kind: Kind) -> int:
        return self._num_rows * math.prod(kind[1]) * np.dtype(kind[0]).itemsize


def _give_back(block: Block, process: int) -> None:
    if os.getpid() == process:  # a fork of it may have lost the tensors that it still has
        block[-1] = False


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def copy_same_shape(target: Shaped[Tensor, "..."], values: Shaped[Tensor, "..."]) -> None:
    """ValueError where the shapes differ: nothing is repeated until it fits."""
    if target.shape != values.shape:
        raise ValueError(f"its shape is {list(values.shape)}, but {list(target.shape)} is expected")
    target.copy_(values)
