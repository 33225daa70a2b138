"""Time what a user waits for: the first token and the first image from the shell, and a server with eight clients."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from huggingface_hub.constants import HF_HOME

from ..errors import Mgp5Error
from ..hub import Parts
from .timing import Bench, Row, digits, percentiles

MESSAGE = "Tell me of a fox in the snow."
STEPS, CLIENTS = 20, 8
NOISE = {"tolerance": 0.3}  # processes and imports vary more than kernels


def reply_rows(bench: Bench, parts: Parts) -> Iterator[Row]:
    """Yield rows of milliseconds from the start of `mgp5 chat` to the first token, and to the first image.
    Each backend runs twice: with empty caches, and with what the first process left there."""
    for backend in ["auto", *{"compile"}.intersection(bench.backends)]:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            caches |= {"XDG_CACHE_HOME": folder, "HF_HOME": HF_HOME}
            for way in (f"{backend}, cold", f"{backend}, warm"):
                bench.tell(f"reply from the shell: {way}")
                found = first_events(_command(bench, parts, "chat", backend), folder, caches)
                for event, name in (("text", "first token"), ("image", "first image")):
                    row = {"name": name, "size": f"{parts.name} from the shell, {STEPS} steps", "provider": way}
                    yield row | {"median": digits(1000 * found[event]), "unit": "ms"} | NOISE


def _command(bench: Bench, parts: Parts, command: str, backend: str) -> list[str]:
    device = ["--model", parts.name, "--device", str(bench.device), "--backend", backend]
    chat = ["--message", MESSAGE, "--json", "--seed", "1", "--steps", str(STEPS)]
    drawn = ["--set", "image=always", "--set", "max_images=1"]
    serve = ["--port", "0", "--name", "model", "--rows", str(CLIENTS)]
    return [sys.executable, "-m", "mgp5", command, *device, *([*chat, *drawn] if command == "chat" else serve)]


def first_events(command: list[str], folder: str, caches: dict[str, str]) -> dict[str, float]:
    """Run a command that writes events as JSON; return the seconds until the first one of each kind."""
    began, found = time.monotonic(), {}
    with (Path(folder) / "stderr").open("w+") as told:
        with subprocess.Popen(
            command, cwd=folder, env=os.environ | caches, stdout=subprocess.PIPE, stderr=told, text=True
        ) as process:
            for line in process.stdout:
                found.setdefault(json.loads(line)["event"], time.monotonic() - began)
        if process.returncode or not found.keys() >= {"text", "image"}:
            told.seek(0)
            raise Mgp5Error((told.read().strip() or "it said nothing").splitlines()[-1])
    return found


def server_rows(bench: Bench, parts: Parts) -> Iterator[Row]:
    """Yield a row of the replies, each with one image, of a server that eight clients ask at the same time."""
    bench.tell(f"server: {CLIENTS} clients")
    with _server(_command(bench, parts, "serve", "auto")) as url, ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda seed: _ask(url, seed), range(CLIENTS)))  # compiles and allocates
        began = time.monotonic()
        replies = list(clients.map(lambda seed: _ask(url, seed), range(CLIENTS * bench.steps)))
        seconds = time.monotonic() - began
    row = {"name": "server", "size": f"{parts.name}, {CLIENTS} clients, {STEPS} steps", "provider": "auto"} | NOISE
    times, tokens, images = zip(*replies, strict=True)
    row |= percentiles([1000 * each for each in times]) | {"unit": "ms"}
    yield row | {"images_per_s": digits(sum(images) / seconds), "tokens_per_s": digits(sum(tokens) / seconds)}


@contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """Run a server while the block runs; yield its address."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            last = "it said nothing"
            for line in process.stderr:
                if found := re.search(r"(http://\S+/v1) serves", line):
                    break
                last = line.strip() or last
            else:
                raise Mgp5Error(last)
            with ThreadPoolExecutor(1) as pool:  # else its log fills the pipe, and it stops
                pool.submit(process.stderr.read)
                try:
                    yield found[1]
                finally:
                    process.terminate()
        finally:
            process.kill()


def _ask(url: str, seed: int) -> tuple[float, int, int]:
    """Ask for a reply with an image; return its seconds, tokens and images."""
    body = {"model": "model", "messages": [{"role": "user", "content": MESSAGE}], "seed": seed, "max_tokens": 64}
    body |= {"image": "always", "max_images": 1, "steps": STEPS}
    began = time.monotonic()
    request = Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        usage = json.load(answer)["usage"]
    return time.monotonic() - began, usage["completion_tokens"], usage["images"]
