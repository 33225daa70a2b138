"""The command line: parse -> call -> view. Heavy imports stay inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import Mgp5Error

if TYPE_CHECKING:
    from .events import Event
    from .generation import Options
    from .model import MiniGPT5
    from .views.files import StoryFolder

Command = Callable[..., Any]
SEED = click.IntRange(0, 2**62)  # what torch takes, with room to count up


class Commands(click.Group):
    """A group that turns our errors into one line, and an interruption into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mgp5"
            click.echo(f"mgp5: {error.format_message().rstrip('.')}: see {command} --help", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("mgp5: interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
            ctx.exit(1)
        except Exception as error:
            if os.environ.get("MGP5_DEBUG") == "1":
                raise
            known = isinstance(error, Mgp5Error)
            line = str(error) if known else f"{type(error).__name__}: {error} (MGP5_DEBUG=1 shows where)"
            click.echo(f"mgp5: {' '.join(line.splitlines())}", err=True)
            ctx.exit(error.exit_code if known else 1)


@click.group("mgp5", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mgp5")
def main() -> None:
    """Interleaved text and images from a multimodal LLM with generative vokens (MiniGPT-5).

    Try it, no GPU and no network needed:

      mgp5 story --images examples/picnic --scenes 2 --out out/picnic
    """


def generation_options(command: Command) -> Command:
    """Flags that mean the same in every command that generates."""
    for option in reversed(
        (
            click.option("--model", default="demo", show_default=True, help="A name, or the folder of a model."),
            click.option("--seed", type=SEED, help="Seed of text and images; random, and told, if not given."),
            click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps per image."),
            click.option("--guidance", type=float, help="Guidance scale; 1 turns it off.  [default: the model's]"),
            click.option(
                "--guidance-until",
                type=click.FloatRange(0, 1),
                default=1.0,
                metavar="FRACTION",
                help="Guide this share of the steps only: faster, another picture.",
            ),
            click.option(
                "--reuse",
                type=click.IntRange(1),
                default=1,
                metavar="N",
                help="Run the whole UNet in one of N steps only: faster, another picture.",
            ),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
            click.option(
                "--backend",
                type=click.Choice(["auto", "eager", "compile", "triton", "onnx", "trt"]),
                default="auto",
                show_default=True,
                help="What draws: auto takes the fastest that works here.",
            ),
            click.option(
                "--exported",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Made by export, for --backend onnx or trt.  [onnx on a CPU: made when needed, and kept]",
            ),
            click.option(
                "--memory",
                type=click.Choice(["auto", "low", "full"]),
                default="auto",
                show_default=True,
                help="On a GPU: auto saves what it must, low all it can. See doctor.",
            ),
            click.option(
                "--quantize",
                type=click.Choice(["none", "4bit", "8bit"]),
                default="none",
                show_default=True,
                help="Bits of the LLM's layers.",
            ),
            click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any option of generation."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object per event on stdout."),
            click.option(
                "--show",
                type=click.Choice(["auto", "blocks", "off"]),
                default="auto",
                show_default=True,
                help="Images in the terminal (never when piped).",
            ),
        )
    ):
        command = option(command)
    return command


def _without(*names: str) -> Callable[[Command], Command]:
    """Take flags off again that a command has no use for, or has its own of."""

    def take_off(command: Command) -> Command:
        command.__click_params__ = [flag for flag in command.__click_params__ if flag.name not in names]
        return command

    return take_off


@main.command()
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of pictures, each with a .txt of its name or none."
)
@click.option("--text", type=click.Path(path_type=Path), help="File with one scene to illustrate per line.")
@click.option("--scenes", type=click.IntRange(0), default=1, show_default=True, help="How many scenes to add.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the story.  [default: story-1, story-2, ...]")
@click.option("--title", default="", help="Heading of the page.")
@click.option(
    "--batch",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Conversations and stories, one JSON object per line (- for stdin); goes on when given again.",
)
@click.option("--at-once", type=click.IntRange(1), default=8, show_default=True, help="Lines of a batch at a time.")
@generation_options
def story(images: Path | None, text: Path | None, scenes: int, out: Path | None, title: str, **flags: Any) -> None:
    """Narrate pictures, illustrate sentences, and continue the story in text and images.

    Lines of a --batch, whose results go to --out as they are done:

    \b
      {"messages": [{"role": "user", "content": "a red fox"}]}
      {"story": [{"path": "a.png"}, {"text": "It snows."}], "scenes": 2}
    """
    if flags["batch"]:
        if images or text or title or not out:
            raise Mgp5Error("--batch goes with --out, and without --images, --text, --title", "", usage=True)
        return _batch(out, scenes, flags)
    from . import story as stories
    from .hub import resolve
    from .views.files import StoryFolder, free_folder
    from .views.html import write_html

    given = stories.read_folder(images) if images else []
    given += stories.read_lines(text) if text else []
    if not given:
        raise Mgp5Error("there is no story to continue", "give --images DIR, --text FILE or both", usage=True)
    options = _options(flags)
    resolve(flags["model"])  # a wrong name is told before anything is made
    folder = StoryFolder.create(out or free_folder("story"))
    model = _model(flags, folder)
    _tell_seed(flags, options)
    record, complete = stories.Record(), False
    facts = {"model": flags["model"], "seed": options.seed, "options": _facts(flags, options), "title": title}
    try:
        with _view(flags, folder) as view:
            for event in stories.tell(model, given, scenes, options):
                view(event)
                if record(event) and record.made:
                    folder.save(record.conversation, **facts)
        complete = True
    finally:
        if complete or record.made:  # also what was made before an interruption
            folder.save(record.conversation, **facts)
            write_html(*folder.load(), folder.path / "story.html")
            _tell(flags, f"The story is in {folder.path / 'story.html'}")


@main.command()
@click.option(
    "--image", "images", type=click.Path(path_type=Path), multiple=True, help="Picture for the first message."
)
@click.option("--message", "messages", multiple=True, help="Say this and exit; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the conversation.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the conversation in this folder.")
@generation_options
def chat(
    images: tuple[Path, ...], messages: tuple[str, ...], out: Path | None, resume: Path | None, **flags: Any
) -> None:
    """Talk with the model; it answers in text and images."""
    from .chat import Chat, read_picture
    from .hub import resolve
    from .repl import Repl
    from .views.files import StoryFolder

    if out and resume:
        raise Mgp5Error("--out and --resume were both given", "--resume goes on in its own folder", usage=True)
    options = _options(flags)
    given = [read_picture(image) for image in images]
    resolve(flags["model"])  # a wrong name is told before anything is made
    folder = StoryFolder.open(resume) if resume else StoryFolder.create(out) if out else None
    earlier, story_facts = folder.load() if folder and resume else (None, {})
    model = _model(flags, folder)
    _tell_seed(flags, options)
    talk = Chat(model, options, earlier) if earlier else Chat(model, options)
    talk.pending += given
    facts = {"model": flags["model"], "options": _facts(flags, options), "title": story_facts.get("title", "")}
    repl = Repl(talk, folder, lambda place: _view(flags, place), facts)
    if messages:
        repl.say_all(messages)
    elif sys.stdin.isatty():
        repl.run()
    else:
        repl.say_all(line for line in map(str.strip, sys.stdin) if line)
    if repl.folder:
        _tell(flags, f"The conversation is in {repl.folder.path}")


@main.command()
@click.argument("picture", type=click.Path(path_type=Path))
def recall(picture: Path) -> None:
    """Print the command that draws a PICTURE of a story, chat or batch again.

    The story.json beside it tells what was said before. Notes go to stderr:

      eval "$(mgp5 recall story-1/003.png)"
    """
    from .recall import recall as run

    command, notes = run(picture)
    click.echo(command)
    for note in notes:
        click.echo(note, err=True)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's code by which Tab completes commands and flags.

    \b
      bash, in ~/.bashrc:                    eval "$(mgp5 completion bash)"
      zsh, in ~/.zshrc, behind compinit:     eval "$(mgp5 completion zsh)"
      fish: mgp5 completion fish > ~/.config/fish/completions/mgp5.fish
    """
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(main, {}, "mgp5", "_MGP5_COMPLETE").source())


@main.command()
@click.option("--stage", type=click.Choice(["pretrain", "finetune"]), required=True)
@click.option(
    "--data", "sources", required=True, multiple=True, type=click.Path(path_type=Path), help="Folder; repeatable."
)
@click.option(
    "--format", "formats", required=True, multiple=True, help="cc3m, shards, vist, mmdialog or jsonl; one per --data."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--model", required=True, help="What to train: a folder, a name, or a run of the stage before.")
@click.option("--preset", default="paper", show_default=True, help="paper, release, prefix, gill or demo.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="One setting, e.g. lr=1e-4 or lora.rank=4."
)
@click.option("--max-steps", type=click.IntRange(1), help="Updates in all, instead of epochs.")
@click.option("--stop-after", type=click.IntRange(1), help="End after so many updates; go on with --resume.")
@click.option(
    "--vokens", type=click.IntRange(1, 16), default=8, show_default=True, help="Vokens per image (new models)."
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--cache", "caches", multiple=True, type=click.Path(path_type=Path), help="Made by data cache; repeatable."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Tell what would train and how much memory it takes, and stop: no weights are loaded.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per update on stdout.")
def train(**flags: Any) -> None:
    """Train a stage of the paper: captions to vokens (pretrain), or interleaved stories and dialogues (finetune).

    Ctrl-C saves before it ends the run, a second one does not wait. On several GPUs:

      torchrun --nproc-per-node 8 --no-python mgp5 train ...

      accelerate launch --use_fsdp $(which mgp5) train ...    (weights shared out between them)
    """
    from .training import run

    run(flags)


@main.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, help="MINIGPT4+GENERATOR, or BLIP2+LLM+GENERATOR to put a MiniGPT-4 together.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the model.")
def convert(checkpoints: tuple[Path, ...], model: str, out: Path) -> None:
    """Make a model of the paper's published CHECKPOINTS.

    Give stage1_cc3m.ckpt, then perhaps one of stage 2. For a new MiniGPT-4 give prerained_minigpt4_7b.pth too:

    \b
      mgp5 convert prerained_minigpt4_7b.pth stage1_cc3m.ckpt stage2_vist.ckpt \\
        --model blip2-flan-t5-xxl+vicuna-7b-v0+sd-2.1-base --out vist
    """
    from .convert import convert as run
    from .device import quiet_libraries

    quiet_libraries()
    done = run(checkpoints, model, out)
    for name, value in done.shrunk.items():
        click.echo(f"{name}: words differ from the LLM's own by at most {value:.2g}, which were kept", err=True)
    if done.unused:
        click.echo(f"not used: {', '.join(done.unused)}", err=True)
    click.echo(
        f"A model of stage {done.stage} is in {out}" if done.stage else f"MiniGPT-4 is in {out / 'mllm'}", err=True
    )


@main.command()
@click.option("--suite", type=click.Choice(["cpu", "gpu", "kernels", "train"]), default="cpu", show_default=True)
@click.option("--model", help="Instead of the suite's; random weights unless it is trained.")
@click.option("--steps", type=click.IntRange(1), help="Images and replies, or updates, to time in each row.")
@click.option("--batch", type=click.IntRange(1), help="Samples of an update.  [default: 48; 8 on a CPU]")
@click.option("--minutes", type=click.FloatRange(0), help="Rows not begun by then are left out.  [cpu: 5; gpu: 8]")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(["eager", "compile", "triton", "onnx"]),
    multiple=True,
    help="Of ours; repeatable.  [cpu: eager; gpu: all]",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file for the report.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row on stdout.")
def bench(suite: str, out: Path, as_json: bool, **flags: Any) -> None:
    """Measure what the demo draws and writes (cpu), real sizes of models with random weights beside diffusers and
    transformers (gpu), every kernel (kernels), or the first stage of training (train; --model demo on a CPU).

    A chart of the report lies beside it, with the ending .png.
    """
    from .device import quiet_libraries

    quiet_libraries()
    from .bench import report

    report(suite, out, as_json, **flags)


@main.command("eval")
@click.option(
    "--format",
    type=click.Choice(["cc3m", "vist", "mmdialog", "storyland"]),
    required=True,
    help="Of the data; storyland writes its own test split where no --data is given.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder; it goes on there when given again."
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="illustrate, narrate, continue, last, story, caption or dialogue; repeatable.  [default: all of the format]",
)
@click.option(
    "--context",
    "contexts",
    type=click.Choice(["full", "text", "image", "none"]),
    multiple=True,
    help="What questions show of a story; repeatable.  [default: full; of last: all]",
)
@click.option("--limit", type=click.IntRange(1), help="Stories, dialogues or pictures.  [default: all; storyland: 100]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME[=PATH]",
    help="Beside the model: t2i, t2i-tuned=DIR, two-stage, gill=RUN, text-only; repeatable.",
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Repeatable.  [default: all that can be]")
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="Of a metric, see doctor; repeatable.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Replies at a time.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all replies.")
@_without("seed", "show")
@generation_options
def evaluate(**flags: Any) -> None:
    """Measure what a model replies, as the papers do, on CC3M, VIST, MMDialog or Storyland.

    --out gets replies as they come, report.json and report.html. In several processes, one on each GPU:

      torchrun --nproc-per-node 8 --no-python mgp5 eval ...
    """
    from .device import quiet_libraries

    if flags["format"] != "storyland" and flags["data"] is None:
        raise Mgp5Error(f"--format {flags['format']} without --data", "name the folder of the data set", usage=True)
    options = _options(flags)
    quiet_libraries()
    from .evaluation.run import run

    run(flags, options, lambda model, device: _model(flags | {"model": model, "device": device}))


@main.group()
def data() -> None:
    """Make data sets, and caches of them."""


@data.command()
@click.option("--model", required=True, help="Whose frozen parts: what train will be given, or has made.")
@click.option(
    "--data", "sources", required=True, multiple=True, type=click.Path(path_type=Path), help="As of train; repeatable."
)
@click.option("--format", "formats", required=True, multiple=True, help="As of train; one per --data.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the caches.")
@click.option("--kinds", default="latents,captions,features", show_default=True, help="What to cache.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples at a time.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read pictures.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="As data.NAME of train.")
@click.option("--device", default="auto", show_default=True)
def cache(**flags: Any) -> None:
    """Compute once what the frozen parts make of a data set: train --cache DIR then does not.

    latents: of pictures to be drawn, by the VAE: 64 KB each (Stable Diffusion 2.1 at 512 pixels, fp16), 210 GB for
    CC3M. captions: by the text encoders: 158 KB each, 520 GB for CC3M. features: of pictures that are seen, by the
    vision tower: 4.7 MB each of LLaVA-1.5, so for small data only.

    A cache belongs to the weights and transforms that made it, and training with others refuses it. A run that was
    interrupted goes on where it was when it is given again.
    """
    from .caching import run

    run(flags)


@data.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--pairs", type=click.IntRange(0), default=1000, show_default=True)
@click.option("--stories", type=click.IntRange(0), default=200, show_default=True)
@click.option("--dialogs", type=click.IntRange(0), default=200, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
def storyland(out: Path, split: str, pairs: int, stories: int, dialogs: int, seed: int) -> None:
    """Write Storyland, a drawn picture-book world, in the file formats of CC3M, VIST and MMDialog."""
    from rich.console import Console
    from rich.progress import Progress

    from .data.storyland.write import write

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=None)
        write(
            out, split, pairs, stories, dialogs, seed, lambda done, total: bar.update(task, completed=done, total=total)
        )
    click.echo(f"Wrote {out}", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per model on stdout.")
def models(as_json: bool) -> None:
    """List named models: what they are made of, where from, size, licence, and whether they are on this disk.

    A multimodal LLM and a diffusion model make a model to train: LLM+MODEL, for instance llava-1.5-7b+sd-2.1-base.
    """
    from .library import catalogue, here
    from .views.tables import show, table

    rows = catalogue()
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    cells = [[r["name"], r["made_of"], f"{r['size']:.2f}", here(r), r["licence"], ", ".join(r["from"])] for r in rows]
    show(table("named models", ["name", "what", "GB", "on this disk", "licence", "from, mirrors"], cells))


@main.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model from the hub: NAME of mgp5 models, LLM+MODEL, or the folder of a model that names its parts.

    Only what is read is fetched, of the commit that is pinned, and checked against the hub's checksums. Given again,
    it goes on where it was.
    """
    import huggingface_hub.utils

    from .library import pull as run

    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    run(name, lambda line: click.echo(line, err=True))


@main.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Free the disk of a model that was fetched from the hub. Folders of your own are not touched."""
    from .library import GB, free, held

    found = held(name)
    if not found:
        raise Mgp5Error(f"nothing of {name} is in the hub's cache", "mgp5 models lists what is there")
    for place, revision in found:
        click.echo(f"{place} {revision.commit_hash[:8]}: {revision.size_on_disk / GB:.2f} GB", err=True)
    if yes or click.confirm("Delete?", abort=True, err=True):
        free([revision for _, revision in found])


@main.command()
@click.option("--model", help="Tell how much GPU memory it takes in each memory mode; no weights are loaded.")
@click.option("--all", "every", is_flag=True, help="Tell the GPU memory of each named model; takes a minute or two.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(model: str | None, every: bool, as_json: bool) -> None:
    """Tell what this machine has, which weights are here, which engine and kernels are chosen, and why."""
    from .doctor import report

    if model or every:  # nothing else imports them, which takes seconds
        from .device import quiet_libraries

        quiet_libraries()
    report(model, every, as_json)


@main.command("export")
@click.option("--onnx", is_flag=True, help="Write ONNX files and prove that they compute what PyTorch does.")
@click.option("--trt", is_flag=True, help="Build TensorRT engines from them too.")
@click.option("--model", default="demo", show_default=True, help="A name, or the folder of a model.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder for the files.")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Build engines from this exported folder.")
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="mapper, unet or transformer, vae_decoder; with --split also condition, denoiser; repeatable.  [default: all]",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--opset", type=click.Choice(["23", "20", "18"]), default="23", show_default=True)
@click.option("--split", is_flag=True, help="Also what is constant over the steps, and a denoiser that takes it.")
@click.option("--height", type=click.IntRange(1), help="Of the image that proves.  [default: the model's, or 256]")
@click.option("--width", type=click.IntRange(1), help="The same.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Of --trt: batches, sizes, dynamic, ...")
def export(**flags: Any) -> None:
    """Write the mapper, the denoiser and the VAE's decoder as ONNX files, and TensorRT engines of them.

    The files are compared with PyTorch at several sizes, and by a whole image; only what agrees is kept.
    manifest.json beside them tells how well. Engines can be built on another machine from the files alone:

      mgp5 export --trt --from DIR
    """
    from .device import quiet_libraries

    quiet_libraries()
    from .export.job import run

    run(flags, lambda line: click.echo(line, err=True))


def _batch(out: Path, scenes: int, flags: dict[str, Any]) -> None:
    from contextlib import closing
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from .hub import resolve
    from .jobs import FAILURES, Batch, Results, earlier, read_lines

    resolve(flags["model"])  # a wrong name is told before anything is made
    lines, root = read_lines(flags["batch"])
    begun = earlier(out)
    options = _options(flags | ({"seed": begun["options"]["seed"]} if begun and flags["seed"] is None else {}))
    settings = {"scenes": scenes, "options": asdict(options)} | {n: flags[n] for n in ("model", "quantize")}
    total, quiet = sum(bool(line.strip()) for line in lines), flags["as_json"] or not sys.stderr.isatty()
    with closing(Results(out, settings)) as results, Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("lines", total=total, completed=len(results.done))

        def tell(row: dict[str, Any]) -> None:
            bar.advance(task)
            if flags["as_json"]:
                click.echo(json.dumps(row))

        given = {"model": flags["model"], "engine": _engine(flags), "at_once": flags["at_once"]}
        work = Batch(lines=lines, root=root, options=options, scenes=scenes, **given)
        failures = work.run(results, lambda: _model(flags), tell)
    if failures:
        which = ", ".join(map(str, list(failures)[:9])) + (", ..." if len(failures) > 9 else "")
        hint = f"{out / FAILURES} says why; the same command tries them again"
        raise Mgp5Error(f"{len(failures)} of {total} lines failed, line {which}", hint)
    _tell(flags, f"The results are in {out}")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="A public one needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Of the model, as clients say it.  [default: as --model]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Its one line; else MGP5_API_KEY.")
@click.option("--insecure", is_flag=True, help="Serve a public address without a key.")
@click.option("--allow-remote-images", is_flag=True, help="Fetch pictures from public http addresses.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Replies at a time.")
@click.option("--waiting", type=click.IntRange(0), default=64, show_default=True, help="Queue; beyond it 429.")
@click.option("--connections", type=click.IntRange(1), default=512, show_default=True, help="Beyond them 503.")
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most of a reply.")
@click.option("--images", type=click.IntRange(0), default=8, show_default=True, help="Most of a reply.")
@click.option("--max-steps", "steps", type=click.IntRange(1), default=100, show_default=True, help="Most of an image.")
@click.option("--side", type=click.IntRange(1), default=1024, show_default=True, help="Longest of an image drawn.")
@click.option("--pixels", type=click.IntRange(1), default=16_000_000, show_default=True, help="Most of one sent.")
@click.option("--body-megabytes", type=click.IntRange(1), default=32, show_default=True, help="Most of a request.")
@click.option("--seconds", type=click.FloatRange(1), default=600.0, show_default=True, help="Most of a reply.")
@click.option("--patience", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds of a request.")
@click.option("--drain", type=click.IntRange(0), default=60, show_default=True, help="Seconds to finish on SIGTERM.")
@_without("seed", "steps", "guidance", "guidance_until", "reuse", "settings", "as_json", "show")
@generation_options
def serve(**flags: Any) -> None:
    """Serve a model as OpenAI's API does: /v1/chat/completions with text and images in order, in and out, and
    /v1/images/generations; /v1/models, /health and /metrics beside them.

    Requests are decoded and denoised together. See examples/serve/README.md.
    """
    for name in ("fastapi", "uvicorn"):
        if find_spec(name) is None:
            raise Mgp5Error(f"serve needs {name}", "pip install 'mgp5[serve]'")
    from .device import quiet_libraries

    quiet_libraries()
    from .serving.run import run

    run(flags, lambda: _model(flags), lambda line: click.echo(line, err=True))


def _options(flags: dict[str, Any]) -> Options:
    from .config import override, parse_settings
    from .generation import Options

    seed = random.SystemRandom().randrange(2**31) if flags["seed"] is None else flags["seed"]
    given = {name: flags[name] for name in ("steps", "guidance", "guidance_until", "reuse")}
    options = Options(seed=seed, **given)
    return override(options, parse_settings(flags["settings"]))


def _model(flags: dict[str, Any], folder: StoryFolder | None = None) -> MiniGPT5:
    """The model that the flags ask for; without it an empty folder goes again."""
    try:
        return _load(flags)
    except Mgp5Error:
        if folder:
            folder.discard()
        raise


def _load(flags: dict[str, Any]) -> MiniGPT5:
    from .device import pick_device, quiet_libraries, spare_threads

    quiet_libraries()  # before anything imports them
    from . import engines, placement
    from .hub import resolve
    from .model import load, run_by

    device, dtype = pick_device(flags["device"])
    engines.choose(flags["backend"], device, dtype)  # what cannot run is told before anything is loaded
    plan = placement.choose(flags["memory"], resolve(flags["model"]), device, dtype, flags["quantize"])
    backend = plan.engine(flags["backend"])
    if plan.why:
        _tell(flags, plan.why)
    model = load(flags["model"], dtype=dtype, device=str(device), backend=None, memory=plan)
    spare_threads(model)
    choice = run_by(model, backend, flags["exported"])
    if flags["exported"]:
        from .engines.exported import put_mapper_on

        put_mapper_on(model.head, flags["exported"], device, backend)
    if choice.why:
        _tell(flags, f"backend {choice.name or 'diffusers'}: {choice.why}")
    return model


def _view(flags: dict[str, Any], folder: StoryFolder | None) -> Callable[[Event], None]:
    from .views.files import JsonEvents
    from .views.terminal import TerminalView

    if flags["as_json"]:
        return JsonEvents(sys.stdout, folder)
    return TerminalView(flags["show"], folder=folder)


def _facts(flags: dict[str, Any], options: Options) -> dict[str, Any]:
    from dataclasses import asdict

    given = {key: value for key, value in asdict(options).items() if value is not None and key != "seed"}
    return given | _engine(flags)


def _engine(flags: dict[str, Any]) -> dict[str, str]:
    """What else pictures depend on, where it was given."""
    named = {name: str(flags[name]) for name in ("backend", "exported", "quantize")}
    return {name: value for name, value in named.items() if value not in ("auto", "None", "none")}


def _tell_seed(flags: dict[str, Any], options: Options) -> None:
    if flags["seed"] is None:
        _tell(flags, f"seed {options.seed}")


def _tell(flags: dict[str, Any], text: str) -> None:
    if not flags.get("as_json"):
        click.echo(text, err=True)
