"""Build a dataset: sources -> curated, aligned, encoded WebDataset shards with manifest, norm stats and report.

Runs on Ray, on this machine or on a cluster. A build that was killed continues where it was when started again with
the same config; a finished one says so. The same recordings and config give the same bytes.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
import tomllib
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, field_validator

from configs.loader import StrictConfig, UserError, run_command

from . import preview, ray_job
from .align import actions_per_frame
from .curate.episode import CurateEpisode, CuratePlan, SourcePlan, view_name
from .dataset import (
    CODEC,
    DATASET_YAML,
    SPLITS,
    TEXT_ENCODER,
    CodecInfo,
    Counts,
    DatasetInfo,
    SourceInfo,
    Split,
    TextEncoderInfo,
    read_info,
)
from .embodiments import Embodiment
from .encode import MAX_FIT_CLIPS, MAX_PSNR_CLIPS, ClipRef, EncodeEpisode, EncodePlan, prepare_codec
from .encoders import (
    TEMPORAL_STRIDE,
    TextEncoderConfig,
    VideoCodecConfig,
    WanCodec,
    create_text_encoder,
    find_model_folder,
)
from .one_thread import one_thread
from .pack import assign_splits, count, pack
from .progress import track
from .sample import SCHEMA_VERSION, VIEW_NAME
from .shards import write_atomic
from .sources import AnySourceConfig, Source, SourceError, open_source
from .staging import EpisodeRecord, Staging
from .video_io import ViewConfig

logger = logging.getLogger(__name__)

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class BuildConfig(StrictConfig):
    """What to build from what."""

    sources: dict[SourceName, AnySourceConfig] = Field(min_length=1, description="The recording sets, by name.")
    out: Path = Field(description="The dataset folder to write; `<out>.staging` holds the work in progress.")

    views: dict[str, ViewConfig] | None = Field(
        None, description="The dataset's views; null: all views of the first source, at `height` x `width`."
    )
    height: PositiveInt = Field(64, description="Of every view, where `views` is null.")
    width: PositiveInt = Field(64, description="Of every view, where `views` is null.")
    clip_frames: PositiveInt = Field(17, description="Frames per clip: 5, 9, 13, 17, …")
    stride: PositiveInt | None = Field(
        None,
        description="Frames from one clip's start to the next; null: clip_frames - 1, so each action is in one clip.",
    )
    fps: PositiveFloat | None = Field(None, description="Of the clips; null: the first action-labelled source's own.")
    actions_per_frame: PositiveInt | None = Field(
        None,
        le=1000,
        description="Actions from one frame to the next; null: what comes nearest to the robot's control rate.",
    )
    validation_share: float = Field(0.1, ge=0, le=0.9, description="Share of episodes held out, chosen by hash.")
    crf: int = Field(18, ge=0, le=51, description="H.264 quality of the stored clips; lower is better and larger.")
    codec: VideoCodecConfig = VideoCodecConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    max_shard_mb: PositiveInt = Field(256, description="Size of a shard, unless one sample is larger.")

    # How it is run: not part of what is built.
    num_workers: PositiveInt | None = Field(None, description="Worker processes; null: one per CPU core.")
    gpus: NonNegativeInt = Field(0, description="GPUs for encoding, one worker each; 0: encode on the CPU.")
    ray_address: str | None = Field(None, description="Of a Ray cluster that sees the same files; null: this machine.")
    object_store_mb: PositiveInt = Field(128, description="Ray's shared memory on this machine; rows are tiny.")
    overwrite: bool = Field(False, description="Replace a dataset or an interrupted build of another config.")

    @field_validator("clip_frames")
    @classmethod
    def _fits_the_codecs(cls, frames: int) -> int:
        if frames < 1 + TEMPORAL_STRIDE or (frames - 1) % TEMPORAL_STRIDE:
            raise ValueError("the video codecs take 5, 9, 13, 17, … frames")
        return frames

    @field_validator("views")
    @classmethod
    def _names_fit_the_shards(cls, views: dict[str, ViewConfig] | None) -> dict[str, ViewConfig] | None:
        if views is not None and not views:
            raise ValueError("give at least one view, or null for all views of the first source")
        for name in views or ():
            if not VIEW_NAME.fullmatch(name):
                raise ValueError(
                    f"view name {name!r}: lower-case letters, digits, _ and - only (a shard's member names)"
                )
        return views


HOW_IT_IS_RUN = {"out", "num_workers", "gpus", "ray_address", "object_store_mb", "overwrite"}


def main(config: BuildConfig) -> int:
    started = time.monotonic()
    sources, listing = _open_sources(config)
    build = _identity(config)
    inputs = {name: _source_info(episodes) for name, episodes in listing.items()}
    if _is_up_to_date(config, build, inputs):
        logger.info("%s is up to date: the same config over the same recordings built it", config.out)
        return 0
    plan = _resolve(config, sources, listing)
    _check_encoders(config, plan.views)

    staging = Staging(plan.staging)
    with _exclusive(plan.staging):
        _start_or_continue(config, staging, {"build": build, "sources": _plain(inputs)})
        num_workers = config.num_workers or os.cpu_count() or 1
        with ray_job.ray_session(config.ray_address, num_workers, config.object_store_mb):
            ray_job.check_gpus(config.gpus)
            records = _curate(plan, staging, listing, num_workers)
            counts = count(records)
            if not counts.accepted:
                shutil.rmtree(staging.root)  # there is nothing in it to go on from
                raise _nothing_accepted(records, counts)
            splits = assign_splits(records, config.validation_share)
            codec = _prepare_codec(config, staging, records, splits)
            text_encoder = _prepare_text_encoder(config, staging)
            _encode(config, staging, records, num_workers)
        info = DatasetInfo(
            schema_version=SCHEMA_VERSION,
            code_version=code_version(),
            num_frames=plan.num_frames,
            fps=plan.fps,
            actions_per_frame=plan.actions_per_frame,
            control_hz=plan.fps * plan.actions_per_frame,
            views=plan.views,
            embodiments=_used_embodiments(plan, records),
            codec=codec,
            text_encoder=text_encoder,
            counts=counts,
            sources=inputs,
            build=build,
        )
        _pack(config, staging, records, splits, info)
    logger.info(
        "%s: %d clips of %d found (%d rejected), %.0f s; look at %s",
        config.out,
        counts.accepted,
        counts.found,
        counts.rejected,
        time.monotonic() - started,
        config.out / "report.html",
    )
    return 0


def code_version() -> str:
    try:
        return importlib.metadata.version("foresight-wam")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]


# --- what is to be built ------------------------------------------------------------------------------------------


def _identity(config: BuildConfig) -> dict[str, Any]:
    """The part of the config that the bytes follow from."""
    return config.model_dump(mode="json", exclude=HOW_IT_IS_RUN)


def _plain(inputs: Mapping[str, SourceInfo]) -> dict[str, Any]:
    return {name: one.model_dump() for name, one in inputs.items()}


def _open_sources(config: BuildConfig) -> tuple[dict[str, Source], dict[str, list[str]]]:
    sources: dict[str, Source] = {}
    listing: dict[str, list[str]] = {}
    for name, source in config.sources.items():
        if source.name not in (None, name):
            raise UserError(f"sources.{name}.name={source.name}: a source is named by its key; leave `name` out.")
        sources[name] = open_source(_reader_config(name, source))
        listing[name] = sources[name].list_episodes()[: source.max_episodes]
        if not listing[name]:
            raise UserError(f"sources.{name}: {source.path} holds no episodes; check the path.")
    return sources, listing


def _reader_config(name: str, source: AnySourceConfig) -> AnySourceConfig:
    """What travels to the workers: absolute, because a worker's folder may be another."""
    return source.model_copy(update={"name": name, "path": source.path.absolute()})


