"""Every kernel, as its operator launches it at real shapes, compiles for cards that are not here: limits and no spills.

Triton is given a driver that compiles for a card and launches nothing; so what is compiled is what would be launched,
with the alignment of real tensors. The compiler (ptxas) reports registers, stack and spills. Every kernel is compiled
for one card, for some of its shapes and types; `pytest -m slow tests/test_kernels_compile.py` takes all cards, shapes
and types (10 minutes on one core).
"""

import contextlib
import io
import itertools
import re
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from mgp5.kernels import adaln, deformable, geglu, group_norm, guided_step, layer_norm, rms_norm, sum_map  # noqa: E402
from mgp5.kernels import row_linear as linear  # noqa: E402
from mgp5.kernels import token_attention as attention  # noqa: E402
from mgp5.kernels.group_norm_backward import group_norm_backward  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

# Compute capability -> most shared memory of a program in KB (CUDA programming guide, technical specifications).
CARDS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Compiler:
    """A Triton driver without a card: it notes the binaries that it is to load."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.loaded: list[str] = []
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        limits = {"max_shared_mem": 1024 * CARDS[capability]}  # Triton raises OutOfResources above
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits, load_binary=self.load, unload_module=lambda module: None
        )

    def load(self, name, binary, shared, device):
        assert binary.startswith(b"\x7fELF")
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_device(self):
        return f"sm_{self.capability}"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def norm(channels, size, silu, timed, groups=32, backward=False):
    def launch(dtype):
        x = torch.empty(1, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.empty(channels, dtype=dtype)
        time = torch.empty(50, 20160, dtype=dtype)[:1, 320 : 320 + channels] if timed else None
        if backward:
            group_norm_backward(x, x, weight, weight, groups, 1e-5, silu, time)
        else:
            group_norm.group_norm(x, weight, weight, groups, 1e-5, silu, time)

    return launch


def summed(channels, beside, size, enlarged=False, groups=32):
    """A map, its residual and a time embedding beside a skip connection; or enlarged."""

    def launch(dtype):
        maps = (
            torch.empty(1, size, size, number, dtype=dtype).movedim(-1, 1) for number in (channels, channels, beside)
        )
        x, residual, others = maps
        time = torch.empty(50, 20160, dtype=dtype)[:1, 320 : 320 + channels]
        if enlarged:
            sum_map.sum_map(x, residual, time, 2)
        else:
            weight = torch.empty(channels + beside, dtype=dtype)
            group_norm.sum_group_norm(x, residual, time, others if beside else None, weight, weight, groups, 1e-5, True)

    return launch


def step(history, channels, halves):
    def launch(dtype):
        latents, x = torch.empty(1, channels, 64, 64), torch.empty(halves, channels, 64, 64, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if channels == 4 else x
        rows, past = torch.empty(50, 5 + history), torch.empty(history, *latents.shape)
        guided_step.guided_step(latents, past, torch.zeros(2, dtype=torch.int32), x, x, rows)

    return launch


def points(tokens, heads, levels, sizes, backward):
    """Of five images: deformable attention of an LLM's tokens or a UNet's pixels, at the published sizes."""

    def launch(dtype):
        value = torch.empty(1, 5, sum(side * side for side in sizes), heads, 64, dtype=dtype)
        places = torch.empty(1, tokens, 5, heads, 1, 8, 2).expand(-1, -1, -1, -1, levels, -1, -1)
        inputs = value, places, torch.empty(1, tokens, 5, heads, levels, 8), [x for side in sizes for x in (side, side)]
        if backward:
            deformable.deformable_backward(torch.empty(1, tokens, heads * 64, dtype=dtype), *inputs)
        else:
            deformable.deformable(*inputs)

    return launch


def products(width, inner, biased):
    """Of an LLM's layer, for one and for eight rows: with the norm before, and with the residual behind."""

    def launch(dtype):
        for count in (1, 8):
            x, gate_up = torch.empty(count, width, dtype=dtype), torch.empty(2 * inner, width, dtype=dtype)
            bias = torch.empty(2 * inner, dtype=dtype) if biased else None
            linear.row_linear(x, gate_up, bias, x[0], None, 1e-5)
            out = linear.row_linear(x, gate_up, bias, x[0], None, 1e-5, True)
            linear.row_linear(out, torch.empty(width, inner, dtype=dtype), None, None, x)

    return launch


