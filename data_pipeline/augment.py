"""What is drawn for each sample in training: where its crop starts, how fast it runs, which views it shows.

A draw is a pure function of the sample's place in the global order. Ranks, workers and a resumed run therefore draw
alike, and what is drawn for one thing does not depend on what else is switched on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float64
from pydantic import Field, field_validator

from configs.loader import StrictConfig, UserError

from .encoder_config import TEMPORAL_STRIDE
from .model_inputs import ModelInputs

Place = tuple[int, ...]
"""Numbers that name a sample's place in the global order: seed, global batch, row in it."""

Share = Annotated[float, Field(ge=0, le=1)]
Speed = Annotated[float, Field(ge=0.01, le=100)]
Weight = Annotated[float, Field(ge=0, le=1e9)]  # bounded, so that their sum is a number


class AugmentConfig(StrictConfig):
    """What is drawn for each sample in training. Evaluation, and the split validation, draw nothing."""

    random_start: bool = Field(
        False, description="Begin the `crop_frames` anywhere in the clip, not at its first frame; takes reads=video."
    )
    speed: tuple[Speed, Speed] = Field(
        (1.0, 1.0),
        description="Slowest and fastest that clips run, all between equally likely: at 2, frames and actions are "
        "twice as far apart in time; takes reads=video.",
    )
    view_weights: dict[str, Weight] = Field(
        {}, description="With layout=single and several views, how often each is shown; empty: equally often."
    )
    view_dropout: dict[str, Share] = Field(
        {}, description="How often a view is black, in pixels and in latents, and false in `view_is_valid`."
    )

    @field_validator("speed")
    @classmethod
    def _is_range(cls, speed: tuple[float, float]) -> tuple[float, float]:
        if speed[0] > speed[1]:
            raise ValueError(f"the slowest, {speed[0]:g}, is above the fastest, {speed[1]:g}")
        return speed

    @property
    def moves_frames(self) -> bool:
        return self.random_start or self.speed != (1.0, 1.0)


@dataclass(frozen=True)
class Shown:
    """What a batch has of one sample."""

    start: int  # first frame
    speed: float  # frames of the clip from one that is shown to the next
    views: tuple[str, ...]
    view_is_valid: tuple[bool, ...]  # False: black instead


class Augmentation:
    """Draws what is shown of each sample of a dataset."""

    def __init__(self, inputs: ModelInputs, config: AugmentConfig) -> None:
        self._inputs, self._config = inputs, config
        self._weights = self._cumulative_weights()
        self._draws = config != AugmentConfig() or self._weights is not None
        _known_views("view_dropout", config.view_dropout, inputs)
        self._check_room()

    def _check_room(self) -> None:
        """Refuse what leads behind a clip's last frame."""
        inputs, fastest = self._inputs, self._config.speed[1]
        last = inputs.dataset.num_frames - 1
        if (inputs.num_frames - 1) * fastest <= last:
            return
        longest = 1 + int(last / fastest) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        shorter = f"loader.crop_frames to at most {longest}, or " if longest > 1 else ""
        raise UserError(
            f"loader.augment.speed up to {fastest:g} takes {inputs.num_frames} frames from "
            f"{(inputs.num_frames - 1) * fastest + 1:g}, but the clips in {inputs.dataset.address} have {last + 1}; "
            f"set {shorter}the speed to at most {math.floor(100 * last / (inputs.num_frames - 1)) / 100:g}."
        )

    def draw(self, place: Place | None, num_frames: int) -> Shown:
        """Of a sample of so many frames; without a place nothing is drawn."""
        inputs, config = self._inputs, self._config
        if place is None or not self._draws:
            return Shown(0, 1.0, inputs.shown, (True,) * len(inputs.shown))
        for_speed, for_start, for_view, *for_dropout = _uniforms(place, 3 + inputs.layout.num_views).tolist()
        slowest, fastest = config.speed
        speed = slowest + for_speed * (fastest - slowest)
        start = 0
        if config.random_start:
            room = int(num_frames - 1 - (inputs.num_frames - 1) * speed + 1e-9)
            start = int(for_start * (room + 1))
        views = inputs.shown
        if self._weights is not None:
            views = (inputs.layout.names[int(np.searchsorted(self._weights, for_view, side="right"))],)
        is_valid = tuple(u >= config.view_dropout.get(view, 0.0) for u, view in zip(for_dropout, views, strict=True))
        return Shown(start, speed, views, is_valid)

    def _cumulative_weights(self) -> Float64[np.ndarray, "v"] | None:
        """Of the views that one is drawn from; None where nothing is to be chosen."""
        layout, given = self._inputs.layout, self._config.view_weights
        _known_views("view_weights", given, self._inputs)
        if given and layout.kind != "single":
            raise UserError(
                f"loader.augment.view_weights chooses one view, but loader.layout={layout.kind} shows all of them; "
                "drop the weights, or set loader.layout=single."
            )
        if layout.kind != "single" or len(layout.names) == 1:
            return None
        weights = np.array([given.get(name, 0.0) if given else 1.0 for name in layout.names])
        if not weights.sum():
            raise UserError("loader.augment.view_weights are all zero; give at least one view a positive weight.")
        return np.cumsum(weights)[:-1] / weights.sum()  # without the last, 1: no rounding leads past the last view


def _known_views(setting: str, given: Mapping[str, float], inputs: ModelInputs) -> None:
    unknown = [name for name in given if name not in inputs.layout.names]
    if unknown:
        raise UserError(
            f"loader.augment.{setting} names {', '.join(unknown)}, which loader.views does not show; it shows "
            f"{', '.join(inputs.layout.names)}."
        )


def _uniforms(place: Sequence[int], count: int) -> Float64[np.ndarray, "n"]:
    """From [0, 1). By the raw bits of a bit generator, as in `sample_order.shuffled`: those never change."""
    bits = np.random.Philox(np.random.SeedSequence([*place, _OWN_STREAM])).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


_OWN_STREAM = 0xA06  # apart from the seeds of the order itself
