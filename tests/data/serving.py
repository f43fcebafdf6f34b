"""A server of files on the loopback that fails, stalls and lies as it is told."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Serving:
    """What the server does, and what it was asked.

    Attributes:
        latency: seconds before each answer.
        failing: by name, how many of the next answers are 503.
        cutting: by name, how many of the next bodies end in the middle.
        dripping: names whose bodies come a byte at a time.
        tags: by name, another ETag.
        lies: names whose bodies have one byte changed.
        gone: names that are not there.
        forbidden: names that must not be read.
        bodies: bytes of whole answers, by name.
        asked: requests, by method and name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.latency = 0.0
        self.failing: Counter[str] = Counter()
        self.cutting: Counter[str] = Counter()
        self.dripping: set[str] = set()
        self.tags: dict[str, str] = {}
        self.lies: set[str] = set()
        self.gone: set[str] = set()
        self.forbidden: set[str] = set()
        self.bodies: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.url = ""
        self._lock = threading.Lock()

    def takes(self, counter: Counter[str], name: str) -> bool:
        with self._lock:
            counter[name] -= 1
            return counter[name] >= 0

    def count(self, counter: Counter[Any], key: Any, number: int = 1) -> None:
        with self._lock:
            counter[key] += number

    def fetched(self, name: str) -> float:
        """How many times a file was fetched, in whole answers."""
        return self.bodies[name] / (self.folder / name).stat().st_size


@contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    state = Serving(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            name = self.path.rpartition("/")[2]
            state.count(state.asked, (self.command, name))
            time.sleep(state.latency)
            if state.takes(state.failing, name):
                self.send_error(503)
                return
            if name in state.forbidden:
                self.send_error(403)
                return
            file = folder / name
            if name in state.gone or not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            start, end = 0, len(data)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked:
                start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            tag = hashlib.sha256(data).hexdigest()[:16]
            self.send_header("ETag", f'"{state.tags.get(name, tag)}"')
            self.end_headers()
            if not body:
                return
            part = bytearray(data[start:end])
            if name in state.lies:
                part[len(part) // 2] ^= 1
            if state.takes(state.cutting, name):
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
                return
            try:
                if name in state.dripping:
                    for place in range(len(part)):
                        self.wfile.write(part[place : place + 1])
                        time.sleep(0.05)
                self.wfile.write(part)
            except OSError:
                return  # the other side gave up
            state.count(state.bodies, name, len(part))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
