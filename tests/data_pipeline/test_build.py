"""Recordings in, dataset folder out, on a real Ray: the same bytes for any number of workers and after any kill."""

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from configs.fields import summarise_fields
from configs.loader import UserError, dump_config, load_config
from configs.problems import explain_refusal
from data_pipeline import build, build_stages
from data_pipeline.build import BuildConfig
from data_pipeline.curate.episode import rejected_episode
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.encoder_config import VideoCodecConfig
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.resolve import staging_folder
from data_pipeline.sample import Sample
from data_pipeline.sources import FORMATS
from data_pipeline.staging import Rejection, Staging
from data_pipeline.verify import verify
from data_pipeline.video_io import decode_clip
from tests.data_pipeline.recordings import numbered_frames, read_numbers, write_lerobot_v21, write_video

CONFIGS = Path(__file__).parents[2] / "configs/data_pipeline"


pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A robot's four episodes, one without its video and one too short; good, damaged and false videos.

    The robot's description promises episodes that are not there: a repair.
    """
    root = tmp_path_factory.mktemp("recordings")
    cameras = ("observation.images.front",)
    robot = write_lerobot_v21(root / "robot", lengths=(24, 14, 16, 4), cameras=cameras, splits={"train": "0:50"})
    (robot / "videos/chunk-000/observation.images.front/episode_000002.mp4").unlink()
    for number in range(3):
        write_video(
            root / "people" / f"video {number}.mp4", numbered_frames(range(500 + 100 * number, 520 + 100 * number))
        )
    (root / "people/video 0.txt").write_text("wave")
    whole = (root / "people/video 2.mp4").read_bytes()
    (root / "people/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "people/text.mp4").write_text("not a video at all\n" * 50)
    return root


def config_of(recordings, out, **changes):
    config = {
        "sources": {
            "robot": {"kind": "lerobot", "path": recordings / "robot", "licence": "MIT"},
            "people": {"kind": "video_folder", "path": recordings / "people"},
        },
        "out": out,
        "views": {"front": {"height": 32, "width": 48}},
        "clip_frames": 5,
        "stride": 3,
        "validation_share": 0.3,
        "shots": {"detect": "off"},  # the numbered blocks look like cuts
        "codec": {"patch": 4, "channels": 24},
        "text_encoder": {"width": 16},
        "num_workers": 2,
    }
    return BuildConfig.model_validate(config | changes)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def dataset(recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    assert build.main(config_of(recordings, out)) == 0
    return out


# --- what was built -----------------------------------------------------------------------------------------------


def test_every_promise_holds(dataset):
    assert verify(dataset) == []


def test_what_is_rejected_and_why(dataset):
    rows = pq.read_table(dataset / "rejected.parquet").to_pylist()
    found = {(row["source"], row["reason"]) for row in rows}
    assert found == {
        ("robot", "missing_video"),
        ("robot", "too_short"),
        ("people", "truncated_video"),
        ("people", "not_a_video"),
    }
    counts = DatasetIndex(dataset).info.counts
    assert counts.found == counts.accepted + counts.rejected and counts.episodes == 9
    # 24, 14 and three times 20 frames in clips of 5 that start every 3 frames
    assert (counts.accepted, counts.rejected) == (7 + 4 + 3 * 6, 4)


def test_what_a_reader_set_right_is_told(dataset):
    sources = DatasetIndex(dataset).info.sources
    (repair,) = sources["robot"].repairs
    assert (repair.sentence, repair.num_episodes) == (
        "The split train is 0:50, but there are 4 episodes: it is cut off there.",
        2,  # of which clips could be cut
    )
    assert (sources["people"].repairs, sources["robot"].more_repairs) == ((), 0)
    page = (dataset / "report.html").read_text()
    assert "Repairs in robot" in page and repair.sentence in page and "Repairs in people" not in page


def test_a_source_without_a_clip_is_warned_of_and_shown(recordings, tmp_path, caplog):
    config = config_of(recordings, tmp_path / "dataset", validation_share=0)
    people = config.sources["people"].model_copy(update={"view_map": {"main": "top"}})
    config = config.model_copy(update={"sources": {**config.sources, "people": people}})
    build.main(config)
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelname) == (build_stages.__name__, "WARNING")
    ]
    assert warning == (
        "source people: none of its episodes (5) is in the dataset (missing_view: no view front; the episode has main)"
        "; set view_map or views."
    )
    assert verify(tmp_path / "dataset") == []
    page = (tmp_path / "dataset/report.html").read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", next(row for row in page.split("<tr>") if "<td>people</td>" in row))
    assert cells == ["people", "–", "–", "5", "0", "0", "0", "5", "0.0"]


@pytest.mark.parametrize(
    ("reason", "next_move"),
    [("frame_rate_too_low", "lower fps"), ("no_images", "rejected.parquet has all of them")],
)
def test_what_a_source_without_a_clip_is_told_to_do(caplog, reason, next_move):
    rejection = Rejection(where="x", reason=reason, detail="5 frames/s for clips of 10")
    build_stages._warn_of_a_source_without_clips("bridge", 1, [rejected_episode("bridge", "a", rejection)])
    assert f"({reason}: 5 frames/s for clips of 10); {next_move}." in caplog.text


def test_pixels_and_actions_belong_together(dataset):
    """Frame i of episode e shows 100 e + i, and its action says [e, i, 0.5]: the chain keeps them in step."""
    index = DatasetIndex(dataset)
    for i in range(len(index)):
        sample = Sample.from_members(index.read_sample(i))
        numbers = read_numbers(decode_clip(sample.video["front"]))
        first = round(sample.meta.start_s * 10) + {"robot": 0, "people": 500}[sample.meta.source.name]
        assert [number % 100 for number in numbers] == [(first + k) % 100 for k in range(5)]
        if sample.meta.has_actions:
            assert sample.meta.source.name == "robot" and sample.meta.source.licence == "MIT"
            assert sample.actions[:, 0].tolist() == [numbers[0] // 100] * 4
            assert sample.actions[:, 1].tolist() == [number % 100 for number in numbers[:-1]]
            np.testing.assert_array_equal(sample.proprio, sample.actions[:, :2] + 100)
            assert sample.meta.instruction == "push the block" and sample.text is not None
        else:
            assert sample.actions is None and sample.meta.source.name == "people"
            assert (sample.text is not None) == (sample.meta.instruction == "wave")


def test_episodes_do_not_straddle_splits(dataset):
    rows = DatasetIndex(dataset).manifest.to_pylist()
    splits = {}
    for row in rows:
        splits.setdefault((row["source"], row["episode"]), set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    robot = [found for (source, _), found in splits.items() if source == "robot"]
    assert {"train"} in robot and {"validation"} in robot


def test_webdataset_iterates_the_shards(dataset):
    shards = [str(path) for path in sorted(dataset.rglob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert sorted(sample["__key__"] for sample in samples) == sorted(DatasetIndex(dataset).manifest["key"].to_pylist())
    labelled = [sample for sample in samples if sample["meta.json"]["has_actions"]]
    assert labelled and all(sample["actions.npy"].shape == (4, 3) for sample in labelled)


def test_training_batches_come_out(dataset):
    index = DatasetIndex(dataset)
    config = LoaderConfig(dataset=dataset, global_batch_size=8, text_length=4)
    batch = next(iter(Loader(Datasets({"": index}), config)))
    assert batch["latents"].shape == (8, 2, 24, 8, 12) and batch["text_tokens"].shape == (8, 4, 16)
    assert batch["actions"].shape == (8, 4, 3) and batch["actions"].abs().max() < 3


def test_the_report_shows_everything(dataset):
    page = (dataset / "report.html").read_text()
    index = DatasetIndex(dataset)
    for text in ("robot", "people", "two_joint_arm", "truncated_video", "gripper", f"{index.info.codec.psnr:.1f} dB"):
        assert text in page
    assert page.count("data:image/jpeg;base64,") >= 6
    assert "http://" not in page and "https://" not in page and "<script" not in page


# --- the same bytes -----------------------------------------------------------------------------------------------


def test_two_builds_are_byte_identical(recordings, dataset, tmp_path):
    assert build.main(config_of(recordings, tmp_path / "elsewhere", num_workers=1)) == 0
    assert digests(tmp_path / "elsewhere") == digests(dataset)


def test_a_finished_build_says_so_and_another_config_is_refused(recordings, dataset, caplog):
    before = digests(dataset)
    with caplog.at_level("INFO"):
        assert build.main(config_of(recordings, dataset, num_workers=1)) == 0
    assert "is up to date" in caplog.text
    with pytest.raises(UserError, match=r"another config \(clip_frames, stride changed\); choose another `out`"):
        build.main(config_of(recordings, dataset, clip_frames=9, stride=2))
    assert digests(dataset) == before


def staged_at(out):
    return {path: path.stat().st_mtime_ns for path in out.with_name(f"{out.name}.staging").glob("curated/*/*.tar")}


def test_building_again_redoes_only_what_has_changed(recordings, dataset, tmp_path):
    """A recording more, one fewer, one replaced; and back again to the first bytes."""
    lab, out = shutil.copytree(recordings, tmp_path / "lab"), tmp_path / "dataset"
    build.main(config_of(lab, out))
    first, before = digests(out), staged_at(out)
    video = lab / "people/video 0.mp4"
    kept = video.read_bytes()
    write_video(video, numbered_frames(range(900, 920)))
    write_video(lab / "people/later.mp4", numbered_frames(range(20)))
    (lab / "people/video 1.mp4").rename(tmp_path / "video 1.mp4")
    build.main(config_of(lab, out))
    assert verify(out) == []
    after = staged_at(out)
    assert {path.stem.rpartition("_")[0] for path in after.keys() - before.keys()} == {"later"}
    assert {path.stem.rpartition("_")[0] for path in before.keys() - after.keys()} == {"video_1"}
    with_clips = {path for path in before.keys() & after.keys() if path.stat().st_size > 2048}
    changed = {path.stem.rpartition("_")[0] for path in with_clips if before[path] != after[path]}
    assert changed == {"video_0"} and len(with_clips) > 3
    video.write_bytes(kept)
    (lab / "people/later.mp4").unlink()
    (tmp_path / "video 1.mp4").rename(lab / "people/video 1.mp4")
    build.main(config_of(lab, out))
    assert digests(out) == first


def test_without_staging_the_names_of_the_episodes_have_to_do(recordings, tmp_path, caplog):
    lab, out = shutil.copytree(recordings, tmp_path / "lab"), tmp_path / "dataset"
    config = config_of(lab, out, keep_staging=False)
    build.main(config)
    assert [path.name for path in tmp_path.iterdir() if path != lab] == ["dataset"]
    with caplog.at_level("INFO"):
        assert build.main(config) == 0
    assert "is up to date: the same config over the same episodes" in caplog.text
    write_video(lab / "people/later.mp4", numbered_frames(range(20)))
    build.main(config)
    assert DatasetIndex(out).info.sources["people"].episodes == 6


def test_the_tasks_of_a_job_array_give_the_same_bytes(recordings, dataset, tmp_path):
    out = tmp_path / "dataset"
    for index in (2, 0, 0, 1):  # in any order, and repeated
        assert not out.exists()
        build.main(config_of(recordings, out, partition=f"{index}/3"))
    assert digests(out) == digests(dataset)
    build.main(config_of(recordings, out, partition="1/3"))  # a task that is repeated later finds everything done
    assert digests(out) == digests(dataset)


def test_too_many_rejected_clips_stop_the_build_and_keep_the_work(recordings, dataset, tmp_path):
    out = tmp_path / "dataset"
    with pytest.raises(UserError, match=r"4 of the 33 clips .* more than max_rejected_fraction=0\.1 allows"):
        build.main(config_of(recordings, out, max_rejected_fraction=0.1))
    before = staged_at(out)
    build.main(config_of(recordings, out, max_rejected_fraction=0.2))
    assert digests(out) == digests(dataset)
    assert any(staged_at(out)[path] == written for path, written in before.items())


def test_a_killed_build_continues_to_the_same_bytes(recordings, dataset, tmp_path):
    """kill -9 of the driver once the first episodes are staged; Ray's processes go with it."""
    out, staging, log = tmp_path / "dataset", tmp_path / "dataset.staging", tmp_path / "log"
    config_path = tmp_path / "build.yaml"
    config_path.write_text(dump_config(config_of(recordings, out, num_workers=1)))
    command = [sys.executable, "-m", "data_pipeline.build", "--config", str(config_path)]
    kill_when_there_is(staging, "curated/*/*.json", command, log)
    while out.exists():  # it was over before somebody looked: once more
        shutil.rmtree(out)
        shutil.rmtree(staging)
        kill_when_there_is(staging, "curated/*/*.json", command, log)
    assert list(staging.glob("curated/*/*.json"))
    assert build.main(config_of(recordings, out)) == 0
    assert digests(out) == digests(dataset)