def attend(heads, groups, width, normed):
    """Of eight new tokens over a cache: with its write, and over few slots and many."""

    def launch(dtype):
        cache = torch.empty(2, 8, groups, 4096, width, dtype=dtype)
        qkv, angles = torch.empty(8, (heads + 2 * groups) * width, dtype=dtype), torch.empty(8, width, dtype=dtype)
        places, norm = torch.zeros(2, 8, dtype=torch.long), (angles[0], angles[0], 1e-5) if normed else ()
        query = attention.rotary_cache(qkv, angles, angles, *cache, *places, *norm)
        for slots in (256, 4096):
            attention.token_attention(query, *cache, *places, slots, width**-0.5)

    return launch


def rows(operation, *shapes, eps=(1e-6,)):
    return lambda dtype: operation(*(torch.empty(shape, dtype=dtype) for shape in shapes), *eps)


def add_layer_norm(x, residual, weight, bias, later, eps):
    return layer_norm.add_layer_norm(x, residual, weight, bias, eps, later)


def cases():
    """Each kernel at the widths of SD 1.5 / 2.1, SDXL, their VAE, SD 3 and 3.5, MMFS, the demo: operation, launch."""
    sides = {320: (64,), 640: (64, 32), 960: (64,), 1280: (32, 16, 8, 24), 1920: (32,), 2560: (16,)}
    unet = [(channels, size) for channels, sizes in sides.items() for size in sizes]
    for (channels, size), (silu, timed) in itertools.product(unet, [(True, False), (True, True), (False, False)]):
        kind = "group_norm" if size > 16 or channels > 2000 else "group_norm_small"
        yield kind, norm(channels, size, silu, timed)
        yield "group_norm_backward", norm(channels, size, silu, timed, backward=True)
    for (channels, size), silu in itertools.product([(128, 512), (256, 256), (512, 64)], [True, False]):
        yield "group_norm", norm(channels, size, silu, False)
    for channels, size in [(64, 16), (192, 8), (384, 8)]:
        yield "group_norm_small", norm(channels, size, True, True, groups=16)
    for channels, beside, size in [(320, 320, 64), (640, 320, 64), (1280, 640, 32), (128, 0, 512), (512, 0, 96)]:
        yield "sum_group_norm", summed(channels, beside, size)
    for channels, beside, size in [(1280, 1280, 8), (1280, 0, 16), (192, 64, 8)]:
        yield "sum_group_norm_small", summed(channels, beside, size)
    for channels, size in [(1280, 8), (640, 32), (512, 64)]:
        yield "sum_map", summed(channels, 0, size, enlarged=True)
    for width in (320, 640, 1280):
        yield "layer_norm", rows(layer_norm.layer_norm, (77, width), *[(width,)] * 2)
        yield "geglu", rows(geglu.geglu, (77, 8 * width), eps=())
        yield "add_layer_norm", rows(add_layer_norm, *[(77, width)] * 2, *[(width,)] * 3)
    for width in (1536, 2432):
        yield "adaln", rows(adaln.adaln, (2, 77, width), *[(2, width)] * 2)
        yield "gated_adaln", rows(adaln.gated_adaln, *[(2, 77, width)] * 2, *[(2, width)] * 3)
    yield "rms_norm", rows(rms_norm.rms_norm, *[(2, 77, 24, 64)] * 2, *[(64,)] * 2)
    for backward in (False, True):
        kind = "deformable_backward" if backward else "deformable"
        yield kind, points(1, 16, 3, (32, 16, 8), backward)
        yield kind, points(256, 16, 4, (64, 32, 16, 8), backward)
    for shape in ((4096, 11008, False), (3584, 18944, True)):  # LLaMA 7B, Qwen2.5 7B
        yield "row_linear", products(*shape)
    for shape in ((32, 32, 128, False), (28, 4, 128, True), (4, 2, 24, False)):
        yield "token_attention", attend(*shape)
    for history, channels, halves in itertools.product((0, 1, 4), (4, 16), (1, 2)):  # of DDIM, DPM-Solver++, PNDM
        yield "guided_step", step(history, channels, halves)


