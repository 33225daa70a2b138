"""Device and dtype of the computation, CUDA graphs, facts of this machine, the user's cache folder, the log level of
libraries."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import Mgp5Error
from .files import GiB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("mgp5", "torch", "transformers", "diffusers", "accelerate", "peft")
OPTIONAL_PACKAGES = ("triton", "bitsandbytes", "onnxruntime", "tensorrt")
GROUP_FILES = ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")  # of cgroups
SMALL = 100_000_000  # parameters; the operations of smaller models are too short to share between CPU threads


def pick_device(name: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of weights: float32 on a CPU, bfloat16 (float16 on older cards) on a GPU.
    `name` is "auto", "cpu", "cuda" or "cuda:N". Raises Mgp5Error for another one, or one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Mgp5Error(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N", usage=True) from None
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise Mgp5Error(f"there is no device {name} here", "use --device cpu", usage=True)
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return device, torch.float32


def launched() -> bool:
    """Return whether this is one of the processes of a launcher such as torchrun."""
    return "LOCAL_RANK" in os.environ


def check_launched(device: str) -> None:
    """Raise Mgp5Error (wrong usage) if a launcher shares out the GPUs, and the user names one."""
    if launched() and device not in ("auto", "cpu"):
        raise Mgp5Error(f"--device {device} under a launcher", "leave it out: every process takes a GPU", usage=True)


def pick_precision(precision: str, device: torch.device) -> str:
    """Return the key of DTYPES to train in; "auto" is bf16, but fp32 on a CPU that can only emulate bf16."""
    if precision != "auto":
        return precision
    return "bf16" if device.type != "cpu" or torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def record(
    work: Callable[[], Any], pool: Any, before: Callable[[], Any] = lambda: None
) -> tuple[Callable[[], None], Any]:
    """Record work as a CUDA graph; return what replays it, and what it returned, which a replay writes anew.

    First it runs on another stream, where compilers and libraries choose their kernels, each time after `before`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            before()
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, pool=pool):
        outputs = work()
    return graph.replay, outputs


def user_cache() -> Path:
    """Return the folder for files that can be computed again, $XDG_CACHE_HOME/mgp5."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgp5"


def quiet_libraries() -> None:
    """Turn off progress bars, advice and FutureWarnings of transformers, diffusers and the hub."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it warns of a kernel that it does not need
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging
    from huggingface_hub.utils import disable_progress_bars

    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    for library in (transformers_logging, diffusers_logging, hub_logging):  # the hub logs every retry
        library.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # about calls between libraries
    warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter")  # a test checks that it merges


def limit_threads_for_small_models(model: torch.nn.Module) -> None:
    """Run a model of less than SMALL parameters on one CPU thread, unless OMP_NUM_THREADS is set.

    More threads gain the demo little on an idle machine, and make it ten times slower on a busy one, where OpenMP
    threads spin while they wait for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)


class HostMemory(NamedTuple):
    """Bytes of the machine's memory that this process may have, and that are free of it."""

    total: int
    free: int
    limited: bool  # by a container

    @property
    def told(self) -> str:
        """The numbers in words."""
        whose = "the container may have" if self.limited else "there are"
        return f"{self.free / GiB:.1f} GiB are free of the {self.total / GiB:.1f} that {whose}"


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Return the machine's memory, at most what cgroups (version 1 or 2) allow; what the system can take back from
    files is free. `root` is where proc and sys lie."""
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", _read(root / "proc/meminfo")))
    total, free = (int(sizes.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limited = False
    for group in _memory_groups(root):
        limit, used = (_read(group / name[0]) or _read(group / name[1]) for name in GROUP_FILES)
        if limit.strip().isdigit() and used and (most := int(limit)) < total:
            files = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)))
            total, free, limited = most, min(free, max(0, most - int(used) + files)), True
    return HostMemory(total, free, limited)


def _memory_groups(root: Path) -> list[Path]:
    """Return the folders of the cgroups of this process that may limit its memory, the outermost first."""
    folders = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has one tree for all
            top = root / "sys/fs/cgroup" / controllers
            inner = top / path.strip("/")
            # a container sees its own group as the top, under the path that it has outside
            folders |= dict.fromkeys([top, *(each for each in reversed(inner.parents) if top in each.parents), inner])
    return list(folders)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    """Return processor, cores, memory in GiB, and the GPU if there is one."""
    result: dict[str, Any] = {"system": platform.platform(), "python": platform.python_version()}
    result |= {"cpu": _field("/proc/cpuinfo", r"model name\s*: (.+)") or platform.machine(), "cores": os.cpu_count()}
    memory = host_memory()
    sizes = {"memory_gib": memory.total, "free_memory_gib": memory.free}
    result |= {name: round(size / GiB, 1) for name, size in sizes.items() if memory.total}
    if driver := _field("/proc/driver/nvidia/version", r"Module\b.*?\s(\d+\.\d+[\d.]*)"):
        result["driver"] = driver
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        result |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
        result["gpu_gib"] = round(card.total_memory / GiB, 1)
    return result


def versions() -> dict[str, str | None]:
    """Return the version of each library; None for an optional one that is not installed."""
    result: dict[str, str | None] = {}
    for name in PACKAGES + OPTIONAL_PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = None
    return result


def _field(path: str, pattern: str) -> str | None:
    """Return the first match in a file of the system, None where there is none."""
    file = Path(path)
    match = re.search(pattern, file.read_text()) if file.is_file() else None
    return match and match[1].strip()
