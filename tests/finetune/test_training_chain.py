"""From a dataset to a policy by the real commands, at the smallest size: pretrain, look, fine-tune, act."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from configs.loader import UserError, load_config
from data_pipeline.augment import AugmentConfig
from data_pipeline.clips import ClipConfig, ClipDataset, collate
from data_pipeline.dataset import DatasetFolder
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.encoders import EmbeddedCodec, HashedTextEncoder
from data_pipeline.loader import LoaderConfig
from data_pipeline.video_io import ViewConfig, decode_clip
from finetune.open_loop import OpenLoopConfig, evaluate_open_loop
from finetune.policy import Policy
from finetune.simulators import Observation
from finetune.train import FinetuneConfig, build_policy_model, policy_weights
from finetune.train import main as finetune
from pretrain.evaluate import EvaluateConfig
from pretrain.evaluate import main as evaluate
from pretrain.exported import load_world_model
from pretrain.rollout import RolloutConfig
from pretrain.rollout import main as rollout
from pretrain.train import PretrainConfig
from pretrain.train import main as pretrain

REPOSITORY = Path(__file__).resolve().parents[2]
tiny = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/tiny_dataset.py")))

VIDEO = """
    patch_size: [1, 2, 2]
    num_attention_heads: 2
    attention_head_dim: 12
    in_channels: 6
    out_channels: 6
    text_dim: 8
    freq_dim: 16
    ffn_dim: 32
    num_layers: 2
"""
COMMON = """
num_steps: 4
checkpoint_every: 2
validate_every: 2
validation_batches: 1
log_every: 1
"""


def run(module: str, *arguments: str, expect: int = 0) -> str:
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert process.returncode == expect, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a pretrained world model and a fine-tuned policy."""
    folder = tmp_path_factory.mktemp("chain")
    # episode 2 has no actions: action-free and labelled clips train the world model together
    sizes = {"front": 16, "wrist": 8, "square": 16}
    views = {name: ViewConfig(height=height, width=16) for name, height in sizes.items()}
    tiny.tiny_dataset(folder / "dataset", clips=(4, 4, 3, 3, 3), action_free=(2,), views=views, num_frames=9)
    pretraining, finetuning = folder / "pretrain.yaml", folder / "finetune.yaml"
    loader = (
        f"loader: {{dataset: {folder}/dataset, global_batch_size: 4, text_length: 4, crop_frames: 5, "
        "views: [front, wrist], layout: stack_height, "
    )
    # pixels, cropped and at speeds as drawn, which the model encodes; then stored latents
    moving = "reads: video, augment: {random_start: true, speed: [0.8, 1.5], view_dropout: {wrist: 0.3}}"
    model = f"model:\n  prediction: data\n  predict_residual: true\n  video:{VIDEO}"
    pretraining.write_text(
        f"run_dir: {folder}/pretrain\n{COMMON}{model}{loader}{moving}}}\nengine: {{kind: accelerate}}\n"
    )
    policy = "policy: {action_expert: {width: 16, ffn_dim: 24, freq_dim: 8}, num_inference_steps: 2}\n"
    finetuning.write_text(
        f"run_dir: {folder}/finetune\npretrained: {folder}/pretrain/export\nexecute_steps: 3\n{COMMON}{policy}"
        f"{loader}only_with_actions: true}}\nengine: {{kind: accelerate}}\n"
    )
    run("pretrain.train", "--config", str(pretraining))
    run("finetune.train", "--config", str(finetuning))
    return folder


def observation(brightness: int = 90) -> Observation:
    views = {"front": np.full((16, 16, 3), brightness, np.uint8), "wrist": np.full((24, 48, 3), brightness, np.uint8)}
    return Observation(views, np.zeros(2, np.float32), "push it")


@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_policy_sees_the_picture_that_training_saw(chain: Path, is_dropped: bool):
    """The first frames of a recorded clip's views, given as a robot gives them, become the clip's own context; and a
    black one that of a clip whose view was dropped."""
    policy = Policy.load(chain / "finetune" / "export")
    assert policy.view_names == ("front", "wrist")
    index = DatasetIndex(chain / "dataset")
    augment = AugmentConfig(view_dropout={"wrist": float(is_dropped)})
    clips = ClipDataset(index, ClipConfig(reads="video", augment=augment, **policy.config.inputs.model_dump()))
    contexts = []
    for i in range(3):
        batch = collate([clips.read(i, place=(0, 0, i))])
        context, _ = policy.model.world_model.split(policy.model.world_model.latents(batch))
        members = index.read_sample(i)
        views = {name: decode_clip(members[f"{name}.mp4"], [0])[0] for name in policy.view_names}
        assert not np.array_equal(views["front"][0, 0], views["wrist"][0, 0])
        views["wrist"] = views["wrist"] * (not is_dropped)
        with patch.object(policy.model, "plan", wraps=policy.model.plan) as plan:
            policy.plan(Observation(views, np.zeros(2, np.float32), "push it"))
        assert torch.equal(plan.call_args.args[0], context)
        contexts.append(context)
    assert not torch.equal(contexts[0], contexts[1])


