import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.embodiments import Embodiment
from data_pipeline.sources import Episode, LeRobotConfig, Source, SourceError, open_source
from data_pipeline.video_io import decode_at_times, decode_frames
from tests.data_pipeline.recordings import (
    FPS,
    actions_of,
    lerobot_columns,
    numbered_frames,
    read_numbers,
    write_json,
    write_lerobot_v3,
    write_lerobot_v21,
    write_table,
    write_video,
)

WRITERS = [write_lerobot_v21, write_lerobot_v3]
FRONT = "observation.images.front"


def open_lerobot(path: Path, **settings: Any) -> Source:
    return open_source(LeRobotConfig(path=path, **settings))


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def shown_numbers(episode: Episode, view: str = "front") -> list[int]:
    segment = episode.views[view]
    assert segment.start_frame is not None
    return read_numbers(
        decode_frames(segment.path, range(segment.start_frame, segment.start_frame + episode.num_frames))
    )


def check_alignment(episodes: list[Episode], lengths: list[int] | None = None) -> None:
    """Every action row must belong to the frame that the video shows at its place, by number and by time."""
    for episode in episodes:
        index = int(episode.episode_id.removeprefix("episode_"))
        length = episode.num_frames if lengths is None else lengths[index]
        assert episode.num_frames == length
        assert episode.actions is not None
        assert episode.proprio is not None
        np.testing.assert_array_equal(episode.actions, actions_of(index, length))
        np.testing.assert_array_equal(episode.proprio, actions_of(index, length)[:, :2] + 100)
        assert episode.actions.dtype == episode.proprio.dtype == np.float32
        for view, segment in episode.views.items():
            numbers = [100 * index + i for i in range(length)]
            assert shown_numbers(episode, view) == numbers
            times = segment.start_s + np.arange(length) / FPS
            assert read_numbers(decode_at_times(segment.path, times)) == numbers


def change_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def change_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def v21_table(root: Path, index: int = 0) -> Path:
    return root / f"data/chunk-000/episode_{index:06d}.parquet"


def v21_video(root: Path, index: int = 0, key: str = FRONT) -> Path:
    return root / f"videos/chunk-000/{key}/episode_{index:06d}.mp4"


def repaired(source: Source, *words: str) -> bool:
    """Whether one sentence of some episode's repairs has all these words."""
    sentences = {sentence for episode in read_all(source) for sentence in episode.repairs}
    return any(all(word in sentence for word in words) for sentence in sentences)


# --- datasets as they should be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_rows_and_frames_belong_together(tmp_path: Path, write: Callable[..., Path]) -> None:
    root = write(tmp_path / "my set", [12, 9, 7], ["observation.images.front", "observation.images.wrist"])
    source = open_lerobot(root, licence="CC-BY-4.0")
    assert source.list_episodes() == ["episode_000000", "episode_000001", "episode_000002"]
    episodes = read_all(source)
    check_alignment(episodes, [12, 9, 7])
    first = episodes[0]
    assert (first.source, first.licence, first.instruction) == ("my_set", "CC-BY-4.0", "push the block")
    assert (first.fps, first.control_hz, first.embodiment) == (FPS, FPS, "two_joint_arm")
    assert sorted(first.views) == ["front", "wrist"]
    assert all(episode.repairs == () for episode in episodes)
    assert len({episode.content_sha256 for episode in episodes}) == 3


@pytest.mark.parametrize("write", WRITERS)
def test_the_embodiment_is_what_the_features_say(tmp_path: Path, write: Callable[..., Path]) -> None:
    embodiment = open_lerobot(write(tmp_path)).embodiment()
    assert embodiment == Embodiment(
        name="two_joint_arm",
        action_names=("x", "y", "gripper"),
        proprio_names=("x", "y"),
        control_hz=FPS,
        gripper_actions=(2,),
    )


