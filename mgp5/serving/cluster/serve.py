"""`mgp5 serve --ray`: the same server, as many times as a cluster has room for, behind one address."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig

from ...errors import Mgp5Error
from ..app import make_app
from ..run import engine_of, entry
from . import absolute, connected, resources
from .router import FewestRequests

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from ...model import InterleavedModel

Load = Callable[[dict[str, Any]], "InterleavedModel"]
NAME = "mgp5"  # of the application on the cluster
QUIET = {"log_level": "ERROR", "enable_access_log": False}


@serve.ingress()
class Replica:
    """A server's engine and app in a process of its own.

    Args:
        flags: of the command.
        load: makes the model of flags.
        name: of the model, as clients say it.
        front: limits, key and hosts.
    """

    def __init__(self, flags: dict[str, Any], load: Load, name: str, front: tuple[Any, ...]) -> None:
        model = load(flags)
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        self.engine, self.name, self.front = engine_of(flags, model, cores), name, front

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self.engine, self.name, *self.front)

    def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not self.engine.alive:
            raise RuntimeError("the engine has ended")


def run(flags: dict[str, Any], load: Load, tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was begun, for `drain` seconds at most.

    Args:
        load: makes the model of flags; called by each replica.

    Raises:
        Mgp5Error: as `mgp5.serving.run.run`; or the cluster serves already, or Ray Serve does not start.
    """
    least, most = replicas(flags["replicas"])
    front = entry(flags)
    name = flags["name"] or Path(flags["model"]).name
    with connected(flags["ray"]) as own:
        logging.getLogger("ray.serve").disabled = True  # it sets its level itself
        if serve.status().proxies:
            raise Mgp5Error("Ray Serve runs on this cluster already", "end it with: serve shutdown")
        flags = absolute(flags)
        if own or not flags["port"]:
            flags["port"] = _port(flags["host"], flags["port"])
        most, needs = resources(most, flags["device"])[1:]
        try:
            serve.start("HeadOnly", {"host": flags["host"], "port": flags["port"]}, logging_config=QUIET)
            app = _deployment(flags, least, most, needs).bind(flags, load, name, front)
            serve.run(app, name=NAME, logging_config=QUIET)
            many = f"{least}" if least == most else f"{least} to {most}"
            tell(f"http://{_shown(flags)}/v1 serves {flags['model']} by {many} replicas; Ctrl-C ends it")
            interrupted = _wait()
        except (RuntimeError, RayError) as error:  # the last line of a replica's traceback says why
            why = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise Mgp5Error(f"Ray Serve does not start ({why})", "MGP5_DEBUG=1 shows more") from error
        finally:
            _end(flags["drain"])
    if interrupted:
        raise KeyboardInterrupt


def replicas(given: str | None) -> tuple[int, int | None]:
    """Least and most replicas of N or MIN:MAX; most is None for as many as there is room for."""
    if given is None:
        return 1, None
    least, _, most = given.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()) or not 1 <= int(least) <= int(most or least):
        raise Mgp5Error(f"--replicas is {given}", "expected N or MIN:MAX, from 1", usage=True)
    return int(least), int(most or least)


def _deployment(flags: dict[str, Any], least: int, most: int, needs: dict[str, Any]) -> serve.Deployment:
    """Each replica has the rows and the queue of a server alone; a full batch of rows asks for another replica."""
    scale = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": flags["rows"]}
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=needs,
        autoscaling_config=scale,
        request_router_config=RequestRouterConfig(request_router_class=FewestRequests),
        max_ongoing_requests=flags["connections"],
        max_queued_requests=flags["connections"],
        graceful_shutdown_timeout_s=flags["drain"],
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,
    )


def _port(host: str, port: int) -> int:
    """A port that is free, for 0 any."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as place:
            return place.getsockname()[1]
    except OSError:
        raise Mgp5Error(f"cannot listen at {host} port {port}", "choose another --port or --host") from None


def _shown(flags: dict[str, Any]) -> str:
    return f"[{flags['host']}]:{flags['port']}" if ":" in flags["host"] else f"{flags['host']}:{flags['port']}"


def _wait() -> bool:
    """Until SIGTERM or SIGINT; whether it was the second. The next one ends the process at once."""
    came, told = threading.Event(), []

    def end(number: int, _: Any) -> None:
        told.append(number)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.default_int_handler)
        came.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, end)
    came.wait()
    return told[0] == signal.SIGINT


def _end(seconds: float) -> None:
    """Take no more, let replicas finish, then stop Ray Serve. Its proxy goes last: replies pass through it."""
    if NAME in serve.status().applications:
        serve.delete(NAME, _blocking=False)
    deadline = time.monotonic() + seconds + 10
    while NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
    serve.shutdown()
