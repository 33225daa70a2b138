"""mgp5 train and convert: commands that make a model."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Mgp5Error, counted
from .flags import COUNT, PATH, progress, say, settings_option

if TYPE_CHECKING:
    from ..training.loop import Progress
    from ..training.run import StageEstimate, TrainRequest


@click.command()
@click.option("--stage", required=True, help="pretrain or finetune; of the heads seed and vargpt see above.")
@click.option(
    "--data", "sources", required=True, multiple=True, type=PATH, help="Folder, or hf:NAME of the hub; repeatable."
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="cc3m, shards, tables, vist, mmdialog, mmc4, obelics, sharegpt or jsonl, per --data.  [by its files]",
)
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--model", required=True, help="What to train: a folder, a name, or a run of the stage before.")
@click.option("--head", help="Of a new model: minigpt5, seed, vargpt, mm-interleaved.  [minigpt5]")
@click.option(
    "--preset",
    help="paper, paper-80gb, release, prefix, gill, demo or own-(laptop|24gb|80gb); others: paper, release, demo.",
)
@click.option("--config", "config_file", type=PATH, help="TOML file of settings.")
@settings_option("overrides", "One setting, e.g. lr=1e-4 or lora.rank=4.")
@click.option("--columns", help="Own names of columns: caption=TEXT,image=IMG.")
@click.option("--max-steps", type=COUNT, help="Updates in all, instead of epochs.")
@click.option("--stop-after", type=COUNT, help="End after so many updates; go on with --resume.")
@click.option("--vokens", type=click.IntRange(1, 16), help="Vokens per image (new models).  [8]")
@click.option("--device", default="auto")
@click.option("--cache", "caches", multiple=True, type=PATH, help="Made by data cache; repeatable.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Tell what would train and how much memory it takes, and stop: no weights are loaded.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per update on stdout.")
def train(
    sources: tuple[Path, ...], formats: tuple[str, ...], columns: str | None, as_json: bool, **flags: Any
) -> None:
    """Train a stage of the paper: captions to vokens (pretrain), or interleaved stories and dialogues (finetune).

    The head seed begins with its tokenizer: captions and images in one space (tokenizer-contrastive), then images to
    codes and back (tokenizer). The head vargpt has the stages var (its decoder alone, where no trained one begins),
    align, instruct and decode.

    A finetuned model can be finetuned again: its adapter goes on. The settings are those of --preset: by default paper,
    for finetuning on own stories (jsonl) own-laptop, own-24gb or own-80gb, by the machine.

    Ctrl-C saves before it ends the run, a second one does not wait. On several GPUs:

      torchrun --nproc-per-node 8 --no-python mgp5 train ...

      accelerate launch --use_fsdp $(which mgp5) train ...    (weights shared out between them)
    """
    from ..files import read_json
    from ..training.checkpoints import REPORT
    from ..training.run import Interruption, TrainRequest, estimate_stage, train_stage

    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if columns:
        flags["overrides"] = flags["overrides"] | {"data": flags["overrides"].get("data", {}) | columns_of(columns)}
    request = TrainRequest(data=data_of(sources, formats), **flags)
    if request.dry_run:
        return _show_estimate(estimate_stage(request, tell=say), request.config.batch, as_json)
    with Interruption() as stop:
        last = _show(train_stage(request, stop=stop, tell=say), request.stage, as_json)
    stopped = last is not None and last.stopped
    for kind, (number, first) in read_json(request.out / REPORT)["problems"].items() if not as_json else ():
        say(f"{number} x {kind} (first: {first})")
    if not as_json:
        say(_next(request, stopped))
    if stopped:
        raise KeyboardInterrupt


def _next(request: TrainRequest, stopped: bool) -> str:
    """Return what was made, and what to type next."""
    from ..heads import head_class

    out = shlex.quote(str(request.out))
    pages = sorted(request.out.glob("samples/*.html"))
    told = f"What was trained is in {request.out}" + (f", sample pages in {pages[-1].parent}" if pages else "")
    if stopped:
        return f"{told}: go on with --resume"
    stages = {stage.name: stage for stage in head_class(request.head_name).stages}
    if later := [*stages][[*stages].index(request.stage) + 1 :]:
        data = "CAPTIONS" if stages[later[0]].data == "captions" else "STORIES"
        return f"{told}. Next: mgp5 train --stage {later[0]} --model {out} --data {data} --out FOLDER"
    return f"{told}. Next: mgp5 story --model {out} --images PICTURES --out FOLDER"


def data_of(sources: tuple[Path, ...], formats: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Return format and path of each --data; without --format by its files. Raises Mgp5Error when numbers differ."""
    from ..data import find_format

    if not formats:
        return tuple((find_format(path), path) for path in sources)
    if len(sources) != len(formats):
        found = f"{len(sources)} --data but {len(formats)} --format"
        raise Mgp5Error(found, "give one --format for each --data, in the same order", usage=True)
    return tuple(zip(formats, sources, strict=True))


