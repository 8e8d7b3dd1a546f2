"""The stages of a build, from curation to packing.

Apart from the command, which answers what needs no stage without waiting for torch and Ray to be imported.
"""

import functools
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.loader import UserError, dump_config

from . import preview, ray_job
from .build_config import BuildConfig, build_identity, parse_partition
from .curate.captions import CaptionEpisode, plan_captions, read_caption_records, summarise_captions
from .curate.duplicates import (
    compared_records,
    find_leaks,
    leaks_sentence,
    without_duplicates,
    without_semantic_duplicates,
)
from .curate.embeddings import EmbedEpisode, plan_embeddings, read_embeddings
from .curate.episode import CurateEpisode, CuratePlan
from .dataset import (
    CODEC,
    DATASET_YAML,
    REJECTED,
    SPLITS,
    TEXT_ENCODER,
    CaptionInfo,
    CodecInfo,
    Counts,
    DatasetInfo,
    SourceInfo,
    Split,
    TextEncoderInfo,
    code_version,
)
from .embodiments import Embodiment
from .encode import (
    MAX_FIT_CLIPS,
    MAX_PSNR_CLIPS,
    ClipRef,
    EncodeEpisode,
    EncodePlan,
    check_encoders,
    encoders_identity,
    open_frozen_codec,
    prepare_codec,
    stage_encoder,
)
from .encoders import create_text_encoder
from .one_thread import one_thread
from .pack import assign_splits, count, pack
from .progress import track
from .repairs import group_repairs
from .resolve import Listing
from .sample import SCHEMA_VERSION
from .shards import naming, write_atomic
from .staging import BusyError, EpisodeRecord, PartitionRecord, Staging, digest, read_record

logger = logging.getLogger(__name__)

MIN_FOUND_TO_STOP = 1000
"""Clips found before the share of rejected ones says anything about those still to come."""

MAX_REPAIRS = 20
"""Kinds of repairs of a source that dataset.yaml tells."""


def go_through(config: BuildConfig, plan: CuratePlan, listing: Listing) -> None:
    """All of them; or, as a task of a job array, those of its part."""
    check_encoders(config.codec, config.text_encoder, plan.views)
    build = Build(config, plan, listing)
    # The tasks of a job array share the folder; a plain build has it to itself.
    with (
        build.staging.locked("build", is_shared=config.partition is not None),
        ray_job.ray_session(config.ray_address, build.num_workers, config.object_store_mb),
    ):
        ray_job.check_gpus(config.gpus)
        if config.partition is not None:
            build.run_partition(*parse_partition(config.partition))
        else:
            build.curate(build.rows)
            build.finish()