def _source_info(episodes: Sequence[str]) -> SourceInfo:
    digest = hashlib.sha256("\n".join(episodes).encode()).hexdigest()
    return SourceInfo(episodes=len(episodes), listing_sha256=digest)


def _resolve(config: BuildConfig, sources: Mapping[str, Source], listing: Mapping[str, list[str]]) -> CuratePlan:
    """Settles what the config leaves open, from the sources themselves."""
    embodiments = {name: source.embodiment() for name, source in sources.items()}
    _check_embodiments(embodiments)
    labelled = [name for name, embodiment in embodiments.items() if embodiment is not None]
    main_source = labelled[0] if labelled else next(iter(sources))
    fps = config.fps or _first_readable(sources[main_source], listing[main_source]).fps
    control_hz = next((e.control_hz for e in embodiments.values() if e is not None), fps)
    return CuratePlan(
        staging=config.out.absolute().with_name(config.out.name + ".staging"),
        run=uuid.uuid4().hex,
        sources={
            name: SourcePlan(config=_reader_config(name, source), embodiment=embodiments[name])
            for name, source in config.sources.items()
        },
        views=config.views or _views_of_first_source(config, sources, listing),
        num_frames=config.clip_frames,
        fps=fps,
        stride=config.stride or config.clip_frames - 1,
        actions_per_frame=config.actions_per_frame or actions_per_frame(control_hz, fps),
        crf=config.crf,
    )


