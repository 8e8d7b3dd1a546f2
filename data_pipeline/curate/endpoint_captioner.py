"""Captions from an OpenAI-compatible endpoint: `POST <url>/chat/completions`, with the frames as images.

With the standard library alone: one kind of request needs none of the packages that a client brings along.
"""

import base64
import http.client
import io
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from configs.loader import UserError

from ..staging import digest
from .captioners import Answer, CaptionConfig, CaptionError, grey_clip, one_line

JPEG_QUALITY = 90
MAX_ANSWER_BYTES = 8 * 2**20
MAX_PAUSE_S = 60.0


class EndpointCaptioner:
    """Of vLLM, SGLang, llama.cpp, and of many services."""

    def __init__(self, config: CaptionConfig) -> None:
        assert config.url is not None and config.model is not None  # the config's validator has seen to it
        self.config = config
        self.url = config.url
        self._key = _read_key(config.api_key_env)
        self._opener = urllib.request.build_opener(_NoRedirects)

    @staticmethod
    def identity(config: CaptionConfig) -> str:
        """Of what its answers follow from, besides the frames. Where the model is served is not part of it."""
        what = (config.model, config.prompt, config.max_new_tokens, config.request, f"jpeg {JPEG_QUALITY}")
        return digest("endpoint", *what)

    def check(self, height: int, width: int) -> None:
        try:
            self.answer(grey_clip(self.config.frames, height, width))
        except CaptionError as error:
            raise UserError(
                f"captions: {self.url} does not caption with model {self.config.model} ({error.detail}); "
                f"{_NEXT_MOVES.get(error.reason, _NEXT_MOVE)}, or leave captions out with captions.kind=none."
            ) from None

    def answer(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Answer:
        body = json.dumps(self._request(frames)).encode()
        for attempt in range(self.config.retries + 1):
            try:
                return _parse_completion(self._post(body))
            except CaptionError as error:
                if not error.may_pass or attempt == self.config.retries:
                    raise
                pause_s = error.pause_s or self.config.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                time.sleep(min(pause_s, MAX_PAUSE_S))
        raise AssertionError("the last attempt returns or raises")

    def _request(self, frames: UInt8[np.ndarray, "f h w 3"]) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": _jpeg_url(frame)}} for frame in frames]
        request = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": [*images, {"type": "text", "text": self.config.prompt}]}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": 0,
        }
        return {name: value for name, value in (request | self.config.request).items() if value is not None}

    def _post(self, body: bytes) -> bytes:
        """One attempt. Every way in which it can fail is a CaptionError."""
        headers = {"Content-Type": "application/json", "User-Agent": "foresight"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        deadline = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                return _read_until(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what happened while connecting
            if isinstance(cause, TimeoutError):
                detail = f"no answer within {self.config.timeout_s:g} s"
                raise CaptionError("endpoint_timeout", detail, may_pass=True) from None
            raise CaptionError("endpoint_unreachable", one_line(cause), may_pass=True) from None

    def _refusal(self, error: urllib.error.HTTPError) -> CaptionError:
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        if self._key:
            text = text.replace(self._key, "***")  # some servers repeat the key that they refuse
        detail = one_line(f"HTTP {error.code}: {text or error.reason}")
        if error.code in (401, 403):
            return CaptionError("not_authorised", detail)
        if error.code == 404:
            return CaptionError("unknown_model", detail)
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return CaptionError("endpoint_error", detail, may_pass=True, pause_s=_seconds(error.headers["Retry-After"]))
        return CaptionError("request_refused", detail)


_NEXT_MOVE = "look at the server's log, or change the request with captions.request"
_NEXT_MOVES = {
    "endpoint_unreachable": "start the server or correct captions.url",
    "endpoint_timeout": "wait for the server, or raise captions.timeout_s",
    "not_authorised": "name the environment variable that holds the right key in captions.api_key_env",
    "unknown_model": "correct captions.model or captions.url (which often ends in /v1)",
    # vLLM takes one image per request unless it is told otherwise when it starts, and says so only then.
    "request_refused": "if it takes fewer images, set captions.frames (vLLM has --limit-mm-per-prompt), otherwise "
    "change captions.request",
}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key along to wherever the answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"captions.api_key_env={name}: this environment variable is not set, or is empty; set it wherever the "
            "build's workers run."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"captions.api_key_env={name}: what this environment variable holds is no key; set it again.")
    return key


def _read_until(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The socket's own timeout starts anew with every byte, so a server that trickles could hold us for ever."""
    body = b""
    while chunk := response.read1(2**16):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise CaptionError("bad_answer", f"more than {MAX_ANSWER_BYTES} bytes", may_pass=True)
        if time.monotonic() > deadline:
            raise TimeoutError
    return body


class _Part(BaseModel):
    text: str = ""


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _parse_completion(body: bytes) -> Answer:
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        detail = one_line(f"not a chat completion: {body[:200].decode('utf-8', 'replace')}")
        raise CaptionError("bad_answer", detail, may_pass=True) from None
    choice, usage = completion.choices[0], completion.usage or _Usage()
    content = choice.message.content or ""
    text = content if isinstance(content, str) else " ".join(part.text for part in content)
    return Answer(
        text=text or choice.message.refusal or "",
        tokens_in=usage.prompt_tokens,
        tokens_out=usage.completion_tokens,
        is_cut=choice.finish_reason == "length",
        is_refusal=bool(choice.message.refusal) or choice.finish_reason == "content_filter",
    )


def _jpeg_url(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; a date is rare there, and our own pause does as well."""
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else None
