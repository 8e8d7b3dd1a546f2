"""Staged clips -> latents, text embeddings and captioned meta, with the frozen encoders stored beside the dataset.

The video is decoded from the mp4 that the dataset holds, not from the recording: what is stored and what is trained on
agree to the pixel. Each clip is encoded alone, so that its bytes depend on no other clip.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from configs.loader import StrictConfig, UserError

from .curate.captions import add_caption, read_captions
from .dataset import CodecInfo, Split, TextEncoderInfo
from .encoder_config import TextEncoderConfig, VideoCodecConfig
from .encoders import (
    EmbeddedCodec,
    T5TextEncoder,
    TextEncoder,
    VideoCodec,
    WanCodec,
    find_model_folder,
    load_text_encoder,
    load_video_codec,
)
from .one_thread import one_thread
from .sample import SampleMeta, tensor_bytes
from .shards import TarWriter, naming, tar_records, write_atomic
from .staging import (
    EncodedRecord,
    EpisodeRecord,
    StagedCodec,
    Staging,
    digest,
    forget_record,
    read_record,
    write_record,
)
from .video_io import ViewConfig, decode_clip
from .video_quality import PixelError, moving_pixels

logger = logging.getLogger(__name__)

ClipRef = tuple[str, str, int]
"""(source, episode, position among the episode's accepted clips)"""

MAX_FIT_CLIPS = 256
MAX_PSNR_CLIPS = 32


class EncodePlan(StrictConfig):
    staging: Path
    use_gpu: bool
    encoders: str = Field(description="Digest of the frozen encoders' weights.")
    captioner: str | None = Field(None, description="`CaptionPlan.captioner`, whose captions are to go in.")

    def captions(self, record: EpisodeRecord) -> dict[str, str]:
        """Clip key -> the caption that a model gave it."""
        return read_captions(self.staging, record, self.captioner)

    def identity(self, record: EpisodeRecord) -> str:
        """Of everything that an episode's latents and text follow from."""
        return digest(self.encoders, record.model_dump(mode="json"), self.captions(record))


def check_encoders(codec: VideoCodecConfig, text_encoder: TextEncoderConfig, views: Mapping[str, ViewConfig]) -> None:
    """Before hours of work rather than after: weights that are not there, sizes that the codec cannot take."""
    frozen = open_frozen_codec(codec)
    stride = frozen.spatial_stride if frozen else codec.patch
    for name, view in views.items():
        step = stride if stride % 2 == 0 else 2 * stride  # H.264 in 4:2:0 takes even sizes only
        if view.height % step or view.width % step:
            raise UserError(
                f"view {name} is {view.height}x{view.width} pixels, but codec {codec.kind} needs multiples of "
                f"{step}; change the view's height and width."
            )
    if text_encoder.folder is not None:
        find_model_folder(text_encoder.folder, "text_encoder")


def encoders_identity(codec: VideoCodec | CodecInfo, text_encoder: TextEncoder | TextEncoderInfo) -> str:
    return digest(codec.weight_hash, text_encoder.weight_hash)


def prepare_codec(
    staging: Staging, config: VideoCodecConfig, fit: Sequence[ClipRef], measure: Sequence[ClipRef], split: Split
) -> CodecInfo:
    """Fits or opens the codec, measures it on clips of `split`, and saves it into the staging folder."""
    frozen = open_frozen_codec(config)
    made_from = digest(
        config.model_dump(mode="json"),
        frozen.weight_hash if frozen else None,
        *_made_from(staging, fit, measure),
        split,
    )
    staged = read_record(staging.codec_json, StagedCodec)
    if staged is not None and staged.made_from == made_from:
        return staged.info
    logger.info("codec: %s", "measuring it" if frozen else "fitting it to the training clips")
    staging.codec_json.unlink(missing_ok=True)
    with one_thread():
        codec = frozen or _fit(staging, config, fit)
        info = measure_codec(codec, videos(staging, measure), split)
    stage_encoder(staging, codec, staging.codec)
    write_atomic(staging.codec_json, StagedCodec(info=info, made_from=made_from).model_dump_json().encode())
    return info


def open_frozen_codec(config: VideoCodecConfig) -> VideoCodec | None:
    """None where the codec is to be fitted to the dataset."""
    if config.kind == "embedded":
        return None if config.folder is None else EmbeddedCodec.load(config.folder)
    assert config.folder is not None  # the config's validator has seen to it
    return WanCodec(config.folder, config.dtype)


def _fit(staging: Staging, config: VideoCodecConfig, fit: Sequence[ClipRef]) -> VideoCodec:
    clips = (torch.from_numpy(video) for video in videos(staging, fit))
    return EmbeddedCodec.fit(clips, patch=config.patch, channels=config.channels)


def _made_from(staging: Staging, *lists: Sequence[ClipRef]) -> list[list[tuple[str, str]]]:
    records = {
        (source, episode): staging.read_curated(source, episode) for refs in lists for source, episode, _ in refs
    }
    return [
        [
            (records[source, episode].made_from, records[source, episode].clips[position].key)
            for source, episode, position in refs
        ]
        for refs in lists
    ]


def stage_encoder(staging: Staging, encoder: VideoCodec | TextEncoder, folder: Path) -> None:
    """Saves an encoder for the workers to load. Tasks of a job array may come at once: equal files stay as they are."""
    with staging.locked("encoders", wait=True), tempfile.TemporaryDirectory(dir=staging.root) as partial:
        fresh = Path(partial) / folder.name
        with naming(folder):
            encoder.save(fresh)
        if _contents(fresh) != _contents(folder):
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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
        self.plan = plan
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
        forget_record(tar)
        captions = self.plan.captions(record)
        clips: list[tuple[str, int, int]] = []
        with TarWriter(tar) as writer:
            for members in self.staging.curated_members(record):
                records = tar_records(self._encode(members, captions.get(members["__key__"])))
                clips.append((members["__key__"], writer.add(records), len(records)))
        write_record(tar, EncodedRecord(clips=tuple(clips), made_from=self.plan.identity(record)))
        return {"clips": len(clips)}

    def _encode(self, members: dict[str, Any], caption: str | None) -> dict[str, Any]:
        encoded = {"__key__": members["__key__"]}
        for suffix in members:
            if suffix.endswith(".mp4"):
                video = torch.from_numpy(decode_clip(members[suffix]))
                latents = self.codec.encode(video[None])[0].to(torch.bfloat16)
                encoded[suffix.removesuffix("mp4") + "latents.safetensors"] = tensor_bytes("latents", latents)
        meta = SampleMeta.model_validate_json(members["meta.json"])
        captioned = add_caption(meta, caption)
        if captioned != meta:  # `pack` takes it instead of the curated one
            encoded["meta.json"] = captioned.model_dump_json().encode()
        text = captioned.instruction or next(iter(captioned.captions), None)
        if text:
            encoded["text.safetensors"] = self._encode_text(text)
        return encoded


def _text_bytes(encoder: TextEncoder, text: str) -> bytes:
    return tensor_bytes("text", encoder.encode([text])[0].to("cpu", torch.bfloat16))
