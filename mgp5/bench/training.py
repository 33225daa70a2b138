"""Time updates of the first stage of training in which the LLM reads, by the code of the training loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat

import torch
from PIL import Image as pil
from torch.autograd import DeviceType
from torch.profiler import profile, record_function, supported_activities

from ..config import TrainConfig
from ..device import DTYPES
from ..files import GiB
from ..heads import head_class
from ..heads.batch import Batch
from ..hub import Parts
from ..memory.estimate import estimate
from ..memory.skeletons import skeleton
from ..model import InterleavedModel
from ..prompts import IGNORE
from ..training.batch import Collator, Encoded
from ..training.distributed import launch
from ..training.presets import preset
from ..training.trainer import Trainer
from .timing import Bench, Row, digits, percentiles, release_memory, timed

# Passes of the LLM in an update, images that the generator takes at a time, features cached, activations recomputed: as
# the presets "paper-80gb" and "paper" do, and others; the most telling first.
WAYS = ((1, 16, 0, 0), (1, 16, 1, 0), (3, 4, 0, 1), (3, 16, 0, 1), (3, 4, 1, 1), (6, 8, 0, 0), (1, 48, 1, 0))
BACKWARD = "autograd::engine::evaluate_function"
TEMPLATE, CAPTION = 15, 20  # tokens of a prompt around the caption, and of a caption (half to one and a half of it)


def train_rows(bench: Bench, parts: Parts, batch: int, head: str) -> Iterator[Row]:
    """Yield a row for each way to train; of a head whose generator does not take parts of a batch, two."""
    config, make = setting(bench, parts, head)
    model, in_parts = make(config, device=bench.device), hasattr(config, "generator_batch")
    torch.backends.cudnn.benchmark = bench.device.type == "cuda"  # as in a run
    ways = WAYS if in_parts else ((1, batch, 0, 0), (1, batch, 0, 1))
    ways = dict.fromkeys((n, min(images, batch // n), *way) for n, images, *way in ways if batch % n == 0)
    for passes, images, cached, recomputed in ways:
        size = batch // passes
        part = {"generator_batch": images} if in_parts else {}
        run = replace(config, checkpointing=bool(recomputed), batch=size, accumulation=passes, **part)
        provider = f"{'cached' if cached else 'live'}, {'recomputed' if recomputed else 'kept'}, by {size}"
        row = {
            "name": "pretrain update" if in_parts else f"{head} {config.stage} update",
            "size": f"{parts.name}, {model.head.generator.native_size} px, {batch} samples",
            "provider": provider + f", images by {images}" * (images < size),
        }
        if not bench.has_time():
            yield row | {"skipped": "out of time"}
            continue
        bench.tell(f"{row['name']}: {row['provider']}")
        made_up = random_batch(model, run, cached)
        length = -(-made_up.ids.numel() // size)  # of a sample, if rows hold several
        expected = estimate(make(run), run, length, bool(cached))
        row |= {"estimated_gib": round(expected.total.total / GiB, 2), "tflop": digits(expected.flops / 1e12)}
        yield row | _measured(model, run, made_up, bench, row["tflop"])


def setting(bench: Bench, parts: Parts, head: str) -> tuple[TrainConfig, Callable[..., InterleavedModel]]:
    """Return the settings of a head's first stage with the LLM, and what makes a model of random weights for them."""
    stage = next(stage.name for stage in head_class(head).stages if stage.llm)
    config = replace(preset(stage, head=head), precision="bf16" if bench.device.type == "cuda" else "fp32")
    return config, partial(skeleton, parts.mllm, parts.diffusion, head=head, dtype=DTYPES[config.precision])


