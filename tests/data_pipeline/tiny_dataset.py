"""A small dataset folder in milliseconds: staged by hand, packed by the real code, no recordings and no Ray.

Samples say who they are: every latent, action and proprio number of clip `c` of episode `e` is `100 e + c`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_pipeline.curate.episode import rejected_episode
from data_pipeline.dataset import DatasetInfo
from data_pipeline.embodiments import Embodiment
from data_pipeline.encode import measure_codec
from data_pipeline.encoders import EmbeddedCodec, HashedTextEncoder
from data_pipeline.pack import assign_splits, count, pack
from data_pipeline.preview import write_report
from data_pipeline.sample import SCHEMA_VERSION, Sample, SampleMeta, SourceMeta, ViewMeta
from data_pipeline.shards import TarWriter, tar_records
from data_pipeline.staging import EncodedRecord, EpisodeRecord, Rejection, StagedClip, Staging, write_record
from data_pipeline.video_io import ViewConfig, encode_video

VIEW = ViewConfig(height=16, width=16)
VIEWS = {"front": VIEW}
NUM_FRAMES, FPS, ACTIONS_PER_FRAME, CHANNELS = 5, 10.0, 2, 6
ROBOT = Embodiment(name="arm", action_names=("x", "y", "gripper"), proprio_names=("x", "y"), control_hz=20.0)


def tiny_sample(
    episode: int,
    clip: int,
    *,
    has_actions: bool = True,
    text: str | None = "push it",
    robot: Embodiment = ROBOT,
    source: str = "lab",
    views: Mapping[str, ViewConfig] = VIEWS,
    num_frames: int = NUM_FRAMES,
) -> Sample:
    number = float(100 * episode + clip)
    num_actions = (num_frames - 1) * ACTIONS_PER_FRAME
    meta = SampleMeta(
        schema_version=SCHEMA_VERSION,
        source=SourceMeta(name=source, uri=f"{source}/{episode}", licence=None, sha256=f"{episode:064d}"),
        episode=f"episode_{episode}",
        clip_index=clip,
        start_s=float(clip),
        fps=FPS,
        control_hz=FPS * ACTIONS_PER_FRAME if has_actions else None,
        num_frames=num_frames,
        views={name: ViewMeta(height=v.height, width=v.width, role="external") for name, v in views.items()},
        embodiment=robot.name if has_actions else None,
        instruction=text,
        captions=(text,) if text else (),
        has_actions=has_actions,
        success=None,
        action_spans=((0, num_actions),) if has_actions else (),
        filter_scores={"motion": 0.25},
    )
    shapes = {name: (view.height, view.width) for name, view in views.items()}
    level, num_latent_frames = (episode * 16 + clip) % 256, 1 + (num_frames - 1) // 4
    return Sample(
        key=f"key{episode:03d}-{clip:04d}",
        meta=meta,
        video={
            name: encode_video(np.full((num_frames, *shape, 3), (level + 50 * v) % 256, np.uint8), None, FPS)
            for v, (name, shape) in enumerate(shapes.items())
        },
        latents={
            name: torch.full((num_latent_frames, CHANNELS, height // 4, width // 4), number, dtype=torch.bfloat16)
            for name, (height, width) in shapes.items()
        },
        text=HashedTextEncoder(8).encode([text])[0].to(torch.bfloat16) if text else None,
        actions=np.full((num_actions, robot.action_dim), number, dtype=np.float32) if has_actions else None,
        proprio=np.full((num_actions, robot.proprio_dim), number, dtype=np.float32) if has_actions else None,
    )


def tiny_codec() -> EmbeddedCodec:
    basis = torch.rand(192, CHANNELS, generator=torch.Generator().manual_seed(0))
    return EmbeddedCodec(torch.zeros(192), basis, 1.0, patch=4)


def tiny_dataset(
    folder: Path,
    clips: Sequence[int] = (3, 4, 2),
    action_free: Sequence[int] = (),
    max_shard_mb: int = 1,
    robot: Embodiment = ROBOT,
    sources: Sequence[str] = (),
    views: Mapping[str, ViewConfig] = VIEWS,
    num_frames: int = NUM_FRAMES,
    make_sample: Callable[..., Sample] = tiny_sample,
    first_episode: int = 0,
) -> Path:
    """`clips[e]` clips in episode e; the episodes in `action_free` have no actions. One rejected episode besides.

    `sources[e]` is where episode e is from; by default all are from the lab. `make_sample` takes what
    `tiny_sample` does. Episodes are counted from `first_episode`.
    """
    staging = Staging(folder.with_name(folder.name + ".staging"))
    source_of = sources or ["lab"] * len(clips)
    kind = {"robot": robot, "views": views, "num_frames": num_frames}
    records = [
        _stage(
            staging,
            first_episode + e,
            number,
            partial(make_sample, has_actions=e not in action_free, source=source_of[e], **kind),
        )
        for e, number in enumerate(clips)
    ]
    rejection = Rejection(where="lab/broken", reason="not_a_video", detail="it is a text file")
    records.append(rejected_episode("lab", "broken", rejection))
    splits = assign_splits(records, 0.2)
    codec, encoder = tiny_codec(), HashedTextEncoder(8)
    video = np.zeros((num_frames, 16, 16, 3), dtype=np.uint8)
    info = DatasetInfo(
        schema_version=SCHEMA_VERSION,
        code_version="test",
        num_frames=num_frames,
        fps=FPS,
        actions_per_frame=ACTIONS_PER_FRAME,
        control_hz=FPS * ACTIONS_PER_FRAME,
        views=dict(views),
        embodiments={} if len(action_free) == len(clips) else {robot.name: robot},
        codec=measure_codec(codec, iter([video]), "train"),
        text_encoder={"name": encoder.name, "weight_hash": encoder.weight_hash, "width": encoder.width},
        counts=count(records),
        sources={
            name: {"episodes": len(records), "listing_sha256": "0" * 64, "content_sha256": "0" * 64}
            for name in sorted({"lab", *source_of})
        },
        build={"sources": {name: {"licence": None} for name in sorted({"lab", *source_of})}},
    )
    packed = pack(staging, records, splits, info, max_shard_mb)
    codec.save(packed / "codec")
    encoder.save(packed / "text_encoder")
    packed.rename(folder)
    write_report(folder)
    return folder


def _stage(staging: Staging, episode: int, num_clips: int, make_sample: Callable[..., Sample]) -> EpisodeRecord:
    name, meta = f"episode_{episode}", make_sample(episode, 0).meta
    source = meta.source.name
    curated, encoded = staging.curated_tar(source, name), staging.encoded_tar(source, name)
    clips, rows = [], []
    with TarWriter(curated) as curated_writer, TarWriter(encoded) as encoded_writer:
        for clip in range(num_clips):
            sample = make_sample(episode, clip)
            members = sample.to_members()
            later = {name for name in members if name.endswith(".safetensors")} | {"__key__"}
            first = tar_records(
                {name: data for name, data in members.items() if name == "__key__" or name not in later}
            )
            second = tar_records({name: members[name] for name in later})
            place = {"offset": curated_writer.add(first), "num_bytes": len(first)}
            clips.append(StagedClip(key=sample.key, clip_index=clip, start_s=float(clip), motion=0.25, **place))
            rows.append((sample.key, encoded_writer.add(second), len(second)))
    write_record(encoded, EncodedRecord(clips=tuple(rows)))
    return EpisodeRecord(
        source=source,
        episode=name,
        content_sha256=f"{episode:064d}",
        embodiment=meta.embodiment,
        has_actions=meta.has_actions,
        has_instruction=True,
        resolution=16,
        found=num_clips,
        clips=tuple(clips),
        rejected=(),
        repairs=(),
    )