def kill_when_there_is(folder, pattern, command, log):
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    while process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL), log.read_text()


def test_two_builds_of_one_dataset_do_not_meet(recordings, tmp_path):
    config = config_of(recordings, tmp_path / "dataset")
    with Staging(staging_folder(config.out)).locked("build"):  # as the other one holds it
        bad(recordings, tmp_path, "another build is at work there; wait for it", out=config.out)
        bad(recordings, tmp_path, "another build is at work there", out=config.out, partition="0/2")
    assert not config.out.exists()


def test_a_copied_staging_folder_is_worth_what_arrived(recordings, dataset, tmp_path):
    """Half a copy: one file is missing, one is cut, and the rest is not made again."""
    out = tmp_path / "dataset"
    staging = shutil.copytree(staging_folder(dataset), staging_folder(out))
    first, second, *others = sorted(path for path in staging.glob("curated/*/*.tar") if path.stat().st_size > 2048)
    first.unlink()
    os.truncate(second, 2048)
    cut = next(iter(sorted(staging.glob("encoded/*/*.tar"))))
    os.truncate(cut, 512)
    before = {path: path.stat().st_mtime_ns for path in others}
    assert build.main(config_of(recordings, out)) == 0
    assert digests(out) == digests(dataset)
    assert {path: path.stat().st_mtime_ns for path in others} == before


