"""Joint video-action modelling: the imagined future and the action chunk are denoised together.

Context latents and proprio are clean. Noised future latents and noised actions see the context, the proprio and each
other, so the chunk fits the imagined future and the future fits the chunk. Video and actions have independent flow
times in training (Unified World Models, arXiv 2504.02792), so the same weights also serve as forward dynamics (clean
actions, through the world model's own conditioning) and as a policy whose video stays noisy.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError
from pretrain import flow_matching
from pretrain.draws import SampleDraws
from pretrain.flops import Flops, action_flops, policy_tokens, training_flops
from pretrain.flow_matching import FlowTimeConfig, Prediction
from pretrain.models.action_expert import ACTION_EXPERT, NOISED_ACTIONS, PROPRIO, ActionExpert, ActionExpertConfig
from pretrain.models.execution import Recomputing
from pretrain.models.token_groups import Rule, Visibility
from pretrain.models.transformer import run_experts
from pretrain.models.video_dit import VIDEO_EXPERT
from pretrain.world_models.base import Batch, LossTerms
from pretrain.world_models.observation_space import CONTEXT, FUTURE, ObservationSpaceWorldModel

VISIBILITY: Visibility = {
    (CONTEXT, CONTEXT): Rule.ALWAYS,
    (PROPRIO, CONTEXT): Rule.ALWAYS,
    (PROPRIO, PROPRIO): Rule.ALWAYS,
    **{
        (query, key): Rule.ALWAYS
        for query in (FUTURE, NOISED_ACTIONS)
        for key in (CONTEXT, PROPRIO, FUTURE, NOISED_ACTIONS)
    },
}


class JointVideoActionConfig(StrictConfig):
    """How a world model becomes a joint video-action model."""

    paradigm: Literal["joint_video_action"] = "joint_video_action"
    action_expert: ActionExpertConfig = ActionExpertConfig()
    action_prediction: Prediction = Field("velocity", description="what the action head predicts: velocity or data")
    action_flow_time: FlowTimeConfig = Field(FlowTimeConfig(), description="law of the actions' flow times")
    video_loss_weight: float = Field(1.0, ge=0, description="weight of the video loss beside the action loss")
    conditioned_video_share: float = Field(
        0.0, ge=0, le=1, description="share of clips whose video is conditioned on the true actions, as in pretraining"
    )
    proprio_noise_std: float = Field(0.0, ge=0, description="noise on normalised proprio in training")
    num_inference_steps: int = Field(8, ge=1, description="denoising steps per plan")
    action_horizon: int | None = Field(None, ge=1, description="actions per chunk; null: the clip's")
    proprio_dim: int | None = Field(None, ge=1, description="numbers in the proprio reading; null: the dataset's")


class JointVideoAction(nn.Module):
    """See the module docstring. `world_model` keeps its own weights and remains usable by itself."""

    def __init__(self, config: JointVideoActionConfig, world_model: ObservationSpaceWorldModel) -> None:
        super().__init__()
        if config.action_horizon is None or config.proprio_dim is None or world_model.config.action_dim is None:
            raise UserError(
                "A policy's action_horizon, proprio_dim or action_dim is null: only a training run's config may leave "
                "them to the dataset; give the export/ folder of one run, unchanged."
            )
        if config.action_horizon % world_model.action_conditioner.actions_per_latent:
            raise UserError(
                f"policy.action_horizon={config.action_horizon} is no multiple of the "
                f"{world_model.action_conditioner.actions_per_latent} actions of a latent frame; choose one that is."
            )
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, world_model.config.action_dim
        self.world_model = world_model
        self.action_expert = ActionExpert(
            config.action_expert, world_model.config.video, world_model.config.action_dim, config.proprio_dim
        )

    def init_weights(self) -> None:
        """Draws all weights anew, from the default generator; those on the meta device draw nothing."""
        self.world_model.init_weights()
        self.action_expert.init_weights()

    @property
    def experts(self) -> dict[str, nn.ModuleList]:
        return {VIDEO_EXPERT: self.world_model.video.blocks, ACTION_EXPERT: self.action_expert.blocks}

    def project_text(self, text: Float[Tensor, "b l d"]) -> dict[str, Tensor]:
        return {
            VIDEO_EXPERT: self.world_model.video.condition_embedder.text_embedder(text),
            ACTION_EXPERT: self.action_expert.condition_embedder.text_embedder(text),
        }

    def work(self, batch: Batch, recomputing: Recomputing) -> tuple[int, Flops]:
        """Tokens and training FLOPs of one clip."""
        world_model, sizes, text = self.world_model, self.world_model.config.video, batch["text_tokens"].shape[1]
        context_frames = world_model.config.context_latent_frames
        video, acting = policy_tokens(sizes, world_model.latent_size(batch), text, context_frames, self.action_horizon)
        proprio_dim = batch["proprio"].shape[1]
        flops = action_flops(self.config.action_expert, sizes, acting, self.action_dim, proprio_dim, recomputing)
        return video.tokens + acting.tokens, training_flops(sizes, video, recomputing) + flops

    def loss(self, batch: Batch, draws: SampleDraws) -> LossTerms:
        config, world_model = self.config, self.world_model
        context, future = world_model.split(world_model.latents(batch))
        actions = world_model.future_actions(batch["actions"])[:, : config.action_horizon]
        valid = world_model.future_actions(batch["action_is_valid"])[:, : config.action_horizon]
        # Draw order is part of the step's definition: changing it changes every run's numbers.
        video_time = flow_matching.sample_flow_time(world_model.config.flow_time, draws, world_model.num_tokens(future))
        action_time = flow_matching.sample_flow_time(config.action_flow_time, draws, actions.shape[1])
        video_noise = draws.normal(*future.shape[1:])
        action_noise = draws.normal(*actions.shape[1:])
        proprio_noise = draws.normal(*batch["proprio"].shape[1:])
        conditioned = draws.uniform() < config.conditioned_video_share
        # Whoever is told the true actions must not be asked to guess them: those clips train the video alone.
        conditioned = conditioned & batch["has_actions"]
        action_time = torch.where(conditioned | ~batch["has_actions"], torch.ones_like(action_time), action_time)

        noised_video = flow_matching.add_noise(future, video_noise, video_time)
        noised_actions = flow_matching.add_noise(actions, action_noise, action_time)
        proprio = batch["proprio"] + config.proprio_noise_std * proprio_noise
        video_pred, action_pred = self._denoise_all(
            context, noised_video, noised_actions, proprio, batch, video_time, action_time, conditioned
        )
        video_target = flow_matching.training_target(future, video_noise, world_model.config.prediction)
        action_target = flow_matching.training_target(actions, action_noise, config.action_prediction)
        video_loss = F.mse_loss(video_pred.float(), video_target)
        counted = (valid & ~conditioned[:, None, None]).float()
        squared = (action_pred.float() - action_target).square() * counted
        action_loss = squared.sum() / counted.sum().clamp_min(1)
        total = config.video_loss_weight * video_loss + action_loss
        by_sample = {}
        if not self.training:
            of_actions = squared.detach().sum((1, 2)) / counted.sum((1, 2))  # NaN where none counts
            by_sample = {"video": flow_matching.errors_by_sample(video_pred, video_target), "action": of_actions}
        return LossTerms(total, {"video": video_loss.detach(), "action": action_loss.detach()}, by_sample)

    def _denoise_all(
        self,
        context: Tensor,
        noised_video: Tensor,
        noised_actions: Tensor,
        proprio: Tensor,
        batch: Batch,
        video_time: Tensor,
        action_time: Tensor,
        conditioned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One pass over all groups, as in training."""
        world_model = self.world_model
        action_embedding = world_model.embed_actions(
            world_model.future_actions(batch["actions"]), conditioned, noised_video
        )
        future, video_embedding = world_model.future_group(noised_video, context, video_time, action_embedding)
        chunk, chunk_embedding = self.action_expert.action_group(noised_actions, action_time)
        groups = [world_model.context_group(context), future, self.action_expert.proprio_group(proprio), chunk]
        tokens, _ = run_experts(self.experts, self.project_text(batch["text_tokens"]), groups, VISIBILITY)
        video_pred = world_model.read_future(tokens[1], video_embedding, noised_video)
        return video_pred, self.action_expert.read_actions(tokens[3], chunk_embedding, noised_actions.shape[1])

    @torch.no_grad()
    def plan(
        self,
        context: Float[Tensor, "b t0 c h w"],
        proprio: Float[Tensor, "b s"],
        text: Float[Tensor, "b l d"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "b k a"], Float[Tensor, "b t c h w"]]:
        """An action chunk (normalised) and the future it leads to, denoised together.

        Clean groups are computed once and kept: nothing that they see changes between denoising steps.
        """
        config, world_model = self.config, self.world_model
        projected = self.project_text(text)
        clean = [world_model.context_group(context), self.action_expert.proprio_group(proprio)]
        _, past = run_experts(self.experts, projected, clean, VISIBILITY, keep=True)
        frames = self.action_horizon // world_model.action_conditioner.actions_per_latent
        video = torch.randn(len(context), frames, *context.shape[2:], generator=generator)
        actions = torch.randn(len(context), self.action_horizon, self.action_dim, generator=generator)
        video, actions = video.to(context.device), actions.to(context.device)
        no_actions = world_model.embed_actions(None, None, video)
        times = flow_matching.schedule(config.num_inference_steps).tolist()
        for now, following in pairwise(times):
            flow_time = context.new_full((len(context),), now)
            future, video_embedding = world_model.future_group(video, context, flow_time, no_actions)
            chunk, chunk_embedding = self.action_expert.action_group(actions, flow_time)
            tokens, _ = run_experts(self.experts, projected, [future, chunk], VISIBILITY, past)
            video_pred = world_model.read_future(tokens[0], video_embedding, video).float()
            action_pred = self.action_expert.read_actions(tokens[1], chunk_embedding, self.action_horizon).float()
            video_step = flow_matching.to_velocity(video_pred, video, flow_time, world_model.config.prediction)
            action_step = flow_matching.to_velocity(action_pred, actions, flow_time, config.action_prediction)
            video = video + (following - now) * video_step
            actions = actions + (following - now) * action_step
        return actions, world_model.anchor(context) + world_model.residual_scale * video
