"""Wan checkpoints in and out: strictly, byte for byte, with the outputs of diffusers; mistakes in a sentence."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from configs.loader import UserError
from pretrain.models.token_groups import Rule
from pretrain.models.transformer import run_experts
from pretrain.models.video_dit import VIDEO_EXPERT, VideoDiT, VideoDiTConfig
from pretrain.starting_weights import pretrained_weights
from pretrain.wan_folder import STEM, from_original, wan_weights, write_wan_config
from pretrain.weights import load_into, write_shards
from pretrain.world_models.observation_space import (
    CONTEXT,
    FUTURE,
    ObservationSpaceConfig,
    ObservationSpaceWorldModel,
)

SIZES = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=2,
)  # fmt: skip


def load_wan(video: VideoDiT, folder: Path) -> None:
    load_into(video, wan_weights(video, folder))


def random_wan(**changes) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**(SIZES | changes)).eval()
    for parameter in model.parameters():  # Wan starts with a zero head: give every weight a say
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def ours(**changes) -> VideoDiT:
    return VideoDiT(VideoDiTConfig(**(SIZES | changes))).eval()


def world_model(**changes) -> ObservationSpaceWorldModel:
    video = VideoDiTConfig(**(SIZES | changes))
    sizes = dict(video=video, action_dim=2, actions_per_latent=4, residual_std=1.0)
    return ObservationSpaceWorldModel(ObservationSpaceConfig(**sizes)).eval()


def dataset_of(codec: str) -> SimpleNamespace:
    return SimpleNamespace(path="data", info=SimpleNamespace(codec=SimpleNamespace(name=codec)))


@pytest.fixture
def wan_folder(tmp_path: Path) -> Path:
    random_wan().save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def test_a_state_dict_of_wan_1_3b_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """Ours -> diffusers -> ours, with all 825 tensors of the 30 layers, in several shards."""
    sizes = dict(num_attention_heads=1, attention_head_dim=6, ffn_dim=8, num_layers=30)
    model = ours(**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    weights = model.state_dict()
    assert len(weights) == 825
    written = tmp_path / "ours"
    written.mkdir()
    write_wan_config(written, model.config)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    shards = write_shards(written, STEM, shapes, weights.__getitem__, 20_000, torch.float32)
    assert len(shards) > 3
    WanTransformer3DModel.from_pretrained(written).save_pretrained(tmp_path / "theirs")
    back = ours(**sizes)
    load_wan(back, tmp_path / "theirs")
    for name, value in back.state_dict().items():
        assert value.numpy().tobytes() == weights[name].numpy().tobytes(), name


@torch.no_grad()
def test_a_world_model_that_starts_from_wan_is_wan(wan_folder: Path) -> None:
    """Clean context and noised future as groups, with actions: what Wan computes from per-token timesteps."""
    reference, model = random_wan(), world_model()
    load_into(model, *pretrained_weights(model, wan_folder, dataset_of("wan")))
    context, noised = torch.randn(2, 1, 4, 4, 6), torch.randn(2, 2, 4, 4, 6)
    text, flow_time = torch.randn(2, 5, 8), torch.tensor([0.25, 0.75])
    actions = model.embed_actions(torch.randn(2, 8, 2), None, noised)
    future, embedding = model.future_group(noised, context, flow_time, actions)
    everything = {(query, key): Rule.ALWAYS for query in (CONTEXT, FUTURE) for key in (CONTEXT, FUTURE)}
    tokens, _ = run_experts(
        {VIDEO_EXPERT: model.video.blocks},
        {VIDEO_EXPERT: model.video.condition_embedder.text_embedder(text)},
        [model.context_group(context), future],
        everything,
    )
    velocity = model.read_future(tokens[1], embedding, noised)
    timestep = torch.cat([torch.zeros(2, 6), 1000 * flow_time[:, None].expand(2, 12)], dim=1)
    latents = torch.cat([context, noised], dim=1).transpose(1, 2)
    expected = reference(latents, timestep, text, return_dict=False)[0].transpose(1, 2)[:, 1:]
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def to_original(name: str) -> str:
    """Diffusers' names to those of Wan's release, written independently of the code under test."""
    pairs = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("proj_out", "head.head"), ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"),
        ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("norm2", "norm3"), ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ]  # fmt: skip
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, original in pairs:
        name = name.replace(theirs, original)
    return name.replace("scale_shift_table", "modulation")


def original_folder(folder: Path, **extra: torch.Tensor) -> Path:
    """As Wan releases its own checkpoints."""
    folder.mkdir()
    weights = {to_original(name): value for name, value in random_wan().state_dict().items()}
    save_file({**weights, **extra}, folder / f"{STEM}.safetensors")
    config = {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 24, "eps": 1e-6, "ffn_dim": 32,
        "freq_dim": 16, "in_dim": 4, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 4,
        "text_len": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_names_of_wans_own_release_are_understood(tmp_path: Path) -> None:
    model = ours()
    load_wan(model, original_folder(tmp_path / "original"))
    for name, value in random_wan().state_dict().items():
        assert from_original(to_original(name)) == name
        assert torch.equal(model.state_dict()[name], value), name


def test_a_whole_pipeline_will_do(tmp_path: Path) -> None:
    random_wan().save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    model = ours()
    load_wan(model, tmp_path / "pipeline")
    assert torch.equal(model.proj_out.weight, random_wan().proj_out.weight)


def rewrite(folder: Path, change) -> None:
    path = folder / f"{STEM}.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def misspell(weights: dict[str, torch.Tensor]) -> None:
    weights["proj_outt.bias"] = weights.pop("proj_out.bias")


MISTAKES = {
    "missing": (
        lambda folder: rewrite(folder, lambda weights: weights.pop("blocks.1.attn1.to_q.weight")),
        r"1 of \d+ tensors are missing, first blocks\.1\.attn1\.to_q\.weight",
    ),
    "misspelt": (
        lambda folder: rewrite(folder, misspell),
        r"missing, first proj_out\.bias \(nearest: proj_outt\.bias\); 1 are not known here, first proj_outt\.bias",
    ),
    "reshaped": (
        lambda folder: rewrite(folder, lambda weights: weights.update({"proj_out.bias": torch.zeros(3)})),
        r"1 have another shape, first proj_out\.bias with \[3\] instead of \[16\]",
    ),
    "other size": (
        lambda folder: edit_json(folder / "config.json", num_layers=30),
        r"model\.video\.num_layers=2, but .* says 30; set it to 30",
    ),
    "more than we know": (
        lambda folder: edit_json(folder / "config.json", pos_embed_seq_len=514),
        r"sets pos_embed_seq_len to 514, which is not supported",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"is not the config of a Wan transformer"),
    "no weights": (lambda folder: (folder / f"{STEM}.safetensors").unlink(), rf"holds no {STEM}\.safetensors"),
    "pickles": (
        lambda folder: (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.bin"),
        r"its weights are pickles \(.*\.bin\); give a folder with safetensors",
    ),
    "cut off": (
        lambda folder: (folder / f"{STEM}.safetensors").write_bytes(b"\x10"),
        r"cannot be read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_told_in_one_sentence_and_changes_nothing(mistake: str, wan_folder: Path) -> None:
    spoil, message = MISTAKES[mistake]
    spoil(wan_folder)
    model = ours()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_wan(model, wan_folder)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, wan_folder: Path) -> None:
    rewrite(wan_folder, lambda weights: weights["proj_out.bias"][3:5].fill_(value))
    with pytest.raises(UserError, match=r"2 of the numbers of proj_out\.bias are not finite .* another checkpoint"):
        load_wan(ours(), wan_folder)


@pytest.mark.parametrize(
    ("shard", "message"), [("../secret.safetensors", "no safetensors file beside it"), ("a.safetensors", "is missing")]
)
def test_an_index_names_files_beside_it_that_are_there(wan_folder: Path, shard: str, message: str) -> None:
    (wan_folder / f"{STEM}.safetensors").rename(wan_folder.parent / "secret.safetensors")
    (wan_folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"proj_out.bias": shard}}))
    with pytest.raises(UserError, match=message):
        load_wan(ours(), wan_folder)


def test_a_clip_image_encoder_is_refused(tmp_path: Path) -> None:
    folder = original_folder(tmp_path / "i2v", **{"blocks.0.cross_attn.k_img.weight": torch.zeros(24, 24)})
    with pytest.raises(UserError, match=r"CLIP image encoder.*Wan 2\.2"):
        load_wan(ours(), folder)


def test_latents_of_another_codec_are_refused(wan_folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape("codec embedded; build the dataset with codec.kind=wan")):
        pretrained_weights(world_model(), wan_folder, dataset_of("embedded"))


@pytest.mark.parametrize(("name", "is_what"), [("nothing", "is no folder that holds"), ("dataset", "holds")])
def test_what_is_neither_an_export_nor_a_wan_checkpoint_is_refused_as_such(
    name: str, is_what: str, tmp_path: Path
) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(UserError, match=rf"pretrained={tmp_path / name} {is_what} neither model\.yaml, .* nor config"):
        pretrained_weights(world_model(), tmp_path / name, dataset_of("embedded"))
