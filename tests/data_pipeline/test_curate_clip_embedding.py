"""CLIP's embeddings: those of the model, and folders that will not do told in one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from configs.loader import UserError
from data_pipeline.curate.clip_embedding import CLIP_MEAN, CLIP_STD, ClipEmbedder, hash_clip
from tests.data_pipeline.tiny_clip import SIZE, WIDTH, write_clip, write_whole_clip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny-clip")


def video(height=SIZE, width=SIZE, num_frames=5):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def embedded_by_transformers(folder, frames):
    clip = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    pixels = (torch.from_numpy(frames).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    with torch.inference_mode():
        embeddings = clip(pixel_values=pixels.permute(0, 3, 1, 2)).image_embeds
    return (embeddings / embeddings.norm(dim=-1, keepdim=True)).numpy()


@pytest.mark.parametrize(("max_frames", "chosen"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_embeddings_are_those_of_the_model(original, max_frames, chosen):
    found = ClipEmbedder(original).embed(video(), max_frames)
    assert found.shape == (len(chosen), WIDTH)
    np.testing.assert_allclose(found, embedded_by_transformers(original, video()[chosen]), atol=1e-5)


def test_the_largest_centred_square_is_shown(original):
    wide = video(SIZE, 2 * SIZE)
    square = np.ascontiguousarray(wide[:, :, SIZE // 2 : SIZE // 2 + SIZE])
    embedder = ClipEmbedder(original)
    np.testing.assert_array_equal(embedder.embed(wide, 3), embedder.embed(square, 3))


def test_a_whole_clip_does_as_well_as_its_image_half(tmp_path):
    whole = write_whole_clip(tmp_path / "whole")
    expected = embedded_by_transformers(whole, video())
    np.testing.assert_allclose(ClipEmbedder(whole).embed(video(), 5), expected, atol=1e-5)


def test_half_precision_weights_are_computed_with_in_full(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert ClipEmbedder(folder).embed(video(), 3).dtype == np.float32


def test_the_hash_is_of_the_weights_and_not_of_their_place(folder, tmp_path):
    before = hash_clip(folder)
    (folder / "README.md").write_text("tiny")
    moved = folder.rename(tmp_path / "elsewhere")
    assert hash_clip(moved) == before
    assert hash_clip(write_clip(moved, seed=1)) != before


# --- folders that will not do -------------------------------------------------------------------------------------


def without_folder(folder):
    shutil.rmtree(folder)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def missing_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[2:]), folder / "model.safetensors", {"format": "pt"})


def broken_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_folder, "is not a folder.*hf download openai/clip"),
        (pickled, "pickled weights .* are never opened"),
        (another_model, "holds a siglip model, not a CLIP"),
        (cut_weights, "cannot be loaded"),
        (missing_weights, "2 tensors are missing"),
        (broken_weights, "no finite numbers"),
    ],
)
def test_a_folder_that_will_not_do(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as stopped:
        ClipEmbedder(folder).embed(video(), 1)
    assert "\n" not in str(stopped.value)
