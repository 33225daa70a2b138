"""`mgp5 chat`: messages and replies from the shell, and a session of lines and /commands."""

import builtins
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import parts_of, picture, story_of

from mgp5 import Conversation
from mgp5.apps.chat import Chat
from mgp5.commands.repl import Repl
from mgp5.events import Note
from mgp5.inference.scheduler import Scheduler
from mgp5.inference.session import Session
from mgp5.options import reply_options
from mgp5.views.files import StoryFolder
from mgp5.views.terminal import TerminalView


def roles_of(folder) -> list[str]:
    return [message["role"] for message in story_of(folder)["messages"]]


def test_chat_answers_messages_and_goes_on_from_a_folder(mgp5, pictures, tmp_path):
    first = mgp5("chat", "--image", "pictures/2.png", "--message", "look", "--message", "and?", "--out", "talk")
    assert first.exit_code == 0 and first.stdout.strip()
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert roles_of(tmp_path / "talk") == roles
    assert parts_of(tmp_path / "talk")[1:3] == [("user", "image"), ("user", "text")]
    assert mgp5("chat", "--resume", "talk", stdin="go on\n\n").exit_code == 0
    assert roles_of(tmp_path / "talk") == [*roles, "user", "assistant"]
    assert (tmp_path / "talk/story.html").is_file()


def test_a_resumed_chat_gives_the_replies_of_one_in_a_single_run(mgp5, tmp_path):
    mgp5("chat", "--message", "one", "--message", "two", "--out", "whole")
    mgp5("chat", "--message", "one", "--out", "pieces")
    mgp5("chat", "--message", "two", "--resume", "pieces")
    assert story_of(tmp_path / "whole")["messages"] == story_of(tmp_path / "pieces")["messages"]


def test_chat_pictures_are_kept_although_no_folder_was_asked_for(mgp5, tmp_path):
    result = mgp5("chat", "--message", "draw", "--set", "image=always")
    assert "chat-1" in result.stderr
    assert ("assistant", "image") in parts_of(tmp_path / "chat-1")


def test_a_pipe_takes_commands_and_an_error_costs_its_line_only(mgp5, tmp_path, monkeypatch):
    from mgp5.inference import reply

    real = reply.generate

    def fail(model, conversation, *more):
        if conversation.messages[-1].text == "odd":
            raise TypeError("nobody foresaw this")
        return real(model, conversation, *more)

    monkeypatch.setattr(reply, "generate", fail)
    lines = b"one\ntwo\n/undo\n/seed\na fox \xff\nodd\nthree\n/quit\nfour\n"
    result = mgp5("chat", "--out", "talk", stdin=lines)
    assert result.exit_code == 1 and roles_of(tmp_path / "talk") == ["system", *["user", "assistant"] * 2]
    errors = [line for line in result.stderr.splitlines() if line.startswith("mgp5: ")]
    assert len(errors) == 3 and "'/seed' lacks a whole number, N" in errors[0]
    assert r"the text 'a fox \udcff' is not UTF-8" in errors[1] and "TypeError: nobody foresaw this" in errors[2]
    assert not (tmp_path / "talk/.lock").exists()


@pytest.fixture
def talk(small_model, tmp_path, monkeypatch):
    """A chat, and a function that types lines into it."""
    monkeypatch.chdir(tmp_path)
    chat = Chat(small_model, reply_options(seed=1, steps=1, max_tokens=6, image="never"))
    chat.record = {"model": "tiny", "options": {}}

    def type_lines(*lines: str | type[BaseException]) -> None:
        queue = iter([*lines, EOFError])

        def typed(prompt: str) -> str:
            line = next(queue)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed)
        Repl(chat, lambda: TerminalView("off")).run()

    return SimpleNamespace(chat=chat, type=type_lines)


def texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.messages[1:]]


