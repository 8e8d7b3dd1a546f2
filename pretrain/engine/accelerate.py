"""The accelerate engine: one process, DDP, or FSDP2; the same losses as DeepSpeed's up to rounding.

Its checkpoint files are safetensors. Replicated weights are written once and resume on any number of ranks; FSDP2
shards are written by every rank and resume on as many.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..draws import SampleDraws
from ..world_models.base import LossTerms
from .base import Engine, EngineConfig, StepReport
from .optimizer import OptimizerConfig, build_optimizer, set_learning_rate


class AccelerateEngine(Engine):
    def __init__(self, config: EngineConfig, module: nn.Module, optimizer_config: OptimizerConfig) -> None:
        super().__init__(config, module)
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.is_sharded = config.sharding == "fsdp2"
        self.max_grad_norm = optimizer_config.max_grad_norm or float("inf")  # inf: measured, never scaled
        self._accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if self.precision == "bf16" else "no",
            gradient_accumulation_steps=config.grad_accum_steps,
            # A batch without action labels leaves the action layers without gradients.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if self.is_sharded:
            _shard(self._loss_module, self.device, self.world_size)
            self._model: Any = self._loss_module
        else:
            self._model = self._accelerator.prepare_model(self._loss_module)
        self._optimizer = build_optimizer(optimizer_config, self.module)  # after sharding, which replaces parameters

    def forward_loss(self, batch: Mapping[str, Any], draws: SampleDraws) -> LossTerms:
        # Gradients travel between ranks in the last backward pass of a step only; DDP decides that in its forward.
        is_last = self._micro_step == self.grad_accum_steps - 1
        if self.is_sharded:
            self._model.set_requires_gradient_sync(is_last)
        elif isinstance(self._model, nn.parallel.DistributedDataParallel):
            self._model.require_backward_grad_sync = is_last
        with self._accelerator.autocast():
            total, parts = self._model(self.to_device(batch), draws)
        return LossTerms(total, parts)

    def backward(self, total: Tensor) -> None:
        self._accelerator.backward(total)  # divides by the number of micro-batches
        self._micro_step += 1

    def step(self, learning_rate: float) -> StepReport:
        self._expect_whole_step()
        set_learning_rate(self._optimizer, learning_rate)
        # The norm is over all ranks' gradients, so that all of them see the same number and skip together.
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        grad_norm = float(_whole(norm))
        is_finite = bool(torch.tensor(grad_norm).isfinite())
        if is_finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm if is_finite else float("inf"), is_finite, learning_rate)

    # Under FSDP2 a parameter is a DTensor, one shard of it here -------------------------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: _whole(parameter.detach()) for name, parameter in super().full_parameters().items()}

    @torch.no_grad()
    def assign_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            _local(parameter).copy_(_local(_sharded_like(parameter, values[name])))

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any]:
        layout: dict[str, Any] = {"engine.kind": "accelerate", "engine.sharding": "fsdp2" if self.is_sharded else "ddp"}
        return {**layout, "number of ranks": self.world_size} if self.is_sharded else layout

    def _file(self, folder: Path) -> Path:
        return folder / f"rank_{self.rank if self.is_sharded else 0:05d}.safetensors"

    def _save_states(self, folder: Path) -> None:
        if not (self.is_sharded or self.is_main):
            return
        tensors = {f"weights/{name}": _local(value.detach()) for name, value in self.module.state_dict().items()}
        for name, parameter in self._trained_parameters().items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = _local(value.detach())
        # Tied weights share memory, which safetensors refuses.
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, self._file(folder))

    @torch.no_grad()
    def _load_states(self, folder: Path) -> None:
        tensors = load_file(self._file(folder), device=str(self.device))
        for name, value in self.module.state_dict().items():
            _local(value).copy_(tensors[f"weights/{name}"])
        for name, parameter in self._trained_parameters().items():
            prefix = f"optimizer/{name}/"
            states = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self._optimizer.state[parameter] = {
                key: value if key == "step" else _from_local(parameter, value) for key, value in states.items()
            }

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def close(self) -> None:
        self._accelerator.free_memory()


# A DTensor as its local shard or whole, and back; any other tensor passes through -----------------------------------


def _shard(module: nn.Module, device: torch.device, world_size: int) -> None:
    """FSDP2: each block of an outer `ModuleList` is gathered, used and dropped on its own, the rest as one unit.

    torch's `fully_shard` is called directly because accelerate's own wrapping of it exists on GPUs only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size,))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
        for name in getattr(block, "entry_points", ()):
            register_fsdp_forward_method(block, name)
    # A root stays gathered after its forward by default: weights read or written then would not be the real ones.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _sharded_like(parameter: Any, whole: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _from_local(parameter: Any, local: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())
