"""A chain of stages as one config, and the jobs that it comes to: data -> pretrain -> finetune -> evaluate.

Each stage is a command that also runs by itself. A chain only says where and how long it runs, and puts the folders in:

    RUN_DIR/chain.yaml, jobs.json     what was submitted, and as which jobs
    RUN_DIR/dataset/                  data
    RUN_DIR/pretrain/                 the training's run_dir
    RUN_DIR/finetune[/PRESET]/        the same, for each preset
    RUN_DIR/evaluate[/PRESET]/        results.json
    RUN_DIR/slurm/STAGE[/TASK]/       job.sbatch, attempts.jsonl, logs/attempt_001/
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from configs.loader import StrictConfig, UserError

REPOSITORY = Path(__file__).resolve().parents[1]
RUN_DIR = "$RUN_DIR"
"""Stands for the chain's folder in the overrides of a stage."""

ARRAY_INDEX = "$SLURM_ARRAY_TASK_ID"
TIME = re.compile(r"(?:[0-9]+-)?[0-9]+(?::[0-9]{1,2}){0,2}")
MAX_TIME_S, MAX_LEAD_S = 366 * 24 * 3600, 65_535  # the latter is SLURM's

MAX_NODES, MAX_TASKS, MAX_COUNT, MAX_SEED = 10_000, 100_000, 1_000_000, 2**63 - 1
OURS = {"array", "dependency", "export", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output"} | {
    *(
        "parsable",
        "requeue",
        "no-requeue",
        "signal",
        "test-only",
        "time",
        "wait-all-nodes",
        "wrap",
        "kill-on-invalid-dep",
        "clusters",
        "wait",
        "help",
        "usage",
        "version",
    )
}
"""Options of sbatch that a chain sets itself, or depends on."""

