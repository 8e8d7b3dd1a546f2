"""What a training loop asks of an engine: forward, backward, step, save, load, and to agree with the other ranks.

The loss of a rank is the mean over its slice of the global batch and gradients are averaged over ranks, so that every
engine on any number of ranks takes the step that one process would take on the whole global batch. Ranks that share a
sequence have the same slice.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError

from ..draws import SampleDraws
from ..world_models.base import LossTerms
from .ranks import join_ranks, resolve_precision
from .sequence_parallel import split_sequence

LAYOUT_FILE = "layout.json"


class EngineConfig(StrictConfig):
    """How the step is computed; the losses are the same up to rounding, whatever is chosen here."""

    kind: Literal["deepspeed", "accelerate"] = Field("deepspeed", description="the library that runs the step")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="autocast over float32 weights; auto: bf16 where it is faster, else fp32; the run keeps to it",
    )
    grad_accum_steps: int = Field(1, ge=1, description="micro-batches per rank and step")
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="deepspeed: shard optimizer states (1), gradients too (2), weights too (3)"
    )
    sequence_parallel: int = Field(
        1, ge=1, description="consecutive ranks that share each sequence (Ulysses); divides the attention heads"
    )
    sharding: Literal["ddp", "fsdp2"] = Field("ddp", description="accelerate: replicate the weights or shard them")
    timeout_s: float = Field(1800, gt=0, le=1e6, description="how long a rank waits for the others before it gives up")


@dataclass(frozen=True)
class StepReport:
    """One optimizer update; it is not applied, and changes nothing, where a gradient is not finite."""

    grad_norm: float
    was_applied: bool
    lr: float


class LossModule(nn.Module):
    """The world model's loss as a `forward`: what DeepSpeed, DDP and FSDP2 hook into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: Mapping[str, Any], draws: SampleDraws) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model.loss(batch, draws)
        return terms.total, terms.parts


class Engine(ABC):
    """A step is `grad_accum_steps` times forward_loss and backward, then `step`, called alike on every rank.

    `module` is the world model itself, unwrapped. Under ZeRO-3 and FSDP2 its parameters are shards: read and write them
    through `full_parameters` and `assign_parameters`, and compute losses through `forward_loss`, in validation too.
    """

    def __init__(self, config: EngineConfig, module: nn.Module) -> None:
        self.ranks = join_ranks(config.device, config.timeout_s)
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.local_rank, self.device = self.ranks.local_rank, self.ranks.device
        self.precision = resolve_precision(config.precision, self.ranks)
        self.grad_accum_steps = config.grad_accum_steps
        self.module = module.to(self.device)
        self.sequence_parallel = config.sequence_parallel
        split_sequence(module, self.ranks, self.sequence_parallel, config.timeout_s)
        self._loss_module = LossModule(self.module)
        self._micro_step = 0  # backward passes since the last step

    # Ranks that share a sequence are one reader of data: they get the same samples and draw the same noise.

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_parallel

    @property
    def data_world_size(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # The step -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def forward_loss(self, batch: Mapping[str, Any], draws: SampleDraws) -> LossTerms:
        """Loss of one micro-batch, under autocast where the precision asks for it."""

    @abstractmethod
    def backward(self, total: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss, weighted so that the micro-batches of a step average."""

    @abstractmethod
    def step(self, learning_rate: float) -> StepReport:
        """Clips the averaged gradients and updates the weights, unless a gradient is not finite."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients."""
        was_training = self._loss_module.training
        self._loss_module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._loss_module.train(was_training)

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def _expect_whole_step(self) -> None:
        if self._micro_step != self.grad_accum_steps:
            raise RuntimeError(f"step after {self._micro_step} backward passes, expected {self.grad_accum_steps}")
        self._micro_step = 0

    # Weights ------------------------------------------------------------------------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole, by name. Collective. Where nothing is sharded these are the live parameters."""
        return dict(self.module.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def assign_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Writes whole parameters, the same on every rank, into the live ones. Collective."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            parameter.copy_(values[name])

    def full_state_dict(self) -> dict[str, Tensor]:
        """What `module.state_dict()` would hold if nothing were sharded. Collective."""
        parameters = self.full_parameters()
        buffers = {name: value for name, value in self.module.state_dict().items() if name not in parameters}
        return {name: value.detach() for name, value in {**parameters, **buffers}.items()}

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes all that an exact resume needs into an existing folder, each rank its own files. Collective."""
        if self.is_main:
            (folder / LAYOUT_FILE).write_text(json.dumps(self._layout(), indent=1) + "\n")
        self._save_states(folder)

    def load(self, folder: Path) -> None:
        """Restores weights and optimizer states. Collective."""
        stored, here = json.loads((folder / LAYOUT_FILE).read_text()), self._layout()
        for key in here:
            if stored.get(key) != here[key]:
                raise UserError(
                    f"{folder.parent}: was written with {key} = {stored.get(key)}, but this run has {here[key]}; go on "
                    f"with {key} = {stored.get(key)}, or choose another run_dir."
                )
        self._load_states(folder)

    @abstractmethod
    def _layout(self) -> dict[str, Any]:
        """What must be the same for `load` to understand what `save` wrote."""

    @abstractmethod
    def _save_states(self, folder: Path) -> None: ...

    @abstractmethod
    def _load_states(self, folder: Path) -> None: ...

    # The other ranks ----------------------------------------------------------------------------------------------

    def mean_across_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.ranks.mean(values)

    def any_rank(self, flag: bool) -> bool:
        return self.ranks.any(flag)

    def barrier(self) -> None:
        self.ranks.barrier()

    def close(self) -> None:
        """Frees what the library holds besides the module. The process group stays until the process ends."""
        return None
