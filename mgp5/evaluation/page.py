"""The page of an evaluation, in one file without scripts: numbers beside the papers', charts, and samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..files import write_text
from ..messages import Conversation, Image, Message, Part, Text
from ..views.html import PAGE, STYLE, data_uri
from .measure import METRICS

SIDE = 192  # pixels of an image
PAGE_STYLE = STYLE + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
Bar = tuple[str, dict[str, Any], bool]  # label, number, whether the number is the papers'


def write_page(
    path: Path, report: dict[str, Any], samples: dict[str, list[tuple[Conversation, dict[str, Message]]]]
) -> None:
    """Write the page of what report.json holds.

    `samples` are some of each table: a conversation, whose last message is the true reply, and the replies by system.
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
    title = escape(f"{settings['model']} on {settings['format']}")
    footer = f"Made with mgp5 {report['versions']['mgp5']}, {report['made']}, weights {settings['weights']}"
    body = "\n".join(parts)
    write_text(path, PAGE.format(lang="en", title=title, style=PAGE_STYLE, body=body, footer=escape(footer)))


def _summary(report: dict[str, Any]) -> str:
    data, options = report["data"], report["settings"]["options"]
    problems = ", ".join(f"{count} x {kind}" for kind, count in data["problems"].items()) or "none"
    parts = [f"{data['samples']} samples of {data['groups']} groups (problems: {problems})"]
    if "sampler" in options:  # of a diffusion model
        parts.append(f"{options['steps']} steps of {options['sampler']}")
    if "guidance" in options:
        parts.append(f"guidance {options['guidance'] or 'of the model'}")
    return ", ".join([*parts, f"seed {options['seed']}."])


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return f'<div class="wide"><table>{_row(heads, "th")}{"".join(rows)}</table></div>'


def _row(values: Iterable[object], tag: str = "td", kind: str = "") -> str:
    cells = "".join(f"<{tag}>{value}</{tag}>" for value in values)
    return f'<tr class="{kind}">{cells}</tr>'


def _acceptance(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = "not measured" if row["found"] is None else f"{row['found']:.4f}"
        holds = {None: "", True: "yes", False: "no"}[row["holds"]]
        lines.append(_row((escape(row["what"]), escape(row["wanted"]), found, holds)))
    return _table(("asked of the demo", "wanted", "found", "holds"), lines)


def _numbers(systems: dict[str, Any], published: Sequence[dict[str, Any]]) -> str:
    """Return the table of systems and of the papers' rows, a column for each metric."""
    names = list(dict.fromkeys(name for row in (*systems.values(), *published) for name in row["metrics"]))
    arrows = {name: "&uarr;" if METRICS[name].better == "higher" else "&darr;" for name in names}
    counts = ("replies", "failed", "without a picture that is due", "without a text that is due")
    heads = ("", "replies", "failed", "no picture", "no text", *(f"{escape(name)} {arrows[name]}" for name in names))
    lines = []
    for system, entry in systems.items():
        numbers = [_number(entry["metrics"].get(name)) for name in names]
        lines.append(_row((escape(system), *(entry[name] for name in counts), *numbers)))
    for row in published:
        who = f"{escape(row['model'])} <small>(theirs: {escape(row['source'])})</small>"
        numbers = [row["metrics"].get(name, "") for name in names]
        lines.append(_row((who, *("" for _ in counts), *numbers), kind="theirs"))
    return _table(heads, lines)


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
            for name in row["metrics"].keys() & bars:
                bars[name].append((f"{table}: {row['model']} (theirs)", {"value": row["metrics"][name]}, True))
    return [_bar_chart(name, rows) for name, rows in bars.items() if len(rows) > 1]


def _bar_chart(name: str, bars: Sequence[Bar]) -> str:
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
    box = f"{left + width + 90} {36 + line * len(bars)}"
    return f'<svg viewBox="0 0 {box}" width="{left + width + 90}" role="img">{"".join(parts)}</svg>'


def _sample(conversation: Conversation, replies: dict[str, Message]) -> str:
    *history, truth = conversation.messages
    asked = [part for message in history if message.role != "system" for part in message.content]
    cards = [_card("asked", asked, "asked"), _card("true reply", truth.content)]
    cards += [_card(system, reply.content) for system, reply in replies.items()]
    return f'<div class="row">{"".join(cards)}</div>'


def _card(title: str, content: Sequence[Part], kind: str = "") -> str:
    shown = "".join(f"<p>{escape(p.text)}</p>" if isinstance(p, Text) else _image(p, title) for p in content)
    return f'<div class="card {kind}"><h3>{escape(title)}</h3>{shown}</div>'


def _image(image: Image, title: str) -> str:
    """Return a small JPEG in the page, or the reason why an image cannot be read."""
    try:
        uri, _ = data_uri(image, max_bytes=0, max_side=SIDE)
    except Mgp5Error as error:
        return f"<p>{escape(error.message)}</p>"
    return f'<img src="{uri}" alt="{escape(title)}">'
