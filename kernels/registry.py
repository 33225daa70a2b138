"""Selects between the implementations of each fused operation of the guided denoising step, of heads and of decoding.

Every operation has a PyTorch reference (its specification, the fallback and the oracle of the tests) and a Triton
kernel, both in one file; one has a prebuilt kernel of Hugging Face's too. MGP5_KERNELS=auto|triton|hub|torch selects
between them, where an operation has it: `auto` takes the first that can run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..errors import Mgp5Error

VARIABLE = "MGP5_KERNELS"
OLDEST = (7, 5)  # the lowest compute capability that kernels are compiled and tested for
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Operation -> its file, and the widest row (of layer norm, a head, a group) that its kernel holds in registers.
OPERATIONS: dict[str, tuple[str, int | None]] = {
    "guided_step": ("guided_step", None),
    "group_norm": ("group_norm", 1024),
    "sum_group_norm": ("group_norm", 1024),
    "sum_map": ("sum_map", None),
    "geglu": ("geglu", None),
    "layer_norm": ("layer_norm", 16384),
    "add_layer_norm": ("layer_norm", 16384),
    "adaln": ("adaln", 16384),
    "gated_adaln": ("adaln", 16384),
    "rms_norm": ("rms_norm", 4096),
    "deformable": ("deformable", 256),
    "row_norm": ("row_linear", 16384),
    "row_linear": ("row_linear", 16384),
    "rotary_cache": ("token_attention", 256),
    "token_attention": ("token_attention", 256),
}


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of an operation."""

    name: str  # "triton", "hub" or "torch"
    refusal: Callable[[torch.device, torch.dtype, int], str]  # (device, dtype, width) -> why it cannot run there, or ""
    load: Callable[[], Callable[..., Any]]  # imports its file and returns the function


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation that was selected for an operation, why, and its function."""

    operation: str
    implementation: str
    why: str
    function: Callable[..., Any]


def implementations(operation: str) -> tuple[Implementation, ...]:
    """Return all implementations of an operation, the fastest first; the last is its reference."""
    file, limit = OPERATIONS[operation]

    def load(name: str) -> Callable[[], Callable[..., Any]]:
        return lambda: getattr(import_module(f".{file}", __package__), name)

    def refusal(device: torch.device, dtype: torch.dtype, width: int) -> str:
        if limit is not None and width > limit:
            return f"{width} wide, the kernel takes at most {limit}"
        return _triton_refusal(device, dtype)

    own = Implementation(name="triton", refusal=refusal, load=load(operation))
    reference = Implementation(name="torch", refusal=lambda *_: "", load=load(f"{operation}_reference"))
    if operation != "deformable":
        return own, reference
    from . import hub_deformable as hub

    def hub_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str:
        return hub.refusal(device, dtype, reference.load())

    return own, Implementation(name="hub", refusal=hub_refusal, load=lambda: hub.deformable_hub), reference


def select_kernel(operation: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> Choice:
    """Select the implementation of an operation for a device and a dtype.

    `width` is that of a row, a head or a group, where the kernel has a limit; 0 is any usual one. Raises Mgp5Error if
    MGP5_KERNELS is unknown, or names an implementation that cannot run here.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    candidates = {candidate.name: candidate for candidate in implementations(operation)}
    if wanted not in ("auto", "triton", "hub", "torch"):
        raise Mgp5Error(f"{VARIABLE}={wanted}, expected auto, triton, hub or torch", "change it", usage=True)
    wanted = wanted if wanted in candidates else "auto"
    refusals: dict[str, str] = {}
    for name, candidate in candidates.items():
        if wanted in ("auto", name):
            refusals[name] = candidate.refusal(device, dtype, width)
            if not refusals[name]:
                break
    if refusals.get(wanted):
        raise Mgp5Error(
            f"{VARIABLE}={wanted}, but {operation} cannot run so ({refusals[wanted]})",
            f"take {VARIABLE}=auto",
            usage=True,
        )
    name = next(name for name, reason in refusals.items() if not reason)
    why = f"{VARIABLE}={wanted}" if wanted != "auto" else "; ".join(f"no {n}: {r}" for n, r in refusals.items() if r)
    why = why or "the fastest that runs here"
    return Choice(operation=operation, implementation=name, why=why, function=candidates[name].load())


def choices(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Return what `select_kernel` selects for every operation, as `mgp5 doctor` shows it."""
    single = {"deformable"}  # computes in float32 whatever the model
    return [select_kernel(name, device, torch.float32 if name in single else dtype) for name in OPERATIONS]


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Return why Triton kernels cannot run with a device and a dtype, "" where they can."""
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
    return _launch_refusal()


@cache
def _launch_refusal() -> str:
    """Return why Triton cannot launch kernels here, where it builds a little C code for it, or ""."""
    from . import language

    try:
        language.triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of a missing compiler or header, or of the driver: whatever it is, no kernel would run
        return f"Triton cannot launch kernels here ({' '.join(str(error).split())[:160] or type(error).__name__})"
    return ""
