"""One episode into clips: what is cut, what is rejected and why; without Ray."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.curate.clips import clip_key, clip_starts, num_clip_frames
from data_pipeline.curate.episode import CurateEpisode, CuratePlan, SourcePlan, curate_episode, view_name
from data_pipeline.curate.shots import ShotConfig
from data_pipeline.sample import Sample, validate
from data_pipeline.shards import TarWriter
from data_pipeline.sources import FORMATS, LeRobotConfig, open_source
from data_pipeline.staging import Staging
from data_pipeline.video_copy import copy_clip
from data_pipeline.video_io import ViewConfig, decode_clip, decode_frames, encode_video
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_lerobot_v21, write_video

FRONT = ViewConfig(height=32, width=48)
CAMERAS = ("observation.images.front", "observation.images.wrist")


@pytest.fixture
def robot(tmp_path):
    return write_lerobot_v21(tmp_path / "robot", lengths=(24,), cameras=CAMERAS)


def plan_for(tmp_path, path, kind="lerobot", view_map=None, **changes):
    config = FORMATS[kind].config(path=path, name="lab", view_map=view_map)
    source = open_source(config)
    settings = {"views": {"front": FRONT}, "num_frames": 5, "fps": 10.0, "stride": 4, "actions_per_frame": 1, "crf": 18}
    return CuratePlan(
        staging=tmp_path / "staging",
        run="test",
        sources={"lab": SourcePlan(config=config, embodiment=source.embodiment())},
        **settings | changes,
    )


def curate(plan, change=lambda episode: episode):
    """The record and the samples of the source's first episode, which `change` may spoil."""
    source = open_source(plan.sources["lab"].config)
    episode_id = source.list_episodes()[0]
    episode = change(source.read_episode(episode_id))
    source.read_episode = lambda _: episode
    staging = Staging(plan.staging)
    with TarWriter(staging.curated_tar("lab", episode_id)) as writer:
        record = curate_episode(plan, "lab", source, episode_id, writer)
    return record, [Sample.from_members(members) for members in staging.curated_members(record)]


def numbers(sample, view="front"):
    return read_numbers(decode_clip(sample.video[view]))


# --- clips --------------------------------------------------------------------------------------------------------


def whole_episode(num_frames, native_fps, fps, clip_frames, stride):
    whole = [(0, num_clip_frames(num_frames, native_fps, fps))]
    return clip_starts(whole, whole, clip_frames, stride)


@given(
    st.integers(1, 200), st.sampled_from([10.0, 29.97, 30.0]), st.sampled_from([10.0, 15.0, 30.0]), st.integers(1, 20)
)
def test_clips_fill_the_episode_and_no_more(num_frames, native_fps, fps, stride):
    starts = whole_episode(num_frames, native_fps, fps, 9, stride)
    last_time = (num_frames - 0.5) / native_fps
    assert all((start + 8) / fps <= last_time + 1e-4 for start in starts)
    assert starts == list(range(0, len(starts) * stride, stride))
    assert (len(starts) * stride + 8) / fps > last_time - 1e-4  # one more would not fit


def test_same_rate_takes_every_frame():
    assert whole_episode(17, 29.97, 29.97, 17, 1) == [0] and whole_episode(16, 29.97, 29.97, 17, 1) == []
    assert whole_episode(33, 30.0, 10.0, 11, 4) == [0]


def test_keys_tell_clips_apart():
    common = {"source": "lab", "content_sha256": "0", "episode_id": "e", "start": 0, "fps": 10.0, "num_frames": 5}
    changes = [{}, *({name: f"x{value}"} for name, value in common.items()), {"views": {"front": FRONT, "b": FRONT}}]
    keys = {clip_key(**({"views": {"front": FRONT}} | common | change)) for change in changes}
    assert len(keys) == len(changes) and all(len(key) == 24 and key.isalnum() for key in keys)


# --- episodes -----------------------------------------------------------------------------------------------------


def test_clips_of_an_episode(tmp_path, robot):
    record, samples = curate(plan_for(tmp_path, robot))
    assert record.found == len(record.clips) == 5 and record.rejected == ()
    assert (record.has_actions, record.has_instruction, record.resolution) == (True, True, 48)  # not the view's 32
    assert [numbers(sample) for sample in samples] == [list(range(4 * i, 4 * i + 5)) for i in range(5)]
    assert [sample.meta.clip_index for sample in samples] == list(range(5))
    assert all(sample.actions[:, 1].tolist() == numbers(sample)[:-1] for sample in samples)
    missing = "front.latents.safetensors: expected present"  # they come in the next stage
    assert all(missing in problem for sample in samples for problem in validate(sample.to_members()))


