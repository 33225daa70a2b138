"""Hugging Face's prebuilt kernel of deformable attention as a third implementation (extra `hub-kernels`).

`kernels.get_kernel` fetches it when it is first wanted: the CUDA operator of Deformable DETR, in float32. It is taken
only after its results were those of the reference on the device. It has no notion of images: theirs are more levels.

Letters: see `deformable`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

REPOSITORY, VERSION = "kernels-community/deformable-detr", 1
STEP = 64  # samples of a batch that one launch takes, which must divide their number


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.step = inputs
        ctx.module = module
        ctx.save_for_backward(*tensors)
        return module.ms_deform_attn_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), ctx.step)
        return None, grads[0], None, None, grads[1], grads[2], None


@torch.compiler.disable
def deformable_hub(
    value: Tensor,  # (B, N, S, H, E)
    locations: Tensor,  # (B, T, N, H, L, K, 2)
    weights: Tensor,  # (B, T, N, H, L, K)
    shapes: list[int],
    module: Any = None,  # the kernel; None: fetched
) -> Tensor:  # (B, T, H E)
    """Run `deformable_reference` by the prebuilt kernel."""
    images = value.shape[1]
    sizes = torch.tensor(shapes, device=value.device).view(-1, 2).repeat(images, 1)  # (N L, 2)
    first = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    places = locations.transpose(2, 3).flatten(3, 4).contiguous()  # (B, T, H, N L, K, 2)
    gains = weights.transpose(2, 3).flatten(3, 4).contiguous()
    step = next(step for step in range(min(STEP, len(value)), 0, -1) if len(value) % step == 0)
    inputs = value.flatten(1, 2).contiguous(), sizes, first, places, gains, step
    return _Attention.apply(module or _fetched(), *inputs)


def refusal(device: torch.device, dtype: torch.dtype, reference: Callable[..., Tensor]) -> str:
    """Return why the kernel cannot be taken there, or ""."""
    found = find_spec("kernels")
    if found is None or found.origin is None:  # a folder of this name is no library
        return "the library kernels is not installed: pip install 'mgp5[hub-kernels]'"
    if device.type != "cuda" or dtype != torch.float32:
        return f"it needs a GPU and float32, not {device.type} and {str(dtype).removeprefix('torch.')}"
    return _trial(device, reference)


@cache
def _fetched() -> Any:
    from kernels import get_kernel

    return get_kernel(REPOSITORY, version=VERSION)


@cache
def _trial(device: torch.device, reference: Callable[..., Tensor]) -> str:
    try:
        return "" if exact(_fetched(), device, reference) else "its results are not those of the reference"
    except Exception as error:  # of the hub, a build for another torch or card: whatever it is, there is no kernel
        return f"it cannot be loaded ({' '.join(str(error).split())[:160] or type(error).__name__})"


@torch.inference_mode(False)  # a reply, which may be the first to ask, is made in inference mode
@torch.enable_grad()
def exact(module: Any, device: torch.device, reference: Callable[..., Tensor]) -> bool:
    """Return whether results and gradients of a kernel are those of the reference, on inputs that leave the image."""
    shapes, rng = [4, 4, 2, 2], torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=rng).to(device).requires_grad_()

    inputs = draw(2, 3, 20, 2, 8), draw(2, 5, 3, 2, 2, 4, 2), draw(2, 5, 3, 2, 2, 4)
    found = []
    for attend in (partial(deformable_hub, module=module), reference):
        out = attend(inputs[0], 1.4 * inputs[1] - 0.2, inputs[2], shapes)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(*found, strict=True))
