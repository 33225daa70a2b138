"""The web page of `mgp5 serve --web`, in a real browser against a real server."""

import base64
import json
import re
from pathlib import Path

import pytest
from browser import browser_page, overflow
from serve_process import JSON, KEY, serving_here
from tiny import picture

from mgp5.errors import Mgp5Error
from mgp5.messages import Conversation
from mgp5.serving.loop import Refused
from mgp5.serving.request import Limits

pytest.importorskip("gradio", reason="pip install 'mgp5[web]'")


@pytest.fixture(scope="module")
def server():
    with serving_here("demo", web=True, rows=2, limits=Limits(body_bytes=2**20)) as running:
        yield running


@pytest.fixture
def files(tmp_path):
    for name, color in (("p10.png", "red"), ("p2.png", "blue")):
        picture(color, (60, 60)).save(tmp_path / name)
    return [tmp_path / "p10.png", tmp_path / "p2.png"]


def visit(page, server):
    page.set_default_timeout(120_000)
    page.goto(f"{server.url.removesuffix('v1')}ui/")
    page.wait_for_selector("#talk-box textarea")
    return page


def settings(page, **values):
    """Fill in fields of the settings of the tab."""
    page.locator("button:visible", has_text="Settings").click()
    for name, value in values.items():
        page.get_by_label(name.capitalize()).locator("visible=true").first.fill(str(value))


def say(page, text):
    page.wait_for_selector("#talk-box textarea:not([disabled])")
    page.fill("#talk-box textarea", text)
    page.press("#talk-box textarea", "Enter")


def until(page, where, text):
    """Wait until a line begins so."""
    begins = "([where, text]) => document.querySelector(where)?.innerText.startsWith(text)"
    page.wait_for_function(begins, arg=[where, text])


def shows(page, *kinds):
    """Wait until the last reply has these parts, in order."""
    page.wait_for_function(
        """kinds => {
            const last = [...document.querySelectorAll('#talk .bot-row')].at(-1);
            const parts = [...last.querySelectorAll('.message-content, img')];
            return parts.map(part => part.tagName == 'IMG' ? 'image' : 'text').join() == kinds;
        }""",
        arg=",".join(kinds),
    )


@pytest.mark.slow
def test_a_chat(server, files):
    with browser_page(width=390, height=844) as page:
        visit(page, server)
        settings(page, seed=3, steps=4)
        page.get_by_label("always").check()
        say(page, "Draw a red fox. <script>Now</script>")
        until(page, "#talk-work", "seed 3 ")
        assert "it has no word for script" in page.inner_text("#talk-work")
        shows(page, "text", "image")
        assert page.locator("#talk script").count() == 0
        page.wait_for_function("document.querySelector('#talk .bot-row img').naturalWidth == 128")
        page.wait_for_selector("#talk-box textarea:not([disabled])")
        page.locator("#talk-box input[type=file]").set_input_files(files[0])
        page.wait_for_selector("#talk-box img")
        say(page, "What is this?")
        until(page, "#talk-work", "seed 103 ")
        assert page.locator("#talk .user-row img").count() == 1 and page.locator("#talk .bot-row").count() == 2
        page.click("#talk button[aria-label=Retry] >> nth=-1")
        until(page, "#talk-work", "seed 203 ")
        page.click("#talk button[aria-label=Undo] >> nth=-1")
        page.wait_for_selector("#talk-box img")
        assert page.input_value("#talk-box textarea") == "What is this?" and page.locator("#talk .bot-row").count() == 1
        page.wait_for_function("document.querySelector('#talk-box img').naturalWidth == 60")
        other = visit(page.context.browser.new_context().new_page(), server)
        assert other.locator("#talk .user-row, #talk .bot-row").count() == 0
        assert overflow(page) == 0 and "fox, rabbit" in page.inner_text("header")
        page.reload()
        page.wait_for_selector("#talk .bot-row img")
        shows(page, "text", "image")
        assert page.locator("#talk .user-row").count() == 1
        page.click("#talk button[aria-label=Clear]")
        page.get_by_text("What shall we look at?").wait_for()
        page.reload()
        page.get_by_text("What shall we look at?").wait_for()


