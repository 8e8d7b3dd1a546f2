"""What a model is fed of a dataset: which views, how they are laid out, how many frames and actions.

`InputConfig` travels with every export, so that evaluation and the policy in the loop show the model what training did.
"""

from typing import Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from configs.loader import StrictConfig, UserError

from .dataset import DatasetFolder
from .encoder_config import TEMPORAL_STRIDE
from .encoders import PixelCodec
from .normalize import NormalizationMode
from .view_layout import LaidOutCodec, Layout, ViewLayout


class InputConfig(StrictConfig):
    """What a model is fed; whoever uses the model later has to feed it the same."""

    views: tuple[str, ...] = Field((), description="Which views, in this order; empty: the dataset's first.")
    layout: Layout = Field(
        "single",
        description="Several views at once: one above another (stack_height), in a grid (tile) or each by itself "
        "(separate). single: one; of several, one is drawn for each sample in training, elsewhere it is the first.",
    )
    crop_frames: int | None = Field(
        None, ge=1 + TEMPORAL_STRIDE, description="Frames that are shown of a clip: 5, 9, 13, …; null: all of them."
    )
    normalization: NormalizationMode = Field("quantile", description="Of actions and proprio, per embodiment.")
    text_length: PositiveInt = Field(
        32, le=2**16, description="Text tokens per sample: padded with zeros or cut to so many."
    )

    @field_validator("views")
    @classmethod
    def _are_different(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((view for view in views if views.count(view) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice")
        return views

    @field_validator("layout")
    @classmethod
    def _has_views(cls, layout: Layout, info: ValidationInfo) -> Layout:
        views = info.data.get("views")  # none where they have been refused
        if layout != "single" and views is not None and len(views) < 2:
            raise ValueError("it takes at least two views, named in `views`")
        return layout

    @field_validator("crop_frames")
    @classmethod
    def _are_whole_latent_frames(cls, crop_frames: int | None) -> int | None:
        if crop_frames is not None and (crop_frames - 1) % TEMPORAL_STRIDE:
            raise ValueError(
                f"a latent frame stands for {TEMPORAL_STRIDE} frames, and the first for one: choose 5, 9, 13, …"
            )
        return crop_frames


class ModelInputs:
    """What a model that is fed by `config` sees of a dataset."""

    def __init__(self, dataset: DatasetFolder, config: InputConfig) -> None:
        self.dataset = dataset
        names = [dataset.check_view(name) for name in config.views or (None,)]
        self.config = config.model_copy(update={"views": tuple(names)})
        self.layout = ViewLayout.of(config.layout, names, dataset.views)
        self.num_frames = config.crop_frames or dataset.num_frames
        if self.num_frames > dataset.num_frames:
            raise UserError(
                f"crop_frames={self.num_frames}, but the clips in {dataset} have {dataset.num_frames} frames; "
                "choose fewer, or null for all of them."
            )

    @property
    def each(self) -> tuple[Self, ...]:
        """By dataset, as of several (`datasets.MixedInputs`)."""
        return (self,)

    @property
    def bucket(self) -> str:
        """The size of what is shown of a clip, which is the same in a batch: <height>x<width>x<frames>."""
        height, width = self.layout.size
        return f"{height}x{width}x{self.num_frames}"

    @property
    def num_latent_cells(self) -> int:
        """Frames x rows x columns of latents that are shown of a clip."""
        frames, _, height, width = self.latent_shape
        return frames * height * width * (self.layout.num_views if self.layout.kind == "separate" else 1)

    @property
    def shown(self) -> tuple[str, ...]:
        """The views that are shown where none is drawn."""
        return self.layout.names[: self.layout.num_views]

    @property
    def num_actions(self) -> int:
        """k: actions between the first frame and the last."""
        return (self.num_frames - 1) * self.dataset.info.actions_per_frame

    @property
    def num_latent_frames(self) -> int:
        return 1 + (self.num_frames - 1) // self.dataset.info.codec.temporal_stride

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(t, c, h, w) of the whole picture; of one view, where views are kept apart."""
        codec = self.dataset.info.codec
        height, width = (pixels // codec.spatial_stride for pixels in self.layout.size)
        return (self.num_latent_frames, codec.latent_channels, height, width)

    def codec(self) -> PixelCodec:
        """From the picture that the model sees to its latents, and back."""
        codec = self.dataset.codec()
        return codec if self.layout.num_views == 1 else LaidOutCodec(codec, self.layout)
