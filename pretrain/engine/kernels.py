"""Which attention kernel a run uses, where its config leaves that to the machine."""

import time
from typing import Literal

import torch

from configs.loader import UserError

from ..models.attention import SDPA_BACKENDS, AttentionBackend, attention
from .ranks import Ranks

HOPPER = (9, 0)  # compute capability from which cuDNN's attention is the fastest


def resolve_attention(
    requested: AttentionBackend | Literal["auto"], precision: Literal["bf16", "fp32"], ranks: Ranks
) -> AttentionBackend:
    """`auto` goes by the kind of GPU. On a CPU it is measured, on every rank; a run writes it down and keeps to it."""
    on_gpu = ranks.device.type == "cuda"
    if requested == "auto":
        if on_gpu:
            return _gpu_attention(precision, torch.cuda.get_device_capability(ranks.device))
        is_faster = precision == "bf16" and blockwise_is_faster()
        return "sdpa" if ranks.any(not is_faster) else "blockwise"
    allowed = ["auto", "sdpa", *(SDPA_BACKENDS if on_gpu else ("math", "blockwise"))]
    if requested not in allowed:
        raise UserError(
            f"engine.attention={requested} does not run on {ranks.device.type}; choose one of {', '.join(allowed)}."
        )
    return requested


def _gpu_attention(precision: Literal["bf16", "fp32"], capability: tuple[int, int]) -> AttentionBackend:
    if precision == "fp32":
        return "efficient"
    return "cudnn" if capability >= HOPPER else "flash"


def blockwise_is_faster() -> bool:
    """Whether our bf16 attention beats torch's on this processor, forward and backward, on a short sequence."""
    ours, theirs = zip(*[(_attention_s("blockwise"), _attention_s("sdpa")) for _ in range(5)], strict=True)
    return min(ours) < 0.9 * min(theirs)


def _attention_s(backend: AttentionBackend) -> float:
    """Processor seconds (what else runs on the machine does not count)."""
    query, key, value = (torch.ones(1, 256, 8, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    start = time.process_time()
    attention(query, key, value, backend=backend).sum().backward()
    return time.process_time() - start
