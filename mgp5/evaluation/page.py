"""The page of an evaluation, in one file without scripts: numbers beside the papers', charts, and samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..files import write_text
from ..messages import Conversation, Image, Message, Text
from ..views.html import PAGE, STYLE
from .measure import METRICS

SIDE = 192  # pixels of an image
PAGE_STYLE = """
main, header, footer { max-width: 72rem; } h2 { margin: 3rem 0 .75rem; font-size: 1.5rem; }
body { font-size: 1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; background: var(--page); }
th, td { padding: .375rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .theirs { font-style: italic; color: var(--soft); }
small { color: var(--soft); } .row { display: flex; gap: .75rem; margin: 1rem 0; overflow-x: auto; }
.card { flex: 0 0 10.5rem; padding: .5rem; background: var(--page); border-radius: .75rem; font-size: .8125rem; }
.card.asked { flex-basis: 16rem; } .card h3 { margin: 0 0 .25rem; font-size: .8125rem; color: var(--accent); }
.card img { display: inline-block; width: 9.5rem; max-width: 100%; border-radius: .5rem; margin: .125rem 0; }
.card.asked img { width: 4.5rem; } svg { display: block; max-width: 100%; margin: .5rem 0; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); } svg .theirs { fill: var(--soft); }
"""
Bar = tuple[str, dict[str, Any], bool]  # label, number, whether the number is the papers'


def write_page(
    path: Path, report: dict[str, Any], samples: dict[str, list[tuple[Conversation, dict[str, Message]]]]
) -> None:
    """Write the page of a report.

    Args:
        report: what report.json holds.
        samples: some of each table: a conversation, whose last message is the true reply, and the replies by system.
    """
    settings = report["settings"]
    parts = [f"<p>{escape(_summary(report))}</p>", f"<p><code>{escape(report['command'])}</code></p>"]
    if "acceptance" in report:
        parts.append(_acceptance(report["acceptance"]))
    parts += ["<h2>Charts</h2>", "<p><small>Lines are 95 % intervals.</small></p>", *_charts(report)]
    for table, systems in report["tables"].items():
        parts += [f"<h2>{escape(table)}</h2>", _numbers(systems, report["published"].get(table, [])), *_notes(systems)]
        parts += [_sample(conversation, replies) for conversation, replies in samples[table]]
    if report["left_out"]:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report["left_out"].items())
        parts.append(f"<h2>Left out</h2><ul>{rows}</ul>")
    title = f"{settings['model']} on {settings['format']}"
    footer = f"Made with mgp5 {report['versions']['mgp5']}, {report['made']}, weights {settings['weights']}"
    page = PAGE.format(
        lang="en", title=escape(title), style=STYLE + PAGE_STYLE, body="\n".join(parts), footer=escape(footer)
    )
    write_text(path, page)


def _summary(report: dict[str, Any]) -> str:
    data, options = report["data"], report["settings"]["options"]
    problems = ", ".join(f"{count} x {kind}" for kind, count in data["problems"].items()) or "none"
    parts = [f"{data['samples']} samples of {data['groups']} groups (problems: {problems})"]
    if "sampler" in options:  # of a diffusion model
        parts.append(f"{options['steps']} steps of {options['sampler']}")
    if "guidance" in options:
        parts.append(f"guidance {options['guidance'] or 'of the model'}")
    return ", ".join([*parts, f"seed {options['seed']}."])


def _table(rows: Sequence[str]) -> str:
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _cells(tag: str, values: Iterable[object]) -> str:
    return "".join(f"<{tag}>{value}</{tag}>" for value in values)


def _acceptance(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"<tr>{_cells('th', ('asked of the demo', 'wanted', 'found', 'holds'))}</tr>"]
    for row in rows:
        found = "not measured" if row["found"] is None else f"{row['found']:.4f}"
        holds = {None: "", True: "yes", False: "no"}[row["holds"]]
        lines.append(f"<tr>{_cells('td', (escape(row['what']), escape(row['wanted']), found, holds))}</tr>")
    return _table(lines)


def _numbers(systems: dict[str, Any], published: Sequence[dict[str, Any]]) -> str:
    """Return the table of systems and of the papers' rows, a column for each metric."""
    rows = [*systems.values(), *published]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    arrows = {name: "&uarr;" if METRICS[name].better == "higher" else "&darr;" for name in names}
    counts = ("replies", "failed", "without a picture that is due", "without a text that is due")
    heads = ("", "replies", "failed", "no picture", "no text", *(f"{escape(name)} {arrows[name]}" for name in names))
    lines = [f"<tr>{_cells('th', heads)}</tr>"]
    for system, entry in systems.items():
        numbers = [_number(entry["metrics"].get(name)) for name in names]
        lines.append(f"<tr>{_cells('td', (escape(system), *(entry[name] for name in counts), *numbers))}</tr>")
    for row in published:
        who = f"{escape(row['model'])} <small>(theirs: {escape(row['source'])})</small>"
        numbers = [row["metrics"].get(name, "") for name in names]
        lines.append(f'<tr class="theirs">{_cells("td", (who, *("" for _ in counts), *numbers))}</tr>')
    return _table(lines)


