"""Text encoders, against a tiny random UMT5 and a tiny tokenizer that transformers itself wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from configs.loader import UserError
from data_pipeline.encoder_config import TextEncoderConfig
from data_pipeline.encoders import (
    HashedTextEncoder,
    T5TextEncoder,
    UMT5TextEncoder,
    create_text_encoder,
    load_text_encoder,
    pad_text,
)

VOCABULARY = ["<pad>", "</s>", "<unk>", "open", "the", "drawer", "close", "door", "press", "button", "down"]
TEXTS = ["open the drawer", "press the button down and the door", "", "close"]


# --- hashed -----------------------------------------------------------------------------------------------------------


def test_hashed_rows_never_change():
    """Datasets hold these numbers: should this fail, the encoder's "v1" must become a "v2"."""
    (rows,) = HashedTextEncoder(width=64).encode(["Open the drawer"])
    assert rows.shape == (4, 64)
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert digest == "4e2e967d8fa1abdd926be7b95d37d42981d93d944c94c7074487a16cf58b8a7f"


def test_hashed_is_the_same_in_another_process():
    code = (
        "from data_pipeline.encoders import HashedTextEncoder as E;"
        "print(E(16).encode(['pick up the cup'])[0].numpy().tobytes().hex())"
    )
    expected = HashedTextEncoder(16).encode(["pick up the cup"])[0].numpy().tobytes().hex()
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == expected


def test_hashed_tells_words_and_their_order_apart_but_not_case_or_spacing():
    encoder = HashedTextEncoder(width=32)
    plain, shouted, swapped, other = encoder.encode(
        ["open the door", "  Open\tTHE door. ", "door the open", "open the box"]
    )
    assert torch.equal(plain, shouted)
    assert not torch.equal(plain, swapped)
    assert torch.equal(plain[:2], other[:2])
    assert not torch.equal(plain[2], other[2])


@given(st.text(max_size=40), st.integers(8, 70))
def test_hashed_takes_any_text_at_any_width(text, width):
    (rows,) = HashedTextEncoder(width, max_length=5).encode([text])
    assert rows.dtype == torch.float32
    assert rows.shape[1] == width
    assert 1 <= rows.shape[0] <= 5
    assert torch.isfinite(rows).all()


