"""Torch on one thread, for many small operations.

Two reasons: sums on another number of threads are taken in another order and give other bytes, and on a busy machine
threads that wait for each other made small operations fourteen times slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    import torch  # seconds to import: not before there is work for it

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
