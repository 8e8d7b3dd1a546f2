"""The action expert: the stack that carries proprio and action tokens beside the video expert.

It shares heads and head_dim with the video expert, so both meet in one attention per layer, and may be narrower.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from configs.loader import StrictConfig

from .sequence import SplitsSequence
from .token_groups import TokenGroup
from .transformer import ExpertBlock, FP32LayerNorm
from .video_dit import ConditionEmbedder, VideoDiTConfig, rotary_table, rotations

ACTION_EXPERT = "action"
PROPRIO, NOISED_ACTIONS = "proprio", "noised_actions"


class ActionExpertConfig(StrictConfig):
    """Sizes that are the action expert's own; heads, head_dim, layers and text width are the video expert's."""

    width: int = Field(1024, ge=8, description="model width, at most the video expert's")
    ffn_dim: int = Field(4096, ge=8, description="inner width of the feed-forward")
    freq_dim: int = Field(256, ge=2, multiple_of=2, description="sinusoids of the timestep embedding")


class ActionExpert(SplitsSequence):
    """Proprio is one clean token, an action chunk is one token per action, each with its own flow time."""

    def __init__(self, config: ActionExpertConfig, video: VideoDiTConfig, action_dim: int, proprio_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = video.num_attention_heads, video.attention_head_dim
        self.condition_embedder = ConditionEmbedder(config.width, config.freq_dim, video.text_dim)
        self.proprio_in = nn.Linear(proprio_dim, config.width)
        self.action_in = nn.Linear(action_dim, config.width)
        self.blocks = nn.ModuleList(
            ExpertBlock(
                config.width, config.ffn_dim, video.num_attention_heads, video.attention_head_dim, video.eps,
                video.cross_attn_norm,
            )
            for _ in range(video.num_layers)
        )  # fmt: skip
        self.norm_out = FP32LayerNorm(config.width, video.eps, elementwise_affine=False)
        self.action_out = nn.Linear(config.width, action_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew, as torch draws those of its layers; the last layer is of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, ExpertBlock | ActionExpert):
                nn.init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[-1] ** -0.5)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def proprio_group(self, proprio: Float[Tensor, "b s"]) -> TokenGroup:
        _, modulation = self.condition_embedder.time(proprio.new_zeros(len(proprio), 1))
        return self._group(PROPRIO, self.proprio_in(proprio)[:, None], modulation)

    def action_group(
        self, noised: Float[Tensor, "b k a"], flow_time: Float[Tensor, "b"]
    ) -> tuple[TokenGroup, Float[Tensor, "b 1 d"]]:
        """Noised actions as tokens, and the time embedding that `read_actions` needs."""
        embedding, modulation = self.condition_embedder.time(flow_time[:, None])
        return self._group(NOISED_ACTIONS, self.action_in(noised), modulation), embedding

    def _group(self, name: str, tokens: Float[Tensor, "b n d"], modulation: Tensor) -> TokenGroup:
        count = tokens.shape[1]
        rotary = rotations(rotary_table(self.head_dim, torch.arange(count)), tokens.device)
        blocks = torch.zeros(count, dtype=torch.long)
        return TokenGroup(name, ACTION_EXPERT, tokens, modulation, rotary, blocks).split(self.sequence)

    def read_actions(
        self, tokens: Float[Tensor, "b n d"], embedding: Float[Tensor, "b 1 d"], num_actions: int
    ) -> Float[Tensor, "b num_actions a"]:
        shift, scale = (self.scale_shift_table[:, None].float() + embedding[:, :, None].float()).unbind(2)
        actions = self.action_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        return self.sequence.whole(actions, 1, num_actions)