Override = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*=[^\x00]*$")]
Words = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text that YAML may read as a number."""

Memory = Annotated[Words, StringConstraints(pattern=r"^[0-9]{1,9}[KMGT]?B?$")]
Partition = Annotated[str, StringConstraints(pattern=r"^[\w.,-]+$")]

NumNodes = Annotated[int, Field(ge=1, le=MAX_NODES)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


# --- the config ---------------------------------------------------------------------------------------------------


class NodeRange(StrictConfig):
    """The job starts on what there is in between, and goes on with another number after a requeue."""

    min: NumNodes = Field(description="without so many it waits")
    max: NumNodes = Field(description="more are of no use")

    @model_validator(mode="after")
    def _is_a_range(self) -> "NodeRange":
        if self.max < self.min:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class StageConfig(StrictConfig):
    """What every stage has."""

    config: Path = Field(description="of the stage's command")
    overrides: tuple[Override, ...] = Field(
        (), description="key=value for that command; $RUN_DIR stands for the chain's folder"
    )
    time: Words = Field(description="limit as sbatch takes it: 30 (minutes), 12:00:00, 2-00:00:00")
    lead_s: int = Field(
        300, ge=1, le=MAX_LEAD_S, description="seconds before the limit at which the job is told to save and stop"
    )
    cpus_per_node: Count | None = Field(None, description="null: the cluster's default, or with exclusive: all")
    gpus_per_node: int = Field(0, ge=0, le=MAX_COUNT, description="GPUs of every node")
    memory: Memory | None = Field(None, description="of a node as sbatch takes it: 64G, 0 (all); null: the default")
    exclusive: bool = Field(False, description="nodes are shared with no other job")
    partition: Partition | None = Field(None, description="null: env.sh's")
    max_failures: Count = Field(3, description="so many failed attempts in a row end the job")
    sbatch: tuple[Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[^\s#]+)?$")], ...] = Field(
        (), description="more options of sbatch, such as --constraint=h100 or --reservation=NAME"
    )

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        if not TIME.fullmatch(text):
            raise ValueError("write minutes, HH:MM:SS or D-HH:MM:SS, for example 12:00:00")
        if len(text) > 20 or seconds(text) > MAX_TIME_S:
            raise ValueError("is more than a year; a job goes on by itself after each limit")
        return text

    @field_validator("sbatch")
    @classmethod
    def _leave_the_chain_its_own(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = option.partition("=")[0].removeprefix("--")
            if any(ours.startswith(name) for ours in OURS):  # sbatch takes names cut short, too
                raise ValueError(f"{option}: a chain sets this itself; use the stage's other settings")
        return options

    @field_validator("overrides")
    @classmethod
    def _leave_folders_to_the_chain(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        return _without_folders(overrides)

    @model_validator(mode="after")
    def _leaves_time_before_the_signal(self) -> "StageConfig":
        if self.lead_s >= seconds(self.time):
            raise ValueError(f"lead_s={self.lead_s} leaves nothing of time={self.time}; raise time or lower lead_s")
        return self


class DataConfig(StageConfig):
    """`data_pipeline.build`: an array of which each task builds a part, or one Ray cluster over several nodes."""

    kind: Literal["array", "ray"] = Field("array", description="many small jobs, or one of several nodes")
    parts: int = Field(1, ge=1, le=MAX_TASKS, description="of an array: tasks, each with its share of the episodes")
    max_at_once: Count | None = Field(None, description="of an array: tasks at work at the same time; null: any")
    nodes: NumNodes = Field(1, description="of a Ray cluster")

    @model_validator(mode="after")
    def _has_what_its_kind_has(self) -> "DataConfig":
        if self.kind == "array" and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes} is for kind=ray; an array has parts, each on a node of its own")
        if self.kind == "ray" and (self.parts > 1 or self.max_at_once is not None):
            raise ValueError("parts and max_at_once are for kind=array; a Ray cluster has nodes")
        return self


class TrainingConfig(StageConfig):
    """`pretrain.train` or `finetune.train`."""

    nodes: NumNodes | NodeRange = Field(1, description="a number, or {min: 2, max: 8}")
    ranks_per_node: Count | None = Field(None, description="null: one for each GPU, without GPUs one")
    launcher: Literal["torchrun", "srun"] = Field(
        "torchrun", description="one task per node, which starts the ranks, or one task per rank"
    )
    preflight: bool = Field(True, description="check every node first, and stay away from those that fail")
    preflight_s: int = Field(
        120, ge=1, le=3600, description="how long nodes have to be there, and again to add up numbers with each other"
    )

    @property
    def ranks(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def min_nodes(self) -> int:
        return self.nodes.min if isinstance(self.nodes, NodeRange) else self.nodes

    @property
    def max_nodes(self) -> int:
        return self.nodes.max if isinstance(self.nodes, NodeRange) else self.nodes


class Preset(StrictConfig):
    """One of several fine-tuning runs."""

    name: TaskName = Field(description="also of its folder")
    config: Path | None = Field(None, description="null: the stage's")
    overrides: tuple[Override, ...] = Field((), description="key=value, after those of the stage")

    @field_validator("overrides")
    @classmethod
    def _leave_folders_to_the_chain(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        return _without_folders(overrides)


class FinetuneConfig(TrainingConfig):
    """`finetune.train`, once for each preset and seed, as a job array."""

    presets: tuple[Preset, ...] = Field((), description="runs that differ; none: one run")
    seeds: tuple[Seed, ...] = Field((), description="each preset once for every seed")
    max_at_once: Count | None = Field(None, description="runs at work at the same time; null: any")

    @model_validator(mode="after")
    def _runs_have_their_own_names(self) -> "FinetuneConfig":
        names = Counter(preset.name for preset in each_preset(self))
        name, number = names.most_common(1)[0] if names else ("", 0)
        if number > 1:
            raise ValueError(f"presets and seeds give {number} runs the name {name}; each needs its own")
        return self


class Stages(StrictConfig):
    """In this order; what is left out is not run, and what would come of it must be there."""

    data: DataConfig | None = Field(None, description="recordings into RUN_DIR/dataset")
    pretrain: TrainingConfig | None = Field(None, description="the dataset into a world model, RUN_DIR/pretrain")
    finetune: FinetuneConfig | None = Field(None, description="the world model into policies, RUN_DIR/finetune")
    evaluate: StageConfig | None = Field(None, description="each policy into RUN_DIR/evaluate")


StageName = Literal["data", "pretrain", "finetune", "evaluate"]


class ChainConfig(StrictConfig):
    """What to run, one stage after the other."""

    run_dir: Path = Field(description="folder of the chain, on a file system that all nodes see")
    env: Path = Field(Path("slurm/env.sh"), description="what the cluster is like")
    stages: Stages = Field(description="what to run")

    @field_validator("run_dir")
    @classmethod
    def _fits_into_scripts(cls, path: Path) -> Path:
        # sbatch has its own ideas of % and blanks in names of output files, and # begins a comment in its options.
        if re.search(r"[\s%\\\"'$`#]", str(path)) or not str(path).isprintable():
            raise ValueError("choose a folder without spaces, quotes, $, %, #, ` and backslashes in its path")
        return path

    @model_validator(mode="after")
    def _has_stages(self) -> "ChainConfig":
        if not any(getattr(self.stages, name) for name in Stages.model_fields):
            raise ValueError("stages is empty; give at least one of data, pretrain, finetune, evaluate")
        return self


def _without_folders(overrides: tuple[str, ...]) -> tuple[str, ...]:
    for override in overrides:
        if override.partition("=")[0] in ("run_dir", "run-dir", "out", "output"):
            raise ValueError(f"{override}: where a stage writes is the chain's to say: a folder of its run_dir")
    return overrides


def seconds(time: str) -> int:
    """Of a limit as sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, secs = [0, *parts][-3:]
    return (hours * 60 + minutes) * 60 + secs


