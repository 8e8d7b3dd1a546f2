import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, Pickle
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, ZipStore

from configs.loader import UserError
from data_pipeline.align import spans
from data_pipeline.sources import Source, SourceError, detect_kind, open_source
from data_pipeline.sources.zarr_replay import ZarrConfig
from data_pipeline.video_io import VideoError
from tests.data_pipeline.recordings import actions_of, numbered_frames, read_numbers

LENGTHS = (7, 4, 9)


def open_zarr(path: Path, **changes: Any) -> Source:
    return open_source(ZarrConfig(path=path, **{"control_hz": 10, **changes}))


def replay_arrays(lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Frame i of episode e shows the number 100 e + i."""
    numbers = [100 * e + i for e, length in enumerate(lengths) for i in range(length)]
    actions = np.concatenate([actions_of(e, length) for e, length in enumerate(lengths)])
    return {"img": numbered_frames(numbers), "action": actions, "state": actions[:, :2] + 100}


def write_buffer(
    path: Path,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    zarr_format: Any = 2,
    rows_per_chunk: int = 3,
    array_settings: dict[str, Any] | None = None,
    **changes: np.ndarray | None,
) -> Path:
    """A replay buffer, as a folder or (`.zip`) as one file. None leaves an array out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store = ZipStore(path, mode="w") if path.suffix == ".zip" else LocalStore(path)
    root = zarr.open_group(store, mode="w", zarr_format=zarr_format)
    data, meta = root.create_group("data"), root.create_group("meta")
    for name, values in (replay_arrays(lengths) | changes).items():
        if values is not None:
            chunks = (rows_per_chunk, *values.shape[1:])
            array = data.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=chunks, **(array_settings or {})
            )
            array[:] = values
    ends = np.cumsum(lengths).astype(np.int64)
    meta.create_array("episode_ends", shape=ends.shape, dtype=ends.dtype, chunks=ends.shape)[:] = ends
    store.close()
    return path


STORES = [
    ("a.zarr", {"zarr_format": 2}),
    ("a.zarr", {"zarr_format": 2, "array_settings": {"compressors": Blosc("lz4", 5, Blosc.NOSHUFFLE)}}),
    ("a.zarr", {"zarr_format": 2, "array_settings": {"compressors": Blosc("zstd", 5, Blosc.BITSHUFFLE)}}),
    ("a.zarr", {"zarr_format": 2, "array_settings": {"compressors": None}}),
    ("a.zarr.zip", {"zarr_format": 2}),
    ("a.zarr", {"zarr_format": 3}),
    ("a.zarr", {"zarr_format": 3, "array_settings": {"compressors": BloscCodec(cname="zstd")}}),
    ("a.zarr", {"zarr_format": 3, "array_settings": {"compressors": GzipCodec()}}),
    ("a.zarr.zip", {"zarr_format": 3, "array_settings": {"compressors": ZstdCodec()}}),
]


