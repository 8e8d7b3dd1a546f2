"""Let policies act in a simulator, on goals that no demonstration had, and count how often the task is solved.

All rows of a table see the same episodes, and a policy that draws at random is seeded per episode: a result does not
depend on how episodes are spread over processes.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import gcd, sqrt
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field

from configs.loader import StrictConfig, UserError
from data_pipeline.video_io import encode_video

from .baselines import BehaviourCloning, RandomPolicy
from .simulators import SIMULATORS, Observation, Simulator
from .workers import run_jobs

log = logging.getLogger(__name__)

Row = Literal["policy", "random", "blind", "bc", "expert"]
FILM_EVERY = 4  # control steps per film frame: 80 Hz -> 20 frames per second, in real time


class ClosedLoopConfig(StrictConfig):
    simulator: str = Field("metaworld", description="which simulator: " + ", ".join(SIMULATORS))
    tasks: tuple[str, ...] = Field((), description="task names of the simulator")
    episodes: int = Field(20, ge=1, description="episodes per task and row")
    max_steps: int = Field(250, ge=1, description="an episode that has not succeeded by then has failed")
    goal_seed: int = Field(1000, ge=0, lt=2**32, description="draws goals and object positions")
    training_goal_seed: int = Field(
        1, ge=0, lt=2**32, description="the recording's goal_seed; the two must not share a goal"
    )
    image_size: int = Field(128, ge=16, multiple_of=2, description="as recorded")
    films_per_task: int = Field(1, ge=0, description="episodes of the policy to save as mp4")


class ActingPolicy(Protocol):
    """What may be evaluated. While `needs_observation` is false, `act` is given an observation without images."""

    def reset(self, instruction: str, seed: int = 0) -> None: ...
    def needs_observation(self) -> bool: ...
    def act(self, observation: Observation) -> np.ndarray: ...


@dataclass(frozen=True)
class Outcome:
    task: str
    row: Row
    episode_seed: int
    is_success: bool
    num_steps: int


class ExpertPolicy:
    """The simulator's scripted expert, which sees the true state: the ceiling."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def reset(self, instruction: str, seed: int = 0) -> None: ...

    def needs_observation(self) -> bool:
        return False

    def act(self, observation: Observation) -> np.ndarray:
        return self.simulator.expert_action()


def run_episode(
    simulator: Simulator,
    policy: ActingPolicy,
    episode_seed: int,
    max_steps: int,
    *,
    image_size: int,
    is_blind: bool = False,
    film: list[np.ndarray] | None = None,
) -> tuple[bool, int]:
    """(solved, after how many steps). Frames for a film are appended to `film`. A blind policy is shown black."""
    policy.reset(simulator.instruction, seed=episode_seed)
    black = {view: np.zeros((image_size, image_size, 3), np.uint8) for view in simulator.view_names}
    observation = simulator.reset(
        episode_seed, render=(policy.needs_observation() and not is_blind) or film is not None
    )
    for step in range(max_steps):
        if film is not None and step % FILM_EVERY == 0:
            film.append(next(iter(observation.views.values())))
        action = policy.act(replace(observation, views=black) if is_blind else observation)
        if not np.isfinite(action).all():
            raise UserError(f"the policy's action {action} at step {step} is not finite: was its training unstable?")
        is_filmed = film is not None and (step + 1) % FILM_EVERY == 0
        observation, success = simulator.step(action, (policy.needs_observation() and not is_blind) or is_filmed)
        if success:
            return True, step + 1
    return False, max_steps


def make_policy(
    row: Row, simulator: Simulator, checkpoint: Path | None, behaviour_cloning: Path | None
) -> ActingPolicy:
    if row == "random":
        return RandomPolicy(len(simulator.action_names))
    if row == "expert":
        return ExpertPolicy(simulator)
    if row == "bc":
        assert behaviour_cloning is not None
        return BehaviourCloning.load(behaviour_cloning)
    from .policy import Policy  # a model and its codec: only where such a row is asked for

    assert checkpoint is not None
    return Policy.load(checkpoint, blind=row == "blind")


# --- one process -----------------------------------------------------------------------------------------------------


