"""A step of guided denoising behind the model: guidance, sampler update and the model's next input, in one launch.

Letters: B batch, C, h and w of the latents x, n model calls, K predictions kept, p the guided prediction.

All that changes from step to step lies on the device, in buffers that keep their addresses: so a CUDA graph of one step
replays for every step, and a new guidance scale or sampler table is a copy into `rows`. The kernel moves the step on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.library import wrap_triton

from .language import ceil_div, jit, operator, tl

if TYPE_CHECKING:
    from ..generators.sampler import SamplerTable

BLOCK = 512  # latents are small (64 KB at 512 pixels): many small programs reach more multiprocessors
REDUCE = 4096  # elements at a time of an image's standard deviation


def step_rows(table: SamplerTable, guidance: float, rescale: float = 0.0) -> Tensor:  # (n, 6 + K)
    """What the step reads of a table, in float64 on the CPU: guidance, rescale, d0, d1, c0, c1, ... of each model call.

    Args:
        table: c are its coefficients, d its conversion; (0, 0), which keeps the prediction, becomes (0, 1).
        guidance: scale of classifier-free guidance, 1 without.
        rescale: phi of Lin et al., arXiv 2305.08891, section 3.4; 0 leaves the guided prediction as it is.
    """
    conversion = table.conversion.clone()
    conversion[~conversion.any(dim=1), 1] = 1.0
    scales = conversion.new_tensor([guidance, rescale]).expand(len(table), 2)
    return torch.cat([scales, conversion, table.coefficients], dim=1)


def guided_step_reference(
    latents: Tensor,  # (B, C, h, w)
    history: Tensor,  # (K, B, C, h, w)
    step: Tensor,  # (2)
    model_input: Tensor,  # (B or 2B, C, h, w)
    prediction: Tensor,  # (B or 2B, C, h, w)
    rows: Tensor,  # (n, 6 + K)
    rescaled: bool = False,
) -> None:
    """`diffusion.sampler.linear_update`, in place and without waiting for the device.

    Args:
        latents: become those of the next step.
        history: a ring; what step i keeps goes to i mod K. What it holds before a sampling starts does not matter.
        step: int32; index of the present row, to begin with 0, and a counter that is 0 between launches.
        model_input: receives the new latents in its own type, once for each half of guidance that it has room for.
        prediction: the unconditional half first, where there are two halves.
        rows: `step_rows`, in the type of the latents.
        rescaled: whether `rows` asks for a guidance rescale; only with two halves.
    """
    row = rows.index_select(0, step[:1])[0]
    keeps, prediction = len(history), prediction.to(latents.dtype)
    if len(prediction) == 2 * len(latents):
        without, given = prediction.chunk(2)
        prediction = torch.lerp(without, given, row[0])
        if rescaled:
            axes = tuple(range(1, latents.ndim))
            ratio = given.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
            prediction = prediction * (1 + row[1] * (ratio - 1))
    updated = row[4] * latents + row[5] * prediction
    for k in range(keeps):
        past = history.index_select(0, (step[:1] + (keeps - 1 - k)) % keeps)[0]
        updated = updated + torch.where(row[6 + k] == 0, 0, row[6 + k] * past)
    if keeps:
        history.index_copy_(0, (step[:1] % keeps).long(), (row[2] * latents + row[3] * prediction)[None])
    latents.copy_(updated)
    model_input.copy_(updated.repeat(len(model_input) // len(latents), *[1] * (latents.ndim - 1)))
    step[:1] += 1


@jit
def _guide(prediction, half, guidance, mask):
    """Both halves of a prediction to the guided one, as torch.lerp does, and the conditional half."""
    without = tl.load(prediction, mask=mask, other=0.0).to(tl.float32)
    given = tl.load(prediction + half, mask=mask, other=0.0).to(tl.float32)
    change = given - without
    return tl.where(guidance < 0.5, without + guidance * change, given - change * (1.0 - guidance)), given


@jit
def _rescale_factor(
    prediction, rows, step, factor, size, pixels, p_b, p_c, p_s, half, COLUMNS: tl.constexpr, REDUCE: tl.constexpr
):
    """1 + phi (std of the conditional prediction / std of the guided one - 1), for each image; one program each."""
    image = tl.program_id(0)
    row = rows + tl.load(step) * COLUMNS
    guidance, phi = tl.load(row), tl.load(row + 1)
    guided_sum = tl.zeros((REDUCE,), tl.float32)
    given_sum = tl.zeros((REDUCE,), tl.float32)
    for start in range(0, size, REDUCE):
        element = start + tl.arange(0, REDUCE)
        place = prediction + image * p_b + element // pixels * p_c + element % pixels * p_s
        guided, given = _guide(place, half, guidance, element < size)
        guided_sum += guided
        given_sum += given
    guided_mean, given_mean = tl.sum(guided_sum, axis=0) / size, tl.sum(given_sum, axis=0) / size
    guided_sum = tl.zeros((REDUCE,), tl.float32)
    given_sum = tl.zeros((REDUCE,), tl.float32)
    for start in range(0, size, REDUCE):  # the second pass finds the image in the L2 cache
        element = start + tl.arange(0, REDUCE)
        mask = element < size
        place = prediction + image * p_b + element // pixels * p_c + element % pixels * p_s
        guided, given = _guide(place, half, guidance, mask)
        guided, given = tl.where(mask, guided - guided_mean, 0.0), tl.where(mask, given - given_mean, 0.0)
        guided_sum += guided * guided
        given_sum += given * given
    ratio = tl.sqrt(tl.sum(given_sum, axis=0) / tl.sum(guided_sum, axis=0))
    tl.store(factor + image, 1.0 + phi * (ratio - 1.0))


@jit
def _guided_step(
    latents, history, step, model_input, prediction, rows, factor, size, pixels,
    p_b, p_c, p_s, half, i_b, i_c, i_s, copy, K: tl.constexpr,
    GUIDED: tl.constexpr, RESCALED: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, images = tl.program_id(1), tl.num_programs(1)
    index = tl.load(step)
    row = rows + index * (6 + K)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    channel, pixel = element // pixels, element % pixels
    place = prediction + image * p_b + channel * p_c + pixel * p_s
    if GUIDED:
        guess, _ = _guide(place, half, tl.load(row), mask)
        if RESCALED:
            guess *= tl.load(factor + image)
    else:
        guess = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    own = image * size + element
    x = tl.load(latents + own, mask=mask, other=0.0)
    updated = tl.load(row + 4) * x + tl.load(row + 5) * guess
    for k in tl.static_range(K):
        weight = tl.load(row + 6 + k)
        slot = history + (index + K - 1 - k) % K * images * size
        # Where the weight is zero the slot may never have been written: zero times that could be NaN.
        written = element < tl.where(weight == 0.0, 0, size)
        updated += weight * tl.load(slot + own, mask=written, other=0.0)
    tl.debug_barrier()  # all threads have read the index and the oldest slot, which is overwritten now
    if K > 0:
        tl.store(history + index % K * images * size + own, tl.load(row + 2) * x + tl.load(row + 3) * guess, mask=mask)
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
    rows: Tensor,  # (n, 6 + K)
    rescaled: bool = False,
) -> None:
    """`guided_step_reference` by Triton: one launch, two with a rescale.

    The model's input and prediction may be contiguous or channels-last.

    Raises:
        ValueError: latents, history or rows are not contiguous float32, or the pixels of a map do not lie evenly.
    """
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (latents, history, rows)):
        raise ValueError("latents, history and rows of a guided step: expected contiguous float32")
    batch, size = len(latents), latents[0].numel()
    pixels = latents.shape[2] * latents.shape[3]
    guided, strides = len(prediction) == 2 * batch, _map_strides(prediction)
    half = batch * strides[0]
    factor = None
    if rescaled := rescaled and guided:
        factor = torch.empty(batch, device=latents.device, dtype=torch.float32)
        sizes = size, pixels, *strides, half
        wrap_triton(_rescale_factor)[(batch,)](
            prediction, rows, step, factor, *sizes, COLUMNS=rows.shape[1], REDUCE=REDUCE, num_warps=8
        )
    places = _map_strides(model_input)
    wrap_triton(_guided_step)[(ceil_div(size, BLOCK), batch)](
        latents, history, step, model_input, prediction, rows, factor, size, pixels,
        *strides, half, *places, batch * places[0], K=len(history),
        GUIDED=guided, RESCALED=rescaled, COPIES=len(model_input) // batch, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def _map_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of image, channel and pixel."""
    image, channel, line, pixel = x.stride()
    if x.shape[3] == 1:
        pixel = line  # a width of 1 leaves its own stride open
    elif x.shape[2] > 1 and line != x.shape[3] * pixel:
        raise ValueError(f"maps of shape {tuple(x.shape)} and strides {x.stride()}: expected evenly spaced pixels")
    return image, channel, pixel
