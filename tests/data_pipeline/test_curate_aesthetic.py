"""The aesthetic score: CLIP and a linear head from this machine, here tiny ones with random weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loader import UserError
from data_pipeline.curate.aesthetic import SCORED_FRAMES, AestheticConfig, AestheticScorer
from data_pipeline.curate.clip_embedding import ClipEmbedder
from data_pipeline.curate.filters import FilterConfig, broken_rule, filter_scores
from data_pipeline.video_io import decode_frames
from data_pipeline.video_pixels import planes_to_rgb, rgb_to_planes
from tests.data_pipeline.tiny_clip import WIDTH, write_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def write_head(path, layers):
    """`layers`: name -> output size, in order."""
    torch.manual_seed(1)
    tensors, width = {}, WIDTH
    for name, size in layers.items():
        prefix = f"{name}." if name else ""
        tensors |= {f"{prefix}weight": torch.randn(size, width), f"{prefix}bias": torch.randn(size)}
        width = size
    save_file(tensors, path)
    return path


def scorer(clip_folder, path, layers=None):
    return AestheticScorer(AestheticConfig(clip=clip_folder, head=write_head(path, layers or {"": 1})))


def video(seed=0, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (5, height, width, 3), dtype=np.uint8)


def test_the_score_is_the_head_of_clips_embedding(clip_folder, tmp_path):
    head = load_file(write_head(tmp_path / "head.safetensors", {"": 1}))
    embeddings = torch.from_numpy(ClipEmbedder(clip_folder).embed(video(), SCORED_FRAMES))
    expected = (embeddings @ head["weight"].T + head["bias"]).mean()
    assert scorer(clip_folder, tmp_path / "head.safetensors").score(video()) == pytest.approx(float(expected), abs=1e-5)


def test_a_head_of_several_layers(clip_folder, tmp_path):
    """LAION's second head: linear layers numbered with gaps, ten and more of them in the order of their numbers."""
    layers = {"layers.0": 8, "layers.2": 6, "layers.10": 1}
    found = scorer(clip_folder, tmp_path / "head.safetensors", layers)
    assert [weight.shape[0] for weight, _ in found._layers] == [8, 6, 1]
    assert np.isfinite(found.score(video()))


@pytest.mark.parametrize("layers", [{"": 2}, {"layers.0": 8, "layers.1": 3}])
def test_a_head_that_is_no_score(clip_folder, tmp_path, layers):
    with pytest.raises(UserError, match="must lead to one number"):
        scorer(clip_folder, tmp_path / "head.safetensors", layers)


def test_what_cannot_be_a_head(clip_folder, tmp_path):
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(1, WIDTH + 1), "bias": torch.zeros(1)}, path)
    config = AestheticConfig(clip=clip_folder, head=path)
    with pytest.raises(UserError, match=f"no linear layer of {WIDTH} numbers"):
        AestheticScorer(config)
    for content in (b"", b"\x80\x02}q\x00.", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no safetensors file"):
            AestheticScorer(config)
    with pytest.raises(UserError, match="is no safetensors file"):
        AestheticScorer(config.model_copy(update={"head": tmp_path / "missing.safetensors"}))


def test_the_filter(clip_folder, tmp_path):
    head = write_head(tmp_path / "head.safetensors", {"": 1})
    weights = AestheticConfig(clip=clip_folder, head=head)
    views, sizes = {name: rgb_to_planes(video(seed)) for seed, name in enumerate("ab")}, {"a": 40, "b": 40}
    score = filter_scores(views, sizes, weights)["aesthetic"]
    each = [AestheticScorer(weights).score(planes_to_rgb(one)) for one in views.values()]
    assert score == pytest.approx(np.mean(each), abs=1e-5)
    for limit, reason in ((score + 0.1, "not_aesthetic"), (score - 0.1, None)):
        broken = broken_rule({"aesthetic": score}, FilterConfig(aesthetic=weights, min_aesthetic=limit))
        assert (broken and broken[0]) == reason
    assert "aesthetic" not in filter_scores(views, sizes)


def test_real_frames_have_scores(clip_folder, tmp_path, shared_data):
    frames = decode_frames(shared_data / "human_sam2_sav/04_coffee.mp4", range(5))
    found = scorer(clip_folder, tmp_path / "head.safetensors")
    assert np.isfinite(found.score(frames)) and found.score(frames) == found.score(frames.copy())