def evaluate_episodes(
    config: ClosedLoopConfig,
    rows: tuple[Row, ...],
    checkpoint: Path | None,
    behaviour_cloning: Path | None,
    task: str,
    episode_seeds: range,
    films: Path,
) -> list[Outcome]:
    """All rows on some of a task's episodes."""
    torch.set_num_threads(1)  # a process per core
    simulator = SIMULATORS[config.simulator](task, config.goal_seed, config.image_size)
    outcomes: list[Outcome] = []
    for row in rows:
        policy = make_policy(row, simulator, checkpoint, behaviour_cloning)
        for episode_seed in episode_seeds:
            film: list[np.ndarray] | None = None
            if row == "policy" and episode_seed < config.films_per_task:
                film = []
            is_success, num_steps = run_episode(
                simulator,
                policy,
                episode_seed,
                config.max_steps,
                image_size=config.image_size,
                is_blind=row == "blind",
                film=film,
            )
            outcomes.append(Outcome(task, row, episode_seed, is_success, num_steps))
            if film is not None:
                path = films / f"{task}_{episode_seed:03d}_{'success' if is_success else 'failure'}.mp4"
                encode_video(np.stack(film), path, simulator.control_hz / FILM_EVERY)
        count = sum(outcome.is_success for outcome in outcomes if outcome.row == row)
        log.info("%s, %s: %d of %d episodes solved", task, row, count, len(episode_seeds))
    simulator.close()
    return outcomes


def goal_distances(config: ClosedLoopConfig) -> dict[str, np.ndarray]:
    """Per task, from each goal of the evaluation to the demonstrations' nearest. Refuses a goal that both have."""
    simulator = SIMULATORS[config.simulator]
    distances = {}
    for task in config.tasks:
        goals = simulator.draw_goals(task, config.goal_seed)
        training_goals = simulator.draw_goals(task, config.training_goal_seed)
        distances[task] = np.linalg.norm(goals[:, None] - training_goals[None], axis=-1).min(axis=1)
        if (distances[task] == 0).any():
            raise UserError(f"{task}: goal_seed and training_goal_seed share a goal, evaluate on another goal_seed")
    return distances


# --- all of it -------------------------------------------------------------------------------------------------------


def evaluate_closed_loop(
    config: ClosedLoopConfig,
    rows: tuple[Row, ...],
    checkpoint: Path | None,
    behaviour_cloning: Path | None,
    films: Path,
    num_workers: int,
) -> dict[str, Any]:
    _check(config)
    films.mkdir(parents=True, exist_ok=True)
    # Tasks are cut into pieces of episodes only as far as it takes to keep all workers busy: starting costs seconds.
    pieces = min(num_workers // gcd(num_workers, len(config.tasks)), config.episodes)
    starts = [config.episodes * piece // pieces for piece in range(pieces + 1)]
    arguments = (config, rows, checkpoint, behaviour_cloning)
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(goal_distances, (config,))]
    jobs += [
        (evaluate_episodes, (*arguments, task, range(starts[piece], starts[piece + 1]), films))
        for task in config.tasks
        for piece in range(pieces)
    ]
    distances, *parts = run_jobs(jobs, num_workers)
    outcomes = [outcome for part in parts for outcome in part]
    return {
        "success": {task: _rates(rows, [o for o in outcomes if o.task == task]) for task in config.tasks},
        "pooled": _rates(rows, outcomes),
        "median_distance_to_nearest_training_goal": {task: float(np.median(distances[task])) for task in config.tasks},
        "episodes": [asdict(outcome) for outcome in outcomes],
    }


def _check(config: ClosedLoopConfig) -> None:
    if config.simulator not in SIMULATORS:
        raise UserError(f"simulator {config.simulator!r} is unknown: choose one of {', '.join(SIMULATORS)}")
    simulator = SIMULATORS[config.simulator]
    if not config.tasks:
        raise UserError(f"closed_loop.tasks is empty: name tasks of {config.simulator}")
    for task in config.tasks:
        simulator.check_task(task)
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"closed_loop.tasks names a task twice: {', '.join(config.tasks)}")
    if config.max_steps > simulator.MAX_STEPS:
        raise UserError(f"max_steps={config.max_steps}: {config.simulator} allows at most {simulator.MAX_STEPS}")
    if config.goal_seed == config.training_goal_seed:
        raise UserError(f"goal_seed={config.goal_seed} is the demonstrations' own: evaluate on another")
    if config.episodes > simulator.num_goals:
        raise UserError(f"episodes={config.episodes}: a goal seed has {simulator.num_goals} goals, each counts once")


def _rates(rows: tuple[Row, ...], outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    return {row: success_rate([o.is_success for o in outcomes if o.row == row]) for row in rows}


def success_rate(successes: list[bool]) -> dict[str, Any]:
    count, episodes = sum(successes), len(successes)
    interval = wilson_interval(count, episodes)
    return {"successes": count, "episodes": episodes, "rate": count / episodes, "interval": list(interval)}


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927), which stays sensible for few episodes and at 0 and 100 %."""
    rate, shrink = successes / episodes, 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / shrink
    half = z * sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)
