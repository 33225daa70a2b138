"""/v1/chat/completions: a reply is a string and images beside it, or parts in order where these are asked for."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ...events import Finished, ImageDone, ImageStep, TextChunk
from ...messages import Image, Message, Text
from ...model import InterleavedModel
from ...options import Options
from ..replies import Reply, stream_of
from ..request import Limits
from ..schema import ANY, Body, Count, ReplyRequest, text_options
from ..state import GENERATE_ERRORS, TAKES_JSON, ReplyStream, State, base64_png, stream_response, unless_gone
from ..turns import ChatMessage, ContentPart, ImageUrl, conversation

BETWEEN = "\n\n"  # between two texts with an image between them, in a reply that is one string
OF_CHAT = dict.fromkeys(("store", "reasoning_effort", "verbosity", "parallel_tool_calls", "prediction"), ANY) | {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p"), (0,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **{"n": (1,), "best_of": (1,), "top_k": (0, -1), "logprobs": (False,), "logit_bias": ({},)},
}
routes = APIRouter()


class ReplyFormat(Body):
    """How a reply looks: a string with `images` beside it, or a list of parts, text and images in order."""

    type: Literal["text", "parts"]


class ChatRequest(ReplyRequest):
    """Body of /v1/chat/completions."""

    neutral = ReplyRequest.neutral | OF_CHAT
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    response_format: ReplyFormat | None = None
    max_tokens: Count | None = Field(None, description="cut to the most that this server writes")
    max_completion_tokens: Count | None = Field(None, description="the same; of both, the smaller one holds")

    @property
    def parts(self) -> bool:
        """Whether the reply is a list of parts."""
        return self.response_format is not None and self.response_format.type == "parts"


def chat_options(body: ChatRequest, limits: Limits, model: InterleavedModel) -> Options:
    """Return the options of a reply. Raises Refused as `text_options` does."""
    draw = {"text": "never", "image": "always"}.get("+".join(dict.fromkeys(body.modalities or [])), "auto")
    alone = 0 if draw == "always" and not (body.max_tokens or body.max_completion_tokens) else None  # an image alone
    tokens = body.max_tokens, body.max_completion_tokens, alone
    return text_options(body, (draw, "modalities"), tokens, limits, model)


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    images: int


class ReplyImage(Reply):
    """An image of a reply, and where it stands in the text."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: int = Field(description="of the image in this reply, from 0")
    offset: int = Field(description="characters (code points) of the whole text that stand before it")


class AssistantMessage(Reply):
    """The assistant's message: a string with images beside it, or parts in order where the request asks for parts."""

    role: Literal["assistant"]
    content: str | list[ContentPart]
    images: list[ReplyImage] = Field([], description="in order; missing where there are none")


class Choice(Reply):
    index: Literal[0]
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ReplyInfo(Reply):
    """Fields that a reply and each of its chunks share."""

    id: str
    created: int = Field(description="seconds since 1970")
    model: str
    seed: int = Field(description="seed of the reply: the same request with it gives the same reply")


class ChatReply(ReplyInfo):
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


class Delta(Reply):
    """What a chunk adds: the role first, then text, or one image; of parts, a list of one image."""

    role: Literal["assistant"] = Field("assistant", description="in the first chunk")
    content: str | list[ContentPart] = ""
    images: list[ReplyImage] = Field([], description="one, when it is done")


class Progress(Reply):
    image: int = Field(description="index of the image in this reply, from 0")
    step: int = Field(description="from 1 to total")
    total: int


class ChunkChoice(Reply):
    """What a chunk adds to the one reply."""

    index: Literal[0]
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None


class ChatChunk(ReplyInfo):
    """One event of a stream; `[DONE]` follows the last one."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice] = Field(description="empty in the chunk with `usage`")
    progress: Progress | None = None
    usage: Usage | None = Field(None, description="in a chunk of its own, where stream_options ask for it")


STREAM = stream_of(ChatChunk, "[DONE]")


@routes.post("/v1/chat/completions", response_model=ChatReply, responses=GENERATE_ERRORS | STREAM, **TAKES_JSON)
async def chat(body: ChatRequest, request: Request, state: State) -> ChatReply | Response:
    """Reply to a conversation in text and images, whole or streamed."""
    state.check(body.model)
    options = chat_options(body, state.limits, state.loop.model)
    talk = await state.in_thread(conversation, body.messages, state.limits)
    (reply,) = state.submit(talk, [options], body.timeout)
    info = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.name}
    info["seed"] = options.seed
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(reply, body.parts, info, usage)
        return await stream_response(request, [reply], chunks, end="data: [DONE]\n\n")
    done = await unless_gone(request, reply.finish(), reply)
    message = {"role": "assistant"} | await _content(done.message, body.parts)
    choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
    return ChatReply(**info, object="chat.completion", choices=[choice], usage=_usage(done))


@dataclass
class _Joined:
    """The texts of a reply as one string, and where its images stand in it."""

    length: int = 0  # of the string so far
    images: int = 0
    apart: bool = False  # whether an image stands behind the string

    def text(self, piece: str) -> str:
        """Return what a piece of text adds to the string."""
        piece = BETWEEN + piece if self.apart and self.length else piece
        self.apart, self.length = False, self.length + len(piece)
        return piece

    async def image(self, image: Image) -> dict[str, Any]:
        """Return the next image, and where it stands."""
        self.apart, self.images = True, self.images + 1
        return await _part(image) | {"index": self.images - 1, "offset": self.length}


async def _content(message: Message, parts: bool) -> dict[str, Any]:
    """Return the content of a whole reply: parts, if it has an image, or a string and its images."""
    if parts and message.images:
        return {"content": [await _part(part) for part in message.content]}
    joined, text, images = _Joined(), "", []
    for part in message.content:
        if isinstance(part, Text):
            text += joined.text(part.text)
        else:
            images.append(await joined.image(part))
    return {"content": text} | ({"images": images} if images else {})


async def _chunks(reply: ReplyStream, parts: bool, info: dict[str, Any], usage: bool) -> AsyncIterator[ChatChunk]:
    """Yield text as it comes, denoising steps, each image when it is done.

    Args:
        parts: whether an image is a list of one part, without its place in the text.
        info: fields that all chunks have.
        usage: whether a last chunk has the usage.
    """

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> ChatChunk:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return ChatChunk(**info, object="chat.completion.chunk", **{"choices": [choice], **more})

    joined = _Joined()
    yield chunk({"role": "assistant", "content": ""})
    async for event in reply.events():
        match event:
            case TextChunk():
                yield chunk({"content": event.text if parts else joined.text(event.text)})
            case ImageStep():
                yield chunk({}, progress={"image": event.image, "step": event.step, "total": event.total})
            case ImageDone() if parts:
                yield chunk({"content": [await _part(event.image)]})
            case ImageDone():
                yield chunk({"content": "", "images": [await joined.image(event.image)]})
            case Finished():
                yield chunk({}, event.reason)
                if usage:
                    yield chunk({}, choices=[], usage=_usage(event))


def _usage(done: Finished) -> dict[str, int]:
    read, written = done.meta["prefilled"], done.meta["tokens"]
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return counts | {"images": len(done.message.images)}


async def _part(part: Text | Image) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{await base64_png(part)}"}}
