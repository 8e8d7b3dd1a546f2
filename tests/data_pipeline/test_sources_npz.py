import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.align import spans
from data_pipeline.sources import Source, SourceError, detect_kind, npz_file, open_source
from data_pipeline.sources.npz import NpzConfig
from data_pipeline.sources.npz_file import index_npz, read_rows
from data_pipeline.sources.step_arrays import ArrayInfo, picture_layout
from data_pipeline.video_io import VideoError
from tests.data_pipeline.recordings import actions_of, numbered_frames, read_numbers


def open_npz(path: Path, **settings: Any) -> Source:
    return open_source(NpzConfig(path=path, **{"control_hz": 5, **settings}))


def only_episode(path: Path, **settings: Any) -> Any:
    source = open_npz(path, **settings)
    (episode_id,) = source.list_episodes()
    return source.read_episode(episode_id)


def write_episode(path: Path, index: int = 0, length: int = 6, save: Any = np.savez, **changes: Any) -> Path:
    """Frame i of episode e shows the number 100 e + i. None leaves an array out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "image": numbered_frames([100 * index + i for i in range(length)]),
        "action": actions_of(index, length).astype(np.float64),
        "state": actions_of(index, length)[:, :2] + 100,
    }
    save(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


# --- episodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_is_an_episode(tmp_path: Path, save: Any) -> None:
    for index, name in enumerate(("b.npz", "deep/a b.npz", "deep/a.b.npz")):
        write_episode(tmp_path / "arm" / name, index, 6 + index, save)
    (tmp_path / "arm" / "._b.npz").write_bytes(b"stub")
    source = open_npz(tmp_path / "arm", licence="CC0")
    ids = source.list_episodes()
    assert len(ids) == 3 and ids == sorted(ids) and all("." not in one and " " not in one for one in ids)
    for index, episode_id in enumerate(sorted(ids, key=lambda one: source.read_episode(one).num_frames)):
        episode = source.read_episode(episode_id)
        length = 6 + index
        assert (episode.source, episode.licence, episode.embodiment) == ("arm", "CC0", "arm")
        assert (episode.num_frames, episode.fps, episode.control_hz, episode.repairs) == (length, 5, 5, ())
        assert episode.actions is not None and episode.actions.dtype == np.float32
        np.testing.assert_array_equal(episode.actions, actions_of(index, length))
        np.testing.assert_array_equal(episode.proprio, actions_of(index, length)[:, :2] + 100)
        footage = episode.views["image"]
        assert footage.info().codec == "uint8 array"
        assert read_numbers(footage.read([3, 0, 3])) == [100 * index + i for i in (3, 0, 3)]
        assert len(pickle.dumps(footage)) < 1000
    before = set(ids)
    write_episode(tmp_path / "arm" / "a.npz")
    assert before < set(open_npz(tmp_path / "arm").list_episodes())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_batch_is_several_episodes(tmp_path: Path, save: Any) -> None:
    images = np.stack([numbered_frames(range(100 * e, 100 * e + 5)) for e in range(3)])
    actions = np.stack([actions_of(e, 5) for e in range(3)])
    texts = np.array(["one", "two", "three"])
    save(tmp_path / "a.npz", observations=images, actions=actions, instruction=texts, discount=np.ones((3, 5)))
    save(tmp_path / "b.npz", observations=images[:1], actions=actions[:1], instruction=texts[:1])
    source = open_npz(tmp_path)
    ids = source.list_episodes()
    assert len(ids) == 4
    for index, episode_id in enumerate(ids[:3]):
        episode = source.read_episode(episode_id)
        np.testing.assert_array_equal(episode.actions, actions[index])
        np.testing.assert_array_equal(episode.views["observations"].read(range(5)), images[index])
        assert episode.instruction == ("one", "two", "three")[index]
    assert len({source.read_episode(one).content_sha256 for one in ids}) == 4
    with pytest.raises(VideoError, match="out_of_range"):
        episode.views["observations"].read([5])


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda frames: frames.astype(np.int64), "int64 from 0 to 255"),
        (lambda frames: frames.astype(np.float64), "float64 from 0 to 255"),
        (lambda frames: (frames / 255).astype(np.float32), "float32 from 0 to 1"),
        (lambda frames: frames / 127.5 - 1, "float64 from -1 to 1"),
        (lambda frames: np.moveaxis(frames, -1, 1), None),
        (lambda frames: np.concatenate([frames, np.full_like(frames[..., :1], 255)], axis=-1), None),
        (lambda frames: np.asfortranarray(frames), None),
    ],
)
def test_pictures_of_every_kind_come_out_alike(tmp_path: Path, change: Any, note: str | None) -> None:
    frames = numbered_frames(range(6))
    episode = only_episode(write_episode(tmp_path / "a.npz", image=change(frames)))
    np.testing.assert_array_equal(episode.views["image"].read([5, 2, 2]), frames[[5, 2, 2]])
    assert episode.repairs == ((f"The pictures of image are {note}.",) if note else ())


def test_of_stacked_pictures_the_newest_is_taken(tmp_path: Path) -> None:
    frames = np.moveaxis(numbered_frames(range(8)), -1, 1)
    stacked = np.concatenate([frames[:-2], frames[1:-1], frames[2:]], axis=1)
    episode = only_episode(write_episode(tmp_path / "a.npz", image=stacked))
    assert read_numbers(episode.views["image"].read(range(6))) == list(range(2, 8))
    assert episode.repairs == ("Each row of image holds 3 pictures, the last is taken: it is the newest.",)


@pytest.mark.parametrize(
    ("shape", "dtype", "is_picture"),
    [
        ((64, 64, 3), "uint8", True),
        ((3, 64, 64), "float32", True),
        ((9, 64, 64), "uint8", True),
        ((64, 64, 4), "uint8", True),
        ((64, 64, 1), "uint8", False),  # a mask
        ((64, 64), "uint16", False),  # depth
        ((3, 3, 3), "float32", False),  # matrices
        ((21, 4, 4), "float64", False),  # poses
        ((64, 64, 64), "uint8", False),
        ((64, 64, 3), "bool", False),
        ((64, 64, 3), "U5", False),
    ],
)
def test_pictures_are_known_by_their_shape(shape: tuple[int, ...], dtype: str, is_picture: bool) -> None:
    assert (picture_layout(ArrayInfo(5, shape, np.dtype(dtype))) is not None) == is_picture


def test_points_are_no_pictures(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(6, 48, 64, 3)) * 2
    episode = only_episode(write_episode(tmp_path / "a.npz", points=points))
    assert list(episode.views) == ["image"]


# --- actions ---------------------------------------------------------------------------------------------------------


def test_arrays_can_be_named(tmp_path: Path) -> None:
    arm, gripper = np.zeros((6, 2)), np.ones((6, 1))
    path = write_episode(
        tmp_path / "a.npz", action=None, state=None, arm=arm, gripper=gripper, top=numbered_frames([1] * 6)
    )
    source = open_npz(path, action_keys=["gripper", "arm"], proprio_keys=["arm"], image_keys=["top"])
    episode = source.read_episode(source.list_episodes()[0])
    assert episode.actions[0].tolist() == [1, 0, 0]  # type: ignore[index]
    assert list(episode.views) == ["top"]
    embodiment = source.embodiment()
    assert embodiment is not None
    assert (embodiment.action_names, embodiment.gripper_actions) == (("gripper", "arm_0", "arm_1"), (0,))
    for settings, match in (
        ({"action_keys": ["elbow"]}, "action_keys has elbow; there are arm, gripper"),
        ({"image_keys": ["arm"]}, "image_keys has arm; there are image, top"),
    ):
        with pytest.raises(UserError, match=match):
            open_npz(path, **settings).list_episodes()


def test_replay_buffers_of_dm_env_agents_have_the_action_before_its_frame(tmp_path: Path) -> None:
    later = np.concatenate([np.zeros((1, 3)), actions_of(1, 5)])
    extra = {"reward": np.zeros((6, 1)), "discount": np.ones((6, 1))}
    path = write_episode(tmp_path / "a.npz", action=later, **extra)
    episode = only_episode(path)
    np.testing.assert_array_equal(episode.actions[:5], actions_of(1, 5))
    assert spans(np.isfinite(episode.actions).all(axis=1)) == ((0, 5),)
    assert "Row i of the action led to frame i" in episode.repairs[0]
    np.testing.assert_array_equal(only_episode(path, actions_before_frames=False).actions, later.astype(np.float32))


def test_where_nothing_was_commanded_the_next_state_can_be_the_action(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.npz", action=None)
    assert only_episode(path).actions is None
    assert only_episode(path).repairs == ("No array is known as the action: the episode is read without actions.",)
    episode = only_episode(path, actions_are_next_proprio=True)
    np.testing.assert_array_equal(episode.actions[:-1], episode.proprio[1:])
    assert np.isnan(episode.actions[-1]).all()


def test_a_missing_row_at_the_end_is_no_number(tmp_path: Path) -> None:
    episode = only_episode(write_episode(tmp_path / "a.npz", action=actions_of(0, 5)))
    assert spans(np.isfinite(episode.actions).all(axis=1)) == ((0, 5),)
    assert "action has 5 rows for 6 frames: they are matched from the start." in episode.repairs
    nan = actions_of(0, 6)
    nan[2] = np.nan
    episode = only_episode(write_episode(tmp_path / "a.npz", action=nan))
    assert "1 rows of action are not finite numbers and do not count as recorded." in episode.repairs


def test_the_rate_must_be_said(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.npz")
    with pytest.raises(UserError, match="set control_hz"):
        open_source(NpzConfig(path=path)).list_episodes()
    embodiment = {"name": "arm", "action_names": list("abc"), "proprio_names": list("ab"), "control_hz": 7}
    assert only_episode(path, control_hz=None, embodiment=embodiment).fps == 7


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"action": np.zeros((6, 4))}, "wrong_dims", "4 action and 2 proprio values"),
        ({"action": np.zeros((60, 3))}, "frame_count_mismatch", "60 rows for 6 frames"),
        ({"action": np.array(["a"] * 6)}, "wrong_dims", "no rows of numbers"),
        ({"image": None}, "no_images", "none of its arrays"),
        ({"image": np.zeros((48, 64, 3), np.uint8)}, "no_images", "files that hold one step each"),
        ({"image": np.zeros((0, 48, 64, 3), np.uint8)}, "no_images", "no pictures"),
    ],
)
def test_a_bad_file_is_its_own_problem(tmp_path: Path, changes: Any, reason: str, detail: str) -> None:
    write_episode(tmp_path / "a.npz")
    write_episode(tmp_path / "b.npz", **changes)
    source = open_npz(tmp_path)
    good, bad = source.list_episodes()
    assert source.read_episode(good).num_frames == 6
    with pytest.raises(SourceError, match=detail) as error:
        source.read_episode(bad)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "unreadable_file"),
        (lambda data: b"just some text", "unreadable_file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "unreadable_file"),
        (lambda data: data[: len(data) // 2], "truncated_file"),
        (lambda data: data.replace(b"\x93NUMPY", b"\x93NUMBY"), "unreadable_file"),
        (lambda data: data.replace(b"{'descr': ", b"{'descr':(("), "unreadable_file"),
        (lambda data: data[500:], "unreadable_file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, reason: str) -> None:
    write_episode(tmp_path / "b.npz")
    path = write_episode(tmp_path / "a.npz")
    path.write_bytes(damage(path.read_bytes()))
    source = open_npz(tmp_path)
    with pytest.raises(SourceError) as error:
        source.read_episode(source.list_episodes()[0])
    assert error.value.reason == reason
    assert source.read_episode(source.list_episodes()[1]).num_frames == 6
    with pytest.raises(SourceError, match="unknown_episode"):
        source.read_episode("absent")
    path.unlink()
    with pytest.raises(SourceError, match="missing_file"):
        source.read_episode(source.list_episodes()[0])


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.npz")
    lying = tmp_path / "b.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(lying, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"(6, 48, 64, 3)", b"(6000000, 48,)"))
    source = open_npz(tmp_path)
    with pytest.raises(SourceError, match="truncated_file"):
        source.read_episode(source.list_episodes()[1])


def test_compressed_rows_that_are_damaged_are_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3)).astype(np.uint8)
    path = write_episode(tmp_path / "a.npz", save=np.savez_compressed, image=noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(VideoError) as error:
        only_episode(path).views["image"].read(range(6))
    assert error.value.reason == "undecodable_video"


def test_python_objects_are_never_opened(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "a.npz", metadata=np.array([{"task": 1}], dtype=object))
    assert only_episode(path).repairs == ("Arrays of Python objects are never opened: metadata.",)
    write_episode(path, action=np.array([{"a": 1}] * 6, dtype=object))
    assert only_episode(path).actions is None


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.npz files"):
        open_npz(tmp_path).list_episodes()
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="none of its first 1 files has an array of colour pictures"):
        open_npz(tmp_path).list_episodes()
    with pytest.raises(UserError):
        detect_kind(tmp_path)
    cameras = np.zeros((6, 2, 48, 64, 3), np.uint8)
    write_episode(tmp_path / "a.npz", image=cameras)
    with pytest.raises(UserError, match="two axes before its pictures, action has one"):
        open_npz(tmp_path).list_episodes()


# --- rows ------------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, 29), min_size=1, max_size=8, unique=True).map(sorted),
    is_compressed=st.booleans(),
    order=st.sampled_from("CF"),
    dtype=st.sampled_from(["<f4", ">i2", "uint8"]),
)
def test_rows_are_those_of_numpy(
    rows: list[int], is_compressed: bool, order: Any, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.npz"
    array = np.arange(30 * 4 * 3).reshape(30, 4, 3).astype(dtype, order=order)
    (np.savez_compressed if is_compressed else np.savez)(path, other=np.zeros(3), array=array)
    stored = index_npz(path).arrays["array"]
    for wanted in (rows, rows[-1:], rows[:1]):
        np.testing.assert_array_equal(read_rows(path, stored, wanted), array[wanted])
    pairs = [row // 2 for row in rows]
    np.testing.assert_array_equal(
        read_rows(path, stored, sorted(set(pairs)), 2), array.reshape(-1, 3)[sorted(set(pairs))]
    )


def test_only_wanted_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((200, 48, 64, 3), np.uint8)
    frames[:] = np.arange(200, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "a.npz", image=frames)
    footage = only_episode(tmp_path / "a.npz").views["image"]
    sizes: list[int] = []
    pread = npz_file.os.pread
    monkeypatch.setattr(npz_file.os, "pread", lambda file, size, at: sizes.append(size) or pread(file, size, at))
    assert footage.read([7, 150, 8])[:, 0, 0, 0].tolist() == [7, 150, 8]
    assert sum(sizes) == 3 * 48 * 64 * 3
    np.savez_compressed(tmp_path / "b.npz", image=frames)
    footage = only_episode(tmp_path / "b.npz").views["image"]
    footage.read([100])
    opened = []
    monkeypatch.setattr(npz_file.zipfile, "ZipFile", lambda path: opened.append(path))
    assert footage.read([101, 180])[:, 0, 0, 0].tolist() == [101, 180]  # goes on where it stands
    assert opened == []


# --- real recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "num_frames", "views", "action_dim", "num_actions"),
    [
        ("ivideogpt_npz/bair_sample.npz", 30, {"image": (64, 64), "aux1_image": (64, 64)}, 4, 30),
        ("ivideogpt_npz/fractal_sample.npz", 22, {"image": (256, 320)}, None, 0),
        ("ivideogpt_npz/mbrl", 101, {"observation": (64, 64)}, 4, 100),
        ("vjepa2_franka", 2, {"observations": (256, 256)}, None, 0),
    ],
)
def test_real_files(
    shared_data: Path, path: str, num_frames: int, views: dict[str, Any], action_dim: int | None, num_actions: int
) -> None:
    assert detect_kind(shared_data / path) == "npz"
    source = open_npz(shared_data / path)
    ids = source.list_episodes()
    assert len(ids) == 1
    episode = source.read_episode(ids[0])
    assert episode.num_frames == num_frames
    sizes = {name: (footage.info().height, footage.info().width) for name, footage in episode.views.items()}
    assert sizes == views
    for footage in episode.views.values():
        frames = footage.read(range(num_frames))
        assert frames.shape[0] == num_frames and frames.dtype == np.uint8 and frames.std() > 10
    found = 0 if episode.actions is None else int(np.isfinite(episode.actions).all(axis=1).sum())
    assert found == num_actions
    embodiment = source.embodiment()
    assert (embodiment.action_dim if embodiment else None) == action_dim


def test_the_states_of_a_real_file_can_be_its_actions(shared_data: Path) -> None:
    source = open_npz(shared_data / "vjepa2_franka", actions_are_next_proprio=True)
    episode = source.read_episode(source.list_episodes()[0])
    assert episode.actions is not None and episode.proprio is not None
    np.testing.assert_array_equal(episode.actions[0], episode.proprio[1])
