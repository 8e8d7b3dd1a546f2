"""The DeepSpeed engine: ZeRO 1, 2 and 3 through `deepspeed.initialize`, nccl on GPUs and gloo on CPUs.

Weights, gradients and optimizer states are float32; bf16 comes in through DeepSpeed's `torch_autocast`, so what a
checkpoint holds does not depend on the precision of the compute.

DeepSpeed's checkpoint files are pickles. They stay under `engine/` of a checkpoint and are only ever read from the
run's own folder, after `pretrain.checkpoint` has compared every file there with its checksum: never load a checkpoint
folder that somebody else gave you into an engine; its `model.safetensors` and `ema.safetensors` are made for that.
"""

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..draws import SampleDraws
from ..world_models.base import LossTerms
from .base import Engine, EngineConfig, StepReport
from .optimizer import OptimizerConfig, build_optimizer, set_learning_rate
from .ranks import Ranks

CHECKPOINT_TAG = "deepspeed"


class DeepSpeedEngine(Engine):
    def __init__(self, config: EngineConfig, module: nn.Module, optimizer_config: OptimizerConfig) -> None:
        super().__init__(config, module)
        self.zero_stage = config.zero_stage
        self.deepspeed_config = deepspeed_config(config, optimizer_config, self.precision)
        deepspeed = _import_deepspeed(self.ranks)
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._deepspeed, *_ = deepspeed.initialize(
            model=self._loss_module,
            optimizer=build_optimizer(optimizer_config, self.module),
            config=self.deepspeed_config,
            dist_init_required=False,
        )

    def forward_loss(self, batch: Mapping[str, Any], draws: SampleDraws) -> LossTerms:
        total, parts = self._deepspeed(self.to_device(batch), draws)
        return LossTerms(total, parts)

    def backward(self, total: Tensor) -> None:
        self._deepspeed.backward(total)  # divides by the number of micro-batches
        self._micro_step += 1
        if self._micro_step < self.grad_accum_steps:
            self._deepspeed.step()  # counts the micro-batch; updates nothing before the last one

    def step(self, learning_rate: float) -> StepReport:
        self._expect_whole_step()
        set_learning_rate(self._deepspeed.optimizer, learning_rate)
        self._deepspeed.step()
        # was_step_applied must be asked after every step: DeepSpeed counts a skipped step in its global_steps too.
        return StepReport(
            grad_norm=float(self._deepspeed.get_global_grad_norm()),
            was_applied=self._deepspeed.was_step_applied(),
            lr=learning_rate,
        )

    # Under ZeRO-3 a parameter is an empty tensor whose shard DeepSpeed holds -----------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        if self.zero_stage < 3:
            return super().full_parameters()
        full = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with self._gathered_parameters(parameter):
                full[name] = parameter.detach().clone()
        return full

    def assign_parameters(self, values: Mapping[str, Tensor]) -> None:
        if self.zero_stage < 3:
            return super().assign_parameters(values)
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with torch.no_grad(), self._gathered_parameters(parameter, modifier_rank=0):
                parameter.copy_(values[name])
        return None

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any]:
        return {"engine.kind": "deepspeed", "engine.zero_stage": self.zero_stage, "number of ranks": self.world_size}

    def _save_states(self, folder: Path) -> None:
        if self.is_main:
            (folder / "deepspeed.json").write_text(json.dumps(self.deepspeed_config, indent=1) + "\n")
        # The empty entry is what DeepSpeed's conversion to other numbers of ranks looks for (ZeRO-1 and 2).
        client_state: dict[str, Any] = {"universal_checkpoint_info": {}}
        self._deepspeed.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, client_state=client_state, save_latest=False)

    def _load_states(self, folder: Path) -> None:
        path, _ = self._deepspeed.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        self._deepspeed.destroy()


def deepspeed_config(config: EngineConfig, optimizer: OptimizerConfig, precision: str) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours: nobody writes it by hand."""
    return {
        # The loop cuts the batches, so DeepSpeed's own idea of their size reaches nothing but its throughput printout.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW is an optimizer like any other
        # With an empty list gradients are reduced in float32: by default those of linear layers would be in bf16.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


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
