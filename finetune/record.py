"""Record a simulator's scripted experts: a LeRobot v3 dataset, and action-free videos of the same robot.

    python -m finetune.record --config configs/finetune/record_demo.yaml

Writes `<output>/demonstrations` (successful episodes with actions and proprio) and, if `action_free` is set,
`<output>/videos` (plain mp4 files with a caption beside those that show the task being done). The folder appears
complete or not at all, and holds the same data for the same config on any number of workers.
"""

import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from configs.loader import StrictConfig, UserError, run_command
from data_pipeline.video_io import encode_video

from .held_actions import random_actions, random_pushes
from .lerobot_writer import (
    EpisodeRecord,
    Features,
    VectorFeature,
    VideoFeature,
    count_pixels,
    write_tables,
    write_video_file,
)
from .simulators import SIMULATORS, Simulator, check_frames
from .workers import run_jobs

log = logging.getLogger(__name__)

Kind = Literal["expert", "noisy", "random"]


class DisturbanceConfig(StrictConfig):
    std: float = Field(0.3, ge=0, description="standard deviation of a push on each of x, y, z, in -1..1")
    share: float = Field(0.7, ge=0, le=1, description="share of the episodes that are disturbed")
    hold_steps: tuple[PositiveInt, PositiveInt] = Field(
        (5, 15), description="a push lasts this many control steps, least and most"
    )

    @field_validator("hold_steps")
    @classmethod
    def _least_then_most(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps[0] > steps[1]:
            raise ValueError("should be [least, most]")
        return steps


class ActionFreeConfig(StrictConfig):
    noisy_episodes: int = Field(12, ge=0, description="per task: the expert, disturbed all the time")
    noise_std: float = Field(0.6, ge=0, description="how strongly the noisy expert is disturbed")
    random_episodes: int = Field(12, ge=0, description="per task: random actions, each held for a while")
    num_steps: int = Field(96, ge=1, description="length of a random rollout, longest length of a noisy one")


class RecordConfig(StrictConfig):
    simulator: str = Field("metaworld", description="which simulator: " + ", ".join(SIMULATORS))
    tasks: tuple[str, ...] = Field(min_length=1, description="task names of the simulator")
    output: Path = Field(description="folder to create; must not exist")
    episodes: int = Field(25, ge=1, description="successful demonstrations to keep per task")
    max_steps: int = Field(250, ge=1, description="an episode that has not succeeded by then is rejected")
    frames_after_success: int = Field(5, ge=0, description="how long an episode goes on once the task is solved")
    goal_seed: int = Field(1, ge=0, lt=2**32, description="draws goals and object positions; evaluate on another")
    seed: int = Field(0, ge=0, description="draws the disturbances")
    image_size: int = Field(128, ge=16, multiple_of=2, description="height and width of a frame")
    disturbance: DisturbanceConfig = DisturbanceConfig()
    action_free: ActionFreeConfig | None = Field(None, description="also record videos without actions")
    episodes_per_file: int = Field(50, ge=1, description="demonstrations in one video file")
    num_workers: int = Field(2, ge=1, description="processes; each records one task at a time")


@dataclass(frozen=True)
class Rollout:
    """One recorded episode. Row i: what was seen, and the action taken from there to row i + 1."""

    frames: np.ndarray  # uint8 [f h w 3]
    proprio: np.ndarray  # float32 [f s]
    actions: np.ndarray  # float32 [f a], the label: see `roll_out`
    executed_actions: np.ndarray  # float32 [f a]
    next_success: np.ndarray  # bool [f], solved after this row's action?

    @property
    def is_success(self) -> bool:
        return bool(self.next_success.any())


def roll_out(
    simulator: Simulator,
    episode_seed: int,
    kind: Kind,
    noise: Iterator[np.ndarray],
    max_steps: int,
    frames_after_success: int,
) -> Rollout:
    """One episode; `noise` is added to the expert's action, or is the action where `kind` is random.

    What gets labelled is the expert's clean action, not the disturbed one that was executed. The disturbance only
    decides which states are visited: it pushes the arm off the expert's path, and the label there says how the expert
    comes back. Labelled with the disturbed action, a policy would learn to imitate the pushes. The executed action is
    kept as well, since it is the one that explains the motion in the next frame.
    """
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]] = []
    observation = simulator.reset(episode_seed)
    num_steps = max_steps
    for step in itertools.count():
        expert = simulator.expert_action()
        drawn = next(noise)
        executed = np.clip(drawn if kind == "random" else expert + drawn, -1, 1).astype(np.float32)
        label = expert if kind == "expert" else executed
        (image,) = observation.views.values()
        proprio = observation.proprio
        observation, success = simulator.step(executed)
        rows.append((image, proprio, label, executed, success))
        if success and kind != "random":
            num_steps = min(num_steps, step + 1 + frames_after_success)
        if step + 1 == num_steps:
            break
    frames, proprios, labels, executed_actions, successes = (np.stack(column) for column in zip(*rows, strict=True))
    check_frames(frames, f"{simulator.instruction!r}, episode seed {episode_seed}")
    return Rollout(frames, proprios, labels, executed_actions, successes)


