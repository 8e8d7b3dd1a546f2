"""One embedding per staged clip, by CLIP, to find clips that mean the same.

The frames are those of the mp4 that the dataset holds, so nothing is read of the recording again. A clip's embedding is
the mean over a few frames of each of its views, of length 1.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field

from configs.loader import StrictConfig

from ..sample import read_tensor, tensor_bytes
from ..shards import write_atomic
from ..staging import EmbeddedRecord, EpisodeRecord, Staging, digest, forget_record, write_record
from ..video_io import decode_clip
from .captioners import grey_clip
from .clip_embedding import ClipEmbedder, hash_clip
from .duplicates import SemanticConfig, import_faiss

EMBEDDINGS = "embeddings"
"""The tensor's name in an episode's file: float32 [n d], a row per clip."""


class EmbedPlan(StrictConfig):
    """All that a worker needs to know."""

    staging: Path
    clip: Path
    frames: int
    embedder: str = Field(description="Digest of all that an embedding follows from, besides the clip.")
    use_gpu: bool

    def identity(self, record: EpisodeRecord) -> str:
        """Of everything that an episode's embeddings follow from."""
        return digest(self.embedder, record.model_dump(mode="json"))

    def is_due(self, record: EpisodeRecord) -> bool:
        """Whether an episode's embeddings are missing, or of other clips or settings."""
        staged = Staging(self.staging).find_embedded(record.source, record.episode)
        return bool(record.clips) and (staged is None or staged.made_from != self.identity(record))


def plan_embeddings(config: SemanticConfig | None, staging: Path, *, use_gpu: bool) -> EmbedPlan | None:
    """None where clips are not compared by what they mean.

    UserError, in one sentence and before hours of work, for weights that will not do, and without faiss.
    """
    if config is None:
        return None
    import_faiss()
    ClipEmbedder(config.clip).embed(grey_clip(1, 32, 32), 1)
    return EmbedPlan(
        staging=staging,
        clip=config.clip.absolute(),  # because a worker's working directory may be another
        frames=config.frames,
        embedder=digest(hash_clip(config.clip), config.frames),
        use_gpu=use_gpu,
    )


class EmbedEpisode:
    """Worker: `{"source": …, "episode": …}` -> number of clips embedded."""

    def __init__(self, plan: EmbedPlan) -> None:
        self.plan = plan
        self.staging = Staging(plan.staging)
        self._clip = ClipEmbedder(plan.clip, "cuda" if plan.use_gpu else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        record = self.staging.read_curated(row["source"], row["episode"])
        embeddings = np.stack([self._embed(members) for members in self.staging.curated_members(record)])
        path = self.staging.embedded_file(record.source, record.episode)
        forget_record(path)
        write_atomic(path, tensor_bytes(EMBEDDINGS, torch.from_numpy(embeddings)))
        write_record(path, EmbeddedRecord(made_from=self.plan.identity(record)))
        return {"clips": len(embeddings)}

    def _embed(self, members: dict[str, Any]) -> Float32[np.ndarray, "d"]:
        videos = (decode_clip(members[suffix]) for suffix in members if suffix.endswith(".mp4"))
        units = np.concatenate([self._clip.embed(video, self.plan.frames) for video in videos])
        mean = units.mean(axis=0)
        return mean / max(np.linalg.norm(mean), 1e-12)


def read_embeddings(plan: EmbedPlan, records: Iterable[EpisodeRecord]) -> dict[str, Float32[np.ndarray, "d"]]:
    """Clip key -> embedding, of all clips of episodes none of which is due."""
    staging = Staging(plan.staging)
    found: dict[str, Float32[np.ndarray, "d"]] = {}
    for record in records:
        data = staging.embedded_file(record.source, record.episode).read_bytes()
        rows = read_tensor(EMBEDDINGS, data).numpy()
        found |= {clip.key: row for clip, row in zip(record.clips, rows, strict=True)}
    return found
