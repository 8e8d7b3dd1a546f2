"""Pretrains a world model on a dataset folder, and resumes by itself from `run_dir`.

    python -m pretrain.train --config C                                       one process
    torchrun --standalone --nproc-per-node 2 -m pretrain.train --config C     two ranks on this machine

Writes config.yaml, metrics.jsonl, checkpoints/ and, at the end, export/ (averaged weights with everything they need)
into `run_dir`. Exit codes: 0 done; 75 stopped on SIGTERM or SIGUSR2 after saving, start it again to go on.

A step is a pure function of the weights and (seed, step), and its samples one of the data cursor that the checkpoint
holds: a run that was killed and started again takes the very steps that it would have taken.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field
from torch import nn

from configs.loader import StrictConfig, UserError, dump_config, run_command
from data_pipeline.dataset import CODEC, TEXT_ENCODER, Split
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig, telling_of_lost_workers
from data_pipeline.sample_order import Cursor
from data_pipeline.sample_plan import SamplePlan, plan_samples

from .checkpoint import CHECKPOINTS, Checkpoints, find_checkpoints
from .draws import seed_layers
from .ema import ExponentialMovingAverage
from .engine import Engine, EngineConfig, OptimizerConfig, create_engine, learning_rate
from .engine.optimizer import Steps
from .events import EventLog
from .exported import MODEL_YAML, WorldModelConfig
from .guards import Guard, GuardConfig, Trouble
from .imagination import Imagination, ImagineConfig, MetricNetworks, ready_to_imagine
from .metrics import MetricsLog, Progress, StepTimer
from .run import (
    CONFIG_FILE,
    EXIT_DONE,
    EXIT_STOPPED,
    StopSignal,
    exclusive,
    log_on_main_rank_only,
    resume_config,
    write_config,
)
from .starting_weights import starting_weights
from .steps import (
    Batches,
    TrainState,
    check_micro_batches,
    data_row,
    forward_backward,
    num_samples,
    sample_draws,
    step_work,
    train_row,
)
from .trackers import TrackerName
from .validation import validation_row
from .watchdog import Watchdog
from .weights import Weights
from .world_models.observation_space import ObservationSpaceConfig, build_world_model

logger = logging.getLogger(__name__)


class TrainConfig(StrictConfig):
    """What every training run has; pretraining and fine-tuning add their models."""

    run_dir: Path = Field(description="folder of this run; a run that is already there is resumed")
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights' start and of every step's noise")
    num_steps: Steps = Field(gt=0, description="optimizer updates")
    loader: LoaderConfig
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, which are what is exported")
    checkpoint_every: int = Field(500, gt=0, description="steps between checkpoints")
    keep_last: int = Field(2, gt=0, description="newest checkpoints to keep")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints whose step is a multiple of this are kept for good; null: none are"
    )
    validate_every: int = Field(500, gt=0, description="steps between losses on the validation split")
    validation_batches: int = Field(4, gt=0, description="global batches of a validation loss, always the same ones")
    imagine: ImagineConfig = ImagineConfig()
    log_every: int = Field(10, gt=0, description="steps between rows of metrics.jsonl")
    trackers: tuple[TrackerName, ...] = Field(
        (), description="where the rows go besides: tensorboard (run_dir/tensorboard), wandb"
    )
    guard: GuardConfig = GuardConfig()
    stuck_after_s: float | None = Field(
        3600,
        gt=0,
        le=1e6,
        description="without a step, all ranks write their stacks to stacks/ and end; null: they wait",
    )


class PretrainConfig(TrainConfig):
    """One pretraining run."""

    model: ObservationSpaceConfig
    pretrained: Path | None = Field(
        None, description="weights to start from: a Wan transformer's folder, or export/ of a pretraining run"
    )


# A resumed run may differ in these: they leave the losses as they are, those of `engine` up to rounding.
MAY_CHANGE = frozenset(
    {"run_dir", "num_steps", "checkpoint_every", "keep_last", "keep_every"}
    | {"validate_every", "validation_batches", "log_every", "trackers"}
    | {"loader.num_workers", "loader.prefetch_factor", "loader.announced_batches"}
    | {"loader.check_sha256", "loader.max_bad_fraction"}
    | {"loader.dataset", "loader.storage"}  # where it lies: what is in it, the cursor sees to
    | {"engine.kind", "engine.zero_stage", "engine.sharding", "engine.sequence_parallel", "engine.grad_accum_steps"}
    | {"engine.timeout_s", "stuck_after_s", "engine.attention", "engine.compile", "engine.activation_checkpointing"}
    | {"engine.offload_optimizer", "engine.offload_weights", "engine.offload_folder", "engine.reshard_after_forward"}
    | {f"guard.{name}" for name in GuardConfig.model_fields}
    | {f"imagine.{name}" for name in ImagineConfig.model_fields}
)


TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)


class OpenBatches(Protocol):
    """Gives this rank's batches of a split, from a cursor on; None where the split is empty."""

    def __call__(self, split: Split, rank: int, world_size: int, cursor: Cursor) -> Batches | None: ...


