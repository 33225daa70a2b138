"""Triton where it is installed: what kernels are written in, and how they become operators of PyTorch.

Without Triton this module still imports, and so do the kernels' PyTorch references; kernels are then never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.library import triton_op

try:
    import triton
    import triton.language as tl
except ImportError:  # the extra "triton" is not installed
    triton = tl = None

__all__ = ["as_rows", "ceil_div", "jit", "operator", "power_of_2", "tl", "triton"]


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where there is no Triton to run it."""
    return kernel if triton is None else triton.jit(kernel)


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Declare a function that launches kernels through `wrap_triton` as the operator `mgp5::name`.

    torch.compile looks into it, torch.export keeps it whole; traced on fake tensors it is its own shape rule. It has no
    backward. Without Triton it stays a plain function.
    """
    return lambda launch: launch if triton is None else triton_op(f"mgp5::{name}", launch, mutates_args=mutates)


def power_of_2(count: int) -> int:
    """The least power of two that is not below `count`: sides of a Triton tile are powers of two."""
    return 1 << (count - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def as_rows(x: Tensor) -> Tensor:  # (N, D)
    """Collapse all but the last axis, whose elements then lie side by side; copies only what lies otherwise."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