def test_hashed_saved_and_loaded(tmp_path):
    encoder = HashedTextEncoder(width=24, max_length=7)
    encoder.save(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert isinstance(loaded, HashedTextEncoder)
    assert (loaded.width, loaded.max_length, loaded.weight_hash) == (24, 7, encoder.weight_hash)
    assert encoder.weight_hash != HashedTextEncoder(width=25).weight_hash


# --- T5 and UMT5 ------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    words = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_model(folder: Path, config_class=UMT5Config, model_class=UMT5EncoderModel) -> None:
    torch.manual_seed(0)
    config = config_class(vocab_size=len(VOCABULARY), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    model_class(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
    """As in a Wan pipeline: `text_encoder/` and `tokenizer/` side by side."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def encoder(pipeline_folder) -> UMT5TextEncoder:
    return UMT5TextEncoder(pipeline_folder, dtype="float32", max_length=16)


@pytest.fixture
def own_folder(pipeline_folder, tmp_path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "pipeline"))


def test_equals_wans_pipeline_after_padding(pipeline_folder, encoder, monkeypatch):
    """The pipeline pads to the full length, masks, trims, and pads with zeros; we never pad. The rows are the same."""
    monkeypatch.setattr(pipeline_wan, "prompt_clean", lambda text: text)  # wants ftfy
    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder").eval(),
        _execution_device=torch.device("cpu"),
    )
    with torch.no_grad():
        expected = pipeline_wan.WanPipeline._get_t5_prompt_embeds(parts, TEXTS, max_sequence_length=16)
    torch.testing.assert_close(pad_text(encoder.encode(TEXTS), 16), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_the_true_tokens_and_do_not_depend_on_the_other_texts(encoder):
    rows = encoder.encode(TEXTS)
    assert [len(row) for row in rows] == [4, 8, 1, 2]  # words and the end token
    assert all(row.shape[1] == encoder.width == 16 and row.dtype == torch.float32 for row in rows)
    for text, row in zip(TEXTS, rows, strict=True):
        assert torch.equal(encoder.encode([text])[0], row)
    assert torch.equal(encoder.encode(["  open \n the drawer "])[0], rows[0])


@pytest.mark.gpu
def test_on_a_gpu_too(pipeline_folder, encoder):
    (rows,) = UMT5TextEncoder(pipeline_folder, dtype="float32").to("cuda").encode(TEXTS[:1])
    torch.testing.assert_close(rows, encoder.encode(TEXTS[:1])[0], rtol=0, atol=2e-2)


def test_long_texts_are_cut_to_max_length_and_keep_their_end_token(encoder):
    (rows,) = encoder.encode(["open the drawer " * 10])
    assert len(rows) == 16
    assert encoder.tokenizer("open " * 30, max_length=16, truncation=True).input_ids[-1] == 1


def test_one_folder_with_model_and_tokenizer(tmp_path):
    write_model(tmp_path, T5Config, T5EncoderModel)
    write_tokenizer(tmp_path)
    encoder = T5TextEncoder(tmp_path, dtype="bfloat16")
    (rows,) = encoder.encode(["open the door"])
    assert (rows.shape, rows.dtype) == ((4, 16), torch.float32)


def test_saved_as_a_reference_and_loaded(encoder, tmp_path):
    encoder.save(tmp_path / "text_encoder")
    assert [path.name for path in (tmp_path / "text_encoder").iterdir()] == ["config.json"]
    loaded = load_text_encoder(tmp_path / "text_encoder")
    assert isinstance(loaded, UMT5TextEncoder)
    assert (loaded.weight_hash, loaded.max_length) == (encoder.weight_hash, 16)
    assert torch.equal(loaded.encode(TEXTS[:1])[0], encoder.encode(TEXTS[:1])[0])


def test_another_tokenizer_than_the_recorded_one_is_refused(own_folder, tmp_path):
    UMT5TextEncoder(own_folder).save(tmp_path / "saved")
    tokenizer = own_folder / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"drawer"', '"drawers"'))
    with pytest.raises(UserError, match="is not the encoder that"):
        load_text_encoder(tmp_path / "saved")


def drop_embedding(folder: Path) -> None:
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    del tensors["shared.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def cut_in_half(folder: Path) -> None:
    weights = folder / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def only_pickles(folder: Path) -> None:
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/pytorch_model.bin")


def call_it_t5(folder: Path) -> None:
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "t5"}))


BROKEN = {
    "no_folder": (shutil.rmtree, "is not a folder"),
    "pickles": (only_pickles, "pickled weights .* are never opened"),
    "cut_weights": (cut_in_half, "cannot be loaded"),
    "no_embedding": (drop_embedding, "2 tensors are missing"),
    "another_model": (call_it_t5, "holds a t5 model, not umt5"),
    "no_tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "no tokenizer can be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_gives_one_sentence(own_folder, case):
    damage, message = BROKEN[case]
    damage(own_folder)
    with pytest.raises(UserError, match=message) as caught:
        UMT5TextEncoder(own_folder)
    assert "\n" not in str(caught.value)


# --- padding and choice -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 6))
def test_pad_text_keeps_the_rows_and_fills_with_zeros(lengths, length):
    texts = [torch.full((rows, 3), float(i + 1)) for i, rows in enumerate(lengths)]
    padded = pad_text(texts, length)
    assert padded.shape == (len(texts), length, 3)
    for row, text in zip(padded, texts, strict=True):
        kept = min(len(text), length)
        assert torch.equal(row[:kept], text[:kept])
        assert not row[kept:].any()


def test_chosen_by_config(pipeline_folder):
    hashed = create_text_encoder(TextEncoderConfig(width=16))
    assert isinstance(hashed, HashedTextEncoder)
    assert hashed.width == 16
    umt5 = create_text_encoder(TextEncoderConfig(kind="umt5", folder=pipeline_folder, dtype="float32"))
    assert isinstance(umt5, UMT5TextEncoder)
    with pytest.raises(ValueError, match="needs `folder`"):
        TextEncoderConfig(kind="umt5")
