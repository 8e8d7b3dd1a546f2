"""Captions for clips that have no instruction, by a vision-language model that looks at a few frames of each.

    <staging>/captions/<source>/<episode>.json     `CaptionRecord`: what became of each clip of an episode
    <cache>/<2 digits>/<sha256>.json               `Answer`: what a model said about the very same frames, for ever

An answer is paid for once: its key is a hash of the frames, the model, the prompt and the settings. A clip that gets
no caption keeps its place in the dataset; why it got none is counted. Only a model that answers nothing at all stops
the build, and before it has tried every clip.
"""

import hashlib
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from configs.loader import StrictConfig

from ..dataset import CaptionInfo
from ..sample import SampleMeta
from ..shards import naming, write_atomic
from ..staging import EpisodeRecord, Staging, digest, read_record
from ..video_io import ViewConfig, decode_clip
from .captioners import Answer, CaptionConfig, Captioner, CaptionError, read_caption
from .endpoint_captioner import EndpointCaptioner
from .transformers_captioner import TransformersCaptioner, load_processor

MAX_FAILURES_IN_A_ROW = 5
"""Clips without answer before the model is asked about a clip that it must be able to take."""

ENDPOINT_CONCURRENCY = 16

FINAL_REASONS = ("refusal", "empty_caption")
"""The model has answered, and would say the same again; what failed otherwise is tried again by the next build."""


# --- what is to be done -------------------------------------------------------------------------------------------


class CaptionPlan(StrictConfig):
    """All that a worker needs to know. Its own fields `num_workers` and `gpus_each` are for whoever starts workers."""

    staging: Path
    cache: Path
    config: CaptionConfig
    model: str = Field(description="For people: the model's name, or its folder's.")
    answers: str = Field(description="Digest of all that an answer follows from, besides the frames.")
    height: int = Field(description="Of the view that is shown.")
    width: int
    num_workers: int
    gpus_each: int
    threads: int = Field(description="Requests at once, per worker.")

    @property
    def captioner(self) -> str:
        """Digest of all that an episode's captions follow from, besides the episode."""
        return digest(self.answers, self.config.frames, self.config.only_missing)

    def is_due(self, record: EpisodeRecord) -> bool:
        """Whether an episode's captions are missing, of other clips or settings, or failed for a passing reason."""
        staged = _staged(self.staging, record, self.captioner)
        return bool(record.clips) and (staged is None or any(clip.may_pass for clip in staged.clips))