def test_views_by_themselves_are_refused_before_the_first_step(chain: Path):
    changes = ["loader.views=[front, square]", "loader.layout=separate", f"run_dir={chain}/other"]
    for config_class, command, name in ((PretrainConfig, pretrain, "pretrain"), (FinetuneConfig, finetune, "finetune")):
        with pytest.raises(UserError, match="sees one picture; choose stack_height or tile"):
            command(load_config(config_class, chain / f"{name}.yaml", changes))
    assert not (chain / "other").exists()


def test_both_runs_logged_every_part_of_their_loss(chain: Path):
    parts = {"pretrain": {"loss/video"}, "finetune": {"loss/video", "loss/action"}}
    for run_name, names in parts.items():
        rows = [json.loads(line) for line in (chain / run_name / "metrics.jsonl").read_text().splitlines()]
        train = [row for row in rows if row["split"] == "train"]
        assert [row["step"] for row in train] == [1, 2, 3, 4]
        assert all(names <= row.keys() and np.isfinite(row["loss"]) for row in rows)
        assert all(0 < row["model_flops_per_s"] < row["hardware_flops_per_s"] for row in train)


def test_the_export_alone_is_enough_to_act(chain: Path, tmp_path: Path):
    (chain / "finetune" / "export").rename(tmp_path / "elsewhere")
    try:
        policy = Policy.load(tmp_path / "elsewhere")
        policy.reset("push it")
        actions = []
        for _ in range(4):
            planned = policy.needs_observation()
            actions.append((planned, policy.act(observation())))
        assert [planned for planned, _ in actions] == [True, False, False, True]  # execute_steps: 3
        assert all(action.shape == (3,) and action.dtype == np.float32 for _, action in actions)
        assert policy.imagined is not None
        assert policy.imagined.shape == (1, 6, 6, 4)  # one view above the other
    finally:
        (tmp_path / "elsewhere").rename(chain / "finetune" / "export")


def test_the_same_episode_seed_gives_the_same_plan_and_blindness_changes_it(chain: Path):
    seeing, blind = (Policy.load(chain / "finetune" / "export", blind=is_blind) for is_blind in (False, True))
    for policy in (seeing, blind):  # four steps of training leave the head at about zero: give sight a say
        for parameter in policy.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))

    def plan(policy: Policy, brightness: int, seed: int = 0) -> np.ndarray:
        policy.reset("push it", seed)
        return policy.plan(observation(brightness))

    assert np.array_equal(plan(seeing, 90), plan(seeing, 90))
    assert not np.array_equal(plan(seeing, 90), plan(seeing, 90, seed=1))
    assert not np.array_equal(plan(seeing, 90), plan(seeing, 200))
    assert np.array_equal(plan(blind, 90), plan(blind, 200))
    assert np.array_equal(plan(blind, 90), plan(seeing, 0))


def test_an_observation_that_does_not_fit_is_one_sentence(chain: Path):
    policy = Policy.load(str(chain / "finetune" / "export"))
    image, proprio = np.zeros((16, 16, 3), np.uint8), np.zeros(2, np.float32)
    for view, picture, state, what in (
        ("left", image, proprio, "'front'"),
        ("front", image.astype(np.float32), proprio, "float32"),
        ("front", image.transpose(2, 0, 1), proprio, r"\[3, 16, 16\]"),
        ("front", image, np.zeros(7, np.float32), "2 numbers: x, y"),
    ):
        with pytest.raises(UserError, match=what):
            policy.act(Observation({view: picture, "wrist": image}, state, ""))


def test_evaluate_and_rollout_look_at_the_pretrained_model(chain: Path, tmp_path: Path):
    export, dataset = chain / "pretrain" / "export", chain / "dataset"
    evaluate(EvaluateConfig(checkpoint=export, dataset=dataset, output=tmp_path / "video.json"))
    figures = json.loads((tmp_path / "video.json").read_text())
    assert figures["num_clips"] >= 2
    assert figures["psnr_copy_last"] == 99.0  # every tiny clip stands still, so copying is perfect
    assert figures["psnr_moving_model"] is None
    rollout(RolloutConfig(checkpoint=export, dataset=dataset, output=tmp_path / "rollouts", num_clips=2))
    assert {path.name for path in (tmp_path / "rollouts").iterdir()} == {"clip_000.mp4", "clip_001.mp4", "strips.png"}


def with_another(encoder: str, dataset: Path, folder: Path) -> Path:
    """A dataset of the same shapes, as if it had been encoded with other weights."""
    folder = Path(shutil.copytree(dataset, folder))
    other = DatasetFolder(folder).codec() if encoder == "codec" else HashedTextEncoder(8, max_length=9)
    if isinstance(other, EmbeddedCodec):
        other.mean += 1
    other.save(folder / encoder)
    info = yaml.safe_load((folder / "dataset.yaml").read_text())
    info[encoder]["weight_hash"] = other.weight_hash
    (folder / "dataset.yaml").write_text(yaml.safe_dump(info))
    return folder


