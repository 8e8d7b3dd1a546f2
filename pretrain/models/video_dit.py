"""The video expert: a latent video diffusion transformer with Wan's module names and numerics.

`VideoDiT` loads the weights of diffusers' `WanTransformer3DModel` strictly, and its `forward` gives the same outputs.
The parts that `forward` consists of are public, because a world model arranges them itself: clean context frames and
noised future frames are separate token groups, each latent frame with its own flow time.

Source of the numerics: diffusers `transformer_wan.py` (Apache-2.0) and the Wan 2.1 release; written anew.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from configs.loader import StrictConfig

from .sequence import SplitsSequence
from .token_groups import Rotary, Rule, TokenGroup
from .transformer import ExpertBlock, FP32LayerNorm, run_experts

VIDEO_EXPERT = "video"
TIMESTEPS_PER_FLOW_TIME = 1000.0
"""Wan's networks take timesteps in [0, 1000]; flow time is in [0, 1] everywhere else."""


Size = Annotated[int, Field(ge=1, le=2**16)]
"""Far above any that was trained; what is larger is a slip of the keyboard, and more than PyTorch can count."""


class VideoDiTConfig(StrictConfig):
    """Sizes of the video expert; the names are those of a diffusers `config.json`."""

    patch_size: tuple[Size, Size, Size] = Field((1, 2, 2), description="latent frames, rows and columns per token")
    num_attention_heads: int = Field(12, ge=1, le=1024, description="attention heads, the same in every expert")
    attention_head_dim: int = Field(
        128, ge=6, le=1024, multiple_of=2, description="channels per head; the same in every expert"
    )
    in_channels: Size = Field(16, description="channels of the latents that go in")
    out_channels: Size = Field(16, description="channels of the prediction")
    text_dim: Size = Field(4096, description="width of the text encoder's rows")
    freq_dim: Size = Field(256, ge=2, multiple_of=2, description="sinusoids of the timestep embedding")
    ffn_dim: Size = Field(8960, description="inner width of the feed-forward")
    num_layers: int = Field(30, ge=1, le=1024, description="blocks, the same number in every expert")
    cross_attn_norm: bool = Field(True, description="LayerNorm before the text cross-attention")
    qk_norm: Literal["rms_norm_across_heads"] = Field("rms_norm_across_heads", description="Wan's query-key norm")
    eps: float = Field(1e-6, ge=1e-30, le=1, description="epsilon of the norms")
    rope_max_seq_len: int = Field(1024, ge=1, description="largest position per axis")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class TwoLayers(nn.Module):
    """Linear, activation, Linear under diffusers' names `linear_1` and `linear_2`."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.activation = activation
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Timestep and text embeddings of one expert."""

    def __init__(self, width: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, width, nn.SiLU())
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = TwoLayers(text_dim, width, nn.GELU(approximate="tanh"))

    def time(
        self, flow_time: Float[Tensor, "b m"], added: Float[Tensor, "b m d"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m 6 d"]]:
        """Embedding and modulation rows of flow times; `added` (actions, say) joins the embedding before both.

        In float32 whatever runs around it, as in Wan's release: bf16 cannot tell one timestep of 1000 from the next.
        """
        with torch.autocast(flow_time.device.type, enabled=False):
            embedding = self.time_embedder(sinusoids(flow_time * TIMESTEPS_PER_FLOW_TIME, self.freq_dim))
            if added is not None:
                embedding = embedding + added.float()
            return embedding, self.time_proj(F.silu(embedding)).unflatten(2, (6, -1))


class VideoDiT(SplitsSequence):
    """See the module docstring. Weight names equal diffusers' `WanTransformer3DModel`'s."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        width = config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(width, config.freq_dim, config.text_dim)
        self.blocks = nn.ModuleList(
            ExpertBlock(
                width,
                config.ffn_dim,
                config.num_attention_heads,
                config.attention_head_dim,
                config.eps,
                config.cross_attn_norm,
            )
            for _ in range(config.num_layers)
        )
        self.norm_out = FP32LayerNorm(width, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.init_weights()

    def init_weights(self) -> None:
        """Wan's own initialisation, of all weights: Xavier linears, small embeddings, and a last layer of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, ExpertBlock | VideoDiT):
                nn.init.normal_(module.scale_shift_table, std=self.config.width**-0.5)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.patch_embedding.bias))
        for embedder in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)

    def grid(self, latents_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along time, rows and columns for latents of (t, h, w)."""
        (t, h, w), (s, p, q) = latents_shape, self.config.patch_size
        return t // s, h // p, w // q

    def embed(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b n d"]:
        """Patches as one matrix product: what the convolution computes, several times faster on a CPU."""
        s, p, q = self.config.patch_size
        patches = rearrange(latents, "b (t s) c (h p) (w q) -> b (t h w) (c s p q)", s=s, p=p, q=q)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def rotary(self, grid: tuple[int, int, int], first_frame: int, device: torch.device) -> Rotary:
        """3-D rotary positions of a token grid whose first latent frame stands at `first_frame`."""
        head_dim = self.config.attention_head_dim
        spatial = 2 * (head_dim // 6)
        t, h, w = grid
        axes = [
            rotary_table(head_dim - 2 * spatial, torch.arange(first_frame, first_frame + t))[:, None, None],
            rotary_table(spatial, torch.arange(h))[None, :, None],
            rotary_table(spatial, torch.arange(w))[None, None],
        ]
        return rotations(torch.cat([axis.expand(t, h, w, -1) for axis in axes], dim=-1).flatten(0, 2), device)

    def group(
        self,
        name: str,
        latents: Float[Tensor, "b t c h w"],
        modulation: Float[Tensor, "b m 6 d"],
        first_frame: int = 0,
    ) -> TokenGroup:
        """Latent frames as a token group; each latent frame is one block."""
        t, h, w = self.grid((latents.shape[1], *latents.shape[3:]))
        blocks = torch.arange(first_frame, first_frame + t).repeat_interleave(h * w)
        rotary = self.rotary((t, h, w), first_frame, latents.device)
        group = TokenGroup(name, VIDEO_EXPERT, self.embed(latents), modulation, rotary, blocks)
        return group.split(self.sequence)

    def head(
        self, tokens: Float[Tensor, "b n d"], embedding: Float[Tensor, "b m d"], grid: tuple[int, int, int]
    ) -> Float[Tensor, "b t c h w"]:
        """Tokens to latents, modulated by the time embedding; the channel is the fastest axis of `proj_out` (Wan)."""
        shift, scale = (self.scale_shift_table[:, None].float() + embedding[:, :, None].float()).unbind(2)
        rows = self.norm_out(tokens.float()).unflatten(1, (shift.shape[1], -1))
        out = self.proj_out((rows * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).type_as(tokens))
        t, h, w = grid
        s, p, q = self.config.patch_size
        return rearrange(
            self.sequence.whole(out, shift.shape[1], t * h * w),
            "b (t h w) (s p q c) -> b (t s) c (h p) (w q)",
            t=t,
            h=h,
            w=w,
            s=s,
            p=p,
            q=q,
            c=self.config.out_channels,
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "b c t h w"],
        timestep: Float[Tensor, "b *n"],
        encoder_hidden_states: Float[Tensor, "b l d"],
    ) -> Float[Tensor, "b c t h w"]:
        """Wan's own forward: everything in one group. `timestep` in [0, 1000], per sample `[b]` or token `[b n]`."""
        latents = rearrange(hidden_states, "b c t h w -> b t c h w")
        flow_time = (timestep[:, None] if timestep.ndim == 1 else timestep) / TIMESTEPS_PER_FLOW_TIME
        embedding, modulation = self.condition_embedder.time(flow_time)
        group = self.group("video", latents, modulation)
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        (tokens,), _ = run_experts(
            {VIDEO_EXPERT: self.blocks}, {VIDEO_EXPERT: text}, [group], {("video", "video"): Rule.ALWAYS}
        )
        out = self.head(tokens, embedding, self.grid((latents.shape[1], *latents.shape[3:])))
        return rearrange(out, "b t c h w -> b c t h w")


def sinusoids(timestep: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b dim"]:
    """Timestep embedding, cosines first, in float32 (diffusers' `flip_sin_to_cos=True`, shift 0)."""
    half = dim // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[..., None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(dim: int, positions: Tensor, theta: float = 10000.0) -> Float[Tensor, "n half"]:
    """Angles per position and channel pair, in float64 (Wan computes them there)."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return positions.double()[:, None] * frequencies


def rotations(angles: Float[Tensor, "n half"], device: torch.device) -> Rotary:
    return torch.stack([angles.cos(), angles.sin()], -1).float().to(device)