# --- the jobs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run of a stage's command: a job of its own, or an element of an array."""

    name: str
    folder: Path  # of its attempts and logs
    command: tuple[str, ...]  # what follows `python -m`
    run_dir: Path | None = None  # of a training, where its progress is seen
    output: Path | None = None  # of an evaluation, where its results are


@dataclass(frozen=True)
class Job:
    """What one sbatch file holds. `tasks` by the index in the array, or by "" where there is no array."""

    stage: StageName
    template: str
    config: StageConfig
    tasks: dict[str, Task]
    pattern: Task | None = None  # in place of tasks that differ in their index alone, which is ARRAY_INDEX here
    after: StageName | None = None
    follows_task_by_task: bool = False  # each task waits for the one of the same index
    max_at_once: int | None = None

    @property
    def is_array(self) -> bool:
        return "" not in self.tasks


def plan_jobs(chain: ChainConfig) -> list[Job]:
    """The jobs in the order of their dependencies."""
    jobs: list[Job] = []
    for make in (_data_job, _pretrain_job, _finetune_job, _evaluate_job):
        job = make(chain, jobs[-1] if jobs else None)
        if job is not None:
            jobs.append(job)
    return jobs


def _data_job(chain: ChainConfig, before: Job | None) -> Job | None:
    config = chain.stages.data
    if config is None:
        return None
    folder = job_folder(chain, "data")
    command = _command(chain, "data_pipeline.build", config, [f"out={chain.run_dir}/dataset"])
    if config.kind == "ray":
        return Job("data", "ray.sbatch", config, {"": Task("data", folder, command)})
    if config.parts == 1:
        return Job("data", "data.sbatch", config, {"": Task("data", folder, command)})

    def part(index: str) -> Task:
        return Task(f"part_{index}", folder / f"part_{index}", (*command, f"partition={index}/{config.parts}"))

    tasks = {str(index): part(str(index)) for index in range(config.parts)}
    return Job("data", "data.sbatch", config, tasks, part(ARRAY_INDEX), max_at_once=config.max_at_once)


def _pretrain_job(chain: ChainConfig, before: Job | None) -> Job | None:
    config = chain.stages.pretrain
    if config is None:
        return None
    run_dir = chain.run_dir / "pretrain"
    command = _command(chain, "pretrain.train", config, [f"run_dir={run_dir}", *_dataset(chain, "loader.dataset")])
    task = Task("pretrain", job_folder(chain, "pretrain"), command, run_dir)
    return Job("pretrain", "training.sbatch", config, {"": task}, after=before.stage if before else None)