def test_a_config_can_override_embodiment_instruction_and_name(tmp_path: Path) -> None:
    mine = Embodiment(name="mine", action_names=("a", "b", "c"), proprio_names=("d", "e"), control_hz=FPS)
    source = open_lerobot(write_lerobot_v3(tmp_path), embodiment=mine, instruction="do it", name="lab")
    episode = source.read_episode("episode_000000")
    assert (episode.source, episode.embodiment, episode.instruction) == ("lab", "mine", "do it")
    assert source.embodiment() == mine
    wrong = mine.model_copy(update={"action_names": ("a", "b")})
    with pytest.raises(SourceError, match=r"wrong_dims.*has 3 action .* mine has 2"):
        open_lerobot(tmp_path, embodiment=wrong).read_episode("episode_000000")


def test_content_decides_the_digest_and_the_place_does_not(tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = {episode.episode_id: episode.content_sha256 for episode in read_all(open_lerobot(tmp_path / "a"))}
    assert before == {e.episode_id: e.content_sha256 for e in read_all(open_lerobot(tmp_path / "b"))}
    columns = lerobot_columns(0, 12, 0)
    columns["action"] = [row + 1 for row in columns["action"]]
    write_table(v21_table(tmp_path / "b"), columns)
    after = {episode.episode_id: episode.content_sha256 for episode in read_all(open_lerobot(tmp_path / "b"))}
    assert before["episode_000000"] != after["episode_000000"]
    assert before["episode_000001"] == after["episode_000001"]


def test_sources_and_episodes_travel_between_processes(tmp_path: Path) -> None:
    source = open_lerobot(write_lerobot_v3(tmp_path))
    read_all(source)
    check_alignment(read_all(pickle.loads(pickle.dumps(source))), [12, 9, 7])
    assert pickle.loads(pickle.dumps(source.read_episode("episode_000001"))).num_frames == 9


# --- deviations that are repaired ------------------------------------------------------------------------------------


def test_a_dataset_one_folder_below_is_found(tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "robot.Task")
    source = open_lerobot(tmp_path)
    check_alignment(read_all(source), [12, 9])
    assert repaired(source, "subfolder robot.Task")


def test_actions_and_state_under_other_names(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    for index in (0, 1):
        columns = lerobot_columns(index, (12, 9)[index], 0)
        columns = {{"action": "actions", "observation.state": "state"}.get(k, k): v for k, v in columns.items()}
        write_table(v21_table(root, index), columns)
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9])
    assert repaired(source, "actions", "instead of action")
    assert repaired(source, "column state", "instead of observation.state")
    assert open_lerobot(root, action_column="state").read_episode("episode_000000").actions.shape == (12, 2)
    with pytest.raises(UserError, match=r"action_column is nothing.*actions, state"):
        open_lerobot(root, action_column="nothing").list_episodes()


@pytest.mark.parametrize("write", WRITERS)
def test_missing_index_columns_are_derived(tmp_path: Path, write: Callable[..., Path]) -> None:
    root = write(tmp_path)
    for table in root.glob("data/**/*.parquet"):
        change_table(table, lambda t: t.select(["action", "observation.state"]))
    source = open_lerobot(root)
    check_alignment(read_all(source))
    assert repaired(source, "no column", "timestamp, frame_index, episode_index, index, task_index")


def test_rows_out_of_order_are_sorted(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    change_table(v21_table(root), lambda t: t.take(pa.array(range(11, -1, -1))))
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9])
    assert repaired(source, "sorted")


def test_timestamps_that_begin_late_or_drift_are_reported(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    for index, times in ((0, np.arange(12) / FPS + 0.1), (1, np.arange(9) / FPS * 1.2)):
        write_table(v21_table(root, index), lerobot_columns(index, len(times), 0) | {"timestamp": times})
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9])
    assert repaired(source, "Timestamps begin at 0.100 s")
    assert repaired(source, "Timestamps leave the 10 Hz grid by up to 0.160 s")