def test_a_slower_clock_keeps_all_actions(tmp_path, robot):
    _, samples = curate(plan_for(tmp_path, robot, fps=5.0, actions_per_frame=2))
    assert [numbers(sample) for sample in samples] == [list(range(8 * i, 8 * i + 9, 2)) for i in range(2)]
    assert [sample.actions[:, 1].tolist() for sample in samples] == [list(range(8 * i, 8 * i + 8)) for i in range(2)]
    assert samples[0].meta.control_hz == 10.0 and samples[0].meta.fps == 5.0


def test_a_clock_that_fits_neither_is_resampled(tmp_path, robot):
    _, samples = curate(plan_for(tmp_path, robot, fps=8.0, actions_per_frame=1))
    times = np.arange(4) / 8 + samples[1].meta.start_s
    np.testing.assert_allclose(samples[1].actions[:, 1], times * 10, atol=1e-3)
    assert np.abs(np.array(numbers(samples[1])) - 10 * (np.arange(5) / 8 + samples[1].meta.start_s)).max() <= 0.5


def test_two_views_stay_on_one_clock(tmp_path, robot):
    views = {"front": FRONT, "wrist": ViewConfig(height=16, width=32, crop=(0, 0, 40, 64))}
    record, samples = curate(plan_for(tmp_path, robot, views=views))
    assert record.resolution == 40  # of what is used of the smaller one
    assert all(numbers(sample, "front") == numbers(sample, "wrist") for sample in samples)
    assert samples[0].meta.views["wrist"].role == "wrist"
    _, (first, *_) = curate(plan_for(tmp_path, robot, views={"hand": FRONT}, view_map={"wrist": "hand"}))
    assert set(first.video) == {"hand"}


def test_what_is_stored_as_a_sample_holds_it_is_copied(tmp_path):
    """From keyframe on and unscaled: not a pixel changes. All else is encoded, and looks the same."""
    path = tmp_path / "videos/a.mp4"
    path.parent.mkdir()
    frames = encode_video(numbered_frames(range(24)), path, 10.0) and decode_frames(path, range(24))

    def clips_of(view):
        views = {"main": view}
        return curate(plan_for(tmp_path, path.parent, "video_folder", views=views, shots=ShotConfig(detect="off")))[1]

    whole = ViewConfig(height=48, width=64)
    samples = clips_of(whole)
    for i, sample in enumerate(samples):
        is_copy = sample.video["main"] == copy_clip(path, 4 * i, 5, 10.0, 8)
        assert is_copy == (i % 2 == 0)  # a group of pictures has eight frames
        if is_copy:
            np.testing.assert_array_equal(decode_clip(sample.video["main"]), frames[4 * i : 4 * i + 5])
        assert numbers(sample, "main") == list(range(4 * i, 4 * i + 5))
    scaled = clips_of(ViewConfig(height=24, width=32))
    assert decode_clip(scaled[0].video["main"]).shape == (5, 24, 32, 3)
    first, *_ = clips_of(whole.model_copy(update={"rotate_180": True}))
    assert np.abs(decode_clip(first.video["main"]).astype(int) - frames[:5, ::-1, ::-1]).mean() < 2


@pytest.mark.parametrize(("name", "safe"), [("Front.RGB", "front_rgb"), ("cam 1", "cam_1"), ("手", "view")])
def test_view_names_fit_a_member_name(name, safe):
    assert view_name(name) == safe


def test_blocks_change_nothing(tmp_path, robot, monkeypatch):
    """However little memory decoding may use."""
    _, samples = curate(plan_for(tmp_path, robot))
    monkeypatch.setattr("data_pipeline.curate.episode.DECODE_BYTES", 1)
    assert [sample.video for sample in curate(plan_for(tmp_path, robot))[1]] == [sample.video for sample in samples]


def test_a_variable_rate_is_placed_by_time(tmp_path):
    """Frame i is shown from i^1.2 / 10 s on."""
    times = [round(100 * i**1.2) for i in range(30)]
    write_video(tmp_path / "videos/a.mp4", numbered_frames(range(30)), times_ms=times)
    _, samples = curate(plan_for(tmp_path, tmp_path / "videos", "video_folder", fps=5.0))
    assert samples
    for sample in samples:
        wanted = 1000 * (sample.meta.start_s + np.arange(5) / 5)
        nearest = np.abs(np.array(times)[:, None] - wanted).argmin(axis=0)
        assert numbers(sample) == nearest.tolist()


# --- rejections ---------------------------------------------------------------------------------------------------


def replace(**changes):
    return lambda episode: dataclasses.replace(episode, **changes)


