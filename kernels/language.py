"""Triton, where it is installed, and what turns its kernels into operators of PyTorch.

This module and the PyTorch references can be imported without Triton; kernels are never run then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the extra "triton" is not installed
    triton = tl = None

__all__ = ["as_rows", "ceil_div", "dot_in_float32", "jit", "launcher", "operator", "power_of_2", "tl", "triton"]


def jit(kernel: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; return the function unchanged where Triton is not installed."""
    return kernel if triton is None else triton.jit(kernel)


def launcher(kernel: Any) -> Any:
    """Return the object whose `[grid](...)` launches a kernel, so that torch.compile sees what is launched.

    That is `torch.library.wrap_triton`; or the kernel itself under TRITON_INTERPRET=1: torch < 2.12 does not wrap it.
    """
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels through `launcher` as the operator `mgp5::name` (`triton_op`).

    torch.compile traces into it, torch.export keeps it as one node; run on fake tensors, it infers its own shapes. It
    has no backward. Without Triton it stays a plain function.
    """
    return lambda launch: launch if triton is None else triton_op(f"mgp5::{name}", launch, mutates_args=mutates)


def dot_in_float32(dtype: torch.dtype) -> bool:
    """Return whether kernels must multiply tiles of this dtype in float32: bfloat16 before Ampere and interpreted."""
    return dtype == torch.bfloat16 and (triton.knobs.runtime.interpret or before_ampere())


def before_ampere() -> bool:
    """Return whether kernels are for a card older than Ampere, where Triton multiplies tiles without tensor cores."""
    if triton.knobs.runtime.interpret:
        return False
    arch = triton.runtime.driver.active.get_current_target().arch
    return isinstance(arch, int) and arch < 80  # a name on AMD's cards


def power_of_2(count: int) -> int:
    """Return the smallest power of two >= `count`: the sides of a Triton tile are powers of two."""
    return 1 << (count - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """Return the number of blocks of `size` that cover `count`."""
    return -(-count // size)


def as_rows(x: Tensor) -> Tensor:  # (N, D)
    """Flatten all but the last axis, whose stride is 1 then; copy only where that is necessary."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
