import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from configs.loader import UserError
from data_pipeline.sources import Episode, Source, SourceError, detect_kind, open_source
from data_pipeline.sources.robomimic import RobomimicConfig
from tests.data_pipeline.recordings import numbered_frames, read_numbers

OSC_POSE = {"type": "OSC_POSE", "control_delta": True, "output_max": [0.05] * 6}


def actions_of(index: int, length: int, dims: int = 7) -> np.ndarray:
    rows = np.full((length, dims), 0.5)
    rows[:, 0], rows[:, 1] = index, np.arange(length)
    return rows


def write_robomimic(path: Path, lengths: Sequence[int] = (12, 9), **env_kwargs: Any) -> Path:
    """As dataset_states_to_obs.py does it: picture i, the right way up, was taken before action i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    env_kwargs = {"control_freq": 20, "robots": ["Panda"], "controller_configs": OSC_POSE} | env_kwargs
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(lengths)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": env_kwargs}, indent=4)
        for index, length in enumerate(lengths):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = length
            demo["actions"] = actions_of(index, length)
            demo["states"] = np.zeros((length, 32))
            demo["rewards"] = np.eye(1, length, length - 1)[0] if index == 0 else np.zeros(length)
            demo["dones"] = np.zeros(length, dtype=np.int64)
            frames = numbered_frames(range(100 * index, 100 * index + length))
            for camera in ("agentview", "robot0_eye_in_hand"):
                demo.create_dataset(f"obs/{camera}_image", data=frames, compression="gzip")
                demo.create_dataset(f"next_obs/{camera}_image", data=np.zeros_like(frames))
            demo["obs/agentview_depth"] = np.zeros((length, 48, 64, 1), np.float32)
            demo["obs/robot0_eef_pos"] = actions_of(index, length, 3)
            demo["obs/robot0_eef_quat"] = np.tile([0.0, 0.0, 0.0, 1.0], (length, 1))
            demo["obs/robot0_gripper_qpos"] = np.zeros((length, 2))
            demo["obs/object"] = np.zeros((length, 10))
        file["mask/train"] = np.array([f"demo_{i}" for i in range(len(lengths) - 1)], dtype="S")
        file["mask/valid"] = np.array([f"demo_{len(lengths) - 1}"], dtype="S")
    return path


def write_libero(path: Path, length: int = 10, **attributes: Any) -> Path:
    """As LIBERO's create_dataset.py does it: picture i, upside down, was taken after action i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        problem = {"language_instruction": "open the top drawer", "problem_name": "libero_kitchen"}
        data.attrs["problem_info"] = json.dumps(problem)
        data.attrs["bddl_file_name"] = "chiliocosm/bddl_files/a.bddl"
        data.attrs["macros_image_convention"] = "opengl"
        kwargs = {"robots": ["Panda"], "control_freq": 20, "controller_configs": OSC_POSE}
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": kwargs})
        for name, value in attributes.items():
            del data.attrs[name]
            if value is not None:
                data.attrs[name] = value
        demo = data.create_group("demo_0")
        demo["actions"] = actions_of(0, length)
        demo["rewards"] = np.eye(1, length, length - 1, dtype=np.uint8)[0]
        frames = numbered_frames(range(1, length + 1))  # picture i is what action i, the number i + 1 in all, led to
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{camera}"] = frames[:, ::-1]
        demo["obs/ee_states"], demo["obs/gripper_states"] = np.zeros((length, 6)), np.zeros((length, 2))
        demo["obs/joint_states"] = np.zeros((length, 7))
    return path


