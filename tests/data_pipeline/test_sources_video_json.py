import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from configs.loader import UserError
from data_pipeline import doctor
from data_pipeline.sources import (
    AnySourceConfig,
    Episode,
    Source,
    SourceError,
    VideoJsonConfig,
    detect_kind,
    open_source,
    video_json,
)
from data_pipeline.sources.json_records import below, look_up
from tests.data_pipeline.recordings import FPS, numbered_frames, read_numbers, write_video

NUM_FRAMES = 9


def open_set(path: Path, **settings: Any) -> Source:
    return open_source(VideoJsonConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def reason(source: Source) -> str:
    (episode_id,) = source.list_episodes()
    with pytest.raises(SourceError) as caught:
        source.read_episode(episode_id)
    return caught.value.reason


def rows(episode: int, length: int = NUM_FRAMES, dim: int = 3) -> list[list[float]]:
    return [[float(episode), float(row), *[0.5] * (dim - 2)] for row in range(length)]


def write_record(root: Path, name: str = "0", video: str | None = None, start: int = 0, **record: Any) -> Path:
    """A video `videos/<name>.mp4` that shows start, start + 1, …, and `annotation/<name>.json` that names it."""
    write_video(root / "videos" / f"{name}.mp4", numbered_frames(range(start, start + NUM_FRAMES)))
    path = root / "annotation" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"video_path": video or f"videos/{name}.mp4", **record}))
    return path


# --- what a record says ----------------------------------------------------------------------------------------------


def test_usual_names_are_found(tmp_path: Path) -> None:
    root = tmp_path / "my set"
    for index in range(2):
        write_record(
            root, str(index), start=100 * index, action=rows(index), state=rows(index, 10, 2), texts=["", " go "]
        )
    assert detect_kind(root) == "video_json"
    source = open_set(root, licence="CC0")
    first, second = read_all(source)
    assert source.embodiment() is not None
    assert (first.source, first.licence, first.instruction, first.embodiment) == ("my_set", "CC0", "go", "my_set")
    assert (first.fps, first.control_hz, first.num_frames, first.repairs) == (FPS, FPS, NUM_FRAMES, ())
    np.testing.assert_array_equal(second.actions, np.float32(rows(1)))
    np.testing.assert_array_equal(second.proprio, np.float32(rows(1, NUM_FRAMES, 2)))  # without the last state
    assert second.actions is not None
    assert second.actions.dtype == np.float32
    footage = second.views["main"]
    positions = footage.positions(np.arange(NUM_FRAMES) / FPS, second.fps)
    assert read_numbers(footage.read(positions.tolist())) == [100 + i for i in range(NUM_FRAMES)]
    assert first.content_sha256 != second.content_sha256


def test_keys_choose_and_join_columns(tmp_path: Path) -> None:
    record = {"a.b": rows(1, dim=2), "arm": {"grip": [0.0] * NUM_FRAMES}, "q": [rows(2, 2)] * NUM_FRAMES, "success": 1}
    write_record(tmp_path, **record, caption="push", task="other")
    source = open_set(tmp_path, action_keys=["a.b", "arm.grip"], proprio_keys=["q"], instruction_key="task")
    (episode,) = read_all(source)
    assert episode.actions is not None
    assert episode.actions.shape == (NUM_FRAMES, 3)
    assert episode.proprio is not None
    assert episode.proprio.shape == (NUM_FRAMES, 6)  # nested rows are flattened
    assert (episode.instruction, episode.success) == ("other", True)
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ("b_0", "b_1", "grip")
    assert embodiment.proprio_names == tuple(f"q_{i}" for i in range(6))


