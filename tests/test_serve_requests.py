"""Requests to responses and edits: as known programs send them, and some that mean no good."""

import base64
import json
from io import BytesIO

import pytest
from PIL import Image as pil
from serve_process import HELLO, JSON, data_url, serving_here
from test_serve_hostile import bomb, hold

PNG = base64.b64decode(data_url((20, 20), "blue").partition("base64,")[2])
TOOL = {"type": "image_generation", "partial_images": 2}


@pytest.fixture(scope="module")
def server(small_folder):
    with serving_here(small_folder) as running:
        yield running


def picture(data):
    return pil.open(BytesIO(base64.b64decode(data)))


ITEMS = (  # wrong items of the input of /v1/responses
    *(5, {"type": []}, {"type": "item_reference", "id": "msg_1"}, {"type": "function_call_output", "output": "a"}),
    *({"type": "image_generation_call", "id": "ig_1", "result": result} for result in (5, "%%", "aGVsbG8=")),
    *({"role": "user", "content": [part]} for part in ({"type": "input_file"}, {"type": "input_image"})),
    *({"role": "user", "content": [{"type": "input_image", "image_url": url}]} for url in ("/etc/passwd", "a", 5)),
    {"role": "assistant", "content": "yes"},
)
RESPONSES = {  # wrong values of fields of /v1/responses
    "input": (None, 5, [], "x" * 5000, *([item] for item in ITEMS)),
    "instructions": (5, "\ud800", "x" * 5000),
    "previous_response_id": (5,),
    "max_output_tokens": (-1,),
    "tools": (
        *(5, [{"type": "function", "name": "f"}], [{"type": "web_search"}], [TOOL, TOOL]),
        *([TOOL | more] for more in ({"size": "48x48"}, {"partial_images": 4}, {"input_image_mask": {}})),
    ),
    "tool_choice": ("any", {"type": "function", "name": "f"}),
    "text": ({"format": {"type": "json_schema"}},),
    "background": (True,),
    "truncation": ("auto",),
    "conversation": ("conv_1",),
    "top_logprobs": (3,),
    "store": ("yes",),
}
CALL = {"type": "image_generation_call", "id": "../passwd"}  # one that the server does not keep
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def form(*fields: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    return b"".join(head % (name.encode(), data) for name, data in fields) + end


FORMS = {
    "nothing": b"",
    "another boundary": form().replace(b"--b", b"--c"),
    "no end": form(("prompt", b"a"), ("image", PNG), end=b""),
    "no fields": form(),
    "no image": form(("prompt", b"a")),
    "no prompt": form(("image", PNG)),
    "no picture": form(("prompt", b"a"), ("image", b"hello")),
    "a bomb": form(("prompt", b"a"), ("image", bomb(60_000, 60_000))),
    "too many": form(("prompt", b"a"), *[("image[]", PNG)] * 17),
    "a mask": form(("prompt", b"a"), ("image", PNG), ("mask", PNG)),
    "a wrong number": form(("prompt", b"a"), ("image", PNG), ("n", b"two")),
    "deep": form(("prompt", b"a"), ("image", PNG), ("n", b"[" * 100_000)),
    "not UTF-8": form(("prompt", b"\xff\xfe"), ("image", PNG)),
    "a name of nothing": form(("prompt", b"a"), ("image", PNG), ("", b"a")),
}


def test_bodies_that_mean_no_good(server):
    before = server.metric("mgp5_finished_total")
    bodies = [{"input": "hello", name: value} for name in RESPONSES for value in RESPONSES[name]]
    asked = [("responses", json.dumps({"model": "tiny"} | body).encode(), JSON, 400) for body in bodies]
    asked += [("images/edits", body, FORM, 400) for body in FORMS.values()]
    for body in ({"input": "a", "previous_response_id": "../passwd"}, {"input": [CALL, *HELLO]}, {"input": [CALL]}):
        asked.append(("responses", json.dumps(body).encode(), JSON, 404))
    asked.append(("images/edits", form(), FORM | {"Origin": "http://evil.example"}, 415))  # a web page's
    asked.append(("images/edits", b'{"prompt": "a fox"}', JSON, 415))
    for path, body, headers, status in asked:
        found = server.ask("POST", f"/v1/{path}", body, headers)
        assert found[0] == status, (body[:200], found)
        hold(found[1])
    assert server.metric("mgp5_finished_total") == before


def test_requests_as_open_webui_sends_them(server):
    """Written after open-webui's routers/images.py; chats, titles, images and edits (a form as aiohttp writes it)."""
    seen = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": data_url()}}]
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": seen}]
    chat = {
        "stream": True, "model": "tiny", "messages": talk, "stream_options": {"include_usage": True}, "max_tokens": 4,
    }  # fmt: skip
    status, answer = server.ask("POST", "/v1/chat/completions", json.dumps(chat).encode(), JSON)
    chunks = [json.loads(line[6:]) for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
    assert status == 200 and chunks[-1]["usage"]["completion_tokens"] <= 4
    assert all(isinstance(c["delta"].get("content", ""), str) for chunk in chunks for c in chunk["choices"])
    status, title = server.post("/v1/chat/completions", messages=HELLO, stream=False, max_completion_tokens=10)
    assert status == 200 and isinstance(title["choices"][0]["message"]["content"], str)
    fields = {"model": "tiny", "prompt": "a fox", "n": 1, "size": "16x16", "response_format": "b64_json"}
    status, drawn = server.post("/v1/images/generations", **fields)
    assert status == 200 and picture(drawn["data"][0]["b64_json"]).size == (16, 16)
    kind = 'Content-Type: %s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    pieces = [(kind % ("text/plain; charset=utf-8", name, "")).encode() + str(fields[name]).encode() for name in fields]
    pieces += [(kind % ("image/png", "image[]", f'; filename="image_{i}.png"')).encode() + PNG for i in (0, 1)]
    body = b"".join(b"--b\r\n" + piece + b"\r\n" for piece in pieces) + b"--b--\r\n"
    status, answer = server.ask("POST", "/v1/images/edits", body, FORM)
    assert status == 200 and picture(json.loads(answer)["data"][0]["b64_json"]).size == (16, 16)
