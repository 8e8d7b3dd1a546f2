"""Trains tiny transformers under every engine and sequence split, for `engine_ranks.py`.

Each entry says how far two steps are from those of a plain torch loop on whole sequences and whole global batches.
AdamW with an epsilon of 1 makes the updates nearly proportional to the gradients, so that weights show a wrong scale,
and nothing is clipped.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.encoders import EmbeddedCodec
from finetune.paradigms.joint_video_action import JointVideoAction, JointVideoActionConfig
from pretrain.draws import SampleDraws
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.engine.deepspeed import deepspeed_config
from pretrain.engine.optimizer import build_optimizer
from pretrain.imagination import Imagination, ImagineConfig, MetricNetworks
from pretrain.models.action_expert import ActionExpertConfig
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.steps import forward_backward, sample_draws
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import whole_weights

BATCH, NUM_STEPS, LEARNING_RATE = 4, 2, 0.1
OPTIMIZER = OptimizerConfig(eps=1.0, weight_decay=0.0, max_grad_norm=0.0)
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "ddp": {"kind": "accelerate", "sharding": "ddp"},
    "fsdp2": {"kind": "accelerate", "sharding": "fsdp2"},
}


def video_model() -> ObservationSpaceWorldModel:
    # 3x3 tokens per latent frame: neither two nor four ranks can share them equally.
    video = VideoDiTConfig(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return ObservationSpaceWorldModel(
        ObservationSpaceConfig(
            video=video, action_dim=2, actions_per_latent=2, residual_std=0.5, predict_residual=True, text_dropout=0.2
        ),
        EmbeddedCodec(torch.zeros(192), torch.linalg.qr(torch.randn(192, 4))[0], 0.5, patch=4),
    )


def joint_model() -> JointVideoAction:
    config = JointVideoActionConfig(
        action_expert=ActionExpertConfig(width=16, ffn_dim=24, freq_dim=8), action_horizon=4, proprio_dim=3
    )
    return JointVideoAction(config, video_model())


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = video_model() if kind == "video" else joint_model()
    for parameter in model.parameters():  # layers that start at zero would hide what comes before them
        nn.init.normal_(parameter, std=0.2)
    return model


def global_batch(step: int) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(step)
    return {
        "latents": torch.randn(BATCH, 3, 4, 3, 3, generator=drawn),
        "text_tokens": torch.randn(BATCH, 3, 8, generator=drawn),
        "actions": torch.randn(BATCH, 4, 2, generator=drawn),
        "action_is_valid": torch.ones(BATCH, 4, 2, dtype=torch.bool),
        "has_actions": torch.tensor([True, True, False, True]),
        "proprio": torch.randn(BATCH, 3, generator=drawn),
    }


@dataclass
class Seen:
    rows: list[list[float]]
    """Loss and gradient norm of each step."""
    weights: dict[str, torch.Tensor]
    """After the last step."""
    imagined: tuple[torch.Tensor, dict[str, float]] | None
    """After the first step, by a video model: the mean prediction for some clips, and what is measured of others."""


def alone(model: nn.Module) -> Any:
    """In place of an engine, for one process on all the data."""
    return SimpleNamespace(
        module=model,
        device=torch.device("cpu"),
        **{"data_rank": 0, "data_world_size": 1, "sequence_rank": 0},
        to_device=lambda batch: batch,
        call=lambda function, *args, **kwargs: function(*args, **kwargs),
        ranks=SimpleNamespace(gather=lambda value: [value]),
        evaluating=torch.no_grad,
    )


def own_part(engine: Any, step: int) -> dict[str, Any]:
    share = BATCH // engine.data_world_size
    return {name: rows[engine.data_rank * share :][:share] for name, rows in global_batch(step).items()}


def imagine(engine: Any) -> tuple[torch.Tensor, dict[str, float]] | None:
    """Three of four clips are measured, so ranks have different numbers of them, and one clip is without actions."""
    if not isinstance(engine.module, ObservationSpaceWorldModel):
        return None
    batch, generator = global_batch(99), torch.Generator().manual_seed(0)
    config = ImagineConfig(clips=3, videos=0, num_inference_steps=2)
    imagination = Imagination(config, MetricNetworks(), engine, seed=0, step=0, run_dir=Path())
    with engine.evaluating():
        context, predict = batch["latents"][:, :1], engine.module.predict
        mean = engine.call(predict, context, batch["actions"], batch["text_tokens"], generator=generator)
        imagination.look_at(own_part(engine, 99))
        return mean, imagination.figures()


def reference(kind: str) -> Seen:
    model = build(kind)
    optimizer = build_optimizer(OPTIMIZER.model_copy(update={"learning_rate": LEARNING_RATE}), model)
    rows, imagined = [], None
    for step in range(1, NUM_STEPS + 1):
        loss = model.loss(global_batch(step), SampleDraws.seeded(0, step, range(BATCH))).total
        loss.backward()
        rows.append([loss.item(), nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()])
        optimizer.step()
        optimizer.zero_grad()
        imagined = imagined or imagine(alone(model))
    return Seen(rows, model.state_dict(), imagined)


def train(kind: str, engine_settings: dict[str, Any], imagines: bool = True) -> Seen:
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", **engine_settings})
    engine = create_engine(config, build(kind), OPTIMIZER)
    rows, imagined = [], None
    for step in range(1, NUM_STEPS + 1):
        batch = own_part(engine, step)
        losses = forward_backward(engine, batch, sample_draws(engine, 0, step, batch))
        report = engine.step(LEARNING_RATE)
        rows.append([engine.mean_across_ranks({"loss": losses["loss"].item()})["loss"], report.grad_norm])
        imagined = imagined or (imagine(engine) if imagines else None)
    weights = whole_weights(engine)
    engine.close()
    return Seen(rows, weights, imagined)


class Gathers(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += function is torch.ops.c10d._allgather_base_.default
        return function(*args, **(kwargs or {}))


def num_gathers(reshard_after_forward: bool) -> int:
    """How often FSDP2 gathers weights in a step, of two blocks and of what is in none."""
    settings = {
        "device": "cpu",
        "precision": "fp32",
        **ENGINES["fsdp2"],
        "reshard_after_forward": reshard_after_forward,
    }
    engine = create_engine(EngineConfig.model_validate(settings), build("video"), OPTIMIZER)
    batch = own_part(engine, 1)
    with Gathers() as gathers:
        forward_backward(engine, batch, sample_draws(engine, 0, 1, batch))
    engine.close()
    return gathers.num


def distance(seen: Seen, expected: Seen) -> dict[str, float]:
    rows = (torch.tensor(seen.rows) - torch.tensor(expected.rows)).abs()
    worst = max((value - expected.weights[name]).abs().max().item() for name, value in seen.weights.items())
    found = {"loss": rows[:, 0].max().item(), "grad_norm": rows[:, 1].max().item(), "weights": worst}
    if seen.imagined is None or expected.imagined is None:
        return found
    (mean, figures), (expected_mean, expected_figures) = seen.imagined, expected.imagined
    measured = max(abs(figures[name] - value) for name, value in expected_figures.items())
    return {**found, "imagined": (mean - expected_mean).abs().max().item(), "measured": measured}


def train_compiled() -> Seen:
    """Under ZeRO-3, which lets go of all weights here, small ones too; traced and taken apart, but not generated."""

    def cuts_all(*arguments: Any) -> dict[str, Any]:
        told = deepspeed_config(*arguments)
        kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        return {**told, "zero_optimization": {**told["zero_optimization"], **{f"stage3_{name}": 0 for name in kept}}}

    eager = partial(torch.compile, backend="aot_eager")
    with patch("torch.compile", eager), patch("pretrain.engine.deepspeed.deepspeed_config", cuts_all):
        settings = {**ENGINES["zero3"], "compile": True, "activation_checkpointing": "selective"}
        return train("video", settings, imagines=False)  # other sizes would be traced anew


def distances(world_size: int) -> dict[str, dict[str, float]]:
    """Of every engine and split that so many ranks can have."""
    expected = {kind: reference(kind) for kind in ("video", "joint")}
    splits = [size for size in (1, 2, 4) if size <= world_size]
    # Recomputed activations need weights that were dropped after the forward pass, and the exchanges once more.
    cases = {
        "selective": ("video", {**ENGINES["fsdp2"], "sequence_parallel": 2, "activation_checkpointing": "selective"}),
        "selective_zero3": ("video", {**ENGINES["zero3"], "activation_checkpointing": "selective"}),
        "full": ("video", {**ENGINES["zero3"], "sequence_parallel": 2, "activation_checkpointing": "full"}),
    }
    cases |= {
        f"{name}/{size}": ("video", {**settings, "sequence_parallel": size})
        for (name, settings), size in product(ENGINES.items(), splits)
    }
    cases["joint"] = ("joint", {**ENGINES["ddp"], "sequence_parallel": splits[-1]})
    cases["joint_fsdp2"] = ("joint", {**ENGINES["fsdp2"], "reshard_after_forward": False})
    cases["bf16"] = ("video", {**ENGINES["zero1"], "sequence_parallel": splits[-1], "precision": "bf16"})
    seen = {name: distance(train(kind, settings), expected[kind]) for name, (kind, settings) in cases.items()}
    if world_size == 2:  # tracing takes as long as all others
        seen["compiled_zero3"] = distance(train_compiled(), expected["video"])
    return seen
