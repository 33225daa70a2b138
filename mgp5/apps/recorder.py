"""Record events as messages: the parts of the reply under way, and the scenes of a story."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..events import Event, Finished, ImageDone, ImageStep, SceneKind, SceneStart, TextChunk
from ..messages import Conversation, Image, Message, Part, Text

GIVEN = {"narrated": Image, "illustrated": Text}  # the type of the part that the user gave of a scene


@dataclass(frozen=True)
class StoryScene:
    """One scene of a story: its text, its image, and which of them the user gave (see `SceneStart`)."""

    kind: SceneKind
    text: str = ""
    image: Image | None = None

    def messages(self) -> tuple[Message, ...]:
        """Return what the user gave as the user's message, and what the model made as the assistant's."""
        text = (Text(self.text),) if self.text else ()
        image = (self.image,) if self.image is not None else ()
        return {
            "given": (Message("user", image + text),),
            "narrated": (Message("user", image), Message("assistant", text)),
            "illustrated": (Message("user", text), Message("assistant", image)),
            "continued": (Message("assistant", text + image),),
        }[self.kind]


def story_conversation(scenes: Iterable[StoryScene]) -> Conversation:
    """Return the messages of a story; scenes in which there is nothing yet are left out."""
    return Conversation(tuple(m for scene in scenes if scene.text or scene.image for m in scene.messages()))


@dataclass
class Recorder:
    """Collect the events of one reply, or of a story scene by scene. What is there is valid after every event."""

    parts: list[Part] = field(default_factory=list)  # text and images so far, in order; in a story, of this scene
    step: ImageStep | None = None  # the last denoising step of the image under way, None between images
    finished: Finished | None = None  # the event that ended the reply or scene
    scenes: list[StoryScene] = field(default_factory=list)  # of a story, the current one included

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case SceneStart():
                self.parts, self.step, self.finished = [], None, None
                self.scenes.append(StoryScene(event.kind))
            case TextChunk() if self.parts and isinstance(self.parts[-1], Text):
                self.parts[-1] = Text(self.parts[-1].text + event.text)
            case TextChunk():
                self.parts.append(Text(event.text.lstrip()))
            case ImageStep():
                self.step = event
            case ImageDone():
                self.step = None
                self.parts.append(event.image)
            case Finished():
                self.step, self.finished = None, event
                if event.reason != "interrupted":  # blanks at the ends of texts are gone from the finished message
                    kind = GIVEN.get(self.scenes[-1].kind) if self.scenes else None
                    given = [part for part in self.parts if kind and isinstance(part, kind)]
                    self.parts = [*given, *event.message.content]
        if self.scenes:
            message = self.message
            self.scenes[-1] = StoryScene(self.scenes[-1].kind, message.text.strip(), next(iter(message.images), None))

    @property
    def message(self) -> Message:
        """The reply so far, as the assistant's message."""
        return Message("assistant", tuple(self.parts))

    @property
    def conversation(self) -> Conversation:
        """The story so far."""
        return story_conversation(self.scenes)

    @property
    def generated(self) -> bool:
        """Whether the model has added anything to the story yet."""
        return any(message.role == "assistant" and message.content for message in self.conversation.messages)