def test_several_views_and_a_faster_control_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "0.mp4", numbered_frames(range(NUM_FRAMES)))
    write_video(tmp_path / "1.mp4", numbered_frames(range(50, 50 + NUM_FRAMES)))
    record = {"videos": [{"path": "0.mp4"}, {"path": "1.mp4"}], "action": rows(0, 3 * NUM_FRAMES - 2), "hz": 30}
    (tmp_path / "episode.json").write_text(json.dumps(record))
    (found,) = read_all(open_set(tmp_path, control_hz=30))
    assert list(found.views) == ["view_0", "view_1"]
    (episode,) = read_all(open_set(tmp_path, control_hz="hz", video_keys={"wrist": "videos.1.path"}))
    assert list(episode.views) == ["wrist"]
    assert read_numbers(episode.views["wrist"].read([2])) == [52]
    assert (episode.control_hz, episode.fps) == (30, FPS)
    assert reason(open_set(tmp_path)) == "frame_count_mismatch"  # 25 actions cannot belong to 9 frames one by one
    (slowed,) = read_all(open_set(tmp_path, fps=5, control_hz=15))  # the file's header may be wrong
    assert (slowed.fps, slowed.num_frames) == (5, NUM_FRAMES)
    positions = slowed.views["view_0"].positions(np.array([0.0, 0.4, 1.0]), slowed.fps)
    assert positions.tolist() == [0, 2, 5]


def test_the_embodiment_block_says_the_control_rate(tmp_path: Path) -> None:
    write_record(tmp_path, action=rows(0, 3 * NUM_FRAMES - 2), hz=30)
    block = {"name": "arm", "action_names": ["x", "y", "z"], "proprio_names": [], "control_hz": 30}
    for settings in ({}, {"control_hz": 30}, {"control_hz": "hz"}):
        (episode,) = read_all(open_set(tmp_path, embodiment=block, **settings))
        assert (episode.control_hz, episode.fps, episode.embodiment) == (30, FPS, "arm")
    slower = {**block, "control_hz": 15}
    assert reason(open_set(tmp_path, embodiment=slower)) == "frame_count_mismatch"
    (episode,) = read_all(open_set(tmp_path, embodiment=slower, control_hz="hz"))  # the record knows better
    assert episode.control_hz == 30
    sentence = r"^command line: settings control_hz=30 and embodiment\.control_hz=15 are two rates .* leave .* out, .*$"
    with pytest.raises(UserError, match=sentence):
        doctor.examine(tmp_path, "video_json", {"control_hz": 30, "embodiment": slower})


def test_views_of_different_rates_are_placed_by_time(tmp_path: Path) -> None:
    write_video(tmp_path / "slow.mp4", numbered_frames(range(5)), times_ms=[0, 200, 400, 600, 800])
    write_video(tmp_path / "fast.mp4", numbered_frames(range(10)))
    (tmp_path / "episode.json").write_text(json.dumps({"fast": "fast.mp4", "slow": "slow.mp4"}))
    (episode,) = read_all(open_set(tmp_path))
    times = np.arange(9) / 10
    shown = {
        view: read_numbers(footage.read(footage.positions(times, 10).tolist()))
        for view, footage in episode.views.items()
    }
    assert episode.num_frames == 9  # the slow file says that its last frame lasts 0.1 s
    assert shown == {"fast": list(range(9)), "slow": [0, 0, 1, 1, 2, 2, 3, 3, 4]}


def test_arrays_may_lie_in_files_and_paths_be_built_from_the_record(tmp_path: Path) -> None:
    write_video(tmp_path / "clips/ep7.mp4", numbered_frames(range(NUM_FRAMES)))
    np.save(tmp_path / "clips/ep7_action.npy", np.float64(rows(7)))
    np.savez(tmp_path / "clips/ep7.npz", qpos=np.ones((NUM_FRAMES, 2)), other=np.zeros(3))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/ep7.json").write_text(json.dumps({"id": 7, "npy": "../clips/ep7_action.npy"}))
    settings: dict[str, Any] = {"records": "meta/*.json", "video_keys": {"main": "clips/{stem}.mp4"}}
    source = open_set(tmp_path, **settings, action_keys=["npy"], proprio_keys=["clips/ep{id}.npz#qpos"])
    (episode,) = read_all(source)
    np.testing.assert_array_equal(episode.actions, np.float32(rows(7)))
    assert episode.proprio is not None
    assert episode.proprio.shape == (NUM_FRAMES, 2)
    assert source.embodiment().proprio_names == ("qpos_0", "qpos_1")  # type: ignore[union-attr]
    before = episode.content_sha256
    np.save(tmp_path / "clips/ep7_action.npy", np.float64(rows(8)))
    assert read_all(open_set(tmp_path, **settings, action_keys=["npy"]))[0].content_sha256 != before
    assert reason(open_set(tmp_path, **settings, action_keys=["clips/{stem}.npz"])) == "bad_record"  # which array?
    assert reason(open_set(tmp_path, **settings, action_keys=["clips/{stem}.npz#none"])) == "unreadable_file"
    assert reason(open_set(tmp_path, **settings, action_keys=["clips/{nobody}.npy"])) == "bad_record"


