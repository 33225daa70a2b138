"""What `mgp5 serve` is asked for: one typed value that the command fills, or a caller from Python."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Mgp5Error
from ..options import ModelRequest
from .limits import Limits

KEY = "MGP5_API_KEY"  # environment variable with the API key
WEB_PATH = "/ui/"  # the web page; browsers ask for the key as a password there
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})  # Host headers that name this machine


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """Serve a model over HTTP.

    Args:
        model: which model to load, and how to hold and run it.
        name: name of the model as clients say it; "" takes the last part of `model.model`.
        host, port: address to listen at; port 0 takes a free one.
        key_file: file with the API key on its one line; None reads the environment variable MGP5_API_KEY.
        insecure: serve a public address without a key.
        limits: bounds of what clients may ask for.
        rows: number of replies that run at a time.
        waiting: number of requests that wait for a row; the next one is answered with status 429.
        connections: number of open connections; the next one is answered with status 503.
        drain: seconds to finish running replies after SIGTERM.
        web: serve a page for browsers at /ui/ too.
        ray: address of a Ray cluster to serve by; "local" takes that of RAY_ADDRESS, or starts one on this machine;
            None serves from this process.
        replicas: smallest and largest number of replicas on the cluster; None: as many as there is room for.

    Raises:
        Mgp5Error: values are out of range or do not go together; all of them are named.
    """

    model: ModelRequest = field(default_factory=ModelRequest)
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    insecure: bool = False
    limits: Limits = field(default_factory=Limits)
    rows: int = 8
    waiting: int = 64
    connections: int = 512
    drain: int = 60
    web: bool = False
    ray: str | None = None
    replicas: tuple[int, int | None] = (1, None)

    def __post_init__(self) -> None:
        problems, (least, most) = self.limits.problems(), self.replicas
        for name, smallest in (("rows", 1), ("waiting", 0), ("connections", 1), ("drain", 0)):
            if (value := getattr(self, name)) < smallest:
                problems.append(f"{name} is {value}, expected {smallest} or more")
        if not 0 <= self.port <= 65535:
            problems.append(f"port is {self.port}, expected 0 to 65535")
        if not 1 <= least <= (most or least):
            problems.append(f"replicas is {least}:{most}, expected N or MIN:MAX, from 1")
        if self.web and self.ray:
            problems.append("--web does not go with --ray: a page keeps to one replica, serve it without --ray")
        if not (self.is_local or self.insecure or self.key_file or KEY in os.environ):
            hint = f"give --api-key-file FILE or set {KEY}, or say --insecure"
            problems.append(f"--host {self.host} is a public address, and there is no API key: {hint}")
        if problems:
            raise Mgp5Error("; ".join(problems), usage=True)

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

    Raises:
        Mgp5Error: the file cannot be read, or the key is too short or not one word.
    """
    try:
        key = os.environ.get(KEY) if file is None else file.read_text()
    except (OSError, UnicodeError):
        raise Mgp5Error(f"cannot read an API key from {file}", "give a file with the key on one line") from None
    if key is None:
        return None
    key = key.strip()
    if len(key) < 16 or not key.isascii() or len(key.split()) != 1:
        raise Mgp5Error("the API key is not one word of 16 or more characters", "make one: openssl rand -hex 32")
    return key
