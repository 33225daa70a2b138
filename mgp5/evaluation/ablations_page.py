"""The table of the ablations, from what is measured so far: as JSON, as one self-contained page, in the terminal."""

from __future__ import annotations

import base64
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

from ..config import Stage
from ..doctor import machine, versions
from ..files import read_json, write_json, write_text
from ..training import checkpoints as runs
from ..views.html import PAGE, STYLE
from ..views.tables import show, table
from .ablations import ATTRIBUTES, BASELINE, FRECHET, Row, mean_over_seeds, verdict
from .ablations_measure import place
from .page import OWN, bar_chart

if TYPE_CHECKING:
    from .ablations_run import Plan, Run

METRICS = (ATTRIBUTES, FRECHET)
STAGES: dict[Stage, str] = {
    "pretrain": "test captions, after pretraining",
    "finetune": "last pictures of test stories, after finetuning",
}
METHOD = (
    "Attributes: share of the seven attributes of a picture that the judge reads as the true ones. Frechet distance: "
    "of the judge's features, to those of the true pictures; it falls with their number, which all rows share. Means "
    "over seeds, each of which is a training with other first values, order of the data and noise; in brackets 95 % "
    "intervals of Student's t over seeds. All draw the same captions and stories from the same noise. Differences are "
    "to the baseline, or to the row named, of the same seeds; one is within chance where its interval holds zero."
)
WIDE = "main { max-width: 110rem; } td:last-child { text-align: left; min-width: 10rem; white-space: normal; }"
Values = dict[int, dict[str, Any]]  # of a row after a stage, by seed


def report(plan: Plan, rows: Mapping[str, Row], found: Mapping[tuple, Run], seeds: int) -> dict[str, Any]:
    """Write ablations.json and ablations.html of what is measured so far; returns the former."""
    values = {
        (name, stage): _values(plan, row, found[row.training(stage)], seeds)
        for name, row in rows.items()
        for stage in row.stages
        if row.training(stage) in found
    }
    lines = {name: _line(row, values) for name, row in rows.items()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"command": shlex.join(["mgp5", *sys.argv[1:]]), "made": now, "method": METHOD}
    facts |= {"settings": read_json(plan.out / runs.SETTINGS), "versions": versions(), "machine": machine()}
    facts["rows"] = {name: line for name, line in lines.items() if line}
    write_json(plan.out / "ablations.json", facts)
    write_text(plan.out / "ablations.html", _page(plan, rows, found, facts))
    return facts


def _values(plan: Plan, row: Row, run: Run, seeds: int) -> Values:
    drawn = (row.context, row.guidance or plan.guidance)
    files = {seed: place(run.folder(plan.out, seed), drawn) for seed in range(seeds)}
    return {seed: read_json(file) for seed, file in files.items() if file.exists()}


def _line(row: Row, values: Mapping[tuple[str, Stage], Values]) -> dict[str, Any]:
    """A row's numbers after each stage, and how they compare; {} where nothing is measured."""
    line: dict[str, Any] = {}
    for stage in row.stages:
        own, others = values.get((row.name, stage), {}), values.get((row.against, stage), {})
        if not own:
            continue
        entry = line[stage] = {metric: _mean([one[metric] for one in own.values()]) for metric in METRICS}
        trained = [one["training"] for one in own.values()]
        entry |= {"pictures": next(iter(own.values()))["pictures"], "updates": trained[0]["updates"]}
        entry["minutes"] = sum(one["minutes"] for one in trained) / len(trained)
        losses = {name: [one["losses"][name] for one in trained] for name in trained[0]["losses"]}
        entry["losses"] = {name: mean_over_seeds(some)["value"] for name, some in losses.items()}
        if row.name != row.against and (both := sorted(own.keys() & others.keys())):
            entry["difference"] = {m: mean_over_seeds([own[s][m] - others[s][m] for s in both]) for m in METRICS}
    if line:
        line |= {"against": row.against, "papers": dict(row.papers), "source": row.source}
        differences = line.get(row.papers_stage, {}).get("difference", {})
        line["ours"] = {m: verdict(differences[m], sign) for m, sign in row.papers.items() if m in differences}
    return line


def _mean(some: list[float]) -> dict[str, Any]:
    return mean_over_seeds(some) | {"seeds": some}


def show_table(facts: dict[str, Any]) -> None:
    """Print the table."""
    cells = []
    for name, line in facts["rows"].items():
        numbers = [_number(line.get(stage, {}).get(metric), metric) for stage in STAGES for metric in METRICS]
        cells.append([name, *numbers, _papers(line), _ours(line)])
    heads = [f"{metric}, {stage}" for stage in ("pretrained", "finetuned") for metric in ("attributes (%)", "Frechet")]
    show(table("ablations on Storyland", ["", *heads, "papers: CLIP-I, FID", "ours"], cells))


