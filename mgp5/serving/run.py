"""`mgp5 serve`: on whose address, with which key, until a signal, and then until running replies are done."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvicorn

from ..errors import Mgp5Error
from .app import make_app
from .engine import ServingEngine
from .guard import PAGE, patient
from .limits import Limits

if TYPE_CHECKING:
    from ..model import InterleavedModel

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
KEY = "MGP5_API_KEY"
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def run(flags: dict[str, Any], load: Callable[[], InterleavedModel], tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was begun, for `drain` seconds at most.

    Raises:
        Mgp5Error: a public address without a key, or one that cannot be had.
    """
    host, port = flags["host"], flags["port"]
    limits, key, hosts = entry(flags)
    engine = engine_of(flags, load(), CORES)
    app = make_app(engine, flags["name"] or Path(flags["model"]).name, limits, key, hosts, flags["web"])
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=patient(limits.body_seconds),
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=flags["connections"],
        timeout_graceful_shutdown=flags["drain"],
        timeout_keep_alive=75,  # longer than clients keep idle connections: who closes first must not meet a request
    )
    try:
        place = config.bind_socket()
    except SystemExit:
        raise Mgp5Error(f"cannot listen at {host} port {port}", "choose another --port or --host") from None
    shown = f"[{host}]" if ":" in host else host
    base = f"http://{shown}:{place.getsockname()[1]}"
    page = f", with a page at {base}{PAGE}" if flags["web"] else ""
    tell(f"{base}/v1 serves {flags['model']}{page}; Ctrl-C ends it")
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done: an end as asked for
    uvicorn.Server(config).run(sockets=[place])


def entry(flags: dict[str, Any]) -> tuple[Limits, str | None, frozenset[str] | None]:
    """What clients may ask for, the key, and the names of the server: see `make_app`.

    Raises:
        Mgp5Error: a public address without a key.
    """
    host, local, key = flags["host"], is_local(flags["host"]), read_key(flags["api_key_file"])
    if not (local or key or flags["insecure"]):
        hint = f"give --api-key-file FILE or set {KEY}, or say --insecure"
        raise Mgp5Error(f"--host {host} is a public address, and there is no API key", hint, usage=True)
    limits = Limits(
        remote_images=flags["allow_remote_images"],
        **{name: flags[name] for name in ("tokens", "images", "steps", "side", "pixels", "seconds")},
        body_bytes=flags["body_megabytes"] * 2**20,
        body_seconds=flags["patience"],
    )
    return limits, key, LOCAL | {host.lower()} if local and not key else None


def engine_of(flags: dict[str, Any], model: InterleavedModel, cores: int) -> ServingEngine:
    """The engine of a server that has so many cores."""
    workers = max(1, cores // torch.get_num_threads()) if model.device.type == "cpu" else 1
    return ServingEngine(model, flags["rows"], flags["waiting"], workers)


def is_local(host: str) -> bool:
    """Whether a host is this machine alone. A name other than localhost is taken for public."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(file: Path | None) -> str | None:
    """The API key: of a file, else of the environment; None: there is none. Raises Mgp5Error for one that is bad."""
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
