"""Random actions that last: the disturbance of demonstrations, and the random baseline."""

from collections.abc import Callable, Iterator

import numpy as np


def hold(rng: np.random.Generator, steps: tuple[int, int], draw: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """Endless actions, each draw held for `steps[0]` to `steps[1]` steps.

    At 80 Hz a new draw every step would average out before the arm has moved.
    """
    while True:
        action = draw()
        for _ in range(rng.integers(steps[0], steps[1], endpoint=True)):
            yield action


def random_actions(rng: np.random.Generator, action_dim: int, steps: tuple[int, int] = (5, 15)) -> Iterator[np.ndarray]:
    """Uniform in -1..1, which moves the arm about all of its reach."""
    return hold(rng, steps, lambda: rng.uniform(-1, 1, action_dim))


def random_pushes(
    rng: np.random.Generator, action_dim: int, std: float, steps: tuple[int, int] = (5, 15)
) -> Iterator[np.ndarray]:
    """To add to an action: Gaussian on the first three slots (x, y, z) only.

    A gripper that lets go by chance would turn a demonstration into one of another task.
    """
    scale = np.array([std] * 3 + [0.0] * (action_dim - 3))
    return hold(rng, steps, lambda: rng.normal(0, 1, action_dim) * scale)
