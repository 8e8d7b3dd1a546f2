"""Work in progress of a build: `<out>.staging/`, one pair of files per episode and stage.

    build.json                          what is being built; a staging folder of another build is never continued
    curated/<source>/<episode>.tar      the clips' mp4, actions, proprio and meta
    curated/<source>/<episode>.json     `EpisodeRecord`, written last: the episode is done
    encoded/<source>/<episode>.tar      the clips' latents and text
    encoded/<source>/<episode>.json     `EncodedRecord`, written last
    codec/  text_encoder/  codec.json   the frozen encoders, and the codec's `CodecInfo`, written last
    attempts/<run>/<source>/<episode>   a byte per attempt: what ends its worker process is not tried for ever

Every file is renamed into place when complete, so a build that was killed at any moment continues from here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.loader import StrictConfig

from .shards import ShardReader, read_records, write_atomic


class StagedClip(StrictConfig):
    """An accepted clip: its place in the episode and in the curated tar."""

    key: str
    clip_index: int
    start_s: float
    motion: float
    offset: int
    num_bytes: int


class Rejection(StrictConfig):
    """A clip, or a whole episode (no clip_index), that did not make it."""

    where: str
    reason: str
    detail: str
    clip_index: int | None = None


class EpisodeRecord(StrictConfig):
    """What became of one episode. found = accepted + rejected clips."""

    source: str
    episode: str
    content_sha256: str | None
    embodiment: str | None
    has_actions: bool
    found: int
    clips: tuple[StagedClip, ...]
    rejected: tuple[Rejection, ...]
    repairs: tuple[str, ...]


class EncodedRecord(StrictConfig):
    """The same clips in the encoded tar, in the same order: (key, offset, num_bytes)."""

    clips: tuple[tuple[str, int, int], ...]


class Staging:
    """File names below the staging folder, and atomic reading and writing of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.build_json = root / "build.json"
        self.codec = root / "codec"
        self.codec_json = root / "codec.json"
        self.text_encoder = root / "text_encoder"
        self.packed = root / "packed"
        self._reader = ShardReader(root, max_open=32)

    def curated_tar(self, source: str, episode: str) -> Path:
        return self.root / "curated" / source / f"{episode}.tar"

    def encoded_tar(self, source: str, episode: str) -> Path:
        return self.root / "encoded" / source / f"{episode}.tar"

    def is_curated(self, source: str, episode: str) -> bool:
        return self.curated_tar(source, episode).with_suffix(".json").is_file()

    def is_encoded(self, source: str, episode: str) -> bool:
        return self.encoded_tar(source, episode).with_suffix(".json").is_file()

    def begin_attempt(self, run: str, source: str, episode: str) -> int:
        """The number of this attempt at an episode. It stays on disk when the process that makes it does not."""
        path = self.root / "attempts" / run / source / episode
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
            return file.tell()

    def read_curated(self, source: str, episode: str) -> EpisodeRecord:
        return EpisodeRecord.model_validate_json(self.curated_tar(source, episode).with_suffix(".json").read_bytes())

    def read_encoded(self, source: str, episode: str) -> EncodedRecord:
        return EncodedRecord.model_validate_json(self.encoded_tar(source, episode).with_suffix(".json").read_bytes())

    def read_members(self, tar: Path, offset: int, num_bytes: int) -> dict[str, Any]:
        return read_records(self._reader.read(str(tar.relative_to(self.root)), offset, num_bytes))

    def curated_members(self, record: EpisodeRecord) -> Iterator[dict[str, Any]]:
        tar = self.curated_tar(record.source, record.episode)
        for clip in record.clips:
            yield self.read_members(tar, clip.offset, clip.num_bytes)


def write_record(tar: Path, record: EpisodeRecord | EncodedRecord) -> None:
    write_atomic(tar.with_suffix(".json"), record.model_dump_json().encode())