def main(config: PretrainConfig) -> int:
    log_on_main_rank_only()
    config = resume_run(config)
    datasets = Datasets.open(config.loader.addresses, config.loader.storage)
    inputs = datasets.inputs(config.loader.inputs)
    world_model = build_world_model(config.model, inputs)
    is_new = is_new_run(config.run_dir)
    weights = starting_weights(world_model, config.seed, config.pretrained, datasets) if is_new else None
    model_yaml = dump_config(WorldModelConfig(world_model=world_model.config, inputs=inputs.config))
    with exclusive(config.run_dir), StopSignal() as stop:
        return train(
            config,
            world_model,
            {MODEL_YAML: model_yaml, **datasets.files()},
            dataset_batches(datasets, config.loader),
            stop,
            export_with=encoder_folders(datasets.first.path),
            weights=weights,
        )


def resume_run(config: TrainConfigT) -> TrainConfigT:
    """The config to run with: one that would change the losses of a run that is already there is refused.

    More steps are welcome, on the schedule that the run was started with.
    """
    if find_checkpoints(config.run_dir / CHECKPOINTS) and not (config.run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"{config.run_dir} holds checkpoints, but no {CONFIG_FILE} that says what they were trained with; restore "
            "it, or choose another run_dir."
        )
    settled = config.optimizer.model_copy(update={"decay_steps": config.optimizer.decay_steps or config.num_steps})
    return resume_config(config.run_dir, config.model_copy(update={"optimizer": settled}), MAY_CHANGE)


def is_new_run(run_dir: Path) -> bool:
    """It has no checkpoint yet, so it needs weights to start with."""
    return not find_checkpoints(run_dir / CHECKPOINTS)


def dataset_batches(datasets: Datasets, config: LoaderConfig) -> OpenBatches:
    datasets.check_shards(config.max_bad_fraction)
    datasets.warn_of_small_cache(config.shuffle.window_shards)

    @cache
    def plan(split: Split) -> SamplePlan | None:
        return plan_samples(datasets, config.model_copy(update={"split": split}), may_lack=split == "validation")

    def open_batches(split: Split, rank: int, world_size: int, cursor: Cursor) -> Batches | None:
        planned, of_split = plan(split), config.model_copy(update={"split": split})
        return None if planned is None else Loader(datasets, of_split, rank, world_size, cursor, planned)

    return open_batches


def encoder_folders(dataset: Path) -> list[Path]:
    """What an export needs besides descriptions, to encode observations as in training."""
    return [dataset / name for name in (CODEC, TEXT_ENCODER)]


def train(
    config: TrainConfig,
    model: nn.Module,
    texts: Mapping[str, str],
    open_batches: OpenBatches,
    stop: StopSignal,
    export_with: Sequence[Path] = (),
    weights: Weights | None = None,
) -> int:
    """The training loop. `texts` are small files for whoever loads the weights: they describe model and data. `weights`
    are what a model on the meta device starts with; without them it has to find a checkpoint."""
    engine = create_engine(config.engine, model, config.optimizer, weights)
    ema = ExponentialMovingAverage(engine, config.ema_decay)
    checkpoints = Checkpoints(
        config.run_dir / CHECKPOINTS, engine, keep_last=config.keep_last, keep_every=config.keep_every
    )
    state = resume(checkpoints, ema, config.num_steps)
    batches = training_batches(config, engine, open_batches, state)
    networks = ready_to_imagine(config.imagine, model, batches.batch_sizes, engine.device)
    if engine.is_main:
        write_settings(config, engine)
    engine.barrier()
    log_start(engine, state, config)
    guard = Guard(config.guard, state.guard)
    metrics = MetricsLog(config.run_dir / "metrics.jsonl", state.step, engine.is_main, config.trackers)
    progress = Progress(config.num_steps, engine.is_main)
    timer = StepTimer()
    reading = iter(batches)
    events = EventLog(config.run_dir, engine.rank, state.step, engine.layout)
    watchdog = Watchdog(config.run_dir, engine.rank, config.stuck_after_s)
    with events, metrics, checkpoints, watchdog, telling_of_lost_workers(config.loader):
        while state.step < config.num_steps:
            watchdog.alive()
            step = events.step = state.step + 1
            with timer.waiting_for_data():
                batch = next(reading)
            seed_layers(config.seed, step, engine.data_rank)
            losses = forward_backward(engine, batch, sample_draws(engine, config.seed, step, batch), timer)
            loss = engine.mean_across_ranks({"loss": losses["loss"].item()})["loss"]  # waits for the device
            report = engine.step(learning_rate(config.optimizer, step, config.num_steps), guard.largest_norm(loss))
            trouble = guard.review(loss, report)
            if report.was_applied:
                ema.update(engine, step)
            state.step, state.cursor = step, batches.cursor.model_dump()
            state.skipped_steps += not report.was_applied
            timer.count_step(num_samples(batch) * engine.data_world_size, step_work(engine, batch))
            if trouble is not None:
                events.trouble(trouble, report.was_applied, batch["keys"])
                back = answer(trouble, guard, checkpoints, ema, state)
                if back is not None:
                    state, guard = back, Guard(config.guard, back.guard)
                    metrics.rewind(state.step)
                    events.note("rewound", to_step=state.step)
                    continue

            # Rows of a step come before its checkpoint: a run resumed there has them.
            if step % config.log_every == 0:
                row = train_row(engine, state, losses, report, timer, events) | data_row(engine, batches)
                metrics.write(row)
                progress.show(row)
            is_last = step == config.num_steps
            if step % config.validate_every == 0 or is_last:
                metrics.write(validate(config, engine, ema, open_batches, step, watchdog, networks))
                timer.restart()
            is_stopping = engine.any_rank(stop.requested)
            if step % config.checkpoint_every == 0 or is_last or is_stopping:
                checkpoints.save(ema, asdict(replace(state, guard=guard.state())), texts)
                timer.restart()
            checkpoints.settle(wait_for_it=is_last or is_stopping)
            if is_stopping and not is_last:
                events.note("stopped_on_request")
                logger.info("stopped on request after step %d; start the same command again to go on", step)
                engine.close()
                return EXIT_STOPPED

    progress.finish()
    checkpoints.export(config.run_dir / "export", texts, export_with)
    logger.info("exported to %s", config.run_dir / "export")
    engine.close()
    return EXIT_DONE


