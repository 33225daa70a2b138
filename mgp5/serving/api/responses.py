"""/v1/responses: a reply is an ordered list of messages and images, and a conversation goes on by the reply's id."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Discriminator, Field, Tag

from ...messages import Conversation, Text
from ...model import InterleavedModel
from ...options import Options
from ..replies import stream_of
from ..request import Limits
from ..schema import ANY, Body, Count, ReplyRequest, Size, Words, text_options
from ..state import GENERATE_ERRORS, TAKES_JSON, KeptConversations, State, stream_response, unless_gone
from ..turns import OF_MESSAGES, ChatMessage, ImagePart, conversation, join_turns
from .drawing import Partial
from .response_events import ResponseEvent, ResponseReply, ResponseWriter, new_id

OF_RESPONSES = {
    **dict.fromkeys(("reasoning", "include", "parallel_tool_calls", "context_management"), ANY),
    **{"background": (False,), "top_logprobs": (0,), "truncation": ("disabled",)},
}
OF_ITEMS = dict.fromkeys(("status", "phase", "action", "background", "error", "output_format", "quality"), ANY)
OF_IMAGE_CALLS = OF_ITEMS | dict.fromkeys(("revised_prompt", "size", "seed", "svg_usage"), ANY)
OF_TOOL = {
    **dict.fromkeys(("model", "moderation", "output_compression", "action"), ANY),
    **{"quality": ("auto",), "background": ("auto", "opaque"), "input_fidelity": ("low",)},
}
routes = APIRouter()


class MessageItem(ChatMessage):
    """A message of the user, the system, or an earlier reply."""

    neutral = OF_MESSAGES | OF_ITEMS | {"id": ANY}
    type: Literal["message"] | None = "message"

    def message(self, _: KeptConversations) -> ChatMessage:
        """Return the message of the item."""
        return self


class ImageCallItem(Body):
    """An image of an earlier reply: in base64, or the id of one that the server keeps."""

    neutral = OF_IMAGE_CALLS
    type: Literal["image_generation_call"]
    id: str | None = None
    result: str | None = None

    def message(self, kept: KeptConversations) -> ChatMessage:
        """Return the message of the item. Raises Refused for an image that is not kept."""
        data = kept.file(self.id) if self.result is None else self.result
        part = ImagePart(type="input_image", image_url=f"data:image/png;base64,{data}")
        return ChatMessage(role="assistant", content=[part])


def _kind(value: Any) -> Any:
    kind = (value.get("type") or "message") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[ImageCallItem, Tag("image_generation_call")],
    Discriminator(_kind),
]


class ImageTool(Body):
    """OpenAI's tool that draws; this model draws without being given it, so that it only says how."""

    neutral = OF_TOOL
    type: Literal["image_generation"]
    size: Size | None = None
    output_format: Literal["png"] | None = None
    partial_images: Partial | None = Field(None, description="unfinished images of each image, in a stream")


class ToolChoice(Body):
    """The one tool, which has to be used."""

    type: Literal["image_generation"]


class TextConfig(Body):
    """How texts look."""

    neutral: ClassVar = {"verbosity": ANY, "format": ({"type": "text"},)}


class ResponsesRequest(ReplyRequest):
    """Body of /v1/responses."""

    neutral = ReplyRequest.neutral | OF_RESPONSES
    input: Words | Annotated[list[Item], Field(min_length=1)]
    instructions: Words | None = Field(None, description="the system's text, of this response alone")
    previous_response_id: str | None = Field(None, description="of a response that this one goes on from")
    store: bool | None = Field(True, description="whether later responses may go on from this one")
    max_output_tokens: Count | None = Field(None, description="cut to the most that this server writes")
    max_tool_calls: Count | None = Field(None, description="images in this reply, at most")
    tools: Annotated[list[ImageTool], Field(max_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    text: TextConfig | None = None

    @property
    def tool(self) -> ImageTool:
        """How images are drawn."""
        return self.tools[0] if self.tools else ImageTool(type="image_generation")


def response_options(body: ResponsesRequest, limits: Limits, model: InterleavedModel) -> Options:
    """Return the options of a reply. Raises Refused as `text_options` does."""
    choice = body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice and "required"
    draw = {"none": "never", "required": "always"}.get(choice, "auto")
    images = body.max_images
    if body.max_tool_calls is not None:
        images = min(body.max_tool_calls, limits.images if images is None else images)
    body = body.model_copy(update={"size": body.tool.size or body.size, "max_images": images})
    return text_options(body, (draw, "tool_choice"), (body.max_output_tokens,), limits, model)


STREAM = stream_of(ResponseEvent)


@routes.post("/v1/responses", response_model=ResponseReply, responses=GENERATE_ERRORS | STREAM, **TAKES_JSON)
async def create(body: ResponsesRequest, request: Request, state: State) -> ResponseReply | Response:
    """Reply in an ordered list of texts and images, whole or streamed."""
    state.check(body.model)
    options = response_options(body, state.limits, state.loop.model)
    before = state.kept.get(body.previous_response_id) if body.previous_response_id else ()
    items = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [item.message(state.kept) for item in items]
    kept = await state.in_thread(conversation, messages, state.limits, before)
    system = [("system", [Text(body.instructions)])] if body.instructions else []
    talk = Conversation(tuple(join_turns([*system, *((m.role, m.content) for m in kept.messages)])))
    previews = (body.tool.partial_images or 0) if body.stream else 0
    (reply,) = state.submit(talk, [options], body.timeout, previews=previews)
    writer = ResponseWriter(_info(body, options, state.name))
    if body.store is not False:
        writer.keep = lambda message: state.kept.put(writer.info["id"], (*kept.messages, message), writer.files)
    if body.stream:
        return await stream_response(request, [reply], writer.events(reply), writer.failed)
    return await unless_gone(request, writer.whole(reply), reply)


def _info(body: ResponsesRequest, options: Options, model: str) -> dict[str, Any]:
    """Return the fields that all states of a response share."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "seed": options.seed,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "store": body.store is not False,
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or []],
        "tool_choice": {"never": "none", "always": "required"}.get(options.draw, "auto"),
        "parallel_tool_calls": False,
        "truncation": "disabled",
        "metadata": {},
    }
