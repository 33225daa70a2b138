"""The lines of a batch's file, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Image, inside
from .story import SceneInput

EXPECTED = 'expected {"messages": [...]} or {"story": [...]}, with scenes, title, options'


def read_line(line: bytes) -> dict[str, Any]:
    """A line, with fields of the right types. Raises Mgp5Error."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mgp5Error(f"not JSON ({error})", EXPECTED) from None
    types = {"messages": list, "story": list, "scenes": int, "title": str, "options": dict}
    wrong = not isinstance(row, dict) or any(type(value) is not types.get(name) for name, value in row.items())
    if wrong or ("messages" in row) == ("story" in row) or row.get("scenes", 0) < 0:
        raise Mgp5Error("not a conversation or a story", EXPECTED)
    if not row.get("messages", True) or row.get("story") == []:
        raise Mgp5Error("nothing is given", EXPECTED)
    return row


def given_in(part: Any, root: Path) -> SceneInput:
    """A scene of which a picture, a text or both are given."""
    fields = part.items() if isinstance(part, dict) else [("", None)]
    if not fields or any(name not in ("path", "text") or not isinstance(value, str) for name, value in fields):
        raise Mgp5Error(f"a scene is {json.dumps(part)[:80]}", 'expected {"path": ..., "text": ...}, one or both')
    image = Image(path=inside(root, part["path"])) if "path" in part else None
    if image:
        image.load()
    if image is None and not part["text"].strip():
        raise Mgp5Error("a scene is empty", "give it a path, a text or both")
    return SceneInput(image, part.get("text", "").strip())
