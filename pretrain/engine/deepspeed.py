"""The DeepSpeed engine: ZeRO 1, 2 and 3 through `deepspeed.initialize`, nccl on GPUs and gloo on CPUs.

Weights, gradients and optimizer states are float32; bf16 comes in through DeepSpeed's `torch_autocast`, so what a
checkpoint holds does not depend on the precision of the compute.

DeepSpeed's own checkpoints are pickles, tied to a stage and a number of ranks. They are not used: `shards` finds
weights and states in the optimizer's partitions, and `pretrain.checkpoint` writes those.
"""

import atexit
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.execution import blocks_of
from .base import Engine, EngineConfig, StepReport, T
from .disk import DiskMemory
from .optimizer import OptimizerConfig, build_optimizer, set_learning_rate
from .ranks import Ranks, leave_ranks
from .shards import MOMENTS, Shard, make_optimizer_states, share

REDUCE_BUCKET = 50_000_000  # gradients that are reduced at once


class DeepSpeedEngine(Engine):
    def __init__(self, config: EngineConfig, module: nn.Module, optimizer_config: OptimizerConfig) -> None:
        super().__init__(config, module)
        self.zero_stage = config.zero_stage
        self.deepspeed_config = deepspeed_config(config, optimizer_config, self.precision)
        deepspeed = _import_deepspeed(self.ranks)
        self._linear = torch.nn.functional.linear  # which ZeRO-3 replaces, in the whole process
        # A block's weights come as a whole where hooks of its layers cannot run: in what is compiled, and in what is
        # computed again from kept products, where each operation, a fetch's too, must be one of the first time.
        if config.compile or config.activation_checkpointing == "selective":
            for block in blocks_of(module):
                deepspeed.utils.set_z3_leaf_module(block, True)
        self._disk = DiskMemory(config.disk, self.ranks) if config.disk else None
        with self._disk.placing() if self._disk else nullcontext():
            if self.is_empty:
                self._make_room(deepspeed)
            self._deepspeed, *_ = deepspeed.initialize(
                model=self._hooked,
                optimizer=build_optimizer(optimizer_config, self.module),
                config=self.deepspeed_config,
                dist_init_required=False,
            )
        self._zero = self._deepspeed.optimizer  # wraps the optimizer, and cuts what it updates into partitions
        self._optimizer = self._zero.optimizer
        self._shards = self._find_shards()
        if self.zero_stage < 3 and config.offload_optimizer == "none":
            self._spare_copies_of_gradients()
        elif self.zero_stage < 3:  # a copy in the weights' own type, which is that of the partition
            self._zero.param_buffer_of_bit16_for_cpu_offload_groups = list(self._zero.single_partition_of_fp32_groups)
        if config.offload_optimizer == "nvme":
            self._place_what_comes_later()
        self._decline_large_norms()

    def _place_what_comes_later(self) -> None:
        """What the first step would allocate: moments, and sums over micro-batches."""
        assert self._disk is not None
        for holder in {id(shard.holder): shard.holder for shard in self._shards.values() if shard.is_trained}.values():
            self._optimizer.state[holder] = {key: self._disk.zeros(len(holder)) for key in MOMENTS}
            make_optimizer_states(self._optimizer, holder, set(), step=0)
        if self.zero_stage < 3 and self.grad_accum_steps > 1:
            for parameter in (one for group in self._zero.params_in_partition for one in group):
                sums = self._disk.zeros(parameter.numel())
                self._zero.accumulated_grads_in_cpu[self._zero.get_param_id(parameter)] = sums

    def room_for(self, values: Tensor, on_host: bool = False) -> Tensor:
        if self._disk and values.device.type == "cpu":
            return self._disk.zeros(values.numel())
        return super().room_for(values, on_host)

    def _spare_copies_of_gradients(self) -> None:
        """ZeRO-1 and 2 make more than are needed, which in a small step on a CPU takes a quarter of the time."""
        self._zero.scaled_global_norm = self._norm_of_partition
        if self.world_size == 1:  # there is nothing to add up, so nothing goes into buckets and out of them again
            self._zero.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
            if self.device.type == "cpu":
                self._zero.flatten = _Flattened()

    def _norm_of_partition(self) -> Tensor:
        """Of all ranks' gradients. DeepSpeed's own copies them into float64 first; here only their norms are."""
        norms = [
            norm for gradients in self._zero.averaged_gradients.values() for norm in torch._foreach_norm(gradients)
        ]
        square = torch.stack(norms).double().square().sum()
        dist.all_reduce(square)
        return square.sqrt().float()

    def _make_room(self, deepspeed: ModuleType) -> None:
        """Memory for the weights of a model on the meta device; under ZeRO-3, which cuts each layer at once, a part."""
        for part in reversed(list(self.module.modules())):  # the inner ones first, for Init takes a module with these
            if any(True for _ in part.parameters(recurse=False)):
                part.to_empty(device=self.device, recurse=False)
                if self.zero_stage == 3:
                    deepspeed.zero.Init(module=part, config_dict_or_path=self.deepspeed_config, dtype=torch.float32)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        # Weights that ZeRO-3 lets go of must not live on as the copies that autocast keeps for a second use.
        with _autocast_copies_kept(self.zero_stage < 3):
            return self._deepspeed(function, *args, **kwargs)

    def backward(self, total: Tensor) -> None:
        self._deepspeed.backward(total)  # divides by the number of micro-batches
        self._micro_step += 1
        if self._micro_step < self.grad_accum_steps:
            self._deepspeed.step()  # counts the micro-batch; updates nothing before the last one

    def step(self, learning_rate: float, largest_norm: float = math.inf) -> StepReport:
        self._expect_whole_step()
        set_learning_rate(self._deepspeed.optimizer, learning_rate)
        self._declined_norm, self._largest_norm = math.inf, largest_norm
        self._deepspeed.step()
        # was_step_applied must be asked after every step: DeepSpeed counts a skipped step in its global_steps too.
        was_applied = self._deepspeed.was_step_applied()
        grad_norm = float(self._deepspeed.get_global_grad_norm()) if was_applied else self._declined_norm
        return StepReport(grad_norm, was_applied, learning_rate)

    def _decline_large_norms(self) -> None:
        """A step whose norm DeepSpeed believes to be NaN it skips and cleans up after, whatever the ZeRO stage."""
        name = "scaled_global_norm" if self.zero_stage < 3 else "_get_norm_groups"
        measure = getattr(self._zero, name)

        def measure_and_decline(*args: Any, **kwargs: Any) -> Any:
            norms = measure(*args, **kwargs)  # one, or one of each group; what is not finite may come as -1
            values = [float(norm) for norm in norms] if self.zero_stage == 3 else [float(norms)]
            norm = math.hypot(*values)
            if min(values) < 0 or not math.isfinite(norm) or norm <= self._largest_norm:
                return norms
            self._declined_norm = norm
            return [norm * math.nan for norm in norms] if self.zero_stage == 3 else norms * math.nan

        setattr(self._zero, name, measure_and_decline)

    @property
    def settings_files(self) -> dict[str, str]:
        return {"ds_config.json": json.dumps(self.deepspeed_config, indent=1) + "\n"}

    # Weights and optimizer states ---------------------------------------------------------------------------------

    @property
    def layout(self) -> str:
        return f"deepspeed (ZeRO-{self.zero_stage}) on {self.world_size} rank(s)"

    def shards(self) -> dict[str, Shard]:
        return self._shards

    def _find_shards(self) -> dict[str, Shard]:
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        trained = self._shards_in_partitions() if self.zero_stage < 3 else self._shards_of_partitions()
        shards = {names[parameter]: shard for parameter, shard in trained}
        for parameter, name in names.items():
            if not parameter.requires_grad:
                shards[name] = self._frozen_shard(parameter)
        return shards

    def _shards_in_partitions(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        """ZeRO-1 and 2 lay a group's parameters end to end and cut the whole: a rank has one part, of some of them."""
        for group, partition in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                place = parameter._hp_mapping  # None: all its elements are in other ranks' partitions
                if place is None:
                    yield parameter, Shard(0, 0, partition, 0, True)
                else:
                    start, num = place.lp_fragment_address.start, place.lp_fragment_address.numel
                    yield parameter, Shard(start, num, partition, place.hp_fragment_address.start, True)

    def _shards_of_partitions(self) -> Iterator[tuple[Any, Shard]]:
        """ZeRO-3 cuts each parameter, fills its last part up, and lays a rank's parts end to end."""
        for group, partition in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                start, num = share(parameter.ds_numel, self.rank, self.world_size)
                yield parameter, Shard(start, num, partition, offset, True)
                offset += parameter.partition_numel()

    def _frozen_shard(self, parameter: Any) -> Shard:
        """What is not trained lies in no partition of the optimizer's."""
        if self.zero_stage < 3:
            start, num = share(parameter.numel(), self.rank, self.world_size)
            return Shard(start, num, parameter, start, False)
        start, num = share(parameter.ds_numel, self.rank, self.world_size)
        return Shard(start, num, parameter.ds_tensor, 0, False)

    def _spread(self) -> None:
        zero = self._zero
        if self.zero_stage < 3:
            zero.update_lp_params()
            self.ranks.gather_shares(one for one in self.module.parameters() if not one.requires_grad)
            return
        zero.parameter_offload.partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def close(self) -> None:
        self._deepspeed.destroy()
        torch.nn.functional.linear = self._linear
        # DeepSpeed has groups of its own. Where a run ends in order, and not where a rank fails: that would wait for
        # the others.
        from deepspeed import comm

        atexit.register(leave_ranks, comm.destroy_process_group)


def deepspeed_config(config: EngineConfig, optimizer: OptimizerConfig, precision: str) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours: nobody writes it by hand."""
    return {
        # The loop cuts the batches, so DeepSpeed's own idea of their size reaches nothing but its throughput printout.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET,
            # What goes to disks is in the CPU's memory, as DeepSpeed sees it: `engine.disk` says why.
            "offload_optimizer": {"device": config.offload_optimizer.replace("nvme", "cpu")},
            "offload_param": {"device": config.offload_weights.replace("nvme", "cpu")},
            # ZeRO-3's own linear layer adds the bias in place, to the very product that selective checkpointing keeps,
            # and gathers what a compiled block has gathered already.
            "memory_efficient_linear": config.activation_checkpointing != "selective" and not config.compile,
        },
        # torch's fused AdamW is an optimizer like any other, on a CPU too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # With an empty list gradients are reduced in float32: by default those of linear layers would be in bf16.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


class _Flattened:
    """Tensors laid end to end, always in the same memory: a CPU hands out fresh pages slowly."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Good until the next call with as many numbers."""
        flat = [one.reshape(-1) for one in tensors]
        if len(flat) == 1:
            return flat[0]
        size = sum(map(len, flat))
        if size not in self._buffers:
            self._buffers[size] = flat[0].new_empty(size)
        return torch.cat(flat, out=self._buffers[size])


@contextmanager
def _autocast_copies_kept(are_kept: bool) -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(are_kept)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _import_deepspeed(ranks: Ranks) -> ModuleType:
    """Imports DeepSpeed, which reads the environment as it is imported, and lets it find our process group."""
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", ranks.local_rank)):
        os.environ.setdefault(name, str(value))
    # On CPU the number of devices is LOCAL_SIZE; without it DeepSpeed counts NUMA nodes.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed

    if ranks.device.type == "cpu":
        # Otherwise the first start compiles a shared-memory all-reduce (half a minute, needs g++ and ninja) that only
        # inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its skipped-step warning repeats the loop's own
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, which nobody here can change.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed
