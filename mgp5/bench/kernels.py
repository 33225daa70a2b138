"""Time every fused kernel at the shapes of SD 2.1, SD 3 and MM-Interleaved: PyTorch, torch.compile, Triton.

All of these operations are bound by memory: a row therefore says how many bytes must be moved at least, at what rate,
and which share that is of a large copy. On a GPU, replays of a CUDA graph are timed, over so many sets of tensors that
the L2 cache cannot hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from ..kernels.registry import implementations
from .timing import Bench, Row, copy_bandwidth, percentiles, reason

CACHE = 256 * 2**20  # bytes that the sets of tensors fill together: several times the L2 cache of any card
SMALL = 4 * 2**20  # bytes of the largest case that is timed on a CPU
Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """An operation at one size; `make` returns its arguments for a device and a dtype."""

    operation: str
    size: str
    make: Make
    written: tuple[int, ...] = ()  # arguments that it writes to; its results count as well
    counter: int | None = None  # argument that counts the calls, and must not go beyond the rows of another


def cases(pixels: int) -> Iterator[Case]:
    """Yield the operations of a guided step (batch 2) of SD 2.1 at 512 or 768 pixels, and of SD 3 at 1024."""
    side = pixels // 8
    for channels, scale in ((320, 1), (640, 2), (1280, 4), (1280, 8), (1920, 2), (2560, 4), (960, 1)):
        size = side // scale
        yield Case("group_norm", f"{channels}x{size}x{size}", partial(_group_norm, channels, size))
        yield Case("sum_group_norm", f"{channels}x{size}x{size}", partial(_sum_group_norm, channels, size))
    for width, scale in ((320, 1), (640, 2), (1280, 4)):
        rows = 2 * (side // scale) ** 2
        yield Case("geglu", f"{rows}x{8 * width}", _random((rows, 8 * width)))
        shapes = (rows, width), (rows, width), (width,), (width,)
        yield Case("add_layer_norm", f"{rows}x{width}", _random(*shapes, eps=1e-5))
        yield Case("layer_norm", f"{rows}x{width}", _random(*shapes[1:], eps=1e-5))
    for channels, scale in ((1280, 4), (640, 2)):
        yield Case(
            "sum_map", f"{channels}x{side // scale}x{side // scale}", partial(_enlarged, channels, side // scale)
        )
    yield Case("guided_step", f"4x{side}x{side}", partial(_guided_step, side), written=(0, 1, 3), counter=2)
    hidden, row, heads = (2, 4096, 1536), (2, 1536), (2, 4096, 24, 64)
    yield Case("adaln", "8192x1536", _random(hidden, row, row, eps=1e-6))
    yield Case("gated_adaln", "8192x1536", _random(hidden, hidden, row, row, row, eps=1e-6))
    yield Case("rms_norm", "196608x64", _random(heads, heads, (64,), (64,), eps=1e-6))
    yield Case("deformable", "1024x3x16x4x8", _deformable)
    # Of LLaMA 7B, for one row and for eight: the products of a layer and of the LM head, and attention of 256 slots.
    for rows in (1, 8):
        for outputs, width in ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (32064, 4096)):
            yield Case("row_linear", f"{rows}x{width} to {outputs}", _random((rows, width), (outputs, width)))
        yield Case("row_norm", f"{rows}x4096", _random((rows, 4096), (4096,), eps=1e-5))
        yield Case("rotary_cache", f"{rows}x32x128", partial(_rotary_cache, rows), written=(3, 4))
        yield Case("token_attention", f"{rows}x32x256x128", partial(_token_attention, rows))


def kernel_rows(bench: Bench, pixels: tuple[int, ...] = (512, 768)) -> Iterator[Row]:
    """Time every case by every implementation that runs here; yield a row for each, in microseconds."""
    device, dtype, seen = bench.device, bench.dtype, set()
    copy = copy_bandwidth(device)
    for case in (case for size in pixels for case in cases(size)):
        arguments = case.make(device, dtype)
        moved = least_bytes(case, arguments)
        if (case.operation, case.size) in seen or (device.type == "cpu" and moved > SMALL):
            continue
        seen.add((case.operation, case.size))
        count = 1 if device.type == "cpu" else max(1, min(64, CACHE // moved))
        sets = [tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments) for _ in range(count)]
        for provider, function in _providers(case.operation, device, dtype):
            size = f"{case.size} {str(dtype).removeprefix('torch.')}"
            row = {"name": case.operation, "size": size, "provider": provider}
            bench.tell(f"{row['name']} {row['size']}: {provider}")
            try:
                microseconds = _measure(function, sets, [] if case.counter is None else [x[case.counter] for x in sets])
            except Exception as error:  # of a compiler: it is what the row says
                yield row | {"skipped": reason(error)}
                continue
            times = percentiles(microseconds)
            rate = moved / times["median"] / 1e3
            yield row | times | {"unit": "us", "gb_per_s": round(rate, 1), "share_of_copy": round(rate / copy, 3)}


def _providers(operation: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any]]]:
    triton, reference = implementations(operation)
    yield "eager", reference.load()
    torch._dynamo.reset()  # each size is compiled for itself, without the shapes before it
    yield "compile", torch.compile(reference.load(), dynamic=False)
    if not triton.refusal(device, dtype, 0):
        yield "triton", triton.load()


def _measure(function: Callable[..., Any], sets: list[tuple[Any, ...]], counters: list[Tensor]) -> list[float]:
    """Return microseconds of a call, in twenty measurements of ten rounds; counters start at 0 in each."""
    for _ in range(3):  # compiles, and warms up
        function(*sets[0])
    replay = _graph(function, sets) if sets[0][0].is_cuda else lambda: [function(*each) for each in sets]
    reset = "for counter in counters: counter.zero_()"
    timer = Timer("replay()", setup=reset, globals={"replay": replay, "counters": counters})
    return [1e6 * timer.timeit(10).median / len(sets) for _ in range(20)]


def _graph(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[], None]:
    """Record all calls as one CUDA graph, so that no launch from Python is timed; return its replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for each in sets:
            function(*each)
    return graph.replay


def least_bytes(case: Case, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that must be moved at least: every argument read once, every result written once."""
    results = implementations(case.operation)[-1].load()(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    moved = [*arguments, *results, *(arguments[i] for i in case.written)]
    return sum(x.nbytes for x in moved if isinstance(x, Tensor))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _random(*shapes: tuple[int, ...], eps: float | None = None) -> Make:
    """Make random arguments of these shapes, and the epsilon of a norm."""
    last = () if eps is None else (eps,)
    return lambda device, dtype: (*(_normal(*shape).to(device, dtype) for shape in shapes), *last)


def _group_norm(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = _normal(2, channels, side, side).to(device, dtype, memory_format=torch.channels_last)
    weight, bias, time = _normal(4, channels).to(device, dtype).split([1, 1, 2])
    return x, weight[0], bias[0], 32, 1e-5, True, time


def _sum_group_norm(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Make the concatenation of a sum and a skip connection, half of the channels each."""
    (x, *affine, _, _, time), own = _group_norm(channels, side, device, dtype), channels // 2
    first, beside = (part.contiguous(memory_format=torch.channels_last) for part in x.split([own, channels - own], 1))
    return first, first.flip(0), time[:, :own], beside, *affine, 1e-5, True


def _enlarged(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = _normal(2, channels, side, side).to(device, dtype, memory_format=torch.channels_last)
    return x, x.flip(0), None, 2


def _deformable(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Make 1024 queries with 16 heads of width 64 that read 8 points of each of four levels of three images."""
    tokens, sides = 1024, (64, 32, 16, 8)
    value = _normal(1, 3, sum(side * side for side in sides), 16, 64).to(device, dtype)
    places = (0.5 + 0.1 * _normal(1, tokens, 3, 16, 4, 8, 2)).to(device)
    weights = _normal(1, tokens, 3, 16, 4, 8).to(device)
    return value, places, weights, [side for side in sides for _ in range(2)]


def _cache(rows: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Make keys and values (1, 32, 256, 128), and the rows and slots of the last tokens."""
    slots = torch.arange(256 - rows, 256, device=device)
    return [*_normal(2, 1, 32, 256, 128).to(device, dtype), torch.zeros_like(slots), slots]


def _rotary_cache(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Make queries, keys and values of new tokens, their angles, and a cache as large as what they write."""
    keys, values, row, slot = _cache(rows, device, dtype)
    angles = _normal(2, rows, 128).to(device, dtype)
    new = _normal(rows, 3 * 4096).to(device, dtype)
    return new, *angles, keys[:, :, -rows:].contiguous(), values[:, :, -rows:].contiguous(), row, slot - slot[0]


def _token_attention(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return _normal(rows, 32, 128).to(device, dtype), *_cache(rows, device, dtype), 256, 128**-0.5


def _guided_step(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Make a step of DPM-Solver++ 2M, which keeps one prediction, of a table with more rows than rounds."""
    x = _normal(2, 4, side, side).to(device, dtype, memory_format=torch.channels_last)
    latents = _normal(1, 4, side, side).to(device)
    rows = torch.tensor([7.5, 1.0, -0.1, 0.9, 0.1, 0.05], device=device).repeat(1000, 1)
    step = torch.zeros(2, dtype=torch.int32, device=device)
    return latents, latents[None].clone(), step, x, x.clone(), rows
