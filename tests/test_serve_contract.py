"""The OpenAPI document of `mgp5 serve`, held against a real server by schemathesis."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import HELLO, JSON, KEY, serving_here

from mgp5.serving.request import Limits

SHOWN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(small_folder):
    limits = Limits(tokens=24, images=2, steps=3, side=64)
    with serving_here(small_folder, KEY, rows=4, limits=limits) as running:
        yield running


@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_what_the_document_says_is_so(server, examples, tmp_path):
    """All of schemathesis's checks: no 5xx, each status, header and body as described, no key no answer, ..."""
    pytest.importorskip("schemathesis")
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_rules", "PYTHONPATH": str(Path(__file__).parent)}
    address, key = f"{server.url.removesuffix('/v1')}/openapi.json", f"Authorization: Bearer {KEY}"
    words = "-H", key, "--max-examples", str(examples), "--seed", "1", "--request-timeout", "120", "--no-color"
    command = [sys.executable, "-m", "schemathesis.cli", "run", address, *words]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True)
    assert done.returncode == 0 and "No issues found" in done.stdout, done.stdout[-5000:]
    assert "8 selected / 8 total" in done.stdout
    assert server.metric("mgp5_finished_total", SHOWN) > 20  # requests that the server had to answer


def test_the_document_tells_of_this_server(server):
    document = json.loads(server.ask("GET", "/openapi.json", headers=SHOWN)[1])
    schemas, chat = document["components"]["schemas"], document["paths"]["/v1/chat/completions"]["post"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    assert schemas["ImagesRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 2
    assert "code_top_k" not in schemas["ImagesRequest"]["properties"]  # of other heads
    for path in ("/", "/docs"):  # for who comes with a browser
        assert b"POST /v1/chat/completions" in server.ask("GET", path, headers=SHOWN)[1]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer" and chat["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert {"/v1/images/generations", "/v1/models", "/health", "/metrics"} < set(document["paths"])
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "image" in schemas[form["$ref"].rpartition("/")[2]]["required"]
    streamed = json.dumps(document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"])
    assert "ResponseEvent" in streamed and "PartialCallEvent" in schemas
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= schemas.keys()
    assert schemas["ChatRequest"]["additionalProperties"] == {"type": "null"}
    assert "progress" in schemas["ChatChunk"]["properties"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "401", "404", "408", "413", "415", "421", "429", "500", "503", "504"} < set(chat["responses"])
    assert not [name for name in schemas if "ValidationError" in name]
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 2.0, "image": "never"}).encode()  # 2, in JSON
    assert server.ask("POST", "/v1/chat/completions", body, SHOWN | JSON)[0] == 200
