import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from configs.loader import UserError
from data_pipeline.embodiments import Embodiment
from data_pipeline.sources import Episode, Source, SourceError, detect_kind, open_source
from data_pipeline.sources.aloha import ARM_NAMES, BASE_NAMES, AlohaConfig
from tests.data_pipeline.recordings import numbered_frames, read_numbers

CAMERAS = ("cam_high", "cam_left_wrist")


def rows_of(index: int, length: int, dims: int = 14) -> np.ndarray:
    """Rows that say where they belong: episode, then frame."""
    rows = np.zeros((length, dims))
    rows[:, 0], rows[:, 1] = index, np.arange(length)
    return rows


def write_episode(root: Path, index: int, length: int = 12, *, compress: bool = False, **changes: Any) -> Path:
    """As ACT's record_episodes.py does it; frame i of episode e shows the number 100 e + i."""
    path = root / f"episode_{index}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = changes.pop("frames", numbered_frames(range(100 * index, 100 * index + length)))
    with h5py.File(path, "w", rdcc_nbytes=1024**2 * 2) as root_group:
        root_group.attrs["sim"], root_group.attrs["compress"] = False, compress
        images = root_group.create_group("observations").create_group("images")
        lengths = []
        for camera in CAMERAS:
            if compress:
                rows = [as_jpeg(frame) for frame in frames]
                longest = int(1.1 * max(map(len, rows)))
                padded = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
                images.create_dataset(camera, data=padded, chunks=(1, longest))
                lengths.append([len(row) for row in rows])
            else:
                images.create_dataset(camera, data=frames, chunks=(1, *frames.shape[1:]))
        if compress:
            root_group["compress_len"] = np.array(lengths)
        root_group["observations/qpos"] = rows_of(index, length) + 1000
        root_group["observations/qvel"] = rows_of(index, length)
        root_group["action"] = rows_of(index, length)
        for name, value in changes.items():
            name = name.replace("__", "/")
            if name in root_group:
                del root_group[name]
            if value is not None:
                root_group[name] = value
    return path