def plan_captions(
    config: CaptionConfig, staging: Path, cache: Path, view: ViewConfig, num_workers: int, gpus: int
) -> CaptionPlan | None:
    """None where no captions are wanted.

    UserError, in one sentence and before hours of work, for a folder that is no such model, for a key that is not set,
    and (in a build that has no captions yet) for an endpoint that does not answer.
    """
    if config.kind == "none":
        return None
    if config.kind == "transformers":
        assert config.folder is not None  # the config's validator has seen to it
        folder = config.folder.absolute()  # because a worker's working directory may be another
        load_processor(folder)
        config = config.model_copy(update={"folder": folder})
        model, answers = folder.name, TransformersCaptioner.identity(config)
        workers, threads = gpus or min(config.concurrency or 1, num_workers), 1
    else:
        assert config.model is not None
        if not (staging / "captions").exists():  # later, the workers notice soon enough, and may need no answers
            EndpointCaptioner(config).check(view.height, view.width)
        model, answers = config.model, EndpointCaptioner.identity(config)
        at_once = config.concurrency or ENDPOINT_CONCURRENCY
        workers = min(num_workers, at_once)
        threads = -(-at_once // workers)
    return CaptionPlan(
        staging=staging,
        cache=(config.cache or cache).absolute(),
        config=config,
        model=model,
        answers=answers,
        height=view.height,
        width=view.width,
        num_workers=workers,
        gpus_each=1 if gpus and config.kind == "transformers" else 0,
        threads=threads,
    )


# --- what became of it --------------------------------------------------------------------------------------------


class ClipCaption(StrictConfig):
    """A clip that the model was asked about: its caption, or why there is none."""

    key: str
    caption: str | None = None
    reason: str | None = None
    detail: str | None = None
    tokens_in: int | None = Field(None, description="null: no answer, or the endpoint does not count.")
    tokens_out: int | None = None
    has_answer: bool
    is_cached: bool = Field(description="The answer was there, and cost nothing now.")

    @property
    def may_pass(self) -> bool:
        return self.reason is not None and self.reason not in FINAL_REASONS


class CaptionRecord(StrictConfig):
    """Of one episode."""

    clips: tuple[ClipCaption, ...]
    num_with_text: int = Field(description="Clips that were not asked about: they have an instruction.")
    started_s: float = Field(description="Unix time.")
    ended_s: float
    made_from: str


def captions_json(staging: Path, source: str, episode: str) -> Path:
    return staging / "captions" / source / f"{episode}.json"


def _made_from(captioner: str, record: EpisodeRecord) -> str:
    return digest(captioner, record.model_dump(mode="json"))


def _staged(staging: Path, record: EpisodeRecord, captioner: str) -> CaptionRecord | None:
    staged = read_record(captions_json(staging, record.source, record.episode), CaptionRecord)
    return staged if staged is not None and staged.made_from == _made_from(captioner, record) else None


def read_captions(staging: Path, record: EpisodeRecord, captioner: str | None) -> dict[str, str]:
    """Clip key -> caption, of the clips of an episode that this captioner gave one; {} without captioner."""
    staged = _staged(staging, record, captioner) if captioner is not None else None
    return {clip.key: clip.caption for clip in (staged.clips if staged else ()) if clip.caption is not None}


def add_caption(meta: SampleMeta, caption: str | None) -> SampleMeta:
    """The instruction stays first: the first of the captions is what the text encoder reads."""
    if caption is None or caption in meta.captions:
        return meta
    return meta.model_copy(update={"captions": (*meta.captions, caption)})


# --- the cache ----------------------------------------------------------------------------------------------------


class AnswerCache:
    """Answers in a folder that builds share: a file each, renamed into place, so that writers need no lock.

    A file that cannot be read as an answer (a full disk, a power cut) counts as not there, and is written anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, frames: UInt8[np.ndarray, "f h w 3"], answers: str) -> str:
        frames_hash = hashlib.sha256(frames.tobytes()).hexdigest()
        return digest("answer v1", list(frames.shape), frames_hash, answers)

    def find(self, key: str) -> Answer | None:
        return read_record(self._path(key), Answer)

    def keep(self, key: str, answer: Answer) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two threads, or processes of the same number on two machines, may have asked about equal clips.
        partial = path.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            with naming(path):
                partial.write_bytes(answer.model_dump_json().encode())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


# --- the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answered:
    answer: Answer
    is_cached: bool


class CaptionEpisode:
    """Worker: `{"source": …, "episode": …}` -> `{"clips": asked about, "captioned": …}`."""

    def __init__(self, plan: CaptionPlan) -> None:
        self.plan = plan
        self.staging = Staging(plan.staging)
        self.cache = AnswerCache(plan.cache)
        self._failures_in_a_row = 0

    @cached_property
    def captioner(self) -> Captioner:
        """Opened when the first answer is not in the cache: a build that needs none needs neither weights nor key."""
        if self.plan.config.kind == "endpoint":
            return EndpointCaptioner(self.plan.config)
        return TransformersCaptioner(self.plan.config, "cuda" if self.plan.gpus_each else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        record = self.staging.read_curated(row["source"], row["episode"])
        started_s = time.time()
        clips = tuple(self._caption_clips(record))
        staged = CaptionRecord(
            clips=clips,
            num_with_text=len(record.clips) - len(clips),
            started_s=started_s,
            ended_s=time.time(),
            made_from=_made_from(self.plan.captioner, record),
        )
        path = captions_json(self.plan.staging, record.source, record.episode)
        write_atomic(path, staged.model_dump_json().encode())
        return {"clips": len(clips), "captioned": sum(clip.caption is not None for clip in clips)}

    def _caption_clips(self, record: EpisodeRecord) -> Iterator[ClipCaption]:
        """In order, with as many requests under way as the plan allows and few decoded clips in memory."""
        pool = ThreadPoolExecutor(self.plan.threads)
        waiting: deque[tuple[str, Future[_Answered]]] = deque()
        try:
            for members in self.staging.curated_members(record):
                meta = SampleMeta.model_validate_json(members["meta.json"])
                if self.plan.config.only_missing and (meta.instruction or meta.captions):
                    continue
                frames = shown_frames(decode_clip(members[f"{next(iter(meta.views))}.mp4"]), self.plan.config.frames)
                waiting.append((members["__key__"], pool.submit(self._ask, frames)))
                if len(waiting) > 2 * self.plan.threads:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, frames: UInt8[np.ndarray, "f h w 3"]) -> _Answered:
        key = self.cache.key(frames, self.plan.answers)
        answer = self.cache.find(key)
        if answer is not None:
            return _Answered(answer, is_cached=True)
        answer = self.captioner.answer(frames)
        self.cache.keep(key, answer)
        return _Answered(answer, is_cached=False)

    def _collect(self, key: str, asked: "Future[_Answered]") -> ClipCaption:
        try:
            answered = asked.result()
        except CaptionError as error:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                self.captioner.check(self.plan.height, self.plan.width)  # raises where nothing can be captioned
                self._failures_in_a_row = 0
            return ClipCaption(key=key, reason=error.reason, detail=error.detail, has_answer=False, is_cached=False)
        if not answered.is_cached:
            self._failures_in_a_row = 0
        return _clip_caption(key, answered)


def _clip_caption(key: str, answered: _Answered) -> ClipCaption:
    answer = answered.answer
    common: dict[str, Any] = {"key": key, "has_answer": True, "is_cached": answered.is_cached}
    common |= {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
    try:
        return ClipCaption(**common, caption=read_caption(answer))
    except CaptionError as error:
        return ClipCaption(**common, reason=error.reason, detail=error.detail)


def shown_frames(video: UInt8[np.ndarray, "f h w 3"], num_frames: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Evenly spaced from the first to the last; one alone is the middle one."""
    last = len(video) - 1
    if num_frames == 1:
        return video[[last // 2]]
    positions = np.linspace(0, last, min(num_frames, len(video)))
    return video[np.floor(positions + 0.5).astype(np.int64)]


# --- what it came to ----------------------------------------------------------------------------------------------


class CaptionRun(StrictConfig):
    """What the last look at each episode took; another build may find all answers in the cache."""

    from_cache: int = Field(description="Clips whose answer was there already.")
    tokens_in: int
    tokens_out: int
    cost: float | None
    seconds: float = Field(description="During which at least one worker waited for new answers.")
    tokens_per_s: float | None = Field(description="Written by the model, over all workers; null: nothing was asked.")


class CaptionSummary(StrictConfig):
    info: CaptionInfo
    run: CaptionRun

    def sentence(self) -> str:
        info, run = self.info, self.run
        failed = ", ".join(f"{number} {reason}" for reason, number in info.failed.items())
        parts = [
            f"{info.captioned} of {info.clips} clips captioned by {info.model}",
            f"{info.with_text} had an instruction",
            f"{run.from_cache} answers came from the cache",
            *([f"without caption: {failed}"] if failed else []),
            f"{run.tokens_in} tokens read and {run.tokens_out} written"
            + (f" at {run.tokens_per_s:.0f} tokens/s" if run.tokens_per_s is not None else ""),
            *([f"cost {run.cost:.4g}"] if run.cost is not None else []),
        ]
        return "; ".join(parts)


def read_caption_records(plan: CaptionPlan, records: Iterable[EpisodeRecord]) -> list[CaptionRecord]:
    staged = (_staged(plan.staging, record, plan.captioner) for record in records if record.clips)
    return [one for one in staged if one is not None]


def summarise_captions(plan: CaptionPlan, records: Sequence[CaptionRecord]) -> CaptionSummary:
    clips = [clip for record in records for clip in record.clips]
    with_text = sum(record.num_with_text for record in records)
    failed = Counter(clip.reason for clip in clips if clip.reason is not None)
    tokens, new_tokens = _tokens(clips), _tokens([clip for clip in clips if not clip.is_cached])
    asked = [record for record in records if any(clip.has_answer and not clip.is_cached for clip in record.clips)]
    seconds = _covered_s([(record.started_s, record.ended_s) for record in asked])
    return CaptionSummary(
        info=CaptionInfo(
            model=plan.model,
            captioner=plan.captioner,
            clips=with_text + len(clips),
            with_text=with_text,
            captioned=sum(clip.caption is not None for clip in clips),
            failed=dict(sorted(failed.items())),
            **tokens,
            uncounted=sum(clip.has_answer and None in (clip.tokens_in, clip.tokens_out) for clip in clips),
            cost=_cost(plan.config, tokens),
        ),
        run=CaptionRun(
            from_cache=sum(clip.is_cached for clip in clips),
            **new_tokens,
            cost=_cost(plan.config, new_tokens),
            seconds=round(seconds, 3),
            tokens_per_s=round(new_tokens["tokens_out"] / seconds, 3) if seconds > 0 else None,
        ),
    )


def _tokens(clips: Iterable[ClipCaption]) -> dict[str, int]:
    clips = list(clips)
    return {
        "tokens_in": sum(clip.tokens_in or 0 for clip in clips),
        "tokens_out": sum(clip.tokens_out or 0 for clip in clips),
    }


def _cost(config: CaptionConfig, tokens: Mapping[str, int]) -> float | None:
    if config.price_in is None and config.price_out is None:
        return None
    cost = tokens["tokens_in"] * (config.price_in or 0) + tokens["tokens_out"] * (config.price_out or 0)
    return round(cost / 1e6, 6)


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one span covers: workers overlap, and a build may have paused."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
