"""Floating-point operations of a training step, counted one way for everything that quotes them.

Counted are matrix products (two operations per multiply-add), the attention's included; norms and activations are not,
and neither is the action conditioner, which sees one row per latent frame. *Model* FLOPs are what the mathematics needs
(MFU goes by them); *hardware* FLOPs add what is computed twice, by fused attention and by checkpointing (HFU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .models.action_expert import ActionExpertConfig
from .models.execution import Recomputing
from .models.video_dit import VideoDiTConfig

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""Per second, dense, of the SXM parts, by a word in the device's name."""


@dataclass(frozen=True)
class TokenCounts:
    """Of one clip: what its FLOPs depend on."""

    tokens: int
    pairs: int
    """(query, key) pairs that the self-attention computes; `tokens` squared where everything sees everything."""
    rows: int
    """Different flow times, each with a time embedding of its own."""
    text: int
    """Text tokens, padding included: Wan computes it."""


@dataclass(frozen=True)
class Flops:
    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        return self.model + self.recomputed

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


def world_model_tokens(
    config: VideoDiTConfig, latents: tuple[int, int, int], text: int, context_latent_frames: int = 1
) -> TokenCounts:
    """Clean context that sees itself, and a future that sees everything; `latents` is a clip's (t, h, w)."""
    context, tokens = _video_tokens(config, latents, context_latent_frames)
    return TokenCounts(tokens, context**2 + (tokens - context) * tokens, latents[0], text)


def policy_tokens(
    config: VideoDiTConfig, latents: tuple[int, int, int], text: int, context_latent_frames: int, action_horizon: int
) -> tuple[TokenCounts, TokenCounts]:
    """Of the video and the action expert: context sees itself, proprio both, future and actions see everything.

    They share one attention, in which a query counts with its own expert.
    """
    context, video = _video_tokens(config, latents, context_latent_frames)
    acting = 1 + action_horizon
    everything = video + acting
    return (
        TokenCounts(video, context**2 + (video - context) * everything, latents[0], text),
        TokenCounts(acting, context + 1 + action_horizon * everything, 2, text),
    )


def _video_tokens(config: VideoDiTConfig, latents: tuple[int, int, int], context_latent_frames: int) -> tuple[int, int]:
    """Of the context, and of the whole clip."""
    (t, h, w), (s, p, q) = latents, config.patch_size
    per_frame = (h // p) * (w // q)
    return context_latent_frames // s * per_frame, t // s * per_frame


def training_flops(
    config: VideoDiTConfig, counts: TokenCounts, recomputing: Recomputing = "none", fused_attention: bool = True
) -> Flops:
    """Of one clip, forward and backward. Fused attention computes its scores again in the backward pass."""
    numbers = counts.tokens * math.prod(config.patch_size)
    ends = numbers * config.in_channels, numbers * config.out_channels
    return _expert_flops(config, config, counts, ends, recomputing, fused_attention)


def action_flops(
    config: ActionExpertConfig,
    video: VideoDiTConfig,
    counts: TokenCounts,
    action_dim: int,
    proprio_dim: int,
    recomputing: Recomputing = "none",
    fused_attention: bool = True,
) -> Flops:
    """As `training_flops`, of the action expert beside that video expert: a token of proprio, and one per action."""
    numbers = (counts.tokens - 1) * action_dim
    return _expert_flops(config, video, counts, (proprio_dim + numbers, numbers), recomputing, fused_attention)


def _expert_flops(
    expert: VideoDiTConfig | ActionExpertConfig,
    shared: VideoDiTConfig,
    counts: TokenCounts,
    ends: tuple[int, int],
    recomputing: Recomputing,
    fused_attention: bool,
) -> Flops:
    """Heads, layers and text width are those that all experts share; `ends` are the numbers that go in and come out."""
    d, n, text = expert.width, counts.tokens, counts.text
    heads = shared.num_attention_heads * shared.attention_head_dim
    linear = 2 * n * (6 * d * heads + 2 * d * expert.ffn_dim) + 2 * text * 2 * d * heads
    scores = 2 * heads * (counts.pairs + n * text)  # one product of queries and keys, self- and text attention
    layers = shared.num_layers * (linear + 2 * scores)
    first = 2 * d * (ends[0] + text * shared.text_dim + counts.rows * expert.freq_dim)
    rest = 2 * d * (text * d + counts.rows * 7 * d + ends[1])
    forward = layers + first + rest
    backward = 2 * (layers + rest) + first  # nobody asks for the gradients of what goes in
    again = {"full": linear + 2 * scores, "products": linear}.get(recomputing, 0)
    recomputed = shared.num_layers * (again + (scores if fused_attention else 0))
    return Flops(forward, backward, recomputed)


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOPs per second of a GPU, None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
