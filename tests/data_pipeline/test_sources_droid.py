import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.align import ClipClock, align_control
from data_pipeline.sources import Episode, Source, SourceError, VideoSegment, detect_kind, open_source
from data_pipeline.sources.droid import DroidConfig, TimedVideo
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_video

SERIALS = {"wrist": "18026681", "ext1": "22008760", "ext2": "24400334"}
VIEWS = {"wrist": "wrist", "ext1": "exterior_1", "ext2": "exterior_2"}
START_MS = 1_688_748_143_000
LATENCY_MS = 41
STEP = np.arange(20)


def even_steps(length: int) -> np.ndarray:
    """Start of each step: 15 Hz, in whole milliseconds."""
    return START_MS + np.round(np.arange(length) * 1000 / 15).astype(np.int64)


def write_episode(
    root: Path,
    folder: str = "AUTOLab/success/2023-07-07/Fri_Jul__7_09:42:23_2023",
    length: int = 20,
    *,
    steps_ms: np.ndarray | None = None,
    num_video_frames: int | None = None,
    timestamps_json: bool = False,
    movement_enabled: Sequence[bool] | None = None,
    metadata: dict[str, Any] | None = None,
    with_times: bool = True,
) -> Path:
    """As trajectory_writer.py and svo_to_mp4.py do it. Frame i shows the number i; the mp4 claims another rate.

    A step starts, takes the pictures (which are LATENCY_MS old), reads the arm, and sends its action 60 ms later.
    """
    path = root / folder
    uuid = f"AUTOLab+5d05c5aa+{len(folder)}"
    steps = even_steps(length) if steps_ms is None else steps_ms
    num_video_frames = length - 1 if num_video_frames is None else num_video_frames  # the last one is often lost
    for serial in SERIALS.values():
        video = path / "recordings" / "MP4" / f"{serial}.mp4"
        times = [round(1000 * i / 60) for i in range(num_video_frames)]
        write_video(video, numbered_frames(range(num_video_frames)), times_ms=times)
        if timestamps_json:
            video.with_name(f"{serial}_timestamps.json").write_text(json.dumps(steps[:num_video_frames].tolist()))
    with h5py.File(path / "trajectory.h5", "w") as file:
        file.attrs["current_task"] = "Move object"
        rows = np.stack([np.arange(length)] * 7, axis=1).astype(np.float64)
        for offset, name in enumerate(("joint_position", "joint_velocity")):
            file[f"action/{name}"] = rows + 100 * offset
        for offset, name in enumerate(("cartesian_position", "cartesian_velocity")):
            file[f"action/{name}"] = 0.01 * rows[:, :6] + offset
        file["action/gripper_position"] = (np.arange(length) > 5).astype(np.float64)
        robot = file.create_group("observation/robot_state")
        robot["joint_positions"], robot["cartesian_position"] = rows, 0.01 * rows[:, :6]
        robot["gripper_position"] = np.zeros(length)
        enabled = np.ones(length, dtype=bool) if movement_enabled is None else np.array(movement_enabled)
        file["observation/controller_info/movement_enabled"] = enabled
        for name, serial in SERIALS.items():
            file[f"observation/camera_type/{serial}"] = np.full(length, int(name != "wrist"))
            if with_times:
                cameras = f"observation/timestamp/cameras/{serial}"
                file[f"{cameras}_frame_received"] = steps
                file[f"{cameras}_estimated_capture"] = steps - LATENCY_MS
        if with_times:
            file["observation/timestamp/robot_state/read_start"] = steps
            file["observation/timestamp/control/step_start"] = steps
            file["observation/timestamp/control/control_start"] = steps + 60
            file["observation/timestamp/skip_action"] = ~enabled
    told = {"uuid": uuid, "current_task": " Move  object ", "success": "success" in folder, "trajectory_length": length}
    told |= {f"{name}_cam_serial": serial for name, serial in SERIALS.items()}
    told |= {f"{name}_mp4_path": f"success/…/{serial}.mp4" for name, serial in SERIALS.items()}
    (path / f"metadata_{uuid}.json").write_text(json.dumps(told if metadata is None else metadata))
    return path