class Build:
    """One start of a build, with all choices made."""

    def __init__(self, config: BuildConfig, plan: CuratePlan, listing: Listing) -> None:
        self.config = config
        self.plan = plan
        self.listing = listing
        self.staging = Staging(plan.staging)
        self.num_workers = config.num_workers or os.cpu_count() or 1
        self.rows = [{"source": name, "episode": episode} for name in sorted(listing) for episode in listing[name]]
        self.started = time.monotonic()
        self.caption_plan = plan_captions(
            config.captions,
            self.staging.root,
            config.out.absolute().with_name("caption_cache"),
            next(iter(plan.views.values())),
            self.num_workers,
            config.gpus,
        )
        self.embed_plan = plan_embeddings(config.duplicates.semantic, self.staging.root, use_gpu=config.gpus > 0)
        self._gpu_pool = (config.gpus or self.num_workers, 1 if config.gpus else 0)
        self._new_video_s = plan.stride / plan.fps  # that a clip adds to the one before

    def run_partition(self, index: int, num_parts: int) -> None:
        """A share of the episodes; and all that comes after, once every share is done."""
        embedder = self.embed_plan.embedder if self.embed_plan else None
        made_from = digest([self.plan.identity(name) for name in sorted(self.listing)], self.rows, embedder)
        rows = self.rows[index::num_parts]
        with self.staging.locked(f"partition-{index}-of-{num_parts}"):
            self.curate(rows)
            records = self._records(rows)
            self.embed(compared_records(records, self.config.duplicates))
            self.caption(records)
            codec = open_frozen_codec(self.config.codec)
            if codec is not None:  # one that is fitted to all clips cannot encode any yet
                stage_encoder(self.staging, codec, self.staging.codec)
                text_encoder = self._stage_text_encoder()
                self._encode(records, encoders_identity(codec, text_encoder))
            marker = PartitionRecord(made_from=made_from).model_dump_json()
            write_atomic(self.staging.partition(index, num_parts), marker.encode())
        others = [read_record(self.staging.partition(i, num_parts), PartitionRecord) for i in range(num_parts)]
        num_missing = sum(record is None or record.made_from != made_from for record in others)
        if num_missing:
            logger.info("part %d of %d is done; %d are still missing", index, num_parts, num_missing)
            return
        try:
            with self.staging.locked("pack"):
                self.finish()
        except BusyError:
            logger.info("part %d of %d is done; another task packs", index, num_parts)

    def curate(self, rows: Sequence[dict[str, str]]) -> None:
        """Cuts, filters and aligns these episodes, except those that are staged as they would come out now."""
        results = ray_job.map_rows(rows, functools.partial(CurateEpisode, self.plan), self.num_workers)
        found = rejected = num_kept = 0
        for result in track(results, len(rows), "curate", lambda row: row["new_clips"], clip_s=self._new_video_s):
            found, rejected = found + result["found"], rejected + result["found"] - result["accepted"]
            num_kept += result["was_kept"]
            if found >= MIN_FOUND_TO_STOP:
                self._check_share(found, rejected)
        if num_kept:
            logger.info("curate: %d of %d episodes are as they were, their clips were kept", num_kept, len(rows))

    def embed(self, records: Sequence[EpisodeRecord]) -> None:
        """Embeds the clips, where those that mean the same are to go."""
        plan = self.embed_plan
        if plan is not None:
            due = [record for record in records if plan.is_due(record)]
            self._work_on("embed", due, functools.partial(EmbedEpisode, plan), *self._gpu_pool)

    def caption(self, records: Sequence[EpisodeRecord]) -> CaptionInfo | None:
        """Describes the clips that have no instruction, where the config asks for it."""
        plan = self.caption_plan
        if plan is None:
            return None
        due = [record for record in records if plan.is_due(record)]
        make_worker = functools.partial(CaptionEpisode, plan)
        self._work_on("caption", due, make_worker, plan.num_workers, plan.gpus_each)
        summary = summarise_captions(plan, read_caption_records(plan, records))
        logger.info("captions: %s", summary.sentence())
        return summary.info

    def finish(self) -> None:
        """Everything after curation: encoders, latents, shards."""
        config, staged = self.config, self._records(self.rows)
        records = self._without_duplicates(staged)
        counts = count(records)
        if not counts.accepted:
            raise _nothing_accepted(records, counts)
        self._check_share(counts.found, counts.rejected)
        used = _whole(staged, records)
        captions = self.caption(used)
        splits = assign_splits(records, config.validation_share)
        self._warn_of_leaks(records, splits)
        codec = self._prepare_codec(records, splits)
        text_encoder = self._stage_text_encoder()
        self._encode(used, encoders_identity(codec, text_encoder))
        info = DatasetInfo(
            schema_version=SCHEMA_VERSION,
            code_version=code_version(),
            num_frames=self.plan.num_frames,
            fps=self.plan.fps,
            actions_per_frame=self.plan.actions_per_frame,
            control_hz=self.plan.fps * self.plan.actions_per_frame,
            views=self.plan.views,
            embodiments=self._used_embodiments(records),
            codec=codec,
            text_encoder=text_encoder,
            captions=captions,
            counts=counts,
            sources=self._source_infos(records),
            build=build_identity(config),
        )
        if _is_there(config.out, info):
            logger.info("%s is up to date: the same config over the same recordings built it", config.out)
        else:
            self._pack(records, splits, info)
            self._log_end(counts)
        for name, episodes in self.listing.items():
            _warn_of_a_source_without_clips(name, len(episodes), [one for one in records if one.source == name])
        self._tidy()

    # --- steps ----------------------------------------------------------------------------------------------------

    def _records(self, rows: Sequence[dict[str, str]]) -> list[EpisodeRecord]:
        return [self.staging.read_curated(**row) for row in rows]

    def _work_on(
        self,
        stage: str,
        records: Sequence[EpisodeRecord],
        make_worker: Callable[[], Callable[[ray_job.Row], ray_job.Row]],
        num_workers: int,
        gpus_each: int,
    ) -> None:
        """A stage after curation: each worker reads what is staged of an episode and stages what it makes of it."""
        rows = [{"source": record.source, "episode": record.episode} for record in records]
        results = ray_job.map_rows(rows, make_worker, num_workers, gpus_each=gpus_each)
        for _ in track(results, len(rows), stage, lambda result: result["clips"], clip_s=self._new_video_s):
            pass

    def _without_duplicates(self, staged: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
        """The dearest comparison last, of what the others have left."""
        records = without_duplicates(staged, self.config.duplicates)
        if self.embed_plan is None:
            return records
        left = compared_records(_whole(staged, records), self.config.duplicates)
        self.embed(left)
        return without_semantic_duplicates(records, read_embeddings(self.embed_plan, left), self.config.duplicates)

    def _check_share(self, found: int, rejected: int) -> None:
        if rejected > self.config.max_rejected_fraction * found:
            raise UserError(
                f"{rejected} of the {found} clips found so far cannot be used, more than max_rejected_fraction="
                f"{self.config.max_rejected_fraction:g} allows; `python -m data_pipeline.doctor` says what is wrong "
                f"with a source. What is done is kept in {self.staging.root}."
            )

    def _warn_of_leaks(self, records: Sequence[EpisodeRecord], splits: Mapping[str, Split]) -> None:
        """Episodes never straddle the splits, but two of them may show the same."""
        phashes: dict[Split, dict[str, str]] = {split: {} for split in SPLITS}
        for record in records:
            for clip in record.clips:
                phashes[splits[record.content_sha256 or ""]][clip.key] = clip.phash
        leaks = find_leaks(phashes["train"], phashes["validation"], self.config.duplicates.leak)
        if leaks:
            logger.warning(leaks_sentence(leaks, self.config.duplicates))

    def _prepare_codec(self, records: Sequence[EpisodeRecord], splits: Mapping[str, Split]) -> CodecInfo:
        train, validation = (_clips_by_key(records, splits, one) for one in SPLITS)
        split: Split = "validation" if validation else "train"
        fit, measure = train[:MAX_FIT_CLIPS], (validation or train)[:MAX_PSNR_CLIPS]
        return prepare_codec(self.staging, self.config.codec, fit, measure, split)

    def _stage_text_encoder(self) -> TextEncoderInfo:
        encoder = create_text_encoder(self.config.text_encoder)
        stage_encoder(self.staging, encoder, self.staging.text_encoder)
        return TextEncoderInfo(name=encoder.name, weight_hash=encoder.weight_hash, width=encoder.width)

    def _encode(self, records: Sequence[EpisodeRecord], encoders: str) -> None:
        plan = EncodePlan(
            staging=self.staging.root,
            use_gpu=self.config.gpus > 0,
            encoders=encoders,
            captioner=self.caption_plan.captioner if self.caption_plan else None,
        )
        due = []
        for record in records:
            staged = self.staging.find_encoded(record.source, record.episode)
            if record.clips and (staged is None or staged.made_from != plan.identity(record)):
                due.append(record)
        self._work_on("encode", due, functools.partial(EncodeEpisode, plan), *self._gpu_pool)

    def _used_embodiments(self, records: Sequence[EpisodeRecord]) -> dict[str, Embodiment]:
        used = {record.embodiment for record in records if record.clips}
        known = [source.embodiment for source in self.plan.sources.values() if source.embodiment is not None]
        return {one.name: one for one in sorted(known, key=lambda one: one.name) if one.name in used}

    def _source_infos(self, records: Sequence[EpisodeRecord]) -> dict[str, SourceInfo]:
        return {
            name: _source_info(episodes, [record for record in records if record.source == name])
            for name, episodes in self.listing.items()
        }

    def _pack(self, records: Sequence[EpisodeRecord], splits: dict[str, Split], info: DatasetInfo) -> None:
        """The dataset appears under its name complete or not at all; a dataset that it replaces stays until then."""
        staging, out = self.staging, self.config.out
        shutil.rmtree(staging.packed, ignore_errors=True)
        with naming(staging.packed), one_thread():
            folder = pack(staging, records, splits, info, self.config.max_shard_mb)
            _copy_folder(staging.codec, folder / CODEC)
            _copy_folder(staging.text_encoder, folder / TEXT_ENCODER)
            preview.write_report(folder)
        replaced = staging.root / "replaced"
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(out, replaced)
        os.replace(folder, out)
        shutil.rmtree(replaced, ignore_errors=True)

    def _tidy(self) -> None:
        if self.config.keep_staging:
            self.staging.keep_only({name: set(episodes) for name, episodes in self.listing.items()})
        else:
            shutil.rmtree(self.staging.root)

    def _log_end(self, counts: Counts) -> None:
        out, seconds = self.config.out, time.monotonic() - self.started
        logger.info(
            "%s: %d clips of %d found (%d rejected), %.0f s; look at %s",
            *(out, counts.accepted, counts.found, counts.rejected, seconds, out / "report.html"),
        )


def _is_there(out: Path, info: DatasetInfo) -> bool:
    path = out / DATASET_YAML
    return path.is_file() and path.read_text(encoding="utf-8") == dump_config(info)


# --- the clips ---------------------------------------------------------------------------------------------------


def _nothing_accepted(records: Sequence[EpisodeRecord], counts: Counts) -> UserError:
    reasons = Counter(rejection.reason for record in records for rejection in record.rejected)
    first = next(rejection for record in records for rejection in record.rejected)
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(3))
    return UserError(
        f"None of the {counts.found} clips and episodes found can be used ({listed}); the first: {first.where}: "
        f"{first.detail}; change the sources or the clips' length and rate."
    )


