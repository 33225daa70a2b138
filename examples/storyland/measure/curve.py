"""The demo's training as one picture: what each step's log in WORK says, over its updates (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import click
from matplotlib.figure import Figure

PANELS = {  # run -> its title, and what is drawn: name in the log -> what it is called
    "unet": ("UNet", {"v": "v loss"}),
    "llava": (
        "LLaVA: test split",
        {"test told": "text loss", "text": "attributes read from text", "full": "all"},
    ),
    "captions": ("Pretraining, captions only", {"caption": "caption loss"}),
    "pretrain": ("Pretraining, both losses", {"ldm": "LDM loss", "caption": "caption loss"}),
    "finetune": ("Finetuning", {"ldm": "LDM loss", "text": "text loss"}),
}
SMOOTH = 5  # log lines that one point is the median of, where there are many


@click.command()
@click.option("--work", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A picture; its ending says the format.")
def main(work: Path, out: Path) -> None:
    """Draw the logs of the runs in WORK."""
    figure = Figure(figsize=(4 * len(PANELS), 3.2), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (run, (title, names)) in zip(axes, PANELS.items(), strict=True):
        rows = [json.loads(line) for line in (work / run / "log.jsonl").read_text().splitlines()]
        for name, label in names.items():
            points = {row["step"]: row[name] for row in rows if name in row}  # of steps done twice the later
            axis.plot(*_smooth(sorted(points.items())), label=label)
        axis.set(title=title, xlabel="updates", yscale="log" if run == "captions" else "linear")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=80)


def _smooth(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, each the median of some neighbours."""
    width = SMOOTH if len(points) > 10 * SMOOTH else 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [median(step for step, _ in group) for group in groups], [median(v for _, v in group) for group in groups]


if __name__ == "__main__":
    main()