def open_droid(path: Path, **settings: Any) -> Source:
    return open_source(DroidConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def only(source: Source) -> Episode:
    (episode,) = read_all(source)
    return episode


def shown(episode: Episode, view: str = "wrist") -> list[int]:
    footage = episode.views[view]
    return read_numbers(
        footage.read(footage.positions(np.arange(episode.num_frames) / episode.fps, episode.fps).tolist())
    )


# --- the clock -------------------------------------------------------------------------------------------------------


def test_frames_stand_where_they_were_taken_and_actions_where_they_were_sent(tmp_path: Path) -> None:
    write_episode(tmp_path)
    episode = only(open_droid(tmp_path, licence="CC-BY-4.0"))
    assert sorted(episode.views) == ["exterior_1", "exterior_2", "wrist"]
    for view in episode.views:
        assert shown(episode, view) == list(range(19))
    assert (episode.fps, episode.control_hz, episode.num_frames) == (15.0, 15.0, 19)
    assert episode.control_times_s is not None
    assert episode.actions is not None
    assert episode.proprio is not None
    assert len(episode.control_times_s) == len(episode.actions) == len(episode.proprio) == 20
    np.testing.assert_allclose(episode.control_times_s, STEP / 15 + 0.101, atol=0.001)
    np.testing.assert_array_equal(episode.actions[:, :7], np.stack([STEP] * 7, axis=1))
    np.testing.assert_array_equal(episode.actions[:, 7], STEP > 5)
    # The arm moves one unit per step and was read 60 ms before the action was sent.
    np.testing.assert_allclose(episode.proprio[:-1, 0], (STEP + 0.9)[:-1], atol=0.02)
    assert (episode.instruction, episode.success, episode.embodiment) == ("Move object", True, "droid_franka")
    assert episode.repairs == ()


def test_a_late_step_shifts_what_follows(tmp_path: Path) -> None:
    steps = even_steps(20)
    steps[10:] += 180  # the machine was busy for nearly three steps
    write_episode(tmp_path, steps_ms=steps)
    episode = only(open_droid(tmp_path))
    assert episode.num_frames == 22
    assert shown(episode) == [*range(10), 9, 10, 10, *range(10, 19)]  # the nearest frames stand in for those lost
    assert episode.control_times_s is not None
    assert np.diff(episode.control_times_s).max() == pytest.approx(1 / 15 + 0.18, abs=0.002)
    assert any("gap of 0.25 s" in note for note in episode.repairs)


def test_the_list_beside_a_video_finds_its_frames(tmp_path: Path) -> None:
    """A video that lost many frames can be matched only because the list says when each was received."""
    path = write_episode(tmp_path)
    kept = [i for i in range(20) if i not in (3, 4, 12, 13)]
    for serial in SERIALS.values():
        video = path / "recordings" / "MP4" / f"{serial}.mp4"
        write_video(video, numbered_frames(kept))
        video.with_name(f"{serial}_timestamps.json").write_text(json.dumps(even_steps(20)[kept].tolist()))
    episode = only(open_droid(tmp_path))
    assert episode.num_frames == 20
    assert shown(episode) == [0, 1, 2, 2, 5, 5, 6, 7, 8, 9, 10, 11, 11, 14, 14, 15, 16, 17, 18, 19]
    assert isinstance(episode.views["wrist"], TimedVideo)


def test_by_number_where_that_is_wanted(tmp_path: Path) -> None:
    write_episode(tmp_path)
    episode = only(open_droid(tmp_path, clock="nominal"))
    assert episode.control_times_s is None
    assert episode.actions is not None
    assert (episode.num_frames, len(episode.actions)) == (19, 19)
    assert isinstance(episode.views["wrist"], VideoSegment)
    assert shown(episode) == episode.actions[:, 0].tolist() == list(range(19))
    assert episode.content_sha256 != only(open_droid(tmp_path)).content_sha256


@pytest.mark.parametrize("damage", ["absent", "backwards", "other clock", "too slow", "short"])
def test_times_that_cannot_be_true_are_not_used(tmp_path: Path, damage: str) -> None:
    path = write_episode(tmp_path, with_times=damage != "absent", timestamps_json=damage == "backwards")
    with h5py.File(path / "trajectory.h5", "a") as file:
        if damage == "backwards":
            file["observation/timestamp/control/control_start"][7] -= 500
        if damage == "other clock":
            file["observation/timestamp/robot_state/read_start"][...] -= 3_600_000
        if damage == "too slow":
            for serial in SERIALS.values():
                file[f"observation/timestamp/cameras/{serial}_estimated_capture"][...] = START_MS + 500 * np.arange(20)
        if damage == "short":
            del file["observation/timestamp/control/control_start"]
            file["observation/timestamp/control/control_start"] = even_steps(12)
    episode = only(open_droid(tmp_path))
    assert episode.control_times_s is None
    assert any("frame i is paired with row i" in note for note in episode.repairs)
    assert shown(episode) == list(range(19))


def test_a_clip_gets_the_actions_that_were_sent_in_it(tmp_path: Path) -> None:
    enabled = STEP != 9
    write_episode(tmp_path, movement_enabled=enabled.tolist())
    source = open_droid(tmp_path)
    episode, embodiment = only(source), source.embodiment()
    assert embodiment is not None
    assert episode.actions is not None
    assert np.flatnonzero(~np.isfinite(episode.actions).all(axis=1)).tolist() == [9]
    assert any("In 1 of 20 steps" in note for note in episode.repairs)
    assert episode.control_times_s is not None
    clock = ClipClock(2 / 15, 15.0, 9, 1)
    times = episode.control_times_s
    aligned = align_control(episode.actions, episode.proprio, times, clock, embodiment)
    # 0.101 s after the first frame, action 0 is sent: at the time of frame 2 it is half done.
    np.testing.assert_allclose(aligned.actions[:6, 0], np.arange(6) + 0.49, atol=0.03)
    assert aligned.spans == ((0, 8),)
    later = align_control(episode.actions, episode.proprio, times, ClipClock(4 / 15, 15.0, 9, 1), embodiment)
    assert later.spans == ((0, 6),)


@given(
    st.lists(st.floats(0.01, 0.3), min_size=1, max_size=40).map(lambda steps: np.cumsum([0.0, *steps])),
    st.floats(-0.5, 13.0),
)
def test_the_nearest_frame_in_time_is_shown(taken: np.ndarray, time_s: float) -> None:
    video = TimedVideo("a.mp4", tuple(taken.tolist()))
    (position,) = video.positions(np.array([time_s]), 15.0)
    assert abs(taken[position] - time_s) == pytest.approx(np.abs(taken - time_s).min(), abs=1e-9)
    assert pickle.loads(pickle.dumps(video)) == video


# --- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "dims", "row_3", "name"),
    [
        ("joint_position", 8, 3.0, "joint_0"),
        ("joint_velocity", 8, 103.0, "joint_0_velocity"),
        ("cartesian_position", 7, 0.03, "x"),
        ("cartesian_velocity", 7, 1.03, "x_velocity"),
    ],
)
def test_the_action_space_is_chosen(tmp_path: Path, space: str, dims: int, row_3: float, name: str) -> None:
    write_episode(tmp_path)
    source = open_droid(tmp_path, action_space=space, clock="nominal")
    episode, embodiment = only(source), source.embodiment()
    assert embodiment is not None
    assert episode.actions is not None
    assert episode.proprio is not None
    assert episode.actions.shape[1] == episode.proprio.shape[1] == embodiment.action_dim == dims
    assert episode.actions[3, 0] == pytest.approx(row_3)
    assert embodiment.action_names[0] == name
    assert embodiment.gripper_actions == (dims - 1,)
    assert len(embodiment.action_rotations) == (space == "cartesian_position")
    assert (len(embodiment.relative_slots()) > 0) == space.endswith("position")


