"""mgp5 story and recall: tell stories, one or many, and draw an image of them again."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Mgp5Error
from .flags import generation_options, notes, ray_option, requests_of, view_of

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ..apps.batch import Answer, BatchRequest


@click.command()
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
@ray_option("Spread a batch over a Ray cluster: at ADDRESS, RAY_ADDRESS, or of this machine.")
@click.option("--workers", type=click.IntRange(1), help="With --ray.  [default: one for each GPU, else machine]")
@generation_options
def story(images: Path | None, text: Path | None, scenes: int, out: Path | None, title: str, **flags: Any) -> None:
    """Narrate pictures, illustrate sentences, and continue the story in text and images.

    Lines of a --batch, whose results go to --out as they are done:

    \b
      {"messages": [{"role": "user", "content": "a red fox"}]}
      {"story": [{"path": "a.png"}, {"text": "It snows."}], "scenes": 2}
    """
    if flags["ray"] and not flags["batch"]:
        raise Mgp5Error("--ray spreads the lines of a --batch", "give --batch FILE", usage=True)
    if flags["batch"]:
        if images or text or title or not out:
            found = "--batch goes with --out, and without --images, --text, --title"
            raise Mgp5Error(found, "the lines of the batch say these", usage=True)
        return _batch(out, scenes, flags)
    from ..apps.story import StoryRequest, tell_story
    from ..views.files import free_folder

    model, options = requests_of(flags)
    out, say = out or free_folder("story"), notes(flags)
    request = StoryRequest(images=images, text=text, scenes=scenes, out=out, title=title, model=model, options=options)
    if flags["seed"] is None:
        say(f"seed {options.seed}")
    with closing(tell_story(request, tell=say)) as events, view_of(flags) as view:
        for event in events:
            view(event)


def _batch(out: Path, scenes: int, flags: dict[str, Any]) -> None:
    """Answer the lines of --batch, with a progress bar. Raises Mgp5Error when lines have failed."""
    from contextlib import ExitStack

    from rich.console import Console
    from rich.progress import Progress

    from ..apps.batch import FAILURES, Batch, BatchRequest

    model, options = requests_of(flags)
    request = BatchRequest(
        file=flags["batch"],
        out=out,
        scenes=scenes,
        at_once=flags["at_once"],
        model=model,
        options=options,
        keep_seed=flags["seed"] is None,
    )
    quiet = flags["as_json"] or not sys.stderr.isatty()
    with ExitStack() as stack:
        batch = stack.enter_context(closing(Batch(request)))
        bar = stack.enter_context(Progress(console=Console(stderr=True), disable=quiet))
        answer, workers = _answer(request, flags, stack)
        task = bar.add_task("lines", total=batch.total, completed=len(batch.done))
        for row in stack.enter_context(closing(batch.run(answer, workers))):
            bar.advance(task)
            if flags["as_json"]:
                click.echo(json.dumps(row))
    if batch.failures:
        which = ", ".join(map(str, list(batch.failures)[:9])) + (", ..." if len(batch.failures) > 9 else "")
        hint = f"{out / FAILURES} says why; the same command tries them again"
        raise Mgp5Error(f"{len(batch.failures)} of {batch.total} lines failed, line {which}", hint)
    notes(flags)(f"The results are in {out}")


def _answer(request: BatchRequest, flags: dict[str, Any], stack: ExitStack) -> tuple[Answer, int]:
    """Return what answers the lines, and by how many models; a cluster is left when the stack closes."""
    from ..apps.batch import local_answer

    say = notes(flags)
    if not flags["ray"]:
        return local_answer(request, say), 1
    from ..serving.cluster import absolute, connected, resources

    stack.enter_context(connected(flags["ray"]))
    from ..serving.cluster.spread import spread

    room, count, needs = resources(flags["workers"], request.model.device)
    if count > room:
        raise Mgp5Error(f"--workers {count}, but the cluster has {room} GPUs", f"give at most {room}", usage=True)
    say(f"{count} workers, each with {', '.join(f'{n} {name[4:-1].upper()}' for name, n in needs.items())}")
    return stack.enter_context(spread(count, needs, absolute(request.model))), count


@click.command()
@click.argument("picture", type=click.Path(path_type=Path))
def recall(picture: Path) -> None:
    """Print the command that draws a PICTURE of a story, chat or batch again.

    The story.json beside it tells what was said before. Notes go to stderr:

      eval "$(mgp5 recall story-1/003.png)"
    """
    from ..apps.recall import recall as run

    command, notes = run(picture)
    click.echo(command)
    for note in notes:
        click.echo(note, err=True)
