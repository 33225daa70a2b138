"""Time updates of the first stage of training, by the code of the training loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product, repeat

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, record_function, supported_activities

from ..config import TrainConfig
from ..device import DTYPES
from ..files import GiB
from ..heads.batch import Batch
from ..hub import Parts
from ..memory.estimate import estimate
from ..memory.skeletons import skeleton
from ..model import InterleavedModel
from ..prompts import IGNORE
from ..training.distributed import launch
from ..training.presets import preset
from ..training.trainer import Trainer
from .timing import Bench, Row, digits, percentiles, release_memory, timed

MICRO = (16, 8, 24, 48, 4)  # samples at a time, where the batch is a multiple of them
# Features cached, activations recomputed, cuDNN tuned
WAYS = ((False, True, False), (True, True, False), (False, False, False), (True, False, False), (False, True, True))
BACKWARD = "autograd::engine::evaluate_function"
TEMPLATE, CAPTION = 15, 20  # tokens of a prompt around the caption, and of a caption (half to one and a half of it)


def train_rows(bench: Bench, parts: Parts, batch: int) -> Iterator[Row]:
    """Yield a row for each way to train, the most telling first: features live or cached, activations kept or
    recomputed (checkpointing), by several micro-batches; in rows called tuned, cuDNN tries its algorithms first."""
    config, make = setting(bench, parts)
    model = make(config, device=bench.device)
    for size, (cached, checkpointing, tune) in product([s for s in MICRO if batch % s == 0] or [batch], WAYS):
        if tune and bench.device.type != "cuda":
            continue
        run = replace(config, checkpointing=checkpointing, batch=size, accumulation=batch // size)
        provider = f"{'cached' if cached else 'live'}, {'recomputed' if checkpointing else 'kept'}, by {size}"
        row = {
            "name": "pretrain update",
            "size": f"{parts.name}, {model.head.generator.native_size} px, {batch} samples",
            "provider": provider + ", tuned" * tune,
        }
        if not bench.has_time():
            yield row | {"skipped": "out of time"}
            continue
        torch.backends.cudnn.benchmark = tune
        bench.tell(f"{row['name']}: {row['provider']}")
        made_up = random_batch(model, size, cached)
        expected = estimate(make(run), run, made_up.ids.shape[1], cached)
        row |= {"estimated_gib": round(expected.total.total / GiB, 2), "tflop": digits(expected.flops / 1e12)}
        yield row | _measured(model, run, made_up, bench, row["tflop"])


def setting(bench: Bench, parts: Parts) -> tuple[TrainConfig, Callable[..., InterleavedModel]]:
    """Return the settings of the first stage of training, and what makes a model of random weights for settings."""
    config = replace(preset("pretrain"), precision="bf16" if bench.device.type == "cuda" else "fp32")
    return config, partial(skeleton, parts.mllm, parts.diffusion, dtype=DTYPES[config.precision])


def random_batch(model: InterleavedModel, count: int, cached: bool) -> Batch:
    """Return captions of the length of those of CC3M, with an image each; or with latents and encodings of a cache."""
    vokens, end = list(model.head.ids), model.backbone.tokenizer.eos_token_id
    seeded = torch.Generator().manual_seed(0)
    captions = torch.randint(CAPTION // 2, CAPTION * 3 // 2 + 1, (count,), generator=seeded)
    starts = captions[:, None] + TEMPLATE
    ends = starts + len(vokens)
    places = torch.arange(int(ends.max()) + 1)
    ids = torch.full((count, len(places)), end)
    ids[(places >= starts) & (places < ends)] = torch.tensor(vokens).repeat(count)
    labels = ids.where((places >= starts) & (places <= ends), IGNORE)
    generator = model.head.generator
    size = (generator.native_size,) * 2
    channels, *latents = generator.latent_shape(*size)
    live = {"pixels": torch.zeros(count, 3, *size)}
    kept = {"moments": torch.ones(count, 2 * channels, *latents)}
    kept["encodings"] = torch.zeros(count, *generator.condition_shape)
    return Batch(
        ids=ids,
        mask=(places <= ends).long(),
        labels=labels,
        target_rows=tuple(range(count)),
        target_starts=tuple(starts.flatten().tolist()),
        targets=kept if cached else live,
        captions=("a " * CAPTION,) * count,
    )


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
    generator = model.head.generator
    encoder = generator.coder.parts["encoder"] if generator.coder else generator.vae.encoder
    parts = {"LLM": model.backbone.language, "denoiser": generator.denoiser, "VAE": encoder}
    parts |= {n.replace("_encoder", ""): m for n, m in generator.named_children() if n.startswith("text_encoder")}
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
