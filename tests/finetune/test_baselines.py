"""Behaviour cloning learns what is there to learn, and comes back from disk as the policy that was trained."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.loader import UserError, load_config
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.normalize import StreamingStats
from data_pipeline.video_io import ViewConfig
from finetune.baselines import (
    BehaviourCloning,
    BehaviourCloningConfig,
    BehaviourCloningSpec,
    Frames,
    NetworkConfig,
    RandomPolicy,
    collect_frames,
    main,
    train,
    validation_error,
)
from finetune.simulators import Observation

REPOSITORY = Path(__file__).resolve().parents[2]
tiny = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/tiny_dataset.py")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("bc") / "dataset", clips=(3, 4, 2, 3))


def dots(rng: np.random.Generator, num_frames: int) -> Frames:
    """A bright dot; the action points at it, times the proprio's sign, and backwards under the second instruction."""
    centres = rng.integers(2, 30, (num_frames, 2))
    images = np.zeros((num_frames, 32, 32, 3), np.uint8)
    for image, (row, column) in zip(images, centres, strict=True):
        image[row - 2 : row + 3, column - 2 : column + 3] = 255
    sign = rng.choice([-1.0, 1.0], (num_frames, 1)).astype(np.float32)
    backwards = rng.random(num_frames) < 0.5
    target = ((centres - 16) / 16).astype(np.float32) * sign * np.where(backwards, -1, 1)[:, None].astype(np.float32)
    actions = np.stack([target, 2 * target], axis=1)  # n k a
    instructions = tuple("away" if is_backwards else "towards" for is_backwards in backwards)
    return Frames(torch.from_numpy(images), torch.from_numpy(sign), torch.from_numpy(actions), instructions)


def spec_of(frames: Frames) -> BehaviourCloningSpec:
    action_stats, proprio_stats = StreamingStats(2), StreamingStats(1)
    action_stats.add(frames.actions.flatten(0, 1).numpy())
    proprio_stats.add(frames.proprio.numpy())
    return BehaviourCloningSpec(
        network=NetworkConfig(channels=16, width=64),
        action_horizon=2,
        execute_steps=1,
        view="front",
        view_config=ViewConfig(height=32, width=32),
        instructions=("away", "towards"),
        action_stats=action_stats.result(),
        proprio_stats=proprio_stats.result(),
    )


@pytest.fixture(scope="module")
def trained() -> tuple[BehaviourCloning, Frames]:
    frames = dots(np.random.default_rng(0), 1500)
    config = BehaviourCloningConfig(
        dataset=Path("x"), output=Path("y"), steps=250, batch_size=64, lr=3e-3, num_threads=1
    )
    return train(config, spec_of(frames), frames), dots(np.random.default_rng(1), 200)


def test_it_learns_from_image_proprio_and_instruction(trained):
    policy, held_out = trained
    error = validation_error(policy, held_out)
    assert error < 0.35  # standardised; predicting the mean scores about 0.85
    no_images = Frames(torch.zeros_like(held_out.images), held_out.proprio, held_out.actions, held_out.instructions)
    assert validation_error(policy, no_images) > 2 * error
    swapped = tuple("away" if text == "towards" else "towards" for text in held_out.instructions)
    wrong_words = Frames(held_out.images, held_out.proprio, held_out.actions, swapped)
    assert validation_error(policy, wrong_words) > 2 * error


def test_saved_and_loaded_it_acts_the_same(trained, tmp_path: Path):
    policy, held_out = trained
    policy.save(tmp_path / "bc")
    loaded = BehaviourCloning.load(tmp_path / "bc")
    observation = Observation({"front": held_out.images[0].numpy()}, held_out.proprio[0].numpy(), "away")
    for each in (policy, loaded):
        each.reset("away")
    action = loaded.act(observation)
    np.testing.assert_array_equal(action, policy.act(observation))
    chunk = policy.predict(held_out.images[:1], held_out.proprio[:1], policy.instruction_indices(["away"]))
    np.testing.assert_allclose(action, chunk[0, 0], rtol=1e-6)


