"""The machine's own memory beside that of a GPU: what a run takes of it, and why one that cannot fit is not begun.

All weights are read into it before they go to a GPU, where bitsandbytes alone reads its layers to at once. Feature
caches are mapped files, whose pages the system takes back when it needs them: they are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..device import host_memory
from ..errors import Mgp5Error
from ..files import GiB

if TYPE_CHECKING:
    from ..hub import Parts

SURE = 8  # weights in files of an eighth of what is free fit in any precision, with all that they need
AHEAD = 2  # batches that a data worker makes before they are asked for; as DataLoader does


class HostNeeds(NamedTuple):
    """Bytes of the machine's memory that a run takes while weights are loaded, while it runs, and when it saves."""

    loading: float
    running: float = 0.0
    saving: float = 0.0

    @property
    def most(self) -> float:
        """The bytes at most."""
        return max(self)

    def times(self, processes: int) -> HostNeeds:
        """The bytes of as many processes on one machine, each of which loads and holds its own."""
        return HostNeeds(*(value * processes for value in self))

    def told(self) -> str:
        """The numbers in words."""
        known = {name: value for name, value in self._asdict().items() if value}
        return ", ".join(f"{value / GiB:.1f} GiB {name}" for name, value in known.items())


def surely_fits(parts: Parts) -> bool:
    """Return whether the files of all weights are so small that there is nothing to estimate."""
    folders = [Path(folder) for folder in (parts.mllm, parts.diffusion, parts.trained) if folder is not None]
    return all(folder.is_dir() for folder in folders) and SURE * sum(map(_size, folders)) < host_memory().free


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def loaded(weights: Iterable[tuple[str, float]], quantize: str, on_gpu: bool) -> float:
    """Return the bytes of the weights of parts that pass through the machine's memory."""
    return sum(size for part, size in weights if not (on_gpu and part == "LLM" and quantize in ("4bit", "8bit")))


def check_loading(needs: HostNeeds, name: str) -> None:
    """Raise Mgp5Error, with the numbers, where weights do not fit what is free of the machine's memory."""
    memory = host_memory()
    if needs.loading > memory.free:
        found = f"{name} takes {needs.loading / GiB:.1f} GiB of this machine's memory to load, and {memory.told}"
        raise Mgp5Error(found, "free some, raise the container's limit, or take a smaller model")