def random_batch(model: InterleavedModel, config: TrainConfig, cached: int = 0) -> Batch:
    """Return captions of the length of those of CC3M, with an image each; or with latents and encodings of a cache."""
    head, end = model.head, model.backbone.tokenizer.eos_token_id
    target = head.target(pil.new("RGB", (64, 64)))
    run, told = ([*row, end] for row in head.layout(target, config))
    seeded = torch.Generator().manual_seed(0)
    lengths = torch.randint(CAPTION // 2, CAPTION * 3 // 2 + 1, (config.batch,), generator=seeded)
    samples = [
        Encoded([end] * start + run, [IGNORE] * start + told, [start], [], [target], ["a " * CAPTION], "")
        for start in (lengths + TEMPLATE).tolist()
    ]
    batch = Collator(model.backbone, head, model.backbone.context_length, config).batch(samples)
    kept = {name: torch.ones(config.batch, *shape) for name, shape in head.cached_shapes().items()}
    return replace(batch, targets=kept) if cached else batch


@contextmanager
def updates(model: InterleavedModel, config: TrainConfig, batch: Batch, bench: Bench) -> Iterator[Callable[[], object]]:
    """Yield what runs an update of the training loop; what that took of the memory is free afterwards."""
    accelerator = launch(config, bench.device.type)
    model.merge()
    try:
        trainer = Trainer(model, config, accelerator)
        model.train()
        yield partial(trainer.update, repeat(batch), lambda: False)
    finally:
        trainer = None
        accelerator.free_memory()
        model.zero_grad(set_to_none=True)
        release_memory()


def _measured(model: InterleavedModel, config: TrainConfig, batch: Batch, bench: Bench, tflop: float) -> Row:
    """Time updates of the training loop, then profile one; a row that says so where memory does not suffice."""
    cuda = bench.device.type == "cuda"
    try:
        with updates(model, config, batch, bench) as update:
            update()  # the first one compiles, tunes and allocates
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            milliseconds = [1000 * timed(update) for _ in range(bench.steps)]
            peak = round(torch.cuda.max_memory_allocated() / GiB, 2) if cuda else None
            parts = shares(model, update, cuda)
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    columns = percentiles(milliseconds)
    median = columns["median"]
    return columns | {
        "unit": "ms",
        "updates_per_s": round(1000 / median, 3),
        "samples_per_s": round(1000 * config.batch * config.accumulation / median, 2),
        "tflop_per_s": digits(1000 * tflop / median, 3),
        "peak_gib": peak,
        "parts": parts,
    }


def shares(model: InterleavedModel, update: Callable[[], object], cuda: bool) -> dict[str, float]:
    """Profile an update; return the share of its time that each part takes forward and, as "... back", backward.

    Operations of the backward pass have the sequence numbers of those of the forward pass that made them.
    """
    parts = {"LLM": model.backbone.language}
    for name, part in model.head.parts().items():  # of a VAE the encoder is called
        if name == "denoiser" or not part.saved:
            parts[name.removesuffix(" encoder")] = getattr(part.module, "encoder", part.module)
    with ExitStack() as stack:
        for name, part in parts.items():
            span = record_function(name)
            for hook in (
                part.register_forward_pre_hook(lambda *_, span=span: span.__enter__() and None),
                part.register_forward_hook(lambda *_, span=span: span.__exit__(None, None, None)),
            ):
                stack.callback(hook.remove)
        profiler = stack.enter_context(profile(activities=supported_activities()))
        with record_function("update"):
            update()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]  # kernels count by launches
    owner: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):  # the last operation of a number made it
        above = event
        while above.cpu_parent and above.name not in parts and not above.name.startswith(BACKWARD):
            above = above.cpu_parent
        if event.sequence_nr >= 0 and not above.name.startswith(BACKWARD):
            owner[event.sequence_nr] = above.name
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        name = f"{owner.get(event.sequence_nr)} back" if event.name.startswith(BACKWARD) else event.name
        if name.removesuffix(" back") in parts:
            spent[name] += event.device_time_total if cuda else event.cpu_time_total
    total = next(event.cpu_time_total for event in events if event.name == "update")  # it waits for the device
    return {name: round(spent[name] / total, 3) for name in spent} | {
        "other": round(1 - sum(spent.values()) / total, 3)
    }
