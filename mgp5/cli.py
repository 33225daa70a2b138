"""The command line: the group of all commands, which are in commands/, and how errors are printed."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from . import __version__
from .commands import bench, chat, data, doctor, evaluate, export, models, serve, story, train
from .commands.flags import Group
from .errors import Mgp5Error, told


class Commands(Group):
    """A group that prints an error as one line, and ends with exit code 130 after an interruption."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit codes are 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
        if sys.stdout.errors == "strict":  # of a terminal without UTF-8; a character that it lacks must not end a story
            sys.stdout.reconfigure(errors="replace")
        warnings.showwarning = lambda message, *_: click.echo(f"mgp5: {message}", err=True)
        try:
            return super().invoke(ctx)
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mgp5"
            click.echo(f"mgp5: {error.format_message().rstrip('.')} (see {command} --help)", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("mgp5: interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads stdout any more
            ctx.exit(1)
        except Exception as error:
            if os.environ.get("MGP5_DEBUG") == "1":
                raise
            click.echo(f"mgp5: {told(error)}", err=True)
            ctx.exit(error.exit_code if isinstance(error, Mgp5Error) else 1)


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group("mgp5", cls=Commands, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="mgp5")
def main() -> None:
    """Interleaved text and images from a multimodal LLM with generative vokens (MiniGPT-5).

    Try it, no GPU and no network needed:

      mgp5 story --images examples/picnic --scenes 2 --out out/picnic
    """


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


for command in (
    *(story.story, chat.chat, story.recall),
    *(train.train, train.convert, data.data),
    *(evaluate.eval_command, bench.bench),
    *(models.models, models.pull, models.rm, doctor.doctor),
    *(export.export, serve.serve),
):
    main.add_command(command)