def _notes(systems: dict[str, Any]) -> list[str]:
    """Return the first failures of each system, and metrics that this table has no number of."""
    lines = [f"{system}, failed: {reason}" for system, entry in systems.items() for reason in entry["failures"]]
    lines += [f"{system}, no {n}: {why}" for system, entry in systems.items() for n, why in entry["left_out"].items()]
    return [f"<p><small>{escape(line)}</small></p>" for line in lines]


def _number(number: dict[str, Any] | None) -> str:
    if number is None:
        return ""
    spread = f" <small>{number['low']:.3f} to {number['high']:.3f}</small>" if "low" in number else ""
    return f"{number['value']:.4f}{spread} <small>n {number['n']}</small>"


def _charts(report: dict[str, Any]) -> list[str]:
    """Return a chart of each metric that more than one table or system has."""
    bars: dict[str, list[Bar]] = {}
    for table, systems in report["tables"].items():
        for system, entry in systems.items():
            for name, number in entry["metrics"].items():
                bars.setdefault(name, []).append((f"{table}: {system}", number, False))
        for row in report["published"].get(table, []):
            for name, value in row["metrics"].items():
                if name in bars:
                    bars[name].append((f"{table}: {row['model']} (theirs)", {"value": value}, True))
    return [bar_chart(name, rows) for name, rows in bars.items() if len(rows) > 1]


def bar_chart(name: str, bars: Sequence[Bar]) -> str:
    """Return an SVG of horizontal bars with their intervals, the papers' in grey."""
    left, width, line = 330, 420, 24
    longest = max([max(number["value"], number.get("high", 0)) for _, number, _ in bars]) or 1
    parts = [f'<text x="0" y="16" font-weight="600">{escape(name)}</text>']
    for row, (label, number, theirs) in enumerate(bars):
        top = 28 + row * line
        end = max(1.0, width * number["value"] / longest)
        colour, kind = ("var(--soft)", ' class="theirs"') if theirs else ("var(--accent)", "")
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end"{kind}>{escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{top + 2}" width="{end:.1f}" height="{line - 8}" rx="3" fill="{colour}"/>')
        if "low" in number:
            low, high = (left + width * max(0, number[side]) / longest for side in ("low", "high"))
            middle = top + line / 2 - 2
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="var(--ink)" stroke-width="2"/>')
            end = max(end, high - left)
        parts.append(f'<text x="{left + end + 8:.1f}" y="{top + 14}"{kind}>{number["value"]:.4g}</text>')
    height = 36 + line * len(bars)
    return (
        f'<svg viewBox="0 0 {left + width + 90} {height}" width="{left + width + 90}" role="img">{"".join(parts)}</svg>'
    )


def _sample(conversation: Conversation, replies: dict[str, Message]) -> str:
    *history, truth = conversation.messages
    asked = [part for message in history if message.role != "system" for part in message.content]
    cards = [("asked", "asked", asked), ("", "true reply", list(truth.content))]
    cards += [("", system, list(reply.content)) for system, reply in replies.items()]
    return f'<div class="row">{"".join(_card(*card) for card in cards)}</div>'


def _card(kind: str, title: str, content: Sequence[Text | Image]) -> str:
    shown = "".join(f"<p>{escape(p.text)}</p>" if isinstance(p, Text) else _image(p, title) for p in content)
    return f'<div class="card {kind}"><h3>{escape(title)}</h3>{shown}</div>'


def _image(image: Image, title: str) -> str:
    """Return a small JPEG in the page, or the reason why an image cannot be read."""
    try:
        picture = image.load()
    except Mgp5Error as error:
        return f"<p>{escape(error.message)}</p>"
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(title)}">'
