"""One episode -> its clips, staged: cut, decoded, brought to the views' sizes, aligned with its actions, re-encoded.

The unit of parallel work. It reads one episode, writes one tar and one record, and nothing in it can stop a build:
what cannot be used becomes a `Rejection`.
"""

import errno
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from configs.loader import StrictConfig, UserError

from ..align import AlignedControl, ClipClock, align_control, row_times_problem
from ..dataset import code_version
from ..embodiments import Embodiment
from ..sample import SCHEMA_VERSION, VIEW_NAME, Sample, SampleMeta, SourceMeta, ViewMeta
from ..shards import TarWriter, tar_records
from ..sources import AnySourceConfig, Episode, Footage, Source, SourceError, VideoSegment, open_source
from ..sources.base import check_dims
from ..staging import EpisodeRecord, Rejection, StagedClip, Staging, digest, forget_record, write_record
from ..video_copy import copy_clip
from ..video_io import GOP, VideoError, ViewConfig, encode_planes
from .clips import clip_key, view_role
from .cutting import ClipShape, cut_episode
from .filters import FilterConfig, broken_rule, filter_scores
from .fingerprints import clip_phash, footage_sha256
from .idle import IdleConfig
from .letterbox import crop_letterbox
from .shots import ShotConfig

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Worker processes that one episode may take down with it."""

DECODE_BYTES = 128 * 2**20
"""Decoded pixels of one view held at a time; bounds the memory of an hour-long recording."""


class SourcePlan(StrictConfig):
    config: AnySourceConfig
    embodiment: Embodiment | None


class CuratePlan(StrictConfig):
    """All that a worker needs to know; every choice left open in the config is settled here."""

    staging: Path
    run: str = Field(description="Names one start of the build; attempts are counted per run.")
    sources: dict[str, SourcePlan]
    views: dict[str, ViewConfig]
    num_frames: int
    fps: float
    stride: int
    actions_per_frame: int
    crf: int
    shots: ShotConfig = ShotConfig()
    idle: IdleConfig = IdleConfig()
    filters: FilterConfig = FilterConfig()

    def identity(self, source: str) -> str:
        """Of everything but the recording itself that a source's clips follow from."""
        settings = self.model_dump(mode="json", exclude={"staging", "run", "sources"})
        source_plan = self.sources[source].model_dump(mode="json", exclude={"config": {"max_episodes"}})
        return digest(settings, source_plan, SCHEMA_VERSION, code_version())


class RejectedError(Exception):
    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.reason)
        self.rejection = rejection


class CurateEpisode:
    """Worker: `{"source": …, "episode": …}` -> counts. Keeps its sources open between episodes."""

    def __init__(self, plan: CuratePlan) -> None:
        self.plan = plan
        self.staging = Staging(plan.staging)
        self._sources: dict[str, Source] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        name, episode_id = row["source"], row["episode"]
        if name not in self._sources:
            self._sources[name] = open_source(self.plan.sources[name].config)
        identity = self.plan.identity(name)
        staged = self.staging.find_curated(name, episode_id)
        if staged is not None and staged.made_from == digest(identity, self._content(name, episode_id)):
            return {"found": staged.found, "accepted": len(staged.clips), "new_clips": 0, "was_kept": True}
        tar = self.staging.curated_tar(name, episode_id)
        forget_record(tar)
        attempt = self.staging.begin_attempt(self.plan.run, name, episode_id)
        with TarWriter(tar) as writer:
            if attempt > MAX_ATTEMPTS:
                record = lost_workers_record(self.plan, name, episode_id)
            else:
                record = curate_episode(self.plan, name, self._sources[name], episode_id, writer)
        write_record(tar, record.model_copy(update={"made_from": digest(identity, record.content_sha256)}))
        accepted = len(record.clips)
        return {"found": record.found, "accepted": accepted, "new_clips": accepted, "was_kept": False}

    def _content(self, name: str, episode_id: str) -> str | None:
        """The digest of the recording as it is now; reading it costs about a hundredth of decoding it."""
        try:
            return self._sources[name].read_episode(episode_id).content_sha256
        except Exception:  # curating it says why; None matches no episode that could be read
            return None