def columns_of(text: str) -> dict[str, str]:
    """Return the settings of --columns. Raises Mgp5Error."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    names = {kind.strip(): name.strip() for kind, _, name in pairs}
    if not {*names} <= {"caption", "image"} or not all(names.values()):
        raise Mgp5Error(f"--columns {text}", "expected caption=NAME,image=NAME, or one of them", usage=True)
    return {f"{kind}_column": name for kind, name in names.items()}


def _show(events: Iterator[Progress], stage: str, as_json: bool) -> Progress | None:
    """Show every update, as a bar or as a line of JSON; return the last one."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    event = None
    columns = TextColumn(stage), BarColumn(8), MofNCompleteColumn(), TextColumn("{task.description}")
    with progress(*columns, disable=as_json) as bar:
        task = bar.add_task("", total=None)
        for event in events:
            bar.update(task, total=event.total, completed=event.step, description=_line(event))
            if as_json:
                click.echo(json.dumps(event.row()))
    return event


def _line(event: Progress) -> str:
    """Return an update in short: it has to fit a terminal of 80 columns; the log has the rest."""
    hours, seconds = divmod(round(event.eta), 3600)
    losses = " ".join(f"{name} {value:.3f}" for name, value in event.losses.items())
    eta = f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
    return f"{eta} {losses} {event.images_per_second:.1f} images/s {event.memory_gib:.1f} GiB"


def _show_estimate(found: StageEstimate, batch: int, as_json: bool) -> None:
    from ..device import host_memory
    from ..memory.estimate import table
    from ..views.tables import show

    memory, tflop = found.memory, round(found.memory.flops / 1e12, 3)
    if as_json:
        values = {"samples": found.samples, "updates": found.updates, "tokens": memory.length, "tflop": tflop}
        parts = {"parts": [asdict(row) for row in memory.rows], "bytes": memory.total.total}
        return click.echo(json.dumps(values | parts | {"host": found.host._asdict()}))
    show(table(memory), file=sys.stderr)
    samples = "an unknown number of samples" if found.samples is None else counted(found.samples, "sample")
    work = f"{samples}, {counted(found.updates, 'update')} of {counted(found.batch, 'sample')}"
    work += f", {batch} of {counted(memory.length, 'token')} at a time"
    say(f"{work}; {memory.total.trained:,} trainable parameters, {tflop} TFLOP per update")
    say(f"of the machine's own memory: {found.host.told()}; {host_memory().told}")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=PATH)
@click.option(
    "--model",
    required=True,
    help="MINIGPT4+GENERATOR or BLIP2+LLM+GENERATOR; for SEED BLIP2+LLM+WORDS+GENERATOR, for MM-Interleaved "
    "CLIP+LLM+GENERATOR, for VARGPT an MLLM.",
)
@click.option("--out", type=PATH, required=True, help="Folder for the model.")
def convert(checkpoints: tuple[Path, ...], model: str, out: Path) -> None:
    """Make a model of the paper's published CHECKPOINTS.

    Give stage1_cc3m.ckpt, then perhaps one of stage 2. For a new MiniGPT-4 give prerained_minigpt4_7b.pth too:

    \b
      mgp5 convert prerained_minigpt4_7b.pth stage1_cc3m.ckpt stage2_vist.ckpt \\
        --model blip2-flan-t5-xxl+vicuna-7b-v0+sd-2.1-base --out vist

    Of SEED give the tokenizer's files; WORDS is where the LLM's tokenizer is:

    \b
      mgp5 convert seed_quantizer.pt --out seed-8b \\
        --model blip2-itm-vit-g+seed-llama-8b+seed-tokenizer-2+UNCLIP

    Of MM-Interleaved give all files of mm_interleaved_pretrain, perhaps with mm_inference.yaml:

    \b
      mgp5 convert pytorch_model*.bin --model clip-vit-l-14+vicuna-13b-v1.3+sd-2.1-base --out mm-13b

    Of VARGPT give VAR's image tokenizer, and the folder of VARGPT-LLaVA v1; or, to train, VAR's decoder and an MLLM:

    \b
      mgp5 convert vae_ch160v4096z32.pth --model VARGPT-LLaVA --out vargpt
      mgp5 convert vae_ch160v4096z32.pth var_d30.pth --model llava-1.5-7b --out vargpt-base
    """
    from ..convert import convert as run
    from ..device import quiet_libraries

    quiet_libraries()
    done = run(checkpoints, model, out)
    for name, value in done.shrunk.items():
        say(f"{name}: words differ from the LLM's own by at most {value:.2g}, which were kept")
    if done.unused:
        say(f"not used: {', '.join(done.unused)}")
    say(f"A model of stage {done.stage} is in {out}" if done.stage else f"MiniGPT-4 is in {out / 'mllm'}")