def test_a_full_disk_stops_the_build_with_its_path_and_keeps_what_is_done(recordings, dataset, tmp_path):
    """As `ulimit -f` does it for one file; there is room for the episodes, but not for a shard."""
    out = tmp_path / "dataset"
    staging = shutil.copytree(staging_folder(dataset), staging_folder(out))
    before = {path: written for path, written in staged_at(out).items() if path.stat().st_size > 2048}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            build.main(config_of(recordings, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sentence = explain_refusal(caught.value)
    assert f"{staging}/packed/shards/" in sentence and "start the same command again" in sentence
    assert not out.exists() and not list(staging.glob("packed/shards/*/*/.partial*"))
    assert staged_at(out).items() >= before.items()
    assert build.main(config_of(recordings, out)) == 0
    assert digests(out) == digests(dataset)


def test_overwriting_replaces_the_dataset_at_the_end(recordings, dataset, tmp_path):
    """Also: all views of the first source where none are given."""
    out = tmp_path / "dataset"
    shutil.copytree(dataset, out)
    sources = {"robot": {"kind": "lerobot", "path": recordings / "robot"}}
    build.main(config_of(recordings, out, sources=sources, views=None, height=16, width=32, overwrite=True))
    assert verify(out) == [] and not list(tmp_path.glob("dataset.staging/replaced*"))
    views = DatasetIndex(out).views
    assert {name: (view.height, view.width) for name, view in views.items()} == {"front": (16, 32)}


# --- bad input ----------------------------------------------------------------------------------------------------


def bad(recordings, tmp_path, message, **changes):
    with pytest.raises(UserError, match=message) as raised:
        build.main(config_of(recordings, **{"out": tmp_path / "out", **changes}))
    assert "\n" not in str(raised.value)


def test_what_a_reader_says_has_the_name_of_its_source(recordings, tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((9, 32, 32, 3), np.uint8), action=np.zeros((9, 2), np.float32))
    source = {"kind": "npz", "path": tmp_path / "a.npz"}
    bad(recordings, tmp_path, r"^sources\.arm: .*a\.npz: .* steps .* set control_hz\.$", sources={"arm": source})


def test_bad_input_is_one_sentence(recordings, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("do not delete")
    video = {"kind": "video_folder"}
    bad(recordings, tmp_path, "there is no such folder", sources={"a": video | {"path": tmp_path / "nowhere"}})
    bad(recordings, tmp_path, "holds no video", sources={"a": video | {"path": tmp_path / "empty"}})
    people = {"kind": "lerobot", "path": recordings / "people"}
    looks = r"not a LeRobot dataset .*; it looks like video files .*, so set sources\.a\.kind=video_folder\.$"
    bad(recordings, tmp_path, looks, sources={"a": people})
    bad(recordings, tmp_path, "needs multiples of 4", views={"front": {"height": 30, "width": 48}})
    bad(recordings, tmp_path, r"exists and is not a dataset", out=tmp_path / "precious")
    text = recordings / "people/text.mp4"
    bad(recordings, tmp_path, "none of its episodes can be read", sources={"a": video | {"path": text}})
    bad(recordings, tmp_path, "None of the 9 clips and episodes .* too_short", clip_frames=201)
    bad(recordings, tmp_path, r"gpus=99, but Ray finds \d+ here", gpus=99)
    weights = {"kind": "umt5", "folder": tmp_path / "empty"}
    bad(recordings, tmp_path / "t5", "holds no config.json", text_encoder=weights)
    assert (tmp_path / "precious/thesis.tex").exists()


def test_more_channels_than_a_block_has_are_refused():
    with pytest.raises(ValueError, match="a block has 192 numbers"):
        VideoCodecConfig(patch=4, channels=193)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_load(path, tmp_path):
    config = load_config(BuildConfig, path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(BuildConfig, tmp_path / "again.yaml") == config


def test_the_help_can_be_read():
    """What all kinds of sources have in common comes once."""
    keys = [summary.key for summary in summarise_fields(BuildConfig, str)]
    assert keys.count("sources.NAME.embodiment.pose_frame") == keys.count("sources.NAME.licence") == 1
    assert keys.count("sources.NAME.kind") == len(FORMATS) and len(keys) < 200


def test_a_source_without_its_kind_is_told_how_to_find_it(tmp_path):
    path = tmp_path / "build.yaml"
    for source, sentence in (
        ("{path: a}", r"sources\.robot needs a kind \(lerobot, .*rlds, .*\); `python -m data_pipeline\.doctor PATH` "),
        ("{kind: lerobt, path: a}", r'sources\.robot has the unknown kind "lerobt"; did you mean "lerobot"\?$'),
        ("{kind: hdf, path: a}", r'has the unknown kind "hdf"; it can be lerobot, .* finds it out\.$'),
    ):
        for name in ("robot", "embodiment", "path"):  # the latter are settings of a source, too
            path.write_text(f"out: x\nsources: {{{name}: {source}}}\n")
            with pytest.raises(UserError, match=sentence.replace(r"\.robot", rf"\.{name}")):
                load_config(BuildConfig, path)


def test_a_typo_is_answered_with_the_nearest_key(tmp_path):
    (tmp_path / "build.yaml").write_text("sources: {a: {kind: video_folder, path: x}}\nout: y\nclip_frame: 5\n")
    with pytest.raises(UserError, match="clip_frames"):
        load_config(BuildConfig, tmp_path / "build.yaml")
