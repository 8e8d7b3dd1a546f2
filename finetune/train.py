"""Fine-tunes a pretrained world model into a world action model for one robot, and resumes by itself from `run_dir`.

    python -m finetune.train --config C                                  one process
    torchrun --standalone --nproc-per-node 2 -m finetune.train --config C             two ranks on this machine

The loop is pretraining's (`pretrain.train.train`): engine, checkpoints, exact resume and metrics are the same, only the
model and its loss differ. Writes what pretraining writes; `export/` is what `finetune.policy.Policy` opens.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from pydantic import Field

from configs.loader import UserError, dump_config, run_command
from data_pipeline.dataset import DatasetFolder
from data_pipeline.datasets import Datasets, MixedInputs
from pretrain.evaluate import check_same_encoders
from pretrain.exported import MODEL_YAML, WORLD_MODEL, WorldModelConfig, load_model_config
from pretrain.run import StopSignal, exclusive, log_on_main_rank_only
from pretrain.starting_weights import SeededWeights, pretrained_weights
from pretrain.train import TrainConfig, dataset_batches, encoder_folders, is_new_run, resume_run, train
from pretrain.weights import FirstOf, Weights
from pretrain.world_models.observation_space import ObservationSpaceWorldModel, build_world_model

from .paradigms.joint_video_action import JointVideoAction, JointVideoActionConfig
from .policy import PolicyModelConfig

logger = logging.getLogger(__name__)


class FinetuneConfig(TrainConfig):
    """One fine-tuning run."""

    pretrained: Path = Field(description="export/ folder of the pretraining run to start from")
    policy: JointVideoActionConfig = JointVideoActionConfig()
    embodiment: str | None = Field(None, description="robot to act with; null: the dataset's, if it has only one")
    execute_steps: int = Field(4, ge=1, description="actions executed before replanning")


def main(config: FinetuneConfig) -> int:
    log_on_main_rank_only()
    config = resume_run(config)
    datasets = Datasets.open(config.loader.addresses, config.loader.storage)
    model, described = build_policy_model(config, datasets)
    weights = policy_weights(config, model, datasets) if is_new_run(config.run_dir) else None
    texts = {MODEL_YAML: dump_config(described), **datasets.files()}
    batches = dataset_batches(datasets, config.loader)
    with exclusive(config.run_dir), StopSignal() as stop:
        return train(config, model, texts, batches, stop, encoder_folders(datasets.first.path), weights)


def build_policy_model(config: FinetuneConfig, datasets: Datasets) -> tuple[JointVideoAction, PolicyModelConfig]:
    """The pretrained world model with a new action expert, sized for this dataset's robot. On the meta device: it has
    no weights before an engine gives it some."""
    embodiment = choose_embodiment(config, datasets)
    inputs = datasets.inputs(config.loader.inputs)
    _check_one_size(inputs)
    pretrained = load_model_config(config.pretrained, WorldModelConfig).world_model
    check_same_encoders(datasets, DatasetFolder(config.pretrained))
    of_this_robot = {"action_dim": None, "actions_per_latent": None}
    world_model = build_world_model(pretrained.model_copy(update=of_this_robot), inputs)
    num_actions, per_latent = inputs.each[0].num_actions, datasets.actions_per_latent
    horizon = config.policy.action_horizon or num_actions
    if horizon % per_latent or not 0 < horizon <= num_actions:
        raise UserError(
            f"policy.action_horizon={horizon} does not fit clips of {num_actions} actions; choose a multiple of "
            f"{per_latent} (the actions of one latent frame) up to {num_actions}."
        )
    if config.execute_steps > horizon:
        raise UserError(f"execute_steps={config.execute_steps} is more than the {horizon} actions that a plan has.")
    policy = config.policy.model_copy(update={"action_horizon": horizon, "proprio_dim": max(datasets.proprio_dim, 1)})
    described = PolicyModelConfig(
        world_model=world_model.config,
        policy=policy,
        inputs=inputs.config,
        embodiment=embodiment,
        execute_steps=config.execute_steps,
    )
    with torch.device("meta"):
        return JointVideoAction(policy, world_model), described


def policy_weights(config: FinetuneConfig, model: JointVideoAction, datasets: Datasets) -> Weights:
    """What a policy starts with: the pretrained world model, and for the rest what the seed draws. On a robot with
    other actions than in pretraining the action conditioner starts anew too."""
    pretrained, ours = load_model_config(config.pretrained, WorldModelConfig).world_model, model.world_model.config
    with torch.device("meta"):
        files = pretrained_weights(ObservationSpaceWorldModel(pretrained), config.pretrained, datasets)
    known, sizes = (
        {name: getattr(one, name) for name in ("action_dim", "actions_per_latent")} for one in (pretrained, ours)
    )
    if known != sizes:
        logger.warning("pretrained for %s, the dataset has %s: the action conditioner starts anew", known, sizes)
        files = [part.without("action_conditioner.") for part in files]
    drawn = SeededWeights(lambda: JointVideoAction(model.config, ObservationSpaceWorldModel(ours)), config.seed)
    return FirstOf(*(part.renamed(f"{WORLD_MODEL}.".__add__) for part in files), drawn)


def _check_one_size(inputs: MixedInputs) -> None:
    if len({one.bucket for one in inputs.each}) > 1:
        sizes = ", ".join(f"{one.dataset}: {one.bucket}" for one in inputs.each)
        raise UserError(
            f"loader.dataset: a policy plans for clips of one size (height x width x frames), but here are {sizes}; "
            "set loader.crop_frames, or build them with the same views."
        )


def choose_embodiment(config: FinetuneConfig, datasets: Datasets) -> str:
    known = sorted(datasets.embodiments)
    if config.embodiment is None and len(known) == 1:
        return known[0]
    if config.embodiment not in known:
        what = "holds no robot" if not known else f"holds the robots {', '.join(known)}; set embodiment to one of them"
        raise UserError(f"embodiment={config.embodiment}: {datasets} {what}.")
    return config.embodiment


if __name__ == "__main__":
    run_command(main, FinetuneConfig, description=__doc__)
