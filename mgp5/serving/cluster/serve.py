"""`mgp5 serve --ray`: as many replicas of the server as a cluster has room for, behind one address."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.util.queue import Queue
from starlette.types import ASGIApp

from ...apps.open_model import Tell, open_model
from ...errors import Mgp5Error
from ..app import make_app, make_loop
from ..request import ServeRequest, read_key
from . import absolute, connected, resources
from .router import FewestRequestsRouter

NAME = "mgp5"  # name of the application on the cluster
QUIET = {"log_level": "ERROR", "enable_access_log": False}


@serve.ingress()
class Replica:
    """The serving loop and the app of `mgp5 serve`, in a process of their own."""

    def __init__(self, request: ServeRequest, key: str | None, lines: Queue) -> None:
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        self.request, self.key, self.lines = request, key, lines
        self.loop = make_loop(request, open_model(request.model, images=request.rows), cores)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Ray calls this."""
        return make_app(self.loop, self.request, self.key, log=self.log)

    def log(self, line: str) -> None:
        """Send a line to the process that serves; nobody waits for it."""
        self.lines.actor.put_nowait.remote(line)

    def check_health(self) -> None:
        """Raise RuntimeError when the serving loop has ended; Ray then replaces the replica."""
        if not self.loop.alive:
            raise RuntimeError("the serving loop has ended")


def serve_by_ray(request: ServeRequest, tell: Tell) -> None:
    """Serve by a Ray cluster until SIGTERM or Ctrl-C; then finish what runs, for `request.drain` seconds at most.
    Raises Mgp5Error if there is no cluster, it serves already, or Ray Serve does not start."""
    assert request.ray is not None
    key, name = read_key(request.key_file), request.model.model
    with connected(request.ray) as new:
        logging.getLogger("ray.serve").disabled = True  # Ray sets its level itself
        if serve.status().proxies:
            raise Mgp5Error("Ray Serve runs on this cluster already", "end it with: serve shutdown")
        port = _free_port(request.host, request.port) if new or not request.port else request.port
        request = replace(request, name=request.model_name, model=absolute(request.model), port=port)
        try:
            serve.start("HeadOnly", {"host": request.host, "port": port}, logging_config=QUIET)
            least, most = request.replicas
            _, most, needs = resources(most, request.model.device)
            lines = Queue(actor_options={"num_cpus": 0})  # of the request logs of all replicas
            threading.Thread(target=_tell_all, args=(lines, tell), daemon=True).start()
            serve.run(_deployment(request, most, needs).bind(request, key, lines), name=NAME, logging_config=QUIET)
            many = f"{least}" if least == most else f"{least} to {most}"
            tell(f"{request.url(port)}/v1 serves {name} by {many} replicas; Ctrl-C ends it")
            _wait_for_signal()
        except (RuntimeError, RayError) as error:  # the last line of a replica's traceback tells the reason
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise Mgp5Error(f"Ray Serve does not start ({reason})", "MGP5_DEBUG=1 shows more") from error
        finally:
            _shut_down(request.drain)


def _deployment(request: ServeRequest, most: int, needs: dict[str, float]) -> serve.Deployment:
    """Return the deployment of replicas with the rows and the queue of a server each; full rows ask for one more."""
    scale = {"min_replicas": request.replicas[0], "max_replicas": most, "target_ongoing_requests": request.rows}
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=needs,
        autoscaling_config=scale,
        request_router_config=RequestRouterConfig(request_router_class=FewestRequestsRouter),
        max_ongoing_requests=request.connections,
        max_queued_requests=request.connections,
        graceful_shutdown_timeout_s=request.drain,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,
    )


def _tell_all(lines: Queue, tell: Tell) -> None:
    with suppress(Exception):  # whatever Ray raises when the cluster is left
        while True:
            tell(lines.get())


def _free_port(host: str, port: int) -> int:
    """Return the port if it is free, for 0 any that is. Raises Mgp5Error where it is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[1]
    except OSError:
        raise Mgp5Error(f"cannot listen at {host} port {port}", "choose another --port or --host") from None


def _wait_for_signal() -> None:
    """Return at SIGTERM; SIGINT raises KeyboardInterrupt. A second signal ends the process at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with suppress(SystemExit):
        threading.Event().wait()


def _shut_down(seconds: float) -> None:
    """Take no new requests, let replicas finish, then stop Ray Serve; its proxy, which replies pass, goes last."""
    if NAME in serve.status().applications:
        serve.delete(NAME, _blocking=False)
    deadline = time.monotonic() + seconds + 10
    while NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
    serve.shutdown()
