"""The whole chain on this machine, stage by stage: recordings -> dataset -> world model -> policy -> report.

    make demo                        Meta-World demonstrations that it records itself
    make demo DATA=path/to/dataset   your own LeRobot dataset; open-loop action error in place of the simulator

Each stage is a command that also runs by itself: it is printed, and stands in the report. A demo that was interrupted
goes on where it was; one that is finished only writes its report anew (`fresh=true` starts over).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command
from pretrain.run import LOCK_FILE, exclusive

from .demo_report import collect_results, results_table, write_report

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("runs/demo")
STAGES = "stages.json"
TAIL = 15  # lines of a failed stage's log to show


class DemoConfig(StrictConfig):
    """The demo."""

    data: Path | None = Field(None, description="your LeRobot dataset (v2.0, v2.1 or v3.0); null: record Meta-World")
    folder: Path | None = Field(None, description="where everything goes; null: runs/demo, or runs/demo-<name of data>")
    num_ranks: int = Field(2, ge=1, description="training processes")
    quick: bool = Field(
        False, description="a few episodes and steps of everything, to see that it runs; nothing learns"
    )
    fresh: bool = Field(False, description="throw away what an earlier demo left in the folder")


# What `quick` adds to the commands.
QUICK_TRAINING = (
    " num_steps=4 checkpoint_every=2 validate_every=2 validation_batches=1 log_every=1 loader.global_batch_size=8"
)
QUICK = {
    "record": " episodes=1 action_free.noisy_episodes=1 action_free.random_episodes=1 action_free.num_steps=24",
    "pretrain": QUICK_TRAINING,
    "imagine": " max_clips=8 num_draws=1",
    "rollout": " num_clips=2 num_draws=1",
    "finetune": QUICK_TRAINING,
    "behaviour_cloning": " steps=4 batch_size=8",
    "evaluate": " closed_loop.episodes=1 closed_loop.max_steps=24 open_loop.max_clips=8",
}


@dataclass(frozen=True)
class Stage:
    """One command of the chain."""

    name: str
    title: str
    command: str


@dataclass
class FinishedStage:
    """What `stages.json` keeps of a stage that ended well."""

    command: str
    seconds: float
    peak_memory_gb: float


def main(config: DemoConfig) -> int:
    folder = config.folder or demo_folder(config.data)
    if config.data is not None and not config.data.is_dir():
        raise UserError(f"DATA={config.data}: there is no such folder; give the folder of a LeRobot dataset.")
    with exclusive(folder):
        if config.fresh:
            empty(folder)
        return go_through(config, folder)


def go_through(config: DemoConfig, folder: Path) -> int:
    """All stages that are not done yet, then the report."""
    (folder / "logs").mkdir(exist_ok=True)
    stages = own_data_stages(config, folder) if config.data else simulator_stages(config, folder)
    if config.quick:
        stages = [replace(stage, command=stage.command + QUICK.get(stage.name, "")) for stage in stages]
    finished = read_finished(folder)
    write_finished(folder, finished)  # from its first second on, a demo's folder can be told from any other
    for number, stage in enumerate(stages, start=1):
        sys.stdout.write(f"[{number}/{len(stages)}] {stage.title}\n      {stage.command}\n")
        if stage.name in finished and finished[stage.name].command == stage.command:
            sys.stdout.write(f"      done before, in {finished[stage.name].seconds:.0f} s\n")
            continue
        for later in stages[number - 1 :]:  # whatever was built on an older version of this stage is out of date
            finished.pop(later.name, None)
        record = run_stage(stage, folder / "logs" / f"{stage.name}.log")
        if record is None:
            return 1
        finished[stage.name] = record
        write_finished(folder, finished)
        sys.stdout.write(f"      {record.seconds:.0f} s, at most {record.peak_memory_gb:.1f} GB\n")
    try:
        results = collect_results(folder, {name: asdict(stage) for name, stage in finished.items()})
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        write_report(folder, results, [(stage.title, stage.command) for stage in stages])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is gone, though its stage is done; start over with fresh=true.") from None
    sys.stdout.write(f"\n{results_table(results)}\n\n{folder / 'results.json'}\n{folder / 'report.html'}\n")
    return 0


# --- the chain ----------------------------------------------------------------------------------------------------


def demo_folder(data: Path | None) -> Path:
    if data is None:
        return DEFAULT_FOLDER
    return DEFAULT_FOLDER.with_name("demo-" + re.sub(r"[^A-Za-z0-9_-]+", "-", data.resolve().name))


def simulator_stages(config: DemoConfig, folder: Path) -> list[Stage]:
    at = shlex.quote(str(folder))
    recordings, dataset = f"{at}/recordings", f"{at}/dataset"
    return [
        Stage(
            "record",
            "record scripted experts in MuJoCo, and action-free videos",
            f"python -m finetune.record --config configs/finetune/record_demo.yaml output={recordings}",
        ),
        Stage(
            "build",
            "build the dataset on Ray: clips, latents, shards",
            "python -m data_pipeline.build --config configs/data_pipeline/demo.yaml "
            f"sources.demonstrations.path={recordings}/demonstrations sources.videos.path={recordings}/videos "
            f"out={dataset}",
        ),
        *training_stages(config, folder, "demo.yaml"),
        Stage(
            "behaviour_cloning",
            "train the behaviour-cloning baseline",
            "python -m finetune.baselines --config configs/finetune/behaviour_cloning_demo.yaml "
            f"dataset={dataset} output={at}/behaviour_cloning",
        ),
        Stage(
            "evaluate",
            "let every policy act in MuJoCo on goals never trained on",
            "python -m finetune.evaluate --config configs/finetune/evaluate_demo.yaml "
            f"checkpoint={at}/finetune/export behaviour_cloning={at}/behaviour_cloning "
            f"output={at}/evaluation",
        ),
    ]


def own_data_stages(config: DemoConfig, folder: Path) -> list[Stage]:
    at = shlex.quote(str(folder))
    return [
        Stage(
            "build",
            "build the dataset on Ray: clips, latents, shards",
            "python -m data_pipeline.build --config configs/data_pipeline/own_data.yaml "
            f"sources.data.path={shlex.quote(str(config.data))} out={at}/dataset",
        ),
        *training_stages(config, folder, "own_data.yaml"),
        Stage(
            "evaluate",
            "compare predicted with recorded actions on held-out episodes",
            "python -m finetune.evaluate --config configs/finetune/evaluate_own_data.yaml "
            f"checkpoint={at}/finetune/export open_loop.dataset={at}/dataset output={at}/evaluation",
        ),
    ]


def training_stages(config: DemoConfig, folder: Path, config_name: str) -> list[Stage]:
    """Pretraining, the look at what it imagines, and fine-tuning; the same for every dataset."""
    torchrun = f"torchrun --standalone --nproc-per-node {config.num_ranks} -m"
    at = shlex.quote(str(folder))
    dataset, export = f"{at}/dataset", f"{at}/pretrain/export"
    return [
        Stage(
            "pretrain",
            "pretrain the video world model with DeepSpeed",
            f"{torchrun} pretrain.train --config configs/pretrain/{config_name} "
            f"run_dir={at}/pretrain loader.dataset={dataset}",
        ),
        Stage(
            "imagine",
            "measure imagined video on held-out clips",
            f"python -m pretrain.evaluate checkpoint={export} dataset={dataset} output={at}/video.json",
        ),
        Stage(
            "rollout",
            "draw imagined beside real video",
            f"python -m pretrain.rollout checkpoint={export} dataset={dataset} output={at}/rollouts",
        ),
        Stage(
            "finetune",
            "fine-tune it into a joint video-action policy",
            f"{torchrun} finetune.train --config configs/finetune/{config_name} "
            f"run_dir={at}/finetune loader.dataset={dataset} pretrained={export}",
        ),
    ]


def empty(folder: Path) -> None:
    """For a fresh start; never a folder that holds something else."""
    contents = [path for path in folder.iterdir() if path.name != LOCK_FILE]
    if contents and not (folder / STAGES).is_file():
        raise UserError(
            f"{folder}: has no {STAGES}, so it is not a demo's and fresh=true will not empty it; do so yourself, or "
            "choose another folder."
        )
    for path in contents:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- running it ---------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, log_path: Path) -> FinishedStage | None:
    """Run a stage with its output in `log_path`; None, with the log's end shown, where it failed."""
    # The commands are shown as a user types them; here they must come from this very environment.
    words = shlex.split(stage.command)
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    # One thread per process: two single-threaded ranks are faster than one process with two threads, and more threads
    # than cores are many times slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*launcher[words[0]], *words[1:]], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            with sampling_memory(process.pid) as peak:
                show_progress(process, log_path, started)
        except BaseException:
            end(process)
            raise
    seconds = time.monotonic() - started
    if process.returncode != 0:
        lines = log_path.read_text(errors="replace").splitlines()
        told = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))  # each rank says it
        sys.stdout.write("\n".join(f"      | {line}" for line in told or lines[-TAIL:]) + "\n")
        sys.stdout.write(
            f"stage {stage.name} failed with exit code {process.returncode}; the whole log: {log_path}\n"
            "The same command goes on from here; with fresh=true it starts over.\n"
        )
        return None
    return FinishedStage(stage.command, round(seconds, 1), round(peak[0] / 1e9, 2))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C reaches a stage by itself, and it cleans up; a signal to the demo alone does not."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def show_progress(process: subprocess.Popen[bytes], log_path: Path, started: float) -> None:
    """Wait for the process; on a terminal its newest log line stands in place, with the time so far."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    while True:
        try:
            process.wait(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            if is_terminal:
                lines = re.split(r"[\r\n]+", log_path.read_text(errors="replace")[-500:].strip())
                newest = f"      {time.monotonic() - started:4.0f} s  {lines[-1] if lines else ''}"
                sys.stdout.write("\r" + newest[:width].ljust(width))
                sys.stdout.flush()
    if is_terminal:
        sys.stdout.write("\r" + " " * width + "\r")


@contextmanager
def sampling_memory(pid: int) -> Iterator[list[float]]:
    """Largest memory of a process with all its children in bytes, seen once a second; shared pages count once."""
    peak, finished = [0.0], threading.Event()

    def sample() -> None:
        while not finished.wait(1.0):
            total = 0
            try:
                parent = psutil.Process(pid)
                processes = [parent, *parent.children(recursive=True)]
            except psutil.Error:
                continue
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        finished.set()
        thread.join()


def read_finished(folder: Path) -> dict[str, FinishedStage]:
    path = folder / STAGES
    if not path.exists():
        return {}
    try:
        return {name: FinishedStage(**record) for name, record in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, or start over with fresh=true.") from None


def write_finished(folder: Path, finished: dict[str, FinishedStage]) -> None:
    text = json.dumps({name: asdict(record) for name, record in finished.items()}, indent=2) + "\n"
    partial = folder / ".stages.json"
    partial.write_text(text)
    partial.replace(folder / STAGES)


if __name__ == "__main__":
    run_command(main, DemoConfig, description=__doc__)