def _first_readable(source: Source, episodes: Iterable[str]) -> Any:
    error: SourceError | None = None
    for episode_id in episodes:
        try:
            return source.read_episode(episode_id)
        except SourceError as one:
            error = error or one
    assert error is not None
    raise UserError(
        f"source {source.name}: none of its episodes can be read, the first because of {error.reason} "
        f"({error.where}: {error.detail}); `python -m data_pipeline.doctor` lists what is wrong with it."
    )


def _views_of_first_source(
    config: BuildConfig, sources: Mapping[str, Source], listing: Mapping[str, list[str]]
) -> dict[str, ViewConfig]:
    name, source = next(iter(sources.items()))
    recorded = _first_readable(source, listing[name]).views
    view_map = config.sources[name].view_map or {view: view_name(view) for view in recorded}
    names = [view_map[view] for view in recorded if view in view_map]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"sources.{name}: its views {', '.join(recorded) or '(none)'} cannot be told apart by name; "
            "set `views` and `view_map`."
        )
    return {view: ViewConfig(height=config.height, width=config.width) for view in names}


def _check_embodiments(embodiments: Mapping[str, Embodiment | None]) -> None:
    seen: dict[str, tuple[str, Embodiment]] = {}
    for source, embodiment in embodiments.items():
        if embodiment is None:
            continue
        other, known = seen.setdefault(embodiment.name, (source, embodiment))
        if (known.action_names, known.proprio_names) != (embodiment.action_names, embodiment.proprio_names):
            raise UserError(
                f"sources {other} and {source} both call their robot {embodiment.name!r}, but its actions or proprio "
                f"are laid out differently; give sources.{source}.embodiment another name."
            )


def _used_embodiments(plan: CuratePlan, records: Sequence[EpisodeRecord]) -> dict[str, Embodiment]:
    used = {record.embodiment for record in records if record.clips}
    known = {s.embodiment.name: s.embodiment for s in plan.sources.values() if s.embodiment is not None}
    return {name: known[name] for name in sorted(known) if name in used}


def _check_encoders(config: BuildConfig, views: Mapping[str, ViewConfig]) -> None:
    """Before hours of work rather than after: weights that are not there, sizes that the codec cannot take."""
    stride = config.codec.patch
    if config.codec.kind == "wan":
        assert config.codec.folder is not None  # the config's validator has seen to it
        stride = WanCodec(config.codec.folder, config.codec.dtype).spatial_stride
    for name, view in views.items():
        step = stride if stride % 2 == 0 else 2 * stride  # H.264 in 4:2:0 takes even sizes only
        if view.height % step or view.width % step:
            raise UserError(
                f"view {name} is {view.height}x{view.width} pixels, but codec {config.codec.kind} needs multiples of "
                f"{step}; change the view's height and width."
            )
    if config.text_encoder.folder is not None:
        find_model_folder(config.text_encoder.folder, "text_encoder")


# --- what is there already ----------------------------------------------------------------------------------------


def _is_up_to_date(config: BuildConfig, build: dict[str, Any], inputs: Mapping[str, SourceInfo]) -> bool:
    out = config.out
    if not (out / DATASET_YAML).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a dataset, so it will not be touched; choose another `out`.")
        return False
    if config.overwrite:
        return False
    info = read_info(out)
    changed = _changed_keys(info.build, build)
    if not changed and info.sources == inputs:
        return True
    what = f"another config ({', '.join(changed)} changed)" if changed else "other recordings (episodes came or went)"
    raise UserError(
        f"{out}: holds a dataset built from {what}; choose another `out`, or replace it with overwrite=true."
    )


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _start_or_continue(config: BuildConfig, staging: Staging, identity: dict[str, Any]) -> None:
    identity = identity | {"schema_version": SCHEMA_VERSION, "code_version": code_version()}
    if staging.build_json.is_file():
        if json.loads(staging.build_json.read_text()) == json.loads(json.dumps(identity)):
            logger.info("continuing the interrupted build in %s", staging.root)
            return
        if not config.overwrite:
            raise UserError(
                f"{staging.root}: holds an interrupted build of another config or of other recordings; finish that one "
                f"(its config is in {staging.build_json.name}), or drop it with overwrite=true."
            )
    for path in staging.root.iterdir():
        if path.name != LOCK_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomic(staging.build_json, json.dumps(identity, indent=1).encode())


