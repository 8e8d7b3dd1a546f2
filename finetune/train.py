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
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.model_inputs import ModelInputs
from pretrain.evaluate import check_same_encoders
from pretrain.exported import load_world_model
from pretrain.run import StopSignal, exclusive, log_on_main_rank_only
from pretrain.train import TrainConfig, dataset_batches, export_files, resume_run, train
from pretrain.world_models.observation_space import ObservationSpaceWorldModel, resolve

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
    index = DatasetIndex(config.loader.dataset, config.loader.storage)
    torch.manual_seed(config.seed)  # every rank starts from the same weights
    model, described = build_policy_model(config, index)
    batches = dataset_batches(index, config.loader)
    with exclusive(config.run_dir), StopSignal() as stop:
        return train(config, model, dump_config(described), batches, stop, export_files(index))


def build_policy_model(config: FinetuneConfig, index: DatasetIndex) -> tuple[JointVideoAction, PolicyModelConfig]:
    """The pretrained world model with a new action expert, sized for this dataset's robot."""
    embodiment = choose_embodiment(config, index)
    inputs = ModelInputs(index, config.loader.inputs)
    world_model = adapt_world_model(config.pretrained, inputs)
    horizon = config.policy.action_horizon or inputs.num_actions
    if horizon % index.actions_per_latent or not 0 < horizon <= inputs.num_actions:
        raise UserError(
            f"policy.action_horizon={horizon} does not fit clips of {inputs.num_actions} actions; choose a multiple of "
            f"{index.actions_per_latent} (the actions of one latent frame) up to {inputs.num_actions}."
        )
    if config.execute_steps > horizon:
        raise UserError(f"execute_steps={config.execute_steps} is more than the {horizon} actions that a plan has.")
    policy = config.policy.model_copy(update={"action_horizon": horizon, "proprio_dim": max(index.proprio_dim, 1)})
    described = PolicyModelConfig(
        world_model=world_model.config,
        policy=policy,
        inputs=inputs.config,
        embodiment=embodiment,
        execute_steps=config.execute_steps,
    )
    return JointVideoAction(policy, world_model), described


def adapt_world_model(pretrained: Path, inputs: ModelInputs) -> ObservationSpaceWorldModel:
    """The pretrained weights; on a robot with other actions all but the action conditioner, which starts anew."""
    world_model, _, described = load_world_model(pretrained)
    dataset = inputs.dataset
    check_same_encoders(dataset, described)
    sizes = {"action_dim": dataset.action_dim, "actions_per_latent": dataset.actions_per_latent}
    known = {name: getattr(world_model.config, name) for name in sizes}
    config = resolve(world_model.config.model_copy(update=sizes), inputs)
    world_model.codec = inputs.codec()  # of these views, which may be others than in pretraining
    if known == sizes:
        return world_model.train()
    logger.warning("pretrained for %s, the dataset has %s: the action conditioner starts anew", known, sizes)
    adapted = ObservationSpaceWorldModel(config, world_model.codec)
    adapted.video.load_state_dict(world_model.video.state_dict())
    return adapted


def choose_embodiment(config: FinetuneConfig, index: DatasetIndex) -> str:
    known = sorted(index.embodiments)
    if config.embodiment is None and len(known) == 1:
        return known[0]
    if config.embodiment not in known:
        what = "holds no robot" if not known else f"holds the robots {', '.join(known)}; set embodiment to one of them"
        raise UserError(f"embodiment={config.embodiment}: {index.address} {what}.")
    return config.embodiment


if __name__ == "__main__":
    run_command(main, FinetuneConfig, description=__doc__)