def open_robomimic(path: Path, **settings: Any) -> Source:
    return open_source(RobomimicConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def shown(episode: Episode, view: str) -> list[int]:
    footage = episode.views[view]
    return read_numbers(
        footage.read(footage.positions(np.arange(episode.num_frames) / episode.fps, episode.fps).tolist())
    )


# --- robomimic -------------------------------------------------------------------------------------------------------


def test_rows_and_frames_belong_together(tmp_path: Path) -> None:
    source = open_robomimic(write_robomimic(tmp_path / "lift.hdf5", [12, 9, 11]), licence="MIT")
    episodes = read_all(source)
    assert [episode.num_frames for episode in episodes] == [12, 9, 11]
    for index, episode in enumerate(episodes):
        assert episode.actions is not None
        assert episode.proprio is not None
        np.testing.assert_array_equal(episode.actions, actions_of(index, episode.num_frames))
        np.testing.assert_array_equal(episode.proprio[:, :3], actions_of(index, episode.num_frames, 3))
        assert episode.actions.dtype == episode.proprio.dtype == np.float32
        assert sorted(episode.views) == ["agentview", "robot0_eye_in_hand"]
        for view in episode.views:
            assert shown(episode, view) == [100 * index + i for i in range(episode.num_frames)]
        assert episode.repairs == ()
    first = episodes[0]
    assert (first.source, first.licence, first.instruction, first.embodiment) == ("lift", "MIT", None, "Panda")
    assert (first.fps, first.control_hz) == (20.0, 20.0)
    assert [episode.success for episode in episodes] == [True, None, None]
    assert len({episode.content_sha256 for episode in episodes}) == 3


def test_the_embodiment_is_what_the_controller_takes(tmp_path: Path) -> None:
    embodiment = open_robomimic(write_robomimic(tmp_path / "a.hdf5")).embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ("x", "y", "z", "rx", "ry", "rz", "gripper")
    assert (embodiment.gripper_actions, embodiment.delta_actions) == ((6,), (0, 1, 2, 3, 4, 5))
    assert embodiment.action_rotations == ()
    assert embodiment.proprio_names[3:8] == tuple(
        f"robot0_{name}" for name in ("eef_quat_0", "eef_quat_1", "eef_quat_2", "eef_quat_3", "gripper_qpos_0")
    )
    assert [(one.slots, one.format) for one in embodiment.proprio_rotations] == [((3, 4, 5, 6), "quaternion_xyzw")]


def test_absolute_commands_are_targets(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", controller_configs={"type": "OSC_POSE", "control_delta": False})
    embodiment = open_robomimic(path).embodiment()
    assert embodiment is not None
    assert embodiment.delta_actions == ()
    assert [(one.slots, one.format) for one in embodiment.action_rotations] == [((3, 4, 5), "axis_angle")]


def test_what_the_file_does_not_explain_is_numbered(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", controller_configs={"type": "NEW"}, robots=None, control_freq="fast")
    embodiment = open_robomimic(path, proprio_keys=["object"], name="mine").embodiment()
    assert embodiment is not None
    assert embodiment.action_names == tuple(f"action_{i}" for i in range(7))
    assert embodiment.proprio_names == tuple(f"object_{i}" for i in range(10))
    assert (embodiment.name, embodiment.control_hz, embodiment.delta_actions) == ("mine", 20.0, ())


def test_a_filter_key_chooses_episodes(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", [12, 9, 11])
    assert [episode.num_frames for episode in read_all(open_robomimic(path, filter_key="train"))] == [12, 9]
    assert [episode.num_frames for episode in read_all(open_robomimic(path, filter_key="valid"))] == [11]
    with pytest.raises(UserError, match="mask/20_percent"):
        open_robomimic(path, filter_key="20_percent").list_episodes()


def test_an_episode_does_not_change_when_others_are_added(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", [12, 9])
    before = {episode.episode_id: episode.content_sha256 for episode in read_all(open_robomimic(tmp_path))}
    write_robomimic(path, [12, 9, 11])
    write_robomimic(tmp_path / "b" / "a.hdf5", [12])
    after = {episode.episode_id: episode.content_sha256 for episode in read_all(open_robomimic(tmp_path))}
    assert before.items() < after.items()
    turned = {episode.content_sha256 for episode in read_all(open_robomimic(tmp_path, flip_images=True))}
    assert not turned & set(after.values())


# --- LIBERO ----------------------------------------------------------------------------------------------------------


def test_liberos_pictures_are_turned_and_follow_their_actions(tmp_path: Path) -> None:
    source = open_robomimic(write_libero(tmp_path / "KITCHEN_SCENE1_open_the_top_drawer_demo.hdf5"))
    (episode,) = read_all(source)
    assert shown(episode, "agentview") == shown(episode, "eye_in_hand") == list(range(1, 11))
    assert episode.actions is not None
    assert episode.proprio is not None
    # Picture k shows the world after k actions: action number k (from 0) comes next.
    np.testing.assert_array_equal(episode.actions, actions_of(0, 10)[1:])
    assert (episode.num_frames, len(episode.proprio), episode.proprio.shape[1]) == (10, 9, 8)
    assert (episode.instruction, episode.success) == ("open the top drawer", True)
    assert any("upside down" in note for note in episode.repairs)
    assert any("after action i" in note for note in episode.repairs)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert [(one.slots, one.format) for one in embodiment.proprio_rotations] == [((3, 4, 5), "axis_angle")]


def test_both_rules_can_be_overruled(tmp_path: Path) -> None:
    path = write_libero(tmp_path / "a.hdf5")
    (episode,) = read_all(open_robomimic(path, flip_images=False, frames_follow_actions=False))
    assert episode.actions is not None
    assert len(episode.actions) == 10
    assert read_numbers(episode.views["agentview"].read([3])[:, ::-1]) == [4]
    (upright,) = read_all(open_robomimic(write_libero(path, macros_image_convention="opencv")))
    assert not any("upside down" in note for note in upright.repairs)
    (silent,) = read_all(open_robomimic(write_libero(path, macros_image_convention=None)))
    assert any("upside down" in note for note in silent.repairs)


def test_openvlas_copies_of_libero_are_turned_but_precede_their_actions(tmp_path: Path) -> None:
    path = write_libero(tmp_path / "open_the_drawer_demo.hdf5")
    with h5py.File(path, "a") as file:
        for name in list(file["data"].attrs):
            del file["data"].attrs[name]
    (episode,) = read_all(open_robomimic(path))
    assert shown(episode, "agentview") == list(range(1, 11))
    assert episode.actions is not None
    assert (len(episode.actions), episode.instruction) == (10, "open the drawer")


@pytest.mark.parametrize(
    ("name", "problem", "instruction"),
    [
        ("a_demo.hdf5", {"language_instruction": ' "open the  drawer" '}, "open the drawer"),
        ("a_demo.hdf5", {"language_instruction": list("open it")}, "open it"),
        ("pick_up_the_cup_demo.hdf5", {}, "pick up the cup"),
        ("LIVING_ROOM_SCENE2_pick_up_the_cup_demo.hdf5", {"language_instruction": ""}, "pick up the cup"),
        ("anything.hdf5", {}, None),
    ],
)
def test_the_instruction_is_found(tmp_path: Path, name: str, problem: dict[str, Any], instruction: str | None) -> None:
    path = write_libero(tmp_path / name, problem_info=json.dumps(problem))
    assert read_all(open_robomimic(path))[0].instruction == instruction
    assert read_all(open_robomimic(path, instruction="mine"))[0].instruction == "mine"


def test_robocasa_says_it_per_episode(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_1"].attrs["ep_meta"] = json.dumps({"lang": "close the door"})
    assert [episode.instruction for episode in read_all(open_robomimic(path))] == [None, "close the door"]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_bad_file_or_episode_is_its_own_problem(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", [12, 12, 12, 12, 12])
    with h5py.File(path, "a") as file:
        data = file["data"]
        del data["demo_1/obs"]
        del data["demo_2/actions"]
        data["demo_2/actions"] = np.zeros((12, 6))
        del data["demo_3/actions"]
        data["demo_3/actions"] = np.zeros((6, 7))
        data["demo_4/obs/agentview_rgb"] = h5py.ExternalLink("/etc/passwd", "/data")
    (tmp_path / "b.hdf5").write_text("no demonstrations")
    source = open_robomimic(tmp_path)
    found: dict[str, Any] = {}
    for episode_id in source.list_episodes():
        key = episode_id.rpartition("_")[0]
        try:
            found[key] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[key] = error.reason
    assert found == {
        "a_demo_0": 12,
        "a_demo_1": "no_images",
        "a_demo_2": "wrong_dims",
        "a_demo_3": "frame_count_mismatch",
        "a_demo_4": "outside_folder",
        "b": "unreadable_file",
    }


def test_unusable_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such"):
        open_robomimic(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="holds no demonstrations"):
        open_robomimic(tmp_path).list_episodes()


def test_the_kind_is_found_out(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "robomimic" / "a.hdf5")
    write_libero(tmp_path / "libero" / "a.hdf5")
    assert {detect_kind(tmp_path / name) for name in ("robomimic", "libero", "libero/a.hdf5")} == {"robomimic"}


# --- real demonstrations ---------------------------------------------------------------------------------------------


def test_demonstrations_without_pictures_are_rejected(shared_data: Path) -> None:
    folder = shared_data / "robosuite_demo_hdf5"
    assert detect_kind(folder) == "robomimic"
    source = open_robomimic(folder)
    episode_ids = source.list_episodes()
    assert len(episode_ids) == 11
    for episode_id in episode_ids:
        with pytest.raises(SourceError) as caught:
            source.read_episode(episode_id)
        assert caught.value.reason == "no_images"


def test_real_demonstrations_with_pictures_added(shared_data: Path, tmp_path: Path) -> None:
    lengths = {
        "handover/panda_panda": [641, 522, 376, 307, 253, 247, 429],
        "lift": [482, 510, 392],
        "wipe/panda": [174],
    }
    dims = {"handover/panda_panda": 14, "lift": 7, "wipe/panda": 6}
    for name, wanted in lengths.items():
        path = tmp_path / f"{name.split('/')[0]}.hdf5"
        shutil.copyfile(shared_data / "robosuite_demo_hdf5" / name / "demo.hdf5", path)
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                demo["obs/agentview_image"] = numbered_frames(range(len(demo["actions"])), 12, 16)
            recorded = [demo["actions"][()] for demo in file["data"].values()]
        source = open_robomimic(path)
        episodes = read_all(source)
        assert sorted(episode.num_frames for episode in episodes) == sorted(wanted)
        for episode, actions in zip(episodes, recorded, strict=True):
            assert episode.actions is not None
            np.testing.assert_array_equal(episode.actions, actions.astype(np.float32))
            assert read_numbers(episode.views["agentview"].read([0, 100, episode.num_frames - 1])) == [
                0,
                100,
                episode.num_frames - 1,
            ]
        embodiment = source.embodiment()
        assert embodiment is not None
        assert embodiment.action_dim == dims[name]
        assert embodiment.action_names[-1].endswith("rz" if name == "wipe/panda" else "gripper")
        assert len(embodiment.delta_actions) == (12 if "handover" in name else 6)
