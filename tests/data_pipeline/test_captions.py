"""Captions: what is asked, what is kept, what is counted, and what stops a build; against a server in this process."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.loader import UserError
from data_pipeline.curate.captioners import Answer, CaptionConfig, CaptionError, clean_caption, read_caption
from data_pipeline.curate.captions import (
    MAX_FAILURES_IN_A_ROW,
    AnswerCache,
    CaptionEpisode,
    CaptionRecord,
    ClipCaption,
    captions_json,
    plan_captions,
    read_caption_records,
    read_captions,
    shown_frames,
    summarise_captions,
)
from data_pipeline.curate.endpoint_captioner import EndpointCaptioner
from data_pipeline.encode import EncodeEpisode, EncodePlan
from data_pipeline.encoders import EmbeddedCodec, HashedTextEncoder
from data_pipeline.sample import SampleMeta, read_tensor, validate
from data_pipeline.shards import TarWriter, tar_records
from data_pipeline.staging import EpisodeRecord, StagedClip, Staging, write_record
from data_pipeline.video_io import encode_video
from tests.data_pipeline.caption_server import CaptionServer, Reply, completion, describe
from tests.data_pipeline.tiny_dataset import CHANNELS, FPS, NUM_FRAMES, VIEW, tiny_sample

ROW = {"source": "lab", "episode": "episode_1"}
KEY = "secret-key-0123456789"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = CaptionServer()
    yield server
    server.stop()


def stage(root: Path, texts: list[str | None]) -> EpisodeRecord:
    """Episode 1 of source lab; clip c is a square of brightness 4 c with the instruction `texts[c]`."""
    staging = Staging(root)
    tar = staging.curated_tar(**ROW)
    clips = []
    with TarWriter(tar) as writer:
        for index, text in enumerate(texts):
            sample = tiny_sample(1, index, has_actions=False, text=text)
            frames = np.full((NUM_FRAMES, 16, 16, 3), 4 * index, dtype=np.uint8)
            members = {"__key__": sample.key, "front.mp4": encode_video(frames, None, FPS)}
            records = tar_records(members | {"meta.json": sample.meta.model_dump_json().encode()})
            place = {"offset": writer.add(records), "num_bytes": len(records)}
            clips.append(StagedClip(key=sample.key, clip_index=index, start_s=0.0, motion=0.0, **place))
    record = EpisodeRecord(
        **ROW,
        content_sha256="0" * 64,
        embodiment=None,
        has_actions=False,
        has_instruction=False,
        resolution=16,
        found=len(clips),
        clips=tuple(clips),
        rejected=(),
        repairs=(),
    )
    write_record(tar, record)
    return record


def endpoint(server_or_url, **changes) -> CaptionConfig:
    settings = {"model": "tiny-vlm", "frames": 3, "backoff_s": 0.01, "retries": 2, "timeout_s": 5.0, "concurrency": 2}
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url
    return CaptionConfig(kind="endpoint", url=url, **(settings | changes))


def plan_for(config, root, *, cache=None, num_workers=1, gpus=0):
    return plan_captions(config, root, cache or root.parent / "cache", VIEW, num_workers, gpus)


def caption(config, root, texts=(None, None, None, None), **options) -> tuple[CaptionRecord, object]:
    if not Staging(root).curated_tar(**ROW).is_file():
        stage(root, list(texts))
    plan = plan_for(config, root, **options)
    CaptionEpisode(plan)(ROW)
    return CaptionRecord.model_validate_json(captions_json(root, **ROW).read_bytes()), plan


def captions_of(record):
    return [clip.caption for clip in record.clips]


def about_clips(server):
    """The requests but for those that only try the endpoint."""
    return [request for request in server.requests if request.clip is not None]


EXPECTED = [f"this is clip {index}" for index in range(4)]


# --- asking -------------------------------------------------------------------------------------------------------


def test_each_clip_gets_the_caption_of_its_own_frames(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_KEY", KEY)
    config = endpoint(server, api_key_env="LAB_KEY", prompt="What is it?", request={"seed": 7, "temperature": None})
    record, _ = caption(config, tmp_path / "s")
    assert captions_of(record) == EXPECTED
    assert [clip.key for clip in record.clips] == [f"key001-{index:04d}" for index in range(4)]
    assert {(clip.tokens_in, clip.tokens_out, clip.is_cached) for clip in record.clips} == {(100, 10, False)}
    for request in about_clips(server):
        assert request.path == "/v1/chat/completions"
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert {name: request.body.get(name) for name in ("model", "max_tokens", "seed", "temperature")} == {
            "model": "tiny-vlm",
            "max_tokens": 96,
            "seed": 7,
            "temperature": None,
        }
        assert "temperature" not in request.body
        assert [image.shape for image in request.images] == [(16, 16, 3)] * 3
        assert request.body["messages"][0]["content"][-1] == {"type": "text", "text": "What is it?"}
    stored = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(stored) > 4 and not any(KEY in text for text in stored)


def test_only_clips_without_text_are_asked_about(server, tmp_path):
    texts = ["push it", None, "pull it", None]
    record, _ = caption(endpoint(server), tmp_path / "s", texts)
    assert captions_of(record) == EXPECTED[1::2]
    assert record.num_with_text == 2
    everything, _ = caption(endpoint(server, only_missing=False), tmp_path / "s", texts)
    assert captions_of(everything) == EXPECTED


def test_frames_are_sent_in_order(server):
    video = np.repeat(np.arange(5, dtype=np.uint8) * 40, 16 * 16 * 3).reshape(5, 16, 16, 3)
    EndpointCaptioner(endpoint(server)).answer(video)
    assert [round(float(image.mean()) / 40) for image in server.requests[0].images] == [0, 1, 2, 3, 4]


def test_frames_are_evenly_spaced():
    video = np.arange(17, dtype=np.uint8).reshape(17, 1, 1, 1).repeat(3, axis=3)
    shown = {number: shown_frames(video, number)[:, 0, 0, 0].tolist() for number in (1, 2, 3, 5, 17, 40)}
    assert shown == {1: [8], 2: [0, 16], 3: [0, 8, 16], 5: [0, 4, 8, 12, 16], 17: [*range(17)], 40: [*range(17)]}
    assert shown_frames(video[:1], 8).shape == (1, 1, 1, 3)


def test_requests_overlap_and_captions_stay_in_order(server, tmp_path):
    fourth = threading.Event()

    def first_answer_after_the_fourth(request):
        if request.clip == 3:
            fourth.set()
        assert request.clip != 0 or fourth.wait(60)
        return describe(request)

    server.behave = first_answer_after_the_fourth
    record, plan = caption(endpoint(server, concurrency=4, timeout_s=90), tmp_path / "s", [None] * 20)
    assert captions_of(record) == [f"this is clip {index}" for index in range(20)]
    assert plan.threads == 4
    assert 2 <= server.max_at_once <= 4


@pytest.mark.parametrize(
    ("concurrency", "num_workers", "expected"), [(None, 4, (4, 4)), (3, 8, (3, 1)), (10, 4, (4, 3)), (1, 1, (1, 1))]
)
def test_requests_are_shared_out_to_workers(server, tmp_path, concurrency, num_workers, expected):
    plan = plan_for(endpoint(server, concurrency=concurrency), tmp_path, num_workers=num_workers, gpus=2)
    assert (plan.num_workers, plan.threads) == expected
    assert plan.gpus_each == 0


def test_no_captions_are_no_plan(tmp_path):
    assert plan_for(CaptionConfig(), tmp_path) is None


# --- the cache ----------------------------------------------------------------------------------------------------


def test_another_build_pays_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_KEY", KEY)
    first, _ = caption(endpoint(server, api_key_env="LAB_KEY"), tmp_path / "one", cache=tmp_path / "cache")
    asked = len(about_clips(server))
    again, plan = caption(endpoint(server, api_key_env="LAB_KEY"), tmp_path / "two", cache=tmp_path / "cache")
    assert captions_of(again) == captions_of(first)
    assert all(clip.is_cached for clip in again.clips)
    assert len(about_clips(server)) == asked
    # A start of the same build needs neither server nor key.
    server.stop()
    monkeypatch.delenv("LAB_KEY")
    CaptionEpisode(plan)(ROW)


@pytest.mark.parametrize(
    ("changes", "asks_anew"),
    [
        ({"prompt": "Where is it?"}, True),
        ({"model": "other"}, True),
        ({"max_new_tokens": 97}, True),
        ({"request": {"top_p": 0.5}}, True),
        ({"frames": 2}, True),
        ({"timeout_s": 9.0, "retries": 1, "concurrency": 1, "price_in": 3.0}, False),
        ({"only_missing": False}, False),
    ],
)
def test_answers_belong_to_model_prompt_and_settings(server, tmp_path, changes, asks_anew):
    caption(endpoint(server), tmp_path / "one")
    asked = len(about_clips(server))
    caption(endpoint(server, **changes), tmp_path / "two")
    assert (len(about_clips(server)) > asked) == asks_anew


def test_the_same_model_may_be_served_elsewhere(server, tmp_path):
    caption(endpoint(server), tmp_path / "one")
    other = CaptionServer(lambda request: Reply(body=completion("something else")))
    record, _ = caption(endpoint(other), tmp_path / "two")
    assert captions_of(record) == EXPECTED
    assert not about_clips(other)
    other.stop()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"text": 3}', b"\xff\xfe"])
def test_a_damaged_answer_is_asked_for_anew(server, tmp_path, damage):
    caption(endpoint(server), tmp_path / "one")
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_bytes(damage)
    record, _ = caption(endpoint(server), tmp_path / "two")
    assert captions_of(record) == EXPECTED
    again, _ = caption(endpoint(server), tmp_path / "three")
    assert all(clip.is_cached for clip in again.clips)


def test_many_writers_of_one_answer(tmp_path):
    cache = AnswerCache(tmp_path / "cache")
    key = cache.key(np.zeros((1, 2, 2, 3), np.uint8), "model")
    answers = [Answer(text="x" * 5000 * i, tokens_in=i, tokens_out=i, is_cut=False, is_refusal=False) for i in range(8)]
    stop = threading.Event()

    def read() -> int:
        found = 0
        while not stop.is_set():
            answer = cache.find(key)
            assert answer is None or answer in answers
            found += answer is not None
        return found

    with ThreadPoolExecutor(10) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(lambda a=a: [cache.keep(key, a) for _ in range(30)]) for a in answers]
        wait(writers)
        stop.set()
        assert all(writer.exception() is None for writer in writers)
        assert all(reader.result() for reader in readers)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [f"{key}.json"]


def test_the_shape_of_frames_counts():
    cache = AnswerCache(Path())
    shapes = [(1, 2, 4, 3), (1, 4, 2, 3), (2, 2, 2, 3)]
    assert len({cache.key(np.zeros(shape, np.uint8), "model") for shape in shapes}) == 3


# --- what fails ---------------------------------------------------------------------------------------------------


def only_third_clip(reply):
    """Clip 2 is answered so, every other as it should be."""
    return lambda request: reply if request.clip == 2 else describe(request)


def test_one_request_in_three_fails(server, tmp_path):
    server.behave = lambda request: Reply(503, b"busy") if request.number % 3 == 2 else describe(request)
    record, _ = caption(endpoint(server, concurrency=1), tmp_path / "s", [None] * 8)
    assert captions_of(record) == [f"this is clip {index}" for index in range(8)]
    assert len(server.requests) > 9


FAILURES = {
    "server error": (Reply(500, b'{"error": {"message": "out of memory"}}'), "endpoint_error", "out of memory"),
    "too many requests": (Reply(429, b"later", {"Retry-After": "0.01"}), "endpoint_error", "HTTP 429"),
    "a date to come back": (Reply(503, b"x", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), "endpoint_error", ""),
    "not JSON": (Reply(200, b"<html>welcome</html>"), "bad_answer", "welcome"),
    "another JSON": (Reply(200, b'{"error": "no credit"}'), "bad_answer", "no credit"),
    "no choices": (Reply(200, b'{"choices": []}'), "bad_answer", "choices"),
    "bytes": (Reply(200, bytes(range(256))), "bad_answer", ""),
    "hangs up": (Reply(hangs_up=True), "endpoint_unreachable", ""),
    "hangs up halfway": (Reply(200, b"{", {"Content-Length": "100"}), "bad_answer", ""),
    "redirect": (Reply(302, b"", {"Location": "/elsewhere"}), "request_refused", "HTTP 302"),
    "bad request": (Reply(400, b'{"message": "too many images"}'), "request_refused", "too many images"),
    "refusal field": (Reply(200, completion(None, message={"refusal": "Against policy."})), "refusal", "Against"),
    "filtered": (Reply(200, completion("", finish_reason="content_filter")), "refusal", "filtered"),
    "declines": (Reply(200, completion("I’m sorry, but I can't help with that.")), "refusal", "I’m sorry"),
    "empty": (Reply(200, completion("  \n ")), "empty_caption", ""),
    "null": (Reply(200, completion(None)), "empty_caption", ""),
    "only thoughts": (Reply(200, completion("<think>hm, a square", finish_reason="length")), "empty_caption", "hm"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_clip_that_fails_is_counted_by_reason(server, tmp_path, case):
    reply, reason, detail = FAILURES[case]
    server.behave = only_third_clip(reply)
    record, plan = caption(endpoint(server, timeout_s=2.0, retries=1), tmp_path / "s")
    assert captions_of(record) == [*EXPECTED[:2], None, EXPECTED[3]]
    assert record.clips[2].reason == reason
    assert detail in (record.clips[2].detail or "")
    assert "\n" not in (record.clips[2].detail or "")
    info = summarise_captions(plan, [record]).info
    assert (info.captioned, info.failed) == (3, {reason: 1})
    assert not any(request.path == "/elsewhere" for request in server.requests)


@pytest.mark.parametrize("reply", [Reply(pause_s=3600), Reply(body=b" " * 100_000, byte_pause_s=0.05)])
def test_a_slow_answer_is_given_up(server, tmp_path, reply):
    """Or the test would take an hour."""
    server.behave = only_third_clip(reply)
    record, _ = caption(endpoint(server, timeout_s=1.0, retries=1), tmp_path / "s")
    assert record.clips[2].reason == "endpoint_timeout"


def test_what_may_pass_is_tried_again_and_what_was_said_is_not(server, tmp_path):
    server.behave = only_third_clip(Reply(500, b"x"))
    record = stage(tmp_path / "s", [None] * 4)
    _, plan = caption(endpoint(server, retries=0), tmp_path / "s")
    assert plan.is_due(record)
    asked = len(about_clips(server))
    server.behave = only_third_clip(Reply(body=completion("I cannot say.")))
    CaptionEpisode(plan)(ROW)
    assert len(about_clips(server)) == asked + 1
    assert not plan.is_due(record)
    assert read_caption_records(plan, [record])[0].clips[2].reason == "refusal"
    assert plan_for(endpoint(server, prompt="Another?"), tmp_path / "s").is_due(record)
    assert plan.is_due(record.model_copy(update={"found": 5}))


def test_the_key_is_not_repeated_from_an_error(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_KEY", KEY)
    server.behave = lambda request: Reply(401, f"wrong key {KEY}".encode())
    with pytest.raises(UserError, match=r"wrong key \*\*\*\); name the environment variable") as stopped:
        plan_for(endpoint(server, api_key_env="LAB_KEY"), tmp_path / "s")
    assert KEY not in str(stopped.value)


UNUSABLE = {
    "not there": (Reply(404, b'{"message": "The model `tiny-vlm` does not exist."}'), "does not exist.*captions.model"),
    "image limit": (Reply(400, b"At most 1 image(s) may be provided in one request."), "At most 1.*captions.frames"),
    "key": (Reply(403, b"forbidden"), "forbidden.*captions.api_key_env"),
    "always busy": (Reply(503, b"loading"), "loading.*server's log"),
    "a web page": (Reply(200, b"<html>"), "not a chat completion.*server's log"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_endpoint_that_cannot_work_stops_before_the_build(server, tmp_path, case):
    reply, sentence = UNUSABLE[case]
    server.behave = lambda request: reply
    with pytest.raises(UserError, match=sentence) as stopped:
        plan_for(endpoint(server), tmp_path / "s")
    assert "\n" not in str(stopped.value)
    assert len(server.requests) <= 3


def test_nobody_listens(server, tmp_path):
    server.stop()
    with pytest.raises(UserError, match=r"Connection refused.*start the server or correct captions.url"):
        plan_for(endpoint(server), tmp_path / "s")
    with pytest.raises(UserError, match=r"captions\.kind=none"):
        plan_for(endpoint("http://no-such-host.invalid:1/v1", retries=0), tmp_path / "s")


def test_an_endpoint_that_dies_stops_the_build_which_then_goes_on(server, tmp_path):
    server.behave = lambda request: describe(request) if request.number <= 10 else Reply(hangs_up=True)
    stage(tmp_path / "s", [None] * 30)
    plan = plan_for(endpoint(server, retries=0), tmp_path / "s")
    with pytest.raises(UserError, match="start the server"):
        CaptionEpisode(plan)(ROW)
    assert not captions_json(tmp_path / "s", **ROW).exists()
    assert len(server.requests) < 25
    answered = len([*(tmp_path / "cache").rglob("*.json")])
    assert answered == 10  # all but the try with a grey clip
    server.behave = describe
    record, _ = caption(endpoint(server), tmp_path / "s")
    assert sum(clip.is_cached for clip in record.clips) == 10
    assert None not in captions_of(record)


def test_clips_that_fail_do_not_stop_an_endpoint_that_works(server, tmp_path):
    server.behave = lambda request: describe(request) if request.clip is None else Reply(500, b"crash")
    record, plan = caption(endpoint(server, retries=0), tmp_path / "s", [None] * 23)
    assert captions_of(record) == [None] * 23
    assert summarise_captions(plan, [record]).info.failed == {"endpoint_error": 23}
    tries = [request for request in server.requests if request.clip is None]
    assert len(tries) == 1 + 23 // MAX_FAILURES_IN_A_ROW


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "ключ"])
def test_a_key_that_is_none(tmp_path, monkeypatch, value):
    monkeypatch.delenv("LAB_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("LAB_KEY", value)
    with pytest.raises(UserError, match="LAB_KEY") as stopped:
        plan_for(endpoint("http://127.0.0.1:9/v1", api_key_env="LAB_KEY"), tmp_path)
    assert "two" not in str(stopped.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "endpoint", "url": "http://a/v1"}, "needs `url` and `model`"),
        ({"kind": "transformers"}, "needs `folder`"),
        ({"url": "localhost:8000"}, "base address"),
        ({"url": "file:///etc/passwd"}, "base address"),
        ({"url": "http://a/v1?key=1"}, "base address"),
        ({"url": "http://me:secret@a/v1"}, "no password"),
        ({"api_key_env": "sk-0123"}, "name of an environment variable"),
        ({"frames": 0}, "greater than 0"),
    ],
)
def test_settings_that_are_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        CaptionConfig(**settings)


def test_the_address_may_be_given_in_full():
    assert endpoint("http://a:1/v1/").url == endpoint("http://a:1/v1/chat/completions").url == "http://a:1/v1"


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A hand\n\n opens\ta drawer. ", "A hand opens a drawer."),
        ('"A hand opens a drawer."', "A hand opens a drawer."),
        ('"A" and "B"', '"A" and "B"'),
        ("Caption: a hand", "a hand"),
        ("**Description:** a hand", "a hand"),
        ("<think>What is it?</think>\nA hand.", "A hand."),
        ("What is it?</think> A hand.", "A hand."),
        ("A\x00 hand\x1b", "A hand"),
        ("Рука открывает ящик.", "Рука открывает ящик."),
    ],
)
def test_captions_are_cleaned(text, cleaned):
    assert clean_caption(text) == cleaned


def test_a_cut_text_ends_with_a_sentence():
    assert clean_caption("A hand opens. It closes. Then it", is_cut=True) == "A hand opens. It closes."
    assert clean_caption("A hand opens the 1.5 litre", is_cut=True) == "A hand opens the 1.5 litre"
    assert clean_caption("A hand opens.", is_cut=True) == "A hand opens."


@given(st.text(max_size=80), st.booleans())
def test_any_text_becomes_one_line(text, is_cut):
    cleaned = clean_caption(text, is_cut=is_cut)
    assert cleaned == cleaned.strip()
    assert len(cleaned.splitlines()) <= 1
    cleaned.encode()


@pytest.mark.parametrize(
    "text", ["I cannot see", "I'm sorry", "I am unable to", "Unfortunately, I do", "As an AI model"]
)
def test_refusals(text):
    answer = Answer(text=text + " that.", tokens_in=1, tokens_out=1, is_cut=False, is_refusal=False)
    with pytest.raises(CaptionError, match="refusal"):
        read_caption(answer)


@pytest.mark.parametrize("text", ["I can see a hand.", "A sign says I cannot open.", "A sorry sight."])
def test_no_refusals(text):
    assert read_caption(Answer(text=text, tokens_in=1, tokens_out=1, is_cut=False, is_refusal=False)) == text


# --- the summary --------------------------------------------------------------------------------------------------


def clip(key, **changes):
    values = {"caption": "c", "tokens_in": 1000, "tokens_out": 50, "has_answer": True, "is_cached": False} | changes
    return ClipCaption(key=key, **values)


def test_the_summary_adds_up(server, tmp_path):
    plan = plan_for(endpoint(server, price_in=2.0, price_out=10.0), tmp_path / "s")
    no_answer = {"caption": None, "has_answer": False, "tokens_in": None, "tokens_out": None}
    records = [
        CaptionRecord(
            clips=(
                clip("a"),
                clip("b", caption=None, reason="refusal"),
                clip("c", **no_answer, reason="endpoint_timeout"),
            ),
            num_with_text=4,
            started_s=100.0,
            ended_s=104.0,
            made_from="",
        ),
        CaptionRecord(
            clips=(clip("d", is_cached=True), clip("e", tokens_in=None)),
            num_with_text=0,
            started_s=102.0,
            ended_s=105.0,
            made_from="",
        ),
        CaptionRecord(
            clips=(clip("f", is_cached=True),), num_with_text=0, started_s=900.0, ended_s=990.0, made_from=""
        ),
    ]
    summary = summarise_captions(plan, records)
    info, run = summary.info, summary.run
    assert (info.clips, info.with_text, info.captioned) == (10, 4, 4)
    assert info.failed == {"endpoint_timeout": 1, "refusal": 1}
    assert info.clips == info.with_text + info.captioned + sum(info.failed.values())
    assert (info.tokens_in, info.tokens_out, info.uncounted) == (4000, 250, 1)
    assert info.cost == pytest.approx((4000 * 2 + 250 * 10) / 1e6)
    assert (run.from_cache, run.tokens_in, run.tokens_out, run.seconds) == (2, 2000, 150, 5.0)
    assert run.tokens_per_s == pytest.approx(150 / 5)
    assert summary.sentence() == (
        "4 of 10 clips captioned by tiny-vlm; 4 had an instruction; 2 answers came from the cache; without caption: "
        "1 endpoint_timeout, 1 refusal; 2000 tokens read and 150 written at 30 tokens/s; cost 0.0055"
    )
    nothing = summarise_captions(plan, [])
    assert (nothing.info.clips, nothing.info.cost, nothing.run.tokens_per_s) == (0, 0.0, None)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=6))
def test_time_is_counted_once_where_workers_overlap(spans):
    plan = type("Plan", (), {"model": "m", "captioner": "c", "config": CaptionConfig()})()
    records = [
        CaptionRecord(
            clips=(clip("a"),), num_with_text=0, started_s=float(start), ended_s=float(start + size), made_from=""
        )
        for start, size in spans
    ]
    seconds = {second for start, size in spans for second in range(start, start + size)}
    assert summarise_captions(plan, records).run.seconds == len(seconds)


# --- in the sample ------------------------------------------------------------------------------------------------


def encode(root, captioner):
    staging = Staging(root)
    torch.manual_seed(0)
    EmbeddedCodec(torch.zeros(192), torch.rand(192, CHANNELS), 1.0, patch=4).save(staging.codec)
    HashedTextEncoder(16).save(staging.text_encoder)
    plan = EncodePlan(staging=root, use_gpu=False, encoders="e", captioner=captioner)
    EncodeEpisode(plan)(ROW)
    record, encoded = staging.read_curated(**ROW), staging.read_encoded(**ROW)
    assert encoded.made_from == plan.identity(record)
    samples = []
    for members, (_, offset, size) in zip(staging.curated_members(record), encoded.clips, strict=True):
        samples.append(members | staging.read_members(staging.encoded_tar(**ROW), offset, size))
        assert validate(samples[-1]) == []
    metas = [SampleMeta.model_validate_json(sample["meta.json"]) for sample in samples]
    texts = [read_tensor("text", one["text.safetensors"]) if "text.safetensors" in one else None for one in samples]
    return metas, texts, encoded.made_from


def text_latents(text):
    return HashedTextEncoder(16).encode([text])[0].to(torch.bfloat16)


def test_captions_enter_meta_and_text(server, tmp_path):
    root = tmp_path / "s"
    server.behave = lambda request: Reply(400, b"x") if request.clip == 3 else describe(request)
    texts = ["push it", None, None, None]
    _, plan = caption(endpoint(server), root, texts)
    metas, latents, made_from = encode(root, plan.captioner)
    assert [meta.captions for meta in metas] == [("push it",), (EXPECTED[1],), (EXPECTED[2],), ()]
    assert [meta.instruction for meta in metas] == texts
    for found, text in zip(latents, ["push it", EXPECTED[1], EXPECTED[2]], strict=False):
        assert torch.equal(found, text_latents(text))
    assert latents[3] is None
    # Without captions, or with another model's, what was staged before has no part in it.
    for captioner in (None, "another"):
        metas, latents, other = encode(root, captioner)
        assert [meta.captions for meta in metas] == [("push it",), (), (), ()]
        assert [one is not None for one in latents] == [True, False, False, False]
        assert other != made_from


def test_the_instruction_comes_before_the_caption(server, tmp_path):
    _, plan = caption(endpoint(server, only_missing=False), tmp_path / "s", ["push it", None])
    metas, latents, _ = encode(tmp_path / "s", plan.captioner)
    assert [meta.captions for meta in metas] == [("push it", EXPECTED[0]), (EXPECTED[1],)]
    assert torch.equal(latents[0], text_latents("push it"))


def test_captions_of_other_clips_are_not_taken(server, tmp_path):
    record = stage(tmp_path / "s", [None] * 4)
    _, plan = caption(endpoint(server), tmp_path / "s")
    assert len(read_captions(tmp_path / "s", record, plan.captioner)) == 4
    assert read_captions(tmp_path / "s", record.model_copy(update={"content_sha256": "1" * 64}), plan.captioner) == {}
    captions_json(tmp_path / "s", **ROW).write_text(json.dumps({"clips": []}))
    assert read_captions(tmp_path / "s", record, plan.captioner) == {}
    assert plan.is_due(record)
