"""A server that speaks /v1/chat/completions on this machine, and misbehaves as it is told."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Reply:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    byte_pause_s: float = 0.0
    hangs_up: bool = False


@dataclass
class Request:
    """One that arrived."""

    number: int
    headers: dict[str, str]
    body: dict[str, Any]
    path: str

    @property
    def images(self) -> list[np.ndarray]:
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))) for url in urls]

    @property
    def clip(self) -> int | None:
        """Which clip this is about: clip c is a square of brightness 4 c. None: a try with a grey picture."""
        number = round(float(self.images[0].mean()) / 4)
        return number if number < 32 else None


def completion(text: str | None, **changes: Any) -> bytes:
    message = {"role": "assistant", "content": text} | changes.pop("message", {})
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage} | changes).encode()


def describe(request: Request) -> Reply:
    return Reply(body=completion(f"this is clip {request.clip}"))


class CaptionServer:
    """`behave` may be set anew at any time; it turns a request into a reply."""

    def __init__(self, behave: Callable[[Request], Reply] = describe) -> None:
        self.behave = behave
        self.requests: list[Request] = []
        self.max_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock_and_count():
                    request = Request(len(outer.requests), dict(self.headers), body, self.path)
                    outer.requests.append(request)
                try:
                    reply = outer.behave(request)
                    time.sleep(reply.pause_s)
                finally:
                    outer.uncount()  # before the answer, after which the next request may come at once
                with suppress(BrokenPipeError, ConnectionResetError):  # the other side may have given up waiting
                    self._reply(reply)

            def do_GET(self) -> None:  # what a client that follows a redirect would send
                outer.requests.append(Request(len(outer.requests), dict(self.headers), {}, self.path))
                self._reply(Reply())

            def _reply(self, reply: Reply) -> None:
                if reply.hangs_up:
                    self.connection.close()
                    return
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.byte_pause_s:
                    for byte in reply.body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.byte_pause_s)
                else:
                    self.wfile.write(reply.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @contextmanager
    def lock_and_count(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.max_at_once = max(self.max_at_once, self._at_once)
            yield

    def uncount(self) -> None:
        with self._lock:
            self._at_once -= 1

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
