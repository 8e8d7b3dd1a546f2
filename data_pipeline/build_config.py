"""The settings of `data_pipeline.build`."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, field_validator

from configs.loader import StrictConfig

from .curate.captioners import HOW_CAPTIONING_IS_RUN, CaptionConfig
from .curate.duplicates import DuplicateConfig
from .curate.filters import FilterConfig
from .curate.idle import IdleConfig
from .curate.shots import ShotConfig
from .encoder_config import TEMPORAL_STRIDE, TextEncoderConfig, VideoCodecConfig
from .sample import VIEW_NAME
from .sources import AnySourceConfig
from .video_io import ViewConfig

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class BuildConfig(StrictConfig):
    """What to build from what."""

    sources: dict[SourceName, AnySourceConfig] = Field(min_length=1, description="The recording sets, by name.")
    root: Path = Field(Path(), description="Folder that the sources' relative paths start from; default: this one.")
    out: Path = Field(description="The dataset folder to write; `<out>.staging` holds the work in progress.")

    views: dict[str, ViewConfig] | None = Field(
        None, description="The dataset's views; null: all views of the first source, at `height` x `width`."
    )
    height: PositiveInt = Field(64, description="Of every view, where `views` is null.")
    width: PositiveInt = Field(64, description="Of every view, where `views` is null.")
    clip_frames: PositiveInt = Field(17, description="Frames per clip: 5, 9, 13, 17, …")
    stride: PositiveInt | None = Field(
        None,
        description="Frames from one clip's start to the next; null: clip_frames - 1, so each action is in one clip.",
    )
    fps: PositiveFloat | None = Field(None, description="Of the clips; null: the first action-labelled source's own.")
    actions_per_frame: PositiveInt | None = Field(
        None,
        le=1000,
        description="Actions from one frame to the next; null: what comes nearest to the robot's control rate.",
    )
    validation_share: float = Field(0.1, ge=0, le=0.9, description="Share of episodes held out, chosen by hash.")
    crf: int = Field(18, ge=0, le=51, description="H.264 quality of encoded clips; lower is better and larger.")
    shots: ShotConfig = ShotConfig()
    idle: IdleConfig = IdleConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    captions: CaptionConfig = CaptionConfig()
    codec: VideoCodecConfig = VideoCodecConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    max_shard_mb: PositiveInt = Field(256, description="Size of a shard, unless one sample is larger.")

    # How it is run: not part of what is built.
    num_workers: PositiveInt | None = Field(None, description="Worker processes; null: one per CPU core.")
    gpus: NonNegativeInt = Field(0, description="GPUs for encoding, one worker each; 0: encode on the CPU.")
    ray_address: str | None = Field(None, description="Of a Ray cluster that sees the same files; null: this machine.")
    object_store_mb: PositiveInt = Field(128, description="Ray's shared memory on this machine; rows are tiny.")
    overwrite: bool = Field(False, description="Replace a dataset that was built from another config.")
    keep_staging: bool = Field(
        True,
        description="Keep `<out>.staging`, so that building again costs only what has changed; it doubles the space.",
    )
    max_rejected_fraction: float = Field(
        1.0, ge=0, le=1, description="Stop where more of the clips found than this cannot be used: a config is wrong."
    )
    partition: str | None = Field(
        None, description="`i/n`: do the i-th of n parts (from 0), as task i of a job array; the last to end packs."
    )

    @field_validator("clip_frames")
    @classmethod
    def _fits_the_codecs(cls, frames: int) -> int:
        if frames < 1 + TEMPORAL_STRIDE or (frames - 1) % TEMPORAL_STRIDE:
            raise ValueError("the video codecs take 5, 9, 13, 17, … frames")
        return frames

    @field_validator("partition")
    @classmethod
    def _names_a_part(cls, text: str | None) -> str | None:
        if text is not None:
            parse_partition(text)
        return text

    @field_validator("views")
    @classmethod
    def _names_fit_the_shards(cls, views: dict[str, ViewConfig] | None) -> dict[str, ViewConfig] | None:
        if views is not None and not views:
            raise ValueError("give at least one view, or null for all views of the first source")
        for name in views or ():
            if not VIEW_NAME.fullmatch(name):
                raise ValueError(
                    f"view name {name!r}: lower-case letters, digits, _ and - only (a shard's member names)"
                )
        return views


HOW_IT_IS_RUN: dict[str, Any] = {
    **dict.fromkeys(("out", "num_workers", "gpus", "ray_address", "object_store_mb", "overwrite"), True),
    **dict.fromkeys(("keep_staging", "max_rejected_fraction", "partition"), True),
    "captions": HOW_CAPTIONING_IS_RUN,
}
"""Settings that the bytes do not follow from."""


def build_identity(config: BuildConfig) -> dict[str, Any]:
    """The part of the config that the bytes follow from."""
    return config.model_dump(mode="json", exclude=HOW_IT_IS_RUN)


def parse_partition(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". ValueError where it is nothing of the kind."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(group) for group in match.groups()) if match else (0, 0)
    if not index < count:
        raise ValueError("write i/n with i from 0 to n - 1, for example 3/16")
    return index, count