def curate_episode(
    plan: CuratePlan, source_name: str, source: Source, episode_id: str, writer: TarWriter
) -> EpisodeRecord:
    """Writes the accepted clips to `writer`, in order, and says what became of the others."""
    source_plan = plan.sources[source_name]
    try:
        episode = source.read_episode(episode_id)
        footages = select_views(episode, source_plan.config.view_map, plan.views)
        _check_control(episode, source_plan.embodiment)
        shape = ClipShape(plan.fps, plan.num_frames, plan.stride)
        cutting = cut_episode(episode, footages, source_plan.embodiment, shape, plan.shots, plan.idle)
        notes = cutting.notes
        if plan.filters.crop_letterbox:
            views, cropped = crop_letterbox(plan.views, footages, episode)
            plan, notes = plan.model_copy(update={"views": views}), (*notes, *cropped)
        blocks = _plan_blocks(plan, footages, episode, cutting.starts)
        resolution = {view: _resolution(footage, plan.views[view]) for view, footage in footages.items()}
        copied_from = _shown_whole(plan, footages)
    except Exception as error:
        return rejected_episode(source_name, episode_id, _rejection(error, _where(source_plan, episode_id)))

    embodiment = source_plan.embodiment if episode.actions is not None else None
    clips: list[StagedClip] = []
    rejected: list[Rejection] = []
    for clip, pixels in _decode_clips(plan, footages, blocks):
        try:
            if isinstance(pixels, Exception):
                raise pixels
            scores = filter_scores(pixels, resolution, plan.filters.aesthetic, plan.filters.text)
            _check_filters(plan.filters, scores, episode.uri)
            video = {view: _clip_video(plan, copied_from.get(view), clip.frames[view], pixels[view]) for view in pixels}
            sample = _make_sample(plan, episode, embodiment, clip, video, scores)
            records = tar_records(sample.to_members())
        except Exception as error:
            where = f"{episode.uri}: clip {clip.index} at {clip.clock.start_s:.2f} s"
            rejected.append(_rejection(error, where).model_copy(update={"clip_index": clip.index}))
            continue
        clips.append(
            StagedClip(
                key=sample.key,
                clip_index=clip.index,
                start_s=sample.meta.start_s,
                motion=sample.meta.filter_scores["motion"],
                offset=writer.add(records),
                num_bytes=len(records),
                phash=clip_phash(pixels),
            )
        )
    return EpisodeRecord(
        source=source_name,
        episode=episode_id,
        content_sha256=episode.content_sha256,
        embodiment=embodiment.name if embodiment else None,
        has_actions=embodiment is not None,
        has_instruction=bool(episode.instruction),
        resolution=min(resolution.values()),
        found=len(cutting.starts),
        clips=tuple(clips),
        rejected=tuple(rejected),
        repairs=(*episode.repairs, *notes),
        video_sha256=_video_sha256(footages),
    )


def rejected_episode(source: str, episode_id: str, rejection: Rejection) -> EpisodeRecord:
    return EpisodeRecord(
        source=source,
        episode=episode_id,
        content_sha256=None,
        embodiment=None,
        has_actions=False,
        has_instruction=False,
        resolution=0,
        found=1,
        clips=(),
        rejected=(rejection,),
        repairs=(),
    )


def lost_workers_record(plan: CuratePlan, source: str, episode_id: str) -> EpisodeRecord:
    """A crash in a decoder takes the whole process with it, so nobody is left to say why."""
    detail = f"it ended its worker process {MAX_ATTEMPTS} times (a crash in a decoder, or too little memory)"
    where = _where(plan.sources[source], episode_id)
    return rejected_episode(source, episode_id, Rejection(where=where, reason="worker_lost", detail=detail))


def _where(source_plan: SourcePlan, episode_id: str) -> str:
    return f"{source_plan.config.path}: episode {episode_id}"


def _rejection(error: Exception, where: str) -> Rejection:
    """The row that an error leaves behind. One that nobody foresaw is logged in full: it may be ours."""
    match error:
        case RejectedError():
            return error.rejection
        case SourceError():
            return Rejection(where=error.where, reason=error.reason, detail=error.detail)
        case VideoError():
            return Rejection(where=where, reason=error.reason, detail=f"{error.path}: {error.detail}")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
            raise error  # this machine's fault, not the recording's: the build stops and can go on later
        case UserError():
            raise error  # a package or weights that the config asks for are missing
        case _:
            logger.error("%s: unexpected error", where, exc_info=error)
            return Rejection(where=where, reason="unexpected_error", detail=f"{type(error).__name__}: {error}")


