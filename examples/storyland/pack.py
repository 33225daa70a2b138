"""Pack what was trained into a model folder in half precision, ready for `mgp5 --model`: mllm, diffusion and mgp5, or
mgp5 alone beside a folder that has the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

LIMIT, ALONE = 40, 14  # megabytes that the demo may have, and a model that shares its parts


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="Folder with mllm and diffusion.")
@click.option("--share", help="Instead: the folder that has them, as seen from --out.")
@click.option("--generator", type=click.Path(path_type=Path), help="With --share: the folder of one of its own.")
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Run of mgp5 train whose result is packed.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model folder; replaced.")
@click.option("--guidance", default=3.0, show_default=True, help="Default guidance scale of the model.")
@click.option("--temperature", default=0.5, show_default=True, help="Default temperature of its text.")
def main(
    work: Path | None,
    share: str | None,
    generator: Path | None,
    run: Path,
    out: Path,
    guidance: float,
    temperature: float,
) -> None:
    if (work is None) == (share is None):
        raise click.UsageError("give one of --work and --share")
    shutil.rmtree(out, ignore_errors=True)
    copied = {"mgp5": run / "mgp5"} | ({part: work / part for part in ("mllm", "diffusion")} if work else {})
    copied |= {"diffusion": generator} if generator else {}
    for part, source in copied.items():
        shutil.copytree(source, out / part, ignore=shutil.ignore_patterns(".*"))
    if work:
        drop_unread_layer(out / "mllm")
    config = json.loads((out / "mgp5" / "config.json").read_text())
    config |= {part: part if part in copied else f"{share}/{part}" for part in ("mllm", "diffusion")}
    config |= {"guidance": guidance, "temperature": temperature, "world": "storyland"}
    # Messages before a reply, two more than the longest lesson has: of 150 replies late in a dialogue 1 is no sentence
    # of Storyland then, 3 with 7, and 13 with all of the dialogue; attributes are 89.7, 87.7 and 89.7 % right.
    config["history"] = 9
    config["narrate_from"] = "none"  # 65 % of its narrations tell just the change then, 49 % with the history
    (out / "mgp5" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in out.rglob("config.json"):  # a file may know where it was loaded from, which is nobody's business
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    for path in out.rglob("*.safetensors"):
        halve(path)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    limit = LIMIT if work else ALONE
    click.echo(f"{out}: {size:.1f} MB (limit {limit})", err=True)
    if size > limit:
        raise SystemExit(1)


def drop_unread_layer(folder: Path) -> None:
    """LLaVA reads the last but one layer of its vision tower: without the last one it computes the same."""
    config = json.loads((folder / "config.json").read_text())
    if config["vision_feature_layer"] != -2:
        return
    last = config["vision_config"]["num_hidden_layers"] - 1
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not ("vision_tower" in k and f".layers.{last}." in k)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"] = last, -1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def halve(path: Path) -> None:
    """Rewrite a safetensors file with its floats in half precision."""
    tensors = {k: v.half() if v.dtype in (torch.float32, torch.bfloat16) else v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
