"""Micro-benchmark of every kernel at the shapes of SD 2.1 and SD 3: PyTorch, torch.compile, Triton, and a plain copy.

`mgp5 bench --suite kernels` shows the rows. All of these operations move bytes: a row therefore tells
how many it must move at least, how fast that went, and what share this is of a large copy timed in the same run. On a
GPU, times are of replays of a CUDA graph over so many sets of tensors that the L2 cache cannot hold them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .registry import implementations

CACHE = 256 * 2**20  # bytes that the sets of tensors fill together: several times the L2 cache of any card
SMALL = 4 * 2**20  # bytes of the largest case that is timed on a CPU
REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation at one size.

    Args:
        make: (device, dtype) -> its arguments.
        written: indices of arguments that it writes; its results count as well.
    """

    operation: str
    size: str
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    written: tuple[int, ...] = ()


def cases(pixels: int) -> Iterator[Case]:
    """The operations of a guided step (batch 2) of SD 2.1 at 512 or 768 pixels, and of SD 3 at 1024."""

    def random(*shape: int) -> Callable[[torch.device, torch.dtype], Tensor]:
        return lambda device, dtype: _random(*shape).to(device, dtype)

    side = pixels // 8
    for channels, scale in ((320, 1), (640, 2), (1280, 4), (1280, 8), (1920, 2), (2560, 4), (960, 1)):
        yield Case(
            operation="group_norm",
            size=f"{channels}x{side // scale}x{side // scale}",
            make=_norm(channels, side // scale),
        )
    for width, scale in ((320, 1), (640, 2), (1280, 4)):
        tokens = (side // scale) ** 2
        x, wide, weight = random(2, tokens, width), random(2, tokens, 8 * width), random(width)
        yield Case(operation="geglu", size=f"{2 * tokens}x{8 * width}", make=lambda *on, wide=wide: (wide(*on),))
        yield Case(
            operation="add_layer_norm",
            size=f"{2 * tokens}x{width}",
            make=lambda *on, x=x, w=weight: (x(*on), x(*on), w(*on), w(*on), 1e-5),
        )
    yield Case(operation="guided_step", size=f"4x{side}x{side}", make=_step(side), written=(0, 1, 3))
    x, row, heads = random(2, 4096, 1536), random(2, 1536), random(2, 4096, 24, 64)
    yield Case(operation="adaln", size="8192x1536", make=lambda *on: (x(*on), row(*on), row(*on), 1e-6))
    yield Case(
        operation="gated_adaln", size="8192x1536", make=lambda *on: (x(*on), x(*on), row(*on), row(*on), row(*on), 1e-6)
    )
    weight = random(64)
    yield Case(
        operation="rms_norm",
        size="196608x64",
        make=lambda *on: (heads(*on), heads(*on), weight(*on), weight(*on), 1e-6),
    )


def rows(device: torch.device, dtype: torch.dtype, pixels: tuple[int, ...] = (512, 768)) -> Iterator[dict[str, Any]]:
    """Time every case by every provider that runs here; a row for each, in microseconds."""
    copy = copy_bandwidth(device)
    seen = set()
    for case in (case for size in pixels for case in cases(size)):
        sets = [case.make(device, dtype)]
        moved = _bytes(case, sets[0])
        if (case.operation, case.size) in seen or (device.type == "cpu" and moved > SMALL):
            continue
        seen.add((case.operation, case.size))
        count = 1 if device.type == "cpu" else max(1, min(64, CACHE // moved))
        sets += [tuple(x.clone() if isinstance(x, Tensor) else x for x in sets[0]) for _ in range(count - 1)]
        for provider, function in _providers(case.operation, device, dtype):
            row = {"name": case.operation, "size": f"{case.size} {str(dtype).removeprefix('torch.')}"}
            row["provider"] = provider
            try:
                low, median, high = timed(function, sets, device)
            except Exception as error:  # the others go on
                yield row | {"skipped": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
                continue
            rate = moved / median / 1e3
            yield row | {
                "median": round(median, 2),
                "p20": round(low, 2),
                "p80": round(high, 2),
                "unit": "us",
                "gb_per_s": round(rate, 1),
                "share_of_copy": round(rate / copy, 3),
            }


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy too large for any cache, bytes read and written."""
    source = torch.ones((2**30 if device.type == "cuda" else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    _, median, _ = timed(lambda: target.copy_(source), [()], device)
    return 2 * source.nbytes / median / 1e3


def _providers(operation: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any]]]:
    triton, reference = implementations(operation)
    yield "eager", reference.load()
    torch._dynamo.reset()  # each size is compiled for itself, without the shapes before it
    yield "compile", torch.compile(reference.load(), dynamic=False)
    if not triton.refusal(device, dtype, 0):
        yield "triton", triton.load()


def timed(
    function: Callable[..., Any], sets: list[tuple[Any, ...]], device: torch.device
) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile of a call, in microseconds."""
    for _ in range(3):  # compiles, and warms up
        function(*sets[0])
    call = (lambda: [function(*each) for each in sets]) if device.type == "cpu" else _graph(function, sets)
    times = []
    for _ in range(REPEATS):
        if device.type == "cpu":
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start) / len(sets))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(sets))
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, median, high


def _graph(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[], None]:
    """All calls as one CUDA graph, so that no launch from Python is timed."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for each in sets:
            function(*each)
    graph.replay()
    return graph.replay


def _bytes(case: Case, arguments: tuple[Any, ...]) -> int:
    """The least that must move: every argument read once, every result written once."""
    results = implementations(case.operation)[-1].load()(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    moved = [*arguments, *results, *(arguments[i] for i in case.written)]
    return sum(x.nbytes for x in moved if isinstance(x, Tensor))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _norm(channels: int, side: int) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = _random(2, channels, side, side).to(device, dtype, memory_format=torch.channels_last)
        weight, bias, time = _random(4, channels).to(device, dtype).split([1, 1, 2])
        return x, weight[0], bias[0], 32, 1e-5, True, time

    return make


def _step(side: int) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    """DPM-Solver++ 2M: one prediction is kept. There are more rows than the benchmark makes steps."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = _random(2, 4, side, side).to(device, dtype, memory_format=torch.channels_last)
        latents = _random(1, 4, side, side).to(device)
        rows = torch.tensor([7.5, 0.0, 1.0, -0.1, 0.9, 0.1, 0.05], device=device).repeat(1000, 1)
        step = torch.zeros(2, dtype=torch.int32, device=device)
        return latents, latents[None].clone(), step, x, x.clone(), rows, False

    return make
