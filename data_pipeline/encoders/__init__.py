"""Frozen encoders: video to latents and back, text to rows. Chosen by `kind`; the weights are never trained here."""

from __future__ import annotations

from pathlib import Path

from configs.loader import UserError

from ..encoder_config import TextEncoderConfig
from .base import PixelCodec, TextEncoder, VideoCodec
from .embedded import EmbeddedCodec
from .local_weights import find_model_folder, load_reference
from .text import HashedTextEncoder, T5TextEncoder, UMT5TextEncoder, pad_text
from .wan import WanCodec

__all__ = [
    "TEXT_ENCODERS",
    "VIDEO_CODECS",
    "EmbeddedCodec",
    "HashedTextEncoder",
    "PixelCodec",
    "T5TextEncoder",
    "TextEncoder",
    "UMT5TextEncoder",
    "VideoCodec",
    "WanCodec",
    "create_text_encoder",
    "find_model_folder",
    "load_text_encoder",
    "load_video_codec",
    "pad_text",
]

VIDEO_CODECS: dict[str, type[VideoCodec]] = {"embedded": EmbeddedCodec, "wan": WanCodec}
TEXT_ENCODERS: dict[str, type[TextEncoder]] = {
    "hashed": HashedTextEncoder,
    "t5": T5TextEncoder,
    "umt5": UMT5TextEncoder,
}


def create_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Video codecs have no such function: `build` fits an embedded one (`EmbeddedCodec.fit`) and opens a `WanCodec`."""
    if config.kind == "hashed":
        return HashedTextEncoder(config.width, config.max_length)
    assert config.folder is not None  # the config's validator has seen to it
    encoder_class = UMT5TextEncoder if config.kind == "umt5" else T5TextEncoder
    return encoder_class(config.folder, config.dtype, config.max_length)


def load_video_codec(folder: Path) -> VideoCodec:
    """The codec that `VideoCodec.save` wrote to `folder`, such as a dataset's `codec/`."""
    return VIDEO_CODECS[_saved_kind(folder, tuple(VIDEO_CODECS))].load(folder)


def load_text_encoder(folder: Path) -> TextEncoder:
    """The encoder that `TextEncoder.save` wrote to `folder`, such as a dataset's `text_encoder/`."""
    return TEXT_ENCODERS[_saved_kind(folder, tuple(TEXT_ENCODERS))].load(folder)


def _saved_kind(folder: Path, allowed: tuple[str, ...]) -> str:
    kind = load_reference(folder, fields=())["kind"]
    if kind not in allowed:
        raise UserError(
            f"{folder}: config.json names the encoder kind {kind!r}, but this version knows only {', '.join(allowed)}; "
            "use the version that wrote it."
        )
    return kind
