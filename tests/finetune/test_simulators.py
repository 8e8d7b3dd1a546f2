"""Meta-World as this project uses it: repeatable, upright and lit, honest about goals, clear when it cannot start."""

import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder

import numpy as np
import pytest

from configs.loader import UserError
from finetune.simulators import SIMULATORS, SimulatorError, check_frames
from finetune.simulators.metaworld import INSTRUCTIONS, MetaWorldSimulator

TASK = "button-press-topdown-v3"


@pytest.fixture
def simulator() -> Iterator[MetaWorldSimulator]:
    simulator = MetaWorldSimulator(TASK, goal_seed=1, image_size=64)
    yield simulator
    simulator.close()


def expert_episode(simulator: MetaWorldSimulator, episode_seed: int, max_steps: int, render: bool):
    """(frames, proprio, solved at any step)."""
    observation = simulator.reset(episode_seed, render)
    observations, solved = [observation], False
    for _ in range(max_steps):
        observation, success = simulator.step(simulator.expert_action(), render)
        observations.append(observation)
        solved |= success
    return [o.views.get("corner2") for o in observations], np.stack([o.proprio for o in observations]), solved


def test_a_seed_gives_the_same_episode_whatever_ran_before(simulator: MetaWorldSimulator):
    frames, proprio, _ = expert_episode(simulator, 3, 25, render=True)
    expert_episode(simulator, 4, 40, render=False)
    again, proprio_again, _ = expert_episode(simulator, 3, 25, render=True)
    np.testing.assert_array_equal(proprio, proprio_again)
    np.testing.assert_array_equal(np.stack(frames), np.stack(again))
    simulator.close()

    fresh = MetaWorldSimulator(TASK, goal_seed=1, image_size=64)
    try:
        frames_of_fresh, proprio_of_fresh, _ = expert_episode(fresh, 3, 25, render=True)
    finally:
        fresh.close()
    np.testing.assert_array_equal(proprio, proprio_of_fresh)
    np.testing.assert_array_equal(np.stack(frames), np.stack(frames_of_fresh))


def test_observations_are_what_is_promised(simulator: MetaWorldSimulator):
    observation = simulator.reset(0)
    assert set(observation.views) == set(simulator.view_names) == {"corner2"}
    image = observation.views["corner2"]
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    # Upright: the brown table top is seen in the middle and the grey wall in the top row, brighter than the arm's base.
    red, _, blue = image[32:44, 24:44].reshape(-1, 3).mean(axis=0)
    assert red > blue + 20
    assert np.ptp(image[0].astype(int), axis=-1).max() < 15
    assert observation.proprio.dtype == np.float32
    assert len(observation.proprio) == len(simulator.proprio_names)
    assert observation.instruction == "press the button from above"
    blind, _ = simulator.step(np.zeros(4), render=False)
    assert blind.views == {}


def test_the_expert_solves_the_task_and_frames_change(simulator: MetaWorldSimulator):
    frames, proprio, solved = expert_episode(simulator, 0, 90, render=True)
    assert solved
    check_frames(np.stack(frames), "the expert's episode")
    assert np.ptp(proprio[:, :3], axis=0).max() > 0.05  # metres


def test_goals_differ_by_episode_and_by_goal_seed(simulator: MetaWorldSimulator):
    seen = []
    for episode_seed in (0, 1, simulator.num_goals):
        simulator.reset(episode_seed, render=False)
        seen.append(simulator.goal())
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])  # goals come round
    training, evaluation = MetaWorldSimulator.draw_goals(TASK, 1), MetaWorldSimulator.draw_goals(TASK, 1000)
    np.testing.assert_array_equal(training[0], seen[0])
    assert len(np.unique(np.concatenate([training, evaluation]), axis=0)) == 2 * simulator.num_goals


def test_two_at_once_are_refused(simulator: MetaWorldSimulator):
    with pytest.raises(RuntimeError, match="close"):
        MetaWorldSimulator(TASK, goal_seed=1)


def test_actions_out_of_range_are_clipped(simulator: MetaWorldSimulator):
    simulator.reset(0, render=False)
    far, _ = simulator.step(np.array([9.0, 0, 0, 0]), render=False)
    simulator.reset(0, render=False)
    near, _ = simulator.step(np.array([1.0, 0, 0, 0]), render=False)
    np.testing.assert_array_equal(far.proprio, near.proprio)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="drawer-open-v3"):
        SIMULATORS["metaworld"]("open-drawer-v3", goal_seed=1)


def test_every_task_of_the_package_has_an_instruction():
    import metaworld

    assert set(INSTRUCTIONS) == set(metaworld.MT1.ENV_NAMES)


class _Breaks(MetaPathFinder):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "metaworld":
            raise self.error
        return None


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ModuleNotFoundError("No module named 'metaworld'"), r"pip install '\.\[sim\]'"),
        # what PyOpenGL raises where libOSMesa.so is absent
        (AttributeError("'NoneType' object has no attribute 'glGetError'"), "apt-get install .*libosmesa6"),
    ],
)
def test_what_is_missing_is_said_with_the_line_that_installs_it(monkeypatch, error: Exception, hint: str):
    for name in [name for name in sys.modules if name.split(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Breaks(error), *sys.meta_path])
    with pytest.raises(UserError, match=hint):
        MetaWorldSimulator(TASK, goal_seed=1)


def test_a_backend_that_cannot_render_here_is_named(simulator: MetaWorldSimulator, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("no valid OpenGL context")

    monkeypatch.setattr(simulator._env, "render", fail)
    with pytest.raises(SimulatorError, match=r"MUJOCO_GL=\w+ \(no valid OpenGL context\).*apt-get"):
        simulator.reset(0)
    simulator.reset(0, render=False)  # what needs no image goes on


def test_black_and_frozen_frames_are_refused():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    check_frames(frames, "here")
    black = frames.copy()
    black[4] = 0
    with pytest.raises(SimulatorError, match=r"here: 1 of 6 frames are black, from frame 4"):
        check_frames(black, "here")
    with pytest.raises(SimulatorError, match="only 0 of 5 frames differ"):
        check_frames(np.repeat(frames[:1], 6, axis=0), "here")
