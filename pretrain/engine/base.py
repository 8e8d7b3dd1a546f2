"""What a training loop asks of an engine: forward, backward, step, save, load, and to agree with the other ranks.

The loss of a rank is the mean over its slice of the global batch and gradients are averaged over ranks, so that every
engine on any number of ranks takes the step that one process would take on the whole global batch. Ranks that share a
sequence have the same slice.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError

from ..draws import SampleDraws
from ..models.attention import AttentionBackend
from ..models.execution import Checkpointing, Execution, recomputing, set_execution
from ..weights import Weights
from ..world_models.base import Batch, LossTerms, WorldModel
from .kernels import resolve_attention
from .ranks import join_ranks, resolve_precision
from .sequence_parallel import split_sequence
from .shards import STEP, Shard, adamw_update_square, make_optimizer_states, optimizer_states

T = TypeVar("T")


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
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="deepspeed: keep optimizer states in the CPU's memory or on disk; it updates weights there"
    )
    offload_weights: Literal["none", "cpu", "nvme"] = Field(
        "none", description="deepspeed, zero_stage 3: keep weights that are not in use in the CPU's memory or on disk"
    )
    offload_folder: Path | None = Field(
        None, description="what nvme means: a folder on a fast disk of each machine; null: there is none"
    )
    sequence_parallel: int = Field(
        1, ge=1, description="consecutive ranks that share each sequence (Ulysses); divides the attention heads"
    )
    sharding: Literal["ddp", "fsdp2"] = Field("ddp", description="accelerate: replicate the weights or shard them")
    reshard_after_forward: bool = Field(
        True, description="fsdp2: drop a block's weights until its backward pass gathers them again; false: keep them"
    )
    attention: AttentionBackend | Literal["auto"] = Field(
        "auto", description="kernel; auto: cudnn or flash on a GPU, on a CPU what is faster; the run keeps to it"
    )
    activation_checkpointing: Checkpointing = Field(
        "none", description="less memory: compute activations again, all (full) or all but products (selective)"
    )
    compile: bool = Field(
        False, description="fuse norms, modulation and rotary by torch.compile; takes minutes at first"
    )
    timeout_s: float = Field(1800, gt=0, le=1e6, description="how long a rank waits for the others before it gives up")

    @model_validator(mode="after")
    def _zero_3_is_compiled_with_checkpointing(self) -> Self:
        is_sharded = self.kind == "deepspeed" and self.zero_stage == 3
        if self.compile and is_sharded and self.activation_checkpointing == "none":
            raise ValueError(
                "compile goes with zero_stage 3 only where activation_checkpointing is selective or full: else copies "
                "of weights, which zero_stage 3 is there to let go of, may be kept for the backward pass"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_possible(self) -> Self:
        places = {self.offload_optimizer, self.offload_weights} - {"none"}
        if places and self.kind != "deepspeed":
            raise ValueError(f"kind={self.kind} offloads nothing: set kind to deepspeed, or both offloads to none")
        if self.offload_weights != "none" and self.zero_stage < 3:
            raise ValueError(f"zero_stage={self.zero_stage} keeps weights on every rank: offload_weights needs stage 3")
        if len(places) == 2:
            raise ValueError(
                f"offload_optimizer={self.offload_optimizer} and offload_weights={self.offload_weights}: what is "
                "offloaded lies in one place; set both to cpu, both to nvme, or one to none"
            )
        if places == {"nvme"} and self.offload_folder is None:
            raise ValueError("nvme needs offload_folder: name a folder on a fast disk of each machine, or choose cpu")
        return self

    @property
    def disk(self) -> Path | None:
        """The folder that something is offloaded to."""
        return self.offload_folder if "nvme" in (self.offload_optimizer, self.offload_weights) else None


@dataclass(frozen=True)
class StepReport:
    """One optimizer update; it changes nothing where the gradient's norm is not finite (inf) or larger than allowed."""

    grad_norm: float
    was_applied: bool
    lr: float


