"""docs/data_format.md: its snippet runs on shards that this code writes, and it names every field."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.dataset import MANIFEST_SCHEMA, REJECTED_SCHEMA, DatasetInfo
from data_pipeline.sample import SCHEMA_VERSION, Sample, SampleMeta, SourceMeta, ViewMeta, validate
from data_pipeline.shards import ShardWriter, tar_records
from data_pipeline.video_io import encode_video

DOC = (Path(__file__).parents[2] / "docs/data_format.md").read_text(encoding="utf-8")


def make_sample(key: str, has_actions: bool) -> Sample:
    meta = SampleMeta(
        schema_version=SCHEMA_VERSION,
        source=SourceMeta(name="lab", uri="lab/episode_0", licence=None, sha256="0" * 64),
        episode="episode_0",
        clip_index=0,
        start_s=0.0,
        fps=10.0,
        control_hz=20.0 if has_actions else None,
        num_frames=5,
        views={"front": ViewMeta(height=32, width=32, role="external")},
        embodiment="arm" if has_actions else None,
        instruction="open the drawer",
        captions=(),
        has_actions=has_actions,
        success=None,
        action_spans=((0, 8),) if has_actions else (),
        filter_scores={"motion": 0.1},
    )
    return Sample(
        key=key,
        meta=meta,
        video={"front": encode_video(np.zeros((5, 32, 32, 3), np.uint8), None, 10.0)},
        latents={"front": torch.zeros(2, 6, 4, 4, dtype=torch.bfloat16)},
        text=torch.zeros(3, 8, dtype=torch.bfloat16),
        actions=np.zeros((8, 7), np.float32) if has_actions else None,
        proprio=np.zeros((8, 9), np.float32) if has_actions else None,
    )


def test_the_snippet_runs(tmp_path):
    writer = ShardWriter(tmp_path, "shards/train/32x32x5", max_bytes=2**20)
    for sample in (make_sample("a1", has_actions=True), make_sample("b2", has_actions=False)):
        assert validate(sample.to_members()) == []
        writer.add(tar_records(sample.to_members()))
    writer.close()
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert 'Path("path/to/dataset")' in snippet
    with redirect_stdout(io.StringIO()) as output:
        exec(snippet.replace("path/to/dataset", str(tmp_path)), {})
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["a1", "arm", "b2"]
    assert "latents (2, 6, 4, 4) torch.bfloat16" in lines[0]
    assert "actions (8, 7) instruction open the drawer" in lines[1]


@pytest.mark.parametrize(
    "name",
    sorted({*SampleMeta.model_fields, *MANIFEST_SCHEMA.names, *REJECTED_SCHEMA.names, *DatasetInfo.model_fields}),
)
def test_every_field_is_explained(name):
    assert f"`{name}`" in DOC