def test_annotations_beat_the_coarse_task(tmp_path: Path) -> None:
    write_episode(tmp_path, "AUTOLab/success/a")
    write_episode(tmp_path, "AUTOLab/failure/of_another_length")
    uuid = json.loads(next((tmp_path / "AUTOLab/success/a").glob("*.json")).read_text())["uuid"]
    texts = {uuid: {"language_instruction1": "", "language_instruction2": "put the pen in the cup"}, "other": 3}
    (tmp_path / "aggregated-annotations-030724.json").write_text(json.dumps(texts))
    failed, done = read_all(open_droid(tmp_path))
    assert (done.instruction, failed.instruction) == ("put the pen in the cup", "Move object")
    assert (done.success, failed.success) == (True, False)
    (tmp_path / "aggregated-annotations-030724.json").write_text("[1, ")
    with pytest.raises(UserError, match="annotations cannot be read"):
        read_all(open_droid(tmp_path))


def test_silent_metadata_is_filled_in_from_the_recording(tmp_path: Path) -> None:
    write_episode(tmp_path, "lab/failure/a", metadata={})
    episode = only(open_droid(tmp_path))
    assert sorted(episode.views) == ["exterior_1", "exterior_2", "wrist"]
    assert episode.views["wrist"].path.endswith("18026681.mp4")
    assert (episode.success, episode.instruction) == (False, None)


