"""The part of a guided denoising step after the model: guidance, sampler update and next model input, in one launch.

Letters: B batch; C, h and w channels, height and width of the latents; n model calls; K predictions kept.

All values that change from step to step are on the device, in buffers that keep their addresses. One CUDA graph of a
step can therefore be replayed for every step; a new guidance scale or sampler table is copied into `rows`. The kernel
increments the step index itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, tl

BLOCK = 512  # latents are small (64 KB at 512 pixels): many small programs reach more multiprocessors


def step_rows(coefficients: Tensor, conversion: Tensor, guidance: float) -> Tensor:  # (n, 2 + K), (n, 2): (n, 5 + K)
    """Return what the step reads of a sampler table, in float64 on the CPU: guidance, d0, d1, c0, c1, ... a model call.
    c are the coefficients of the table, d its conversion; (0, 0), which keeps the prediction, becomes (0, 1)."""
    conversion = conversion.clone()
    conversion[~conversion.any(dim=1), 1] = 1.0
    scale = conversion.new_tensor([guidance]).expand(len(conversion), 1)
    return torch.cat([scale, conversion, coefficients], dim=1)


def guided_step_reference(
    latents: Tensor,  # (B, C, h, w)
    history: Tensor,  # (K, B, C, h, w)
    step: Tensor,  # (2)
    model_input: Tensor,  # (B or 2B, C, h, w)
    prediction: Tensor,  # (B or 2B, C, h, w)
    rows: Tensor,  # (n, 5 + K)
) -> None:
    """Do what `generators.denoising.linear_update` does, in place and without a synchronization with the device.

    Args:
        latents: become those of the next step.
        history: a ring buffer; what step i keeps goes to i mod K. Its contents before the first step do not matter.
        step: int32; index of the present row, initially 0, and a counter that is 0 between launches.
        model_input: receives the new latents in its own dtype, once for each half of the guidance batch.
        prediction: the unconditional half first, where there are two halves.
        rows: `step_rows`, in the dtype of the latents.
    """
    row = rows.index_select(0, step[:1])[0]
    keeps, prediction = len(history), prediction.to(latents.dtype)
    if len(prediction) == 2 * len(latents):
        prediction = torch.lerp(*prediction.chunk(2), row[0])
    updated = row[3] * latents + row[4] * prediction
    for k in range(keeps):
        past = history.index_select(0, (step[:1] + (keeps - 1 - k)) % keeps)[0]
        updated = updated + torch.where(row[5 + k] == 0, 0, row[5 + k] * past)
    if keeps:
        history.index_copy_(0, (step[:1] % keeps).long(), (row[1] * latents + row[2] * prediction)[None])
    latents.copy_(updated)
    model_input.copy_(updated.repeat(len(model_input) // len(latents), *[1] * (latents.ndim - 1)))
    step[:1] += 1


@jit
def _guide(prediction, half, guidance, mask):
    """Return the guided prediction of both halves, computed as torch.lerp does."""
    unconditional = tl.load(prediction, mask=mask, other=0.0).to(tl.float32)
    conditional = tl.load(prediction + half, mask=mask, other=0.0).to(tl.float32)
    change = conditional - unconditional
    return tl.where(guidance < 0.5, unconditional + guidance * change, conditional - change * (1.0 - guidance))


@jit
def _guided_step(
    latents, history, step, model_input, prediction, rows, size, pixels,
    p_b, p_c, p_s, half, i_b, i_c, i_s, copy, K: tl.constexpr,
    GUIDED: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, images = tl.program_id(1), tl.num_programs(1)
    index = tl.load(step)
    row = rows + index * (5 + K)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    channel, pixel = element // pixels, element % pixels
    place = prediction + image * p_b + channel * p_c + pixel * p_s
    if GUIDED:  # noqa: SIM108  Triton compiles the branch that a constant selects, not both arms of an expression
        guess = _guide(place, half, tl.load(row), mask)
    else:
        guess = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    own = image * size + element
    x = tl.load(latents + own, mask=mask, other=0.0)
    updated = tl.load(row + 3) * x + tl.load(row + 4) * guess
    for k in tl.static_range(K):
        weight = tl.load(row + 5 + k)
        slot = history + (index + K - 1 - k) % K * images * size
        # Where the weight is zero the slot may never have been written: zero times that could be NaN.
        written = element < tl.where(weight == 0.0, 0, size)
        updated += weight * tl.load(slot + own, mask=written, other=0.0)
    tl.debug_barrier()  # all threads have read the index and the oldest slot, which is overwritten now
    if K > 0:
        tl.store(history + index % K * images * size + own, tl.load(row + 1) * x + tl.load(row + 2) * guess, mask=mask)
    tl.store(latents + own, updated, mask=mask)
    for half_index in tl.static_range(COPIES):
        place = model_input + half_index * copy + image * i_b + channel * i_c + pixel * i_s
        tl.store(place, updated.to(model_input.dtype.element_ty), mask=mask)
    programs = tl.num_programs(0) * images
    if tl.atomic_add(step + 1, 1) == programs - 1:  # the last program to read the index moves it on
        tl.store(step, index + 1)
        tl.store(step + 1, 0)


@operator("guided_step", mutates=("latents", "history", "step", "model_input"))
def guided_step(
    latents: Tensor,  # (B, C, h, w)
    history: Tensor,  # (K, B, C, h, w)
    step: Tensor,  # (2)
    model_input: Tensor,  # (B or 2B, C, h, w)
    prediction: Tensor,  # (B or 2B, C, h, w)
    rows: Tensor,  # (n, 5 + K)
) -> None:
    """Run `guided_step_reference` as one Triton kernel.

    The model input and the prediction may be contiguous or channels-last. Raises ValueError if latents, history or rows
    are not contiguous float32, or pixels of a map are not evenly spaced.
    """
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (latents, history, rows)):
        raise ValueError("latents, history and rows of a guided step: expected contiguous float32")
    batch, size = len(latents), latents[0].numel()
    pixels = latents.shape[2] * latents.shape[3]
    guided, strides = len(prediction) == 2 * batch, _map_strides(prediction)
    half = batch * strides[0]
    places = _map_strides(model_input)
    launcher(_guided_step)[(ceil_div(size, BLOCK), batch)](
        latents, history, step, model_input, prediction, rows, size, pixels,
        *strides, half, *places, batch * places[0], K=len(history),
        GUIDED=guided, COPIES=len(model_input) // batch, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def _map_strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of image, channel and pixel of feature maps (B, C, h, w)."""
    image, channel, line, pixel = x.stride()
    if x.shape[3] == 1:
        pixel = line  # a width of 1 leaves its own stride open
    elif x.shape[2] > 1 and line != x.shape[3] * pixel:
        raise ValueError(f"maps of shape {tuple(x.shape)} and strides {x.stride()}: expected evenly spaced pixels")
    return image, channel, pixel
