"""The first stage of training, by the training loop's own code. B samples, T tokens."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product, repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig, preset
from ..device import DTYPES, pick_device
from ..files import GiB
from ..heads.batch import Batch
from ..hub import resolve
from ..memory.estimate import estimate
from ..memory.skeletons import skeleton
from ..model import InterleavedModel
from ..prompts import IGNORE
from ..training.distributed import launch
from ..training.trainer import Trainer
from .suites import Row, Setting, percentiles

MICRO = (4, 8, 16, 24, 48)  # samples at a time, where the batch is a multiple of them
TEMPLATE, CAPTION = 15, 20  # tokens of a prompt around the caption, and of a caption (half to one and a half of it)


def train_suite(setting: Setting) -> Iterator[Row]:
    """Updates of the first stage, by the training loop's own code: features live or cached, activations kept or
    recomputed (checkpointing), several micro-batches; for rows called tuned cuDNN tries its algorithms first."""
    device, _ = pick_device(setting.device)
    config = replace(preset("pretrain"), precision="bf16" if device.type == "cuda" else "fp32")
    parts = setting.parts or resolve("llava-1.5-7b+sd-2.1-base")
    names = parts.mllm, parts.diffusion
    model = skeleton(*names, config, device=device, dtype=DTYPES[config.precision])
    batch = setting.batch or (48 if device.type == "cuda" else 8)
    sizes = [size for size in MICRO if batch % size == 0] or [batch]
    tuned = [(True, False, size, True) for size in sizes if device.type == "cuda"]
    for cached, checkpointing, size, tune in [*product((True, False), (True, False), sizes, (False,)), *tuned]:
        own = replace(config, checkpointing=checkpointing, batch=size, accumulation=batch // size)
        kinds = "cached" if cached else "live", "recomputed" if checkpointing else "kept"
        row = {
            "name": "pretrain update",
            "size": f"{parts.name}, {model.head.generator.native_size} px, {batch} samples",
            "provider": f"{kinds[0]}, {kinds[1]}, by {size}{', tuned' if tune else ''}",
        }
        torch.backends.cudnn.benchmark = tune
        setting.tell(f"{row['name']}: {row['provider']}")
        row |= _expected(names, own, cached, made_up(model, size, cached).ids.shape[1])
        yield row | _measured(model, own, cached, setting, row["tflop"])


def made_up(model: InterleavedModel, count: int, cached: bool) -> Batch:
    """Captions of CC3M's length with a picture each; a cache holds latents and encodings."""
    vokens, end = list(model.head.ids), model.backbone.tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(CAPTION // 2, CAPTION * 3 // 2 + 1, (count,), generator=generator)
    starts = [TEMPLATE + length for length in captions.tolist()]
    length = max(starts) + len(vokens) + 1
    ids = torch.full((count, length), end)
    labels = torch.full_like(ids, IGNORE)
    for row, start in enumerate(starts):
        ids[row, start : start + len(vokens)] = torch.tensor(vokens)
        labels[row, start : start + len(vokens) + 1] = ids[row, start : start + len(vokens) + 1]
    ends = torch.tensor(starts)[:, None] + len(vokens)
    size, diffusion = model.head.generator.native_size, model.head.generator
    channels, height, width = diffusion.latent_shape(size, size)
    moments = torch.ones(count, 2 * channels, height, width)
    return Batch(
        ids=ids,
        mask=(torch.arange(length) <= ends).long(),
        labels=labels,
        seen={},
        rows=tuple(range(count)),
        starts=tuple(starts),
        pixels=None if cached else torch.zeros(count, 3, size, size),
        captions=("a " * CAPTION,) * count,
        moments=moments if cached else None,
        encodings=torch.zeros(count, *diffusion.condition_shape) if cached else None,
    )


def _expected(names: tuple[str, str], config: TrainConfig, cached: bool, length: int) -> Row:
    """What the shapes say: memory, and operations of an update."""
    told = estimate(skeleton(*names, config, dtype=DTYPES[config.precision]), config, length, cached)
    return {"estimated_gib": round(told.total.total / GiB, 2), "tflop": round(told.flops / 1e12, 3)}


def _measured(model: InterleavedModel, config: TrainConfig, cached: bool, setting: Setting, tflop: float) -> Row:
    """Updates of the training loop; a row that says so where memory does not suffice."""
    accelerator = launch(config, setting.device)
    cuda = accelerator.device.type == "cuda"
    model.merge()
    spans, times = Spans(cuda), []
    try:
        trainer = Trainer(model, config, accelerator)
        batches = repeat(made_up(model, config.batch, cached))
        model.train()
        trainer.update(batches, lambda: False)  # the first one compiles, tunes and allocates
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with spans.of(model):
            for _ in range(setting.steps):
                start = time.perf_counter()
                trainer.update(batches, lambda: False)  # it ends by reading the losses: the device is done then
                times.append(1000 * (time.perf_counter() - start))
    except torch.OutOfMemoryError:
        times.clear()
    finally:
        trainer = None
        accelerator.free_memory()
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    if not times:
        return {"skipped": "out of memory"}
    columns = percentiles(times)
    median = columns["median"]
    return columns | {
        "unit": "ms",
        "updates_per_s": round(1000 / median, 3),
        "samples_per_s": round(1000 * config.batch * config.accumulation / median, 2),
        "tflop_per_s": round(1000 * tflop / median, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GiB, 2) if cuda else None,
        "parts": spans.shares(sum(times)),
    }


class Spans:
    """The time that parts of a model take, forward and backward, by hooks at their inputs and outputs.

    Backward begins when a gradient reaches a part's output, and ends when the last one leaves at its inputs.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self._open: dict[str, Any] = {}
        self._closed: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def of(self, model: InterleavedModel) -> Iterator[None]:
        """Watch a model's parts."""
        generator = model.head.generator
        parts = {"LLM": model.backbone.language, "denoiser": generator.denoiser, "VAE": generator.vae.encoder}
        parts |= {n.replace("_encoder", ""): m for n, m in generator.named_children() if n.startswith("text_encoder")}
        handles = []
        for name, part in parts.items():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
            handles.append(part.register_forward_hook(self._after(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shares(self, total: float) -> dict[str, float]:
        """Of `total` milliseconds."""
        sums = {name: sum(self._between(*pair) for pair in pairs) for name, pairs in self._closed.items()}
        sums["other"] = total - sum(sums.values())
        return {name: round(value / total, 3) for name, value in sums.items()}

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self._end(name)
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
            if inputs and torch.is_grad_enabled():
                output[0].register_hook(lambda _: self._begin(f"{name} back"))
                for tensor in inputs:
                    tensor.register_hook(lambda _: self._end(f"{name} back"))

        return hook

    def _begin(self, name: str) -> None:
        self._open[name] = self._stamp()

    def _end(self, name: str) -> None:
        stamp = self._stamp()
        self._closed[name].append((self._open[name], stamp))
        self._open[name] = stamp

    def _stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1000 * (end - start)
