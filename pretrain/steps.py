"""What a training loop does in a step, besides the engine's part: shared by pretraining and fine-tuning."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from configs.loader import UserError
from data_pipeline.sample_order import Cursor
from data_pipeline.shards import SHARD_PROBLEMS
from data_pipeline.storage import TRAFFIC

from .draws import SampleDraws, Stream
from .engine import Engine, EngineConfig, StepReport
from .events import EventLog
from .flops import peak_flops
from .metrics import StepTimer, peak_memory
from .world_models.base import Batch, CountsWork

STRAGGLES_FROM, STRAGGLES_FROM_S = 1.5, 0.05
"""Times the median of all ranks, and seconds, above which a step's slowest rank is told: shorter is chance."""


@dataclass
class TrainState:
    """Where a run stands; with the weights and optimizer states, all there is to resume from."""

    step: int = 0
    skipped_steps: int = 0
    rewinds: int = 0
    guard: dict[str, Any] = field(default_factory=dict)  # what the losses to come are compared with
    cursor: dict[str, Any] = field(default_factory=dict)  # of the data; it means the same on any number of ranks

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Self:
        """From what a checkpoint holds of it."""
        try:
            return cls(**stored)
        except TypeError:
            known = ", ".join(one.name for one in fields(cls))
            raise UserError(
                f"The newest checkpoint's state.json holds {', '.join(stored)}, but this version knows {known} alone; "
                "go on with the version that wrote it, or choose another run_dir."
            ) from None


class Batches(Protocol):
    """What a loop reads: this rank's batches, and the cursor that stands behind the one given last."""

    cursor: Cursor
    bad_samples: Counter[str]  # reason -> samples of this rank that could not be used
    traffic: Counter[str]  # `TRAFFIC` -> number of them, where the data lies on remote storage

    @property
    def batch_sizes(self) -> Mapping[str, int]:
        """Samples of a global batch of each size of clip."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through."""
        ...


def check_micro_batches(batch_sizes: Mapping[str, int], engine: EngineConfig, num_ranks: int) -> None:
    parts = num_ranks // engine.sequence_parallel * engine.grad_accum_steps
    for bucket, size in batch_sizes.items():
        if size % parts:
            raise UserError(
                f"loader.global_batch_size={size} (clips of {bucket}) cannot be cut equally for {num_ranks} "
                f"rank(s) with engine.sequence_parallel={engine.sequence_parallel} and engine.grad_accum_steps="
                f"{engine.grad_accum_steps}; choose a multiple of {parts}, with latent_cells_per_batch by "
                f"loader.batch_multiple={parts}."
            )


def forward_backward(
    engine: Engine, batch: Batch, draws: SampleDraws, timer: StepTimer | None = None
) -> dict[str, Tensor]:
    """Gradients of this rank's part of a global batch; returns its mean losses, still on the device."""
    timer = timer or StepTimer()
    losses: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=engine.device))
    for micro_batch in split_batch({**batch, "draws": draws}, engine.grad_accum_steps):
        micro_draws = micro_batch.pop("draws")
        with timer.computing_forward():
            terms = engine.forward_loss(micro_batch, micro_draws)
        engine.backward(terms.total)
        losses["loss"] += terms.total.detach() / engine.grad_accum_steps
        for name, part in terms.parts.items():
            losses[f"loss/{name}"] += part.detach() / engine.grad_accum_steps
    return losses


def sample_draws(engine: Engine, seed: int, step: int, batch: Batch, stream: Stream = "train") -> SampleDraws:
    """The draws of this rank's part of a step's global batch."""
    size = num_samples(batch)
    places = range(engine.data_rank * size, (engine.data_rank + 1) * size)
    return SampleDraws.seeded(seed, step, places, engine.device, stream, size * engine.data_world_size)