def training_batches(config: TrainConfig, engine: Engine, open_batches: OpenBatches, state: TrainState) -> Batches:
    """This rank's, from where the run stands; a `UserError` where there are none, or none that can be cut equally."""
    batches = open_batches("train", engine.data_rank, engine.data_world_size, Cursor.model_validate(state.cursor))
    if batches is None:
        raise UserError(f"{config.loader.dataset}: its train split holds nothing to train on.")
    check_micro_batches(batches.batch_sizes, config.engine, engine.world_size)
    return batches


def validate(
    config: TrainConfig,
    engine: Engine,
    ema: ExponentialMovingAverage,
    open_batches: OpenBatches,
    step: int,
    watchdog: Watchdog,
    networks: MetricNetworks,
) -> dict[str, Any] | None:
    batches = watchdog.watched(open_batches("validation", engine.data_rank, engine.data_world_size, Cursor()) or ())
    imagination = Imagination(
        *(config.imagine, networks, engine),
        seed=config.seed,
        step=step,
        run_dir=config.run_dir,
        on_clip=watchdog.alive,
    )
    return validation_row(
        *(engine, ema, batches),
        num_batches=config.validation_batches,
        seed=config.seed,
        step=step,
        imagination=imagination,
    )


def answer(
    trouble: Trouble, guard: Guard, checkpoints: Checkpoints, ema: ExponentialMovingAverage, state: TrainState
) -> TrainState | None:
    """What the guard does about a step: it ends the run, gives the state to go back to, or None to go on from here."""
    checkpoints.settle(wait_for_it=True)
    guard.end_run_for(trouble, state.step)
    return rewind(checkpoints, ema, state, guard.config.max_rewinds) if guard.wants_rewind(trouble) else None


def rewind(
    checkpoints: Checkpoints, ema: ExponentialMovingAverage, state: TrainState, max_rewinds: int
) -> TrainState | None:
    """Back to the newest checkpoint's weights, while the data goes on; None where there is no checkpoint yet."""
    if state.rewinds == max_rewinds:
        raise UserError(
            f"Step {state.step} is one more to go back from than guard.max_rewinds={max_rewinds} allows; "
            "look at events.jsonl and at the data it names, or lower the learning rate."
        )
    stored = checkpoints.load(ema)
    if stored is None:
        return None
    return replace(TrainState.restored(stored), rewinds=state.rewinds + 1, skipped_steps=state.skipped_steps)


def resume(checkpoints: Checkpoints, ema: ExponentialMovingAverage, num_steps: int) -> TrainState:
    stored = checkpoints.load(ema)
    state = TrainState() if stored is None else TrainState.restored(stored)
    if state.step > num_steps:
        raise UserError(
            f"num_steps is {num_steps}, but {checkpoints.folder.parent} has {state.step} already; set num_steps to at "
            "least that, or choose another run_dir."
        )
    checkpoints.prepare()
    return state


def write_settings(config: TrainConfig, engine: Engine) -> None:
    """The config with what the engine settled on, and what it told its library."""
    settled = config.engine.model_copy(update={"precision": engine.precision, "attention": engine.attention})
    write_config(config.run_dir, config.model_copy(update={"engine": settled}))
    for name, text in engine.settings_files.items():
        (config.run_dir / name).write_text(text)


def log_start(engine: Engine, state: TrainState, config: TrainConfig) -> None:
    size = sum(math.prod(shape) for shape in engine.shapes.values())
    logger.info(
        "%s, %s, %s, %s attention, %.2f M parameters, from step %d to %d in %s",
        *(engine.layout, engine.device.type, engine.precision, engine.attention, size / 1e6),
        *(state.step, config.num_steps, config.run_dir),
    )


if __name__ == "__main__":
    run_command(main, PretrainConfig, description=__doc__)