@pytest.mark.parametrize(
    ("settings", "change", "reason", "detail"),
    [
        ({"num_frames": 49}, replace(), "too_short", "its 24 frames span 2.30 s, a clip 4.80 s"),
        ({"fps": 30.0}, replace(), "frame_rate_too_low", "10 frames/s for clips of 30"),
        (
            {"views": {"front": FRONT, "top": FRONT}},
            replace(),
            "missing_view",
            "no view top; the episode has front, wrist",
        ),
        (
            {"views": {"front": FRONT.model_copy(update={"crop": (0, 0, 48, 65)})}},
            replace(),
            "crop_outside_picture",
            "crop [0, 0, 48, 65] (top, left, height, width) of a 48x64 picture",
        ),
        ({}, replace(actions=np.zeros((24, 7), np.float32)), "wrong_dims", "7 action and 2 proprio values a row"),
    ],
)
def test_a_rejected_episode_is_one_row(tmp_path, robot, settings, change, reason, detail):
    record, samples = curate(plan_for(tmp_path, robot, **settings), change)
    assert samples == [] and record.found == 1
    (rejection,) = record.rejected
    assert rejection.reason == reason and detail in rejection.detail and rejection.clip_index is None


def test_clips_without_a_finite_action_are_rejected_alone(tmp_path, robot):
    def spoil(episode):
        actions = episode.actions.copy()
        actions[4:10] = np.nan  # clip 1 is frames 4 to 8, clip 2 begins with 8
        return dataclasses.replace(episode, actions=actions)

    record, samples = curate(plan_for(tmp_path, robot), spoil)
    assert [(one.clip_index, one.reason) for one in record.rejected] == [(1, "no_valid_actions")]
    assert [sample.meta.clip_index for sample in samples] == [0, 2, 3, 4]
    assert samples[1].meta.action_spans == ((2, 4),) and np.isfinite(samples[1].actions).all()


def test_a_damaged_spot_costs_only_its_clips(tmp_path, robot):
    """Zeros over the middle of the stream: the frames from there to the next keyframe are lost, no others."""
    path = robot / "videos/chunk-000/observation.images.front/episode_000000.mp4"
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    damaged, survivors = curate(plan_for(tmp_path, robot))
    assert 0 < len(damaged.rejected) < 5 and {one.reason for one in damaged.rejected} == {"undecodable_video"}
    assert damaged.found == len(damaged.clips) + len(damaged.rejected) == 5
    assert all(
        numbers(sample) == list(range(4 * sample.meta.clip_index, 4 * sample.meta.clip_index + 5))
        for sample in survivors
    )


def test_an_unforeseen_error_costs_one_episode(tmp_path, robot, caplog):
    plan = plan_for(tmp_path, robot)
    source = open_source(plan.sources["lab"].config)
    source.read_episode = lambda _: 1 / 0
    with TarWriter(tmp_path / "x.tar") as writer:
        record = curate_episode(plan, "lab", source, "episode_000000", writer)
    assert record.rejected[0].reason == "unexpected_error" and "ZeroDivisionError" in record.rejected[0].detail
    assert "Traceback" in caplog.text


def test_a_full_disk_is_not_the_recordings_fault(tmp_path, robot):
    """It stops the build, which can go on later, instead of rejecting what is good."""
    plan = plan_for(tmp_path, robot)
    source = open_source(plan.sources["lab"].config)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    source.read_episode = fail
    with pytest.raises(OSError, match="No space left"), TarWriter(tmp_path / "x.tar") as writer:
        curate_episode(plan, "lab", source, "episode_000000", writer)


def test_an_episode_that_ends_its_worker_is_given_up(tmp_path, robot):
    """Three processes in a row that die at it."""
    plan = plan_for(tmp_path, robot)
    (episode,) = open_source(plan.sources["lab"].config).list_episodes()
    row = {"source": "lab", "episode": episode}
    for _ in range(3):
        child = os.fork()
        if child == 0:
            worker = CurateEpisode(plan)
            worker._sources["lab"] = type("Crashing", (), {"read_episode": lambda self, _: os._exit(1)})()
            worker(row)
        os.waitpid(child, 0)
    assert not Staging(plan.staging).find_curated("lab", episode)
    assert CurateEpisode(plan)(row) == {"found": 1, "accepted": 0, "new_clips": 0, "was_kept": False}
    record = Staging(plan.staging).read_curated("lab", episode)
    assert record.rejected[0].reason == "worker_lost"
    assert CurateEpisode(plan.model_copy(update={"run": "another"}))(row)["accepted"] == 5


def test_real_recordings(shared_data, tmp_path):
    """A robot of 26 dimensions in AV1, at a third of its rate."""
    path = Path(shared_data / "g1_real_lerobot_v21_trim")
    source = open_source(LeRobotConfig(path=path, name="lab"))
    (view,) = source.read_episode(source.list_episodes()[0]).views
    views = {view_name(view): ViewConfig(height=48, width=64)}
    record, samples = curate(
        plan_for(tmp_path, path, views=views, fps=10.0, stride=16, num_frames=17, actions_per_frame=3)
    )
    assert samples and record.rejected == ()
    assert all(sample.actions.shape == (48, 26) and np.isfinite(sample.actions).all() for sample in samples)