def test_it_looks_only_when_its_chunk_is_used_up(trained):
    policy, held_out = trained
    policy = BehaviourCloning(policy.spec.model_copy(update={"execute_steps": 2}), policy.network)
    seen = Observation({"front": held_out.images[0].numpy()}, held_out.proprio[0].numpy(), "away")
    unseen = Observation({}, held_out.proprio[0].numpy(), "away")
    policy.reset("away")
    assert policy.needs_observation()
    policy.act(seen)
    assert not policy.needs_observation()
    policy.act(unseen)
    assert policy.needs_observation()
    with pytest.raises(UserError, match="'front'"):
        policy.act(unseen)


def test_frames_of_overlapping_clips_are_read_once(dataset: Path):
    index = DatasetIndex(dataset)
    frames = collect_frames(index, "train", "arm", "front", action_horizon=4, max_frames=1000)
    num_clips = len(index.indices("train", only_with_actions=True))
    assert len(frames.images) == num_clips * 3  # of 4 frames with 2 actions each, 3 have four actions ahead
    assert frames.actions.shape[1:] == (4, 3)
    # clip c of episode e holds the number 100 e + c in every row, and the same in proprio
    np.testing.assert_array_equal(frames.actions[:, 0, 0], frames.proprio[:, 0])
    few = collect_frames(index, "train", "arm", "front", action_horizon=4, max_frames=5)
    assert 0 < len(few.images) < len(frames.images)


def test_the_command_trains_on_a_built_dataset(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = BehaviourCloningConfig(
        dataset=dataset,
        output=tmp_path / "bc",
        action_horizon=4,
        execute_steps=2,
        steps=3,
        batch_size=4,
        num_threads=1,
        network=NetworkConfig(channels=8, width=16),
    )
    main(config)
    assert "held-out" in capsys.readouterr().out
    policy = BehaviourCloning.load(tmp_path / "bc")
    policy.reset("push it")
    observation = Observation({"front": np.zeros((16, 16, 3), np.uint8)}, np.zeros(2, np.float32), "push it")
    assert policy.act(observation).shape == (3,)


def test_bad_input_is_one_sentence(dataset: Path, tmp_path: Path):
    def run(**changes):
        main(
            BehaviourCloningConfig(dataset=dataset, output=tmp_path / "bc", action_horizon=4).model_copy(update=changes)
        )

    with pytest.raises(UserError, match="exceeds"):
        run(execute_steps=5)
    with pytest.raises(UserError, match=r"no robot 'hand'.*arm"):
        run(embodiment="hand")
    with pytest.raises(UserError, match="choose one of front"):
        run(view="wrist")
    with pytest.raises(UserError, match="lower action_horizon"):
        run(action_horizon=100)
    with pytest.raises(UserError, match=r"finetune\.baselines"):
        BehaviourCloning.load(tmp_path)


def test_a_damaged_policy_is_one_sentence(trained, tmp_path: Path):
    policy, _ = trained
    policy.save(tmp_path)
    weights, spec = (tmp_path / name for name in ("model.safetensors", "behaviour_cloning.yaml"))
    text, data = spec.read_text(), weights.read_bytes()
    spec.write_text(text.replace("action_horizon: 2", "action_horizon: 3"))
    with pytest.raises(UserError, match=r"does not fit the model that .*behaviour_cloning\.yaml describes"):
        BehaviourCloning.load(tmp_path)
    spec.write_text(re.sub(r"q99: .*", "q99: [1.0]", text, count=1))
    with pytest.raises(UserError, match="different numbers of dimensions"):
        BehaviourCloning.load(tmp_path)
    spec.write_text(text)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        BehaviourCloning.load(tmp_path)


def test_a_full_disk_costs_no_policy_that_is_there(trained, tmp_path: Path):
    policy, _ = trained
    policy.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / ".model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        policy.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_random_actions_follow_the_seed_and_last():
    def actions(seed: int) -> np.ndarray:
        policy = RandomPolicy(4)
        policy.reset("", seed=seed)
        observation = Observation({}, np.zeros(4, np.float32), "")
        return np.stack([policy.act(observation) for _ in range(100)])

    np.testing.assert_array_equal(actions(1), actions(1))
    assert not np.array_equal(actions(1), actions(2))
    changes = (np.diff(actions(1), axis=0) != 0).any(axis=1).sum()
    assert 100 / 15 - 2 <= changes <= 100 / 5
    assert np.abs(actions(1)).max() <= 1


def test_the_demo_config_is_valid():
    load_config(BehaviourCloningConfig, REPOSITORY / "configs/finetune/behaviour_cloning_demo.yaml")
