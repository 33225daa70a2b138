"""The APIs of `mgp5 serve` by OpenAI's own client: responses, images beside a chat's text, streamed images, edits."""

import asyncio
import base64
from functools import reduce
from io import BytesIO
from operator import add

import openai
import pytest
from openai.types.responses import Response
from PIL import Image as pil
from serve_process import HELLO, data_url, serving_here

from mgp5.events import TextChunk
from mgp5.messages import Conversation, Image
from mgp5.serving.api.response_events import ResponseWriter
from mgp5.serving.loop import Refused
from mgp5.serving.request import Limits
from mgp5.serving.state import KeptConversations

FAST = {"steps": 1, "max_images": 2}
PNG = base64.b64decode(data_url((20, 20), "blue").partition("base64,")[2])
TOOL = {"type": "image_generation", "partial_images": 2}


@pytest.fixture(scope="module")
def server(small_folder):
    with serving_here(small_folder, rows=4, limits=Limits(responses=2)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def respond(client, input="hello", seed=1, **more):
    extra = FAST | {"seed": seed} | more.pop("extra", {})
    more = {"max_output_tokens": 120} | more
    return client.responses.create(model="tiny", input=input, extra_body=extra, **more)


def told(response):
    """What the items of a response hold, in order."""
    assert isinstance(response, Response)
    return [item.content[0].text if item.type == "message" else item.result for item in response.output]


@pytest.fixture(scope="module")
def mixed(client):
    """The seed of a response of text and image, text and image, and maybe more."""
    for seed in (14, *range(100)):
        response, order = respond(client, seed=seed), ["message", "image_generation_call"] * 2
        if [item.type for item in response.output][:4] == order and response.status == "completed":
            return seed, response
    raise AssertionError("no seed gave two texts and two images in order")


def picture(data):
    return pil.open(BytesIO(base64.b64decode(data)))


def test_a_response_is_texts_and_images_in_order(client, mixed):
    seed, whole = mixed
    images = [item for item in whole.output if item.type == "image_generation_call"]
    assert [picture(image.result).size for image in images] == [(16, 16)] * 2
    assert {item.status for item in whole.output} == {"completed"}
    assert whole.output_text == "".join(told(whole)[::2])
    assert whole.usage.output_tokens > 0 and whole.usage.images == 2 and whole.error is None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert told(respond(client, seed=seed)) == told(whole)
    cut = respond(client, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = respond(client, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete" and told(last.response) == told(cut)


def test_a_streamed_response_is_the_whole_one_in_events(client, mixed):
    seed, whole = mixed
    more = {"max_output_tokens": 120, "extra_body": FAST | {"seed": seed}}
    with client.responses.stream(model="tiny", input="hello", **more) as stream:
        events, final = list(stream), stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed" and told(final) == told(whole) and final.usage == whole.usage
    for index, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        kinds = [event.type.removeprefix("response.") for event in own]
        if item.type == "message":
            assert "".join(event.delta for event in own if "delta" in event.type) == item.content[0].text
            assert kinds[:2] == ["output_item.added", "content_part.added"] and "output_text.delta" in kinds[2:-3]
            assert kinds[-3:] == ["output_text.done", "content_part.done", "output_item.done"]
        else:
            call = [f"image_generation_call.{name}" for name in ("in_progress", "generating", "completed")]
            assert kinds == ["output_item.added", *call, "output_item.done"]
            assert own[0].item.result is None and own[-1].item.result == item.result
        assert {event.item_id for event in own if hasattr(event, "item_id")} == {item.id}
    indices = [event.output_index for event in events if hasattr(event, "output_index")]
    assert indices == sorted(indices)


def test_partial_images_come_by_the_tools_option(client):
    with client.responses.stream(
        model="tiny",
        input="hello",
        tools=[TOOL],
        tool_choice="required",
        max_output_tokens=0,
        extra_body={"steps": 6, "seed": 3},
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    partial = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in partial] == [0, 1]
    calls = [event.type.rpartition(".")[2] for event in events if "_call." in event.type]
    assert calls == ["in_progress", "generating", "partial_image", "partial_image", "completed"]
    images = [*(event.partial_image_b64 for event in partial), *told(final)]
    assert len(set(images)) == 3 and {picture(image).size for image in images} == {(16, 16)}
    assert final.status == "completed" and final.tools[0].partial_images == 2


def test_a_conversation_goes_on_by_the_id_of_its_last_response(client, mixed):
    seed, first = mixed
    first = respond(client, seed=seed)
    by_id = respond(client, "and then?", previous_response_id=first.id, instructions="Be short.", store=False)
    items = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "and then?"}]
    by_items = respond(client, items, instructions="Be short.")
    short = [
        {"type": "image_generation_call", "id": item.id} if item.type != "message" else item for item in first.output
    ]
    by_ids = respond(client, [items[0], *short, items[-1]], instructions="Be short.", store=False)  # as LangChain does
    assert told(by_id) == told(by_items) == told(by_ids) and by_id.usage == by_items.usage == by_ids.usage
    second = respond(client, "and then?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens != by_id.usage.input_tokens
    assert told(second) != told(by_id)  # instructions are of one response alone
    for forgotten in (by_id.id, "resp_none"):
        with pytest.raises(openai.NotFoundError, match="no such response is kept") as error:
            respond(client, previous_response_id=forgotten)
        assert error.value.code == "previous_response_not_found"
    respond(client, "another"), respond(client, "one more")  # two are kept
    for more in ({"previous_response_id": first.id}, {"input": [short[1], items[-1]]}):
        with pytest.raises(openai.NotFoundError, match="is kept"):
            respond(client, **more)


def test_kept_conversations_are_bounded_by_count_and_by_bytes():
    kept, talk = KeptConversations(3, 1000), Conversation().add("user", "hello").messages
    drawn = Conversation().add("user", Image(pixels=pil.new("RGB", (16, 16)))).messages  # 768 bytes
    for name in "abc":
        kept.put(name, talk, {})
    kept.get("a")
    kept.put("d", drawn, {"ig_d": "abc"})  # four
    assert kept.get("d") is drawn and kept.get("a") is talk and kept.file("ig_d") == "abc"
    kept.put("e", drawn, {})  # 1536 bytes
    assert kept.get("e") is drawn and kept.get("a") is talk and kept.held == 768 + len("hello")
    for name in "bcd":
        with pytest.raises(Refused):
            kept.get(name)
    kept.put("f", drawn * 2, {})
    with pytest.raises(Refused):
        kept.get("f")
    assert kept.held == 0


def test_a_response_that_fails_says_so_in_its_last_event():
    fields = dict.fromkeys(("instructions", "previous_response_id", "temperature"))
    fields |= {"id": "resp_1", "object": "response", "created_at": 1, "model": "tiny", "seed": 1, "store": True}
    fields |= {"max_output_tokens": 9, "top_p": 1.0, "tools": [], "tool_choice": "auto", "metadata": {}}
    writer = ResponseWriter(fields | {"parallel_tool_calls": False, "truncation": "disabled"})

    class Broken:
        async def events(self):
            yield TextChunk("hello")
            raise Refused(500, "the reply failed (RuntimeError)", "internal_error")

    async def read():
        try:
            async for event in writer.events(Broken()):
                seen.append(event)
        except Refused as refused:
            seen.append(writer.failed(refused))

    seen = []
    asyncio.run(read())
    assert [event.sequence_number for event in seen] == list(range(6)) and seen[-1].type == "response.failed"
    assert seen[-1].response.status == "failed" and seen[-1].response.error.message == "the reply failed (RuntimeError)"


NEUTRAL = {  # what OpenAI's client, its agents and LangChain send without being asked
    **{"store": True, "metadata": {"a": "b"}, "parallel_tool_calls": True, "truncation": "disabled", "include": []},
    **{"text": {"format": {"type": "text"}, "verbosity": "low"}, "reasoning": {"effort": "low"}, "background": False},
    **{"tool_choice": "auto", "tools": [], "top_logprobs": 0, "service_tier": "auto", "user": "me", "prompt": None},
    **{"max_tool_calls": 2, "stream_options": {"include_obfuscation": False}, "prompt_cache_key": "x"},
}


def test_what_asks_for_nothing_is_accepted(client):
    plain = told(respond(client))
    assert told(respond(client, extra=NEUTRAL)) == plain
    parts = [{"type": "input_text", "text": "hello"}]
    assert told(respond(client, [{"type": "message", "role": "user", "content": parts, "status": None}])) == plain
    assert told(respond(client, extra={"extra_body": {"seed": 1}, "num_inference_steps": 1, "steps": None})) == plain
    assert not any(item.type != "message" for item in respond(client, tool_choice="none").output)
    seen = [{"role": "user", "content": [*parts, {"type": "input_image", "image_url": data_url(), "detail": "auto"}]}]
    assert respond(client, seen, tool_choice="none").usage.input_tokens > respond(client).usage.input_tokens


def test_a_chat_is_a_string_with_images_in_their_places(client, mixed):
    seed, response = mixed

    def ask(messages=HELLO, **more):
        extra = FAST | {"seed": seed, "response_format": more.pop("format", None)}
        settings = {"model": "tiny", "messages": messages, "max_tokens": 120}
        return client.chat.completions.create(**settings, extra_body=extra, **more)

    message = ask().choices[0].message
    texts, images = told(response)[::2], told(response)[1::2]
    assert message.content == "\n\n".join(texts) and [image["index"] for image in message.images] == [0, 1]
    assert [message.content[: image["offset"]] for image in message.images] == [texts[0], "\n\n".join(texts[:2])]
    assert [image["image_url"]["url"].partition("base64,")[2] for image in message.images] == images
    deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert [image for delta in deltas for image in getattr(delta, "images", [])] == message.images
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 120, "extra_body": FAST | {"seed": seed}}
    with client.chat.completions.stream(**settings) as stream:
        final = stream.get_final_completion().choices[0].message
    assert (final.content, final.images) == (message.content, message.images)
    parts = ask(format={"type": "parts"}).choices[0].message
    assert [part["type"] for part in parts.content][:4] == ["text", "image_url"] * 2
    again = [ask([*HELLO, one.model_dump(), *HELLO]).usage.prompt_tokens for one in (message, parts)]
    assert again[0] == again[1] > len(message.content) // 8  # both say the same when they are sent back


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_images_are_streamed(client, kind):
    def draw(extra, **more):
        fields = {"model": "tiny", "prompt": "7", "n": 2, "extra_body": {"seed": 5} | extra} | more
        if kind == "image_edit":
            return client.images.edit(image=[("a.png", PNG), ("b.png", PNG)], **fields)
        return client.images.generate(**fields)

    whole = [image.b64_json for image in draw({"steps": 4}).data]
    events = list(draw({"num_inference_steps": 4}, stream=True, partial_images=3))
    assert {event.type for event in events} == {f"{kind}.partial_image", f"{kind}.completed"}
    done = {event.index: event for event in events if event.type.endswith("completed")}
    assert [done[index].b64_json for index in (0, 1)] == whole and [done[i].seed for i in (0, 1)] == [5, 6]
    assert done[0].usage.images == 1 and done[0].size == "16x16"
    for index in (0, 1):
        partial = [event for event in events if event.index == index][:-1]
        assert [event.partial_image_index for event in partial] == [0, 1, 2]
        assert len({event.b64_json for event in partial} | {whole[index]}) == 4


def test_an_edit_draws_the_scene_after_the_images(client):
    edit = {"model": "tiny", "prompt": "a fox", "extra_body": {"seed": 5, "steps": 2, "size": "32x16"}}
    alone = client.images.generate(**edit)
    one, two = (client.images.edit(image=images, **edit) for images in (PNG, [("a", PNG), ("b", PNG)]))
    assert len({drawn.data[0].b64_json for drawn in (alone, one, two)}) == 3
    assert picture(one.data[0].b64_json).size == (32, 16)
    counts = [drawn.usage.input_tokens_details.image_tokens for drawn in (alone, one, two)]
    assert counts[0] == 0 < counts[1] and counts[2] == 2 * counts[1]
    assert one.usage.input_tokens == counts[1] + one.usage.input_tokens_details.text_tokens
    with pytest.raises(openai.BadRequestError, match="mask: not supported, leave it out: the next scene is drawn"):
        client.images.edit(image=PNG, mask=PNG, **edit)


def test_an_item_that_is_an_image_alone_is_seen(client):
    drawn = respond(client, "hello", tool_choice="required", max_output_tokens=0).output
    assert [item.type for item in drawn] == ["image_generation_call"]
    call = {"type": "image_generation_call", "id": "ig_1", "result": drawn[0].result}
    counts = [
        respond(client, [*before, {"role": "user", "content": "hello"}], tool_choice="none").usage.input_tokens
        for before in ([], [call], [call, call])
    ]
    assert counts == sorted(set(counts))


LANGCHAIN = {  # settings of ChatOpenAI, the body's fields
    "chat": ({}, {}),
    "chat in parts": ({}, {"response_format": {"type": "parts"}}),
    "chat in parts, v1": ({"output_version": "v1"}, {"response_format": {"type": "parts"}}),
    "responses": ({"use_responses_api": True}, {}),
}


@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_reads_streams_and_sends_back(server, mixed, kind):
    langchain, (seed, response) = pytest.importorskip("langchain_openai"), mixed
    settings, body = LANGCHAIN[kind]
    settings = {"base_url": server.url, "api_key": "none", "max_retries": 0, "max_tokens": 120} | settings
    model = langchain.ChatOpenAI(model="tiny", stream_usage=True, extra_body=FAST | {"seed": seed} | body, **settings)

    def said(message):
        parts = [message.content] if isinstance(message.content, str) else message.content
        parts = [{"text": part} if isinstance(part, str) else part for part in parts]
        urls = [part.get("image_url", {}).get("url", "").partition("base64,")[2] for part in parts]
        keys = "text", "result", "base64"
        return [next(filter(None, map(part.get, keys)), url) for part, url in zip(parts, urls, strict=True)]

    whole, streamed = model.invoke("hello"), reduce(add, model.stream("hello"))
    assert said(whole) == said(streamed) == (["\n\n".join(told(response)[::2])] if kind == "chat" else told(response))
    assert whole.usage_metadata == streamed.usage_metadata
    assert whole.usage_metadata["output_tokens"] == response.usage.output_tokens
    further = [model.invoke([("human", "hello"), one, ("human", "and then?")]) for one in (whole, streamed)]
    counts = [one.usage_metadata["input_tokens"] for one in further]
    assert said(further[0]) == said(further[1]) and counts[0] == counts[1] > whole.usage_metadata["input_tokens"]


@pytest.mark.slow  # its import alone takes 5 seconds
def test_litellm_reads_streams_and_sends_back(server, mixed, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks for a list of prices as it is imported
    litellm, (seed, response) = pytest.importorskip("litellm"), mixed
    fields = {"model": "openai/tiny", "api_base": server.url, "api_key": "none", "extra_body": FAST | {"seed": seed}}

    def ask(messages=HELLO, **more):
        return litellm.completion(messages=messages, max_tokens=120, **fields, **more)

    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    whole, streamed = ask(), litellm.stream_chunk_builder(chunks)
    messages = [one.choices[0].message for one in (whole, streamed)]
    assert {one.content for one in messages} == {"\n\n".join(told(response)[::2])}
    assert [image["image_url"]["url"].partition("base64,")[2] for image in messages[0].images] == told(response)[1::2]
    assert messages[0].images == messages[1].images
    assert whole.usage.completion_tokens == streamed.usage.completion_tokens == response.usage.output_tokens
    counts = [ask([*HELLO, one.model_dump(), *HELLO]).usage.prompt_tokens for one in messages]
    assert counts[0] == counts[1] > whole.usage.prompt_tokens
    more = {"input": "hello", "max_output_tokens": 120} | fields
    *_, last = litellm.responses(stream=True, **more)
    for one in (litellm.responses(**more), last.response):
        assert told(Response.construct(**one.model_dump())) == told(response)
