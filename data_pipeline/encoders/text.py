"""Text encoders: `hashed`, which needs no download, and T5/UMT5 (Wan's) from a local folder.

All give one row per true token and no padding. Wan's transformer is fed rows padded with *zeros* to 512
(`pad_text`): the zeros are a constant that its cross-attention has learned to see, so they are part of the contract
with the weights, but nothing worth storing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from configs.loader import UserError

from .local_weights import (
    CONFIG_NAME,
    DTYPES,
    check_weight_hash,
    find_model_folder,
    hash_files,
    load_pretrained,
    load_reference,
    read_json,
    save_reference,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 512
"""Tokens, the last one being the end of the text: what Wan was trained with."""


def clean_text(text: str) -> str:
    return " ".join(text.split())


def pad_text(texts: Sequence[Float[Tensor, "l d"]], length: int) -> Float[Tensor, "b length d"]:
    """Zero rows up to `length`; a longer text loses its last rows."""
    padded = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text[:length]
    return padded


class HashedTextEncoder:
    """Each word is a fixed random direction given by its hash; enough to tell a dataset's instructions apart.

    Related words are no closer than unrelated ones, so nothing is understood that training did not show. The numbers
    come from SHAKE-256 alone, so they are the same on every machine and with every version of every library.
    """

    name = "hashed"

    def __init__(self, width: int = 64, max_length: int = MAX_LENGTH) -> None:
        self.width = width
        self.max_length = max_length
        # Nothing is learned: the recipe is the weights. Change "v1" when the rows change.
        self.weight_hash = hashlib.sha256(f"hashed v1 width={width} max_length={max_length}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Float[Tensor, "l d"]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Float[Tensor, "l d"]:
        words = re.findall(r"\w+", text.lower())[: self.max_length - 1]
        # As in T5, an end token: the empty text is one row rather than none. No word contains "<".
        words.append("</s>")
        # A vector is all +-1/sqrt(d), so with half-sized positions both parts can be read off their sum.
        rows = [_unit_vector(word, self.width) for word in words]
        positions = [_unit_vector(f"<{i}>", self.width) for i in range(len(words))]
        return torch.from_numpy(np.stack(rows) + np.float32(0.5) * np.stack(positions))

    def save(self, folder: Path) -> None:
        save_reference(
            folder, kind=self.name, width=self.width, max_length=self.max_length, weight_hash=self.weight_hash
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        reference = load_reference(folder, fields=("width", "max_length"))
        encoder = cls(reference["width"], reference["max_length"])
        path = folder / CONFIG_NAME
        check_weight_hash(path, recorded=reference["weight_hash"], found=encoder.weight_hash, weights="This version")
        return encoder


def _unit_vector(key: str, width: int) -> np.ndarray:
    digest = hashlib.shake_256(key.encode()).digest((width + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:width]
    return ((2.0 * bits - 1.0) / np.sqrt(width)).astype(np.float32)


class T5TextEncoder:
    """A T5 encoder and its tokenizer, from one folder with both or a pipeline with `text_encoder/` and `tokenizer/`."""

    name: str = "t5"
    model_class: str = "T5EncoderModel"

    def __init__(self, folder: Path | str, dtype: str = "bfloat16", max_length: int = MAX_LENGTH) -> None:
        if dtype not in DTYPES:
            raise UserError(f"text_encoder.dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
        self.folder = Path(folder).resolve()
        self.dtype = dtype
        self.max_length = max_length
        model_folder = find_model_folder(self.folder, "text_encoder")
        tokenizer_folder = self.folder / "tokenizer" if (self.folder / "tokenizer").is_dir() else model_folder
        self.model: Any = self._load_model(model_folder)
        self.tokenizer = _load_tokenizer(tokenizer_folder)
        self.width: int = self.model.config.d_model
        self.weight_hash = hash_files(
            [
                model_folder / CONFIG_NAME,
                *model_folder.glob("*.safetensors"),
                # Whichever of these exist: other tokens are other rows.
                *tokenizer_folder.glob("tokenizer*.json"),
                *tokenizer_folder.glob("special_tokens_map.json"),
                *tokenizer_folder.glob("*.model"),
            ]
        )

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Float[Tensor, "l d"]]:
        """Each different text once and alone, so that its rows depend on no other text of the call.

        Wan's pipelines pad to 512, mask, and cut the padding's rows off again. Without padding there is nothing to
        mask, and the rows are the same.
        """
        rows = {text: self._encode(text) for text in dict.fromkeys(map(clean_text, texts))}
        return [rows[clean_text(text)].clone() for text in texts]

    def _encode(self, text: str) -> Float[Tensor, "l d"]:
        tokens = self.tokenizer(text, max_length=self.max_length, truncation=True, return_tensors="pt")
        output = self.model(
            input_ids=tokens.input_ids.to(self.model.device),
            attention_mask=tokens.attention_mask.to(self.model.device),
        )
        return output.last_hidden_state[0].float().cpu()

    def _load_model(self, folder: Path) -> PreTrainedModel:
        import transformers  # seconds to import, and only these encoders need it

        model_type = read_json(folder / CONFIG_NAME).get("model_type")
        if model_type != self.name:
            raise UserError(
                f"{folder} holds a {model_type} model, not {self.name}: set text_encoder.kind to its type (t5, "
                "umt5) or give another folder."
            )
        return load_pretrained(getattr(transformers, self.model_class), folder, DTYPES[self.dtype])

    def save(self, folder: Path) -> None:
        """A reference, not a copy: UMT5-XXL is eleven gigabytes."""
        save_reference(
            folder,
            kind=self.name,
            folder=str(self.folder),
            dtype=self.dtype,
            max_length=self.max_length,
            weight_hash=self.weight_hash,
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        reference = load_reference(folder, fields=("folder", "dtype", "max_length"))
        path = folder / CONFIG_NAME
        try:
            encoder = cls(reference["folder"], reference["dtype"], reference["max_length"])
        except UserError as error:
            raise UserError(
                f"{path} refers to weights that cannot be opened (if they moved, edit it): {error}"
            ) from error
        check_weight_hash(path, recorded=reference["weight_hash"], found=encoder.weight_hash, weights=encoder.folder)
        return encoder


class UMT5TextEncoder(T5TextEncoder):
    """UMT5, Wan's text encoder: multilingual, and every layer has its own position bias."""

    name = "umt5"
    model_class = "UMT5EncoderModel"


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError (sentencepiece), and tokenizers' bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: no tokenizer can be loaded from it ({reason}); it needs tokenizer.json and "
            "tokenizer_config.json, in the model's folder or in `tokenizer/` beside it."
        ) from error
