"""Judges: any `AutoModelForImageTextToText`, any address with OpenAI's chat completions; and what their words say."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from ...apps.batch import answer
from ...config import ModelConfig
from ...device import pick_device
from ...errors import Mgp5Error
from ...loading import load_backbone
from ...messages import Conversation, Message, Part, Text
from ...model import InterleavedModel
from ...options import ImageOptions, Options
from ...views.html import data_uri
from ..systems import NoHead
from .prompts import SYSTEM

KEY = "OPENAI_API_KEY"  # of the environment; never an option, as these are written into reports
TOKENS, SIDE = 256, 768  # of an answer; pixels of an image's longer side that an address gets
TRIES, WAIT, TIMEOUT = 4, 2.0, 300  # of a request; seconds before the second try, doubled for each; seconds
REFUSALS = (400, 413, 422)  # of one question, too long or with too many images: an answer without a score
FAILED = "(failed: "  # begins the words of a judge that could not answer; it is asked again in the next run
Read = Callable[[str], dict[str, float] | None]


class Question(NamedTuple):
    """What a judge is asked: a name within its case, the parts, and how its answer is read, None if it cannot be."""

    key: str
    parts: Sequence[Part]
    read: Read


def scored(names: Sequence[str], low: float, high: float) -> Read:
    """Return a reader of lines "NAME: NUMBER", or JSON like it; of one name the number alone will do.
    All must be there, and within the bounds."""

    def read(text: str) -> dict[str, float] | None:
        found = {}
        for name in names:
            spaced = re.sub(r"\\?[ _]", "[ _-]", re.escape(name))
            # Signs but no bracket stand between: "Completeness (0 to 10): 7" says 7 behind the bracket.
            middle = r"[^\w(]{0,6}(?:\([^)]*\))?[^\w(]{0,8}(?:score[^\w(]{0,6})?"
            match = re.search(rf"{spaced}{middle}(-?\d+(?:\.\d+)?)", text, re.IGNORECASE)
            match = match or (re.match(r"\W*(-?\d+(?:\.\d+)?)", text) if len(names) == 1 else None)
            if match is None or not low <= float(match[1]) <= high:
                return None
            found[name] = float(match[1])
        return found

    return read


def yes_or_no(text: str) -> dict[str, float] | None:
    """Read the first "yes" or "no" of an answer."""
    match = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return {"yes": float(match[1].lower() == "yes")} if match else None


def verdict(text: str) -> dict[str, float] | None:
    """Read which of two answers wins: "A is better", "B is better", or a tie, leaning to one of them or not."""
    tie = re.search(r"\btie\b", text, re.IGNORECASE)
    side = re.search(r"\b([AB])\b", text[tie.end() :] if tie else text)
    if not tie and not side:
        return None
    leaning = {"A leaning": float(side[1] == "A")} if side else {}
    return {"A": 0.5 if tie else leaning["A leaning"]} | leaning


class Judge(Protocol):
    """A judge answers a message of texts and images in words."""

    name: str
    at_once: int  # questions that it takes side by side

    def __call__(self, parts: Sequence[Part]) -> str: ...


class LocalJudge:
    """A judge in this process, read and run as any LLM of mgp5; it always takes its likeliest words."""

    at_once = 1

    def __init__(self, name: str, device: str = "auto") -> None:
        target, dtype = pick_device(device)
        try:
            backbone = load_backbone(name, dtype).to(target)
        except Mgp5Error as error:
            hint = (
                "give another --judge, or an address: one whose code comes with its weights (MMIE-Score) needs a server"
            )
            raise Mgp5Error(f"the judge {name} cannot be loaded ({error})", hint) from None
        config = ModelConfig(mllm=name, diffusion="", head_config=None)
        self.name, self._model = name, InterleavedModel(backbone, NoHead(), config)

    def __call__(self, parts: Sequence[Part]) -> str:
        """Answer in words; what it cannot read is an answer without a score."""
        conversation = Conversation().add("system", SYSTEM).add("user", *parts)
        options = Options(image=ImageOptions(), draw="never", temperature=0, max_tokens=TOKENS)
        (reply,) = answer(self._model, [(conversation, options)])
        return reply.text if isinstance(reply, Message) else f"{FAILED}{reply})"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another host."""

    def redirect_request(self, *request: Any) -> None:
        """Follow none."""


class RemoteJudge:
    """A judge at an address of OpenAI's form, https://HOST/v1; without a model's name the first that is served there.
    The environment's OPENAI_API_KEY goes with a request, where it is set. Raises Mgp5Error if nothing answers."""

    at_once = 8

    def __init__(self, address: str, model: str = "") -> None:
        self._address = address.rstrip("/")
        url = urlsplit(self._address)
        if os.environ.get(KEY) and url.scheme != "https" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise Mgp5Error(f"{KEY} would go to {self._address} unencrypted", f"give an https address, or unset {KEY}")
        self._open = urllib.request.build_opener(_NoRedirect).open
        try:
            self._model = model or self._ask("/models")["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise Mgp5Error(f"{self._address} does not say what it serves", "give --judge-model") from None
        self.name = f"{self._model} at {url.hostname}"

    def __call__(self, parts: Sequence[Part]) -> str:
        """Answer in words. Raises Mgp5Error if the address does not, or an image cannot be read."""
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
            else:
                uri, _ = data_uri(part, max_bytes=0, max_side=SIDE)
                content.append({"type": "image_url", "image_url": {"url": uri}})
        messages = [{"role": "user", "content": content}]
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        reply = self._ask("/chat/completions", body)
        if isinstance(reply, str):
            return reply
        try:
            return reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise Mgp5Error(f"{self._address} answered {str(reply)[:80]}", "expected a chat completion") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
        data = json.dumps(body).encode() if body else None
        for number in range(TRIES):
            try:
                request = urllib.request.Request(self._address + path, data, headers)
                with self._open(request, timeout=TIMEOUT) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                found = f"{error.code}, {error.read()[:200].decode(errors='replace')}"
                if error.code in REFUSALS:
                    return f"{FAILED}{found})"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, ValueError) as error:
                found = str(error)
            if number < TRIES - 1:
                time.sleep(WAIT * 2**number)
        raise Mgp5Error(f"the judge at {self._address} cannot be asked ({found})", f"check the address, and {KEY}")


def open_judge(name: str, model: str = "", device: str = "auto") -> Judge:
    """Return the judge at an address, or of a folder or hub id. Raises Mgp5Error."""
    if name.startswith(("http://", "https://")):
        return RemoteJudge(name, model)
    return LocalJudge(name, device)
