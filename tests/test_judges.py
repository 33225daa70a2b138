"""Judges of interleaved replies: a local model, an address of OpenAI's form, and how their words are read."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import picture

from mgp5.errors import Mgp5Error
from mgp5.evaluation.public import judge
from mgp5.evaluation.public.judge import LocalJudge, Question, RemoteJudge, open_judge, scored, verdict, yes_or_no
from mgp5.evaluation.public.score import ask
from mgp5.messages import Image, Text


def test_answers_of_judges_are_read():
    read = scored(("Correctness", "key_point"), 0, 10)
    for text in ("Correctness: 7\nkey_point: 3", '{"Correctness": {"Score": 7}, "Key Point": 3}'):
        assert read(text) == {"Correctness": 7.0, "key_point": 3.0}
    assert read("**Correctness** (0 to 10): 7.0, key-point = 3") == {"Correctness": 7.0, "key_point": 3.0}
    assert read("Correctness: 7") is None and read("Correctness: 11, key_point: 3") is None
    one = scored(("Score",), 0, 6)
    assert [one(text) for text in ("### Score: 4", "4/6", "good")] == [{"Score": 4.0}, {"Score": 4.0}, None]
    assert [yes_or_no(text) for text in ("Yes.", "no", "Note: maybe")] == [{"yes": 1.0}, {"yes": 0.0}, None]
    assert verdict("B is better") == {"A": 0.0, "A leaning": 0.0} and verdict("Tie(A is better)")["A leaning"] == 1.0
    assert verdict("tie") == {"A": 0.5} and verdict("I cannot say") is None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({"data": [{"id": "vlm"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization")))
        if len(self.server.seen) == 1:
            return self.send_error(503)
        if len(body["messages"][0]["content"]) > 2:
            return self.send_error(413)
        if self.server.redirect:
            self.send_response(307)
            self.send_header("Location", "http://localhost:1/")
            return self.end_headers()
        self.answer({"choices": [{"message": {"content": "Score: 3"}}]})

    def answer(self, value: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(judge, "WAIT", 0)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.redirect = [], False
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_a_judge_at_an_address(server, monkeypatch, tmp_path):
    """It gets parts in order and the key of the environment, is asked again when busy, and follows no redirect."""
    monkeypatch.setenv(judge.KEY, "secret")
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    remote = open_judge(address)
    assert remote((Text("How?"), Image(pixels=picture()))) == "Score: 3" and remote.name == "vlm at 127.0.0.1"
    (body, key) = server.seen[-1]
    content = body["messages"][0]["content"]
    assert len(server.seen) == 2 and key == "Bearer secret" and body["model"] == "vlm" and body["temperature"] == 0
    assert content[0] == {"type": "text", "text": "How?"}
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    long = Question("criteria", [Text("How?")] * 3, scored(("Score",), 0, 6))
    for asked in (3, 4):  # what it could not answer is told, has no score, and is asked again by the next run
        told = ask(tmp_path / "judged.jsonl", remote, [long], lambda replied: None)
        assert list(told.values()) == [None] and len(server.seen) == asked
    assert "413" in (tmp_path / "judged.jsonl").read_text()
    server.redirect = True
    with pytest.raises(Mgp5Error, match=r"cannot be asked .307"):
        remote((Text("How?"),))
    with pytest.raises(Mgp5Error, match="unencrypted") as error:
        RemoteJudge("http://example.org/v1", "m")
    assert "secret" not in str(error.value)


def test_any_vision_language_model_is_a_judge(qwen_folder):
    local = LocalJudge(str(qwen_folder))
    said = local((Text("How?"), Image(pixels=picture(size=(64, 64))), Text("Say.")))
    assert isinstance(said, str) and said == local((Text("How?"), Image(pixels=picture(size=(64, 64))), Text("Say.")))
    with pytest.raises(Mgp5Error, match="cannot be loaded"):
        LocalJudge("/no/judge")
