"""What /v1/responses answers: items in order, and the events of a stream of them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, RootModel

from ...events import Finished, ImageDone, ImageStep, TextChunk
from ...messages import Image, Message
from ..loop import Refused
from ..replies import Reply
from ..state import ReplyStream, base64_png


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[str] = Field(max_length=0)
    logprobs: list[str] = Field(max_length=0)


class OutputMessage(Reply):
    """A text of the reply."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["in_progress", "completed"]
    content: list[OutputText]


class OutputImage(Reply):
    """An image of the reply: a PNG file in base64."""

    type: Literal["image_generation_call"]
    id: str
    status: Literal["in_progress", "completed"]
    result: str | None
    output_format: Literal["png"] = "png"
    size: str | None = None
    seed: int | None = None


OutputItem = Annotated[OutputMessage | OutputImage, Field(discriminator="type")]


class CachedTokens(Reply):
    cached_tokens: Literal[0]
    cache_write_tokens: Literal[0]


class ReasoningTokens(Reply):
    reasoning_tokens: Literal[0]


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    images: int


class ResponseError(Reply):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class Incomplete(Reply):
    reason: Literal["max_output_tokens"]


class ResponseReply(Reply):
    """A response: whole, or as far as it has come."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="seconds since 1970")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    seed: int = Field(description="seed of the reply: the same request with it gives the same reply")
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int
    temperature: float | None
    top_p: float
    store: bool
    tools: list[dict[str, Any]]
    tool_choice: Literal["auto", "none", "required"]
    parallel_tool_calls: Literal[False]
    truncation: Literal["disabled"]
    metadata: dict[str, str] = Field(max_length=0)


class Numbered(Reply):
    sequence_number: int


class StateEvent(Numbered):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseReply


class ItemEvent(Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class OfItem(Numbered):
    output_index: int
    item_id: str


class PartEvent(OfItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: OutputText


class DeltaEvent(OfItem):
    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[str] = Field(max_length=0)


class TextEvent(OfItem):
    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[str] = Field(max_length=0)


class CallEvent(OfItem):
    type: Literal[
        "response.image_generation_call.in_progress",
        "response.image_generation_call.generating",
        "response.image_generation_call.completed",
    ]


class PartialCallEvent(OfItem):
    type: Literal["response.image_generation_call.partial_image"]
    partial_image_index: int
    partial_image_b64: str


Event = StateEvent | ItemEvent | PartEvent | DeltaEvent | TextEvent | CallEvent | PartialCallEvent
KINDS = {kind: model for model in get_args(Event) for kind in get_args(model.model_fields["type"].annotation)}


class ResponseEvent(RootModel[Annotated[Event, Field(discriminator="type")]]):
    """One event of a stream; the last one is `response.completed`, `.incomplete` or `.failed`."""


class ResponseWriter:
    """Makes the events of a response of the events of a reply.

    Attributes:
        info: fields that all states of the response share.
        keep: takes the finished message.
        output: the finished items, in order.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.info, self.output, self.number = info, [], 0
        self.keep: Callable[[Message], None] = lambda _: None
        self._item: OutputMessage | OutputImage | None = None  # under way
        self._text, self._shown = "", 0  # of this item: its text, its number of partial images

    @property
    def files(self) -> dict[str, str]:
        """The finished images by their ids, in base64."""
        return {item.id: item.result for item in self.output if isinstance(item, OutputImage)}

    async def whole(self, reply: ReplyStream) -> ResponseReply:
        """Return the finished response. Raises Refused when the reply failed."""
        return [event async for event in self.events(reply)][-1].response

    async def events(self, reply: ReplyStream) -> AsyncIterator[Event]:
        """Yield the events of the response. Raises Refused when the reply failed."""
        yield self._state("created")
        yield self._state("in_progress")
        async for event in reply.events():
            for one in self._begin_text() if isinstance(event, TextChunk) else self._end_text():
                yield one
            match event:
                case TextChunk():
                    self._text += event.text
                    yield self._of_item("output_text.delta", content_index=0, delta=event.text, logprobs=[])
                case ImageStep():
                    for one in self._begin_image():
                        yield one
                    if event.preview:
                        data = {"partial_image_b64": await base64_png(event.preview)}
                        name, self._shown = "image_generation_call.partial_image", self._shown + 1
                        yield self._of_item(name, partial_image_index=self._shown - 1, **data)
                case ImageDone():
                    for one in [*self._begin_image(), *self._end_image(event.image, await base64_png(event.image))]:
                        yield one
                case Finished():
                    self.keep(event.message)
                    cut = event.reason == "length"
                    details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
                    name = "incomplete" if cut else "completed"
                    yield self._state(name, name, usage=_usage(event), **details)

    def failed(self, refused: Refused) -> StateEvent:
        """Return the last event of a response that failed under way."""
        code = "invalid_prompt" if refused.status < 500 else "server_error"
        return self._state("failed", "failed", error={"code": code, "message": refused.message})

    def _event(self, name: str, **fields: Any) -> Event:
        kind, self.number = f"response.{name}", self.number + 1
        return KINDS[kind](type=kind, sequence_number=self.number - 1, **fields)

    def _of_item(self, name: str, **fields: Any) -> Event:
        return self._event(name, output_index=len(self.output), item_id=self._item.id, **fields)

    def _state(self, name: str, status: str = "in_progress", **more: Any) -> StateEvent:
        values = dict.fromkeys(("usage", "error", "incomplete_details")) | more
        response = ResponseReply(**self.info, status=status, output=list(self.output), **values)
        return self._event(name, response=response)

    def _begin(self, item: OutputMessage | OutputImage) -> Event:
        self._item, self._text, self._shown = item, "", 0
        return self._event("output_item.added", output_index=len(self.output), item=item)

    def _end(self, **changed: Any) -> Event:
        item = self._item.model_copy(update={"status": "completed", **changed})
        event = self._event("output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._item = None
        return event

    def _begin_text(self) -> Iterator[Event]:
        if self._item is None:
            item = OutputMessage(type="message", id=new_id("msg"), role="assistant", status="in_progress", content=[])
            yield self._begin(item)
            yield self._of_item("content_part.added", content_index=0, part=_part(""))

    def _end_text(self) -> Iterator[Event]:
        if isinstance(self._item, OutputMessage):
            yield self._of_item("output_text.done", content_index=0, text=self._text, logprobs=[])
            yield self._of_item("content_part.done", content_index=0, part=_part(self._text))
            yield self._end(content=[_part(self._text)])

    def _begin_image(self) -> Iterator[Event]:
        if self._item is None:
            call = "image_generation_call"
            yield self._begin(OutputImage(type=call, id=new_id("ig"), status="in_progress", result=None))
            yield self._of_item(f"{call}.in_progress")
            yield self._of_item(f"{call}.generating")

    def _end_image(self, image: Image, data: str) -> Iterator[Event]:
        width, height = image.load().size
        yield self._of_item("image_generation_call.completed")
        yield self._end(result=data, output_format="png", size=f"{width}x{height}", seed=image.meta["seed"])


def new_id(kind: str) -> str:
    """Return an id that cannot be guessed."""
    return f"{kind}_{uuid.uuid4().hex}"


def _part(text: str) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _usage(done: Finished) -> ResponseUsage:
    read, written = done.meta["prefilled"], done.meta["tokens"]
    return ResponseUsage(
        input_tokens=read,
        input_tokens_details=CachedTokens(cached_tokens=0, cache_write_tokens=0),
        output_tokens=written,
        output_tokens_details=ReasoningTokens(reasoning_tokens=0),
        total_tokens=read + written,
        images=len(done.message.images),
    )