class HookedModule(nn.Module):
    """Whatever is computed with the world model as a `forward`: what DeepSpeed, DDP and FSDP2 hook into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs)


class Engine(ABC):
    """A step is `grad_accum_steps` times forward_loss and backward, then `step`, called alike on every rank.

    `module` is the world model itself, unwrapped. Its parameters may lie in parts on several ranks: read and write them
    through `shards` and `assign_shards`, and compute with them through `forward_loss` and `call` alone, in validation
    too. A module on the meta device is never whole on a rank that needs a part of it: room is made for the part, which
    `take` fills.
    """

    _optimizer: torch.optim.Optimizer

    def __init__(self, config: EngineConfig, module: nn.Module) -> None:
        self.ranks = join_ranks(config.device, config.timeout_s)
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.local_rank, self.device = self.ranks.local_rank, self.ranks.device
        self.precision = resolve_precision(config.precision, self.ranks)
        self.grad_accum_steps = config.grad_accum_steps
        names: dict[int, str] = {}
        everywhere = list(module.named_parameters(remove_duplicate=False))
        first_names = {name: names.setdefault(id(parameter), name) for name, parameter in everywhere}
        self.shapes = {name: tuple(value.shape) for name, value in everywhere if first_names[name] == name}
        self.tied = {name: first for name, first in first_names.items() if name != first}
        self._buffer_names = module.state_dict().keys() - first_names.keys()
        self.module = module
        self.is_empty = any(parameter.is_meta for parameter in module.parameters())
        if not self.is_empty:
            module.to(self.device)
        elif self.tied or self._buffer_names:
            raise ValueError("a model on the meta device can have neither tied weights nor buffers")
        self.sequence_parallel = config.sequence_parallel
        self.recomputing = recomputing(config.activation_checkpointing, config.compile)
        self.attention = resolve_attention(config.attention, self.precision, self.ranks)
        set_execution(module, Execution(self.attention, config.activation_checkpointing, config.compile))
        split_sequence(module, self.ranks, self.sequence_parallel, config.timeout_s)
        self._hooked = HookedModule(self.module)
        self._micro_step = 0  # backward passes since the last step

    # Ranks that share a sequence are one reader of data: they get the same samples and draw the same noise.

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_parallel

    @property
    def data_world_size(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """This one's place among those that share its sequence."""
        return self.rank % self.sequence_parallel

    @property
    @abstractmethod
    def layout(self) -> str:
        """How weights and states lie on the ranks, in words: runs with the same layout continue to the last digit."""

    @property
    def settings_files(self) -> dict[str, str]:
        """What the library was told, as texts by name, to keep with the run."""
        return {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # The step -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What a function that computes with the module returns, under autocast where the precision asks for it.

        Collective: ranks put weights together layer by layer, and sequences too, so all have to go through the same
        layers in the same order. Tensors that need a gradient may be returned in tuples, lists and dicts alone.
        """

    def forward_loss(self, batch: Mapping[str, Any], draws: SampleDraws) -> LossTerms:
        """Loss of one micro-batch. Collective."""
        return LossTerms(*self.call(self._loss, self.to_device(batch), draws))

    def _loss(self, batch: Batch, draws: SampleDraws) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        terms = cast(WorldModel, self.module).loss(batch, draws)
        return terms.total, terms.parts, dict(terms.by_sample)

    @abstractmethod
    def backward(self, total: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss, weighted so that the micro-batches of a step average."""

    @abstractmethod
    def step(self, learning_rate: float, largest_norm: float = math.inf) -> StepReport:
        """Clips the averaged gradients and updates the weights, unless their norm is larger or not finite."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients."""
        was_training = self._hooked.training
        self._hooked.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._hooked.train(was_training)

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def _expect_whole_step(self) -> None:
        if self._micro_step != self.grad_accum_steps:
            raise RuntimeError(f"step after {self._micro_step} backward passes, expected {self.grad_accum_steps}")
        self._micro_step = 0

    # Weights and optimizer states ---------------------------------------------------------------------------------

    @abstractmethod
    def shards(self) -> dict[str, Shard]:
        """This rank's part, which may be empty, of every parameter. One with several names has its first one here."""

    def room_for(self, values: Tensor, on_host: bool = False) -> Tensor:
        """Memory for a copy of a shard's numbers, where they are or for the CPU to read; not yet written."""
        if on_host:
            return torch.empty(values.shape, pin_memory=values.is_cuda)
        return torch.empty_like(values)

    @abstractmethod
    def _spread(self) -> None:
        """Makes what all ranks' shards hold the weights that every rank computes with. Collective."""

    @torch.no_grad()
    def assign_shards(self, values: Mapping[str, Tensor]) -> None:
        """Writes this rank's part of some parameters, the same ones on every rank. Collective."""
        shards = self.shards()
        for name, value in values.items():
            shards[name].values.copy_(value)
        self._spread()

    @torch.no_grad()
    def take(self, weights: Weights) -> None:
        """Gives all parameters these values, of which each rank reads its own part; what one refuses is refused on all.
        Collective."""
        refusal: UserError | None = None
        try:
            for name, shard in self.shards().items():
                if shard.num:
                    shard.values.copy_(weights.part(name, shard.start, shard.num))
        except UserError as error:
            refusal = error
        if self.any_rank(refusal is not None):
            raise refusal or UserError("Another rank cannot use the weights that the run starts from, and says why.")
        self._spread()

    def optimizer_steps(self) -> dict[str, float]:
        """Updates so far of each trained parameter, on every rank; empty before the first."""
        states = {name: self._optimizer.state.get(shard.holder, {}) for name, shard in self.shards().items()}
        return {name: float(state[STEP]) for name, state in states.items() if state.get(STEP)}

    @torch.no_grad()
    def update_norm(self) -> float:
        """Of what the last update added to all weights, by a look at all states. Collective."""
        square = adamw_update_square(self._optimizer, self.shards(), self.shapes)
        return math.sqrt(self.world_size * self.mean_across_ranks({"square": square})["square"])

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """This rank's part of the states, live: key (AdamW: exp_avg, exp_avg_sq) -> parameter's name -> numbers."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, name, values in optimizer_states(self._optimizer, self.shards()):
            states.setdefault(key, {})[name] = values
        return states

    @torch.no_grad()
    def restore_optimizer(self, steps: Mapping[str, float], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes back what `optimizer_steps` and `optimizer_states` gave, on however many ranks. Collective."""
        shards = self.shards()
        holders = {id(shards[name].holder): (shards[name].holder, step) for name, step in steps.items()}
        for holder, step in holders.values():
            make_optimizer_states(self._optimizer, holder, set(states), step)
        for key, of_parameters in states.items():
            for name, value in of_parameters.items():
                shards[name].part_of(self._optimizer.state[shards[name].holder][key]).copy_(value)
        self._spread_optimizer()

    def _spread_optimizer(self) -> None:
        """As `_spread`, for optimizer states; engines whose ranks keep their own part alone have nothing to do."""
        return None

    def buffers(self) -> dict[str, Tensor]:
        """What belongs to the model's state besides parameters; whole, the same on every rank."""
        return {name: value for name, value in self.module.state_dict().items() if name in self._buffer_names}

    @torch.no_grad()
    def assign_buffers(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.buffers().items():
            value.copy_(values[name])

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
