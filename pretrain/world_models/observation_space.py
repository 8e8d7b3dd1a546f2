"""The observation-space world model: an action-conditioned latent video transformer, trained by flow matching.

The first latent frames of a clip are clean context, the rest is denoised. Context looks only at itself, so it can be
computed once and kept while the future is denoised (and while many futures of one context are). Actions are added to
the timestep embedding of the latent frame that they lead to; a clip without actions adds nothing, so action-free video
trains the same weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError
from data_pipeline.encoder_config import TEMPORAL_STRIDE

from .. import flow_matching
from ..draws import SampleDraws
from ..flops import Flops, training_flops, world_model_tokens
from ..flow_matching import FlowTimeConfig, Prediction
from ..models.execution import Recomputing
from ..models.token_groups import Rule, TokenGroup, Visibility
from ..models.transformer import KeyValueCache, run_experts
from ..models.video_dit import VIDEO_EXPERT, Size, TwoLayers, VideoDiT, VideoDiTConfig
from .base import Batch, LossTerms

if TYPE_CHECKING:
    from data_pipeline.datasets import MixedInputs
    from data_pipeline.encoders import PixelCodec
    from data_pipeline.model_inputs import ModelInputs

MIN_RESIDUAL_STD = 1e-2

MASK_CHANNELS = TEMPORAL_STRIDE
"""Of Wan's image-to-video input, which is [latents, mask, latents of the given frames]: one per pixel frame."""

CONTEXT, FUTURE = "context_latents", "noised_latents"

VISIBILITY: Visibility = {
    (CONTEXT, CONTEXT): Rule.ALWAYS,
    (FUTURE, CONTEXT): Rule.ALWAYS,
    (FUTURE, FUTURE): Rule.ALWAYS,
}


class ObservationSpaceConfig(StrictConfig):
    """A video world model. Fields that are null are read off the dataset and written into the run's config."""

    kind: Literal["observation_space"] = "observation_space"
    video: VideoDiTConfig
    context_latent_frames: int = Field(1, ge=1, description="clean latent frames at the start of each clip")
    drawn_context_latent_frames: tuple[NonNegativeInt, ...] | None = Field(
        None, min_length=1, description="training draws their number from these, per step; null: context_latent_frames"
    )
    prediction: Prediction = Field("velocity", description="what the network predicts: velocity (Wan) or data")
    predict_residual: bool = Field(False, description="predict the change from the last context latent frame")
    flow_time: FlowTimeConfig = FlowTimeConfig()
    action_dropout: float = Field(0.0, ge=0, le=1, description="share of clips trained as if they had no actions")
    text_dropout: float = Field(0.0, ge=0, le=1, description="share of clips trained with an empty instruction")
    action_dim: Size | None = Field(None, description="numbers per action; null: the dataset's")
    actions_per_latent: Size | None = Field(None, description="actions per latent frame; null: the dataset's")
    residual_std: float | None = Field(
        None, ge=1e-6, le=1e6, description="scale of the residual; null: measured on the dataset"
    )

    @model_validator(mode="after")
    def _residuals_have_a_context(self) -> Self:
        if self.predict_residual and 0 in (self.drawn_context_latent_frames or ()):
            raise ValueError("predict_residual needs a context, so drawn_context_latent_frames cannot hold 0")
        return self


class ActionConditioner(nn.Module):
    """The actions of one latent frame, as a vector to add to its timestep embedding; starts at zero."""

    def __init__(self, action_dim: int, actions_per_latent: int, width: int) -> None:
        super().__init__()
        self.actions_per_latent = actions_per_latent
        self.mlp = TwoLayers(action_dim * actions_per_latent, width, nn.SiLU())
        self.init_weights()

    def init_weights(self) -> None:
        self.mlp.linear_1.reset_parameters()
        nn.init.zeros_(self.mlp.linear_2.weight)
        nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, actions: Float[Tensor, "b k a"], use: Bool[Tensor, "b"]) -> Float[Tensor, "b t d"]:
        per_frame = rearrange(actions, "b (t r) a -> b t (r a)", r=self.actions_per_latent)
        return self.mlp(per_frame) * use[:, None, None]


