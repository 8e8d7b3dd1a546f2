"""How much memory ranks need to give a model its first weights, and which weights those are, by engine; under torchrun.

Bytes are the most that rank 0 had resident, beyond what it had before.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.engine.base import Engine
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.starting_weights import SeededWeights, starting_weights
from pretrain.wan_folder import STEM, write_wan_config
from pretrain.weights import Weights, write_shards
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import whole_weights

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
WAN_DATASET: Any = SimpleNamespace(info=SimpleNamespace(codec=SimpleNamespace(name="wan")))


def empty_model(video: VideoDiTConfig) -> ObservationSpaceWorldModel:
    config = ObservationSpaceConfig(video=video, action_dim=2, actions_per_latent=4, residual_std=1.0)
    with torch.device("meta"):
        return ObservationSpaceWorldModel(config)


def memory(what: str) -> int:
    """VmRSS, or VmHWM, which is the most it has been."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{what}:")[2].split()[0])


def peak_bytes(work: Callable[[], Any]) -> tuple[int, Any]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    done = work()
    return memory("VmHWM") - before, done


def open_engine(name: str, model: ObservationSpaceWorldModel, weights: Weights) -> Engine:
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "attention": "sdpa", **ENGINES[name]})
    return create_engine(config, model, OptimizerConfig(), weights)


def differing(engine: Engine, expected: Weights) -> list[str]:
    found = whole_weights(engine)
    engine.close()
    assert found.keys() == expected.shapes.keys()
    values = {name: expected.part(name, 0, value.numel()) for name, value in found.items()}
    return [name for name, value in found.items() if not torch.equal(value.flatten(), values[name])]


def placed(name: str) -> dict[str, Any]:
    """A model of 200 MB that starts from its seed."""
    model = empty_model(MID)
    peak, engine = peak_bytes(lambda: open_engine(name, model, SeededWeights(model, seed=3)))
    size = 4 * sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    return {"peak": peak / size, "differing": differing(engine, SeededWeights(model, seed=3))}


def pretrained(name: str, folder: Path) -> list[str]:
    model = empty_model(TINY)
    weights = starting_weights(model, 3, folder, WAN_DATASET)
    return differing(open_engine(name, model, weights), weights)


def write_wan(folder: Path) -> None:
    drawn = SeededWeights(empty_model(TINY), seed=7)
    shapes = {name.removeprefix("video."): shape for name, shape in drawn.shapes.items() if name.startswith("video.")}

    def read(name: str) -> torch.Tensor:
        return drawn.part(f"video.{name}", 0, torch.Size(shapes[name]).numel()).view(shapes[name])

    write_shards(folder, STEM, shapes, read, 20_000, torch.float32)
    write_wan_config(folder, TINY)


if __name__ == "__main__":
    wan = Path(sys.argv[1])
    seen = {name: placed(name) | {"from_wan": pretrained(name, wan)} for name in ENGINES}
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(seen) + "\n")