def test_a_folder_without_metadata_is_not_valid(tmp_path: Path) -> None:
    write_episode(tmp_path, "lab/success/a")
    for path in write_episode(tmp_path, "lab/success/b").glob("metadata_*.json"):
        path.unlink()
    source = open_droid(tmp_path)
    assert len(source.list_episodes()) == 1
    assert source.repairs() == ("Folders without metadata are not valid and left out: 1.",)
    assert only(source).repairs == source.repairs()


def test_a_lost_camera_costs_only_its_view(tmp_path: Path) -> None:
    path = write_episode(tmp_path)
    (path / "recordings" / "MP4" / f"{SERIALS['ext2']}.mp4").unlink()
    episode = only(open_droid(tmp_path))
    assert sorted(episode.views) == ["exterior_1", "wrist"]
    assert any("exterior_2 is left out: missing_video" in note for note in episode.repairs)


def test_a_bad_episode_is_its_own_problem(tmp_path: Path) -> None:
    write_episode(tmp_path, "0")
    (write_episode(tmp_path, "1") / "trajectory.h5").unlink()
    data = (write_episode(tmp_path, "2") / "trajectory.h5").read_bytes()
    (tmp_path / "2" / "trajectory.h5").write_bytes(data[: len(data) // 2])
    for video in write_episode(tmp_path, "3").glob("recordings/MP4/*.mp4"):
        video.write_bytes(b"")
    write_episode(tmp_path, "4", metadata={"wrist_cam_serial": "../../../../secret"})
    for metadata in write_episode(tmp_path, "5").glob("metadata_*.json"):
        metadata.write_text("{")
    write_episode(tmp_path, "6", num_video_frames=9)
    with h5py.File(write_episode(tmp_path, "7") / "trajectory.h5", "a") as file:
        del file["action"]
    source = open_droid(tmp_path)
    found: dict[str, Any] = {}
    for episode_id in source.list_episodes():
        try:
            found[episode_id[0]] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[episode_id[0]] = error.reason
    assert found == {
        "0": 19,
        "1": "missing_file",
        "2": "truncated_file",
        "3": "not_a_video",
        "4": "outside_folder",
        "5": "unreadable_file",
        "6": "frame_count_mismatch",
        "7": "bad_record",
    }


def test_unusable_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such"):
        open_droid(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="holds no DROID episodes"):
        open_droid(tmp_path).list_episodes()


def test_the_kind_is_found_out(tmp_path: Path) -> None:
    write_episode(tmp_path)
    assert detect_kind(tmp_path) == "droid"
