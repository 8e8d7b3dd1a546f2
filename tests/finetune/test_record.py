"""Recording: a dataset that our own reader gives back as it was seen and done, complete or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import UserError, load_config
from data_pipeline.sources import LeRobotConfig
from data_pipeline.sources.lerobot import LeRobotSource
from data_pipeline.video_io import decode_frames, probe_video
from finetune.record import RecordConfig, Rollout, action_free_rollouts, expert_rollouts, main
from finetune.simulators import SIMULATORS

TASK = "button-press-topdown-v3"
REPOSITORY = Path(__file__).resolve().parents[2]


def config(output: Path, **changes: Any) -> RecordConfig:
    settings: dict[str, Any] = {
        "tasks": [TASK],
        "output": output,
        "episodes": 3,
        "episodes_per_file": 2,
        "image_size": 64,
        "num_workers": 1,
        "action_free": {"noisy_episodes": 1, "noise_std": 0.1, "random_episodes": 1, "num_steps": 80},
    }
    return RecordConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> RecordConfig:
    settings = config(tmp_path_factory.mktemp("record") / "out")
    main(settings)
    return settings


@pytest.fixture(scope="module")
def rollouts(recording: RecordConfig) -> list[Rollout]:
    """The same episodes, recorded again in this process: the demonstrations, then a noisy and a random one."""
    simulator = SIMULATORS["metaworld"](TASK, recording.goal_seed, recording.image_size)
    assert recording.action_free is not None
    try:
        generator = expert_rollouts(recording, simulator, TASK)
        demonstrations = [next(generator)[2] for _ in range(3)]
        others = [rollout for _, _, rollout in action_free_rollouts(recording, recording.action_free, simulator, TASK)]
    finally:
        simulator.close()
    return demonstrations + others


def test_the_reader_gives_back_what_was_recorded(recording: RecordConfig, rollouts: list[Rollout]):
    source = LeRobotSource(LeRobotConfig(path=recording.output / "demonstrations"))
    episodes = [source.read_episode(episode_id) for episode_id in source.list_episodes()]
    assert len(episodes) == 3
    robot = source.embodiment()
    assert robot is not None
    assert robot.action_names == ("dx", "dy", "dz", "gripper")
    assert (robot.control_hz, robot.name) == (80.0, "metaworld_sawyer")
    paths = set()
    for episode, rollout in zip(episodes, rollouts, strict=False):
        assert episode.repairs == ()  # it is to the letter of the format
        assert (episode.instruction, episode.success, episode.fps) == ("press the button from above", True, 80.0)
        np.testing.assert_array_equal(episode.actions, rollout.actions)
        np.testing.assert_array_equal(episode.proprio, rollout.proprio)
        (segment,) = episode.views.values()
        paths.add(segment.path)
        assert segment.start_frame is not None
        assert segment.num_frames == len(rollout.frames)
        decoded = decode_frames(segment.path, range(segment.start_frame, segment.start_frame + segment.num_frames))
        own = np.abs(decoded.astype(int) - rollout.frames).mean(axis=(1, 2, 3))
        next_one = np.abs(decoded[:-1].astype(int) - rollout.frames[1:]).mean(axis=(1, 2, 3))
        assert own.max() < 5  # of 255: half of it is that colours are stored at half the resolution
        assert (own[:-1] < next_one).mean() > 0.9  # frame i is frame i, not its neighbour
    assert len(paths) == 2  # two episodes in the first file


def test_labels_are_the_clean_expert_s_and_executed_actions_are_kept_beside(rollouts: list[Rollout]):
    disturbed = [r for r in rollouts[:3] if not np.array_equal(r.actions, r.executed_actions)]
    assert disturbed  # some of the demonstrations
    push = disturbed[0].executed_actions - disturbed[0].actions
    assert np.abs(push[:, :3]).max() > 0.1
    np.testing.assert_array_equal(push[:, 3], 0)  # never the gripper
    for rollout in rollouts[:3]:
        assert rollout.is_success
        steps_after = len(rollout.frames) - 1 - int(rollout.next_success.argmax())
        assert steps_after == 5  # frames_after_success


def test_action_free_videos_have_captions_where_the_task_is_done(recording: RecordConfig, rollouts: list[Rollout]):
    folder = recording.output / "videos"
    for kind, rollout in zip(("noisy", "random"), rollouts[3:], strict=True):
        path = folder / f"{TASK}_{kind}_000.mp4"
        assert probe_video(path).num_frames == len(rollout.frames)
        caption = path.with_suffix(".txt")
        assert caption.exists() == (kind == "noisy" and rollout.is_success)
    assert rollouts[3].is_success
    assert (folder / f"{TASK}_noisy_000.txt").read_text() == "press the button from above\n"


def test_every_attempt_is_logged_with_its_seed(recording: RecordConfig):
    rows = [json.loads(line) for line in (recording.output / "recording.jsonl").read_text().splitlines()]
    demonstrations = [row for row in rows if "outcome" in row]
    assert [row["episode_seed"] for row in demonstrations] == list(range(len(demonstrations)))
    assert sum(row["outcome"] == "kept" for row in demonstrations) == 3
    assert {row["goal_seed"] for row in rows} == {recording.goal_seed}


def test_nothing_is_left_behind_but_the_recording(recording: RecordConfig):
    assert [path.name for path in recording.output.parent.iterdir()] == ["out"]


def test_an_existing_output_is_not_touched(recording: RecordConfig):
    before = sorted(path.stat().st_mtime_ns for path in recording.output.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        main(recording)
    assert sorted(path.stat().st_mtime_ns for path in recording.output.rglob("*")) == before


def test_an_expert_that_never_succeeds_ends_in_a_sentence_and_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"only 0 of 12 attempts succeeded.*raise max_steps"):
        main(config(tmp_path / "out", episodes=1, max_steps=3, action_free=None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["drawer-opn-v3"]}, "drawer-open-v3"),
        ({"tasks": [TASK, TASK]}, "twice"),
        ({"simulator": "metawold"}, "metaworld"),
        ({"max_steps": 501}, "at most 500"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        main(config(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("disturbance.hold_steps=[9, 2]", r"should be \[least, most\]"),
        ("disturbance.hold_steps=[0, 0]", "greater than 0"),  # would hold no action at all, for ever
        ("goal_seed=-1", "greater than or equal to 0"),
        ("goal_seed=4294967296", "less than 4294967296"),
        ("image_size=33", "multiple of 2"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(tmp_path: Path, setting: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config(RecordConfig, None, [f"tasks=[{TASK}]", f"output={tmp_path}/out", setting])


def test_the_demo_config_is_valid():
    demo = load_config(RecordConfig, REPOSITORY / "configs/finetune/record_demo.yaml")
    assert len(demo.tasks) == 3
