"""A run's weights for other tools: diffusers opens the folder and computes the same, and so do we."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from configs.loader import StrictConfig, UserError, load_config
from pretrain import export
from pretrain.checkpoint import find_checkpoints
from pretrain.checkpoint_files import CheckpointWeights
from pretrain.evaluate import EvaluateConfig
from pretrain.export import ExportConfig
from pretrain.exported import load_world_model
from pretrain.models.video_dit import VideoDiT
from pretrain.rollout import RolloutConfig
from pretrain.starting_weights import pretrained_weights
from pretrain.train import PretrainConfig, main
from pretrain.weights import load_into

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIGS = REPOSITORY / "configs" / "pretrain"
tiny = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/tiny_dataset.py")))

VIDEO = dict(
    patch_size=[1, 2, 2], num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=6, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=2,
)  # fmt: skip


def config(folder: Path, **changes) -> PretrainConfig:
    settings = {
        "run_dir": folder / "run",
        "num_steps": 2,
        "model": {"video": VIDEO},
        "loader": {"dataset": folder / "dataset", "global_batch_size": 4, "text_length": 4},
        "engine": {"kind": "accelerate", "device": "cpu", "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "ema_decay": 0.5,
    }
    return PretrainConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny.tiny_dataset(folder / "dataset", clips=(4, 4, 3))
    assert main(config(folder)) == 0
    return folder


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 6, 3, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    out = model.eval()(latents, torch.tensor([17.0, 903.5]), text)
    return out if isinstance(out, torch.Tensor) else out.sample


def write(trained: Path, output: Path, checkpoint: str = "run", **changes) -> Path:
    export.main(ExportConfig(checkpoint=trained / checkpoint, output=output, **changes))
    return output


def test_diffusers_opens_it_and_computes_what_we_compute(trained: Path, tmp_path: Path) -> None:
    folder = write(trained, tmp_path / "wan", max_shard_gb=2e-5)
    assert len(list(folder.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    theirs, report = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ours, _, _ = load_world_model(trained / "run" / "export")
    expected = outputs(ours.video)
    assert expected.abs().max() > 0
    torch.testing.assert_close(outputs(theirs), expected, atol=1e-5, rtol=1e-5)


def test_it_is_an_export_too_and_another_run_can_start_from_it(trained: Path, tmp_path: Path) -> None:
    folder = write(trained, tmp_path / "wan")
    again, _, dataset = load_world_model(folder)
    first, _, _ = load_world_model(trained / "run" / "export")
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    load_into(again, *pretrained_weights(again, folder, dataset))
    assert torch.equal(again.video.proj_out.weight, first.video.proj_out.weight)


@pytest.mark.parametrize("weights", ["averaged", "latest"])
def test_a_checkpoint_gives_its_average_or_its_latest_weights(trained: Path, tmp_path: Path, weights: str) -> None:
    (checkpoint,) = find_checkpoints(trained / "run" / "checkpoints")
    folder = write(trained, tmp_path / "wan", str(checkpoint.relative_to(trained)), weights=weights, dtype="bfloat16")
    stored = CheckpointWeights(checkpoint, averaged=weights == "averaged").read_all()
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert written.keys() == {name[6:] for name in stored if name.startswith("video.")}
    for name, value in written.items():
        assert torch.equal(value, stored[f"video.{name}"].bfloat16()), name
    assert load_file(folder / "added.safetensors").keys() == {name for name in stored if not name.startswith("video.")}


def test_a_run_can_start_from_another_runs_export(trained: Path, tmp_path: Path) -> None:
    settings = config(trained, run_dir=tmp_path / "second", pretrained=trained / "run" / "export", num_steps=1)
    still = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"learning_rate": 1e-30})})
    assert main(still) == 0
    first, second = (load_file(run / "export" / "model.safetensors") for run in (trained / "run", tmp_path / "second"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-7, rtol=0, msg=name)


def test_mistakes_are_told(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model\.yaml nor checkpoints/"):
        write(trained, tmp_path / "wan", "dataset")
    with pytest.raises(UserError, match="exists already"):
        write(trained, tmp_path)
    assert not list(tmp_path.glob("*wan*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_run(path: Path) -> None:
    loaded = load_config(PretrainConfig, path)
    assert loaded.run_dir.parts[0] == "runs"


def test_the_wan_configs_have_the_sizes_of_the_released_checkpoints() -> None:
    released = {"wan_1_3b": (1_418_996_800, 825), "wan_5b": (4_999_787_712, 825), "wan_14b": (14_288_491_584, 1095)}
    for name, expected in released.items():
        sizes = load_config(PretrainConfig, CONFIGS / f"{name}.yaml").model.video
        with torch.device("meta"):
            weights = VideoDiT(sizes).state_dict()
        assert (sum(value.numel() for value in weights.values()), len(weights)) == expected, name


@pytest.mark.parametrize(
    ("config_class", "overrides", "complaint"),
    [
        (
            ExportConfig,
            ["output=b", "max_shard_gb=1e308"],
            r"max_shard_gb is 1e\+308, .* or equal to 1000000",
        ),
        (EvaluateConfig, ["dataset=b", f"seed={2**63}"], r"seed is 9223372036854775808, .* less than"),
        (RolloutConfig, ["dataset=b", "output=c", f"seed={2**63}"], r"seed is 9223372036854775808, .* less than"),
    ],
)
def test_what_no_machine_could_count_is_refused(
    config_class: type[StrictConfig], overrides: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config(config_class, None, ["checkpoint=a", *overrides])
