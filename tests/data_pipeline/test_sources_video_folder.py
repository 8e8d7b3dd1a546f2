import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.sources import Episode, Source, SourceError, VideoFolderConfig, detect_kind, open_source
from data_pipeline.video_io import VideoError, decode_frames, frame_times, probe_video
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


def test_any_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["2024-01-01T12:00:00", "pipe:0", "http://x", "new\nline \N{GRINNING FACE}", "a%03d", "[bold]", "x" * 251]
    names += [os.fsdecode(b"not utf-8 \xff")]
    write_video(tmp_path / "whole.mp4", numbered_frames(range(3)))
    monkeypatch.chdir(tmp_path)
    for name in names:
        path = Path(f"{name}.mp4")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path("whole.mp4").read_bytes())
    Path("whole.mp4").unlink()
    source = open_folder(Path())
    episodes = [source.read_episode(episode_id) for episode_id in source.list_episodes()]
    assert len(episodes) == len(names)
    for episode in episodes:
        assert read_numbers(episode.views["main"].read([2])) == [2]
        assert len(episode.episode_id) < 80 and episode.repairs == ()


def test_what_frames_lose_by_becoming_eight_bit_rgb_is_told(tmp_path: Path) -> None:
    tags = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    write_video(tmp_path / "a.mp4", numbered_frames(range(3)), pix_fmt="yuv420p10le", options={"x264-params": tags})
    write_video(tmp_path / "b.mkv", numbered_frames(range(3)), times_ms=[2000, 2100, 2200])
    deep, late = (open_folder(tmp_path).read_episode(name) for name in open_folder(tmp_path).list_episodes())
    assert [repair.partition(":")[0] for repair in deep.repairs] == [
        "The video has more than 8 bits a colour",
        "The video has a high dynamic range",
    ]
    assert late.repairs == ("The video begins at 2.00 s: its times count from its first frame.",)


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


# --- annotations of many videos --------------------------------------------------------------------------------------


def read_all(source: Source) -> list[Episode]:
    return [source.read_episode(episode_id) for episode_id in source.list_episodes()]


