"""Fused kernels of the guided denoising step: which implementation of an operation runs where, and why.

Every operation has a PyTorch reference (its specification, the fallback and the tests' oracle) and a Triton kernel, in
a file of its own. MGP5_KERNELS=auto|triton|torch decides between them: `auto` takes the first that can run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..errors import Mgp5Error

VARIABLE = "MGP5_KERNELS"
OLDEST = (7, 5)  # compute capability
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Operation -> its file, and the widest row (of layer norm, a head, a group) that its kernel holds in registers.
OPERATIONS: dict[str, tuple[str, int | None]] = {
    "guided_step": ("guided_step", None),
    "group_norm": ("group_norm", 1024),
    "geglu": ("geglu", None),
    "add_layer_norm": ("layer_norm", 16384),
    "adaln": ("adaln", 16384),
    "gated_adaln": ("adaln", 16384),
    "rms_norm": ("rms_norm", 4096),
}


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to do an operation.

    Args:
        name: "triton" or "torch".
        priority: of those that can run, the highest is taken.
        refusal: (device, dtype, width) -> why it cannot run there, or "" where it can.
        load: gives the function; imports its file.
    """

    name: str
    priority: int
    refusal: Callable[[torch.device, torch.dtype, int], str]
    load: Callable[[], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for an operation, and why; `function` does it."""

    operation: str
    implementation: str
    why: str
    function: Callable[..., Any]


def implementations(operation: str) -> tuple[Implementation, ...]:
    """All ways to do an operation, the best first."""
    file, limit = OPERATIONS[operation]

    def load(name: str) -> Callable[[], Callable[..., Any]]:
        return lambda: getattr(import_module(f".{file}", __package__), name)

    def refusal(device: torch.device, dtype: torch.dtype, width: int) -> str:
        if limit is not None and width > limit:
            return f"{width} wide, the kernel takes at most {limit}"
        return _triton_refusal(device, dtype)

    return (
        Implementation(name="triton", priority=10, refusal=refusal, load=load(operation)),
        Implementation(name="torch", priority=0, refusal=lambda *_: "", load=load(f"{operation}_reference")),
    )


def select_kernel(operation: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> Choice:
    """Choose an implementation, once, for tensors of one device and type; not to be called in every step.

    Args:
        operation: a key of OPERATIONS.
        dtype: of the model (for the guided step, of its input).
        width: of a row, a head or a group, where it matters; 0 means any usual one.

    Raises:
        Mgp5Error: MGP5_KERNELS is unknown, or names an implementation that cannot run here.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    ways = sorted(implementations(operation), key=lambda way: -way.priority)
    if wanted not in ("auto", *(way.name for way in ways)):
        raise Mgp5Error(f"{VARIABLE}={wanted}, expected auto, triton or torch", "change it", usage=True)
    refusals = {way.name: way.refusal(device, dtype, width) for way in ways}
    if refusals.get(wanted):
        raise Mgp5Error(
            f"{VARIABLE}={wanted}, but {operation} cannot run so ({refusals[wanted]})",
            f"take {VARIABLE}=auto",
            usage=True,
        )
    way = next(way for way in ways if wanted in ("auto", way.name) and not refusals[way.name])
    why = f"{VARIABLE}={wanted}" if wanted != "auto" else "; ".join(f"no {n}: {r}" for n, r in refusals.items() if r)
    return Choice(
        operation=operation, implementation=way.name, why=why or "the fastest that runs here", function=way.load()
    )


def choices(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """What `select_kernel` gives for every operation, as `mgp5 doctor` shows it."""
    return [select_kernel(operation, device, dtype) for operation in OPERATIONS]


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str:
    from . import language

    if language.triton is None:
        return "Triton is not installed: pip install 'mgp5[triton]'"
    if dtype not in DTYPES:
        return f"no kernels for {str(dtype).removeprefix('torch.')}"
    if language.triton.knobs.runtime.interpret:  # TRITON_INTERPRET=1 runs kernels anywhere, slowly
        return ""
    if device.type != "cuda":
        return f"it needs a GPU, not a {device.type} device"
    if torch.version.cuda and (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        return "compute capability {}.{}, it needs {}.{}".format(*capability, *OLDEST)
    return ""
