"""Embeddings of staged clips: what they are of, and when they are made anew. Without Ray: see test_build_semantic."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.loader import UserError
from data_pipeline.build_config import BuildConfig
from data_pipeline.curate.clip_embedding import ClipEmbedder
from data_pipeline.curate.duplicates import SemanticConfig
from data_pipeline.curate.embeddings import EmbedEpisode, plan_embeddings, read_embeddings
from data_pipeline.shards import TarWriter, tar_records
from data_pipeline.staging import EpisodeRecord, StagedClip, Staging, write_record
from data_pipeline.video_io import decode_clip, encode_video
from tests.data_pipeline.tiny_clip import write_clip

ROW = {"source": "lab", "episode": "episode_1"}
NUM_CLIPS = 3


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, height, width, 3), dtype=np.uint8)


def stage(root: Path, content: str = "0") -> EpisodeRecord:
    """An episode of clips with two views of different sizes."""
    staging = Staging(root)
    tar = staging.curated_tar(**ROW)
    clips = []
    with TarWriter(tar) as writer:
        for index in range(NUM_CLIPS):
            front, wrist = noise(index, 32, 48), noise(100 + index, 16, 16)
            videos = {"front.mp4": encode_video(front, None, 10.0), "wrist.mp4": encode_video(wrist, None, 10.0)}
            records = tar_records({"__key__": f"clip{index}", "meta.json": b"{}", **videos})
            place = {"offset": writer.add(records), "num_bytes": len(records)}
            clips.append(StagedClip(key=f"clip{index}", clip_index=index, start_s=0.0, motion=0.0, **place))
    record = EpisodeRecord(
        **ROW,
        content_sha256=content,
        embodiment=None,
        has_actions=False,
        has_instruction=False,
        resolution=16,
        found=NUM_CLIPS,
        clips=tuple(clips),
        rejected=(),
        repairs=(),
    )
    write_record(tar, record)
    return record


def plan_for(clip_folder, root, **changes):
    return plan_embeddings(SemanticConfig(clip=clip_folder, **changes), root, use_gpu=False)


def test_an_embedding_is_the_mean_over_the_frames_of_all_views(clip_folder, tmp_path):
    record, plan = stage(tmp_path), plan_for(clip_folder, tmp_path, frames=2)
    assert EmbedEpisode(plan)(ROW) == {"clips": NUM_CLIPS}
    found = read_embeddings(plan, [record])
    assert list(found) == [clip.key for clip in record.clips]
    embedder, staging = ClipEmbedder(clip_folder), Staging(tmp_path)
    for members in staging.curated_members(record):
        units = [embedder.embed(decode_clip(members[f"{view}.mp4"])[[0, 4]], 2) for view in ("front", "wrist")]
        mean = np.concatenate(units).mean(axis=0)
        np.testing.assert_allclose(found[members["__key__"]], mean / np.linalg.norm(mean), atol=1e-6)


def test_the_same_bytes_every_time(clip_folder, tmp_path):
    for name in ("one", "two"):
        stage(tmp_path / name)
        EmbedEpisode(plan_for(clip_folder, tmp_path / name))(ROW)
    one, two = (Staging(tmp_path / name).embedded_file(**ROW) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".json").read_bytes() == two.with_suffix(".json").read_bytes()


def test_what_is_due(clip_folder, tmp_path):
    record, plan = stage(tmp_path), plan_for(clip_folder, tmp_path)
    assert plan.is_due(record)
    EmbedEpisode(plan)(ROW)
    assert not plan.is_due(record)
    moved = shutil.copytree(clip_folder, tmp_path / "elsewhere")
    assert not plan_for(moved, tmp_path, min_cosine=0.5).is_due(record)
    assert plan_for(moved, tmp_path, frames=4).is_due(record)
    assert plan_for(write_clip(moved, seed=1), tmp_path).is_due(record)
    assert plan.is_due(record.model_copy(update={"made_from": "another recording"}))
    assert not plan.is_due(record.model_copy(update={"clips": ()}))
    Staging(tmp_path).embedded_file(**ROW).with_suffix(".json").write_text('{"made_')
    assert plan.is_due(record)


def test_a_record_never_stands_beside_the_embeddings_of_others(clip_folder, tmp_path, monkeypatch):
    record, plan = stage(tmp_path), plan_for(clip_folder, tmp_path)
    EmbedEpisode(plan)(ROW)
    record = stage(tmp_path, content="1")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.curate.embeddings.write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            EmbedEpisode(plan)(ROW)
    assert Staging(tmp_path).find_embedded(**ROW) is None
    EmbedEpisode(plan)(ROW)
    assert not plan.is_due(record)


def test_what_belongs_to_no_episode_goes(clip_folder, tmp_path):
    stage(tmp_path)
    EmbedEpisode(plan_for(clip_folder, tmp_path))(ROW)
    Staging(tmp_path).keep_only({"lab": {ROW["episode"]}})
    assert len(list(tmp_path.glob("embedded/*/*"))) == 2
    Staging(tmp_path).keep_only({"lab": {"another"}})
    assert not list(tmp_path.glob("embedded/*/*"))


def test_workers_find_a_relative_folder(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(clip_folder.parent)
    assert plan_for(Path(clip_folder.name), tmp_path).clip == clip_folder


def test_off_unless_asked_for(tmp_path):
    config = BuildConfig.model_validate({"sources": {"a": {"kind": "video_folder", "path": "a"}}, "out": tmp_path})
    assert plan_embeddings(config.duplicates.semantic, tmp_path, use_gpu=False) is None


def test_without_faiss(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"needs faiss: pip install 'foresight-wam\[similarity\]'"):
        plan_for(clip_folder, tmp_path)


@pytest.mark.parametrize("changes", [{"min_cosine": 1.0}, {"min_cosine": -0.1}, {"frames": 0}, {"clip": None}])
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValidationError):
        SemanticConfig(**({"clip": "clip"} | changes))