@pytest.mark.parametrize(("name", "how"), STORES)
def test_every_stretch_between_two_ends_is_an_episode(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    path = write_buffer(tmp_path / name, **how)
    assert detect_kind(path) == "zarr"
    source = open_zarr(path, instruction="push the block")
    ids = source.list_episodes()
    assert ids == ["a_000000", "a_000001", "a_000002"]
    for index, (episode_id, length) in enumerate(zip(ids, LENGTHS, strict=True)):
        episode = source.read_episode(episode_id)
        assert (episode.num_frames, episode.fps, episode.control_hz, episode.repairs) == (length, 10, 10, ())
        np.testing.assert_array_equal(episode.actions, actions_of(index, length))
        np.testing.assert_array_equal(episode.proprio, actions_of(index, length)[:, :2] + 100)
        footage = episode.views["img"]
        assert footage.info().codec == "uint8 array"
        numbers = [100 * index + i for i in range(length)]
        np.testing.assert_array_equal(footage.read(range(length)), numbered_frames(numbers))
        assert read_numbers(footage.read([3, 0, 3])) == [numbers[3], numbers[0], numbers[3]]
        assert len(pickle.dumps(footage)) < 1000
        for positions in ([], [length], [-1]):
            with pytest.raises(VideoError, match="out_of_range"):
                footage.read(positions)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert (embodiment.action_dim, embodiment.proprio_names) == (3, ("state_0", "state_1"))


def test_shards_hold_several_chunks(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr", zarr_format=3, img=None)
    frames = replay_arrays()["img"]
    data = zarr.open_group(path, mode="r+")["data"]
    array = data.create_array("img", shape=frames.shape, dtype="u1", chunks=(2, 48, 64, 3), shards=(8, 48, 64, 3))
    array[:] = frames
    episode = open_zarr(path).read_episode("a_000001")
    assert read_numbers(episode.views["img"].read(range(4))) == [100, 101, 102, 103]
    (path / "data/img/c/1/0/0/0").unlink()
    with pytest.raises(SourceError, match="missing_chunks"):
        open_zarr(path).read_episode("a_000001")


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), rows_per_chunk=st.integers(1, 7), data=st.data())
def test_any_frames_are_those_of_the_whole_array(
    lengths: list[int], rows_per_chunk: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (sum(lengths), 8, 9, 3)).astype(np.uint8)
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    write_buffer(path, tuple(lengths), rows_per_chunk=rows_per_chunk, img=frames)
    index = data.draw(st.integers(0, len(lengths) - 1))
    positions = data.draw(st.lists(st.integers(0, lengths[index] - 1), min_size=1, max_size=6))
    episode = open_zarr(path).read_episode(f"a_{index:06d}")
    first = sum(lengths[:index])
    np.testing.assert_array_equal(episode.views["img"].read(positions), frames[[first + p for p in positions]])


def test_a_folder_of_buffers_is_one_set(tmp_path: Path) -> None:
    write_buffer(tmp_path / "lab" / "b.zarr")
    write_buffer(tmp_path / "lab" / "deep" / "a.zarr.zip", (5,), zarr_format=3)
    before = open_zarr(tmp_path / "lab").list_episodes()
    assert before == ["b_000000", "b_000001", "b_000002", "deep_a_000000"]
    write_buffer(tmp_path / "lab" / "a.zarr", (5,))
    assert set(before) < set(open_zarr(tmp_path / "lab").list_episodes())
    assert open_zarr(tmp_path / "lab").read_episode("deep_a_000000").num_frames == 5
    assert detect_kind(tmp_path / "lab") == "zarr"


def test_float_pictures_of_push_t_come_out_as_they_were(tmp_path: Path) -> None:
    frames = replay_arrays()["img"]
    path = write_buffer(tmp_path / "a.zarr", img=frames.astype(np.float32))
    episode = open_zarr(path).read_episode("a_000002")
    np.testing.assert_array_equal(episode.views["img"].read(range(9)), frames[11:])
    assert episode.repairs == ("The pictures of img are float32 from 0 to 255.",)


def test_hand_held_grippers_act_by_where_they_go(tmp_path: Path) -> None:
    pose = np.arange(60, dtype=np.float32).reshape(20, 3)
    arrays = {
        "robot0_eef_pos": pose,
        "robot0_eef_rot_axis_angle": pose / 100,
        "robot0_gripper_width": pose[:, :1],
        "robot0_demo_start_pose": np.zeros((20, 6)),
    }
    path = write_buffer(tmp_path / "a.zarr.zip", action=None, state=None, **arrays)
    source = open_zarr(path)
    episode = source.read_episode("a_000000")
    assert episode.actions is not None and episode.proprio is not None
    np.testing.assert_array_equal(episode.proprio[:, :3], pose[:7])
    np.testing.assert_array_equal(episode.actions[:-1], episode.proprio[1:])
    assert spans(np.isfinite(episode.actions).all(axis=1)) == ((0, 6),)
    assert any(note.startswith("Nothing was commanded") for note in episode.repairs)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == embodiment.proprio_names
    assert embodiment.gripper_actions == (6,)
    assert open_zarr(path, actions_are_next_proprio=False).embodiment() is None


