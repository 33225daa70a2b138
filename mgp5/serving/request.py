"""What `mgp5 serve` is asked for: a typed value that the command or a caller from Python fills; bounds; the API key."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Mgp5Error, raise_all
from ..options import ModelRequest

KEY = "MGP5_API_KEY"  # environment variable with the API key
WEB_PATH = "/ui/"  # the web page; browsers ask for the key as a password there
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})  # Host headers that name this machine


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one HTTP request; a request above them is refused; text is cut to `tokens`."""

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0  # for the headers of a request to arrive, and again for its body
    messages: int = 256  # of a conversation
    context_images: int = 16  # that a client sends in one conversation
    pixels: int = 16_000_000  # width times height of an image that a client sends
    tokens: int = 1024  # of text in a reply
    images: int = 8  # in a reply, or in one call of /v1/images/generations
    steps: int = 100  # denoising steps of an image
    side: int = 1024  # longest side of a drawn image, in pixels
    seconds: float = 600.0  # for a reply, waiting included
    responses: int = 256  # conversations of /v1/responses that are kept, to be gone on from
    response_bytes: int = 256 * 2**20  # of their images, unpacked
    remote_images: bool = False  # whether images at http and https addresses are fetched
    fetch_bytes: int = 16 * 2**20  # of such an image
    fetch_seconds: float = 10.0

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        least = dict.fromkeys(vars(self), 1) | {"body_seconds": 0.1, "images": 0, "remote_images": 0, "responses": 0}
        return _too_small(self, least)


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """Serve a model over HTTP. Raises Mgp5Error with all values that are out of range or do not go together."""

    model: ModelRequest = field(default_factory=ModelRequest)
    name: str = ""  # of the model as clients say it; "" takes the last part of `model.model`
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    key_file: Path | None = None  # its one line is the API key; None reads the environment variable KEY
    insecure: bool = False  # serve a public address without a key
    limits: Limits = field(default_factory=Limits)
    rows: int = 8  # replies that run at a time
    waiting: int = 64  # requests that wait for a row; the next one is answered with status 429
    connections: int = 512  # open at a time; the next one is answered with status 503
    drain: int = 60  # seconds to finish running replies after SIGTERM
    web: bool = False  # serve a page for browsers at WEB_PATH too
    ray: str | None = None  # address of a Ray cluster to serve by, or "local" (see `cluster.NEW`); None: this process
    replicas: tuple[int, int | None] = (1, None)  # smallest and largest number on the cluster; None: as many as fit

    def __post_init__(self) -> None:
        problems, (least, most) = self.limits.problems(), self.replicas
        problems += _too_small(self, {"rows": 1, "waiting": 0, "connections": 1, "drain": 0})
        if not 0 <= self.port <= 65535:
            problems.append(f"port is {self.port}, expected 0 to 65535")
        if not 1 <= least <= (most or least):
            problems.append(f"replicas is {least}:{most}, expected N or MIN:MAX, from 1")
        if self.web and self.ray:
            problems.append("--web does not go with --ray: a page keeps to one replica, serve it without --ray")
        if not (self.is_local or self.insecure or self.key_file or KEY in os.environ):
            hint = f"give --api-key-file FILE or set {KEY}, or say --insecure"
            problems.append(f"--host {self.host} is a public address, and there is no API key: {hint}")
        raise_all(problems)

    @property
    def model_name(self) -> str:
        """The name of the model as clients say it."""
        return self.name or Path(self.model.model).name

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine alone; a name other than localhost is taken for a public one."""
        try:
            return self.host.lower() == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def hosts(self, key: str | None) -> frozenset[str] | None:
        """Return the names that a Host header may have; None allows any (see `middleware.AccessMiddleware`)."""
        return LOCAL | {self.host.lower()} if self.is_local and key is None else None

    def url(self, port: int) -> str:
        """Return the address of the server without a path."""
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"


def read_key(file: Path | None) -> str | None:
    """Return the API key of a file, else of the environment; None where there is none.
    Raises Mgp5Error if the file cannot be read, or the key is too short or not one word."""
    try:
        key = os.environ.get(KEY) if file is None else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError):
        raise Mgp5Error(f"cannot read an API key from {file}", "give a file with the key on one line") from None
    if key is None:
        return None
    key = key.strip()
    if len(key) < 16 or not key.isascii() or len(key.split()) != 1:
        raise Mgp5Error("the API key is not one word of 16 or more characters", "make one: openssl rand -hex 32")
    return key


def _too_small(request: Limits | ServeRequest, least: dict[str, float]) -> list[str]:
    values = {name: getattr(request, name) for name in least}
    return [f"{n} is {value}, expected {least[n]} or more" for n, value in values.items() if value < least[n]]
