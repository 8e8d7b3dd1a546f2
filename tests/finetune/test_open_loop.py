"""Open-loop errors, on a dataset whose actions are known by heart."""

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from configs.loader import UserError
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.model_inputs import InputConfig
from finetune.baselines import BehaviourCloningConfig, NetworkConfig
from finetune.baselines import main as train_behaviour_cloning
from finetune.evaluate import EvaluateConfig, main, open_loop_table
from finetune.open_loop import OpenLoopConfig, action_error, evaluate_open_loop, read_clips
from pretrain.models.video_dit import VideoDiTConfig
from pretrain.world_models.observation_space import ObservationSpaceConfig

REPOSITORY = Path(__file__).resolve().parents[2]
tiny = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/tiny_dataset.py")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("open_loop") / "dataset", clips=(3, 4, 2, 3))


class OffByOne:
    """Predicts the recorded actions, one unit off; blind, two units."""

    def __init__(self, folder: Path, blind: bool) -> None:
        self.normalizer = DatasetIndex(folder).normalizer("arm", "actions_absolute", "quantile")
        video = VideoDiTConfig(in_channels=6, out_channels=6, text_dim=8)
        self.config = SimpleNamespace(inputs=InputConfig(), world_model=ObservationSpaceConfig(video=video))
        self.is_blind = blind

    @classmethod
    def load(cls, folder: Path, blind: bool = False) -> "OffByOne":
        return cls(folder, blind)

    def predict_chunk(self, batch: dict[str, Any]) -> np.ndarray:
        assert "video" not in batch
        assert self.normalizer is not None
        return self.normalizer.unnormalize(batch["actions"][:, :6].numpy()) + (2 if self.is_blind else 1)


def test_errors_of_a_policy_beside_those_of_no_model(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "finetune.policy", SimpleNamespace(Policy=OffByOne))
    results = evaluate_open_loop(OpenLoopConfig(dataset=dataset, batch_size=2), ("policy", "blind"), dataset, None)
    errors = results["action_error"]
    assert results["horizon"] == 6  # of the clip's 8: as far as the policy's chunk reaches
    assert errors["policy"]["l1"] == errors["policy"]["mse"] == pytest.approx(1, abs=1e-4)
    assert errors["blind"]["mse"] == pytest.approx(4, abs=1e-3)
    assert errors["policy"]["l1_by_dimension"] == pytest.approx({"x": 1, "y": 1, "gripper": 1}, abs=1e-4)
    assert "hold_proprio" not in errors  # actions and proprio are not the same quantities
    # every row of clip c of episode e holds 100 e + c, so the action before clip c > 0 is one less
    index = DatasetIndex(dataset)
    clips = read_clips(index, OpenLoopConfig(), "arm", np.full(3, -1, np.float32))
    first = clips.actions[:, 0, 0] % 100 == 0
    assert 0 < first.sum() < len(first)
    np.testing.assert_array_equal(clips.last_action[~first], clips.actions[~first, 0] - 1)
    np.testing.assert_array_equal(clips.last_action[first], -1)
    mean = np.array(index.norm_stats["embodiments"]["arm"]["actions_absolute"]["mean"])
    assert errors["mean_action"]["l1"] == pytest.approx(np.abs(clips.actions - mean).mean(), rel=1e-5)
    assert "policy" in open_loop_table(results)


def test_behaviour_cloning_is_a_row_and_the_command_writes_results(dataset: Path, tmp_path: Path):
    network = NetworkConfig(channels=8, width=16)
    train_behaviour_cloning(
        BehaviourCloningConfig(
            dataset=dataset, output=tmp_path / "bc", action_horizon=4, steps=2, batch_size=4, network=network
        )
    )
    settings = {"dataset": dataset}
    main(
        EvaluateConfig.model_validate(
            {
                "mode": "open_loop",
                "rows": ["bc"],
                "behaviour_cloning": tmp_path / "bc",
                "output": tmp_path / "out",
                "open_loop": settings,
            }
        )
    )
    assert '"bc"' in (tmp_path / "out/results.json").read_text()


