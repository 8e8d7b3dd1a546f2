"""What every model that describes clips is asked and gives: its settings, its answers, and captions made of them."""

import re
import unicodedata
from pathlib import Path
from typing import Literal, Protocol, Self
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import UInt8
from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.loader import StrictConfig

PROMPT = (
    "These are frames of one short video clip, in order of time. Describe in one plain sentence what happens: who or "
    "what acts (a hand, a robot arm), on which objects, and how they move. Describe only what can be seen."
)


class CaptionConfig(StrictConfig):
    """Who describes the clips that have no text, and how."""

    kind: Literal["none", "transformers", "endpoint"] = Field(
        "none", description="transformers: a model folder on this machine. endpoint: a server such as vLLM's."
    )
    folder: Path | None = Field(None, description="transformers: the model's folder; nothing is downloaded.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="transformers: precision of the weights.")
    url: str | None = Field(None, description="endpoint: for example http://localhost:8000/v1.")
    model: str | None = Field(None, description="endpoint: the model's name as the server knows it.")
    api_key_env: str | None = Field(
        None, description="endpoint: name of the environment variable that holds the key; never the key itself."
    )
    request: dict[str, JsonValue] = Field(
        {}, description="endpoint: more fields of the request; null takes one of ours out, such as temperature."
    )
    prompt: str = Field(PROMPT, min_length=1, description="What the model is asked about the frames.")
    frames: PositiveInt = Field(8, description="Frames per clip that it sees: of the first view, evenly spaced.")
    max_new_tokens: PositiveInt = Field(96, description="Length of an answer at most.")
    only_missing: bool = Field(
        True, description="Ask only about clips without instruction; false: about all, as a second text."
    )
    cache: Path | None = Field(
        None, description="Folder that keeps answers for later builds; null: `caption_cache` beside `out`."
    )
    concurrency: PositiveInt | None = Field(
        None, description="endpoint: requests at once in all (null: 16). transformers: processes, without GPUs (1)."
    )
    timeout_s: PositiveFloat = Field(120.0, description="endpoint: longest wait for one answer.")
    retries: NonNegativeInt = Field(4, description="endpoint: further attempts where one fails.")
    backoff_s: NonNegativeFloat = Field(1.0, description="endpoint: pause after the first failure; it doubles.")
    price_in: NonNegativeFloat | None = Field(None, description="Of a million tokens that the model reads.")
    price_out: NonNegativeFloat | None = Field(None, description="Of a million tokens that it writes.")

    @field_validator("url")
    @classmethod
    def _is_a_base_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("should be a server's base address such as http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise ValueError("should hold no password: put the key into an environment variable (`api_key_env`)")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("should be the name of an environment variable, not the key itself")
        return name

    @model_validator(mode="after")
    def _says_which_model(self) -> Self:
        if self.kind == "transformers" and self.folder is None:
            raise ValueError("kind 'transformers' needs `folder`, the local folder of the model")
        if self.kind == "endpoint" and (self.url is None or self.model is None):
            raise ValueError("kind 'endpoint' needs `url` and `model`")
        return self


HOW_CAPTIONING_IS_RUN = {"url", "api_key_env", "cache", "concurrency", "timeout_s", "retries", "backoff_s"} | {
    "price_in",
    "price_out",
}
"""Settings that the captions do not follow from."""


class Answer(StrictConfig):
    """What a model said about a clip. None: the endpoint did not count the tokens."""

    text: str
    tokens_in: int | None
    tokens_out: int | None
    is_cut: bool = Field(description="It ended at max_new_tokens.")
    is_refusal: bool


class CaptionError(Exception):
    """No answer. `reason` is a word to count by; `may_pass`: asking again may help."""

    def __init__(self, reason: str, detail: str, *, may_pass: bool = False, pause_s: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.may_pass, self.pause_s = reason, detail, may_pass, pause_s


class Captioner(Protocol):
    def answer(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Answer:
        """Raises CaptionError. Endpoints may be asked by several threads at once."""

    def check(self, height: int, width: int) -> None:
        """Asks about a grey clip of this size. Raises UserError where that gives no answer: no other clip will."""


def grey_clip(num_frames: int, height: int, width: int) -> UInt8[np.ndarray, "f h w 3"]:
    return np.full((num_frames, height, width, 3), 128, dtype=np.uint8)


def one_line(what: object) -> str:
    return " ".join(str(what).split())[:200] or type(what).__name__


# --- answers as captions ------------------------------------------------------------------------------------------

# A model that declines says so at once; "I cannot" later in a sentence may belong to a description.
_REFUSAL = re.compile(
    r"(i['’]?m|i am) (very |so )?(sorry|unable|not able)|i (can['’]?t|cannot|can not|won['’]?t) |sorry,|as an ai\b"
    r"|unfortunately, i ",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\**(caption|description|answer)\**\s*:\**\s*", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "`": "`"}


def read_caption(answer: Answer) -> str:
    """The answer as one line of text. CaptionError where it is none: `refusal`, `empty_caption`."""
    text = clean_caption(answer.text, is_cut=answer.is_cut)
    if answer.is_refusal or _REFUSAL.match(text):
        raise CaptionError("refusal", text[:200] or "the endpoint filtered the answer")
    if not any(char.isalnum() for char in text):
        raise CaptionError("empty_caption", f"the model answered {answer.text[:80]!r}")
    return text


def clean_caption(text: str, *, is_cut: bool = False) -> str:
    """One line without thoughts, labels and quotes around it; of a text that was cut, the whole sentences."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char) not in ("Cc", "Cs"))
    text = " ".join(text.split())
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    if is_cut:
        sentences = re.match(r".*[.!?](?=\s)", text)
        text = sentences.group() if sentences else text
    return text