def shown(episode: Episode) -> list[int]:
    """The numbers of the frames that a clip of the whole episode would show."""
    footage = episode.views["main"]
    times = np.arange(episode.num_frames) / episode.fps
    return read_numbers(footage.read(footage.positions(times, episode.fps).tolist()))


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Three videos of 40 frames at 10 frames/s, and one that nobody annotates."""
    for name in ("P01_01", "P01/P01_02", "78687", "left_out"):
        write_video(tmp_path / "videos" / f"{name}.mp4", numbered_frames(range(40)))
    return tmp_path / "videos"


SOMETHING = [
    {
        "id": "78687",
        "label": "holding potato next to box",
        "template": "Holding [something]",
        "placeholders": ["potato"],
    },
    {"id": "1", "label": "of a video that is not here", "template": "", "placeholders": []},
]
EPIC = """narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,narration
P01_01_0,P01,P01_01,00:00:00.560,00:00:00.50,00:00:01.20,8,open  door
P01_01_1,P01,P01_01,00:00:01.0,00:00:01.00,00:00:09.99,60,"turn on light, slowly"
P01_02_0,P01,P01_02,00:00:03.0,00:00:03.00,00:00:03.30,9,close door
P99_02_0,P99,P99_02,00:00:03.0,00:00:03.00,00:00:03.30,9,of a video that is not here
"""
EGO4D = {
    "P01_01": {
        "narration_pass_1": {"narrations": [{"timestamp_sec": 2.0, "narration_text": "#O other annotator"}]},
        "narration_pass_2": {
            "narrations": [
                {"timestamp_sec": 3.0, "timestamp_frame": 90, "narration_text": "#C C puts the cup #unsure"},
                {"timestamp_sec": 1.0, "timestamp_frame": 30, "narration_text": "#C C picks a cup"},
            ],
            "summaries": [],
        },
        "status": "complete",
    },
    "unknown-uid": {"status": "redacted"},
}


def test_captions_of_many_videos_in_one_file(numbered: Path) -> None:
    (numbered / "train.json").write_text(json.dumps(SOMETHING))
    source = open_folder(numbered, annotations="train.json")
    (episode,) = read_all(source)
    assert episode.instruction == "holding potato next to box"
    assert shown(episode) == list(range(40))
    assert episode.episode_id in open_folder(numbered).list_episodes()  # the same as without captions
    assert (
        open_folder(numbered, annotations="train.json", instruction="x").read_episode(episode.episode_id).instruction
        == "x"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "path,text\nP01/P01_02.mp4,go\n"),
        ("a.jsonl", '{"video": "./P01/P01_02.mp4", "caption": "go"}\n'),
        ("a.json", '{"P01_02": "go"}'),
        ("b.json", '{"info": {}, "rows": [{"file_name": "P01_02.mp4", "description": "go"}]}'),
        ("c.json", '\ufeff[{"video_id": "P01_02", "narration": " go "}]'),
    ],
)
def test_tables_of_ones_own(numbered: Path, name: str, content: str) -> None:
    (numbered / name).write_text(content, encoding="utf-8")
    (episode,) = read_all(open_folder(numbered, annotations=[name]))
    assert (episode.instruction, Path(episode.uri).stem) == ("go", "P01_02")


def test_narrated_segments_of_long_videos(numbered: Path, tmp_path: Path) -> None:
    (tmp_path / "EPIC_100_train.csv").write_text(EPIC)
    source = open_folder(numbered, annotations="../EPIC_100_train.csv")
    found = {episode.instruction: episode for episode in read_all(source)}
    assert {text: shown(episode) for text, episode in found.items()} == {
        "open door": list(range(5, 12)),
        "turn on light, slowly": list(range(10, 40)),  # the video ends before
        "close door": [30, 31, 32],
    }
    assert len({episode.content_sha256 for episode in found.values()}) == 3
    assert all(episode.views["main"].start_frame is not None for episode in found.values())  # type: ignore[attr-defined]


def test_narrations_of_points_in_time(numbered: Path) -> None:
    (numbered / "narration.json").write_text(json.dumps(EGO4D))
    episodes = read_all(open_folder(numbered, annotations="narration.json"))
    assert {episode.instruction: shown(episode) for episode in episodes} == {
        "C picks a cup": list(range(0, 20)),  # up to half way to the next one
        "C puts the cup": list(range(20, 40)),
    }


def test_segments_are_found_by_presentation_time(tmp_path: Path) -> None:
    times = [0, 100, 400, 500, 900, 1000, 1100, 1200]
    write_video(tmp_path / "vfr.mp4", numbered_frames(range(8)), times_ms=times)
    late = [5000 + round(1000 * i / FPS) for i in range(20)]  # the first frame's timestamp is not zero
    write_video(tmp_path / "late.ts", numbered_frames(range(20)), times_ms=late, b_frames=2)
    rows = [
        {"video": "vfr", "start": 0.45, "end": 1.05, "text": "vfr"},
        {"video": "late", "start": 0.5, "end": 1.0, "text": "late"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = {episode.instruction: episode for episode in read_all(open_folder(tmp_path, annotations="rows.json"))}
    assert shown(found["late"]) == [5, 6, 7, 8, 9]
    footage, wanted = found["vfr"].views["main"], np.array([0.0, 0.1, 0.5, 0.55])
    assert read_numbers(footage.read(footage.positions(wanted, found["vfr"].fps).tolist())) == [2, 3, 4, 5]
    assert found["vfr"].num_frames == 3  # 0.6 s at 5.8 frames/s


@settings(max_examples=20)
@given(start=st.floats(0, 3.9), length=st.floats(0.11, 5))
def test_a_segment_is_what_a_brute_force_search_finds(start: float, length: float) -> None:
    starts = np.arange(40) / FPS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mp4"
        path.write_bytes(_numbered_bytes())
        (Path(folder) / "a.json").write_text(
            json.dumps([{"id": "a", "text": "x", "start": start, "stop": start + length}])
        )
        (episode,) = read_all(open_folder(Path(folder), annotations="a.json"))
        first = int(np.argmin(np.abs(starts - start + 1e-6)))  # the nearest
        last = max(i for i, time in enumerate(starts) if time < start + length - 1e-3)
        assert shown(episode) == list(range(first, last + 1))


@lru_cache
def _numbered_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / "a.mp4", numbered_frames(range(40))).read_bytes()


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [("3", "2", "bad_record"), ("x", "2", "bad_record"), ("", "", "bad_record"), ("0:0:99", "100", "out_of_range")],
)
def test_a_bad_segment_is_its_own_problem(numbered: Path, start: str, stop: str, expected: str) -> None:
    (numbered / "a.csv").write_text(f"video_id,start,stop,text\nP01_01,{start},{stop},bad\nP01_01,1,2,good\n")
    source = open_folder(numbered, annotations="a.csv")
    bad, good = source.list_episodes()
    assert source.read_episode(good).instruction == "good"
    with pytest.raises(SourceError) as caught:
        source.read_episode(bad)
    assert caught.value.reason == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.csv", None, "no such file"),
        ("a.csv", "", "its columns are none"),
        ("a.csv", "video_id,other\nP01_01,x\n", "its columns are other, video_id"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '[{"id": "nobody", "label": "x"}]', "none of its 4 videos"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", "3", "no row"),
        ("a.bin", "\x00\x81", "cannot be read"),
    ],
)
def test_unusable_annotations_are_refused(numbered: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (numbered / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        open_folder(numbered, annotations=name).list_episodes()


# --- recorded sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("human_sam2_sav", [200, 287, 292]),
        ("mmaction2", [32, 164, 300, 300]),
        ("energon_sync", [1891, 1891]),
        ("cosmos_curate_clips", [720]),
        ("odd_decord", [3, 3, 3, 3, 4]),
    ],
)
def test_recorded_videos(shared_data: Path, name: str, num_frames: list[int]) -> None:
    episodes = read_all(open_folder(shared_data / name))
    assert sorted(episode.num_frames for episode in episodes) == num_frames


def test_segments_of_recorded_videos(shared_data: Path, tmp_path: Path) -> None:
    rows = "".join(f"{name},2,4,part of {name}\n" for name in ("bedroom", "04_coffee", "sync_test"))
    (tmp_path / "parts.csv").write_text("video,start_s,end_s,caption\n" + rows)
    for name, lengths in (("human_sam2_sav", {60}), ("energon_sync", {59, 60})):
        for episode in read_all(open_folder(shared_data / name, annotations=tmp_path / "parts.csv")):
            assert episode.num_frames in lengths
            footage = episode.views["main"]
            positions = footage.positions(np.arange(episode.num_frames) / episode.fps, episode.fps)
            times = frame_times(footage.path)[positions]
            assert np.all((times > 2 - 0.02) & (times < 4))


def test_names_and_captions_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")  # Latin-1, as old archives have it
    write_video(tmp_path / "a.mp4", numbered_frames(range(8))).rename(tmp_path / name)
    (tmp_path / name).with_suffix(".json").write_text('{"caption": "half \\ud800 a character"}')
    (episode,) = [open_folder(tmp_path).read_episode(one) for one in open_folder(tmp_path).list_episodes()]
    assert (episode.uri + (episode.instruction or "")).encode()
    assert episode.instruction is not None and episode.instruction.startswith("half ")
    assert len(episode.views["main"].read([0, 7])) == 2


def test_a_caption_that_is_nested_too_deeply_is_none(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(8)))
    (tmp_path / "a.json").write_text(100_000 * "[")
    source = open_folder(tmp_path)
    episode = source.read_episode(source.list_episodes()[0])
    assert episode.instruction is None and "cannot be read" in episode.repairs[0]


def test_a_time_of_too_many_parts_is_no_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(8)))
    rows = [{"id": "a", "label": "x", "start": "1:" * 400 + "1", "end": 2}]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    source = open_folder(tmp_path, annotations="all.json")
    with pytest.raises(SourceError, match="bad_record"):
        source.read_episode(source.list_episodes()[0])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", numbered_frames(range(8)))
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    source = open_source(VideoFolderConfig(path=tmp_path))
    assert len(source.list_episodes()) == 2  # the link is there to be rejected by name
    with pytest.raises(VideoError, match=r"not_a_video: .*pipe\.mp4: it is no file but"):
        probe_video(tmp_path / "pipe.mp4")