@pytest.mark.parametrize("layout", ["list", "dict", "jsonl"])
def test_many_records_in_one_file(tmp_path: Path, layout: str) -> None:
    records = {}
    for index in range(3):
        write_video(tmp_path / f"{index}.mp4", numbered_frames(range(10 * index, 10 * index + NUM_FRAMES)))
        records[f"episode {index}"] = {"video": f"{index}.mp4", "actions": rows(index)}
    file = tmp_path / f"all.{'jsonl' if layout == 'jsonl' else 'json'}"

    def write() -> None:
        if layout == "jsonl":
            file.write_text("\n\n".join(json.dumps(record) for record in records.values()))
        else:
            file.write_text(json.dumps(records if layout == "dict" else list(records.values())))

    write()
    assert detect_kind(tmp_path) == detect_kind(file) == "video_json"
    before = open_set(tmp_path).list_episodes()
    episodes = read_all(open_set(tmp_path))
    assert sorted(float(episode.actions[0, 0]) for episode in episodes) == [0, 1, 2]  # type: ignore[index]
    for episode in episodes:
        number = int(episode.actions[0, 0])  # type: ignore[index]
        assert read_numbers(episode.views["main"].read([3])) == [10 * number + 3]
    records["episode 3"] = {"video": "0.mp4"}
    write()
    assert set(before) < set(open_set(tmp_path).list_episodes())


def test_an_episode_without_the_actions_of_the_others(tmp_path: Path) -> None:
    write_record(tmp_path, "a")
    write_record(tmp_path, "b", act=rows(0))
    source = open_set(tmp_path, action_keys=["act"])
    without, labelled = read_all(source)
    assert (without.actions, without.control_hz, without.embodiment) == (None, None, None)
    assert "no act" in without.repairs[0]
    assert labelled.actions is not None
    assert source.embodiment() is not None
    assert open_set(tmp_path, action_keys=[]).embodiment() is None


def test_proprio_of_another_rate_is_left_out_unless_it_was_asked_for(tmp_path: Path) -> None:
    write_record(tmp_path, action=rows(0), state=rows(0, 20))
    (episode,) = read_all(open_set(tmp_path))
    assert episode.proprio is None
    assert "another rate" in episode.repairs[0]
    assert reason(open_set(tmp_path, proprio_keys=["state"])) == "frame_count_mismatch"


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"action": "text"}, "unreadable_file"),
        ({"action": [[1, 2], [3]]}, "ragged_values"),
        ({"action": [["a"]] * NUM_FRAMES}, "ragged_values"),
        ({"action": [[None]] * NUM_FRAMES}, None),  # JSON's null is a missing number
        ({"action": {"x": 1}}, "ragged_values"),
        ({"action": [[10**400]] * NUM_FRAMES}, "ragged_values"),
        ({"action": rows(0, 50)}, "frame_count_mismatch"),
        ({"action": rows(0, 3)}, "frame_count_mismatch"),
        ({"action": "../../secret.npy"}, "outside_folder"),
        ({"action": "/etc/passwd"}, "outside_folder"),
        ({"video_path": "../../outside.mp4"}, "outside_folder"),
        ({"video_path": "absent.mp4"}, "missing_video"),
        ({"video_path": "annotation/0.json"}, "not_a_video"),
        ({"video_path": 3}, "missing_view"),
    ],
)
def test_a_bad_record_is_its_own_problem(tmp_path: Path, record: dict[str, Any], expected: str | None) -> None:
    root = tmp_path / "set"
    write_video(tmp_path / "outside.mp4", numbered_frames(range(3)))
    path = write_record(root)
    path.write_text(json.dumps({"video_path": "videos/0.mp4", **record}))
    source = open_set(root, records="annotation/*.json", video_keys={"main": "video_path"})
    if expected is None:
        (episode,) = read_all(source)
        assert np.isnan(episode.actions).all()  # type: ignore[arg-type]
    else:
        assert reason(source) == expected


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    write_record(tmp_path, action="a.npy")
    assert reason(open_set(tmp_path)) == "unreadable_file"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "unreadable_file"), (b'{"video": "x', "unreadable_file"), (b"[" * 100_000, "unreadable_file"),
     (b"version https://git-lfs.github.com/spec/v1\n", "unreadable_file"), (b"\xff\xfe", "unreadable_file"),
     (b"[3]", "bad_record")],
)  # fmt: skip
def test_a_bad_file_is_its_own_problem(tmp_path: Path, content: bytes, expected: str) -> None:
    write_record(tmp_path, "good", action=rows(0))
    (tmp_path / "annotation" / "bad.json").write_bytes(content)
    source = open_set(tmp_path)
    found = {}
    for episode_id in source.list_episodes():
        try:
            found[episode_id.split("_")[1]] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[episode_id.split("_")[1]] = error.reason
    assert found == {"bad": expected, "good": NUM_FRAMES}