def _number(number: dict[str, Any] | None, metric: str) -> str:
    if not number:
        return ""
    scale = 100 if metric == ATTRIBUTES else 1
    spread = f" ({scale * number['low']:.1f} to {scale * number['high']:.1f})" if "low" in number else ""
    return f"{scale * number['value']:.1f}{spread}"


def _papers(line: dict[str, Any]) -> str:
    """Of attributes, then of the Frechet distance."""
    return ", ".join({-1: "lower", 0: "the same", 1: "higher"}[sign] for sign in line["papers"].values())


def _ours(line: dict[str, Any]) -> str:
    return ", ".join(said or "one seed only" for said in line["ours"].values())


def _page(plan: Plan, rows: Mapping[str, Row], found: Mapping[tuple, Run], facts: dict[str, Any]) -> str:
    settings = facts["settings"]
    updates = settings["updates"]
    about = f"{updates['pretrain']} updates of pretraining and {updates['finetune']} of finetuning in every row; "
    about += f"{settings['samples']} captions and stories; {settings['steps']} steps of denoising, "
    about += f"guidance {settings['guidance']:g} but where a row says otherwise."
    body = [f"<p>{escape(about)}</p>", f"<p><code>{escape(facts['command'])}</code></p>", f"<p>{escape(METHOD)}</p>"]
    body += [_table(facts["rows"]), "<h2>Charts</h2>", "<p><small>Lines are 95 % intervals.</small></p>"]
    for stage, words in STAGES.items():
        for metric in METRICS:
            bars = [(name, line[stage][metric], False) for name, line in facts["rows"].items() if stage in line]
            body += [bar_chart(f"{metric}: {words}", bars)] if bars else []
    body += ["<h2>Pictures of the first seed</h2>", *_strips(plan, rows, found, facts)]
    cpu = facts["machine"].get("gpu") or facts["machine"]["cpu"]
    footer = f"Made with mgp5 {facts['versions'].get('mgp5')}, {facts['made']}, on {cpu}, weights {settings['weights']}"
    return PAGE.format(
        lang="en", title="Ablations on Storyland", style=STYLE + OWN + WIDE, body="\n".join(body), footer=escape(footer)
    )


def _table(lines: dict[str, dict[str, Any]]) -> str:
    stages = "".join(f'<th colspan="3">{escape(words)}</th>' for words in STAGES.values())
    heads = "<th></th><th>papers: CLIP-I, FID</th><th>ours: attributes, Frechet</th>"
    heads += "<th>updates, minutes</th><th>attributes, % &uarr;</th><th>Frechet &darr;</th>" * len(STAGES)
    parts = [f"<tr><th></th><th></th><th></th>{stages}<th></th></tr><tr>{heads}<th>source</th></tr>"]
    for name, line in lines.items():
        against = "" if line["against"] == BASELINE else f" <small>against {escape(line['against'])}</small>"
        cells = f"<td>{escape(name)}</td><td>{escape(_papers(line))}{against}</td><td>{escape(_ours(line))}</td>"
        for stage in STAGES:
            entry = line.get(stage)
            cells += f"<td>{entry['updates']}, {entry['minutes']:.1f}</td>" if entry else "<td></td>"
            for metric in METRICS:
                cells += f"<td>{_number(entry and entry[metric], metric)}{_gap(entry, metric)}</td>"
        parts.append(f"<tr>{cells}<td><small>{escape(line['source'])}</small></td></tr>")
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def _gap(entry: dict[str, Any] | None, metric: str) -> str:
    """The difference, below the number."""
    difference = (entry or {}).get("difference", {}).get(metric)
    return f"<br><small>difference {_number(difference, metric)}</small>" if difference else ""


def _strips(plan: Plan, rows: Mapping[str, Row], found: Mapping[tuple, Run], facts: dict[str, Any]) -> list[str]:
    """What rows drew of the first captions and stories, after the stage that the papers measured."""
    parts = []
    for name, line in facts["rows"].items():
        row = rows[name]
        if row.papers_stage not in line or row.training(row.papers_stage) not in found:
            continue
        folder = found[row.training(row.papers_stage)].folder(plan.out, 0)
        file = place(folder, (row.context, row.guidance or plan.guidance)).with_suffix(".jpg")
        if file.exists():
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            parts.append(f"<p><small>{escape(name)}, {escape(STAGES[row.papers_stage])}</small></p>")
            parts.append(f'<img src="data:image/jpeg;base64,{data}" alt="pictures of {escape(name)}">')
    return parts