CASES = list(itertools.product(cases(), DTYPES))
SAMPLE = {
    "group_norm": 2,
    "guided_step": 2,
    "row_linear": 4,
    "token_attention": 2,
}  # cases of an operation for each card, else 1


@pytest.fixture
def compile_for(tmp_path, monkeypatch):
    """Compile what a launch of a case needs for a card, and read the compiler's report."""
    from triton.runtime.driver import driver

    def compile_case(capability, launch, dtype):
        compiler, report = Compiler(capability), io.StringIO()
        driver.set_active(compiler)
        with contextlib.redirect_stdout(report):
            launch(dtype)
        return compiler.loaded, report.getvalue()

    with triton.knobs.nvidia.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = str(tmp_path)
        yield compile_case
    driver._active = None


def some_cases(turn):
    """Some cases of each operation; across the cards, ever new ones."""
    for operation in dict.fromkeys(operation for (operation, _), _ in CASES):
        group, count = [case for case in CASES if case[0][0] == operation], SAMPLE.get(operation, 1)
        yield from (group[(turn * count + i) % len(group)] for i in range(count))


@pytest.mark.parametrize(
    ("capability", "every"),
    [
        (90, False),
        pytest.param(75, False, marks=pytest.mark.slow),
        *(pytest.param(card, True, marks=pytest.mark.slow) for card in CARDS),
    ],
)
def test_kernels_compile_without_spills(capability, every, compile_for):
    kernels = set()
    for (operation, launch), dtype in CASES if every else some_cases(list(CARDS).index(capability)):
        loaded, report = compile_for(capability, launch, dtype)
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        # A row's SwiGLU spills two registers on sm_80, 86 and 89.
        few = all(int(number) <= 8 for spill in spills for number in spill)
        assert few and len(spills) == len(loaded), f"{operation} {dtype} for {capability}: {report}"
        kernels |= set(loaded)
    norms = {"_norm_one_tile", "_statistics", "_normalize", "_layer_norm", "_sum_map", "_adaln", "_rms_norm"}
    norms |= {"_channel_sums", "_gradient"}
    assert kernels == norms | {"_geglu", "_guided_step", "_sample", "_sample_backward"} | {
        "_row_norm", "_row_linear", "_rotary_cache", "_token_attention", "_merge_parts"
    }  # fmt: skip


def test_torch_export_keeps_an_operator_whole():
    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return group_norm.group_norm(x, weight, weight, 4, 1e-5, True)

    x = torch.empty(2, 16, 40, 40).to(memory_format=torch.channels_last)
    exported = torch.export.export(Norm(), (x, torch.empty(16)), strict=False)
    (node,) = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert node.target is torch.ops.mgp5.group_norm.default
    assert node.meta["val"].shape == x.shape and node.meta["val"].stride() == x.stride()


def test_torch_compile_sees_the_kernels_of_an_operator(compile_for):
    """Also which of its buffers each of them writes, in one graph without breaks."""
    from torch._dynamo.backends.common import aot_autograd

    latents, history, x = torch.empty(1, 4, 8, 8), torch.empty(1, 1, 4, 8, 8), torch.empty(2, 4, 8, 8)
    buffers = latents, history, torch.zeros(2, dtype=torch.int32), x, x.clone(), torch.empty(9, 6)
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled = torch.compile(lambda *tensors: guided_step.guided_step(*tensors), backend=backend, fullgraph=True)
    with torch.no_grad():
        compile_for(90, lambda dtype: compiled(*buffers), None)
    written = [node.kwargs["tensors_to_clone"] for node in graphs[0].graph.nodes if "tensors_to_clone" in node.kwargs]
    assert list(map(list, written)) == [["latents", "history", "step", "model_input"]]