def as_jpeg(frame: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=50)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def open_aloha(path: Path, **settings: Any) -> Source:
    return open_source(AlohaConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def only(source: Source) -> Episode:
    (episode,) = read_all(source)
    return episode


@pytest.mark.parametrize("compress", [False, True])
def test_rows_and_frames_belong_together(tmp_path: Path, compress: bool) -> None:
    for index, length in enumerate([12, 9, 11]):
        write_episode(tmp_path / "my set", index, length, compress=compress)
    source = open_aloha(tmp_path / "my set", licence="MIT", instruction="insert the peg")
    episodes = read_all(source)
    assert [episode.num_frames for episode in episodes] == [12, 9, 11]
    for index, episode in enumerate(episodes):
        length = episode.num_frames
        assert episode.actions is not None
        assert episode.proprio is not None
        np.testing.assert_array_equal(episode.actions, rows_of(index, length))
        np.testing.assert_array_equal(episode.proprio, rows_of(index, length) + 1000)
        assert episode.actions.dtype == episode.proprio.dtype == np.float32
        assert sorted(episode.views) == sorted(CAMERAS)
        for view in episode.views.values():
            positions = view.positions(np.arange(length) / 50, episode.fps).tolist()
            assert read_numbers(view.read(positions)) == [100 * index + i for i in range(length)]
            assert view.info().codec == ("jpeg" if compress else "uint8 array")
    first = episodes[0]
    assert (first.source, first.licence, first.instruction) == ("my_set", "MIT", "insert the peg")
    assert (first.fps, first.control_hz, first.embodiment, first.repairs) == (50.0, 50.0, "aloha", ())
    assert len({episode.content_sha256 for episode in episodes}) == 3


def test_the_layout_is_that_of_two_viper_arms(tmp_path: Path) -> None:
    write_episode(tmp_path, 0)
    embodiment = open_aloha(tmp_path).embodiment()
    assert embodiment is not None
    assert embodiment.action_names == embodiment.proprio_names == ARM_NAMES
    assert [ARM_NAMES[i] for i in embodiment.gripper_actions] == ["left_gripper", "right_gripper"]
    assert embodiment.joint_actions == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
    own = Embodiment(name="mine", action_names=ARM_NAMES, proprio_names=ARM_NAMES, control_hz=50)
    source = open_aloha(tmp_path, embodiment=own)
    assert source.embodiment() == own
    assert only(source).embodiment == "mine"


def test_mobile_aloha_moves_its_base(tmp_path: Path) -> None:
    write_episode(tmp_path, 0, base_action=rows_of(7, 12, 2))
    source = open_aloha(tmp_path)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ARM_NAMES + BASE_NAMES
    assert embodiment.velocity_actions == (14, 15)
    actions = only(source).actions
    assert actions is not None
    np.testing.assert_array_equal(actions[:, 14:], rows_of(7, 12, 2))
    without = only(open_aloha(tmp_path, action_keys=["action"])).actions
    assert without is not None
    assert without.shape == (12, 14)
    sensed = only(open_aloha(tmp_path, proprio_keys=["observations/qpos", "observations/qvel"])).proprio
    assert sensed is not None
    assert sensed.shape == (12, 28)
    assert only(open_aloha(tmp_path, proprio_keys=[])).proprio is None


def test_red_and_blue_are_exchanged_in_jpegs_only(tmp_path: Path) -> None:
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[..., 0] = 200
    write_episode(tmp_path / "jpeg", 0, 4, compress=True, frames=frames)
    write_episode(tmp_path / "raw", 0, 4, frames=frames)
    for name, red_is_at in (("jpeg", 2), ("raw", 0)):
        view = only(open_aloha(tmp_path / name, swap_red_blue=True)).views["cam_high"]
        assert view.read([0]).mean(axis=(0, 1, 2)).argmax() == red_is_at


def test_an_instruction_may_stand_in_the_file(tmp_path: Path) -> None:
    path = write_episode(tmp_path, 0)
    assert only(open_aloha(tmp_path)).instruction is None
    before = only(open_aloha(tmp_path)).content_sha256
    with h5py.File(path, "a") as file:
        file.attrs["task"] = "insert  the peg"
    episode = only(open_aloha(tmp_path))
    assert episode.instruction == "insert the peg"
    assert episode.content_sha256 != before


def test_nan_rows_are_kept_as_invalid(tmp_path: Path) -> None:
    action = rows_of(0, 12)
    action[5, 3] = np.nan
    write_episode(tmp_path, 0, action=action)
    episode = only(open_aloha(tmp_path))
    assert episode.actions is not None
    assert np.flatnonzero(~np.isfinite(episode.actions).all(axis=1)).tolist() == [5]
    assert "1 of the 12 rows of action" in episode.repairs[0]


def test_a_bad_episode_is_its_own_problem(tmp_path: Path) -> None:
    write_episode(tmp_path, 0)
    write_episode(tmp_path, 1, action=rows_of(1, 11))
    write_episode(tmp_path, 2, action=rows_of(2, 7))
    write_episode(tmp_path, 3, action=rows_of(3, 12, 7))
    write_episode(tmp_path, 4, observations__images=None)
    write_episode(tmp_path, 5, action=None)
    data = write_episode(tmp_path, 6).read_bytes()
    (tmp_path / "episode_6.hdf5").write_bytes(data[: len(data) // 2])
    (tmp_path / "episode_7.hdf5").write_text("version https://git-lfs.github.com/spec/v1\n")
    source = open_aloha(tmp_path)
    found: dict[str, Any] = {}
    for episode_id in source.list_episodes():
        try:
            found[episode_id[8:9]] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[episode_id[8:9]] = error.reason
    assert found == {
        "0": 12,
        "1": 11,
        "2": "frame_count_mismatch",
        "3": "wrong_dims",
        "4": "no_images",
        "5": "bad_record",
        "6": "truncated_file",
        "7": "unreadable_file",
    }
    with pytest.raises(SourceError) as caught:
        source.read_episode("episode_9_00000000")
    assert caught.value.reason == "unknown_episode"


def test_an_episode_keeps_its_id_when_files_are_added(tmp_path: Path) -> None:
    write_episode(tmp_path / "a b", 0)
    before = open_aloha(tmp_path).list_episodes()
    write_episode(tmp_path / "a_b", 0)
    assert set(before) < set(open_aloha(tmp_path).list_episodes())


def test_unusable_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such"):
        open_aloha(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="holds no ALOHA episodes"):
        open_aloha(tmp_path).list_episodes()
    (tmp_path / "episode_0.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 1 files can be read.*empty"):
        open_aloha(tmp_path).list_episodes()


def test_the_kind_is_found_out(tmp_path: Path) -> None:
    path = write_episode(tmp_path, 0)
    assert detect_kind(tmp_path) == detect_kind(path) == "aloha"