def _finetune_job(chain: ChainConfig, before: Job | None) -> Job | None:
    config = chain.stages.finetune
    if config is None:
        return None

    def task(folder: Path, run_dir: Path, preset: Preset | None) -> Task:
        given = [f"run_dir={run_dir}", *_dataset(chain, "loader.dataset")]
        if chain.stages.pretrain is not None:
            given.append(f"pretrained={chain.run_dir}/pretrain/export")
        return Task(run_dir.name, folder, _command(chain, "finetune.train", config, given, preset), run_dir)

    presets = list(each_preset(config))
    folder, run_dir = job_folder(chain, "finetune"), chain.run_dir / "finetune"
    tasks = {str(i): task(folder / one.name, run_dir / one.name, one) for i, one in enumerate(presets)}
    after = before.stage if before else None
    return Job(
        "finetune",
        "training.sbatch",
        config,
        tasks or {"": task(folder, run_dir, None)},
        after=after,
        max_at_once=config.max_at_once if tasks else None,
    )


def _evaluate_job(chain: ChainConfig, before: Job | None) -> Job | None:
    config, finetune = chain.stages.evaluate, chain.stages.finetune
    if config is None:
        return None

    def task(name: str) -> Task:
        output, folder = chain.run_dir / "evaluate" / name, job_folder(chain, "evaluate") / name
        given = [f"output={output}"]
        if finetune is not None:
            given.append(f"checkpoint={chain.run_dir / 'finetune' / name / 'export'}")
        given += _dataset(chain, "open_loop.dataset")
        return Task(name or "evaluate", folder, _command(chain, "finetune.evaluate", config, given), output=output)

    tasks = {str(i): task(preset.name) for i, preset in enumerate(each_preset(finetune))} if finetune else {}
    return Job(
        "evaluate",
        "evaluate.sbatch",
        config,
        tasks or {"": task("")},
        after=before.stage if before else None,
        follows_task_by_task=bool(tasks),
    )


def job_folder(chain: ChainConfig, stage: StageName) -> Path:
    return chain.run_dir / "slurm" / stage


def each_preset(config: FinetuneConfig) -> Iterator[Preset]:
    """Every preset once for every seed."""
    if not config.seeds:
        yield from config.presets
    for preset in (config.presets or (None,)) if config.seeds else ():
        for seed in config.seeds:
            name = f"{preset.name}_seed_{seed}" if preset else f"seed_{seed}"
            base = preset or Preset(name=name)
            yield base.model_copy(update={"name": name, "overrides": (*base.overrides, f"seed={seed}")})


def _dataset(chain: ChainConfig, key: str) -> Sequence[str]:
    return [f"{key}={chain.run_dir}/dataset"] if chain.stages.data is not None else []


def _command(
    chain: ChainConfig, module: str, config: StageConfig, given: Sequence[str], preset: Preset | None = None
) -> tuple[str, ...]:
    """Overrides in the order of who has the last word: the chain's wiring, the stage, the preset."""
    config_file = preset.config if preset and preset.config else config.config
    overrides = [*config.overrides, *(preset.overrides if preset else ())]
    filled = [override.replace(RUN_DIR, str(chain.run_dir)) for override in overrides]
    return (module, "--config", str(config_file), *given, *filled)


# --- numbers of nodes ---------------------------------------------------------------------------------------------


def usable_node_counts(name: str, config: TrainingConfig, settings: Mapping[str, Any] | None) -> list[int]:
    """The numbers of nodes in the stage's range over whose ranks a global batch can be cut equally, smallest first.

    `settings` are the training's own (None where they are not known).
    """
    counts = list(range(config.min_nodes, config.max_nodes + 1))
    if settings is None:
        return counts
    engine, batch_size = settings["engine"], settings["loader"]["global_batch_size"]
    sequence_parallel, micro_batches = engine["sequence_parallel"], engine["grad_accum_steps"]
    usable = [
        count
        for count in counts
        if count * config.ranks % sequence_parallel == 0
        and batch_size % (count * config.ranks // sequence_parallel * micro_batches) == 0
    ]
    if not usable:
        numbers = f"{counts[0]} node(s)" if len(counts) == 1 else f"any of {counts[0]} to {counts[-1]} nodes"
        raise UserError(
            f"{name}: loader.global_batch_size={batch_size} cannot be cut equally for {numbers} of {config.ranks} "
            f"rank(s) with engine.sequence_parallel={sequence_parallel} and engine.grad_accum_steps={micro_batches}; "
            "change nodes or the batch."
        )
    return usable