def test_an_absent_camera_is_skipped_and_a_renamed_folder_is_found(tmp_path: Path) -> None:
    cameras = ["observation.images.ego_view", "observation.images.left_wrist"]
    root = write_lerobot_v21(tmp_path, cameras=cameras)
    videos = root / "videos" / "chunk-000"
    (videos / cameras[1]).rename(videos / "leftWrist")

    def declare_another(info: dict[str, Any]) -> None:
        ghost = {"dtype": "video", "shape": [480, 640, 3]}  # the same letters as a camera that exists
        info["features"] = {"observation.images.egoview": ghost, **info["features"]}

    change_info(root, declare_another)
    source = open_lerobot(root)
    episodes = read_all(source)
    check_alignment(episodes, [12, 9])
    assert sorted(episodes[0].views) == ["ego_view", "left_wrist"]
    assert repaired(source, "observation.images.egoview", "no videos", "skipped")
    assert repaired(source, "left_wrist", "leftWrist")


def test_the_only_folder_left_belongs_to_the_only_camera_left(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path)
    (root / "videos" / FRONT).rename(root / "videos" / "cam0")
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9, 7])
    assert repaired(source, FRONT, "cam0")


def test_depth_and_undeclared_videos_are_not_read(tmp_path: Path) -> None:
    cameras = [FRONT, "observation.images.depth", "observation.images.extra"]
    root = write_lerobot_v21(tmp_path, cameras=cameras)

    def change(info: dict[str, Any]) -> None:
        info["features"]["observation.images.depth"]["info"]["video.is_depth_map"] = True
        del info["features"]["observation.images.extra"]

    change_info(root, change)
    source = open_lerobot(root)
    assert list(read_all(source)[0].views) == ["front"]
    assert repaired(source, "depth", "skipped")
    assert repaired(source, "observation.images.extra", "not read")


def test_the_video_is_believed_over_info_json(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    write_video(v21_video(root), numbered_frames(range(12)), codec="mpeg4", options={"qscale": "3"})
    change_info(root, lambda info: info["features"][FRONT].update(shape=[480, 640, 3]))
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9])
    assert repaired(source, "h264", "mpeg4")
    assert repaired(source, "640x480", "64x48")


def test_counts_that_disagree_within_a_few_frames_are_cut_to_the_shorter(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path, [12, 9])
    write_video(v21_video(root, 0), numbered_frames(range(11)))
    write_video(v21_video(root, 1), numbered_frames(range(100, 110)))
    write_json(root / "meta/episodes.jsonl", [{"episode_index": 0, "length": 13}, {"episode_index": 1}])
    source = open_lerobot(root)
    check_alignment(read_all(source), [11, 9])
    assert repaired(source, "12 rows for 11 frames")
    assert repaired(source, "10 frames for 9 rows")
    assert repaired(source, "says 13 frames", "12 rows")


def test_the_longest_task_text_is_the_instruction(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    tasks = [{"task_index": 0, "task": "valid"}, {"task_index": 1, "task": "pick the  pear\nfrom the counter"}]
    write_json(root / "meta/tasks.jsonl", tasks)
    write_json(root / "meta/episodes.jsonl", [{"episode_index": 0, "tasks": ["valid"]}, {"episode_index": 1}])
    annotated = lerobot_columns(0, 12, 0) | {"annotation.human.task": np.ones(12, dtype=np.int64)}
    write_table(v21_table(root, 0), annotated)
    source = open_lerobot(root)
    assert [episode.instruction for episode in read_all(source)] == ["pick the pear from the counter", "valid"]
    assert repaired(source, "2 task texts", '"valid"')


@pytest.mark.parametrize(
    "table",
    [
        {"task_index": [0], "task": ["open the drawer"]},
        {"task_index": [0], "description_of_it": ["open the drawer"]},
        {"__index_level_0__": ["open the drawer"], "task_index": [0]},
        {"task": ["open the drawer"]},
    ],
)
def test_task_text_is_read_from_any_text_column(tmp_path: Path, table: dict[str, Any]) -> None:
    root = write_lerobot_v3(tmp_path)
    write_table(root / "meta/tasks.parquet", table)
    change_table(root / "meta/episodes/chunk-000/file-000.parquet", lambda t: t.drop_columns(["tasks"]))
    assert [episode.instruction for episode in read_all(open_lerobot(root))] == ["open the drawer"] * 3


def test_missing_lists_and_wrong_totals_are_survived(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path, total_episodes=100, splits={"train": "0:100"})
    for name in ("episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl"):
        (root / "meta" / name).unlink()
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9])
    assert read_all(source)[0].instruction is None
    for words in (["100 episodes", "lists 2"], ["split train", "0:100"], ["episodes.jsonl"], ["no instruction"]):
        assert repaired(source, *words), words


