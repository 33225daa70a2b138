"""Use more than one machine by Ray: a cluster that runs already, or one of this machine alone."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ...errors import Mgp5Error
from ...hub import local_names
from ...options import ModelRequest

NEW = "local"  # address that stands for RAY_ADDRESS or, without it, for a new cluster that ends with this process
STORE = 256 * 2**20  # bytes of a new cluster's object store: it holds replies until they are read


def needs_ray() -> None:
    """Raise Mgp5Error where Ray is not installed."""
    if find_spec("ray") is None:
        raise Mgp5Error("--ray needs ray", "pip install 'mgp5[ray]'")


@contextlib.contextmanager
def connected(address: str) -> Iterator[bool]:
    """Connect to the cluster at an address, and yield whether it is a new one, which asks for Ray's token.

    Ray would put the current folder before the installed packages of its workers, so that it is started from the root
    of the file system. Raises Mgp5Error if Ray is not installed, or there is no cluster.
    """
    needs_ray()
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):  # workers run as fast as other processes
        os.environ.setdefault(name, "0")
    import ray

    address = os.environ.get("RAY_ADDRESS", NEW) if address == NEW else address
    settings = {"object_store_memory": STORE, "include_dashboard": False} if address == NEW else {}
    try:
        with contextlib.chdir(Path.cwd().anchor):
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **settings)
    except Exception as error:  # Ray raises plain exceptions too
        reason = str(error).strip().partition("\n")[0]
        hint = "is the machine too busy?" if address == NEW else "start it with: ray start --head"
        raise Mgp5Error(f"no Ray cluster at {address} ({reason})", hint) from error
    try:
        yield address == NEW
    finally:
        ray.shutdown()


def resources(workers: int | None, device: str) -> tuple[int, int, dict[str, float]]:
    """Return how many workers the cluster has room for, how many to start, and the resources of each.

    A worker takes a GPU. Where there is none, or `device` is "cpu", there is one worker for each machine, or the number
    wanted share the cores out evenly. Raises Mgp5Error if no machine of the cluster has cores.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise Mgp5Error("the Ray cluster has no cores to run on", "add a machine: ray start --address ...")
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return gpus, workers or gpus, {"num_gpus": 1, "num_cpus": 1}
    count = workers or len(nodes)
    cores = min(node["CPU"] for node in nodes) / math.ceil(count / len(nodes))
    return count, count, {"num_cpus": math.floor(cores) if cores >= 1 else math.floor(cores * 100) / 100}


def absolute(request: ModelRequest) -> ModelRequest:
    """Return a request that means the same in another folder, on any machine that has the same files."""

    def resolved(path: str) -> str:
        folder = Path(path).expanduser()
        return str(folder.resolve()) if path not in local_names() and folder.is_dir() else path

    model = resolved(request.model)
    if model == request.model:
        model = "+".join(map(resolved, model.split("+")))
    return replace(request, model=model, exported=request.exported and request.exported.resolve())
