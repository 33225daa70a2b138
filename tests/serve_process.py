"""A server in a process or a thread of its own, on a free port, and how tests talk to it."""

import base64
import http.client
import json
import re
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
KEY = "0123456789abcdef-key"
MGP5 = sys.executable, "-m", "mgp5"


class Server:
    """A server that listens at a port of this machine, in this process or another."""

    def __init__(self, port: int, process: Any = None) -> None:
        self.port, self.process, self.url = port, process, f"http://127.0.0.1:{port}/v1"

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


@contextmanager
def serving(
    folder: Path, *flags: str, env: dict | None = None, mgp5: tuple[str, ...] | None = MGP5
) -> Iterator[Server]:
    """A running `mgp5 serve`, which is ended behind the test; folder/serve.err has its stderr.

    Without `mgp5` it is a fork of this process, which has imported torch already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["serve", "--port", "0", "--name", "tiny", "--backend", "eager", *flags]
    told, deadline = folder / "serve.err", time.monotonic() + 300
    if mgp5 is None:
        from tiny_training import fork

        process = fork(command, folder / "serve")
    else:
        with told.open("w") as stderr:
            process = subprocess.Popen([*mgp5, *command], cwd=folder, stderr=stderr, env=env)
    try:
        while not (found := re.search(r"http://(\S+):(\d+)/v1 serves", told.read_text())):
            alive = process.is_alive() if mgp5 is None else process.poll() is None
            assert alive and time.monotonic() < deadline, told.read_text()
            time.sleep(0.1)
        server = Server(int(found[2]), process)
        while server.ask("GET", "/health")[0] != 200:
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.join() if mgp5 is None else process.wait()


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
    try:
        yield Server(listener.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join()


def data_url(size: tuple[int, int] = (40, 30), color: str = "red", kind: str = "PNG") -> str:
    """A picture of one colour."""
    buffer = BytesIO()
    pil.new("RGB", size, color).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
