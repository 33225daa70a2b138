"""mgp5 train and convert: what makes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
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
    from ..training.run import run

    run(flags)


@click.command()
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
    from ..convert import convert as run
    from ..device import quiet_libraries

    quiet_libraries()
    done = run(checkpoints, model, out)
    for name, value in done.shrunk.items():
        click.echo(f"{name}: words differ from the LLM's own by at most {value:.2g}, which were kept", err=True)
    if done.unused:
        click.echo(f"not used: {', '.join(done.unused)}", err=True)
    click.echo(
        f"A model of stage {done.stage} is in {out}" if done.stage else f"MiniGPT-4 is in {out / 'mllm'}", err=True
    )
