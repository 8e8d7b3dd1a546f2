"""Builds that drop what was merely encoded anew, on a real Ray: the same bytes however often and in how many parts."""

import re
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.loader import UserError
from data_pipeline import build
from data_pipeline.resolve import staging_folder
from data_pipeline.verify import verify
from tests.data_pipeline.recordings import numbered_frames, write_lerobot_v21, write_video
from tests.data_pipeline.test_build import config_of, digests
from tests.data_pipeline.tiny_clip import write_clip

MIN_COSINE = 0.97  # with these weights, what was encoded anew has 0.99 to what it was, and no others have 0.95


pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


def blobs(seed: int) -> np.ndarray:
    """Five frames of large coloured patches that drift."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(patches).resize((64, 48), Image.Resampling.BICUBIC))
    return np.stack([np.roll(picture, 2 * i, axis=1) for i in range(5)])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five frames each: a robot's two episodes; three videos, one of them twice; and, encoded anew, one of each."""
    root = tmp_path_factory.mktemp("recordings")
    write_lerobot_v21(root / "robot", lengths=(5, 5))
    for seed in range(3):
        write_video(root / f"people/video {seed}.mp4", blobs(seed))
    shutil.copy(root / "people/video 1.mp4", root / "people/video 1 copied.mp4")
    write_video(root / "people/video 2 again.mp4", blobs(2), options={"crf": "30"})
    write_video(root / "people/robot again.mp4", numbered_frames(range(5)), options={"crf": "30"})
    return root


def semantic_config(recordings, clip_folder, out, semantic=(), **changes):
    settings = {"clip": clip_folder, "min_cosine": MIN_COSINE, **dict(semantic)}
    duplicates = {"semantic": settings, "compare": "all"}
    return config_of(
        recordings, out, **{"duplicates": duplicates, "validation_share": 0.0, "num_workers": 1, **changes}
    )


@pytest.fixture(scope="module")
def dataset(recordings, clip_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    build.main(semantic_config(recordings, clip_folder, out))
    return out


def rejected_rows(dataset):
    return pq.read_table(dataset / "rejected.parquet").to_pylist()


def without_hash(episode):
    return episode.rpartition("_")[0]


def embedded_at(out):
    """Episode -> when its embeddings were written."""
    return {path.stem: path.stat().st_mtime_ns for path in staging_folder(out).glob("embedded/*/*.safetensors")}


def test_content_that_was_encoded_anew_is_dropped(dataset):
    assert verify(dataset) == []
    clips = {row["key"]: row for row in pq.read_table(dataset / "manifest.parquet").to_pylist()}
    rejected = rejected_rows(dataset)
    assert sorted(row["reason"] for row in rejected) == ["duplicate", "semantic_duplicate", "semantic_duplicate"]
    pairs = {}
    for row in rejected:
        if row["reason"] == "semantic_duplicate":
            key, cosine = re.fullmatch(
                r"duplicate_of (\w+) \(cosine (\d\.\d{3}), min_cosine 0\.97\)", row["detail"]
            ).groups()
            assert float(cosine) > MIN_COSINE and len(clips) == 5
            pairs[without_hash(row["episode"])] = clips[key]
    robot = pairs.pop("robot_again")  # of an episode and its video, the one with actions stays
    assert robot["has_actions"] and robot["episode"] == "episode_000000"
    ((gone, kept),) = pairs.items()
    assert {gone, without_hash(kept["episode"])} == {"video_2", "video_2_again"}


def test_copies_that_are_exact_are_not_embedded(dataset):
    names = [without_hash(episode) for episode in embedded_at(dataset)]
    assert len(names) == 7 and len({"video_1", "video_1_copied"} & set(names)) == 1


def test_any_number_of_workers_gives_the_same_bytes(recordings, clip_folder, dataset, tmp_path):
    build.main(semantic_config(recordings, clip_folder, tmp_path / "dataset", num_workers=2))
    assert digests(tmp_path / "dataset") == digests(dataset)
    assert digests(staging_folder(tmp_path / "dataset") / "embedded") == digests(staging_folder(dataset) / "embedded")


def test_building_again_embeds_only_what_is_not_there(recordings, clip_folder, dataset, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "dataset")
    staging = shutil.copytree(staging_folder(dataset), staging_folder(out))
    before = embedded_at(out)
    build.main(semantic_config(recordings, clip_folder, out, {"min_cosine": 0.9999999}, overwrite=True))
    assert [row["reason"] for row in rejected_rows(out)] == ["duplicate"] and embedded_at(out) == before
    lost = next(staging.glob("embedded/people/video_0_*.json"))  # as after a kill
    lost.unlink()
    build.main(semantic_config(recordings, clip_folder, out, overwrite=True))
    assert {name for name, written in embedded_at(out).items() if written != before[name]} == {lost.stem}
    assert digests(out) == digests(dataset)


def test_each_task_of_a_job_array_embeds_its_share(recordings, clip_folder, dataset, tmp_path):
    out = tmp_path / "dataset"
    build.main(semantic_config(recordings, clip_folder, out, partition="1/2"))
    curated = {path.stem for path in staging_folder(out).glob("curated/*/*.json")}
    assert embedded_at(out).keys() == curated and 0 < len(curated) < 8 and not out.exists()
    build.main(semantic_config(recordings, clip_folder, out, partition="0/2"))
    assert digests(out) == digests(dataset)


def test_what_is_missing_is_told_before_the_work(recordings, clip_folder, tmp_path, monkeypatch):
    out = tmp_path / "dataset"
    with pytest.raises(UserError, match="is not a folder"):
        build.main(semantic_config(recordings, tmp_path / "nowhere", out))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="needs faiss"):
        build.main(semantic_config(recordings, clip_folder, out))
    assert not staging_folder(out).exists()
