"""What a request must hold that a schema cannot say: hooks of `st run`, see examples/serve/README.md."""

from __future__ import annotations

import schemathesis
from serve_process import data_url


@schemathesis.hook
def before_call(context, case, kwargs):
    """Change requests that the schema allows so that the server must answer them."""
    body = case.body
    if not (case.meta and case.meta.generation.mode.is_positive and isinstance(body, dict)):
        return
    drawn = {"size": "32x32", "stop": None, "timeout": 60, "sampler": "dpm++", "stream_options": None}
    body.update({field: value for field, value in drawn.items() if field in body})
    if "modalities" in body:
        body.pop("image", None)
    if "messages" in body:
        body["messages"] = body["messages"][:2]
    for message in body.get("messages", []):
        message["role"], message["content"] = "user", (message.get("content") or "a")[:8]
        for part in message["content"]:
            if isinstance(part, dict) and "image_url" in part:
                part["image_url"] = data_url((2, 2))
