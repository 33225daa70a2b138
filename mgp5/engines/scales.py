"""Engines of the decoder of next scales (`generators.var`): what is constant done beforehand, blocks compiled or with
fused kernels, on a GPU each scale as a CUDA graph; or an exported file.

Letters: R guidance rows (B or 2B), T tokens of a scale, S tokens in the cache, W width, N layers, A attention heads, V
codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import record
from ..errors import Mgp5Error
from ..options import Backend
from . import BackendChoice, check_exported, keep_compiled, select_backend
from .engine import operations
from .exported import Session, open_folder, sessions

if TYPE_CHECKING:
    from ..generators.var import VARDecoder
    from ..generators.vqvae import VQVAE

Run = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # `VARDecoder.run_scale`
TABULATED = 64  # classes at most whose modulations are computed beforehand


class ScaleEngine:
    """Runs scales by PyTorch: "eager", "compile", or "triton", whose layer norms are fused kernels."""

    def __init__(self, name: str, decoder: VARDecoder) -> None:
        """Prepare a decoder, whose weights must be on their device already; `remove` undoes it."""
        self.decoder, weight = decoder, decoder.positions
        ops, on_gpu = operations(name, weight.device, weight.dtype), weight.is_cuda
        for block in decoder.blocks:
            block.ops = ops
            if name == "compile":  # all blocks and scales share a few graphs, whose sizes are symbols
                block.compile(dynamic=True, **({"mode": "max-autotune-no-cudagraphs"} if on_gpu else {}))
        tabulate(decoder)
        self.graphed = on_gpu and name != "eager"
        self.pool = torch.cuda.graph_pool_handle() if self.graphed else None
        self.graphs: dict[tuple, GraphedScale] = {}  # by the shapes of what it is given
        self.cache = weight.new_empty(0)  # memory of the caches that graphs read, one after the other

    def __call__(self, inputs: Tensor, classes: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run a scale, see `VARDecoder.run_scale`."""
        if not self.graphed:
            return self.decoder.run_scale(inputs, classes, cache)
        given = [inputs, classes] if cache is None else [inputs, classes, cache]
        key = tuple(tensor.shape for tensor in given)
        if any(shapes[0][0] != len(inputs) for shapes in self.graphs):
            self._forget()  # each graph keeps its outputs: those of one number of rows are enough
        if cache is not None and self.cache.numel() < (most := self._most(cache)):
            self._forget()  # they have the old address
            with torch.inference_mode(False):
                self.cache = cache.new_empty(most)
        if key not in self.graphs:
            self.graphs[key] = GraphedScale(self.decoder.run_scale, given, self.cache, self.pool)
        return self.graphs[key](given)

    def _forget(self) -> None:
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone takes no others

    def _most(self, cache: Tensor) -> int:
        """Return the size of the cache of the last scale, of as many rows."""
        *before, _ = self.decoder.config.sizes
        return cache.numel() // cache.shape[4] * sum(before)


class GraphedScale:
    """A scale on buffers of its own, for inputs of the same shapes; the one of the cache is shared by all scales."""

    def __init__(self, run: Run, given: list[Tensor], cache: Tensor, pool: Any) -> None:
        with torch.inference_mode(False):  # else the buffers could be written to in inference mode only
            self.given = [torch.zeros_like(tensor) for tensor in given[:2]]
            self.given += [cache[: tensor.numel()].view(tensor.shape).zero_() for tensor in given[2:]]
        inputs, classes, *past = self.given
        self.replay, self.outputs = record(lambda: run(inputs, classes, *(past or [None])), pool)

    def __call__(self, given: list[Tensor]) -> tuple[Tensor, ...]:
        for buffer, value in zip(self.given, given, strict=True):
            buffer.copy_(value)
        self.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay writes to the same memory


class ExportedScales:
    """Runs scales by the exported component `scale`."""

    def __init__(self, session: Session, decoder: VARDecoder) -> None:
        self.session, shape = session, decoder.config
        self.shape = shape.depth, 2, shape.heads, shape.width // shape.heads  # N, two, A and W / A

    def __call__(self, inputs: Tensor, classes: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run a scale, see `VARDecoder.run_scale`."""
        depth, pair, heads, width = self.shape
        past = inputs.new_empty(depth, pair, len(inputs), heads, 0, width) if cache is None else cache
        outputs = self.session(inputs=inputs, classes=classes, cache=past)
        return outputs["logits"].float(), outputs["new_cache"].to(inputs.dtype)


@torch.no_grad()
def tabulate(decoder: VARDecoder) -> None:
    """Compute the modulations of all classes of a decoder that has few; what makes them is a third of its weights."""
    decoder.__dict__.pop("modulations", None)
    if decoder.config.num_classes < TABULATED:
        tables = decoder.modulations(torch.arange(decoder.config.num_classes + 1, device=decoder.positions.device))
        decoder.modulations = lambda classes: [F.embedding(classes, table) for table in tables]


def apply(decoder: VARDecoder, vqvae: VQVAE, backend: Backend = "auto", exported: Path | None = None) -> BackendChoice:
    """Attach an engine to a decoder of scales, as `engines.apply` does to a denoiser, and return what runs now.

    The file of a folder runs the decoder, and another the last step to pixels. Raises Mgp5Error as `engines.apply`.
    """
    check_exported(backend, exported, "--onnx")
    if backend == "trt":
        raise Mgp5Error("--backend trt runs a denoiser, and this model has none", "take --backend onnx", usage=True)
    choice = select_backend(backend, decoder.positions.device, decoder.positions.dtype)
    remove(decoder, vqvae)
    if exported:
        load = sessions(
            exported, open_folder(exported, {"decoder": decoder, "vae": vqvae}), backend, decoder.positions.device
        )
        decoder.engine, painter = ExportedScales(load("scale"), decoder), load("vae_decoder")
        vqvae.paint = lambda f_hat: painter(f_hat=f_hat)["sample"]
        return choice
    if choice.compiles:
        keep_compiled()
    decoder.engine = ScaleEngine(choice.name, decoder)
    return choice


def remove(decoder: VARDecoder, vqvae: VQVAE) -> None:
    """Remove a decoder's engine; it is then what it was before."""
    decoder.engine = None
    decoder.__dict__.pop("modulations", None)
    vqvae.__dict__.pop("paint", None)
    for block in decoder.blocks:
        block.__dict__.pop("ops", None)
        block._compiled_call_impl = None
