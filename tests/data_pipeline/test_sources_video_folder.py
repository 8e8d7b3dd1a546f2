from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import UserError
from data_pipeline.sources import Source, SourceError, VideoFolderConfig, detect_kind, open_source
from data_pipeline.video_io import decode_frames
from tests.data_pipeline.recordings import (
    FPS,
    numbered_frames,
    read_numbers,
    write_lerobot_v3,
    write_lerobot_v21,
    write_video,
)


def open_folder(path: Path, **settings: Any) -> Source:
    return open_source(VideoFolderConfig(path=path, **settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "human videos"
    for name in ("b.mp4", "deep/er/a b.mkv", "deep/a.b.mp4", "deep/a.b.webm", "UPPER.MP4"):
        is_vp9 = name.endswith("webm")
        codec = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}} if is_vp9 else {}
        write_video(root / name, numbered_frames(range(8)), **codec)
    (root / "._b.mp4").write_bytes(b"stub")
    (root / ".hidden").mkdir()
    write_video(root / ".hidden" / "c.mp4", numbered_frames(range(3)))
    (root / "readme.txt").write_text("not a caption of anything")
    return root


def test_every_video_below_the_folder_is_one_action_free_episode(folder: Path) -> None:
    source = open_folder(folder, licence="CC0")
    ids = source.list_episodes()
    assert len(ids) == 5
    assert ids == sorted(ids)
    assert all(set(episode_id) <= set("abcdefghijklmnopqrstuvwxyzUPER0123456789_-") for episode_id in ids)
    for episode_id in ids:
        episode = source.read_episode(episode_id)
        assert (episode.source, episode.licence) == ("human_videos", "CC0")
        assert (episode.actions, episode.proprio, episode.control_hz, episode.embodiment) == (None, None, None, None)
        assert (episode.num_frames, episode.fps, episode.instruction) == (8, FPS, None)
        segment = episode.views["main"]
        assert (segment.start_frame, segment.start_s, segment.num_frames) == (0, 0.0, 8)
        assert read_numbers(decode_frames(segment.path, range(8))) == list(range(8))
    assert source.embodiment() is None


def test_an_episode_keeps_its_id_when_files_are_added(folder: Path) -> None:
    before = open_folder(folder).list_episodes()
    write_video(folder / "a.mp4", numbered_frames(range(3)))
    assert set(before) < set(open_folder(folder).list_episodes())


def test_the_view_can_be_named_after_the_robots(folder: Path) -> None:
    source = open_folder(folder, view="front")
    assert list(source.read_episode(source.list_episodes()[0]).views) == ["front"]


def test_captions_stand_beside_the_video(tmp_path: Path) -> None:
    for name in ("text", "json", "broken", "other"):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(range(3)))
    (tmp_path / "text.txt").write_text("a hand\nopens  a drawer\n")
    (tmp_path / "json.json").write_text('{"id": 3, "caption": "a hand closes a drawer"}')
    (tmp_path / "broken.json").write_text('{"caption": ')
    (tmp_path / "other.json").write_text('{"fps": 30}')
    source = open_folder(tmp_path)
    episodes = {episode_id.split("_")[0]: source.read_episode(episode_id) for episode_id in source.list_episodes()}
    assert {name: episode.instruction for name, episode in episodes.items()} == {
        "text": "a hand opens a drawer",
        "json": "a hand closes a drawer",
        "broken": None,
        "other": None,
    }
    assert "broken.mp4 cannot be read" in episodes["broken"].repairs[0]
    assert episodes["text"].content_sha256 != episodes["other"].content_sha256
    override = open_folder(tmp_path, instruction="play")
    assert {override.read_episode(episode_id).instruction for episode_id in override.list_episodes()} == {"play"}


def test_a_variable_rate_is_placed_by_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(6)), times_ms=[0, 100, 400, 500, 900, 1000])
    episode = open_folder(tmp_path).read_episode(open_folder(tmp_path).list_episodes()[0])
    assert episode.views["main"].start_frame is None
    assert "variable frame rate" in episode.repairs[0]


def test_a_bad_file_is_its_own_problem(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", np.zeros((3, 48, 64, 3), dtype=np.uint8))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.avi").write_bytes(b"")
    source = open_folder(tmp_path)
    found = {}
    for episode_id in source.list_episodes():
        try:
            found[episode_id.split("_")[0]] = source.read_episode(episode_id).num_frames
        except SourceError as error:
            found[episode_id.split("_")[0]] = error.reason
    assert found == {"good": 3, "text": "not_a_video", "empty": "not_a_video"}


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    source = open_folder(write_video(tmp_path / "one clip.mp4", numbered_frames(range(3))))
    assert source.name == "one_clip"
    assert len(source.list_episodes()) == 1


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        open_folder(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="holds no video"):
        open_folder(tmp_path).list_episodes()


def test_the_kind_of_a_recording_set_is_found_out(tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "v2")
    write_lerobot_v3(tmp_path / "v3" / "inside")
    write_video(tmp_path / "human" / "a.mp4", numbered_frames(range(3)))
    (tmp_path / "empty").mkdir()
    kinds = {name: detect_kind(tmp_path / name) for name in ("v2", "v3", "human", "human/a.mp4")}
    assert kinds == {"v2": "lerobot", "v3": "lerobot", "human": "video_folder", "human/a.mp4": "video_folder"}
    for name in ("empty", "absent"):
        with pytest.raises(UserError, match=name):
            detect_kind(tmp_path / name)
