"""Staged clips -> latents and text embeddings, with the frozen encoders that are stored beside the dataset.

The video is decoded from the mp4 that the dataset holds, not from the recording: what is stored and what is trained on
agree to the pixel. Each clip is encoded alone, so that its bytes depend on no other clip.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.loader import StrictConfig, UserError

from .dataset import CodecInfo, Split
from .encoders import (
    EmbeddedCodec,
    T5TextEncoder,
    TextEncoder,
    VideoCodec,
    VideoCodecConfig,
    WanCodec,
    load_text_encoder,
    load_video_codec,
)
from .one_thread import one_thread
from .sample import SampleMeta, tensor_bytes
from .shards import TarWriter, tar_records, write_atomic
from .staging import EncodedRecord, Staging, write_record
from .video_io import decode_clip
from .video_quality import PixelError, moving_pixels

ClipRef = tuple[str, str, int]
"""(source, episode, position among the episode's accepted clips)"""

MAX_FIT_CLIPS = 256
MAX_PSNR_CLIPS = 32


class EncodePlan(StrictConfig):
    staging: Path
    use_gpu: bool


def prepare_codec(
    staging: Staging, config: VideoCodecConfig, fit: Sequence[ClipRef], measure: Sequence[ClipRef], split: Split
) -> CodecInfo:
    """Fits or opens the codec, measures it on clips of `split`, and saves it into the staging folder."""
    with one_thread():
        codec = _fit_or_open(staging, config, fit)
        info = measure_codec(codec, videos(staging, measure), split)
    shutil.rmtree(staging.codec, ignore_errors=True)
    codec.save(staging.codec)
    write_atomic(staging.codec_json, info.model_dump_json().encode())
    return info


def _fit_or_open(staging: Staging, config: VideoCodecConfig, fit: Sequence[ClipRef]) -> VideoCodec:
    if config.kind == "wan":
        assert config.folder is not None  # the config's validator has seen to it
        return WanCodec(config.folder, config.dtype)
    clips = (torch.from_numpy(video) for video in videos(staging, fit))
    return EmbeddedCodec.fit(clips, patch=config.patch, channels=config.channels)


def videos(staging: Staging, refs: Sequence[ClipRef]) -> Iterator[np.ndarray]:
    """Every view of these clips, uint8 [f h w 3]."""
    for source, episode, position in refs:
        clip = staging.read_curated(source, episode).clips[position]
        members = staging.read_members(staging.curated_tar(source, episode), clip.offset, clip.num_bytes)
        for suffix in sorted(members):
            if suffix.endswith(".mp4"):
                yield decode_clip(members[suffix])


def measure_codec(codec: VideoCodec, clips: Iterator[np.ndarray], split: Split) -> CodecInfo:
    """PSNR of encode-decode over all pixels, and over those that move: a still background flatters every codec."""
    error = PixelError()
    num_clips = 0
    for video in clips:
        decoded = codec.decode(codec.encode(torch.from_numpy(video)[None]))[0].numpy()
        error.add(decoded, video, moving_pixels(video))
        num_clips += 1
    if not num_clips:
        raise UserError("There are no clips to measure the video codec on; check the sources of the build.")
    return CodecInfo(
        name=codec.name,
        weight_hash=codec.weight_hash,
        temporal_stride=codec.temporal_stride,
        spatial_stride=codec.spatial_stride,
        latent_channels=codec.latent_channels,
        psnr=error.psnr,
        psnr_moving=error.psnr_moving,
        psnr_split=split,
        psnr_num_clips=num_clips,
    )


class EncodeEpisode:
    """Worker: `{"source": …, "episode": …}` -> number of clips encoded."""

    def __init__(self, plan: EncodePlan) -> None:
        self.staging = Staging(plan.staging)
        self.codec = load_video_codec(self.staging.codec)
        text_encoder = load_text_encoder(self.staging.text_encoder)
        if plan.use_gpu:
            for encoder in (self.codec, text_encoder):
                if isinstance(encoder, WanCodec | T5TextEncoder):  # the embedded ones gain nothing from it
                    encoder.to("cuda")
        self._encode_text = lru_cache(maxsize=4096)(lambda text: _text_bytes(text_encoder, text))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        record = self.staging.read_curated(row["source"], row["episode"])
        tar = self.staging.encoded_tar(row["source"], row["episode"])
        clips: list[tuple[str, int, int]] = []
        with TarWriter(tar) as writer:
            for members in self.staging.curated_members(record):
                records = tar_records(self._encode(members))
                clips.append((members["__key__"], writer.add(records), len(records)))
        write_record(tar, EncodedRecord(clips=tuple(clips)))
        return {"clips": len(clips)}

    def _encode(self, members: dict[str, Any]) -> dict[str, Any]:
        encoded = {"__key__": members["__key__"]}
        for suffix in members:
            if suffix.endswith(".mp4"):
                video = torch.from_numpy(decode_clip(members[suffix]))
                latents = self.codec.encode(video[None])[0].to(torch.bfloat16)
                encoded[suffix.removesuffix("mp4") + "latents.safetensors"] = tensor_bytes("latents", latents)
        captions = SampleMeta.model_validate_json(members["meta.json"]).captions
        if captions:
            encoded["text.safetensors"] = self._encode_text(captions[0])
        return encoded


def _text_bytes(encoder: TextEncoder, text: str) -> bytes:
    return tensor_bytes("text", encoder.encode([text])[0].to("cpu", torch.bfloat16))
