"""The settings of the frozen encoders, and what can be known of them without opening one.

Apart from `encoders/`, which imports torch: reading a config and cutting clips need not wait for it.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import StrictConfig

TEMPORAL_STRIDE = 4
"""Causal codecs here turn `f` frames into `1 + (f - 1) / 4` latent frames; latent frame 0 is frame 0 alone."""

CLIP_FOLDER = "folder of a CLIP model in transformers' layout, with safetensors weights"
"""What a setting that names one says of itself."""

_FOLDER = "local folder with safetensors: the model's own, or a Wan pipeline in diffusers' layout."


class VideoCodecConfig(StrictConfig):
    """Which video codec `build` encodes with. `embedded` is fitted to the dataset; `wan` is pretrained."""

    kind: Literal["embedded", "wan"] = Field("embedded", description="embedded: fitted, no download. wan: Wan's VAE.")
    patch: int = Field(4, ge=1, description="embedded: pixels per side of a block, the codec's spatial stride.")
    channels: int = Field(48, ge=1, description="embedded: numbers kept per block of 4 x patch x patch x 3.")
    folder: Path | None = Field(
        None, description=f"embedded: codec/ of a dataset, to have its latents instead of fitting anew. wan: {_FOLDER}"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="wan: precision the VAE computes in.")

    @model_validator(mode="after")
    def _folder_belongs_to_kind(self) -> Self:
        if self.kind == "wan":
            _check_folder(self.kind, self.folder, needs_folder=True)
        elif self.folder is not None and self.model_fields_set & {"patch", "channels"}:
            raise ValueError("with `folder`, an embedded codec has that folder's patch and channels; leave both out")
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