def _check_control(episode: Episode, embodiment: Embodiment | None) -> None:
    if embodiment is None or episode.actions is None:
        return
    check_dims(embodiment, episode.actions, episode.proprio, episode.uri)
    problem = row_times_problem(episode.control_times_s, len(episode.actions))
    if problem is not None:
        raise RejectedError(Rejection(where=episode.uri, reason="bad_control_times", detail=problem))


def _check_filters(config: FilterConfig, scores: dict[str, float], where: str) -> None:
    broken = broken_rule(scores, config)
    if broken is not None:
        raise RejectedError(Rejection(where=where, reason=broken[0], detail=broken[1]))


def _video_sha256(footages: dict[str, Footage]) -> str | None:
    """Of the compressed frames of all views, where all are video that can be read to its end."""
    try:
        hashes = {view: footage_sha256(footage) for view, footage in footages.items()}
    except VideoError:
        return None
    return None if None in hashes.values() else digest(hashes)


# --- views --------------------------------------------------------------------------------------------------------


def view_name(source_name: str) -> str:
    """A source's view name as a dataset may have it: lower case, no dots."""
    safe = "".join(c if VIEW_NAME.fullmatch(c) else "_" for c in source_name.lower())
    return safe.strip("_") or "view"


def select_views(episode: Episode, view_map: dict[str, str] | None, views: dict[str, ViewConfig]) -> dict[str, Footage]:
    """Which recorded view shows each of the dataset's views.

    Without a map, by name; an only view stands for an only view, whatever they are called.
    """
    if view_map is not None:
        found = {view_map[name]: footage for name, footage in episode.views.items() if name in view_map}
    elif len(views) == len(episode.views) == 1:
        found = dict(zip(views, episode.views.values(), strict=True))
    else:
        found = {view_name(name): footage for name, footage in episode.views.items()}
    missing = sorted(views.keys() - found.keys())
    if missing:
        detail = f"no view {', '.join(missing)}; the episode has {', '.join(sorted(episode.views)) or 'none'}"
        raise RejectedError(Rejection(where=episode.uri, reason="missing_view", detail=detail))
    return {name: found[name] for name in views}


# --- pixels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clip:
    index: int
    start: int  # its first frame, counted at the clips' fps
    clock: ClipClock
    frames: dict[str, np.ndarray]  # view -> positions in the video file of the frames it shows


_Pixels = dict[str, np.ndarray]
"""view -> planes (`video_pixels`), uint8 [f 3h/2 w]"""


def _plan_blocks(
    plan: CuratePlan, footages: dict[str, Footage], episode: Episode, starts: Sequence[int]
) -> list[list[_Clip]]:
    """The clips, grouped: neighbours share frames, so as many are decoded at once as memory allows."""
    block_frames = min(_block_frames(footage, plan.views[view], episode) for view, footage in footages.items())
    blocks: list[list[_Clip]] = []
    block_start = -1
    for index, start in enumerate(starts):
        clock = ClipClock(start / plan.fps, plan.fps, plan.num_frames, plan.actions_per_frame)
        frames = {view: footage.positions(clock.frame_times_s, episode.fps) for view, footage in footages.items()}
        end_frame = (start + plan.num_frames) / plan.fps * episode.fps
        if not blocks or end_frame - block_start > block_frames:
            blocks.append([])
            block_start = int(start / plan.fps * episode.fps)
        blocks[-1].append(_Clip(index, start, clock, frames))
    return blocks


