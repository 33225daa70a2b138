"""`mgp5 serve` as clients see it: OpenAI's own client, against the server in this process and one of its own."""

import base64
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import openai
import pytest
from click.testing import CliRunner
from PIL import Image as pil
from serve_process import HELLO, JSON, KEY, data_url, serving, serving_here

from mgp5.cli import main
from mgp5.errors import Mgp5Error
from mgp5.prompts import CHAT_SYSTEM
from mgp5.serving.request import Limits, ServeRequest, read_key

ALWAYS = {"image": "always", "steps": 2, "response_format": {"type": "parts"}}


@pytest.fixture(scope="module")
def server(small_folder):
    with serving_here(small_folder, rows=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def ask(client, messages=HELLO, **more):
    extra = more.pop("extra", ALWAYS)
    return client.chat.completions.create(model="tiny", messages=messages, seed=3, extra_body=extra, **more)


def pictures(content):
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [pil.open(BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]


def test_a_whole_reply_holds_parts_in_order(client):
    reply = ask(client, max_tokens=6)
    message = reply.choices[0].message
    assert [part["type"] for part in message.content] == ["text", "image_url"]
    assert pictures(message.content)[0].size == (16, 16)
    assert reply.usage.completion_tokens == 6 and reply.usage.images == 1 and reply.seed == 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6
    assert reply.choices[0].finish_reason in ("stop", "length")
    again = ask(client, [*HELLO, {"role": "assistant", "content": message.content}, *HELLO], max_tokens=6)
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens  # a reply goes back as it came


def test_a_streamed_reply_is_the_whole_one_in_pieces(client, server):
    whole = ask(client, max_tokens=9)
    chunks = list(ask(client, max_tokens=9, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    text = "".join(delta for delta in deltas if isinstance(delta, str))
    images = [delta for delta in deltas if isinstance(delta, list)]
    assert [{"type": "text", "text": text.strip()}, *images[0]] == whole.choices[0].message.content
    order = [i for i, chunk in enumerate(chunks) if getattr(chunk, "progress", None)]
    assert [chunks[i].progress for i in order] == [{"image": 0, "step": step, "total": 2} for step in (1, 2)]
    assert isinstance(chunks[order[-1] + 1].choices[0].delta.content, list)  # the picture follows its last step
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 4}).encode()
    lines = server.ask("POST", "/v1/chat/completions", body, JSON)[1].split(b"\n\n")
    assert all(line.startswith(b"data: ") for line in lines if line) and lines[-2] == b"data: [DONE]"


def test_modalities_and_pictures_sent(client):
    seen = [{"type": "image_url", "image_url": {"url": data_url(kind=kind)}} for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    talks = [[{"role": "user", "content": [one]}] for one in seen]
    replies = [ask(client, talk, max_tokens=4, modalities=["text"], extra={}) for talk in talks]
    assert all(isinstance(reply.choices[0].message.content, str) and reply.usage.images == 0 for reply in replies)
    assert replies[0].choices[0].message.content == replies[2].choices[0].message.content  # both are lossless
    drawn = ask(client, modalities=["image"], extra={"steps": 2, "size": "32x16"})
    assert [image.size for image in pictures(drawn.choices[0].message.images)] == [(32, 16)]


NEUTRAL = {  # what OpenAI's client, LangChain, LiteLLM and Open WebUI send without being asked
    **{"stop": [], "logprobs": False, "logit_bias": {}, "tools": [], "tool_choice": "none", "n": 1, "user": "me"},
    **{"response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}, "service_tier": "auto"},
    **{"parallel_tool_calls": True, "reasoning_effort": "low", "verbosity": "medium", "safety_identifier": "x"},
    **{"frequency_penalty": 0, "presence_penalty": 0.0, "stream_options": {"include_obfuscation": False}},
    **dict.fromkeys(("top_p", "temperature", "functions", "audio", "sampler", "repetition_penalty", "anything")),
}
TURNS = {  # before the last message: as clients send it, and as little as it says
    "nothing": ([{"role": "assistant", "content": None}, {"role": "user", "content": []}], []),
    "a developer's": ([{"role": "developer", "content": "be short"}], [{"role": "system", "content": "be short"}]),
    "two of one": ([{"role": "user", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
    "dumped": (
        [{"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}],
        [{"role": "assistant", "content": "a"}],
    ),
    "strings as parts": (
        [{"role": "user", "content": ["a", "b"]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ),
    "of other APIs": (
        [{"role": "assistant", "content": [{"type": "output_text", "text": "a", "cache_control": {"type": "b"}}]}],
        [{"role": "assistant", "content": "a"}],
    ),
}


def test_what_asks_for_nothing_is_accepted(server):
    def reply(messages=HELLO, **fields):
        fields = {"messages": messages, "max_tokens": 4, "image": "never", "seed": 1} | fields
        status, found = server.post("/v1/chat/completions", **fields)
        assert status == 200, found
        return found["choices"][0]["message"]["content"], found["usage"]

    plain = reply()
    assert isinstance(plain[0], str)  # always, where no image is in it
    assert reply(**NEUTRAL) == reply(max_completion_tokens=10**6) == plain
    assert reply(max_tokens=10**6)[1]["completion_tokens"] <= Limits().tokens
    assert reply([{"role": "system", "content": CHAT_SYSTEM}, *HELLO]) == plain  # the model's own
    stop = plain[0].strip()[1]
    assert reply(stop=[stop, "never"])[0] == reply(stop=stop)[0] == plain[0][: plain[0].index(stop)].strip()
    for sent, means in TURNS.values():
        assert reply([*sent, *HELLO]) == reply([*means, *HELLO])
    drawn = {"prompt": "a fox", "model": None, "quality": "standard", "style": "vivid", "size": "auto", "steps": 1}
    assert server.post("/v1/images/generations/", **drawn)[0] == 200


def test_images_and_models(client):
    drawn = client.images.generate(model="tiny", prompt="a fox", n=2, extra_body={"seed": 5, "steps": 2})
    alone = client.images.generate(model="tiny", prompt="a fox", extra_body={"seed": 6, "steps": 2})
    assert [image.seed for image in drawn.data] == [5, 6] and len({image.b64_json for image in drawn.data}) == 2
    assert drawn.usage.images == 2
    assert pil.open(BytesIO(base64.b64decode(alone.data[0].b64_json))).size == (16, 16)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_what_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        client.models.retrieve("gpt")
    long = [{"role": "user", "content": "x" * 4000}]
    for more in ({"extra": {"steps": 0}}, {"logprobs": True}, {"messages": long}):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                ask(client, stream=stream, **more)
            assert error.value.type == "invalid_request_error" and "\n" not in error.value.body["message"]


def test_a_client_that_leaves_cancels_its_reply(client, server):
    before = server.metric("mgp5_cancelled_total")
    stream = ask(client, stream=True, extra=ALWAYS | {"steps": 100}, max_tokens=3)
    next(iter(stream))
    stream.close()
    server.until("mgp5_cancelled_total", before + 1)
    with pytest.raises(openai.APITimeoutError):
        ask(client, extra=ALWAYS | {"steps": 100, "max_images": 8}, max_tokens=1000, timeout=0.2)
    server.until("mgp5_cancelled_total", before + 2)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, extra=ALWAYS | {"steps": 100, "timeout": 0.05})
    assert error.value.status_code == 504


@pytest.fixture(scope="module")
def process(small_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    (folder / "key").write_text(f"{KEY}\n")
    flags = "--host", "0.0.0.0", "--api-key-file", str(folder / "key"), "--rows", "1", "--model", str(small_folder)
    with serving(folder, *flags, mgp5=None) as running:
        yield running
        written = (folder / "serve.err").read_text()
        assert KEY not in written and "hello" not in written and "Traceback" not in written
        lines = re.findall(r"^[-\d]+ [:\d]+ 127.0.0.1 (\w+) (\S+) (\d+) [\d.]+ s$", written, re.MULTILINE)
        assert {("GET", "/v1/models", "401"), ("POST", "/v1/chat/completions", "200")} < set(lines)


def test_a_public_address_needs_a_key(small_folder, process, tmp_path, monkeypatch):
    monkeypatch.delenv("MGP5_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "example.com"):
        told = CliRunner().invoke(main, ["serve", "--host", host, "--model", str(small_folder)])
        assert told.exit_code == 2 and "there is no API key" in told.stderr
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(Mgp5Error, match="16 or more characters") as error:
        read_key(tmp_path / "key")
    assert "short" not in str(error.value)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            status, answer = process.ask("GET", path, headers=headers)
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
    client = openai.OpenAI(base_url=process.url, api_key=KEY)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_request_tells_all_that_is_wrong_with_it(monkeypatch):
    monkeypatch.delenv("MGP5_API_KEY", raising=False)
    with pytest.raises(Mgp5Error) as error:
        ServeRequest(host="0.0.0.0", rows=0, replicas=(3, 2), web=True, ray="local", limits=Limits(steps=0))
    wrong = ("steps is 0", "rows is 0", "replicas is 3:2", "--web does not go with --ray", "there is no API key")
    assert all(text in str(error.value) for text in wrong) and error.value.exit_code == 2


def test_sigterm_finishes_what_was_begun(process):
    client = openai.OpenAI(base_url=process.url, api_key=KEY, max_retries=0)
    stream = iter(ask(client, stream=True, extra=ALWAYS | {"steps": 60}, max_tokens=3))
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, client, max_tokens=2)  # in the queue
        while json.loads(process.ask("GET", "/health")[1])["waiting"] == 0 and not waits.done():
            pass
        process.process.terminate()
        assert any(isinstance(chunk.choices[0].delta.content, list) for chunk in stream)
        assert waits.result().choices[0].message.content
    process.process.join(60)
    assert process.process.exitcode == 0


@pytest.mark.parametrize(
    ("package", "flag", "told"),
    [
        ("uvicorn", "--insecure", "serve needs uvicorn: pip install 'mgp5[serve]'"),
        ("gradio", "--web", "serve needs gradio: pip install 'mgp5[web]'"),
        ("ray", "--ray", "--ray needs ray: pip install 'mgp5[ray]'"),
    ],
)
def test_without_its_extra_serve_says_what_to_install(package, flag, told, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(main, ["serve", flag])
    assert result.exit_code == 1 and result.stderr == f"mgp5: {told}\n"
