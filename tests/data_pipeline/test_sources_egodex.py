from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.align import ClipClock, align_control
from data_pipeline.rotations import Rotation
from data_pipeline.sources import Episode, Source, SourceError, detect_kind, open_source
from data_pipeline.sources.egodex import DIM_NAMES, FINGERTIPS, EgoDexConfig
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_video

JOINTS = [f"{side}{part}" for side in ("left", "right") for part in ("Hand", *FINGERTIPS, "Shoulder")]


def poses(seed: int, length: int) -> dict[str, np.ndarray]:
    """A random rigid motion of the camera and of every joint, as float32 [n 4 4] in the world."""
    random = np.random.default_rng(seed)
    found = {}
    for name in ("camera", *JOINTS):
        pose = np.tile(np.eye(4), (length, 1, 1))
        pose[:, :3, :3] = Rotation.random(length, rng=random).as_matrix()
        pose[:, :3, 3] = random.normal(size=(length, 3))
        found[name] = pose.astype(np.float32)
    return found


def write_episode(
    folder: Path,
    index: int = 0,
    length: int = 12,
    *,
    num_video_frames: int | None = None,
    confidences: dict[str, np.ndarray] | None = None,
    attributes: dict[str, Any] | None = None,
    joints: dict[str, np.ndarray] | None = None,
    times_ms: list[int] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    num_video_frames = length if num_video_frames is None else num_video_frames
    first = 100 * index
    write_video(
        folder / f"{index}.mp4",
        numbered_frames(range(first, first + num_video_frames)),
        times_ms=times_ms or [round(1000 * i / 30) for i in range(num_video_frames)],
    )
    path = folder / f"{index}.hdf5"
    with h5py.File(path, "w") as file:
        file["camera/intrinsic"] = np.eye(3)
        for name, pose in (joints or poses(index, length)).items():
            file[f"transforms/{name}"] = pose
        for name, values in (confidences or {}).items():
            file[f"confidences/{name}"] = values
        told = {"llm_description": "open the box", "which_llm_description": "1", "llm_type": "single"}
        file.attrs.update(told if attributes is None else attributes)
    return path


def open_egodex(path: Path, **settings: Any) -> Source:
    return open_source(EgoDexConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def only(source: Source) -> Episode:
    (episode,) = read_all(source)
    return episode


def seen_from_camera(joints: dict[str, np.ndarray], row: int, camera_row: int) -> np.ndarray:
    """Brute force: the 48 numbers of one row, with a matrix inverse per joint."""
    inverse = np.linalg.inv(joints["camera"][camera_row].astype(np.float64))
    values: list[float] = []
    for side in ("left", "right"):
        hand = inverse @ joints[f"{side}Hand"][row]
        values += [*hand[:3, 3], *hand[:3, 0], *hand[:3, 1]]
        for tip in FINGERTIPS:
            values += [*(inverse @ joints[f"{side}{tip}"][row])[:3, 3]]
    return np.array(values)


def test_actions_are_where_the_hands_go_next(tmp_path: Path) -> None:
    for index, length in ((0, 12), (1, 9)):
        write_episode(tmp_path / "part1" / "open_box", index, length)
    source = open_egodex(tmp_path, licence="CC-BY-NC-ND", name="egodex")
    for index, (episode, length) in enumerate(zip(read_all(source), (12, 9), strict=True)):
        joints = poses(index, length)
        assert episode.actions is not None
        assert episode.proprio is not None
        assert episode.actions.shape == episode.proprio.shape == (length - 1, 48)
        for row in range(length - 1):
            np.testing.assert_allclose(episode.proprio[row], seen_from_camera(joints, row, row), atol=1e-5)
            np.testing.assert_allclose(episode.actions[row], seen_from_camera(joints, row + 1, row), atol=1e-5)
        view = episode.views["ego"]
        shown = view.read(view.positions(np.arange(length) / 30, episode.fps).tolist())
        assert read_numbers(shown) == [100 * index + i for i in range(length)]
        assert (episode.fps, episode.control_hz, episode.num_frames) == (30.0, 30.0, length)
        assert (episode.instruction, episode.embodiment, episode.repairs) == ("open the box", "egodex_hands", ())


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_world_that_arkit_chose_does_not_matter(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder, joints = tmp_path_factory.mktemp("egodex"), poses(3, 4)
    world = np.eye(4)
    world[:3, :3] = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    world[:3, 3] = np.random.default_rng(seed).normal(size=3) * 5
    write_episode(folder / "here", 0, 4, joints=joints)
    write_episode(folder / "there", 0, 4, joints={name: world @ pose for name, pose in joints.items()})
    here, there = read_all(open_egodex(folder))
    np.testing.assert_allclose(here.actions, there.actions, atol=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(here.proprio, there.proprio, atol=1e-4)  # type: ignore[arg-type]


def test_the_layout_names_rotations(tmp_path: Path) -> None:
    write_episode(tmp_path)
    source = open_egodex(tmp_path)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert len(DIM_NAMES) == len(set(DIM_NAMES)) == 48
    assert DIM_NAMES[:4] == ("left_hand_x", "left_hand_y", "left_hand_z", "left_hand_rotation_00")
    assert DIM_NAMES[9] == "left_thumb_tip_x"
    assert DIM_NAMES[-1] == "right_little_tip_z"
    assert [DIM_NAMES[i] for one in embodiment.action_rotations for i in one.slots][6:9] == [
        f"right_hand_rotation_{row}0" for row in range(3)
    ]
    assert (embodiment.pose_frame, embodiment.control_hz) == ("camera", 30.0)
    episode = only(source)
    assert episode.actions is not None
    aligned = align_control(episode.actions, episode.proprio, 30.0, ClipClock(0.0, 30.0, 9, 1), embodiment)
    np.testing.assert_array_equal(aligned.actions, episode.actions[:8])
    assert aligned.spans == ((0, 8),)


def test_hands_that_were_not_seen_make_no_actions(tmp_path: Path) -> None:
    sure = np.ones(12)
    lost = sure.copy()
    lost[[4, 5]] = 0.0
    parts = ("Hand", *FINGERTIPS)
    confidences = {f"left{part}": sure for part in parts} | {f"right{part}": lost for part in parts}
    write_episode(tmp_path, confidences=confidences)
    episode = only(open_egodex(tmp_path))
    assert episode.actions is not None
    assert np.flatnonzero(~np.isfinite(episode.actions).all(axis=1)).tolist() == [3, 4]  # those that lead there
    assert "In 2 of 12 frames" in episode.repairs[0]
    kept = only(open_egodex(tmp_path, min_confidence=0.0))
    assert kept.actions is not None
    assert np.isfinite(kept.actions).all()


@pytest.mark.parametrize(
    ("attributes", "instruction"),
    [
        ({"llm_description": "open", "llm_description2": "close", "which_llm_description": "2"}, "close"),
        ({"llm_description": "open", "llm_description2": "close", "which_llm_description": "1"}, "open"),
        ({"llm_description": "open", "llm_description2": "close", "which_llm_description": 2}, "close"),
        ({"llm_description": "open", "which_llm_description": "2"}, "open"),
        ({"description": "old  file"}, "old file"),
        ({}, None),
    ],
)
def test_the_description_that_was_done_is_the_instruction(
    tmp_path: Path, attributes: dict[str, Any], instruction: str | None
) -> None:
    write_episode(tmp_path, attributes=attributes)
    assert only(open_egodex(tmp_path)).instruction == instruction


def test_another_rate_is_that_of_the_video(tmp_path: Path) -> None:
    write_episode(tmp_path, times_ms=[20 * i for i in range(12)])
    episode = only(open_egodex(tmp_path))
    assert (episode.fps, episode.control_hz, episode.control_times_s) == (50.0, 50.0, None)
    assert "has 50 frames per second instead of 30" in episode.repairs[0]


def test_a_row_belongs_to_a_frame_at_a_varying_rate(tmp_path: Path) -> None:
    times_ms = [0, 33, 67, 100, 300, 333, 367, 400, 433, 467, 500, 533]
    write_episode(tmp_path, times_ms=times_ms)
    episode = only(open_egodex(tmp_path))
    assert episode.control_times_s is not None and episode.actions is not None
    np.testing.assert_allclose(episode.control_times_s, np.array(times_ms[:-1]) / 1000)
    view = episode.views["ego"]
    assert read_numbers(view.read(view.positions(episode.control_times_s, episode.fps).tolist())) == list(range(11))
    assert len(episode.control_times_s) == len(episode.actions)


def test_a_lost_frame_is_borne(tmp_path: Path) -> None:
    write_episode(tmp_path, num_video_frames=11)
    episode = only(open_egodex(tmp_path))
    assert episode.actions is not None
    assert (episode.num_frames, len(episode.actions)) == (11, 10)
    assert "hdf5 12, mp4 11" in episode.repairs[0]


def test_a_bad_episode_is_its_own_problem(tmp_path: Path) -> None:
    for index in range(7):
        write_episode(tmp_path, index, num_video_frames=6 if index == 1 else None)
    (tmp_path / "2.mp4").unlink()
    (tmp_path / "3.mp4").write_text("no video")
    with h5py.File(tmp_path / "4.hdf5", "a") as file:
        del file["transforms/rightHand"]
    with h5py.File(tmp_path / "5.hdf5", "a") as file:
        del file["transforms/camera"]
        file["transforms/camera"] = np.zeros((12, 3, 4))
    (tmp_path / "6.hdf5").write_bytes((tmp_path / "6.hdf5").read_bytes()[:3000])
    source = open_egodex(tmp_path)
    found: dict[str, Any] = {}
    for episode_id in source.list_episodes():
        try:
            found[episode_id[0]] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[episode_id[0]] = error.reason
    assert found == {
        "0": 12,
        "1": "frame_count_mismatch",
        "2": "missing_video",
        "3": "not_a_video",
        "4": "bad_record",
        "5": "bad_record",
        "6": "truncated_file",
    }


def test_unusable_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such"):
        open_egodex(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="holds no EgoDex episodes"):
        open_egodex(tmp_path).list_episodes()


def test_the_kind_is_found_out(tmp_path: Path) -> None:
    write_episode(tmp_path / "part1" / "task")
    assert detect_kind(tmp_path) == "egodex"