def _block_frames(footage: Footage, view: ViewConfig, episode: Episode) -> int:
    info = footage.info()
    if view.crop is not None and (
        view.crop[0] + view.crop[2] > info.height or view.crop[1] + view.crop[3] > info.width
    ):
        detail = f"crop {list(view.crop)} (top, left, height, width) of a {info.height}x{info.width} picture"
        raise RejectedError(Rejection(where=episode.uri, reason="crop_outside_picture", detail=detail))
    return max(1, DECODE_BYTES // (info.width * info.height * 3))


def _resolution(footage: Footage, view: ViewConfig) -> int:
    """Shorter side of what was recorded, or of what is used of it."""
    info = footage.info()
    return min(view.crop[2:] if view.crop is not None else (info.height, info.width))


def _decode_clips(
    plan: CuratePlan, footages: dict[str, Footage], blocks: list[list[_Clip]]
) -> Iterator[tuple[_Clip, _Pixels | Exception]]:
    """The clips in order, each with its pixels or with the error that kept them away."""
    for block in blocks:
        yield from zip(block, _decode_block(plan, footages, block), strict=True)


def _decode_block(plan: CuratePlan, footages: dict[str, Footage], block: list[_Clip]) -> list[_Pixels | Exception]:
    """A damaged spot costs only the clips that show it: the block is halved around it."""
    try:
        videos: list[_Pixels] = [{} for _ in block]
        for view, footage in footages.items():
            wanted = np.unique(np.concatenate([clip.frames[view] for clip in block]))
            pixels = footage.read_view(wanted.tolist(), plan.views[view])
            for video, clip in zip(videos, block, strict=True):
                video[view] = pixels[_as_slice(np.searchsorted(wanted, clip.frames[view]))]
        return list(videos)
    except Exception as error:
        if len(block) == 1:
            return [error]
        half = len(block) // 2
        return [*_decode_block(plan, footages, block[:half]), *_decode_block(plan, footages, block[half:])]


def _as_slice(rows: np.ndarray) -> np.ndarray | slice:
    """Rows that follow each other need not be copied."""
    return slice(int(rows[0]), int(rows[-1]) + 1) if np.all(np.diff(rows) == 1) else rows


def _clip_video(plan: CuratePlan, path: str | None, frames: np.ndarray, planes: np.ndarray) -> bytes:
    """Copied from the file that shows it as it is wanted, where there is one and its frames can be, else encoded."""
    if path is not None and np.all(np.diff(frames) == 1):
        copied = copy_clip(path, int(frames[0]), len(frames), plan.fps, GOP)
        if copied is not None:
            return copied
    return encode_planes(planes, None, plan.fps, crf=plan.crf)


def _shown_whole(plan: CuratePlan, footages: dict[str, Footage]) -> dict[str, str]:
    """The video files of the views that are the recorded picture as it is: neither cut, nor scaled, nor turned."""
    return {
        name: footage.path
        for name, footage in footages.items()
        if isinstance(footage, VideoSegment) and plan.views[name].is_whole(footage.info().height, footage.info().width)
    }


# --- the sample ---------------------------------------------------------------------------------------------------


def _make_sample(
    plan: CuratePlan,
    episode: Episode,
    embodiment: Embodiment | None,
    clip: _Clip,
    video: dict[str, bytes],
    scores: dict[str, float],
) -> Sample:
    control = _align(episode, embodiment, clip)
    meta = SampleMeta(
        schema_version=SCHEMA_VERSION,
        source=SourceMeta(name=episode.source, uri=episode.uri, licence=episode.licence, sha256=episode.content_sha256),
        episode=episode.episode_id,
        clip_index=clip.index,
        start_s=round(clip.clock.start_s, 6),
        fps=plan.fps,
        control_hz=clip.clock.control_hz if control else None,
        num_frames=plan.num_frames,
        views={
            name: ViewMeta(height=view.height, width=view.width, role=view_role(name))
            for name, view in plan.views.items()
        },
        embodiment=embodiment.name if embodiment else None,
        instruction=episode.instruction,
        captions=(episode.instruction,) if episode.instruction else (),
        has_actions=control is not None,
        success=episode.success,
        action_spans=control.spans if control else (),
        filter_scores=scores,
    )
    return Sample(
        key=clip_key(
            episode.source,
            episode.content_sha256,
            episode.episode_id,
            clip.start,
            plan.fps,
            plan.num_frames,
            plan.views,
        ),
        meta=meta,
        video=video,
        actions=control.actions if control else None,
        proprio=control.proprio if control else None,
    )


def _align(episode: Episode, embodiment: Embodiment | None, clip: _Clip) -> AlignedControl | None:
    if embodiment is None or episode.actions is None:
        return None
    own_times = episode.control_times_s
    recorded = own_times if own_times is not None else episode.control_hz or embodiment.control_hz
    control = align_control(episode.actions, episode.proprio, recorded, clip.clock, embodiment)
    if not control.spans:
        detail = "none of its actions was recorded: they are no finite numbers, or nothing was recorded at their time"
        raise RejectedError(
            Rejection(where=f"{episode.uri}: clip {clip.index}", reason="no_valid_actions", detail=detail)
        )
    return control