LOCK_NAME = "lock"


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One build at a time per staging folder. The lock goes with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another build is at work there; wait for it or choose another `out`.") from None
        yield


# --- the stages ---------------------------------------------------------------------------------------------------


def _curate(
    plan: CuratePlan, staging: Staging, listing: Mapping[str, list[str]], num_workers: int
) -> list[EpisodeRecord]:
    todo = [
        {"source": source, "episode": episode}
        for source, episodes in listing.items()
        for episode in episodes
        if not staging.is_curated(source, episode)
    ]
    results = ray_job.map_rows(todo, functools.partial(CurateEpisode, plan), num_workers)
    for _ in track(results, len(todo), "curate", lambda result: result["accepted"]):
        pass
    return [staging.read_curated(source, episode) for source in sorted(listing) for episode in listing[source]]


def _nothing_accepted(records: Sequence[EpisodeRecord], counts: Counts) -> UserError:
    reasons = Counter(rejection.reason for record in records for rejection in record.rejected)
    first = next(rejection for record in records for rejection in record.rejected)
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(3))
    return UserError(
        f"None of the {counts.found} clips and episodes found can be used ({listed}); the first: {first.where}: "
        f"{first.detail}; change the sources or the clips' length and rate."
    )


def _prepare_codec(
    config: BuildConfig, staging: Staging, records: Sequence[EpisodeRecord], splits: Mapping[str, Split]
) -> CodecInfo:
    if staging.codec_json.is_file():
        return CodecInfo.model_validate_json(staging.codec_json.read_bytes())
    logger.info("codec: %s", "fitting it to the training clips" if config.codec.kind == "embedded" else "opening it")
    train, validation = (_clips_by_key(records, splits, one) for one in SPLITS)
    split: Split = "validation" if validation else "train"
    return prepare_codec(staging, config.codec, train[:MAX_FIT_CLIPS], (validation or train)[:MAX_PSNR_CLIPS], split)


def _clips_by_key(records: Sequence[EpisodeRecord], splits: Mapping[str, Split], split: Split) -> list[ClipRef]:
    """In the order of their keys, which are hashes: the first so many are a fair draw."""
    placed = [
        (clip.key, record.source, record.episode, position)
        for record in records
        if record.clips and splits[record.content_sha256 or ""] == split
        for position, clip in enumerate(record.clips)
    ]
    return [(source, episode, position) for _, source, episode, position in sorted(placed)]


def _prepare_text_encoder(config: BuildConfig, staging: Staging) -> TextEncoderInfo:
    encoder = create_text_encoder(config.text_encoder)
    encoder.save(staging.text_encoder)
    return TextEncoderInfo(name=encoder.name, weight_hash=encoder.weight_hash, width=encoder.width)


def _encode(config: BuildConfig, staging: Staging, records: Sequence[EpisodeRecord], num_workers: int) -> None:
    todo = [
        {"source": record.source, "episode": record.episode}
        for record in records
        if record.clips and not staging.is_encoded(record.source, record.episode)
    ]
    make_worker = functools.partial(EncodeEpisode, EncodePlan(staging=staging.root, use_gpu=config.gpus > 0))
    results = ray_job.map_rows(todo, make_worker, config.gpus or num_workers, gpus_each=1 if config.gpus else 0)
    for _ in track(results, len(todo), "encode", lambda result: result["clips"]):
        pass


def _pack(
    config: BuildConfig,
    staging: Staging,
    records: Sequence[EpisodeRecord],
    splits: dict[str, Split],
    info: DatasetInfo,
) -> None:
    """The dataset appears under its name complete or not at all; a dataset that it replaces stays until then."""
    shutil.rmtree(staging.packed, ignore_errors=True)
    with one_thread():
        folder = pack(staging, records, splits, info, config.max_shard_mb)
        shutil.copytree(staging.codec, folder / CODEC)
        shutil.copytree(staging.text_encoder, folder / TEXT_ENCODER)
        preview.write_report(folder)
    if config.out.exists():
        os.replace(config.out, staging.root / f"replaced-{time.time_ns()}")
    os.replace(folder, config.out)
    shutil.rmtree(staging.root)


if __name__ == "__main__":
    run_command(main, BuildConfig, description=__doc__)
