"""Requests that mean no good: each gets the right status and one line, and the server goes on serving others."""

import base64
import json
import re
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from serve_process import HELLO, JSON, data_url, serving_here

from mgp5.serving.request import Limits

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture(scope="module")
def server(small_folder):
    small = {"tokens": 64, "images": 2, "steps": 50, "side": 64, "pixels": 10_000, "body_bytes": 2**20}
    with serving_here(small_folder, rows=2, waiting=2, limits=Limits(body_seconds=1.0, **small)) as running:
        yield running


def chat(**fields) -> bytes:
    return json.dumps({"model": "tiny", "messages": HELLO} | fields).encode()


def images(**fields) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "a fox"} | fields).encode()


def raw(text: str) -> bytes:
    """A field of a chat request as it is, after a valid start."""
    return f'{{"model": "tiny", "messages": {json.dumps(HELLO)}, {text}}}'.encode()


def said(*content, role="user") -> bytes:
    return chat(messages=[{"role": role, "content": list(content)}])


def shown(url) -> bytes:
    return said({"type": "image_url", "image_url": {"url": url}})


def encoded(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is that large."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head, data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(99))
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", data) + piece(b"IEND", b"")


PNG = base64.b64decode(data_url().partition("base64,")[2])
USER = {"role": "user"}
BODIES = {
    "no body": b"",
    "half a JSON": chat()[:-5],
    "not JSON": b"hello",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "a string": b'"model"',
    "deep": b"[" * 100_000,
    "deep inside": raw('"user": ' + "[" * 50_000),
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a name of half a surrogate": raw('"\\ud800": 1'),
    "no messages": b'{"model": "tiny"}',
    "no model": json.dumps({"messages": HELLO}).encode(),
    "NaN": raw('"guidance": NaN'),
    "infinity": raw('"guidance": 1e999'),
    "minus infinity": raw('"temperature": -Infinity'),
    "steps beyond numbers": raw('"steps": ' + "9" * 400),
    "digits without end": raw('"steps": ' + "9" * 10_000),
    "text alone, with an image": chat(modalities=["text"], image="always"),
    "no parts": said(),
    "another part": said({"type": "input_audio", "input_audio": {}}),
    "a part without type": said({"text": "hello"}),
    "text of a number": said({"type": "text", "text": 5}),
    "a file's part": said({"type": "image", "path": "/etc/passwd"}),
    "a URL of a number": said({"type": "image_url", "image_url": 5}),
    "calls of tools": chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, *HELLO]),
    "too many images": said(*[{"type": "image_url", "image_url": {"url": data_url((2, 2))}}] * 17),
}
FIELDS = {  # wrong values of fields of a chat
    "messages": (
        *([], "hello", ["hello"], HELLO * 300, [{"role": "root", "content": "hello"}], [USER]),
        [*HELLO, {"role": "assistant", "content": "yes"}],
        *([USER | {"content": content}] for content in (None, 5, "\ud800", "x" * 5000)),
    ),
    "steps": (-1, 0, 51, "20", 1.5, True),
    "guidance": (-1,),
    "temperature": (-0.1,),
    "top_p": (0, 2),
    "repetition_penalty": (0,),
    "seed": (-1, 2**80),
    "max_tokens": (-1,),
    "stop": (5, ["a", 5], ["a"] * 17),
    "max_images": (3,),
    "n": (2,),
    "modalities": ([], ["audio"]),
    "image": ("perhaps",),
    "sampler": ("__import__('os')",),
    "size": ("64", "-64x64", "0x0", "17x16", "128x64", "48x48", "9" * 999 + "x64", [64, 64]),
    "stream": ("yes",),
    "timeout": (0,),
    "tools": ([{"type": "function"}], {}),
    "frequency_penalty": (0.5,),
    "logprobs": (True, 0),
    "response_format": ({"type": "json_object"},),
    "backend": ("trt",),
}
URLS = (
    *("/etc/passwd", "file:///etc/passwd", "../../secret.png", "ftp://example.com/a.png", 5),
    *("http://example.com/a.png", "http://127.0.0.1/a.png"),
    *("data:image/png;base64,%%%%", "data:image/png;base64,abcde", "data:image/png,abc"),
    *("data:text/html;base64,aGVsbG8=", "data:image/png;base64,", data_url((101, 100))),
    *(encoded(data) for data in (b"hello, this is text", PNG[: len(PNG) // 2], bomb(60_000, 60_000), bomb(90, 90))),
    encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"),
    encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
)
DRAWINGS = {  # wrong values of fields of /v1/images/generations
    "prompt": (None, "", ["a"], "x" * 5000), "n": (0, 3), "response_format": ("url",), "output_format": ("webp",),
    "partial_images": (4, "2"), "negative_prompt": ("ugly",), "num_inference_steps": (0, 51), "guidance_scale": (-1,),
    "extra_body": ({"steps": 0}, 5),
}  # fmt: skip
OTHERS = {
    "another model": (404, "POST", CHAT, chat(model="gpt"), JSON),
    "a model that climbs": (404, "GET", "/v1/models/../../etc/passwd", None, {}),
    "another path": (404, "GET", "/v1/files", None, {}),
    "a path of a file": (404, "GET", "/../../../etc/passwd", None, {}),
    "an encoded path": (404, "GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}),
    "the API before chat": (404, "POST", "/v1/completions", b"{}", JSON),
    "GET for POST": (405, "GET", CHAT, None, {}),
    "DELETE": (405, "DELETE", "/v1/models", None, {}),
    "a question before": (405, "OPTIONS", CHAT, None, {"Origin": "http://evil.example"}),
    "a form": (415, "POST", CHAT, b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}),
    "plain text": (415, "POST", CHAT, chat(), {"Content-Type": "text/plain"}),
    "no type": (415, "POST", CHAT, chat(), {}),
    "another host": (421, "GET", "/v1/models", None, {"Host": "evil.example"}),
    "a huge body": (413, "POST", CHAT, chat(user="x" * 2**20), JSON),
    "a huge length": (413, "POST", CHAT, None, JSON | {"Content-Length": "9" * 18}),
    "a negative length": (400, "POST", CHAT, None, JSON | {"Content-Length": "-1"}),
    "two lengths": (400, "POST", CHAT, b"{}", JSON | {"Content-Length": "1, 2"}),
}


def hold(body: bytes) -> None:
    """It is an error as OpenAI's API tells it, in one line, that repeats nothing that was sent."""
    if not body.startswith(b"Invalid HTTP"):  # what is no request at all is answered in plain text
        error = json.loads(body)["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
        assert set(error) == {"message", "type", "param", "code"}
        assert "passwd" not in error["message"] and "Traceback" not in error["message"]


def test_bodies(server):
    before = server.metric("mgp5_finished_total")
    bodies = [(CHAT, name, body) for name, body in BODIES.items()]
    bodies += [(CHAT, (name, value), chat(**{name: value})) for name in FIELDS for value in FIELDS[name]]
    bodies += [(CHAT, url, shown(url)) for url in URLS]
    bodies += [(IMAGES, (name, value), images(**{name: value})) for name in DRAWINGS for value in DRAWINGS[name]]
    for path, name, body in bodies:
        found = server.ask("POST", path, body, JSON)
        assert found[0] == 400, (str(name)[:200], found)
        hold(found[1])
    assert len(bodies) >= 90 and server.metric("mgp5_finished_total") == before
    assert works(server)


def test_an_error_says_in_words_where_it_is(server):
    shown = [{"type": "image_url", "image_url": {"link": "a"}}]
    more = [{"type": "image_url", "image_url": "a", "link": "a"}]
    for fields, told in (
        ({"messages": [*HELLO, {"role": "assistant", "content": 5}]}, "messages.1.content: expected a valid string or"),
        ({"messages": [{"role": "user", "content": shown}]}, "messages.0.content.0.image_url.url: missing"),
        ({"messages": [{"role": "user", "content": more}]}, "messages.0.content.0.link: not a field of this request"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content.0: expected a part with a"),
        (
            {"messages": [{"role": "user", "content": [5]}]},
            "messages.0.content.0: expected an object or a valid string",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: expected 'system', 'developer', 'user'"),
        ({"tools": [{"type": "function"}]}, "tools: not supported here, expected [], or leave it out"),
        ({"tempreature": 1}, "tempreature: not a field of this request, leave it out"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected"),
        ({"negative_prompt": "ugly"}, "negative_prompt: not supported, leave it out: pictures are drawn from what"),
        ({"size": "512x512"}, "size is 512x512, expected 16x16, which this model draws best, or sides up to 32"),
    ):
        assert json.loads(server.ask("POST", CHAT, chat(**fields), JSON)[1])["error"]["message"].startswith(told)
    for path, method in (("/v1/completions", "POST"), ("/chat/completions", "POST"), ("/v1", "GET")):
        told = json.loads(server.ask(method, path, b"{}", JSON)[1])["error"]["message"]
        assert "nothing at this address, expected POST /v1/chat/completions, POST /v1/responses, POST" in told


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_wrong_around_a_body(server, name):
    status, *request = OTHERS[name]
    found = server.ask(*request)
    assert found[0] == status, found
    hold(found[1])


def works(server) -> bool:
    """Whether it serves others; with random weights a reply's text may be empty."""
    status, reply = server.post(CHAT, messages=HELLO, image="always", steps=2, max_tokens=3, seed=0)
    return status == 200 and reply["choices"][0]["message"]["images"][0]["type"] == "image_url"


def talk(server, *pieces: bytes, shut: bool = False) -> bytes:
    """Send bytes as they are and read to the end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
    return answer


def header(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close"
    return f"POST {CHAT} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def test_clients_do_not_write_the_metrics(server):
    for i in range(20):
        assert server.ask("DELETE", f"/v1/models/%22%20{i}")[0] == 405
        assert server.ask("GET", f"/v1/models/%22%0Amgp5_running%209{i}")[0] == 404
    lines = server.ask("GET", "/metrics")[1].decode().splitlines()
    assert 'mgp5_answers_total{path="/v1/models",status="405"} ' in "\n".join(lines)
    assert all(line.startswith("#") or len(line.split(" ")) == 2 for line in lines) and len(lines) < 100


def test_slow_and_broken_connections(server):
    assert talk(server, b"GET /health HT") == b""  # hung up on
    assert b" 408 " in talk(server, header(chat(), 500), chat()[:20])
    assert b" 400 " in talk(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n")
    long = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"
    assert b" 200 " not in talk(server, long)
    chunked = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked += "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert b" 413 " in talk(server, chunked.encode(), *[b"40000\r\n" + b"x" * 0x40000 + b"\r\n"] * 5, b"0\r\n\r\n")
    assert b" 400 " in talk(server, chunked.encode(), b"zz\r\n")
    before = server.metric("mgp5_cancelled_total")
    body = chat(stream=True, image="always", steps=50, max_tokens=64)
    for _ in range(2):  # half-closed, and torn off
        talk(server, header(body), body, shut=True)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(header(body) + body)
            connection.recv(100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.until("mgp5_cancelled_total", before + 2)
    assert works(server)


def test_a_full_queue_is_429(server):
    def one(number):
        return server.post(CHAT, messages=HELLO, image="always", steps=50, max_tokens=40, seed=number)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    assert all(answer["error"]["type"] == "rate_limit_error" for status, answer in answers if status == 429)
    assert works(server) and server.metric("mgp5_running") == server.metric("mgp5_waiting") == 0


def test_no_foreign_origin_is_let_in(server):
    status, answer = server.ask("GET", "/v1/models", headers={"Origin": "http://evil.example"})
    assert status == 200 and b"tiny" in answer
    fields = b"Host: localhost\r\nOrigin: http://evil.example\r\nConnection: close\r\n\r\n"
    found = talk(server, b"GET /v1/models HTTP/1.1\r\n" + fields)
    assert b"access-control" not in found.lower() and not re.search(rb"(?i)^server:", found, re.MULTILINE)
