"""Splits that cannot leak, and a dataset folder that follows from what was staged."""

import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.dataset import DatasetFolder
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.pack import assign_splits, count
from data_pipeline.staging import EpisodeRecord, Rejection, StagedClip
from tests.data_pipeline.tiny_dataset import tiny_dataset

CLIP = StagedClip(key="k", clip_index=0, start_s=0, motion=0, offset=0, num_bytes=1)


def episode(source, number, content, has_actions=True, clips=(CLIP,)):
    return EpisodeRecord(
        source=source,
        episode=f"e{number}",
        content_sha256=str(content),
        embodiment="arm" if has_actions else None,
        has_actions=has_actions,
        has_instruction=False,
        resolution=64,
        found=len(clips),
        clips=clips,
        rejected=(),
        repairs=(),
    )


sources = st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), min_size=1, max_size=3)


@given(sources, st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]))
def test_every_source_can_be_trained_on_and_robots_validated(contents, share):
    """Contents differ between sources here; inside one, copies of an episode stay on one side."""
    records = [
        episode(f"s{s}", number, f"{s} {content}")
        for s, source in enumerate(contents)
        for number, content in enumerate(source)
    ]
    splits = assign_splits(records, share)
    by_source = defaultdict(set)
    for record in records:
        by_source[record.source].add(splits[record.content_sha256])
    for s, source in enumerate(contents):
        assert "train" in by_source[f"s{s}"]
        assert ("validation" in by_source[f"s{s}"]) or share == 0 or len(set(source)) == 1


def test_an_episode_keeps_its_split_when_others_come(monkeypatch):
    records = [episode("s", number, number) for number in range(200)]
    few, many = assign_splits(records[:100], 0.3), assign_splits(records, 0.3)
    assert all(many[content] == split for content, split in few.items())
    assert 40 <= sum(split == "validation" for split in many.values()) <= 80


def test_action_free_sources_need_no_validation():
    records = [episode("s", number, number, has_actions=False) for number in range(3)]
    assert set(assign_splits(records, 1e-9).values()) == {"train"}
    assert sorted(assign_splits([episode("s", n, n) for n in range(3)], 1e-9).values()) == [
        "train",
        "train",
        "validation",
    ]


def test_lost_clips_are_noticed():
    with pytest.raises(RuntimeError, match="clips were lost"):
        count([episode("s", 0, 0).model_copy(update={"found": 2})])
    rejection = Rejection(where="x", reason="too_short", detail="")
    full = count(
        [episode("s", 0, 0), episode("s", 1, 1, clips=()).model_copy(update={"found": 1, "rejected": (rejection,)})]
    )
    assert (full.found, full.accepted, full.rejected, full.episodes) == (2, 1, 1, 2)


def test_norm_stats_come_from_training_clips_only(tmp_path):
    """Every action of clip c of episode e is 100 e + c; relative ones are zero where proprio has the same name."""
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3, 4, 2, 6)))
    rows = [row for row in index.manifest.to_pylist() if row["split"] == "train"]
    numbers = np.array([100 * int(row["episode"][-1]) + row["clip_index"] for row in rows], dtype=float)
    assert 0 < len(rows) < len(index)
    stats = index.norm_stats["embodiments"]["arm"]
    absolute, relative, proprio = stats["actions_absolute"], stats["actions_relative"], stats["proprio"]
    assert absolute["count"] == proprio["count"] == 8 * len(rows)
    np.testing.assert_allclose(absolute["mean"], [numbers.mean()] * 3)
    np.testing.assert_allclose(proprio["std"], [numbers.std()] * 2)
    assert relative["max"] == [0.0, 0.0, numbers.max()]  # x and y are proprio too, the gripper is not
    np.testing.assert_allclose(index.norm_stats["latents"]["mean"], [numbers.mean()] * 6, rtol=2**-8)
    assert index.norm_stats["latents"]["residual_std"] == [0.0] * 6


def test_shards_mix_episodes_and_are_sorted_by_key(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3, 4, 2, 6)))
    for split in ("train", "validation"):
        keys = [index.key(i) for i in index.indices(split)]
        assert keys == sorted(keys) and keys


def test_an_embodiment_never_trained_on_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.data_pipeline.tiny_dataset.assign_splits", lambda *_: {"0" * 64: "validation"})
    with pytest.raises(UserError, match="embodiment arm has no training clip"):
        tiny_dataset(tmp_path / "dataset", clips=(3,))


def test_the_description_opens_without_the_samples(tmp_path):
    """As in the export folder of a trained model."""
    dataset = tiny_dataset(tmp_path / "dataset", clips=(3, 3))
    (dataset / "manifest.parquet").unlink()
    folder = DatasetFolder(dataset)
    assert folder.codec().weight_hash == folder.info.codec.weight_hash
    normalizer = folder.normalizer("arm", "actions_absolute", "min_max")
    assert normalizer is not None and normalizer.center.shape == (3,)
    with pytest.raises(UserError, match="has no statistics of embodiment 'leg'; it knows: arm"):
        folder.normalizer("leg", "proprio", "none")
    assert json.loads((dataset / "norm_stats.json").read_text()) == folder.norm_stats
