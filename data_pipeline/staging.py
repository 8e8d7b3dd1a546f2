"""Work of a build: `<out>.staging/`, one pair of files per episode and stage.

    curated/<source>/<episode>.tar      the clips' mp4, actions, proprio and meta
    curated/<source>/<episode>.json     `EpisodeRecord`, written last: the episode is done
    embedded/<source>/<episode>.safetensors  the clips' embeddings, where `duplicates.semantic` asks for them
    embedded/<source>/<episode>.json    `EmbeddedRecord`, written last
    encoded/<source>/<episode>.tar      the clips' latents and text
    encoded/<source>/<episode>.json     `EncodedRecord`, written last
    codec/  text_encoder/  codec.json   the frozen encoders, and `StagedCodec`, written last
    partitions/<i>-of-<n>.json          written last by a task of a job array
    attempts/<run>/<source>/<episode>   a byte per attempt: what ends its worker process is not tried for ever

Every file is renamed into place when complete, and every record says what it was made from (`made_from`, a digest of
recording and settings). So a build that was killed at any moment, or whose recordings or settings have changed since,
redoes what no longer fits and keeps the rest.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from configs.loader import StrictConfig, UserError

from .dataset import CodecInfo
from .shards import END_OF_TAR, ShardError, ShardReader, read_records, write_atomic
from .sources.base import printable

PrintableText = Annotated[str, BeforeValidator(printable)]
"""Of file names and damaged files, which need not be UTF-8: this is."""


class StagedClip(StrictConfig):
    """An accepted clip: its place in the episode and in the curated tar."""

    key: str
    clip_index: int
    start_s: float
    motion: float
    offset: int
    num_bytes: int
    phash: str = ""


class Rejection(StrictConfig):
    """A clip, or a whole episode (no clip_index), that did not make it."""

    where: PrintableText
    reason: str
    detail: PrintableText
    clip_index: int | None = None


class EpisodeRecord(StrictConfig):
    """What became of one episode. found = accepted + rejected clips."""

    source: str
    episode: str
    content_sha256: str | None
    embodiment: str | None
    has_actions: bool
    has_instruction: bool
    resolution: int = Field(description="Shorter side of what was recorded, in the smallest view; 0: not read.")
    found: int
    clips: tuple[StagedClip, ...]
    rejected: tuple[Rejection, ...]
    repairs: tuple[str, ...]
    video_sha256: str | None = None
    made_from: str = ""


class EncodedRecord(StrictConfig):
    """The same clips in the encoded tar, in the same order: (key, offset, num_bytes)."""

    clips: tuple[tuple[str, int, int], ...]
    made_from: str = ""


class EmbeddedRecord(StrictConfig):
    """An embedding per clip of the episode, in the same order, lies beside it."""

    made_from: str


class StagedCodec(StrictConfig):
    info: CodecInfo
    made_from: str


class PartitionRecord(StrictConfig):
    """A task of a job array has done its part."""

    made_from: str


class BusyError(UserError):
    """Another process works on the same folder."""


RecordT = TypeVar("RecordT", bound=StrictConfig)


def digest(*parts: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_record(path: Path, kind: type[RecordT]) -> RecordT | None:
    """None where there is none, or one of another version."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class Staging:
    """File names below the staging folder, and atomic reading and writing of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.codec = root / "codec"
        self.codec_json = root / "codec.json"
        self.text_encoder = root / "text_encoder"
        self.packed = root / "packed"
        self._reader = ShardReader(root, max_open=32)

    def curated_tar(self, source: str, episode: str) -> Path:
        return self.root / "curated" / source / f"{episode}.tar"

    def encoded_tar(self, source: str, episode: str) -> Path:
        return self.root / "encoded" / source / f"{episode}.tar"

    def embedded_file(self, source: str, episode: str) -> Path:
        return self.root / "embedded" / source / f"{episode}.safetensors"

    def partition(self, index: int, count: int) -> Path:
        return self.root / "partitions" / f"{index}-of-{count}.json"

    # A record without its file is none: a staging folder may have been copied, and not all of it.

    def find_curated(self, source: str, episode: str) -> EpisodeRecord | None:
        tar = self.curated_tar(source, episode)
        record = read_record(tar.with_suffix(".json"), EpisodeRecord)
        ends = [clip.offset + clip.num_bytes for clip in record.clips] if record else []
        return record if _holds(tar, max(ends, default=0) + len(END_OF_TAR)) else None

    def find_encoded(self, source: str, episode: str) -> EncodedRecord | None:
        tar = self.encoded_tar(source, episode)
        record = read_record(tar.with_suffix(".json"), EncodedRecord)
        ends = [offset + num_bytes for _, offset, num_bytes in record.clips] if record else []
        return record if _holds(tar, max(ends, default=0) + len(END_OF_TAR)) else None

    def find_embedded(self, source: str, episode: str) -> EmbeddedRecord | None:
        path = self.embedded_file(source, episode)
        return read_record(path.with_suffix(".json"), EmbeddedRecord) if path.is_file() else None

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
        try:
            return read_records(self._reader.read(str(tar.relative_to(self.root)), offset, num_bytes))
        except ShardError as error:
            raise UserError(f"{tar}: {error}; delete the file and start the same command again.") from error

    def curated_members(self, record: EpisodeRecord) -> Iterator[dict[str, Any]]:
        tar = self.curated_tar(record.source, record.episode)
        for clip in record.clips:
            yield self.read_members(tar, clip.offset, clip.num_bytes)

    @contextmanager
    def locked(self, name: str, *, is_shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Holds the folder's lock of this name; BusyError where somebody else does. It goes with its process."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{name}.lock").open("w") as file:
            kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            try:
                fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"{self.root}: another build is at work there; wait for it or choose another `out`."
                ) from None
            yield

    def keep_only(self, listing: Mapping[str, Collection[str]]) -> None:
        """Drops the work on episodes that are no longer there, and what a killed build has left half-written."""
        for stage in ("curated", "captions", "embedded", "encoded"):
            for path in (self.root / stage).glob("*/*"):
                if path.name.startswith(".") or path.stem not in listing.get(path.parent.name, ()):
                    path.unlink()
        for folder in (self.packed, self.root / "attempts"):
            shutil.rmtree(folder, ignore_errors=True)


def _holds(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def write_record(beside: Path, record: EpisodeRecord | EmbeddedRecord | EncodedRecord) -> None:
    write_atomic(beside.with_suffix(".json"), record.model_dump_json().encode())


def forget_record(beside: Path) -> None:
    """Before its file is replaced: a record must never stand beside another file than its own."""
    beside.with_suffix(".json").unlink(missing_ok=True)
