"""mgp5 story and recall: tell stories, one or many, and draw an image of them again."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import Mgp5Error, counted
from .flags import (
    COUNT,
    PATH,
    fill,
    generation_options,
    notes,
    progress,
    random_seed,
    ray_option,
    requests_of,
    say,
    view_of,
)

if TYPE_CHECKING:
    from ..apps.batch import Answer, BatchRequest
    from ..options import ModelRequest, Options


@click.command()
@click.argument("files", nargs=-1, type=PATH, metavar="[PICTURES]...")
@click.option(
    "--images", type=PATH, multiple=True, help="Pictures, or folders of them, each with a .txt of its name or without."
)
@click.option("--text", type=PATH, help="File with one scene to illustrate per line.")
@click.option("--scenes", type=click.IntRange(0), help="How many scenes to add.  [default: 1]")
@click.option("--out", type=PATH, help="Folder for the story.  [default: story-1, story-2, ...]")
@click.option("--resume", is_flag=True, help="Make the scenes that the story in --out lacks.")
@click.option("--scene", type=COUNT, help="Make this scene of the story in --out anew.")
@click.option("--overwrite", is_flag=True, help="Put the story in the place of the one in --out.")
@click.option("--skip-bad", is_flag=True, help="Leave out pictures that cannot be read.")
@click.option("--title", default="", show_default=False, help="Heading of the page.")
@click.option(
    "--batch",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Conversations and stories, one JSON object per line (- for stdin); goes on when given again.",
)
@click.option("--at-once", type=COUNT, default=8, help="Lines of a batch at a time.")
@ray_option("Spread a batch over a Ray cluster: at ADDRESS, RAY_ADDRESS, or of this machine.")
@click.option("--workers", type=COUNT, help="With --ray.  [default: one for each GPU, else machine]")
@generation_options
def story(**flags: Any) -> None:
    """Narrate pictures, illustrate sentences, and continue the story in text and images.

    Lines of a --batch, whose results go to --out as they are done:

    \b
      {"messages": [{"role": "user", "content": "a red fox"}]}
      {"story": [{"path": "a.png"}, {"text": "It snows."}], "scenes": 2}
    """
    if flags["ray"] and not flags["batch"]:
        raise Mgp5Error("--ray spreads the lines of a --batch", "give --batch FILE", usage=True)
    if flags["batch"]:
        alone = ("images", "files", "text", "title", "resume", "scene", "overwrite", "skip_bad")
        if any(flags[name] for name in alone) or not flags["out"]:
            found = "--batch goes with --out, and without pictures, --text, --title, --resume, --scene, --overwrite"
            raise Mgp5Error(found, "the lines of the batch say these", usage=True)
        return _batch(flags)
    from ..apps.story import StoryRequest, tell_story
    from ..views.files import free_folder

    flags["images"], tell = flags["images"] + flags.pop("files"), notes(flags)
    again = flags["out"] and (flags["resume"] or flags["scene"])
    model, options = _requests_again(flags) if again else requests_of(flags)
    flags["out"] = flags["out"] or free_folder("story")
    request = fill(StoryRequest, flags, model=model, options=options)
    if flags["seed"] is None:
        tell(f"seed {options.seed}")
    with closing(tell_story(request, tell=tell)) as events, view_of(flags) as view:
        for event in events:
            view(event)


def _requests_again(flags: dict[str, Any]) -> tuple[ModelRequest, Options]:
    """Return what the story in --out was told by, with the flags that were given; a scene anew has another seed."""
    from ..apps.earlier import recorded_request
    from ..options import ModelRequest

    model, options = recorded_request(flags["out"])
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in flags.items() if source(name) is ParameterSource.COMMANDLINE}
    engine = {field.name for field in fields(ModelRequest)} & given.keys()
    image = {name: given[name] for name in ("seed", "steps", "guidance", "guidance_until", "reuse") if name in given}
    if flags["scene"]:
        image = {"seed": random_seed(), "image_seed": None} | image
    places = {"device": flags["device"], "memory": flags["memory"]}
    return replace(model, **places | {name: given[name] for name in engine}), options.updated(image | flags["settings"])


def _batch(flags: dict[str, Any]) -> None:
    """Answer the lines of --batch, with a progress bar. Raises Mgp5Error when lines have failed."""
    from ..apps.batch import FAILURES, Batch, BatchRequest

    model, options = requests_of(flags)
    more = {"file": flags["batch"], "keep_seed": flags["seed"] is None}
    more["scenes"] = 1 if flags["scenes"] is None else flags["scenes"]
    request = fill(BatchRequest, flags, model=model, options=options, **more)
    quiet = flags["as_json"] or not sys.stderr.isatty()
    with ExitStack() as stack:
        batch = stack.enter_context(closing(Batch(request)))
        bar = stack.enter_context(progress(disable=quiet))
        answer, workers = _answer(request, flags, stack)
        task = bar.add_task("lines", total=batch.total, completed=len(batch.done))
        for row in stack.enter_context(closing(batch.run(answer, workers))):
            bar.advance(task)
            if flags["as_json"]:
                click.echo(json.dumps(row))
    if told := list(batch.notes.items()):
        more = f" ({counted(len(told) - 1, 'more line')} so)" if told[1:] else ""
        notes(flags)(f"line {told[0][0]}: {told[0][1]}{more}")
    if batch.failures:
        which = ", ".join(map(str, list(batch.failures)[:9])) + (", ..." if len(batch.failures) > 9 else "")
        hint = f"{request.out / FAILURES} says why; the same command tries them again"
        raise Mgp5Error(f"{len(batch.failures)} of {batch.total} lines failed, line {which}", hint)
    notes(flags)(f"The results are in {request.out}")


def _answer(request: BatchRequest, flags: dict[str, Any], stack: ExitStack) -> tuple[Answer, int]:
    """Return what answers the lines, and by how many models; a cluster is left when the stack closes."""
    from ..apps.batch import local_answer

    tell = notes(flags)
    if not flags["ray"]:
        return local_answer(request, tell), 1
    from ..serving.cluster import absolute, connected, resources

    stack.enter_context(connected(flags["ray"]))
    from ..serving.cluster.spread import spread

    room, count, needs = resources(flags["workers"], request.model.device)
    if count > room:
        raise Mgp5Error(f"--workers {count}, but the cluster has {room} GPUs", f"give at most {room}", usage=True)
    tell(f"{counted(count, 'worker')}, each with {', '.join(f'{n} {name[4:-1].upper()}' for name, n in needs.items())}")
    return stack.enter_context(spread(count, needs, absolute(request.model))), count


@click.command()
@click.argument("picture", type=PATH)
@click.option("--run", "at_once", is_flag=True, help="Draw it, instead of printing the command.")
def recall(picture: Path, at_once: bool) -> None:
    """Print the command that draws a PICTURE of a story, chat or batch again.

    The story.json beside it tells what was said before. Notes go to stderr.
    """
    from ..apps.recall import recall as find

    found = find(picture)
    for note in found.notes:
        say(note)
    if not at_once:
        click.echo(found.command)
    elif code := found.run():
        raise click.exceptions.Exit(code)
