"""Lines of a batch: read and check one, ask for what it needs next, record the replies.

Each line is a JSON object. A conversation, which gets its next reply, is in the Hugging Face chat format; a story is
what the user gives of its scenes, and how many scenes the model adds:

    {"messages": [{"role": "user", "content": "a red fox"}]}
    {"story": [{"path": "a.png", "text": "A day."}, {"path": "b.png"}, {"text": "It snows."}], "scenes": 2}

Both take "title", and "options" of generation. Paths are relative to the file and may not leave its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message, inside
from ..options import Options
from ..prompts import CHAT_SYSTEM, Context
from .recorder import StoryScene, story_conversation
from .story import Ask, SceneInput, finished_scene, scene_request

EXPECTED = 'expected {"messages": [...]} or {"story": [...]}, with scenes, title, options'
TYPES = {"messages": list, "story": list, "scenes": int, "title": str, "options": dict}


@dataclass(eq=False)
class ChatLine:
    """A conversation that gets one reply; `ask` is what the model is asked next, None when the line is done."""

    number: int
    title: str
    options: Options
    conversation: Conversation

    def __post_init__(self) -> None:
        self.ask: Ask | None = (self.conversation, self.options)

    def record(self, reply: Message) -> None:
        """Add the reply to what was asked."""
        self.conversation, self.ask = Conversation((*self.conversation.messages, reply)), None


@dataclass(eq=False)
class StoryLine:
    """A story that is told scene by scene, as by `story.tell_story`; `ask` is that of a ChatLine."""

    number: int
    title: str
    options: Options
    inputs: list[SceneInput]  # of all scenes
    narrate_from: Context
    scenes: list[StoryScene] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next()

    def record(self, reply: Message) -> None:
        """Add the reply to what was asked."""
        self.scenes.append(finished_scene(self.inputs[len(self.scenes)], reply))
        self._next()

    @property
    def conversation(self) -> Conversation:
        """The story so far."""
        return story_conversation(self.scenes)

    def _next(self) -> None:
        """Go on to the next scene that the user did not give whole."""
        self.ask: Ask | None = None
        while not self.ask and len(self.scenes) < len(self.inputs):
            part = self.inputs[len(self.scenes)]
            self.ask = scene_request(self.scenes, part, self.options, self.narrate_from)
            if not self.ask:
                self.scenes.append(finished_scene(part))


Line = ChatLine | StoryLine


def read_line(number: int, line: bytes, root: Path, options: Options, scenes: int, narrate_from: Context) -> Line:
    """Read one line and the images that it names. Raises Mgp5Error if anything is wrong with them.

    Args:
        root: folder that paths are relative to.
        options, scenes: of the line, where it has no others.
        narrate_from: see `story.scene_request`.
    """
    row = _checked(line)
    title, options = row.get("title", ""), options.updated(row.get("options", {}))
    if "story" in row:
        inputs = [_scene_input(part, root) for part in row["story"]]
        inputs += [SceneInput()] * row.get("scenes", scenes)
        return StoryLine(number, title, options, inputs, narrate_from)
    conversation = Conversation.from_chat(row["messages"], root)
    if conversation.messages[-1].role != "user":
        raise Mgp5Error("the last message is not the user's", "end it with a message to reply to")
    for image in conversation.images:
        image.load()
    if conversation.messages[0].role != "system":  # as a chat begins
        conversation = Conversation((*Conversation().add("system", CHAT_SYSTEM).messages, *conversation.messages))
    return ChatLine(number, title, options, conversation)


def _checked(line: bytes) -> dict[str, Any]:
    """Return the object of a line, with fields of the right types."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mgp5Error(f"not JSON ({error})", EXPECTED) from None
    wrong = not isinstance(row, dict) or any(type(value) is not TYPES.get(name) for name, value in row.items())
    if wrong or ("messages" in row) == ("story" in row) or row.get("scenes", 0) < 0:
        raise Mgp5Error("not a conversation or a story", EXPECTED)
    if [] in (row.get("messages"), row.get("story")):
        raise Mgp5Error("an empty conversation or story", EXPECTED)
    return row


def _scene_input(part: Any, root: Path) -> SceneInput:
    """Return what the user gives of a scene, its image read."""
    fields = part if isinstance(part, dict) else {}
    texts = all(name in ("path", "text") and isinstance(value, str) for name, value in fields.items())
    if not texts or not any(map(str.strip, fields.values())):
        raise Mgp5Error(f"a scene is {json.dumps(part)[:80]}", 'expected {"path": ..., "text": ...}, one or both')
    image = Image(path=inside(root, fields["path"])) if "path" in fields else None
    if image:
        image.load()
    return SceneInput(image, fields.get("text", "").strip())