def expert_rollouts(config: RecordConfig, simulator: Simulator, task: str) -> Iterator[tuple[int, bool, Rollout]]:
    """(episode seed, was it disturbed, episode) without end, successful or not; each is a function of its seed."""
    for episode_seed in itertools.count():
        rng = _generator(config, task, "expert", episode_seed)
        is_disturbed = bool(rng.random() < config.disturbance.share)
        std = config.disturbance.std if is_disturbed else 0.0
        pushes = random_pushes(rng, len(simulator.action_names), std, config.disturbance.hold_steps)
        rollout = roll_out(simulator, episode_seed, "expert", pushes, config.max_steps, config.frames_after_success)
        yield episode_seed, is_disturbed, rollout


def action_free_rollouts(
    config: RecordConfig, options: ActionFreeConfig, simulator: Simulator, task: str
) -> Iterator[tuple[Kind, int, Rollout]]:
    """(kind, episode seed, episode): first the noisy ones, then the random ones."""
    action_dim, steps = len(simulator.action_names), config.disturbance.hold_steps
    episodes: list[tuple[Kind, int]] = [("noisy", i) for i in range(options.noisy_episodes)]
    episodes += [("random", i) for i in range(options.random_episodes)]
    for kind, episode_seed in episodes:
        rng = _generator(config, task, kind, episode_seed)
        if kind == "noisy":
            noise = random_pushes(rng, action_dim, options.noise_std, steps)
        else:
            noise = random_actions(rng, action_dim, steps)
        rollout = roll_out(simulator, episode_seed, kind, noise, options.num_steps, config.frames_after_success)
        yield kind, episode_seed, rollout


def _generator(config: RecordConfig, task: str, kind: Kind, episode_seed: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32(f"{task}/{kind}".encode()), episode_seed])


# --- one process each ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobResult:
    episodes: list[EpisodeRecord]
    log_rows: list[dict[str, object]]


