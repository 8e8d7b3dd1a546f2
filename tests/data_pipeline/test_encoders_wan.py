"""Wan's VAE as a codec, against tiny random weights that diffusers itself wrote."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from configs.loader import UserError
from data_pipeline.encoder_config import VideoCodecConfig
from data_pipeline.encoders import WanCodec, load_video_codec
from data_pipeline.view_layout import PIXELS, LaidOutCodec, ViewLayout

TINY = {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
LAYOUTS = {
    "wan2.1": {**TINY, "z_dim": 4},
    "wan2.2": {
        **TINY,
        "z_dim": 6,
        "decoder_base_dim": 8,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


def write_vae(folder: Path, layout: str) -> Path:
    torch.manual_seed(0)
    z_dim = LAYOUTS[layout]["z_dim"]
    mean = torch.linspace(-0.5, 0.5, z_dim).tolist()
    std = torch.linspace(0.5, 2.0, z_dim).tolist()
    AutoencoderKLWan(**LAYOUTS[layout], latents_mean=mean, latents_std=std).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def vae_folder(request, tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def codec(vae_folder) -> WanCodec:
    return WanCodec(vae_folder)


@pytest.fixture
def wan21_folder(tmp_path) -> Path:
    return write_vae(tmp_path / "vae", "wan2.1")


def random_video(b: int = 2, f: int = 9, h: int = 32, w: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, f, h, w, 3), dtype=torch.uint8, generator=generator)


def test_encode_is_the_pipelines_formula(vae_folder, codec):
    video = random_video()
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    pixels = video.permute(0, 4, 1, 2, 3) / 255 * 2 - 1
    # As in WanImageToVideoPipeline.prepare_latents, which keeps 1 / std under the name latents_std.
    latents_mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - latents_mean) * latents_std
    torch.testing.assert_close(codec.encode(video), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_decode_is_the_pipelines_formula(vae_folder, codec):
    latents = codec.encode(random_video())
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    latents_mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        pixels = vae.decode(latents.transpose(1, 2) / latents_std + latents_mean).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 4, 1)
    assert (codec.decode(latents).float() - expected).abs().max() <= 1  # one grey level: rounding


def test_shapes_and_strides(codec):
    latents = codec.encode(random_video(b=1, f=9, h=32, w=48))
    stride = codec.spatial_stride
    assert stride in (8, 16)
    assert latents.shape == (1, 3, codec.latent_channels, 32 // stride, 48 // stride)
    assert latents.dtype == torch.float32
    video = codec.decode(latents)
    assert video.shape == (1, 9, 32, 48, 3)
    assert video.dtype == torch.uint8
    assert codec.encode(random_video(b=1, f=1)).shape[1] == 1


def test_a_latent_frame_never_sees_later_frames(codec):
    video = random_video()
    changed = video.clone()
    changed[:, 5:] = 255 - changed[:, 5:]
    latents, latents_changed = codec.encode(video), codec.encode(changed)
    torch.testing.assert_close(latents_changed[:, :2], latents[:, :2], rtol=0, atol=0)
    assert not torch.allclose(latents_changed[:, 2], latents[:, 2])
    torch.testing.assert_close(codec.encode(video[:, :1])[:, 0], latents[:, 0], rtol=1e-5, atol=1e-6)


def test_a_clips_latents_do_not_depend_on_its_batch(codec):
    video = random_video(b=3, f=5)
    assert torch.equal(codec.encode(video)[1:2], codec.encode(video[1:2]))


def test_views_of_one_picture_are_encoded_each_by_itself(codec):
    front, wrist = random_video(b=1, f=5), random_video(b=1, f=5, h=64, seed=1)
    layout = ViewLayout("stack_height", ("front", "wrist"), ((32, 48), (64, 48)))
    picture = layout.join([front, wrist], PIXELS)
    latents = LaidOutCodec(codec, layout).encode(picture)
    assert torch.equal(latents, torch.cat([codec.encode(front), codec.encode(wrist)], dim=-2))
    assert not torch.allclose(latents, codec.encode(picture), atol=1e-3)  # convolutions look across the seam
    decoded = LaidOutCodec(codec, layout).decode(latents)
    assert torch.equal(decoded[:, :, :32], codec.decode(codec.encode(front)))


def test_threads_do_not_mix_their_videos(codec):
    videos = [random_video(b=1, f=5, seed=seed) for seed in range(4)]
    alone = [codec.encode(video) for video in videos]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(codec.encode, videos))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_bfloat16_is_close_and_returns_float32(vae_folder, codec):
    latents = WanCodec(vae_folder, dtype="bfloat16").encode(random_video(b=1, f=5))
    assert latents.dtype == torch.float32
    expected = codec.encode(random_video(b=1, f=5))
    assert (latents - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.gpu
def test_on_a_gpu_too(vae_folder, codec):
    video = random_video(b=1, f=5)
    on_gpu = WanCodec(vae_folder).to("cuda")
    latents = on_gpu.encode(video)
    assert latents.device.type == "cpu"  # where the video was
    # TF32 is allowed in convolutions by default.
    torch.testing.assert_close(latents, codec.encode(video), rtol=0, atol=2e-2)
    assert on_gpu.decode(latents.cuda()).device.type == "cuda"


@pytest.mark.parametrize(
    ("size", "allowed"), [({"f": 8}, "1, 5, 9"), ({"h": 36}, "multiples of"), ({"w": 40 + 4}, "multiples of")]
)
def test_a_size_that_does_not_fit_says_which_do(codec, size, allowed):
    with pytest.raises(UserError, match=allowed):
        codec.encode(random_video(b=1, **size))


def test_saved_as_a_reference_and_loaded(vae_folder, codec, tmp_path):
    codec.save(tmp_path / "codec")
    assert [path.name for path in (tmp_path / "codec").iterdir()] == ["config.json"]
    loaded = load_video_codec(tmp_path / "codec")
    assert isinstance(loaded, WanCodec)
    assert loaded.weight_hash == codec.weight_hash
    assert torch.equal(loaded.encode(random_video(b=1, f=5)), codec.encode(random_video(b=1, f=5)))


def test_a_whole_pipelines_folder_is_accepted_and_hashes_the_same(wan21_folder):
    assert WanCodec(wan21_folder.parent).weight_hash == WanCodec(wan21_folder).weight_hash


def test_other_weights_than_the_recorded_ones_are_refused(wan21_folder, tmp_path):
    WanCodec(wan21_folder).save(tmp_path / "codec")
    weights = wan21_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"] + 1e-3
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"is not the encoder that .*config\.json was written for"):
        load_video_codec(tmp_path / "codec")


def test_weights_that_moved_away_are_named(wan21_folder, tmp_path):
    WanCodec(wan21_folder).save(tmp_path / "codec")
    shutil.move(wan21_folder, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"codec/config\.json refers to weights .*vae is not a folder"):
        load_video_codec(tmp_path / "codec")
    reference = json.loads((tmp_path / "codec/config.json").read_text())
    reference["folder"] = str(tmp_path / "elsewhere")
    (tmp_path / "codec/config.json").write_text(json.dumps(reference))
    load_video_codec(tmp_path / "codec")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["quant_conv.bias"]
    save_file(tensors, weights)


def only_pickles(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def cut_in_half(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


BROKEN = {
    "no_folder": (shutil.rmtree, "is not a folder: .* download the model first"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config_not_json": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "another_model": (lambda folder: edit_config(folder, _class_name="UNet2DModel"), "UNet2DModel, not Autoencoder"),
    "pickles": (only_pickles, "pickled weights .* are never opened"),
    "cut_weights": (cut_in_half, "cannot be loaded"),
    "missing_tensor": (drop_tensor, "1 tensors are missing .*quant_conv.bias"),
    "wrong_shape": (lambda folder: edit_config(folder, base_dim=16), "cannot be loaded .*size mismatch"),
    "short_mean": (lambda folder: edit_config(folder, latents_mean=[0.0]), "latents_mean has 1 numbers but z_dim is 4"),
    "zero_std": (lambda folder: edit_config(folder, latents_std=[1, 1, 1, 0]), "latents_std must be above 0"),
    "other_time": (
        lambda folder: edit_config(folder, temperal_downsample=[False, False, True]),
        "only VAEs with a temporal stride of 4",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_gives_one_sentence(wan21_folder, case):
    damage, message = BROKEN[case]
    damage(wan21_folder)
    with pytest.raises(UserError, match=message) as caught:
        WanCodec(wan21_folder)
    assert "\n" not in str(caught.value)


def test_config_wants_a_folder_for_wan(tmp_path):
    VideoCodecConfig(kind="wan", folder=tmp_path)
    with pytest.raises(ValueError, match="needs `folder`"):
        VideoCodecConfig(kind="wan")


def test_an_unknown_kind_of_saved_codec_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "ltx", "weight_hash": ""}')
    with pytest.raises(UserError, match="'ltx', but this version knows only embedded, wan"):
        load_video_codec(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_video_codec(tmp_path / "nothing")