def test_a_broken_line_costs_only_itself(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write('\n{"episode_index": 2, "ta')
    source = open_lerobot(root)
    assert source.list_episodes() == ["episode_000000", "episode_000001"]
    assert repaired(source, "episodes.jsonl", "unreadable lines", "3 first")


def test_the_layout_on_disk_is_believed_over_the_version(tmp_path: Path) -> None:
    write_lerobot_v3(tmp_path / "a", codebase_version="v2.1")
    write_lerobot_v21(tmp_path / "b", codebase_version="latest")
    check_alignment(read_all(open_lerobot(tmp_path / "a")), [12, 9, 7])
    check_alignment(read_all(open_lerobot(tmp_path / "b")), [12, 9])
    assert repaired(open_lerobot(tmp_path / "a"), "says v2.1", "v3.0")
    assert repaired(open_lerobot(tmp_path / "b"), "latest", "v2.1")


def test_a_dataset_without_actions_is_action_free(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    for index in (0, 1):
        change_table(v21_table(root, index), lambda t: t.drop_columns(["action"]))
    source = open_lerobot(root)
    episode = source.read_episode("episode_000000")
    assert (episode.actions, episode.control_hz, episode.embodiment, source.embodiment()) == (None, None, None, None)
    assert episode.proprio is not None
    assert repaired(source, "without actions")


def test_success_flags_are_read(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    for index, length in ((0, 12), (1, 9)):
        flags = np.arange(length) == 8 * index - 1  # episode 1 succeeds in its frame 7
        write_table(v21_table(root, index), lerobot_columns(index, length, 0) | {"next.success": flags})
    assert [episode.success for episode in read_all(open_lerobot(root))] == [False, True]


# --- v3: many episodes in one file -----------------------------------------------------------------------------------


def test_small_drift_of_from_timestamp_does_not_move_the_start(tmp_path: Path) -> None:
    source = open_lerobot(write_lerobot_v3(tmp_path, from_shift_s=0.04))
    check_alignment(read_all(source), [12, 9, 7])
    assert not repaired(source, "from_timestamp")


def test_episodes_that_are_no_longer_listed_still_take_their_frames(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path)
    change_table(root / "meta/episodes/chunk-000/file-000.parquet", lambda t: t.slice(1))
    source = open_lerobot(root)
    assert source.list_episodes() == ["episode_000001", "episode_000002"]
    check_alignment(read_all(source), [12, 9, 7])
    assert repaired(source, "28 frames", "16", "found by timestamp")


def test_a_from_timestamp_far_from_the_count_wins_and_is_reported(tmp_path: Path) -> None:
    root = write_lerobot_v3(tmp_path, [12, 9, 7])
    numbers = [*range(12), *range(100, 109), *range(200, 207)]
    order = [*range(21, 28), *range(0, 12), *range(12, 21)]  # the file holds episode 2 first
    write_video(root / f"videos/{FRONT}/chunk-000/file-000.mp4", numbered_frames([numbers[i] for i in order]))

    def correct_but_unequal_lengths(table: pa.Table) -> pa.Table:
        columns = table.to_pydict()
        columns[f"videos/{FRONT}/from_timestamp"] = [0.7, 1.9, 0.0]
        columns[f"videos/{FRONT}/to_timestamp"] = [1.9, 2.8, 0.7]
        columns["length"] = [13, 8, 7]  # wrong, with the right sum
        return pa.table(columns)

    change_table(root / "meta/episodes/chunk-000/file-000.parquet", correct_but_unequal_lengths)
    source = open_lerobot(root)
    check_alignment(read_all(source), [12, 9, 7])
    assert repaired(source, "counting gives 20", "timestamp is believed")


def test_cameras_of_one_episode_in_different_files(tmp_path: Path) -> None:
    wrist = "observation.images.wrist"
    root = write_lerobot_v3(tmp_path, [12, 9, 7], [FRONT, wrist])
    write_video(root / f"videos/{wrist}/chunk-000/file-000.mp4", numbered_frames(range(12)))
    late = numbered_frames([*range(100, 109), *range(200, 207)])
    write_video(root / f"videos/{wrist}/chunk-001/file-003.mp4", late)

    def move(table: pa.Table) -> pa.Table:
        places = {"chunk_index": [0, 1, 1], "file_index": [0, 3, 3]}
        times = {"from_timestamp": [0.0, 0.0, 0.9], "to_timestamp": [1.2, 0.9, 1.6]}
        return pa.table(table.to_pydict() | {f"videos/{wrist}/{name}": v for name, v in (places | times).items()})

    change_table(root / "meta/episodes/chunk-000/file-000.parquet", move)
    check_alignment(read_all(open_lerobot(root)), [12, 9, 7])


# --- episodes and datasets that cannot be read -----------------------------------------------------------------------


def reasons(source: Source) -> dict[str, str]:
    found = {}
    for episode_id in source.list_episodes():
        try:
            source.read_episode(episode_id)
        except SourceError as error:
            found[episode_id] = error.reason
    return found


def test_one_bad_episode_does_not_touch_the_others(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path, [9] * 10)
    v21_video(root, 0).unlink()
    v21_video(root, 1).write_text("not a video")
    data = v21_video(root, 2).read_bytes()
    v21_video(root, 2).write_bytes(data[: len(data) // 2])
    v21_table(root, 3).unlink()
    v21_table(root, 4).write_text("version https://git-lfs.github.com/spec/v1")
    write_video(v21_video(root, 5), numbered_frames(range(3)))
    nan = actions_of(6, 9)
    nan[4, 1] = np.nan
    write_table(v21_table(root, 6), lerobot_columns(6, 9, 0) | {"action": list(nan)})
    write_table(v21_table(root, 7), lerobot_columns(7, 9, 0) | {"frame_index": [0, 1, 2, 3, 4, 7, 8, 9, 10]})
    change_table(v21_table(root, 8), lambda t: t.slice(0, 0))
    source = open_lerobot(root)
    assert reasons(source) == {
        "episode_000000": "missing_video",
        "episode_000001": "not_a_video",
        "episode_000002": "truncated_video",
        "episode_000003": "missing_table",
        "episode_000004": "unreadable_table",
        "episode_000005": "frame_count_mismatch",
        "episode_000006": "non_finite_values",
        "episode_000007": "missing_rows",
        "episode_000008": "missing_rows",
    }
    check_alignment([source.read_episode("episode_000009")])
    with pytest.raises(SourceError, match="unknown_episode"):
        source.read_episode("episode_000077")


@settings(max_examples=40)
@given(data=st.data())
def test_damage_anywhere_is_an_error_of_its_episode_or_of_the_dataset(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = data.draw(st.sampled_from(WRITERS))(tmp_path_factory.mktemp("damaged"), [5, 4])
    files = sorted(path for path in root.glob("*/**/*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes()) or bytearray(1)
    for place, value in data.draw(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5)
    ):
        content[int(place * len(content))] = value
    path.write_bytes(bytes(content[: int(data.draw(st.floats(0, 1)) * len(content))]))
    try:
        source = open_lerobot(root)
        for episode_id in source.list_episodes():
            with contextlib.suppress(SourceError):
                source.read_episode(episode_id)
    except UserError:
        pass


def test_datasets_that_are_no_use_are_refused_in_one_sentence(tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "two" / "a")
    write_lerobot_v21(tmp_path / "two" / "b")
    (tmp_path / "empty").mkdir()
    images = write_lerobot_v21(tmp_path / "images")
    change_info(images, lambda info: info["features"][FRONT].update(dtype="image"))
    shutil.rmtree(images / "videos")
    shutil.rmtree(write_lerobot_v21(tmp_path / "no_videos") / "videos")
    shutil.rmtree(write_lerobot_v21(tmp_path / "no_tables") / "data")
    shutil.rmtree(write_lerobot_v3(tmp_path / "no_episodes") / "meta" / "episodes")
    (tmp_path / "no_episodes" / "meta" / "episodes").mkdir()
    (write_lerobot_v21(tmp_path / "broken") / "meta" / "info.json").write_text("{")
    write_lerobot_v21(tmp_path / "no_rate", fps=0)
    write_lerobot_v21(tmp_path / "old", codebase_version="v1.6")
    write_lerobot_v21(tmp_path / "escape", data_path="../../secret_{episode_index}.parquet")
    write_lerobot_v21(tmp_path / "template", video_path="videos/{camera}.mp4")
    expected = {
        "absent": "there is no such folder",
        "empty": "not a LeRobot dataset",
        "two": r"holds 2 LeRobot datasets \(a, b\)",
        "images": r"images inside the tables.*use_videos",
        "no_videos": r"none of its cameras \(observation.images.front\) has videos",
        "no_tables": "none of its tables in data/ can be read",
        "no_episodes": "no rows with an episode_index",
        "broken": "cannot be read as JSON",
        "no_rate": "fps must be a positive number of at most a million, found 0",
        "old": "v1.6 is not supported",
        "escape": "leads out of the dataset's folder",
        "template": "cannot be filled in",
    }
    for name, sentence in expected.items():
        with pytest.raises(UserError, match=sentence) as caught:
            open_lerobot(tmp_path / name).list_episodes()
        assert "\n" not in str(caught.value)


# --- real recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lengths", "dim", "rate", "size", "repair"),
    [
        ("g1_real_lerobot_v21_trim", {1: 393, 2: 343, 4: 357, 5: 368}, 26, 30, (480, 640), "gaps"),
        ("open50_lerobot_v30_trim", {3: 429, 4: 395, 5: 449, 6: 408}, 34, 30, (480, 640), "mpeg4"),
        ("gr00t_pnp_lerobot_v2", {0: 416, 1: 470, 2: 470, 3: 412, 4: 328}, 44, 20, (256, 256), "egoview"),
    ],
)
def test_recorded_datasets_read_fully(
    shared_data: Path, name: str, lengths: dict[int, int], dim: int, rate: int, size: tuple[int, int], repair: str
) -> None:
    source = open_lerobot(shared_data / name)
    episodes = read_all(source)
    assert {int(episode.episode_id[-6:]): episode.num_frames for episode in episodes} == lengths
    embodiment = source.embodiment()
    assert embodiment is not None
    assert (embodiment.action_dim, embodiment.proprio_dim, embodiment.control_hz) == (dim, dim, rate)
    for episode in episodes:
        assert episode.actions is not None
        assert episode.proprio is not None
        assert episode.actions.shape == episode.proprio.shape == (episode.num_frames, dim)
        assert episode.embodiment == embodiment.name
        assert len(episode.instruction or "") > 10
        (segment,) = episode.views.values()
        assert segment.start_frame is not None
        last = segment.start_frame + episode.num_frames - 1
        assert decode_frames(segment.path, [segment.start_frame, last]).shape == (2, *size, 3)
    assert repaired(source, repair)


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl"])
def test_metadata_that_is_nested_too_deeply_is_told(tmp_path: Path, name: str) -> None:
    root = write_lerobot_v21(tmp_path)
    (root / "meta" / name).write_text(100_000 * "[")
    with pytest.raises(UserError, match=r"cannot be read as JSON|episode"):
        open_source(LeRobotConfig(path=root)).list_episodes()
