"""Every kernel, as its operator launches it at real shapes, compiles for cards that are not here: limits and no spills.

Triton is given a driver that compiles for a card and launches nothing; so what is compiled is what would be launched,
with the alignment of real tensors. The compiler (ptxas) reports registers, stack and spills. Every kernel is compiled
for three cards, each time for some of its shapes and types; `pytest -m slow tests/test_kernels_compile.py` takes all
cards, shapes and types (10 minutes on one core).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from mgp5.kernels import adaln, geglu, group_norm, guided_step, layer_norm, rms_norm  # noqa: E402
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


def norm(channels, size, silu, timed, groups=32):
    def launch(dtype):
        x = torch.empty(1, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.empty(channels, dtype=dtype)
        time = torch.empty(50, 20160, dtype=dtype)[:1, 320 : 320 + channels] if timed else None
        group_norm.group_norm(x, weight, weight, groups, 1e-5, silu, time)

    return launch


def step(history, channels, halves):
    def launch(dtype):
        latents, x = torch.empty(1, channels, 64, 64), torch.empty(halves, channels, 64, 64, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if channels == 4 else x
        rows, past = torch.empty(50, 5 + history), torch.empty(history, *latents.shape)
        guided_step.guided_step(latents, past, torch.zeros(2, dtype=torch.int32), x, x, rows)

    return launch


def cases():
    """Each kernel at the widths of SD 1.5 / 2.1, SDXL, their VAE, SD 3 and 3.5, and the demo: name -> launch."""
    found = {}
    unet = [
        (320, 64),
        (640, 64),
        (960, 64),
        (640, 32),
        (1280, 32),
        (1920, 32),
        (1280, 16),
        (2560, 16),
        (1280, 8),
        (1280, 24),
    ]
    for (channels, size), (silu, timed) in itertools.product(unet, [(True, False), (True, True), (False, False)]):
        kind = "group_norm" if size > 16 or channels > 2000 else "group_norm_small"
        found[f"{kind} {channels}x{size} {silu} {timed}"] = norm(channels, size, silu, timed)
    for (channels, size), silu in itertools.product([(128, 512), (256, 256), (512, 64)], [True, False]):
        found[f"group_norm VAE {channels}x{size} {silu}"] = norm(channels, size, silu, False)
    for channels, size in [(64, 16), (192, 8), (384, 8)]:
        found[f"group_norm_small demo {channels}x{size}"] = norm(channels, size, True, True, groups=16)
    for width in (320, 640, 1280):
        x = torch.empty(77, 8 * width)
        found[f"geglu {width}"] = lambda dtype, x=x: geglu.geglu(x.to(dtype))
        found[f"add_layer_norm {width}"] = lambda dtype, x=x, w=width: layer_norm.add_layer_norm(
            *(x[:, :w].to(dtype),) * 2, *(x[0, :w].to(dtype),) * 2, 1e-5
        )
    for width in (1536, 2432):
        x, rows = torch.empty(2, 77, width), torch.empty(2, 6 * width)
        found[f"adaln {width}"] = lambda dtype, x=x, r=rows: adaln.adaln(
            x.to(dtype), *r.to(dtype).chunk(6, 1)[:2], 1e-6
        )
        found[f"gated_adaln {width}"] = lambda dtype, x=x, r=rows: adaln.gated_adaln(
            *(x.to(dtype),) * 2, *r.to(dtype).chunk(6, 1)[:3], 1e-6
        )
    heads = torch.empty(2, 77, 3, 24, 64)
    found["rms_norm"] = lambda dtype: rms_norm.rms_norm(
        *heads.to(dtype).unbind(2)[:2], *heads[0, 0, 0, :2].to(dtype), 1e-6
    )
    samplers = [("ddim", 0), ("dpm++", 1), ("pndm", 4)]
    for (name, history), channels, halves in itertools.product(samplers, (4, 16), (1, 2)):
        found[f"guided_step {name} {channels} {halves}"] = step(history, channels, halves)
    return found


CASES = list(itertools.product(cases().items(), DTYPES))
SAMPLE = {"group_norm": 3, "group_norm_small": 2, "guided_step": 2}  # cases of an operation for each card, else 1


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


def check(compile_for, capability, some):
    kernels, reports = set(), 0
    for (name, launch), dtype in some:
        loaded, report = compile_for(capability, launch, dtype)
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert all(spill == ("0", "0", "0") for spill in spills), f"{name} {dtype} for {capability}: {report}"
        assert len(spills) == len(loaded), report
        kernels |= set(loaded)
        reports += len(spills)
    assert reports > len(kernels) > 0
    return kernels


@pytest.mark.parametrize("capability", [75, 90, 120])
def test_kernels_compile_for_old_and_new_cards(capability, compile_for):
    turn, operations = list(CARDS).index(capability), defaultdict(list)
    for case in CASES:
        operations[case[0][0].split()[0]].append(case)
    some = []
    for operation, group in operations.items():
        count = SAMPLE.get(operation, 1)
        some += [group[(turn * count + i) % len(group)] for i in range(count)]  # across the cards, ever new ones
    kernels = check(compile_for, capability, some)
    norms = {"_norm_one_tile", "_statistics", "_normalize", "_add_layer_norm", "_adaln", "_rms_norm"}
    assert kernels == norms | {"_geglu", "_guided_step"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
def test_every_configuration_compiles_for_every_card(capability, compile_for):
    check(compile_for, capability, CASES)


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
