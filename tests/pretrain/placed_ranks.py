"""How much memory ranks need to give a model its first weights, and which weights those are, by engine; under torchrun.

Bytes are those of rank 0's tensors that were alive at once. Not what was resident, which depends on what was freed
before, and on what is not yet written to.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.loader import dump_config
from data_pipeline.datasets import Datasets
from data_pipeline.model_inputs import InputConfig
from finetune.paradigms.joint_video_action import JointVideoAction
from finetune.train import FinetuneConfig, build_policy_model, policy_weights
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.engine.base import Engine
from pretrain.engine.deepspeed import REDUCE_BUCKET
from pretrain.exported import MODEL_YAML, WEIGHTS, WorldModelConfig, load_world_model
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.starting_weights import SeededWeights, starting_weights
from pretrain.wan_folder import STEM, write_wan_config
from pretrain.weights import Weights, write_shards
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import whole_weights

from tests.data_pipeline.tiny_dataset import tiny_dataset

MID = VideoDiTConfig(
    num_attention_heads=8, attention_head_dim=64, text_dim=64, freq_dim=32, ffn_dim=2048, num_layers=12
)
TINY = VideoDiTConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32,
    num_layers=2,
)  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "accelerate", "sharding": "fsdp2"},
    "zero3": {"zero_stage": 3},
    "zero1": {"zero_stage": 1},
    "ddp": {"kind": "accelerate"},
}
DATASET, EXPORTS = "dataset", {"same_robot": 3, "other_robot": 2}
"""Folders; of an export, how many actions its robot has."""
WAN_DATASET: Any = SimpleNamespace(info=SimpleNamespace(codec=SimpleNamespace(name="wan")))


def empty_model(video: VideoDiTConfig) -> ObservationSpaceWorldModel:
    config = ObservationSpaceConfig(video=video, action_dim=2, actions_per_latent=4, residual_std=1.0)
    with torch.device("meta"):
        return ObservationSpaceWorldModel(config)


class AliveBytes(TorchDispatchMode):
    """The most that was alive at once of the tensors made meanwhile, as shares of a size; buffers hold many layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak, self.peak_of_layers = size, 0.0, 0.0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(done):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(local, Tensor) and not local.is_meta:
                storage = local.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {place: one for place, one in self._alive.items() if not one[0].expired()}
        sizes = [size for _, size in self._alive.values()]
        self.peak = max(self.peak, sum(sizes) / self.size)
        self.peak_of_layers = max(self.peak_of_layers, sum(size for size in sizes if size < self.size / 20) / self.size)
        return done


def all_of(weights: Weights) -> dict[str, Tensor]:
    return {
        name: weights.part(name, 0, torch.Size(shape).numel()).view(shape) for name, shape in weights.shapes.items()
    }


def open_engine(name: str, model: ObservationSpaceWorldModel | JointVideoAction, weights: Weights) -> Engine:
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "attention": "sdpa", **ENGINES[name]})
    return create_engine(config, model, OptimizerConfig(), weights)


def differing(engine: Engine, expected: Mapping[str, Tensor]) -> list[str]:
    found = whole_weights(engine)
    engine.close()
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


def placed(name: str) -> dict[str, Any]:
    """A model of 200 MB that starts from its seed."""
    weights = SeededWeights(partial(empty_model, MID), seed=3)
    size = 4 * sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    with AliveBytes(size) as alive:
        engine = open_engine(name, empty_model(MID), weights)
    peak = alive.peak - (4 * REDUCE_BUCKET / size if name == "zero3" else 0)
    return {"peak": peak, "layers": alive.peak_of_layers, "differing": differing(engine, all_of(weights))}


def pretrained(name: str, folder: Path) -> list[str]:
    model = empty_model(TINY)
    weights = starting_weights(model, 3, folder, WAN_DATASET)
    return differing(open_engine(name, model, weights), all_of(weights))


def fine_tuned(name: str, dataset: Path, export: Path) -> list[str]:
    """Expected is the whole world model of the export; its action conditioner is drawn anew for another robot."""
    settings = {
        "run_dir": "unused",
        "num_steps": 1,
        "seed": 3,
        "pretrained": export,
        "loader": {"dataset": dataset},
        "policy": {"action_expert": {"width": 16, "ffn_dim": 24, "freq_dim": 8}},
    }
    config, datasets = FinetuneConfig.model_validate(settings), Datasets.open({"": dataset})
    model, described = build_policy_model(config, datasets)
    assert all(parameter.is_meta for parameter in model.parameters())
    pretrained, known, _ = load_world_model(export)
    kept = {f"world_model.{part}": value for part, value in pretrained.state_dict().items()}
    if known.world_model.action_dim != described.world_model.action_dim:
        kept = {part: value for part, value in kept.items() if ".action_conditioner." not in part}
    drawn = SeededWeights(
        lambda: JointVideoAction(described.policy, ObservationSpaceWorldModel(described.world_model)), seed=3
    )
    return differing(open_engine(name, model, policy_weights(config, model, datasets)), all_of(drawn) | kept)


def write_exports(folder: Path) -> None:
    """Beside a dataset, of world models for its robot and for one with fewer actions."""
    tiny_dataset(folder / DATASET)
    for name, action_dim in EXPORTS.items():
        shutil.copytree(folder / DATASET, folder / name)
        config = ObservationSpaceConfig(
            video=TINY.model_copy(update={"in_channels": 6, "out_channels": 6}),
            **{"action_dim": action_dim, "actions_per_latent": 8, "residual_std": 1.0},
        )
        described = WorldModelConfig(world_model=config, inputs=InputConfig(views=("front",)))
        (folder / name / MODEL_YAML).write_text(dump_config(described))
        save_file(all_of(SeededWeights(partial(ObservationSpaceWorldModel, config), seed=7)), folder / name / WEIGHTS)


def write_wan(folder: Path) -> None:
    folder.mkdir()
    drawn = SeededWeights(partial(empty_model, TINY), seed=7)
    shapes = {name.removeprefix("video."): shape for name, shape in drawn.shapes.items() if name.startswith("video.")}

    def read(name: str) -> torch.Tensor:
        return drawn.part(f"video.{name}", 0, torch.Size(shapes[name]).numel()).view(shapes[name])

    write_shards(folder, STEM, shapes, read, 20_000, torch.float32)
    write_wan_config(folder, TINY)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    seen = {name: placed(name) for name in ENGINES}
    for name in ENGINES:
        seen[name]["from_wan"] = pretrained(name, folder / "wan")
        seen[name] |= {export: fine_tuned(name, folder / DATASET, folder / export) for export in EXPORTS}
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(seen) + "\n")
