"""More than one machine, by Ray: a cluster that runs, or one of this machine alone."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import Mgp5Error

OWN = "local"  # the address of a cluster that is started, and ends with this process
STORE = 256 * 2**20  # bytes of its object store: what workers have said until it is read


def needs_ray() -> None:
    """Raise Mgp5Error where Ray is not installed."""
    if find_spec("ray") is None:
        raise Mgp5Error("--ray needs ray", "pip install 'mgp5[ray]'")


@contextlib.contextmanager
def connected(address: str) -> Iterator[bool]:
    """Be part of the cluster at an address; for `OWN` of that in RAY_ADDRESS, or else of a new one.

    A new cluster has no dashboard and asks for Ray's token. Workers do not see the folder that this process is in: Ray
    would put it before the installed packages. Yields whether the cluster is new.

    Raises Mgp5Error without Ray, or without the cluster.
    """
    needs_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a new cluster: as fast as without it
    import ray

    address = os.environ.get("RAY_ADDRESS", OWN) if address == OWN else address
    new = {"object_store_memory": STORE, "include_dashboard": False}
    try:
        with contextlib.chdir(Path.cwd().anchor):
            quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
            ray.init(address, **quiet, **(new if address == OWN else {}))
    except Exception as error:  # Ray raises plain ones too
        why = str(error).strip().partition("\n")[0]
        hint = "is the machine too busy?" if address == OWN else "start it with: ray start --head"
        raise Mgp5Error(f"no Ray cluster at {address} ({why})", hint) from error
    try:
        yield address == OWN
    finally:
        ray.shutdown()


def resources(workers: int | None, device: str) -> tuple[int, int, dict[str, Any]]:
    """How many workers the cluster has room for, how many are wanted, and what each takes of it.

    A worker takes a GPU. Where there is none, or `device` is "cpu", there is one for each machine, or the cores of a
    machine are shared out evenly.

    Args:
        workers: that are wanted; None: as many as there is room for.
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


def absolute(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that mean the same in another folder of any machine that has the same files."""

    def place(path: str) -> str:
        folder = Path(path).expanduser()
        return str(folder.resolve()) if path != "demo" and folder.is_dir() else path

    whole = place(flags["model"])
    model = "+".join(map(place, whole.split("+"))) if whole == flags["model"] else whole
    return flags | {"model": model, "exported": flags["exported"] and Path(flags["exported"]).resolve()}
