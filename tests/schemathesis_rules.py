"""What a request must hold that a schema cannot say: hooks of `st run`, see examples/serve/README.md."""

import schemathesis
from serve_process import data_url

URL = data_url((2, 2))
# A picture that is text: schemathesis takes a body with bytes for one that breaks the schema.
GIF = "GIF87a\x01\0\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
DRAWN = {"size": "32x32", "stop": None, "timeout": 60, "sampler": "dpm++", "stream_options": None}


@schemathesis.hook
def before_call(context, case, kwargs):
    """Change requests that the schema allows so that the server must answer them."""
    body = case.body
    if not (case.meta and case.meta.generation.mode.is_positive and isinstance(body, dict)):
        return
    body.update({field: value for field, value in DRAWN.items() if field in body})
    for field in ("modalities", "tool_choice"):
        if field in body:
            body.pop("image", None)
    body.pop("previous_response_id", None)  # of a response that there has to be
    for tool in body.get("tools") or []:
        tool["size"] = "auto"
    if case.path.endswith("edits"):
        body["image"] = GIF
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            body[name] = [readable(one) for one in body[name][:2]]


def readable(one):
    """Change a message or an item so that it is short, the user's, and all its images are images."""
    if one.get("type") == "image_generation_call":
        return {"role": "user", "content": "a"}
    one["role"], one["content"] = "user", (one.get("content") or "a")[:4]
    one["images"] = (one.get("images") or [])[:4]
    for part in [*one["content"], *one["images"]]:
        if isinstance(part, dict) and "image_url" in part:
            part["image_url"] = URL
    return one
