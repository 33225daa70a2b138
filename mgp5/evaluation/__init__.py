"""How well a model replies: `run.evaluate` takes a request, lets systems reply to samples, and writes a report.

request -> tasks (samples) -> systems and run (replies on disk) -> measure (metrics of replies) -> report.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("EvaluateRequest", "evaluate"):
        raise AttributeError(name)
    from . import request, run

    return getattr(request if name == "EvaluateRequest" else run, name)