_NEXT_MOVES = {
    "missing_view": "set view_map or views",
    "frame_rate_too_low": "lower fps",
    "too_short": "lower clip_frames",
}


def _warn_of_a_source_without_clips(name: str, num_episodes: int, records: Sequence[EpisodeRecord]) -> None:
    """Beside other sources it would pass unnoticed."""
    if any(record.clips for record in records):
        return
    rejected = [rejection for record in records for rejection in record.rejected]
    reason, _ = Counter(rejection.reason for rejection in rejected).most_common(1)[0]
    detail = next(rejection.detail for rejection in rejected if rejection.reason == reason)
    next_move = _NEXT_MOVES.get(reason, f"{REJECTED} has all of them")
    logger.warning(
        "source %s: none of its episodes (%d) is in the dataset (%s: %s); %s.",
        *(name, num_episodes, reason, detail, next_move),
    )


def _whole(staged: Sequence[EpisodeRecord], records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """The episodes of which `records` still has clips, with all of their clips: what the stages work on."""
    return [whole for whole, record in zip(staged, records, strict=True) if record.clips]


def _source_info(episodes: Sequence[str], records: Sequence[EpisodeRecord]) -> SourceInfo:
    repairs = group_repairs(record.repairs for record in records)
    repairs.sort(key=lambda repair: (-repair.num_episodes, repair.sentence))
    return SourceInfo(
        episodes=len(episodes),
        listing_sha256=digest(list(episodes)),
        content_sha256=digest([record.model_dump(mode="json") for record in records]),
        repairs=tuple(repairs[:MAX_REPAIRS]),
        more_repairs=len(repairs[MAX_REPAIRS:]),
    )


def _clips_by_key(records: Sequence[EpisodeRecord], splits: Mapping[str, Split], split: Split) -> list[ClipRef]:
    """In the order of their keys, which are hashes: the first so many are a fair draw."""
    placed = [
        (clip.key, record.source, record.episode, position)
        for record in records
        if record.clips and splits[record.content_sha256 or ""] == split
        for position, clip in enumerate(record.clips)
    ]
    return [(source, episode, position) for _, source, episode, position in sorted(placed)]


def _copy_folder(source: Path, target: Path) -> None:
    """Not `shutil.copytree`, which says what the file system refuses in an error of its own."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
