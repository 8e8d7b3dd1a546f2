"""configs/data_pipeline/everything.yaml over the public samples: every format, every odd file, nothing lost."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.loader import load_config
from data_pipeline import build
from data_pipeline.build_config import BuildConfig
from data_pipeline.dataset import read_info
from data_pipeline.verify import verify

CONFIG = Path(__file__).parents[2] / "configs/data_pipeline/everything.yaml"

# source -> (episodes, clips, clips with actions)
ACCEPTED = {
    "g1": (2, 12, 12),
    "gr00t": (2, 22, 22),
    "open50": (2, 13, 13),
    "bridge_rlds": (50, 25, 25),
    "ctrlworld": (11, 83, 83),
    "language_table": (1, 2, 2),
    "bridge_vpp": (4, 13, 13),
    "rt1_vpp": (4, 34, 34),
    "bair": (1, 1, 1),
    "fractal": (1, 2, 0),
    "hammer": (1, 5, 5),
    "something": (4, 7, 0),
    "sam2": (3, 13, 0),
    "mmaction2": (4, 13, 0),
    "sintel": (1, 14, 0),
    "cuts": (2, 6, 0),
    "odd_torchcodec": (35, 20, 0),
    "energon": (2, 2, 0),
}
REJECTED = {
    ("bridge_rlds", "duplicate"): 25,  # both of its splits hold the same episodes
    ("energon", "duplicate"): 2,  # one video in two containers
    ("mmaction2", "too_short"): 1,
    ("odd_decord", "too_short"): 5,
    ("odd_derived", "not_a_video"): 1,
    ("odd_derived", "truncated_video"): 2,
    ("odd_torchcodec", "too_short"): 26,
    ("robosuite_handover", "no_images"): 7,
    ("robosuite_lift", "no_images"): 3,
    ("robosuite_wipe", "no_images"): 1,
    ("vjepa2", "too_short"): 1,
}


@pytest.mark.slow
def test_everything_is_built_or_rejected_by_name(ray, shared_data, tmp_path):
    out = tmp_path / "dataset"
    build.main(load_config(BuildConfig, CONFIG, [f"root={shared_data}", f"out={out}", "num_workers=2"]))
    clips = pq.read_table(out / "manifest.parquet").to_pylist()
    info = read_info(out)
    num_clips = Counter(row["source"] for row in clips)
    num_labelled = Counter(row["source"] for row in clips if row["has_actions"])
    found = {name: (info.sources[name].episodes, num_clips[name], num_labelled[name]) for name in num_clips}
    assert found == ACCEPTED
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    assert Counter((row["source"], row["reason"]) for row in rejected) == REJECTED
    assert info.counts.found == info.counts.accepted + info.counts.rejected == len(clips) + len(rejected)
    assert verify(out) == []