def test_the_rate_is_that_of_the_timestamps(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr", timestamp=100 + np.arange(20) / 12)
    source = open_source(ZarrConfig(path=path))
    assert source.read_episode("a_000000").fps == 12
    assert source.repairs() == ("The rate of 12 Hz is that of the timestamps.",)
    assert open_zarr(path).read_episode("a_000000").fps == 10
    with pytest.raises(UserError, match="set control_hz"):
        open_source(ZarrConfig(path=write_buffer(tmp_path / "b.zarr"))).list_episodes()


def test_arrays_in_groups_can_be_named(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr", action=None)
    group = zarr.open_group(path, mode="r+")["data"].create_group("robot")
    group.create_array("arm", shape=(20, 2), dtype="f4", chunks=(20, 2))[:] = 1
    group.create_array("img", shape=(20, 16, 16, 3), dtype="u1", chunks=(20, 16, 16, 3))[:] = 1
    source = open_zarr(path, action_keys=["robot/arm"])
    episode = source.read_episode("a_000000")
    assert episode.actions is not None and episode.actions.shape == (7, 2)
    assert sorted(episode.views) == ["img", "robot_img"]
    with pytest.raises(UserError, match="action_keys has arm; there are robot/arm, state"):
        open_zarr(path, action_keys=["arm"]).list_episodes()


def test_content_tells_episodes_apart(tmp_path: Path) -> None:
    source = open_zarr(write_buffer(tmp_path / "a.zarr"))
    before = {one: source.read_episode(one).content_sha256 for one in source.list_episodes()}
    assert len(set(before.values())) == 3
    frames = replay_arrays()["img"]
    frames[12] = 0
    after = open_zarr(write_buffer(tmp_path / "a.zarr", img=frames))
    changed = [one for one in before if after.read_episode(one).content_sha256 != before[one]]
    assert changed == ["a_000002"]


# --- what cannot be used ---------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_codec_is_named(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr", wrist=replay_arrays()["img"])
    edit(path / "data/img/.zarray", compressor={"id": "imagecodecs_jpegxl", "level": 80})
    source = open_zarr(path)
    assert list(source.read_episode("a_000000").views) == ["wrist"]
    (note,) = source.repairs()
    assert note.startswith("a: img is left out: it has the codec imagecodecs_jpegxl, which is not supported")
    edit(path / "data/wrist/.zarray", filters=[{"id": "made_up"}])
    with pytest.raises(UserError, match=r"codec imagecodecs_jpegxl, which is not supported; .*wrist: .* made_up"):
        open_zarr(path).list_episodes()
    path = write_buffer(tmp_path / "b.zarr", zarr_format=3)
    edit(path / "data/img/zarr.json", codecs=[{"name": "bytes"}, {"name": "jpegxl"}])
    with pytest.raises(UserError, match="codec jpegxl"):
        open_zarr(path).list_episodes()


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """Zarr 2 has a codec that unpickles whatever a chunk holds."""
    for name in ("img", "action"):
        path = write_buffer(tmp_path / f"{name}.zarr")
        edit(path / f"data/{name}/.zarray", compressor=None, filters=[Pickle().get_config()])
        for chunk in (path / f"data/{name}").glob("[0-9]*"):
            chunk.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        source = open_zarr(path)
        try:
            source.list_episodes()
            assert source.read_episode(f"{name}_000000").actions is None
        except UserError as error:
            assert "codec pickle" in str(error)
    path = write_buffer(tmp_path / "object.zarr")
    edit(path / "meta/episode_ends/.zarray", compressor=None, filters=[Pickle().get_config()])
    (path / "meta/episode_ends/0").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="codec pickle"):
        open_zarr(path).list_episodes()
    assert not (tmp_path / "exploded").exists()


def test_a_missing_chunk_is_not_a_black_picture(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr")
    (path / "data/img/3.0.0.0").unlink()  # rows 9 to 11: the end of episode 1, the start of 2
    source = open_zarr(path)
    assert source.read_episode("a_000000").num_frames == 7
    for episode_id in ("a_000001", "a_000002"):
        with pytest.raises(SourceError, match="1 chunks of img are not there") as error:
            source.read_episode(episode_id)
        assert error.value.reason == "missing_chunks"
    (path / "data/action/0.0").unlink()
    episode = source.read_episode("a_000000")
    assert "1 chunks of action are not stored: their rows read as the fill value." in episode.repairs


def test_a_damaged_chunk_costs_only_its_frames(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr", array_settings={"compressors": Blosc("lz4", 5, Blosc.NOSHUFFLE)})
    chunk = path / "data/img/0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    footage = open_zarr(path).read_episode("a_000000").views["img"]
    assert read_numbers(footage.read([3, 4, 5, 6])) == [3, 4, 5, 6]
    with pytest.raises(VideoError) as error:
        footage.read([2, 3])
    assert error.value.reason == "undecodable_video"
    chunk.write_bytes(b"\x02\x01\x03\x01" + b"\xff" * 40)  # lengths that are negative
    with pytest.raises(VideoError, match="undecodable_video"):
        footage.read([2, 3])
    table = path / "data/action/0.0"
    table.write_bytes(b"\x00" * 30)
    with pytest.raises(SourceError, match="unreadable_file"):
        open_zarr(path).read_episode("a_000000")


def test_rows_that_are_not_there_are_their_episodes_problem(tmp_path: Path) -> None:
    arrays = replay_arrays()
    source = open_zarr(write_buffer(tmp_path / "a.zarr", action=arrays["action"][:12]))
    assert source.read_episode("a_000001").num_frames == 4
    with pytest.raises(SourceError, match="action has 12 rows, the episode ends at row 20") as error:
        source.read_episode("a_000002")
    assert error.value.reason == "missing_rows"
    with pytest.raises(SourceError, match="unknown_episode"):
        source.read_episode("a_000003")
    source = open_zarr(write_buffer(tmp_path / "b.zarr", (4, 0, 5)))
    with pytest.raises(SourceError, match="too_short"):
        source.read_episode("b_000001")
    assert source.read_episode("b_000002").num_frames == 5


def test_the_layout_of_the_robot_is_checked(tmp_path: Path) -> None:
    embodiment = {"name": "arm", "action_names": ["x"], "proprio_names": [], "control_hz": 10}
    with pytest.raises(SourceError, match="wrong_dims"):
        open_zarr(write_buffer(tmp_path / "a.zarr"), embodiment=embodiment).read_episode("a_000000")


def test_unusable_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no Zarr store"):
        open_zarr(tmp_path).list_episodes()
    path = write_buffer(tmp_path / "a.zarr")
    zarr.open_array(path, path="meta/episode_ends", mode="r+")[:] = [9, 3, 20]
    with pytest.raises(UserError, match="goes backwards"):
        open_zarr(path).list_episodes()
    (path / "meta/episode_ends/0").unlink()
    with pytest.raises(UserError, match="a part of meta/episode_ends is missing"):
        open_zarr(path).list_episodes()
    (path / "meta/episode_ends/.zarray").write_text('{"shape": [3')
    with pytest.raises(UserError, match="metadata cannot be understood"):
        open_zarr(path).list_episodes()
    with pytest.raises(UserError, match="no array of colour pictures"):
        open_zarr(write_buffer(tmp_path / "b.zarr", img=None)).list_episodes()
    huge = write_buffer(tmp_path / "c.zarr")
    edit(huge / "data/img/.zarray", chunks=[10**6, 480, 640, 3])
    with pytest.raises(UserError, match="too large to unpack"):
        open_zarr(huge).list_episodes()
    edit(huge / "data/img/.zarray", shape=[20, 10**6, 10**6, 3], chunks=[1, 1, 1, 3])
    with pytest.raises(UserError, match="too many chunks"):
        open_zarr(huge).list_episodes()
    wide = write_buffer(tmp_path / "d.zarr")
    edit(wide / "data/action/.zarray", shape=[20, 10**9], chunks=[1, 10**8])
    assert open_zarr(wide).embodiment() is None


def test_a_damaged_zip_is_told(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / "a.zarr.zip")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="holds no Zarr store"):
        open_zarr(path).list_episodes()
    path = write_buffer(tmp_path / "b.zarr.zip", array_settings={"compressors": None})
    data = bytearray(path.read_bytes())
    data[data.index(b"data/img/0.0.0.0") + 5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="Bad CRC-32"):
        open_zarr(path).read_episode("b_000000")
    assert open_zarr(path).read_episode("b_000002").num_frames == 9


def test_a_large_buffer_is_listed(tmp_path: Path) -> None:
    frames = np.ones((1000, 8, 8, 3), np.uint8)
    lengths = (2,) * 500
    path = write_buffer(tmp_path / "a.zarr", lengths, rows_per_chunk=1, img=frames, action=None, state=None)
    assert len(open_zarr(path).list_episodes()) == 500
