"""Staged clips to latents and text: from the stored pixels, with either kind of codec; without Ray."""

import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configs.loader import UserError
from data_pipeline.curate.episode import CurateEpisode, CuratePlan, SourcePlan
from data_pipeline.encode import EncodeEpisode, EncodePlan, check_encoders, measure_codec, prepare_codec
from data_pipeline.encoder_config import TextEncoderConfig, VideoCodecConfig
from data_pipeline.encoders import HashedTextEncoder, load_video_codec
from data_pipeline.sample import read_tensor, validate
from data_pipeline.sources import LeRobotConfig, open_source
from data_pipeline.staging import Staging
from data_pipeline.video_io import ViewConfig, decode_clip
from tests.data_pipeline.recordings import write_lerobot_v21
from tests.data_pipeline.test_encoders_wan import write_vae


@pytest.fixture
def staging(tmp_path):
    """The first episode of a tiny robot, curated; and a text encoder."""
    config = LeRobotConfig(path=write_lerobot_v21(tmp_path / "robot", lengths=(12,)), name="lab")
    source = open_source(config)
    plan = CuratePlan(
        staging=tmp_path / "staging",
        run="test",
        sources={"lab": SourcePlan(config=config, embodiment=source.embodiment())},
        views={"front": ViewConfig(height=32, width=48)},
        num_frames=5,
        fps=10.0,
        stride=3,
        actions_per_frame=1,
        crf=18,
    )
    CurateEpisode(plan)({"source": "lab", "episode": source.list_episodes()[0]})
    staging = Staging(plan.staging)
    HashedTextEncoder(16).save(staging.text_encoder)
    return staging


def codec_config(kind, tmp_path):
    if kind == "wan":
        return VideoCodecConfig(kind="wan", folder=write_vae(tmp_path / "vae", "wan2.1"))
    return VideoCodecConfig(patch=4, channels=24)


def test_an_embedded_codec_can_be_that_of_another_dataset(staging, tmp_path):
    refs = [("lab", "episode_000000", position) for position in range(3)]
    config = codec_config("embedded", tmp_path)
    prepare_codec(staging, config, refs[:1], refs, "train")
    fitted = shutil.copytree(staging.codec, tmp_path / "codec")
    anew = prepare_codec(staging, config, refs, refs, "train")
    shared = prepare_codec(staging, VideoCodecConfig(folder=fitted), refs, refs, "train")
    assert shared.weight_hash == load_video_codec(fitted).weight_hash != anew.weight_hash
    assert load_video_codec(staging.codec).weight_hash == shared.weight_hash

    views = {"front": ViewConfig(height=30, width=32)}
    with pytest.raises(UserError, match="multiples of 4"):  # of that folder's patch
        check_encoders(VideoCodecConfig(folder=fitted), TextEncoderConfig(), views)
    with pytest.raises(UserError, match="gone"):
        check_encoders(VideoCodecConfig(folder=tmp_path / "gone"), TextEncoderConfig(), views)
    with pytest.raises(ValidationError, match="leave both out"):
        VideoCodecConfig(folder=fitted, channels=24)


@pytest.mark.parametrize("kind", ["embedded", "wan"])
def test_latents_are_those_of_the_stored_video(staging, tmp_path, kind):
    refs = [("lab", "episode_000000", position) for position in range(3)]
    info = prepare_codec(staging, codec_config(kind, tmp_path), refs, refs, "train")
    assert (info.name, info.psnr_num_clips, info.psnr_split) == (kind, 3, "train")
    assert info.psnr > (30 if kind == "embedded" else 0)
    assert EncodeEpisode(EncodePlan(staging=staging.root, use_gpu=False, encoders=""))(
        {"source": "lab", "episode": "episode_000000"}
    ) == {"clips": 3}
    codec = load_video_codec(staging.codec)
    assert codec.weight_hash == info.weight_hash
    record = staging.read_curated("lab", "episode_000000")
    encoded = staging.read_encoded("lab", "episode_000000")
    assert [clip.key for clip in record.clips] == [key for key, _, _ in encoded.clips]
    for members, (_, offset, size) in zip(staging.curated_members(record), encoded.clips, strict=True):
        later = staging.read_members(staging.encoded_tar("lab", "episode_000000"), offset, size)
        assert validate(members | later) == []
        video = torch.from_numpy(decode_clip(members["front.mp4"]))
        latents = read_tensor("latents", later["front.latents.safetensors"])
        assert torch.equal(latents, codec.encode(video[None])[0].to(torch.bfloat16))
        text = read_tensor("text", later["text.safetensors"])
        assert torch.equal(text, HashedTextEncoder(16).encode(["push the block"])[0].to(torch.bfloat16))


class Rounding:
    """A codec that keeps the first frame and errs by `error` in every later one."""

    name, weight_hash, temporal_stride, spatial_stride, latent_channels = "rounding", "0", 4, 1, 3

    def __init__(self, error):
        self.error = error

    def encode(self, video):
        return video

    def decode(self, latents):
        shifted = latents.clone()
        shifted[:, 1:] += self.error
        return shifted


def test_psnr_over_all_and_over_moving_pixels():
    video = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    video[1:, 0, 0] = 100  # one pixel moves
    info = measure_codec(Rounding(10), iter([video, video]), "validation")
    assert info.psnr == pytest.approx(10 * np.log10(255**2 / (100 * 4 / 5)), abs=1e-3)
    assert info.psnr_moving == pytest.approx(10 * np.log10(255**2 / 100), abs=1e-3)
    perfect = measure_codec(Rounding(0), iter([np.zeros_like(video)]), "train")
    assert (perfect.psnr, perfect.psnr_moving, perfect.psnr_num_clips) == (99.0, None, 1)