def test_action_error_counts_valid_rows_only():
    truth = np.zeros((2, 3, 2), np.float32)
    predicted = np.ones_like(truth) * np.array([1, 4], np.float32)
    predicted[1] = 1000
    is_valid = np.array([[True, True, False], [False, False, False]])
    errors = action_error(predicted, truth, is_valid, np.array([1.0, 4.0]), ("a", "b"))
    assert (errors["l1"], errors["mse"]) == (2.5, 8.5)
    assert (errors["l1_normalised"], errors["mse_normalised"]) == (1, 1)
    assert errors["l1_by_dimension"] == {"a": 1, "b": 4}


def test_bad_input_is_one_sentence(dataset: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"needs open_loop\.dataset"):
        evaluate_open_loop(OpenLoopConfig(), (), None, None)
    with pytest.raises(UserError, match="no such folder"):
        evaluate_open_loop(OpenLoopConfig(dataset=tmp_path / "absent"), (), None, None)
    with pytest.raises(UserError, match="no robot 'hand'"):
        evaluate_open_loop(OpenLoopConfig(dataset=dataset, embodiment="hand"), (), None, None)
    only_training = tiny.tiny_dataset(tmp_path / "one_episode", clips=(2,))
    with pytest.raises(UserError, match="hold out episodes"):
        evaluate_open_loop(OpenLoopConfig(dataset=only_training), (), None, None)


def test_rows_that_cannot_be_measured_are_refused(dataset: Path, tmp_path: Path):
    config = EvaluateConfig(mode="open_loop", rows=("expert",), output=tmp_path, open_loop={"dataset": dataset})
    with pytest.raises(UserError, match="expert cannot be measured in open loop"):
        main(config)


@pytest.mark.parametrize(
    ("encoder", "change", "message"),
    [
        ("codec", {"weight_hash": "0" * 64}, "trained on codec embedded 000000000000; .*have one codec"),
        ("codec", {"name": "wan"}, "trained on codec wan "),
        ("text_encoder", {"weight_hash": "0" * 64}, "trained on text encoder hashed 000000000000"),
        ("text_encoder", {"name": "umt5"}, "trained on text encoder umt5 "),
    ],
)
def test_another_encoder_is_refused(dataset: Path, tmp_path: Path, encoder: str, change: dict[str, str], message: str):
    export = shutil.copytree(dataset, tmp_path / "export")  # read the same way
    info = yaml.safe_load((export / "dataset.yaml").read_text())
    info[encoder].update(change)
    (export / "dataset.yaml").write_text(yaml.safe_dump(info))
    with pytest.raises(UserError, match=message):
        evaluate_open_loop(OpenLoopConfig(dataset=dataset), ("policy",), export, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "leg"}, r"has actions of the robot arm, but .* was trained on leg"),
        ({"action_names": ("a", "b", "c")}, "have another layout"),
        ({"proprio_names": ("a", "b")}, "have another layout"),
    ],
)
def test_another_robot_is_refused(dataset: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    """Also where it has as many actions: they would mean something else."""
    export = tiny.tiny_dataset(tmp_path / "export", robot=tiny.ROBOT.model_copy(update=changes))
    with pytest.raises(UserError, match=message):
        evaluate_open_loop(OpenLoopConfig(dataset=dataset), ("policy",), export, None)


def test_behaviour_cloning_of_another_robot_or_view_is_refused(dataset: Path, tmp_path: Path):
    trained = tmp_path / "bc"
    train_behaviour_cloning(
        BehaviourCloningConfig(dataset=dataset, output=trained, action_horizon=4, steps=1, batch_size=2)
    )
    narrower = tiny.ROBOT.model_copy(update={"proprio_names": ("x",)})
    other = tiny.tiny_dataset(tmp_path / "other", clips=(3, 4, 2, 3), robot=narrower)
    with pytest.raises(UserError, match="arm has 3 actions and 1 proprio values, but behaviour cloning"):
        evaluate_open_loop(OpenLoopConfig(dataset=other), ("bc",), None, trained)
    spec = trained / "behaviour_cloning.yaml"
    spec.write_text(spec.read_text().replace("view: front", "view: wrist"))
    with pytest.raises(UserError, match="wrist"):
        evaluate_open_loop(OpenLoopConfig(dataset=dataset), ("bc",), None, trained)


def test_torch_is_left_without_gradients(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "finetune.policy", SimpleNamespace(Policy=OffByOne))
    evaluate_open_loop(OpenLoopConfig(dataset=dataset), ("policy",), dataset, None)
    assert torch.is_grad_enabled()