def test_json_that_names_no_video_is_not_read(tmp_path: Path) -> None:
    write_record(tmp_path)
    (tmp_path / "meta.json").write_text('{"homepage": "https://example.org/trailer.mp4", "of": "../videos/0.mp4"}')
    (tmp_path / "stats.json").write_text("[" + "1," * 1000 + "1]")
    assert len(open_set(tmp_path).list_episodes()) == 1
    write_video(tmp_path / "plain" / "a.mp4", numbered_frames(range(3)))
    (tmp_path / "plain" / "a.json").write_text('{"caption": "a hand"}')
    assert detect_kind(tmp_path / "plain") == "video_folder"


def test_unusable_sets_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(3)))
    for settings, words in (
        ({}, "set `records`"),
        ({"records": "x/*.json"}, "matches records"),
        ({"records": "/x"}, "pattern"),
    ):
        with pytest.raises(UserError, match=words):
            open_set(tmp_path, **settings).list_episodes()
    with pytest.raises(UserError, match="no such folder"):
        open_set(tmp_path / "absent").list_episodes()


@given(st.lists(st.sampled_from(["..", ".", "a", "b.npy", "/", "//x", "~"]), max_size=6).map("/".join))
def test_no_path_leads_out_of_the_set(text: str) -> None:
    root = Path("some/set")
    found = below(root, root / "deep/er/record.json", text)
    assert found is None or found.is_relative_to(Path.cwd() / root)


def test_a_key_with_dots_comes_before_a_path_of_keys() -> None:
    data = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}}
    assert [look_up(data, key) for key in ("a.b", "a.c.0.d", "a.c.1.d", "a.b.c", "x")] == [1, 3, None, None, None]


# --- recorded sets ---------------------------------------------------------------------------------------------------


def documented() -> dict[str, Any]:
    """The sources that the module's docstring shows."""
    assert video_json.__doc__ is not None
    return dict(yaml.safe_load(video_json.__doc__[video_json.__doc__.index("    #") :]))


@pytest.mark.parametrize(
    ("name", "num_episodes", "num_frames", "num_actions", "dims", "rates"),
    [
        ("droid", 11, 854, 2547, (7, 7), (5, 15)),
        ("language_table", 1, 18, 17, (2, 0), (4, 4)),
        ("bridge", 4, 144, 140, (7, 7), (5, 5)),
    ],
)
def test_documented_layouts(
    shared_data: Path,
    name: str,
    num_episodes: int,
    num_frames: int,
    num_actions: int,
    dims: tuple[int, int],
    rates: tuple[float, float],
) -> None:
    block = documented()[name]
    config: Any = TypeAdapter(AnySourceConfig).validate_python(block | {"path": shared_data / block["path"]})
    source = open_source(config)
    episodes = read_all(source)
    robot = source.embodiment()
    assert robot is not None
    assert (len(episodes), sum(episode.num_frames for episode in episodes)) == (num_episodes, num_frames)
    assert sum(len(episode.actions) for episode in episodes if episode.actions is not None) == num_actions
    assert (robot.action_dim, robot.proprio_dim) == dims
    assert {(episode.fps, episode.control_hz) for episode in episodes} == {rates}
    assert all(episode.repairs == () for episode in episodes)


