"""Serve a model over HTTP until a signal ends it, and then until running replies are done."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..apps.open_model import Tell, open_model, silent
from ..device import quiet_libraries
from ..errors import Mgp5Error
from .request import WEB_PATH, ServeRequest, read_key

if TYPE_CHECKING:
    import uvicorn

    from ..model import InterleavedModel


def serve(request: ServeRequest, tell: Tell = silent) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs and waits, for `request.drain` seconds at most.

    `tell` takes a line about where the server listens, one for each request, and notes of `open_model`. Raises
    Mgp5Error if a package is not installed, the key is bad, or the address is taken.
    """
    packages = {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve"}
    for package, extra in (packages | ({"gradio": "web"} if request.web else {})).items():
        if find_spec(package) is None:
            raise Mgp5Error(f"serve needs {package}", f"pip install 'mgp5[{extra}]'")
    quiet_libraries()
    if request.ray:
        from .cluster import needs_ray

        needs_ray()
        from .cluster.serve import serve_by_ray

        serve_by_ray(request, tell)
        return
    key = read_key(request.key_file)
    server = make_server(request, open_model(request.model, tell, request.rows), key, tell)
    try:
        listener = server.config.bind_socket()
    except SystemExit:
        message = f"cannot listen at {request.host} port {request.port}"
        raise Mgp5Error(message, "choose another --port or --host") from None
    base = request.url(listener.getsockname()[1])
    page = f", with a page at {base}{WEB_PATH}" if request.web else ""
    tell(f"{base}/v1 serves {request.model.model}{page}; Ctrl-C ends it")
    # uvicorn raises SIGTERM again after its shutdown; it asked for this end, so the exit code is 0
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listener])


def make_server(
    request: ServeRequest, model: InterleavedModel, key: str | None = None, log: Tell = silent
) -> uvicorn.Server:
    """Return a server with the app of a model; it does not run yet. Clients have to send the key, if there is one."""
    import uvicorn

    from .app import make_app, make_loop
    from .middleware import hang_up_after

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add_page = None
    if request.web:
        from .web.page import add_page
    config = uvicorn.Config(
        make_app(make_loop(request, model, cores), request, key, add_page, log),
        host=request.host,
        port=request.port,
        http=hang_up_after(request.limits.body_seconds),
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=request.connections,
        timeout_graceful_shutdown=request.drain,
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that no request meets a closing one
    )
    return uvicorn.Server(config)
