"""Floating-point operations of a training step, counted one way for everything that quotes them.

Counted are matrix products (two operations per multiply-add), the attention's included; norms and activations are not,
and neither is the action conditioner, which sees one row per latent frame. *Model* FLOPs are what the mathematics needs
(MFU goes by them); *hardware* FLOPs add what is computed twice, by fused attention and by checkpointing (HFU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .models.execution import Checkpointing
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


def world_model_tokens(
    config: VideoDiTConfig, latents: tuple[int, int, int], text: int, context_latent_frames: int = 1
) -> TokenCounts:
    """Clean context that sees itself, and a future that sees everything; `latents` is a clip's (t, h, w)."""
    (t, h, w), (s, p, q) = latents, config.patch_size
    per_frame = (h // p) * (w // q)
    context, tokens = context_latent_frames // s * per_frame, t // s * per_frame
    return TokenCounts(tokens, context**2 + (tokens - context) * tokens, t, text)


def training_flops(
    config: VideoDiTConfig, counts: TokenCounts, checkpointing: Checkpointing = "none", fused_attention: bool = True
) -> Flops:
    """Of one clip, forward and backward. Fused attention computes its scores again in the backward pass."""
    d, n, text = config.width, counts.tokens, counts.text
    linear = 2 * n * (6 * d * d + 2 * d * config.ffn_dim) + 2 * text * 2 * d * d
    scores = 2 * d * (counts.pairs + n * text)  # one product of queries and keys, self- and text attention
    layers = config.num_layers * (linear + 2 * scores)
    patch = math.prod(config.patch_size)
    first = 2 * (n * config.in_channels * patch * d + text * config.text_dim * d + counts.rows * config.freq_dim * d)
    rest = 2 * (text * d * d + counts.rows * 7 * d * d + n * d * config.out_channels * patch)
    forward = layers + first + rest
    backward = 2 * (layers + rest) + first  # nobody asks for the gradients of latents, text and sinusoids
    recomputed = (layers if checkpointing == "full" else 0) + (config.num_layers * scores if fused_attention else 0)
    return Flops(forward, backward, recomputed)


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOPs per second of a GPU, None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
