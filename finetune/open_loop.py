"""Compare predicted action chunks with the recorded ones, on held-out episodes: what can be measured without a robot.

Errors are given in the robot's own units and divided by each action's standard deviation, where predicting the mean
action has an MSE of about 1. Beside the policy stand three predictions that need no model: the mean action, the last
action that was executed, and, where actions are target positions, staying where the robot is. Low error is necessary
for a good policy, not sufficient: errors that add up over an episode do not show here.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field

from configs.loader import StrictConfig, UserError
from data_pipeline.align import spans_mask
from data_pipeline.clips import ClipConfig, ClipDataset, collate
from data_pipeline.dataset import DatasetFolder, Split
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.model_inputs import ModelInputs
from data_pipeline.sample import SampleMeta, read_array
from data_pipeline.storage import Address, StorageConfig
from data_pipeline.video_io import decode_clip
from pretrain.evaluate import check_same_encoders, check_same_robot
from pretrain.world_models.observation_space import resolve

from .baselines import BehaviourCloning, choose_embodiment

log = logging.getLogger(__name__)

OPEN_LOOP_ROWS = ("policy", "blind", "bc")  # those that predict from a recording


class OpenLoopConfig(StrictConfig):
    dataset: Address | None = Field(None, description="dataset folder written by data_pipeline.build, or its URL")
    storage: StorageConfig = StorageConfig()
    split: Split = Field("validation", description="episodes to measure on")
    embodiment: str | None = Field(None, description="robot; null: the dataset's only one")
    max_clips: int = Field(512, ge=1, description="clips to measure on; more are thinned out evenly")
    batch_size: int = Field(32, ge=1, description="clips predicted at once")


@dataclass(frozen=True)
class Clips:
    """The control side of n clips, in physical units."""

    positions: np.ndarray  # int64 [n], in the dataset's manifest
    actions: Float[np.ndarray, "n k a"]
    is_valid: Bool[np.ndarray, "n k"]
    proprio: Float[np.ndarray, "n s"] | None  # at the clip's start
    last_action: Float[np.ndarray, "n a"]  # executed before the clip's start
    instructions: list[str]


def evaluate_open_loop(
    config: OpenLoopConfig, rows: Sequence[str], checkpoint: Path | None, behaviour_cloning: Path | None
) -> dict[str, Any]:
    if config.dataset is None:
        raise UserError("open loop needs open_loop.dataset=FOLDER, a dataset with held-out episodes")
    index = DatasetIndex(config.dataset, config.storage)
    embodiment = choose_embodiment(index, config.embodiment)
    mean = np.array(index.norm_stats["embodiments"][embodiment]["actions_absolute"]["mean"], np.float32)
    clips = read_clips(index, config, embodiment, mean)
    predictions: dict[str, np.ndarray] = {}
    for row in [row for row in OPEN_LOOP_ROWS if row in rows]:
        log.info("%s: predicting %d clips", row, len(clips.positions))
        if row == "bc":
            assert behaviour_cloning is not None
            cloned = BehaviourCloning.load(behaviour_cloning)
            predictions[row] = _predict_bc(cloned, index, embodiment, clips, config.batch_size)
        else:
            assert checkpoint is not None
            predictions[row] = _predict_policy(checkpoint, row == "blind", index, embodiment, clips, config.batch_size)
    # Every row is judged on the same actions: those that the shortest chunk reaches.
    horizon = min([clips.actions.shape[1], *(predicted.shape[1] for predicted in predictions.values())])
    shape = (len(clips.actions), horizon, clips.actions.shape[2])
    predictions["mean_action"] = np.broadcast_to(mean, shape)
    predictions["hold_last_action"] = np.broadcast_to(clips.last_action[:, None], shape)
    robot = index.embodiments[embodiment]
    if clips.proprio is not None and robot.action_names == robot.proprio_names:
        predictions["hold_proprio"] = np.broadcast_to(clips.proprio[:, None], shape)
    normalizer = index.normalizer(embodiment, "actions_absolute", "mean_std")
    assert normalizer is not None
    truth, is_valid = clips.actions[:, :horizon], clips.is_valid[:, :horizon]
    return {
        "action_error": {
            row: action_error(predicted[:, :horizon], truth, is_valid, normalizer.scale, robot.action_names)
            for row, predicted in predictions.items()
        },
        "horizon": horizon,
        "clips": len(clips.positions),
        "embodiment": embodiment,
    }


def action_error(
    predicted: Float[np.ndarray, "n k a"],
    truth: Float[np.ndarray, "n k a"],
    is_valid: Bool[np.ndarray, "n k"],
    scale: Float[np.ndarray, "a"],
    names: Sequence[str],
) -> dict[str, Any]:
    """Means over valid actions and all dimensions; `scale` is each dimension's standard deviation."""
    error = (predicted - truth)[is_valid].astype(np.float64)  # valid, a
    by_dimension = np.abs(error).mean(axis=0)
    return {
        "l1": float(np.abs(error).mean()),
        "mse": float((error**2).mean()),
        "l1_normalised": float(np.abs(error / scale).mean()),
        "mse_normalised": float(((error / scale) ** 2).mean()),
        "l1_by_dimension": {name: float(value) for name, value in zip(names, by_dimension, strict=True)},
    }


