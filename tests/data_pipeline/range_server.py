"""A folder behind HTTP, as object storage is: ranges, ETags, and requests that fail as they fail there."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAILURES = ("unavailable", "cut", "stalled")


class RangeServer(ThreadingHTTPServer):
    """Every `fail_every`-th request fails: in turn with status 503, half an answer, and none at all."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fail_every = 0
        self.has_versions = True  # whether it tells ETags
        self.has_ranges = True
        self.status = 200  # any other one is the answer to everything
        self.delay_s = 0.0
        self.requests: Counter[str] = Counter()  # path -> GETs
        self.failed: Counter[str] = Counter()
        self._num_requests = 0
        self._lock = threading.Lock()
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, path: str) -> None:
        with self._lock:  # two threads that count at once would count one
            self.requests[path] += 1

    def failure(self) -> str | None:
        """What is to happen to the next request."""
        with self._lock:
            self._num_requests += 1
            if not self.fail_every or self._num_requests % self.fail_every:
                return None
            failure = FAILURES[self._num_requests // self.fail_every % len(FAILURES)]
            self.failed[failure] += 1
            return failure

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.note(self.path)
        time.sleep(self.server.delay_s)
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        failure = self.server.failure()
        if failure == "stalled":
            self.server.over.wait(30)
            self.close_connection = True
            return
        path = self.server.folder / self.path.lstrip("/")
        status = 503 if failure == "unavailable" else self.server.status
        if status == 200 and not path.is_file():
            status = 404
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = path.read_bytes()
        span = self.headers.get("Range") if self.server.has_ranges else None
        first, last = 0, len(whole) - 1
        if span is not None:
            first, last = (int(one) for one in span.removeprefix("bytes=").split("-"))
        body = whole[first : last + 1]
        self.send_response(200 if span is None else 206)
        self.send_header("Content-Length", str(len(body)))
        if span is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(whole)}")
        if self.server.has_versions:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{len(whole):x}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if failure == "cut" else body)
        if failure == "cut":
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
