"""The loop between a policy and a simulator, and the numbers that come out of it."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError, load_config
from finetune.closed_loop import ClosedLoopConfig, goal_distances, run_episode, wilson_interval
from finetune.evaluate import EvaluateConfig, main
from finetune.simulators import Observation

TASK = "button-press-topdown-v3"
REPOSITORY = Path(__file__).resolve().parents[2]


class CountingSimulator:
    """Solved once the actions add up to 10; counts what it was asked to render."""

    instruction, view_names, image_size = "count", ("front",), 8

    def reset(self, episode_seed: int, render: bool = True) -> Observation:
        self.total, self.num_renders, self.num_steps = float(episode_seed), 0, 0
        return self._observe(render)

    def step(self, action: np.ndarray, render: bool = True) -> tuple[Observation, bool]:
        self.total += float(action[0])
        self.num_steps += 1
        return self._observe(render), self.total >= 10

    def _observe(self, render: bool) -> Observation:
        self.num_renders += render
        views = {"front": np.full((8, 8, 3), 200, np.uint8)} if render else {}
        return Observation(views, np.array([self.total], np.float32), self.instruction)


class ChunkPolicy:
    """Adds one per step; looks every fourth step, and keeps what it saw."""

    def reset(self, instruction: str, seed: int = 0) -> None:
        self.instruction, self.seed, self.left, self.seen = instruction, seed, 0, []

    def needs_observation(self) -> bool:
        return self.left == 0

    def act(self, observation: Observation) -> np.ndarray:
        if self.left == 0:
            self.seen.append(observation.views["front"])
            self.left = 4
        self.left -= 1
        return np.array([1.0])


def run(policy: Any, episode_seed: int = 0, **options: Any) -> tuple[CountingSimulator, bool, int]:
    simulator = CountingSimulator()
    is_success, num_steps = run_episode(simulator, policy, episode_seed, 20, image_size=8, **options)
    return simulator, is_success, num_steps


def test_an_episode_ends_with_the_first_success_and_renders_only_what_is_looked_at():
    policy = ChunkPolicy()
    simulator, is_success, num_steps = run(policy, episode_seed=1)
    assert (is_success, num_steps, policy.instruction, policy.seed) == (True, 9, "count", 1)
    assert len(policy.seen) == simulator.num_renders == 3
    assert all(image.min() == 200 for image in policy.seen)


def test_an_episode_without_success_ends_at_the_limit():
    _, is_success, num_steps = run(ChunkPolicy(), episode_seed=-100)
    assert (is_success, num_steps) == (False, 20)


def test_a_blind_policy_is_shown_black_and_nothing_is_rendered():
    policy = ChunkPolicy()
    simulator, is_success, _ = run(policy, is_blind=True)
    assert is_success
    assert simulator.num_renders == 0
    assert len(policy.seen) == 3
    assert all(image.max() == 0 for image in policy.seen)


def test_a_film_has_every_fourth_frame():
    film: list[np.ndarray] = []
    run(ChunkPolicy(), film=film)
    assert len(film) == 3  # before steps 0, 4 and 8 of 10


def test_an_action_that_is_not_a_number_is_refused():
    policy = ChunkPolicy()
    policy.act = lambda observation: np.array([np.nan])  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite"):
        run(policy)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # these four: Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (60, 60, 0.9398, 1.0),
    ],
)
def test_wilson_intervals_are_the_known_ones(successes: int, episodes: int, low: float, high: float):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_hold_the_rate_and_are_symmetric(counts: tuple[int, int]):
    successes, episodes = counts
    low, high = wilson_interval(successes, episodes)
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= successes / episodes <= high + 1e-12
    assert wilson_interval(episodes - successes, episodes) == pytest.approx((1 - high, 1 - low), abs=1e-9)


# --- with the real simulator ----------------------------------------------------------------------------------------


def config(output: Path, **closed_loop: Any) -> EvaluateConfig:
    settings = {"tasks": [TASK], "episodes": 2, "max_steps": 90, "image_size": 32} | closed_loop
    return EvaluateConfig.model_validate(
        {"rows": ["random", "expert"], "output": output, "closed_loop": settings, "num_workers": 1}
    )


def test_the_command_counts_successes_of_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(config(tmp_path / "evaluation"))
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    expert, random = (results["success"][TASK][row] for row in ("expert", "random"))
    assert (expert["successes"], expert["episodes"], expert["rate"]) == (2, 2, 1.0)
    assert expert["interval"] == pytest.approx(wilson_interval(2, 2))
    assert random["successes"] == 0
    assert results["pooled"]["expert"] == expert
    assert {(o["row"], o["episode_seed"]) for o in results["episodes"]} == {
        (row, seed) for row in ("random", "expert") for seed in (0, 1)
    }
    assert results["median_distance_to_nearest_training_goal"][TASK] > 0
    assert results["config"]["closed_loop"]["goal_seed"] == 1000
    printed = capsys.readouterr().out
    assert "2/2" in printed
    assert "100%" in printed


def test_goals_that_demonstrations_had_are_refused(monkeypatch: pytest.MonkeyPatch):
    settings = ClosedLoopConfig(tasks=(TASK,))
    assert (goal_distances(settings)[TASK] > 0).all()
    with pytest.raises(UserError, match="share a goal"):
        goal_distances(settings.model_copy(update={"training_goal_seed": settings.goal_seed}))


@pytest.mark.parametrize(
    ("closed_loop", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["door-opn-v3"]}, "door-open-v3"),
        ({"tasks": [TASK, TASK]}, "twice"),
        ({"goal_seed": 1}, "demonstrations' own"),
        ({"episodes": 51}, "50 goals"),
        ({"max_steps": 501}, "at most 500"),
        ({"simulator": "mujoco"}, "metaworld"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path: Path, closed_loop: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        main(config(tmp_path, **closed_loop))


def test_rows_without_their_model_are_refused_at_once(tmp_path: Path):
    settings = config(tmp_path)
    for row, key in (("policy", "checkpoint"), ("blind", "checkpoint"), ("bc", "behaviour_cloning")):
        with pytest.raises(UserError, match=f"needs {key}=FOLDER"):
            main(settings.model_copy(update={"rows": (row,)}))
        with pytest.raises(UserError, match="no such folder"):
            main(settings.model_copy(update={"rows": (row,), key: tmp_path / "absent"}))


def test_the_demo_config_is_valid():
    load_config(EvaluateConfig, REPOSITORY / "configs/finetune/evaluate_demo.yaml")


def test_a_film_of_the_policy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process, with the expert in the policy's place."""
    from finetune import closed_loop

    monkeypatch.setattr(
        closed_loop, "make_policy", lambda row, simulator, *folders: closed_loop.ExpertPolicy(simulator)
    )
    settings = config(tmp_path).closed_loop
    outcomes = closed_loop.evaluate_episodes(settings, ("policy",), None, None, TASK, range(2), tmp_path)
    (film,) = tmp_path.glob("*.mp4")  # films_per_task is 1
    assert film.name == f"{TASK}_000_success.mp4"
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 20
        assert stream.frames == -(-outcomes[0].num_steps // closed_loop.FILM_EVERY)
