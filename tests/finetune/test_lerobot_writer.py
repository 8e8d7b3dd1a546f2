"""What is written is LeRobot v3.0: its tables agree with each other, with the video, and with plain numpy."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.video_io import decode_frames, probe_video
from finetune.lerobot_writer import (
    EpisodeRecord,
    VectorFeature,
    VideoFeature,
    count_pixels,
    file_position,
    write_tables,
    write_video_file,
)

VIEW = "observation.images.front"
LENGTHS, FILES, FPS = (7, 5, 9), (0, 0, 1), 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """(folder, frames, actions) of three episodes: two in the first video file, one in the second."""
    folder = tmp_path_factory.mktemp("lerobot") / "dataset"
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 255, (n, 4, 6, 3)) for n in LENGTHS]  # smooth pictures, which the codec keeps well
    frames = [np.repeat(np.repeat(x, 8, axis=1), 8, axis=2).astype(np.uint8) for x in coarse]
    actions = [rng.normal(size=(n, 3)).astype(np.float32) for n in LENGTHS]
    write_video_file(folder, VIEW, 0, frames[:2], FPS)
    write_video_file(folder, VIEW, 1, frames[2:], FPS)
    episodes = [
        EpisodeRecord(
            instruction="push" if i < 2 else "pull",
            vectors={"action": actions[i]},
            next_success=np.arange(LENGTHS[i]) == LENGTHS[i] - 1,
            file_index=FILES[i],
            first_frame=LENGTHS[0] if i == 1 else 0,
            pixel_counts={VIEW: count_pixels(frames[i])},
        )
        for i in range(3)
    ]
    write_tables(folder, episodes, {VIEW: VideoFeature(32, 48), "action": VectorFeature(("x", "y", "z"))}, FPS, "arm")
    return folder, frames, actions


def test_info_counts_and_describes_everything(dataset):
    folder, _, _ = dataset
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, sum(LENGTHS), 2)
    assert (info["fps"], info["robot_type"], info["splits"]) == (FPS, "arm", {"train": "0:3"})
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    video = info["features"][VIEW]
    assert (video["dtype"], video["shape"]) == ("video", [32, 48, 3])
    columns = {name for name, feature in info["features"].items() if feature["dtype"] != "video"}
    table = pq.read_table(folder / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(table.column_names) == columns
    for file_index, num_frames in ((0, 12), (1, 9)):
        path = folder / info["video_path"].format(video_key=VIEW, chunk_index=0, file_index=file_index)
        probed = probe_video(path)
        assert (probed.num_frames, probed.width, probed.height, probed.fps) == (num_frames, 48, 32, FPS)
        assert probed.codec == video["info"]["video.codec"]


def test_rows_and_episodes_agree(dataset):
    folder, _, actions = dataset
    rows = [row for i in (0, 1) for row in pq.read_table(folder / f"data/chunk-000/file-00{i}.parquet").to_pylist()]
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(sum(LENGTHS)))
    for number, episode in enumerate(episodes):
        own = rows[episode["dataset_from_index"] : episode["dataset_to_index"]]
        assert {row["episode_index"] for row in own} == {number}
        assert [row["frame_index"] for row in own] == list(range(episode["length"]))
        np.testing.assert_array_equal(np.array([row["action"] for row in own], np.float32), actions[number])
        np.testing.assert_allclose([row["timestamp"] for row in own], np.arange(episode["length"]) / FPS, rtol=1e-6)
        assert [row["next.success"] for row in own] == [False] * (episode["length"] - 1) + [True]
        assert episode["data/file_index"] == episode[f"videos/{VIEW}/file_index"] == FILES[number]
    assert [row["task_index"] for row in rows] == [0] * 12 + [1] * 9
    assert [episode["tasks"] for episode in episodes] == [["push"], ["push"], ["pull"]]


def test_timestamps_lead_to_the_episode_s_own_frames(dataset):
    folder, frames, _ = dataset
    for number, episode in enumerate(pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()):
        first = round(episode[f"videos/{VIEW}/from_timestamp"] * FPS)
        last = round(episode[f"videos/{VIEW}/to_timestamp"] * FPS)
        assert last - first == episode["length"]
        file_index = episode[f"videos/{VIEW}/file_index"]
        path = folder / f"videos/{VIEW}/chunk-000/file-00{file_index}.mp4"
        decoded = decode_frames(path, range(first, last)).astype(int)
        # nearer to its own frames than to anything else in the file
        assert np.abs(decoded - frames[number]).mean() < 12
        assert np.abs(decoded - frames[number][::-1]).mean() > 40


def test_statistics_are_those_of_numpy(dataset):
    folder, frames, actions = dataset
    stats = json.loads((folder / "meta/stats.json").read_text())
    everything = np.concatenate(actions).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], everything.mean(axis=0))
    np.testing.assert_allclose(stats["action"]["std"], everything.std(axis=0))
    np.testing.assert_allclose(stats["action"]["q90"], np.quantile(everything, 0.9, axis=0))
    assert stats["action"]["count"] == stats[VIEW]["count"] == [sum(LENGTHS)]
    pixels = np.concatenate(frames).reshape(-1, 3) / 255
    for name, expected in (("mean", pixels.mean(0)), ("std", pixels.std(0)), ("min", pixels.min(0))):
        np.testing.assert_allclose(stats[VIEW][name], expected.reshape(3, 1, 1), atol=1e-9)
    np.testing.assert_allclose(stats[VIEW]["q50"], np.median(pixels, axis=0).reshape(3, 1, 1), atol=1 / 255)
    second = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    np.testing.assert_allclose(second["stats/action/max"], actions[1].max(axis=0))
    np.testing.assert_allclose(second[f"stats/{VIEW}/max"], (frames[1].max(axis=(0, 1, 2)) / 255).reshape(3, 1, 1))


def test_instructions_are_the_pandas_index(dataset):
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(dataset[0] / "meta/tasks.parquet")
    assert list(tasks.index) == ["push", "pull"]
    assert list(tasks["task_index"]) == [0, 1]


def test_files_roll_over_into_the_next_chunk():
    assert file_position(999) == {"chunk_index": 0, "file_index": 999}
    assert file_position(1000) == {"chunk_index": 1, "file_index": 0}
