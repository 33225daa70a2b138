"""Requests that mean no good: each gets the right status and one line, and the server goes on serving others."""

from __future__ import annotations

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

from mgp5.serving.limits import Limits

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

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header) + piece(b"IDAT", zlib.compress(bytes(99))) + piece(b"IEND", b"")
    )


PNG = base64.b64decode(data_url().partition("base64,")[2])
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
    "half a surrogate said": chat(messages=[{"role": "user", "content": "\ud800"}]),
    "no messages": b'{"model": "tiny"}',
    "no model": json.dumps({"messages": HELLO}).encode(),
    "empty messages": chat(messages=[]),
    "messages of text": chat(messages="hello"),
    "a message of text": chat(messages=["hello"]),
    "too many messages": chat(messages=HELLO * 300),
    "another role": chat(messages=[{"role": "root", "content": "hello"}]),
    "the assistant last": chat(messages=[*HELLO, {"role": "assistant", "content": "yes"}]),
    "no content": chat(messages=[{"role": "user"}]),
    "null content": chat(messages=[{"role": "user", "content": None}]),
    "content of a number": chat(messages=[{"role": "user", "content": 5}]),
    "no parts": said(),
    "another part": said({"type": "input_audio", "input_audio": {}}),
    "a part without type": said({"text": "hello"}),
    "text of a number": said({"type": "text", "text": 5}),
    "a file's part": said({"type": "image", "path": "/etc/passwd"}),
    "too long": chat(messages=[{"role": "user", "content": "x" * 5000}]),
    "NaN": raw('"guidance": NaN'),
    "infinity": raw('"guidance": 1e999'),
    "minus infinity": raw('"temperature": -Infinity'),
    "negative steps": chat(steps=-1),
    "no steps": chat(steps=0),
    "too many steps": chat(steps=51),
    "steps of text": chat(steps="20"),
    "steps of a half": chat(steps=1.5),
    "steps of true": chat(steps=True),
    "steps beyond numbers": raw('"steps": ' + "9" * 400),
    "digits without end": raw('"steps": ' + "9" * 10_000),
    "negative guidance": chat(guidance=-1),
    "negative temperature": chat(temperature=-0.1),
    "top_p 0": chat(top_p=0),
    "top_p 2": chat(top_p=2),
    "no penalty": chat(repetition_penalty=0),
    "a negative seed": chat(seed=-1),
    "a seed beyond numbers": chat(seed=2**80),
    "negative tokens": chat(max_tokens=-1),
    "too many tokens": chat(max_tokens=65),
    "two kinds of tokens": chat(max_tokens=4, max_completion_tokens=5),
    "too many images": chat(max_images=3),
    "two replies": chat(n=2),
    "no modality": chat(modalities=[]),
    "another modality": chat(modalities=["audio"]),
    "text alone, with an image": chat(modalities=["text"], image="always"),
    "another policy": chat(image="perhaps"),
    "another sampler": chat(sampler="__import__('os')"),
    "a size without height": chat(size="64"),
    "a negative size": chat(size="-64x64"),
    "no size": chat(size="0x0"),
    "an odd size": chat(size="17x16"),
    "a large size": chat(size="128x64"),
    "a size beyond numbers": chat(size="9" * 999 + "x64"),
    "size of numbers": chat(size=[64, 64]),
    "stream of text": chat(stream="yes"),
    "no time": chat(timeout=0),
    "what is not known": chat(tools=[]),
    "a backend": chat(backend="trt"),
    "a path": shown("/etc/passwd"),
    "a file": shown("file:///etc/passwd"),
    "a path that climbs": shown("../../secret.png"),
    "a remote image": shown("http://example.com/a.png"),
    "this machine": shown("http://127.0.0.1/a.png"),
    "another scheme": shown("ftp://example.com/a.png"),
    "a URL of numbers": said({"type": "image_url", "image_url": 5}),
    "a URL without object": said({"type": "image_url", "image_url": data_url()}),
    "bad base64": shown("data:image/png;base64,%%%%"),
    "base64 of bad length": shown("data:image/png;base64,abcde"),
    "no base64": shown("data:image/png,abc"),
    "text as data": shown("data:text/html;base64,aGVsbG8="),
    "an empty picture": shown("data:image/png;base64,"),
    "not a picture": shown(encoded(b"hello, this is text")),
    "half a picture": shown(encoded(PNG[: len(PNG) // 2])),
    "a bomb": shown(encoded(bomb(60_000, 60_000))),
    "a picture too large": shown(data_url((101, 100))),
    "less than it says": shown(encoded(bomb(90, 90))),
    "PostScript": shown(encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps")),
    "SVG": shown(encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg")),
    "too many pictures": said(*[{"type": "image_url", "image_url": {"url": data_url((2, 2))}}] * 17),
}
DRAWINGS = {
    "no prompt": images(prompt=None),
    "an empty prompt": images(prompt=""),
    "a prompt of parts": images(prompt=["a"]),
    "no pictures": images(n=0),
    "many pictures": images(n=3),
    "pictures at a URL": images(response_format="url"),
    "of another kind": images(output_format="webp"),
    "a prompt too long": images(prompt="x" * 5000),
}
OTHERS = {
    "another model": (404, "POST", CHAT, chat(model="gpt"), JSON),
    "a model that climbs": (404, "GET", "/v1/models/../../etc/passwd", None, {}),
    "another path": (404, "GET", "/v1/files", None, {}),
    "a path of a file": (404, "GET", "/../../../etc/passwd", None, {}),
    "an encoded path": (404, "GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}),
    "no pages of docs": (404, "GET", "/docs", None, {}),
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


def hold(status: int, found: tuple[int, bytes]) -> None:
    """It is an error as OpenAI's API tells it, in one line, that repeats nothing that was sent."""
    assert found[0] == status, found
    if not found[1].startswith(b"Invalid HTTP"):  # what is no request at all is answered in plain text
        error = json.loads(found[1])["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
        assert set(error) == {"message", "type", "param", "code"}
        assert "passwd" not in error["message"] and "Traceback" not in error["message"]


def test_bodies(server):
    before = server.metric("mgp5_finished_total")
    for path, bodies in ((CHAT, BODIES), (IMAGES, DRAWINGS)):
        for name, body in bodies.items():
            found = server.ask("POST", path, body, JSON)
            assert found[0] == 400, (name, found)
            hold(400, found)
    assert len(BODIES) + len(DRAWINGS) >= 60 and server.metric("mgp5_finished_total") == before
    assert works(server)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_wrong_around_a_body(server, name):
    status, *request = OTHERS[name]
    hold(status, server.ask(*request))


def works(server) -> bool:
    """Whether it serves others; with random weights a reply's text may be empty."""
    status, reply = server.post(CHAT, messages=HELLO, image="always", steps=2, max_tokens=3, seed=0)
    return status == 200 and reply["choices"][0]["message"]["content"][-1]["type"] == "image_url"


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
    assert all(line.startswith("#") or len(line.split(" ")) == 2 for line in lines) and len(lines) < 80


def test_slow_and_broken_connections(server):
    assert talk(server, b"GET /health HT") == b""  # hung up on
    assert b" 408 " in talk(server, header(chat(), 500), chat()[:20])
    assert b" 400 " in talk(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n")
    assert b" 200 " not in talk(
        server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"
    )
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
    found = talk(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
                 b"Connection: close\r\n\r\n")  # fmt: skip
    assert b"access-control" not in found.lower() and not re.search(rb"(?i)^server:", found, re.MULTILINE)