def record_demonstrations(config: RecordConfig, task: str, folder: Path) -> JobResult:
    """Keep successful episodes until there are enough of them; videos go to `folder`, the rest is returned."""
    simulator = SIMULATORS[config.simulator](task, config.goal_seed, config.image_size)
    first_file = config.tasks.index(task) * -(-config.episodes // config.episodes_per_file)
    max_attempts = 2 * config.episodes + 10
    records: list[EpisodeRecord] = []
    waiting: list[Rollout] = []  # kept, not yet written
    log_rows: list[dict[str, object]] = []
    for episode_seed, is_disturbed, rollout in itertools.islice(expert_rollouts(config, simulator, task), max_attempts):
        row = {"task": task, "goal_seed": config.goal_seed, "episode_seed": episode_seed, "is_disturbed": is_disturbed}
        row |= {"num_frames": len(rollout.frames), "outcome": "kept" if rollout.is_success else "no_success"}
        log_rows.append(row)
        if not rollout.is_success:
            log.info("%s: episode seed %d rejected: no success in %d steps", task, episode_seed, config.max_steps)
            continue
        waiting.append(rollout)
        num_kept = len(records) + len(waiting)
        if len(waiting) == config.episodes_per_file or num_kept == config.episodes:
            file_index = first_file + len(records) // config.episodes_per_file
            records += _write_file(folder, file_index, waiting, simulator)
            waiting = []
        if num_kept % 10 == 0 or num_kept == config.episodes:
            log.info("%s: %d of %d episodes, %d attempts", task, num_kept, config.episodes, len(log_rows))
        if num_kept == config.episodes:
            break
    simulator.close()
    if len(records) < config.episodes:
        raise UserError(
            f"{task}: only {len(records) + len(waiting)} of {max_attempts} attempts succeeded, but episodes="
            f"{config.episodes}: raise max_steps or lower disturbance.std"
        )
    return JobResult(records, log_rows)


def _write_file(folder: Path, file_index: int, rollouts: list[Rollout], simulator: Simulator) -> list[EpisodeRecord]:
    view_key = f"observation.images.{simulator.view_names[0]}"
    write_video_file(
        folder, view_key, file_index, [rollout.frames for rollout in rollouts], round(simulator.control_hz)
    )
    first_frames = itertools.accumulate((len(rollout.frames) for rollout in rollouts), initial=0)
    return [
        EpisodeRecord(
            instruction=simulator.instruction,
            vectors={
                "observation.state": rollout.proprio,
                "action": rollout.actions,
                "executed_action": rollout.executed_actions,
            },
            next_success=rollout.next_success,
            file_index=file_index,
            first_frame=first_frame,
            pixel_counts={view_key: count_pixels(rollout.frames)},
        )
        for rollout, first_frame in zip(rollouts, first_frames, strict=False)
    ]


def record_action_free(config: RecordConfig, task: str, folder: Path) -> JobResult:
    assert config.action_free is not None
    simulator = SIMULATORS[config.simulator](task, config.goal_seed, config.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    log_rows: list[dict[str, object]] = []
    for kind, episode_seed, rollout in action_free_rollouts(config, config.action_free, simulator, task):
        path = folder / f"{task}_{kind}_{episode_seed:03d}.mp4"
        encode_video(rollout.frames, path, round(simulator.control_hz), crf=18, gop=8)
        # Only what shows the task done gets its instruction: a caption that the pixels contradict is worse than none.
        if kind == "noisy" and rollout.is_success:
            path.with_suffix(".txt").write_text(simulator.instruction + "\n")
        row = {"task": task, "goal_seed": config.goal_seed, "episode_seed": episode_seed, "file": path.name}
        log_rows.append(row | {"num_frames": len(rollout.frames), "is_success": rollout.is_success})
    simulator.close()
    log.info("%s: %d action-free videos", task, len(log_rows))
    return JobResult([], log_rows)


# --- the command -----------------------------------------------------------------------------------------------------


def main(config: RecordConfig) -> None:
    started = time.monotonic()
    _check(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{config.output.name}-", dir=config.output.parent))
    try:
        num_episodes, num_frames, num_videos = _record_all(config, folder)
        folder.chmod(0o755)  # mkdtemp makes it private
        folder.rename(config.output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sys.stdout.write(
        f"{config.output}: {num_episodes} demonstrations ({num_frames} frames), {num_videos} action-free videos, "
        f"{time.monotonic() - started:.0f} s\n"
    )


def _check(config: RecordConfig) -> None:
    if config.simulator not in SIMULATORS:
        raise UserError(f"simulator {config.simulator!r} is unknown: choose one of {', '.join(SIMULATORS)}")
    simulator = SIMULATORS[config.simulator]
    for task in config.tasks:
        simulator.check_task(task)
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"tasks names a task twice: {', '.join(config.tasks)}")
    if config.max_steps > simulator.MAX_STEPS:
        raise UserError(f"max_steps={config.max_steps}: {config.simulator} allows at most {simulator.MAX_STEPS}")
    if config.output.exists():
        raise UserError(f"{config.output} exists already: remove it, or record elsewhere with output=FOLDER")


def _record_all(config: RecordConfig, folder: Path) -> tuple[int, int, int]:
    jobs: list[tuple[Callable[[RecordConfig, str, Path], JobResult], str, Path]]
    jobs = [(record_demonstrations, task, folder / "demonstrations") for task in config.tasks]
    if config.action_free:
        jobs += [(record_action_free, task, folder / "videos") for task in config.tasks]
    results = run_jobs([(function, (config, task, where)) for function, task, where in jobs], config.num_workers)
    demonstrations = results[: len(config.tasks)]
    episodes = [episode for result in demonstrations for episode in result.episodes]
    simulator = SIMULATORS[config.simulator]
    features: Features = {
        f"observation.images.{simulator.view_names[0]}": VideoFeature(config.image_size, config.image_size),
        "observation.state": VectorFeature(simulator.proprio_names),
        "action": VectorFeature(simulator.action_names),
        "executed_action": VectorFeature(simulator.action_names),
    }
    write_tables(folder / "demonstrations", episodes, features, round(simulator.control_hz), simulator.embodiment)
    rows = [row for result in results for row in result.log_rows]
    (folder / "recording.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_videos = sum(len(result.log_rows) for result in results[len(config.tasks) :])
    return len(episodes), sum(episode.num_frames for episode in episodes), num_videos


if __name__ == "__main__":
    run_command(main, RecordConfig, description=__doc__ or "")
