"""A server in a process or a thread of its own, on a free port, and how tests talk to it."""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image as pil

HELLO = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}


class Server:
    """A server that listens at a port of this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, bytes]:
        """Status and body of an answer; 0 while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except ConnectionRefusedError:
            return 0, b""
        finally:
            connection.close()

    def post(self, path: str, **fields: object) -> tuple[int, dict]:
        """A request as JSON."""
        status, answer = self.ask("POST", path, json.dumps({"model": "tiny"} | fields).encode(), JSON)
        return status, json.loads(answer)

    def metric(self, name: str, headers: dict | None = None) -> float:
        """A counter; 0 before it counted."""
        text = self.ask("GET", "/metrics", headers=headers)[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, name: str, value: float) -> None:
        """Wait for a counter."""
        deadline = time.monotonic() + 60
        while self.metric(name) < value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, expected {value}"


class Process(Server):
    """A running `mgp5 serve`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.stderr = folder / "stderr"
        command = [sys.executable, "-m", "mgp5", "serve", "--port", "0", "--name", "tiny", "--backend", "eager", *flags]
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, cwd=folder, stderr=stderr)

    def ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 300
        while not (found := re.search(r"http://(\S+):(\d+)/v1 serves", self.stderr.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.1)
        self.port = int(found[2])
        while self.ask("GET", "/health")[0] != 200:
            time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Process]:
    """A process that is ended behind the test."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Process(folder, *flags)
    try:
        server.ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def serving_here(model: Path | str, key: str | None = None, **fields: Any) -> Iterator[Server]:
    """The server of a ServeRequest with these fields, in a thread of this process."""
    from mgp5.apps.open_model import open_model
    from mgp5.options import ModelRequest
    from mgp5.serving.request import ServeRequest
    from mgp5.serving.server import make_server

    what = ModelRequest(model=str(model), device="cpu", backend="eager")
    running = make_server(ServeRequest(model=what, name="tiny", port=0, **fields), open_model(what), key)
    listener = running.config.bind_socket()
    listener.listen()  # who connects before the thread has started waits
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    server = Server()
    server.port = listener.getsockname()[1]
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join()


def data_url(size: tuple[int, int] = (40, 30), color: str = "red", kind: str = "PNG") -> str:
    """A picture of one colour."""
    buffer = BytesIO()
    pil.new("RGB", size, color).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
