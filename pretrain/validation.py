"""What is measured on held-out clips while a run goes on, with the averaged weights and the same noise every time."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .draws import SampleDraws
from .ema import ExponentialMovingAverage
from .engine import Engine
from .imagination import Imagination
from .steps import sample_draws
from .world_models.base import Batch

NUM_BANDS = 4
"""Of flow time: where in the denoising a model is good, and where it is not."""


class FlowTimeBands:
    """Losses of single samples, in equal bands of their flow times; a sample without one (NaN) does not count."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, by_sample: Mapping[str, Tensor], flow_time: Tensor) -> None:
        band = (flow_time.double().cpu() * NUM_BANDS).long().clamp_max(NUM_BANDS - 1)
        for name, values in by_sample.items():
            values = values.double().cpu()
            has_one = ~values.isnan()
            for sums, added in ((self._sums, values.nan_to_num()), (self._counts, has_one.double())):
                sums.setdefault(name, torch.zeros(NUM_BANDS, dtype=torch.float64)).index_add_(0, band, added)

    def means(self, engine: Engine) -> dict[str, float]:
        """`loss/<part>/flow_time_<from>-<to>` over the samples of all ranks, without empty bands. Collective."""
        if not self._sums:
            return {}
        sums = engine.mean_across_ranks(_by_band(self._sums))
        counts = engine.mean_across_ranks(_by_band(self._counts))
        return {f"loss/{name}": sums[name] / count for name, count in counts.items() if count}


def _by_band(of_parts: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        f"{name}/flow_time_{_limits(band)}": value
        for name, of_bands in of_parts.items()
        for band, value in enumerate(of_bands.tolist())
    }


def _limits(band: int) -> str:
    return f"{band / NUM_BANDS:.2f}-{(band + 1) / NUM_BANDS:.2f}"


def validation_row(
    engine: Engine,
    ema: ExponentialMovingAverage,
    batches: Iterable[Batch],
    *,
    num_batches: int,
    seed: int,
    step: int,
    imagination: Imagination | None = None,
) -> dict[str, Any] | None:
    """Losses of the averaged weights on the first `num_batches`, with the same noise every time. Collective.

    None where there are no batches: not every dataset has a validation split. The loss is that of training; where the
    model knows the losses of single samples, each batch is computed once more at flow times that cover all alike.
    """
    losses: dict[str, list[float]] = defaultdict(list)
    bands = FlowTimeBands()
    with ema.swap_in(engine), engine.evaluating():
        for number, batch in zip(range(num_batches), batches, strict=False):
            terms = engine.forward_loss(batch, _draws(engine, seed, number, batch))
            losses["loss"].append(terms.total.item())
            for name, part in terms.parts.items():
                losses[f"loss/{name}"].append(part.item())
            if imagination is not None:
                imagination.look_at(batch)
            if terms.by_sample:
                draws = _draws(engine, seed, number, batch)
                flow_time = draws.stratified()
                bands.add(engine.forward_loss(batch, draws.at(flow_time)).by_sample, flow_time)
    if not losses:
        return None
    means = engine.mean_across_ranks({name: sum(values) / len(values) for name, values in losses.items()})
    imagined = {} if imagination is None else imagination.figures()
    return {"step": step, "split": "validation", **means, **bands.means(engine), **imagined}


def _draws(engine: Engine, seed: int, number: int, batch: Batch) -> SampleDraws:
    return sample_draws(engine, seed, number, batch, "validation")