class ObservationSpaceWorldModel(nn.Module):
    """See the module docstring. `codec` (frozen, not a submodule) is needed only to encode and decode pixels."""

    def __init__(self, config: ObservationSpaceConfig, codec: PixelCodec | None = None) -> None:
        super().__init__()
        if config.action_dim is None or config.actions_per_latent is None or config.residual_std is None:
            raise UserError(
                "A world model's action_dim, actions_per_latent or residual_std is null: only a training run's config "
                "may leave them to the dataset; give the export/ folder of one run, unchanged."
            )
        self.config = config
        self.codec = codec
        self.residual_scale = config.residual_std if config.predict_residual else 1.0
        self.video = VideoDiT(config.video)
        self.action_conditioner = ActionConditioner(config.action_dim, config.actions_per_latent, config.video.width)

    def init_weights(self) -> None:
        """Draws all weights anew, from the default generator; those on the meta device draw nothing."""
        self.video.init_weights()
        self.action_conditioner.init_weights()

    # Pixels and latents -------------------------------------------------------------------------------------------

    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c h w"]:
        return self._codec().to(video.device).encode(video)

    def decode(self, latents: Float[Tensor, "b t c h w"]) -> UInt8[Tensor, "b f h w 3"]:
        return self._codec().to(latents.device).decode(latents)

    def latents(self, batch: Batch) -> Float[Tensor, "b t c h w"]:
        """Those of the batch; where it has only video, as `build` would have stored them."""
        if "latents" in batch:
            return batch["latents"]
        video = batch["video"]
        with torch.autocast(video.device.type, enabled=False):
            return self.encode(video).to(torch.bfloat16).float()

    def _codec(self) -> PixelCodec:
        if self.codec is None:
            raise ValueError("this world model was built without a codec: pass one to encode or decode pixels")
        return self.codec

    @property
    def context_frames(self) -> int:
        """Pixel frames that the context latent frames stand for."""
        return 1 + (self.config.context_latent_frames - 1) * TEMPORAL_STRIDE

    def anchor(self, context: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b 1 c h w"] | float:
        """What predictions are relative to: the last context latent frame, or nothing."""
        return context[:, -1:] if self.config.predict_residual else 0.0

    # Parts that a world action model arranges anew ----------------------------------------------------------------

    def context_group(self, context: Float[Tensor, "b t c h w"]) -> TokenGroup:
        _, modulation = self.video.condition_embedder.time(torch.zeros_like(context[:, :, 0, 0, 0]))
        return self.video.group(CONTEXT, self._network_input(context, is_given=True), modulation)

    def future_group(
        self,
        noised: Float[Tensor, "b t c h w"],
        context: Float[Tensor, "b t0 c h w"],
        flow_time: Float[Tensor, "b"],
        action_embedding: Float[Tensor, "b t d"],
    ) -> tuple[TokenGroup, Float[Tensor, "b t d"]]:
        """Noised future as tokens, and the time embedding that `read_future` needs.

        With residuals the tokens show `anchor + scale * noised`: the network sees where the noise is centred.
        """
        times = flow_time[:, None].expand(-1, noised.shape[1])
        embedding, modulation = self.video.condition_embedder.time(times, action_embedding)
        latents = self._network_input(self.anchor(context) + self.residual_scale * noised, is_given=False)
        return self.video.group(FUTURE, latents, modulation, first_frame=context.shape[1]), embedding

    def _network_input(self, latents: Float[Tensor, "b t c h w"], is_given: bool) -> Float[Tensor, "b t c2 h w"]:
        """For image-to-video models the mask, and the latents again where they are given (zeros elsewhere)."""
        if self.config.video.in_channels == latents.shape[2]:
            return latents
        mask = torch.full_like(latents[:, :, :1], float(is_given)).expand(-1, -1, MASK_CHANNELS, -1, -1)
        return torch.cat([latents, mask, latents * float(is_given)], dim=2)

    def read_future(
        self, tokens: Float[Tensor, "b n d"], embedding: Float[Tensor, "b t d"], like: Float[Tensor, "b t c h w"]
    ) -> Float[Tensor, "b t c h w"]:
        return self.video.head(tokens, embedding, self.video.grid((like.shape[1], *like.shape[3:])))

    def embed_actions(
        self, actions: Float[Tensor, "b k a"] | None, use: Bool[Tensor, "b"] | None, like: Float[Tensor, "b t c h w"]
    ) -> Float[Tensor, "b t d"]:
        """Actions per future latent frame; none at all is the same as `use` being false everywhere."""
        batch, frames = like.shape[:2]
        if actions is None:
            return like.new_zeros(batch, frames, self.config.video.width)
        use = torch.ones(batch, dtype=torch.bool, device=like.device) if use is None else use
        return self.action_conditioner(actions[:, : frames * self.action_conditioner.actions_per_latent], use)

    def future_actions(self, actions: Float[Tensor, "b k a"], context_latent_frames: int | None = None) -> Tensor:
        """Of a clip's actions those after its context."""
        count = self.config.context_latent_frames if context_latent_frames is None else context_latent_frames
        return actions[:, max(count - 1, 0) * self.action_conditioner.actions_per_latent :]

    def num_tokens(self, latents: Float[Tensor, "b t c h w"]) -> int:
        return math.prod(self.video.grid((latents.shape[1], *latents.shape[3:])))

    def latent_size(self, batch: Batch) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip's latents, whether the batch has them or video."""
        if "latents" in batch:
            frames, _, height, width = batch["latents"].shape[1:]
            return frames, height, width
        frames, height, width, _ = batch["video"].shape[1:]
        stride = self._codec().spatial_stride
        return 1 + (frames - 1) // TEMPORAL_STRIDE, height // stride, width // stride

    def work(self, batch: Batch, recomputing: Recomputing) -> tuple[int, Flops]:
        """Tokens and training FLOPs of one clip, counted with `context_latent_frames` where their number is drawn."""
        video, text = self.config.video, batch["text_tokens"].shape[1]
        counts = world_model_tokens(video, self.latent_size(batch), text, self.config.context_latent_frames)
        return counts.tokens, training_flops(video, counts, recomputing)

    # The protocol -------------------------------------------------------------------------------------------------

    def split(
        self, latents: Float[Tensor, "b t c h w"], context_latent_frames: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context and the (scaled, relative) future that is to be predicted."""
        count = self.config.context_latent_frames if context_latent_frames is None else context_latent_frames
        context, future = latents.tensor_split([count], dim=1)
        return context, (future - self.anchor(context)) / self.residual_scale

    def loss(self, batch: Batch, draws: SampleDraws) -> LossTerms:
        count = self.config.context_latent_frames
        if self.training and self.config.drawn_context_latent_frames is not None:
            count = draws.one_of(self.config.drawn_context_latent_frames)
        context, data = self.split(self.latents(batch), count)
        flow_time = flow_matching.sample_flow_time(self.config.flow_time, draws, self.num_tokens(data))
        noise = draws.normal(*data.shape[1:])
        keep_text = draws.uniform() >= self.config.text_dropout
        keep_actions = draws.uniform() >= self.config.action_dropout
        noised = flow_matching.add_noise(data, noise, flow_time)
        given = self.future_actions(batch["actions"], count)
        led_to = data if count else data[:, 1:]  # nothing leads to a clip's first latent frame
        actions = self.embed_actions(given, batch["has_actions"] & keep_actions, led_to)
        actions = F.pad(actions, (0, 0, data.shape[1] - led_to.shape[1], 0))
        text = self.video.condition_embedder.text_embedder(batch["text_tokens"] * keep_text[:, None, None])
        future, embedding = self.future_group(noised, context, flow_time, actions)
        groups = [self.context_group(context), future] if count else [future]
        tokens, _ = run_experts({VIDEO_EXPERT: self.video.blocks}, {VIDEO_EXPERT: text}, groups, VISIBILITY)
        output = self.read_future(tokens[-1], embedding, data)
        target = flow_matching.training_target(data, noise, self.config.prediction)
        loss = F.mse_loss(output.float(), target)
        by_sample = {} if self.training else {"video": flow_matching.errors_by_sample(output, target)}
        return LossTerms(loss, {"video": loss.detach()}, by_sample)

    @torch.no_grad()
    def predict(
        self,
        context: Float[Tensor, "b t0 c h w"],
        actions: Float[Tensor, "b k a"] | None,
        text: Float[Tensor, "b l d"],
        num_latent_frames: int | None = None,
        num_inference_steps: int = 1,
        num_draws: int = 4,
        generator: torch.Generator | None = None,
        has_actions: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b t c h w"]:
        """Future latents. One step gives the mean prediction (averaged over `num_draws` noises), more give samples.

        `actions` begin where the context ends (`future_actions` of a clip's); `num_latent_frames` defaults to what they
        cover. Those of clips that `has_actions` says have none add nothing. The context is computed once, for all draws
        and steps.
        """
        if num_latent_frames is None:
            if actions is None:
                raise ValueError("without actions, say how far to predict: num_latent_frames")
            num_latent_frames = actions.shape[1] // self.action_conditioner.actions_per_latent
        draws = num_draws if num_inference_steps == 1 else 1
        projected = self.video.condition_embedder.text_embedder(text)
        experts, text_by_expert = {VIDEO_EXPERT: self.video.blocks}, {VIDEO_EXPERT: projected}
        _, past = run_experts(experts, text_by_expert, [self.context_group(context)], VISIBILITY, keep=True)
        past = past.repeat(draws)
        context = context.repeat_interleave(draws, 0)
        text_by_expert = {VIDEO_EXPERT: projected.repeat_interleave(draws, 0)}
        shape = (len(context), num_latent_frames, *context.shape[2:])
        noise = torch.randn(shape, generator=generator, device=context.device)
        action_embedding = self.embed_actions(actions, has_actions, noise[::draws]).repeat_interleave(draws, 0)

        def network(noised: Tensor, flow_time: Tensor) -> Tensor:
            return self._denoise(noised, context, flow_time, action_embedding, text_by_expert, past)

        if num_inference_steps == 1:
            ones = noise.new_ones(len(noise))
            data = flow_matching.to_data(network(noise, ones), noise, ones, self.config.prediction)
            data = data.unflatten(0, (-1, draws)).mean(1)
            context = context[::draws]
        else:

            def velocity(noised: Tensor, now: float) -> Tensor:
                flow_time = noised.new_full((len(noised),), now)
                return flow_matching.to_velocity(network(noised, flow_time), noised, flow_time, self.config.prediction)

            data = flow_matching.euler_sample(velocity, noise, num_inference_steps)
        return self.anchor(context) + self.residual_scale * data

    def _denoise(
        self,
        noised: Tensor,
        context: Tensor,
        flow_time: Tensor,
        action_embedding: Tensor,
        text: dict[str, Tensor],
        past: KeyValueCache,
    ) -> Tensor:
        future, embedding = self.future_group(noised, context, flow_time, action_embedding)
        (tokens,), _ = run_experts({VIDEO_EXPERT: self.video.blocks}, text, [future], VISIBILITY, past)
        return self.read_future(tokens, embedding, noised).float()


def build_world_model(config: ObservationSpaceConfig, inputs: ModelInputs | MixedInputs) -> ObservationSpaceWorldModel:
    """A world model that is fed so: null fields filled in, sizes checked. It is on the meta device: it has no weights
    before an engine gives it some."""
    config, codec = resolve(config, inputs), inputs.codec()
    with torch.device("meta"):
        return ObservationSpaceWorldModel(config, codec)


def resolve(config: ObservationSpaceConfig, inputs: ModelInputs | MixedInputs) -> ObservationSpaceConfig:
    """Null fields filled in from the dataset; a `UserError` where it and the others do not fit each other."""
    dataset = inputs.dataset
    for one in inputs.each:
        _check_shape(config, one)
    action_dim = max(dataset.action_dim, 1)  # batches are at least so wide, see `data_pipeline.clips`
    for name, given, found in (
        ("action_dim", config.action_dim, action_dim),
        ("actions_per_latent", config.actions_per_latent, dataset.actions_per_latent),
        ("video.text_dim", config.video.text_dim, dataset.info.text_encoder.width),
    ):
        if given not in (None, found):
            raise UserError(
                f"model.{name}={given}, but in {dataset} it is {found}; set it to {found}, or choose a dataset "
                "that fits the model."
            )
    return config.model_copy(
        update={
            "action_dim": action_dim,
            "actions_per_latent": dataset.actions_per_latent,
            # a dataset in which nothing moves has none, and nothing may be divided by it
            "residual_std": config.residual_std or max(dataset.residual_std, MIN_RESIDUAL_STD),
        }
    )


def _check_shape(config: ObservationSpaceConfig, inputs: ModelInputs) -> None:
    dataset = inputs.dataset
    if inputs.layout.kind == "separate":
        raise UserError(
            "loader.layout=separate gives a model every view by itself, but an observation_space model sees one "
            "picture; choose stack_height or tile."
        )
    frames, channels, height, width = inputs.latent_shape
    video = config.video
    image_to_video = 2 * channels + MASK_CHANNELS
    if video.in_channels not in (channels, image_to_video) or video.out_channels != channels:
        raise UserError(
            f"model.video.in_channels={video.in_channels} and out_channels={video.out_channels}, but the latents in "
            f"{dataset} have {channels} channels; set both to {channels}, or in_channels to {image_to_video} for "
            "an image-to-video model."
        )
    if height % video.patch_size[1] or width % video.patch_size[2]:
        raise UserError(
            f"model.video.patch_size={list(video.patch_size)} does not divide the {height}x{width} latents of "
            f"{dataset}; choose divisors of both."
        )
    most = max(size // patch for size, patch in zip((frames, height, width), video.patch_size, strict=True))
    if most > video.rope_max_seq_len:  # we would compute them, but diffusers could not use the export
        raise UserError(
            f"model.video.rope_max_seq_len={video.rope_max_seq_len}, but a side of the latents of {dataset} has {most} "
            f"tokens; set it to at least {most}, or show less of a clip."
        )
    for name, count in (
        ("context_latent_frames", config.context_latent_frames),
        ("drawn_context_latent_frames", max(config.drawn_context_latent_frames or (0,))),
    ):
        if frames <= count:
            raise UserError(
                f"model.{name}={count} leaves nothing to predict: the clips of {dataset} are shown with {frames} "
                "latent frames."
            )
    if config.context_latent_frames % video.patch_size[0] or frames % video.patch_size[0]:
        raise UserError(
            f"model.video.patch_size={list(video.patch_size)} does not divide the {config.context_latent_frames} "
            f"context frames and the {frames} latent frames of the clips in {dataset}; let it begin with 1."
        )