@pytest.mark.slow
def test_a_reply_is_stopped_and_left(server):
    with browser_page() as page:
        visit(page, server)
        settings(page, steps=100)
        assert page.get_by_label("Seed").locator("visible=true").input_value() == ""
        page.get_by_label("always").check()
        before = server.metric("mgp5_cancelled_total")
        say(page, "Draw a red fox.")
        page.wait_for_selector("#talk-work progress")
        assert re.match(r"drawing, step \d+ of 100", page.inner_text("#talk-work"))
        page.click("#talk-box .stop-button")
        until(page, "#talk-work", "stopped")
        shows(page, "text")  # what it has said stays
        server.until("mgp5_cancelled_total", before + 1)
        say(page, "x " * 4000)
        page.get_by_text("That did not work").wait_for()  # and the chat goes on
        say(page, "Draw a red fox.")
        page.wait_for_selector("#talk-work progress")
        page.close()
        server.until("mgp5_cancelled_total", before + 2)


@pytest.mark.slow
def test_a_story(server, files, tmp_path):
    with browser_page(width=390, height=844) as page:
        visit(page, server).get_by_role("tab", name="Story").click()
        settings(page, seed=3, steps=4)
        page.locator("#drop input[type=file]").set_input_files(files)
        page.wait_for_selector("#cards textarea >> nth=1")
        page.click("#narrate")
        until(page, "#book-work", "seed 3")
        texts = page.locator("#cards textarea")
        told = [text.input_value() for text in texts.all()]
        assert len(told) == 2 and all(told)
        texts.nth(0).fill("A <i>fox</i>")
        page.click("#continue")
        page.wait_for_selector("#cards textarea >> nth=2")
        until(page, "#book-work", "seed 3")
        page.fill("#lines textarea", "The fox sleeps.\n\n")
        page.click("#draw")
        page.wait_for_selector("#cards textarea >> nth=3")
        until(page, "#book-work", "seed 3")
        assert texts.nth(0).input_value() == "A <i>fox</i>" and texts.nth(1).input_value() == told[1]
        assert page.locator("#cards img").count() == 4 and texts.nth(3).input_value() == "The fox sleeps."
        page.reload()
        page.get_by_role("tab", name="Story").click()
        page.wait_for_selector("#cards textarea >> nth=3")
        assert texts.nth(0).input_value() == "A <i>fox</i>" and page.locator("#cards img").count() == 4
        drawn = page.locator("#cards img").nth(3).get_attribute("src")
        page.get_by_role("button", name="Redraw").nth(3).click()
        until(page, "#book-work", "seed")
        assert page.locator("#cards img").nth(3).get_attribute("src") != drawn
        page.get_by_role("button", name="Move up").nth(3).click()
        page.wait_for_function("document.querySelectorAll('#cards textarea')[2].value == 'The fox sleeps.'")
        page.get_by_role("button", name="Remove").nth(3).click()
        page.wait_for_function("document.querySelectorAll('#cards textarea').length == 3")
        page.get_by_label("Title").fill("Foxes")
        with page.expect_download() as download:
            page.click("#page")
        download.value.save_as(tmp_path / "story.html")
        settings(page, steps=100)
        page.click("#continue")
        page.wait_for_selector("#book-work progress")
        page.click("#stop")
        until(page, "#book-work", "stopped")
        assert texts.count() == 3 and overflow(page) == 0
        taken = page.context.new_page()  # gradio calls it an error when its page is left for another address
        taken.goto((tmp_path / "story.html").as_uri())
        assert taken.inner_text("h1") == "Foxes" and taken.locator("img").count() == 3
        shown = taken.locator(".scene p").all_inner_texts()
        assert shown == ["A <i>fox</i>", told[1], "The fox sleeps."]


def join(server, data, headers=JSON, path="ui/gradio_api/queue/join", **more):
    body = {"data": data, "fn_index": 0, "session_hash": "s"} | more
    return server.ask("POST", f"/{path}", json.dumps(body).encode(), headers)[0]