def num_samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def split_batch(batch: Batch, num_parts: int) -> Iterator[Batch]:
    """Equal micro-batches, in order; what a batch holds has a row per sample."""
    size = num_samples(batch) // num_parts
    for start in range(0, num_parts * size, size):
        yield {name: rows[start : start + size] for name, rows in batch.items()}


def step_work(engine: Engine, batch: Batch) -> dict[str, int]:
    """Tokens and FLOPs of a step on all ranks, of which this batch is one's part; nothing where the model counts none.

    A step's batches are of one size on all ranks.
    """
    if not isinstance(engine.module, CountsWork):
        return {}
    tokens, flops = engine.module.work(batch, engine.recomputing)
    work = {"tokens": tokens, "model_flops": flops.model, "hardware_flops": flops.hardware}
    return {what: amount * num_samples(batch) * engine.data_world_size for what, amount in work.items()}


def utilization(speed: Mapping[str, float], num_devices: int, peak: float | None) -> dict[str, float]:
    """FLOPs per second as a person reads them: of one device, and as shares of its peak where that is known.

    MFU counts what the mathematics needs, HFU also what is computed again.
    """
    if "model_flops_per_s" not in speed:
        return {}
    of_one = {name: speed[f"{name}_flops_per_s"] / num_devices for name in ("model", "hardware")}
    shares = {} if peak is None else {"mfu": of_one["model"] / peak, "hfu": of_one["hardware"] / peak}
    return {"model_tflops_per_device": of_one["model"] / 1e12, **shares}


def _peak(engine: Engine) -> float | None:
    """The table's peaks are those of bf16."""
    is_known = engine.device.type == "cuda" and engine.precision == "bf16"
    return peak_flops(torch.cuda.get_device_name(engine.device)) if is_known else None


def rank_times(engine: Engine, timer: StepTimer, events: EventLog) -> dict[str, float]:
    """What this step took the ranks before they waited for each other; a straggler notes that it is one. Collective."""
    seconds = engine.ranks.gather(timer.own_s())
    slowest, middle = max(seconds), median(seconds)
    if slowest > max(STRAGGLES_FROM * middle, STRAGGLES_FROM_S) and seconds.index(slowest) == engine.rank:
        events.straggler(slowest, middle)
    return {"slowest_rank_s": slowest, "median_rank_s": middle}


def train_row(
    engine: Engine,
    state: TrainState,
    losses: dict[str, Tensor],
    report: StepReport,
    timer: StepTimer,
    events: EventLog,
) -> dict[str, Any]:
    """This very step's losses, averaged over ranks, and how fast the steps since the last row were. Collective."""
    values = engine.mean_across_ranks({name: loss.item() for name, loss in losses.items()})  # waits for the device
    speed = timer.read()
    return {
        "step": state.step,
        "split": "train",
        **values,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "update_norm": engine.update_norm() if report.was_applied else 0.0,
        "skipped_steps": state.skipped_steps,
        **speed,
        **rank_times(engine, timer, events),
        **utilization(speed, engine.world_size, _peak(engine)),
        **peak_memory(),
    }


def data_row(engine: Engine, batches: Batches) -> dict[str, Any]:
    """What was read so far: samples, epochs of each source, and what on any rank could not be used, or had to be asked
    of remote storage again. Collective."""
    counts = {f"bad_samples/{reason}": float(batches.bad_samples[reason]) for reason in SHARD_PROBLEMS}
    counts |= {f"storage/{what}": float(batches.traffic[what]) for what in TRAFFIC}
    means = engine.mean_across_ranks(counts)
    # Ranks that share sequences read the same samples, but each asks for them.
    num_readers = {name: engine.world_size if name.startswith("storage/") else engine.data_world_size for name in means}
    return {
        "samples_seen": sum(batches.cursor.consumed.values()),
        **{f"epoch/{source}": round(epoch, 4) for source, epoch in batches.epochs().items()},
        **{name: round(mean * num_readers[name]) for name, mean in means.items() if mean},
    }