def test_a_chat_goes_on_when_the_context_is_full(talk, monkeypatch):
    """The oldest turns are left out of what the model is shown, and stay in the conversation."""
    told, shown = [], []
    monkeypatch.setattr(talk.chat.model.backbone, "context_length", 330)
    monkeypatch.setattr(talk.chat, "tell", told.append)
    read = Session.read
    monkeypatch.setattr(Session, "read", lambda self, talk, **more: (shown.append(talk), read(self, talk, **more))[1])
    lines = [f"{number} a red fox waves with a ball on the beach" for number in range(8)]
    talk.type(*lines)
    assert [message.text for message in talk.chat.conversation.messages if message.role == "user"] == lines
    assert {each.messages[0].role for each in shown} == {"system"}
    assert {each.messages[-1].text for each in shown} == {*lines}
    counts = [sum(message.role == "user" for message in each.messages) for each in shown]
    assert counts[:2] == [1, 2] and max(counts) < 8
    assert told and "context is full" in told[0] and "1 oldest" in told[0]
    talk.type("/undo", "/retry")
    assert len(talk.chat.conversation.messages) == 1 + 2 * 7
    told.clear(), shown.clear()  # a model of short dialogues is shown no more, and its context is not full
    monkeypatch.setattr(talk.chat.model, "config", replace(talk.chat.model.config, history=3))
    talk.type(lines[0])
    assert [len(each.messages) for each in shown] == [1 + 3] and not told


def test_what_does_not_fit_is_an_error_but_where_turns_may_be_left_out(small_model, monkeypatch):
    """As the page does it, whose conversation may lack turns already."""
    monkeypatch.setattr(small_model.backbone, "context_length", 330)
    talk = Conversation()
    for number in range(8):
        talk = talk.add("user", f"{number} a red fox waves with a ball on the beach").add("assistant", "so it is")
    talk = talk.add("user", "and then?")
    scheduler = Scheduler(small_model, rows=1)
    for left_out in (None, 3):
        scheduler.submit(talk, reply_options(max_tokens=6, image="never"), left_out=left_out)
    told = [event for _ in range(99) if scheduler.busy for _, event in scheduler.step()]
    assert "context is 330" in str(told[0])
    assert isinstance(told[1], Note) and re.search(r"does not see the (\d+) oldest", told[1].text) and told[-1].message
    assert 3 < int(re.search(r"\d+", told[1].text)[0]) <= 3 + 8


def test_undo_takes_back_a_message_and_its_reply(talk, capfd):
    talk.type("hello", "how are you?", "/undo")
    said = texts(talk.chat.conversation)
    assert said[0] == "hello" and len(said) == 2
    assert "took back: how are you?" in capfd.readouterr().err
    talk.type("/undo", "/undo")
    assert not texts(talk.chat.conversation)
    assert "no message of yours" in capfd.readouterr().err


def test_retry_gives_another_reply_and_seed_chooses_it(talk):
    talk.type("hello")
    first = texts(talk.chat.conversation)
    talk.type("/retry")
    second = texts(talk.chat.conversation)
    assert second[0] == first[0] and second[1] != first[1] and len(second) == 2
    talk.type("/seed 1", "/retry")
    assert texts(talk.chat.conversation) == first


def test_image_goes_with_the_next_message_and_save_writes_it(talk, tmp_path, capfd):
    picture().save(tmp_path / "cat.png")
    talk.type("/image cat.png", "look", "/save kept", "bye", "/quit", "never said")
    assert parts_of(tmp_path / "kept")[1:3] == [("user", "image"), ("user", "text")]
    assert texts(StoryFolder.open(tmp_path / "kept").load()[0])[2] == "bye"
    assert "never said" not in texts(talk.chat.conversation)
    assert "cat.png goes with your next message" in capfd.readouterr().err


def test_mistakes_are_told_and_the_chat_goes_on(talk, tmp_path, capfd):
    (tmp_path / "no.jpg").write_text("text")
    (tmp_path / "file").write_text("mine")
    wrong = ["/dance", "/image no.jpg", "/image", "/seed x", "/seed --5", "/seed ²", "/save file", "/retry"]
    talk.type("/help", *wrong, "a " * 1000, KeyboardInterrupt, "hello")
    said = capfd.readouterr().err
    assert all(command in said for command in ("/undo", "/retry", "/seed N", "/save DIR", "/quit"))
    assert said.count("mgp5: ") == len(wrong) + 1
    assert texts(talk.chat.conversation)[0] == "hello"


def test_a_stopped_reply_is_kept_and_its_picture_is_not_sent_twice(talk, tmp_path, monkeypatch, capfd):
    from mgp5.inference.decoder import Decoder

    real, calls = Decoder.steps, []

    def stop(*args: object) -> dict:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Decoder, "steps", stop)
    picture().save(tmp_path / "cat.png")
    talk.type("/image cat.png", "look", "go on")
    messages = talk.chat.conversation.messages[1:]
    assert "what was said is kept" in capfd.readouterr().err
    assert [len(message.images) for message in messages if message.role == "user"] == [1, 0]
    assert not talk.chat.pending
