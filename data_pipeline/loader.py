"""Shards -> batches.

Which samples form global batch k is settled on paper (`sample_plan`): the number of ranks, of workers and of batches
read ahead never enters it. After every batch the loader's cursor says where it stands; a run that stored it goes on
from there, on any number of ranks that divides the batch. A sample that cannot be used is replaced within its own
rank's part of the batch, so that nobody else notices.
"""

import logging
import os
import resource
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from configs.loader import UserError

from .clips import BadSample, Batch, MixedClips, Part, Request
from .datasets import Datasets
from .sample_order import Cursor
from .sample_plan import PlanConfig, SamplePlan, check_ranks, check_same_order, plan_samples

logger = logging.getLogger(__name__)

MIN_READ_TO_STOP = 1000
"""Samples read before the share of bad ones says anything about those still to come."""


FILES_PER_WORKER, FILES_PER_BATCH, SPARE_FILES = 8, 4, 64
"""Open files that reading takes, with some to spare: of a reading process, of a batch that it has read, of all else."""


class LoaderConfig(PlanConfig):
    """How datasets are read in training."""

    num_workers: int = Field(
        0, ge=0, le=1024, description="Reading processes per rank; 0: read in the training process."
    )
    prefetch_factor: PositiveInt = Field(2, le=1024, description="Batches that each worker reads ahead.")
    announced_batches: NonNegativeInt = Field(
        4,
        le=1024,
        description="Batches before they are read that a local disk is told of them, so that it fetches all at once.",
    )
    max_bad_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples read (at least 1000) that may be unusable: each is told, counted, and "
        "replaced by another of its batch; more stop the run. 0: the first one does.",
    )


class Loader:
    """Endless batches from the cursor on; rank r of n gets the r-th of n equal parts of each global batch."""

    def __init__(
        self,
        datasets: Datasets,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
        plan: SamplePlan | None = None,
    ) -> None:
        """`plan` is that of the datasets and the config, where it has been made already."""
        plan = plan or plan_samples(datasets, config)
        assert plan is not None  # it would have been refused
        check_ranks(config, plan.order.batch_sizes, world_size)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.order, self._positions = plan.order, plan.positions
        check_same_order(plan, datasets, cursor or Cursor())
        self.cursor = (cursor or Cursor()).model_copy(update={"order": plan.identity})
        self.num_read = 0
        self.bad_samples: Counter[str] = Counter()  # reason -> number, on this rank since the start
        self.traffic: Counter[str] = Counter()  # requests and retries, likewise
        self.clips = MixedClips(datasets, config)

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Samples of a global batch of each size of clip."""
        return self.order.batch_sizes

    def epochs(self) -> dict[str, float]:
        """How often each source of the mixture has been gone through."""
        return self.order.epochs(self.cursor)

    def __iter__(self) -> Iterator[Batch]:
        """After each batch, `cursor` stands behind it, however far workers have read ahead."""
        ahead: deque[Cursor] = deque()
        workers = self.config.num_workers
        batches = DataLoader(
            self.clips,
            batch_sampler=_Parts(self, ahead),  # type: ignore[arg-type]  # any iterable of lists will do
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # so will what `__getitems__` gives
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
        )
        for part in _started(batches, self.config):
            if isinstance(part, UserError):
                raise part
            self.num_read += len(part.keys)
            self.traffic += part.traffic
            self._count(part.bad)
            self.cursor = ahead.popleft()
            yield part.hand_over()

    def _count(self, bad: list[BadSample]) -> None:
        """Each is told once: the one that stops the run by the error."""
        self.bad_samples.update(reason for reason, _ in bad)
        num_bad, allowed = self.bad_samples.total(), self.config.max_bad_fraction
        is_stopping = bool(bad) and num_bad > allowed * max(self.num_read, MIN_READ_TO_STOP)
        for _, sentence in bad[:-1] if is_stopping else bad:
            logger.warning("%s", sentence)
        if is_stopping:
            share = (
                f"{num_bad} of the {self.num_read} samples read cannot be used, more than "
                f"loader.max_bad_fraction={allowed:g} allows. "
            )
            raise UserError(f"{share if allowed else ''}{bad[-1][1]}")


def _started(batches: DataLoader[Any], config: LoaderConfig) -> Iterator[Any]:
    """The iterator over batches, whose reading processes have begun."""
    if config.num_workers:
        _allow_open_files(config)
    try:
        return iter(batches)
    except OSError as error:
        raise UserError(
            f"loader.num_workers={config.num_workers}: so many reading processes cannot be started "
            f"({error.strerror}); set it lower, or raise the limit of processes (`ulimit -u`)."
        ) from error


def _allow_open_files(config: LoaderConfig) -> None:
    """A reading process hands over memory as open files. Where those run out, PyTorch breaks, or waits for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = len(os.listdir("/dev/fd")) + SPARE_FILES
    needed = own + config.num_workers * (FILES_PER_WORKER + FILES_PER_BATCH * config.prefetch_factor)
    if resource.RLIM_INFINITY not in (hard, soft) and needed > hard:
        raise UserError(
            f"loader.num_workers={config.num_workers} and loader.prefetch_factor={config.prefetch_factor} may take "
            f"{needed} open files, but the limit is {hard}; raise it (`ulimit -n`), or lower the two."
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _as_it_is(part: Part | UserError) -> Part | UserError:
    """`MixedClips` gives whole batches."""
    return part


class LostWorkerError(UserError):
    """A reading process was ended from outside."""

    exit_code = 1


@contextmanager
def telling_of_lost_workers(config: LoaderConfig) -> Iterator[None]:
    """Around all that is done while workers read: PyTorch raises from a signal handler, wherever we just are."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LostWorkerError(
            f"A reading process was lost ({str(error).splitlines()[0].strip().rstrip('.')}), mostly for want of memory "
            f"(see `dmesg`); lower loader.num_workers={config.num_workers} or loader.prefetch_factor="
            f"{config.prefetch_factor}, and start the same command again."
        ) from error


class _Parts:
    """What this rank reads of each batch: positions in the manifest, and in training their places in the order.

    Cursors are noted as they are passed.
    """

    def __init__(self, loader: Loader, ahead: deque[Cursor]) -> None:
        self._loader, self._ahead = loader, ahead

    def __iter__(self) -> Iterator[list[Request]]:
        announced: deque[tuple[list[Request], Cursor]] = deque()
        for part, cursor in self._drawn():
            announced.append((part, cursor))
            if len(announced) > self._loader.config.announced_batches:
                part, cursor = announced.popleft()
                self._ahead.append(cursor)
                yield part

    def _drawn(self) -> Iterator[tuple[list[Request], Cursor]]:
        """Parts, of which the disk has been told, and the cursors behind them."""
        loader, config, cursor = self._loader, self._loader.config, self._loader.cursor
        while True:
            step = cursor.step
            batch, cursor = loader.order.draw(cursor)
            part = batch.part(loader.rank, loader.world_size)
            first_row = loader.rank * len(part.sample)
            requests: list[Request] = [
                (
                    int(loader._positions[stream][sample]),
                    (config.seed, step, first_row + row) if config.split == "train" else None,
                )
                for row, (stream, sample) in enumerate(zip(part.stream, part.sample, strict=True))
            ]
            if config.announced_batches:
                loader.clips.announce(requests)
            yield requests, cursor