def test_frames_and_rows_of_ctrl_world_belong_together(shared_data: Path) -> None:
    """`states` is what the authors sampled for each frame out of the faster rows."""
    root = shared_data / "ctrlworld_droid/droid_subset"
    droid = documented()["droid"]
    fast = open_set(root, **{key: droid[key] for key in ("action_keys", "proprio_keys", "control_hz", "video_keys")})
    slow = open_set(root, action_keys=["states"])
    for episode, sampled in zip(read_all(fast), read_all(slow), strict=True):
        assert episode.proprio is not None
        assert sampled.actions is not None
        assert sampled.actions.shape == (episode.num_frames, 7)
        np.testing.assert_array_equal(episode.proprio[::3], sampled.actions)
        assert list(episode.views) == ["exterior_1", "exterior_2", "wrist"]


def test_a_mixed_set(shared_data: Path) -> None:
    source = open_set(shared_data / "vpp_mixed")
    episodes = read_all(source)
    assert (len(episodes), sum(episode.actions is not None for episode in episodes)) == (12, 8)
    assert sum(episode.num_frames for episode in episodes) == 546
    assert all(episode.instruction for episode in episodes)
    state = open_set(
        shared_data / "vpp_mixed/bridge",
        proprio_keys=["videos/val/{stem}/state.npy"],
        action_keys=["action"],
    )
    for episode in read_all(state):
        assert episode.proprio is not None
        assert episode.proprio.shape == (episode.num_frames - 1, 8)


# --- files that claim what they are not -------------------------------------------------------------------------------


def npy(shape: str, data: bytes = b"", dtype: str = "'<f4'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(flag_byte: int, value: int, place: int | None = None) -> bytes:
    """An archive whose headers have a wrong byte, or whose data has, at `place`."""
    buffer = io.BytesIO()
    np.savez(buffer, np.float32(rows(0)))
    data = bytearray(buffer.getvalue())
    for at in (flag_byte, data.index(b"PK\x01\x02") + flag_byte + 2) if place is None else (place,):
        data[at] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"PK\x03\x04 and no archive", "truncated_file"),
        (npy("(100000000000000, 7)"), "truncated_file"),
        (npy("(-9, 3)", bytes(108)), "truncated_file"),
        (npy("(9,)", b"cos\nsystem\n" * 9, "'|O'"), "unreadable_file"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"{" + b"(" * 15, "unreadable_file"),
        (npz(6, 1), "unreadable_file"),  # encrypted
        (npz(8, 99), "unreadable_file"),  # packed by an unknown method
        (npz(0, 255, place=260), "unreadable_file"),  # its checksum fails
    ],
)
def test_an_array_file_that_is_none_costs_its_episode(tmp_path: Path, data: bytes, why: str) -> None:
    write_record(tmp_path, action="videos/action.npy")
    (tmp_path / "videos" / "action.npy").write_bytes(data)
    source = open_set(tmp_path)
    assert source.embodiment() is None
    assert reason(source) == why


@pytest.mark.parametrize("fps", [10**400, 1e308, 1e-300])
def test_a_rate_beyond_all_cameras_costs_its_episode(tmp_path: Path, fps: float) -> None:
    write_record(tmp_path, action=rows(0), rate=fps)
    source = open_set(tmp_path, fps="rate")
    assert source.embodiment() is None
    assert reason(source) == "bad_record"


@pytest.mark.parametrize("name", ["a\0.mp4", "\ud800.mp4", 5000 * "a" + ".mp4"])
def test_what_no_file_can_be_called_is_missing(tmp_path: Path, name: str) -> None:
    write_record(tmp_path, video=name)
    assert reason(open_set(tmp_path, records="**/*.json", video_keys={"main": "video_path"})) == "missing_video"
    assert reason(open_set(tmp_path, records="**/*.json")) == "missing_video"


def test_half_characters_are_replaced(tmp_path: Path) -> None:
    write_record(tmp_path, text="pick \ud800 up")
    assert read_all(open_set(tmp_path))[0].instruction == "pick \ufffd\ufffd\ufffd up"
