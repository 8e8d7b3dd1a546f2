"""Who this process is among the ranks, its device, its number format, and the few collectives that a loop needs."""

import atexit
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs.loader import UserError

from .shards import share

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank calls it with the same keys."""
        # nccl has no CPU tensors, so the numbers travel on the device; float64 keeps a float's every digit.
        numbers = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return dict(zip(sorted(values), (numbers / self.world_size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        vote = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. For small things: it travels as bytes."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_shares(self, tensors: Iterable[Tensor]) -> None:
        """Completes tensors that every rank holds whole, and of which each has written its `share` alone."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            flat = tensor.detach().view(-1)
            num = share(len(flat), 0, self.world_size)[1]
            start, own = share(len(flat), self.rank, self.world_size)
            parts = flat.new_zeros(self.world_size, num)
            parts[self.rank, :own] = flat[start : start + own]
            dist.all_gather(list(parts.unbind()), parts[self.rank].clone())
            flat.copy_(parts.view(-1)[: len(flat)])

    def barrier(self) -> None:
        self.any(False)  # unlike dist.barrier, needs no device ids and warns on no backend


def join_ranks(device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> Ranks:
    """Joins the process group that torchrun's environment describes, or one of a single process without torchrun.

    The group lives as long as the process: DeepSpeed keeps references to it, so leaving it and joining another breaks.
    """
    chosen = _choose_device(device)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # no port is opened for a process on its own
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        if backend == "gloo":
            # Or its threads outlive the interpreter and abort the process, most of the time, with exit code 134.
            atexit.register(leave_ranks)
    return Ranks(dist.get_rank(), dist.get_world_size(), _local_rank(), chosen)


def leave_ranks(destroy: Callable[[], None] = dist.destroy_process_group) -> None:
    """As the last thing a process does. Groups that are taken apart while the interpreter ends abort the process: their
    threads may still need it. So they are taken apart before, and one that somebody goes on holding never is."""
    if not dist.is_initialized():
        return
    world = dist.group.WORLD
    destroy()
    time.sleep(0.1)  # for threads that have tensors to let go of, which needs the interpreter
    if sys.getrefcount(world) > 2:  # more than this variable, and the argument of the call
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(world))


def resolve_precision(precision: Literal["auto", "bf16", "fp32"], ranks: Ranks) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 where it is the faster one on every rank.

    On a CPU that is measured, so the answer may change from start to start: a run writes it down and keeps to it.
    """
    if precision != "auto":
        return precision
    return "fp32" if ranks.any(not bf16_is_faster(ranks.device)) else "bf16"


def bf16_is_faster(device: torch.device) -> bool:
    """Whether matrix products in bf16 are worth the casts of autocast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this: get_cpu_capability() stops at "AVX512", which is not enough.
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    # The instructions alone say little: with AVX512-BF16, bf16 is five times faster than fp32 on some processors and
    # half as fast on others (those made for AMX, where a virtual machine hides the AMX).
    fp32_s, bf16_s = zip(*[(_matmul_s(torch.float32), _matmul_s(torch.bfloat16)) for _ in range(5)], strict=True)
    return min(fp32_s) > 1.3 * min(bf16_s)


def _matmul_s(dtype: torch.dtype) -> float:
    """Processor seconds (what else runs on the machine does not count) of one product of 1024x1024 matrices."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    start = time.process_time()
    torch.mm(a, b)
    return time.process_time() - start


def _choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no CUDA device here; set engine.device to auto or cpu.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if _local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"local rank {_local_rank()} has no GPU: this machine shows {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()}."
        )
    torch.cuda.set_device(_local_rank())
    return torch.device("cuda", _local_rank())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
