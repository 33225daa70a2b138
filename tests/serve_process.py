"""A server in a process of its own, on a free port, and how tests talk to it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image as pil

HELLO = [{"role": "user", "content": "hello"}]


class Server:
    """A running `mgp5 serve`."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.stderr = folder / "stderr"
        command = [sys.executable, "-m", "mgp5", "serve", "--port", "0", "--name", "tiny", "--backend", "eager", *flags]
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, cwd=folder, stderr=stderr, env={**os.environ, **(env or {})})

    def ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 300
        while not (found := re.search(r"http://(\S+):(\d+)/v1 serves", self.stderr.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.1)
        self.port = int(found[2])
        while self.ask("GET", "/health")[0] != 200:
            time.sleep(0.1)

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
        body = json.dumps({"model": "tiny"} | fields).encode()
        status, answer = self.ask("POST", path, body, {"Content-Type": "application/json"})
        return status, json.loads(answer)

    def metric(self, name: str, headers: dict | None = None) -> float:
        """A counter; 0 before it counted."""
        told = self.ask("GET", "/metrics", headers=headers)[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", told, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, name: str, value: float) -> None:
        """Wait for a counter."""
        deadline = time.monotonic() + 60
        while self.metric(name) < value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, expected {value}"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(folder: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ended behind the test."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, *flags, env=env)
    try:
        server.ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def data_url(size: tuple[int, int] = (40, 30), color: str = "red", kind: str = "PNG") -> str:
    """A picture of one colour."""
    buffer = BytesIO()
    pil.new("RGB", size, color).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
