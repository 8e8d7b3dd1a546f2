"""The accelerate engine: one process, DDP, or FSDP2; the same losses as DeepSpeed's up to rounding."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.execution import blocks_of
from .base import Engine, EngineConfig, StepReport, T
from .optimizer import OptimizerConfig, build_optimizer, set_learning_rate
from .shards import STEP, Shard, share


class AccelerateEngine(Engine):
    def __init__(self, config: EngineConfig, module: nn.Module, optimizer_config: OptimizerConfig) -> None:
        super().__init__(config, module)
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.config = config
        self.is_sharded = config.sharding == "fsdp2"
        self._blocks: list[Any] = []
        self.max_grad_norm = optimizer_config.max_grad_norm or float("inf")  # inf: measured, never scaled
        self._accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            gradient_accumulation_steps=config.grad_accum_steps,
            # A batch without action labels leaves the action layers without gradients.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if self.is_sharded:
            self._blocks = _shard(self._hooked, self.device, self.world_size)
            self._reshard_blocks_after_forward(config.reshard_after_forward)
        if self.is_empty:
            module.to_empty(device=self.device)
        if self.is_sharded:
            self._model: Any = self._hooked
        else:
            self._model = self._accelerator.prepare_model(self._hooked)
        self._optimizer = build_optimizer(optimizer_config, self.module)  # after sharding, which replaces parameters

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        # Gradients travel between ranks in the last backward pass of a step only; DDP decides that in its forward.
        is_last = self._micro_step == self.grad_accum_steps - 1
        if self.is_sharded:
            self._model.set_requires_gradient_sync(is_last)
        elif isinstance(self._model, nn.parallel.DistributedDataParallel):
            self._model.require_backward_grad_sync = is_last
        # Not accelerate's: its precision is one for all engines that a process ever has.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._model(function, *args, **kwargs)

    def backward(self, total: Tensor) -> None:
        self._accelerator.backward(total)  # divides by the number of micro-batches
        self._micro_step += 1

    def step(self, learning_rate: float, largest_norm: float = math.inf) -> StepReport:
        self._expect_whole_step()
        set_learning_rate(self._optimizer, learning_rate)
        # The norm is over all ranks' gradients, so that all of them see the same number and skip together.
        norm: Any = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        grad_norm = float(norm.full_tensor() if self.is_sharded else norm)
        is_finite = math.isfinite(grad_norm)
        is_applied = is_finite and grad_norm <= largest_norm
        if is_applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm if is_finite else math.inf, is_applied, learning_rate)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._reshard_blocks_after_forward(True)  # no backward pass comes to drop what is gathered
        try:
            with super().evaluating():
                yield
        finally:
            self._reshard_blocks_after_forward(self.config.reshard_after_forward)

    def _reshard_blocks_after_forward(self, flag: bool) -> None:
        for block in self._blocks:
            block.set_reshard_after_forward(flag, recurse=False)

    # Weights and optimizer states ---------------------------------------------------------------------------------

    @property
    def layout(self) -> str:
        return f"accelerate ({'FSDP2' if self.is_sharded else 'DDP'}) on {self.world_size} rank(s)"

    def shards(self) -> dict[str, Shard]:
        return {name: self._shard_of(parameter) for name, parameter in self.module.named_parameters()}

    def _shard_of(self, parameter: nn.Parameter) -> Shard:
        if not self.is_sharded:
            start, num = share(parameter.numel(), self.rank, self.world_size)
            return Shard(start, num, parameter, start, parameter.requires_grad)
        # FSDP2 cuts the first axis into equal parts.
        rows = parameter.shape[0] if parameter.ndim else 1
        first_row, num_rows = share(rows, self.rank, self.world_size)
        row = parameter.numel() // max(rows, 1)
        return Shard(first_row * row, num_rows * row, parameter, 0, parameter.requires_grad)

    def _spread(self) -> None:
        if not self.is_sharded:
            self.ranks.gather_shares(self.module.parameters())

    def _spread_optimizer(self) -> None:
        if not self.is_sharded:
            for states in self._optimizer.state.values():
                self.ranks.gather_shares(state for key, state in states.items() if key != STEP)

    def close(self) -> None:
        self._accelerator.free_memory()


def _shard(module: nn.Module, device: torch.device, world_size: int) -> list[Any]:
    """FSDP2: each block of an outer `ModuleList`, which are returned, is gathered and dropped on its own, the rest as
    one unit.

    torch's `fully_shard` is called directly because accelerate's own wrapping of it exists on GPUs only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size,))
    blocks = [fully_shard(block, mesh=mesh) for block in blocks_of(module)]
    # A root stays gathered after its forward by default: weights read or written then would not be the real ones.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return blocks
