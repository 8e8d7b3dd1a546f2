"""Torch on one thread, for many small operations.

Two reasons: sums on another number of threads are taken in another order and give other bytes, and on a busy machine
threads that wait for each other made small operations fourteen times slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