def read_clips(index: DatasetIndex, config: OpenLoopConfig, embodiment: str, mean: np.ndarray) -> Clips:
    columns = index.manifest.select(["source", "episode", "start_s", "embodiment"])
    rows = index.indices(config.split, only_with_actions=True)
    # An episode's clips by their start, to find what was executed just before one of them
    episodes: dict[tuple[str, str], list[tuple[float, int]]] = {}
    positions = []
    for i, row in zip(rows.tolist(), columns.take(rows).to_pylist(), strict=True):
        if row["embodiment"] == embodiment:
            episodes.setdefault((row["source"], row["episode"]), []).append((row["start_s"], i))
            positions.append(i)
    if not positions:
        raise UserError(
            f"{index.address}: split {config.split!r} holds no clip of {embodiment!r}: hold out episodes when "
            "building, or measure on another split"
        )
    positions = positions[:: -(-len(positions) // config.max_clips)]
    clips = [_read_control(index, i) for i in positions]
    last_actions = []
    for clip in clips:
        starts = episodes[clip.meta.source.name, clip.meta.episode]
        before = [start for start in starts if start[0] < clip.meta.start_s]
        last_actions.append(_last_action(_read_control(index, max(before)[1]), clip) if before else mean)
    proprio = [clip.proprio[0] for clip in clips if clip.proprio is not None]
    return Clips(
        positions=np.array(positions),
        actions=np.stack([clip.actions for clip in clips]),
        is_valid=np.stack([spans_mask(clip.meta.action_spans, index.num_actions) for clip in clips]),
        proprio=np.stack(proprio) if len(proprio) == len(clips) else None,
        last_action=np.stack(last_actions),
        instructions=[clip.meta.instruction or "" for clip in clips],
    )


@dataclass(frozen=True)
class _Control:
    meta: SampleMeta
    actions: Float[np.ndarray, "k a"]
    proprio: Float[np.ndarray, "k s"] | None


def _read_control(index: DatasetIndex, i: int) -> _Control:
    members = index.read_sample(i)
    proprio = read_array(members["proprio.npy"]) if "proprio.npy" in members else None
    return _Control(SampleMeta.model_validate_json(members["meta.json"]), read_array(members["actions.npy"]), proprio)


def _last_action(earlier: _Control, clip: _Control) -> Float[np.ndarray, "a"]:
    """The last action before `clip` that an earlier clip of its episode holds."""
    assert clip.meta.control_hz is not None
    row = round((clip.meta.start_s - earlier.meta.start_s) * clip.meta.control_hz) - 1
    return earlier.actions[min(row, len(earlier.actions) - 1)]


@torch.no_grad()
def _predict_policy(
    checkpoint: Path, is_blind: bool, index: DatasetIndex, embodiment: str, clips: Clips, batch_size: int
) -> Float[np.ndarray, "n k a"]:
    from .policy import Policy  # a model and its codec: only where such a row is asked for

    trained_on = DatasetFolder(checkpoint)
    check_same_encoders(index, trained_on)
    check_same_robot(index, embodiment, trained_on, needs_proprio=True)
    policy = Policy.load(checkpoint, blind=is_blind)
    inputs = policy.config.inputs
    resolve(policy.config.world_model, ModelInputs(index, inputs))
    dataset = ClipDataset(index, ClipConfig(**inputs.model_dump()))
    chunks = []
    for start in range(0, len(clips.positions), batch_size):
        batch = collate([dataset[i] for i in clips.positions[start : start + batch_size].tolist()])
        chunks.append(policy.predict_chunk(batch))
    return np.concatenate(chunks)


def _predict_bc(
    policy: BehaviourCloning, index: DatasetIndex, embodiment: str, clips: Clips, batch_size: int
) -> Float[np.ndarray, "n k a"]:
    index.check_view(policy.spec.view)
    robot = index.embodiments[embodiment]
    if (robot.action_dim, robot.proprio_dim) != (policy.spec.action_dim, policy.spec.proprio_dim):
        raise UserError(
            f"{index.address}: {embodiment} has {robot.action_dim} actions and {robot.proprio_dim} proprio values, but "
            f"behaviour cloning was trained on {policy.spec.action_dim} and {policy.spec.proprio_dim}: train it anew"
        )
    chunks = []
    proprio = clips.proprio if clips.proprio is not None else np.zeros((len(clips.positions), 1), np.float32)
    for start in range(0, len(clips.positions), batch_size):
        batch = slice(start, start + batch_size)
        videos = [decode_clip(index.read_sample(i)[f"{policy.spec.view}.mp4"], [0])[0] for i in clips.positions[batch]]
        images = torch.from_numpy(np.stack(videos))
        instructions = policy.instruction_indices(clips.instructions[batch])
        chunks.append(policy.predict(images, torch.from_numpy(proprio[batch]), instructions).numpy())
    return np.concatenate(chunks)
