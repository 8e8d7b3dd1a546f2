"""Frozen encoders: video to latents and back, text to rows. Chosen by `kind`; the weights are never trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import StrictConfig, UserError

from .base import TEMPORAL_STRIDE, PixelCodec, TextEncoder, VideoCodec
from .embedded import EmbeddedCodec
from .local_weights import find_model_folder, load_reference
from .text import HashedTextEncoder, T5TextEncoder, UMT5TextEncoder, pad_text
from .wan import WanCodec

__all__ = [
    "TEMPORAL_STRIDE",
    "TEXT_ENCODERS",
    "VIDEO_CODECS",
    "EmbeddedCodec",
    "HashedTextEncoder",
    "PixelCodec",
    "T5TextEncoder",
    "TextEncoder",
    "TextEncoderConfig",
    "UMT5TextEncoder",
    "VideoCodec",
    "VideoCodecConfig",
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

_FOLDER = "local folder with safetensors: the model's own, or a Wan pipeline in diffusers' layout."


class VideoCodecConfig(StrictConfig):
    """Which video codec `build` encodes with. `embedded` is fitted to the dataset; `wan` is pretrained."""

    kind: Literal["embedded", "wan"] = Field("embedded", description="embedded: fitted, no download. wan: Wan's VAE.")
    patch: int = Field(4, ge=1, description="embedded: pixels per side of a block, the codec's spatial stride.")
    channels: int = Field(48, ge=1, description="embedded: numbers kept per block of 4 x patch x patch x 3.")
    folder: Path | None = Field(None, description=f"wan: {_FOLDER}")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="wan: precision the VAE computes in.")

    @model_validator(mode="after")
    def _folder_belongs_to_kind(self) -> Self:
        _check_folder(self.kind, self.folder, needs_folder=self.kind == "wan")
        return self

    @model_validator(mode="after")
    def _channels_fit_a_block(self) -> Self:
        size = TEMPORAL_STRIDE * self.patch**2 * 3
        if self.kind == "embedded" and self.channels > size:
            raise ValueError(f"channels {self.channels}: a block has {size} numbers; choose 1 to {size}")
        return self


class TextEncoderConfig(StrictConfig):
    """Which text encoder `build` encodes instructions and captions with."""

    kind: Literal["hashed", "t5", "umt5"] = Field("hashed", description="hashed: no download. umt5: Wan's. t5.")
    width: int = Field(64, ge=8, description="hashed: numbers per token.")
    folder: Path | None = Field(None, description=f"t5, umt5: {_FOLDER}")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="t5, umt5: precision the encoder computes in."
    )
    max_length: int = Field(512, ge=1, description="Tokens kept of a text, its end token included.")

    @model_validator(mode="after")
    def _folder_belongs_to_kind(self) -> Self:
        _check_folder(self.kind, self.folder, needs_folder=self.kind != "hashed")
        return self


def _check_folder(kind: str, folder: Path | None, *, needs_folder: bool) -> None:
    if needs_folder and folder is None:
        raise ValueError(f"kind {kind!r} needs `folder`, the local folder of its weights")
    if not needs_folder and folder is not None:
        raise ValueError(f"kind {kind!r} has no weights to read, so leave `folder` out (or choose another kind)")


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