@pytest.mark.parametrize(("encoder", "message"), [("codec", "have one codec"), ("text_encoder", "one text encoder")])
def test_other_encoders_are_refused_wherever_a_model_meets_a_dataset(
    chain: Path, tmp_path: Path, encoder: str, message: str
):
    other, export = with_another(encoder, chain / "dataset", tmp_path / "dataset"), chain / "pretrain" / "export"
    fresh = [f"loader.dataset={other}", f"run_dir={tmp_path}/run"]
    start_over = load_config(PretrainConfig, chain / "pretrain.yaml", [*fresh, f"pretrained={export}"])
    meetings: dict[str, Callable[[], Any]] = {
        "pretrain.train": lambda: pretrain(start_over),
        "pretrain.evaluate": lambda: evaluate(EvaluateConfig(checkpoint=export, dataset=other)),
        "pretrain.rollout": lambda: rollout(RolloutConfig(checkpoint=export, dataset=other, output=tmp_path / "films")),
        "finetune.train": lambda: finetune(load_config(FinetuneConfig, chain / "finetune.yaml", fresh)),
        "finetune.evaluate": lambda: evaluate_open_loop(
            OpenLoopConfig(dataset=other), ("policy",), chain / "finetune" / "export", None
        ),
    }
    for meeting in meetings.values():
        with pytest.raises(UserError, match=message):
            meeting()


def test_a_finished_run_starts_again_without_a_step(chain: Path):
    before = (chain / "finetune" / "metrics.jsonl").read_text()
    finetune(load_config(FinetuneConfig, chain / "finetune.yaml"))
    assert (chain / "finetune" / "metrics.jsonl").read_text() == before


def finetune_config(chain: Path, **changes) -> FinetuneConfig:
    defaults = {
        "run_dir": chain / "other", "num_steps": 1, "pretrained": chain / "pretrain" / "export",
        "loader": LoaderConfig(dataset=chain / "dataset"), "execute_steps": 3,
    }  # fmt: skip
    return FinetuneConfig(**(defaults | changes))


def test_fine_tuning_starts_from_the_pretrained_weights(chain: Path):
    pretrained, _, _ = load_world_model(chain / "pretrain" / "export")
    config, datasets = finetune_config(chain), Datasets.open({"": chain / "dataset"})
    model, described = build_policy_model(config, datasets)
    weights = policy_weights(config, model, datasets)
    assert weights.shapes == {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, value in pretrained.state_dict().items():
        assert torch.equal(weights.part(f"world_model.{name}", 0, value.numel()), value.flatten())
    assert described.embodiment == "arm"


def test_bad_input_is_one_sentence(chain: Path, tmp_path: Path):
    datasets = Datasets.open({"": chain / "dataset"})
    with pytest.raises(UserError, match="action_horizon=5"):
        config = finetune_config(chain)
        build_policy_model(
            config.model_copy(update={"policy": config.policy.model_copy(update={"action_horizon": 5})}), datasets
        )
    with pytest.raises(UserError, match=r"execute_steps=99"):
        build_policy_model(finetune_config(chain, execute_steps=99), datasets)
    with pytest.raises(UserError, match=r"robots arm"):
        build_policy_model(finetune_config(chain, embodiment="leg"), datasets)
    with pytest.raises(UserError, match=r"model\.yaml"):
        build_policy_model(finetune_config(chain, pretrained=tmp_path), datasets)
    with pytest.raises(UserError, match="not the export of a policy"):
        Policy.load(chain / "pretrain" / "export")
    with pytest.raises(UserError, match="not the export of a world model"):
        load_world_model(chain / "finetune" / "export")
    longer = tiny.tiny_dataset(tmp_path / "longer", clips=(2, 2), first_episode=10, num_frames=13)
    several = Datasets.open({"short": chain / "dataset", "long": longer})
    with pytest.raises(UserError, match=r"one size .*/dataset: 16x16x9, \S+longer: 16x16x13; set loader.crop_frames"):
        build_policy_model(finetune_config(chain), several)
    weights = load_file(chain / "pretrain" / "export" / "model.safetensors")
    broken = tmp_path / "export"
    subprocess.run(["cp", "-r", str(chain / "pretrain" / "export"), str(broken)], check=True)
    save_file(
        {name: tensor for name, tensor in weights.items() if "proj_out" not in name}, broken / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"video\.proj_out"):
        load_world_model(broken)
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="cannot be read"):
        load_world_model(broken)
    message = run("finetune.train", "--config", str(chain / "finetune.yaml"), f"pretrained={tmp_path}/none", expect=2)
    assert len(message.strip().splitlines()) == 1
