"""What a policy sees (`Observation`) and what a simulator offers (`Simulator`).

Rendering costs far more than physics (10 ms against 0.5 ms a step on one core), so a simulator renders
only when asked: a policy that is executing the rest of its action chunk needs no new image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from configs.loader import UserError

# Below this, in 0..255, a whole frame counts as black: the lights of no scene of ours are that dim.
BLACK_LEVEL = 8

HINT = "the GL context was lost, try another renderer with MUJOCO_GL=egl or MUJOCO_GL=osmesa"


class SimulatorError(UserError):
    """The simulator produced what must never reach a dataset or a result; the machine's GL libraries are to blame."""


@dataclass(frozen=True)
class Observation:
    """What the robot senses now."""

    views: Mapping[str, np.ndarray]  # view name -> uint8 [h w 3]; empty when no image was asked for
    proprio: np.ndarray  # float32 [s]
    instruction: str


class Simulator(Protocol):
    """One task with one robot, and a scripted expert for it."""

    embodiment: str
    instruction: str
    view_names: tuple[str, ...]
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    control_hz: float
    num_goals: int

    def reset(self, episode_seed: int, render: bool = True) -> Observation:
        """Start an episode. The same seed gives the same episode, whatever ran before."""

    def step(self, action: np.ndarray, render: bool = True) -> tuple[Observation, bool]:
        """Execute one action; also says whether the task is solved at this moment."""

    def expert_action(self) -> np.ndarray:
        """What the scripted expert, which sees the whole simulator state, would do now: float32 [a]."""

    def goal(self) -> np.ndarray:
        """What the episode's seed drew: object and goal position. For logs and leak checks, never for a policy."""

    def close(self) -> None: ...


def check_frames(frames: np.ndarray, where: str) -> None:
    """Refuse an episode whose frames [f h w 3] are black or stand still: signs of a lost GL context.

    A lost context raises no error: it renders pure black, thousands of frames a second.
    """
    black = np.flatnonzero(frames.max(axis=(1, 2, 3)) < BLACK_LEVEL)
    if len(black):
        raise SimulatorError(
            f"{where}: {len(black)} of {len(frames)} frames are black, from frame {black[0]} on: {HINT}"
        )
    changes = (frames[1:] != frames[:-1]).any(axis=(1, 2, 3))
    if len(changes) and changes.mean() < 0.5:
        raise SimulatorError(f"{where}: only {changes.sum()} of {len(changes)} frames differ from the last: {HINT}")