def test_files_of_the_server_and_the_rest_of_gradio_are_out_of_reach(server):
    api = "/ui/gradio_api/"
    for path in ("/etc/passwd", "..%2f..%2fetc%2fpasswd", f"{Path(__file__)}", "%00", "a" * 5000):
        assert server.ask("GET", f"{api}file={path}")[0] == 403
    for path in (
        *(f"{api}file/etc/passwd", f"{api}proxy={server.url}/models", f"{api}file=https://127.0.0.1/v1/models"),
        *(f"{api}info", f"{api}call/say/1", f"{api}custom_component/1/client/component/index.js"),
        *("/ui/monitoring", "/ui/login", "/ui/svelte/index.js", "/ui/../../etc/passwd"),
        *("/ui/static/..%2f..%2f..%2froutes.py", "/ui/assets/%2e%2e/%2e%2e/%2e%2e/routes.py"),
    ):
        assert server.ask("GET", path)[0] in (403, 404), path
    for path in ("component_server", "run/say", "call/say", "api/say", "vibe-edit", "process_recording", "stream/1"):
        assert join(server, [], path=f"ui/gradio_api/{path}") == 404
    for path in ("/etc/passwd", "http://127.0.0.1/", "https://example.com/a.png"):
        for wrapped in ({"path": path}, {"text": "", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}):
            assert join(server, [wrapped]) == 403
    assert join(server, [], JSON | {"Origin": "http://evil.example"}) == 403
    assert join(server, [], JSON | {"Origin": "null"}) == 403
    assert server.ask("POST", f"{api}upload", b"x" * 2_000_000, {"Content-Type": "multipart/form-data"})[0] == 413
    assert server.ask("POST", f"{api}queue/join", b"{", JSON)[0] == 400


def test_wrong_values_of_an_event_are_refused_by_it(server):
    for index in range(8):
        for data in ([], [None] * 40, ["x"] * 30, [{"text": 1, "files": "x"}, -1, 1e9, "a", None, "b"]):
            assert join(server, data, fn_index=index) in (200, 400, 404, 422, 500)
    assert server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=2)[0] == 200


def test_the_page_asks_for_the_key(small_folder):
    def basic(password):
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    with serving_here(small_folder, KEY, web=True) as server:
        for path in ("/", "/ui/", "/ui/config", "/ui/gradio_api/queue/data?session_hash=s", "/favicon.ico"):
            for headers in ({}, basic("wrong"), {"Authorization": "Basic %%%"}, {"Authorization": f"Basic {KEY}"}):
                assert server.ask("GET", path, headers=headers)[0] == 401
        assert server.ask("GET", "/ui/config", headers=basic(KEY))[0] == 200
        assert server.ask("GET", "/v1/models", headers=basic(KEY))[0] == 401


def test_a_chat_as_gradio_has_it_is_a_conversation(files):
    from mgp5.serving.web.chat import FAILED, read_talk

    def turn(role, text, **more):
        return {"role": role, "content": [{"type": "text", "text": text}]} | more

    failed = turn("assistant", "why", metadata={"title": FAILED})  # so the message before goes
    turns = [turn("user", "a"), failed, turn("user", "b"), turn("assistant", "1 &lt; 2")]
    talk, left_out = read_talk([*turns, turn("user", " c ")], Limits())
    assert left_out == 0
    assert read_talk([*turns, turn("user", " c ")], Limits(messages=2)) == (Conversation(talk.messages[2:]), 1)
    with pytest.raises(Refused, match="images in messages: 1"):
        image = {"type": "file", "file": {"path": str(files[0])}}
        read_talk([*turns, {"role": "user", "content": [image]}], Limits(context_images=0))
    assert [(m.role, m.text) for m in talk.messages] == [("user", "b"), ("assistant", "1 < 2"), ("user", "c")]
    with pytest.raises(Mgp5Error, match="empty"):
        read_talk([*turns, turn("user", "")], Limits())
