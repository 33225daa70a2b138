"""Every text that mgp5 says to an LLM: system texts, task prompts, chat templates, and the labels of a target.

Training and inference build their conversations with the same functions, so that they share every word.
T is tokens, S the token slots of one image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args
from weakref import WeakKeyDictionary

from .errors import Mgp5Error
from .files import digest
from .messages import Conversation, Image, Message, Text

IGNORE = -100  # label of tokens without a loss

Scene = tuple[str, Image]  # text and image of one step of a story
Context = Literal["full", "text", "none"]  # how much of a story's history a question shows
Task = Literal["illustrate", "continue", "narrate"]  # the paper's three tasks on VIST

# System texts and questions are those of the MiniGPT-5 release (MiniGPT-5, appendix B.2 has one of each task).
_IMAGES_FOLLOW = (
    "Give the following images in <Img>ImageContent</Img> format. "
    "You will be able to see the images once I provide it to you. "
)
STORY_SYSTEM = _IMAGES_FOLLOW + "Please understanding images and generate story."
CHAT_SYSTEM = _IMAGES_FOLLOW + "Please generate conversations with appropriate images."
CAPTION_SYSTEM = "You will be able to generate image according to command."
CAPTION_INSTRUCTIONS = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)
TASK_PROMPTS: dict[Task, tuple[str, ...]] = {
    "illustrate": ("Generate an image with the scene description: {text}", "the scene description: {text}"),
    "continue": (
        "Tell me the next scene with image.",
        "Generate the next scene with image.",
        "What should happen then?",
    ),
    "narrate": ("Tell me the next scene description by this image:", "What happen in the next scene image:"),
}


def illustrate(history: Sequence[Scene], text: str, choice: int = 0, *, context: Context = "full") -> Conversation:
    """Ask for the image of the next scene, given its text (image generation).

    Args:
        history: text and image of the scenes so far, in order.
        choice: index of the wording in `TASK_PROMPTS`.
        context: how much of the history the question shows: "full", "text" (no images) or "none".
    """
    return _ask(history, context, Text(TASK_PROMPTS["illustrate"][choice].replace("{text}", text), text))


def continue_(history: Sequence[Scene], choice: int = 0, *, context: Context = "full") -> Conversation:
    """Ask for text and image of the next scene (multimodal generation); arguments as in `illustrate`."""
    return _ask(history, context, Text(TASK_PROMPTS["continue"][choice], ""))


def narrate(history: Sequence[Scene], image: Image, choice: int = 0, *, context: Context = "full") -> Conversation:
    """Ask for the text of the next scene, given its image (text generation); arguments as in `illustrate`."""
    return _ask(history, context, Text(TASK_PROMPTS["narrate"][choice], ""), image)


def _ask(history: Sequence[Scene], context: Context, *question: Text | Image) -> Conversation:
    """Build the system message and one user turn: text and image of every scene in order, then the question."""
    if context not in get_args(Context):
        raise Mgp5Error(f"unknown context {context!r}", "expected full, text or none", usage=True)
    parts: list[str | Image] = []
    for text, image in history if context != "none" else ():
        parts += [text] if text else []
        parts += [image] if context == "full" else []
    return Conversation().add("system", STORY_SYSTEM).add("user", *parts, *question)


def caption_to_image(image: Image, instruction: int | None = None, bare: bool = False) -> Conversation:
    """Build a pretraining sample: the caption of an image as the user's turn, the image as the target.

    `instruction` is an index of CAPTION_INSTRUCTIONS, which stands before the caption; None for the caption alone, if
    `bare` without the chat template (MiniGPT-5, appendix B.2, and its release).
    """
    conversation, words = Conversation(bare=bare and instruction is None), image.caption
    if instruction is not None:
        conversation = conversation.add("system", CAPTION_SYSTEM)
        words = f"{CAPTION_INSTRUCTIONS[instruction]} {words}"
    return conversation.add("user", words).add("assistant", image)


class PromptBackbone(Protocol):
    """What prompts need of a multimodal LLM, see `backbones.Backbone`."""

    tokenizer: Any
    image_token: str
    context_length: int


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation up to where the reply begins."""

    ids: list[int]  # (T,), with one image token for each image until `expand`
    images: tuple[Image, ...]  # context images in reading order

    def expand(self, image_token_id: int, slots: Sequence[int]) -> list[int]:
        """Return the ids with each image's token repeated once per slot. Raises ValueError when the counts disagree."""
        return _expand(self.ids, image_token_id, slots)


@dataclass(frozen=True)
class Example:
    """Token ids and labels of a training sample."""

    ids: list[int]  # (T,), with one image token for each context image until `expand_labels`
    labels: list[int]  # (T,), IGNORE in the context and on forced vokens
    images: tuple[Image, ...]  # context images in reading order
    targets: tuple[Image, ...]  # target images, one for each run of vokens
    starts: list[int]  # positions of their triggers in `ids`; context images stand before all of them


def prompt(backbone: PromptBackbone, conversation: Conversation) -> Prompt:
    """Tokenize a conversation by the backbone's chat template, up to where the assistant's reply begins. A bare one is
    its texts only. Raises Mgp5Error for a text of which UTF-8 knows no bytes, such as half a character."""
    for text in (message.text for message in conversation.messages):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Mgp5Error(f"the text {text!r:.60} is not UTF-8", "write it in UTF-8") from None
    if conversation.bare:
        return Prompt(_bare(backbone, conversation.messages), conversation.images)
    return Prompt(_encode(backbone, _render(backbone, conversation.messages, reply=True)), conversation.images)


def example(
    backbone: PromptBackbone, conversation: Conversation, trigger: str, layouts: Sequence[tuple[list[int], list[int]]]
) -> Example:
    """Return the last message, which must be the assistant's, as the target of all messages before it.

    `trigger` is the token that begins an image of the target; `layouts` are ids and labels of each target image, as
    `Head.layout` gives them, the first id being the trigger's.
    """
    *context, target = conversation.messages
    if target.role != "assistant":
        raise Mgp5Error(f"the last message of a sample is of role {target.role!r}", "end it with the assistant's reply")
    if conversation.bare:
        before, tail = _bare(backbone, context), _content(backbone, target, trigger)
    else:
        head = _render(backbone, context, reply=True)
        whole = _render(backbone, [*context, target], reply=False, trigger=trigger)
        tail = whole[len(head) :] if whole.startswith(head) else _content(backbone, target, trigger)
        before = _encode(backbone, head)
    if tail.lstrip().startswith(trigger):
        tail = tail.lstrip()  # an image follows the prompt at once: no blank may come between
    end = backbone.tokenizer.eos_token
    tail = tail.rstrip() if tail.rstrip().endswith(end) else tail.rstrip() + end
    after = backbone.tokenizer.encode(tail, add_special_tokens=False)
    ids, labels, runs, starts = list(before), [IGNORE] * len(before), iter(layouts), []
    first = backbone.tokenizer.convert_tokens_to_ids(trigger)
    for token in after:
        starts += [len(ids)] * (token == first)
        run, run_labels = next(runs) if token == first else ([token], [token])
        ids += run
        labels += run_labels
    context_images = tuple(image for message in context for image in message.images)
    return Example(ids, labels, context_images, target.images, starts)


def history_truncations(conversation: Conversation) -> list[Conversation]:
    """Return the sample with more and more of its history cut from the left, the longest first.

    First whole turns are cut, such that a user's turn comes first; then the leading scenes of the last user turn, each
    a text and the images behind it. The system message, the last text of that turn and all that follows it are kept;
    the list is empty when nothing can be cut.
    """
    whole, *cuts = conversation.tails()
    last, *rest = (whole, *cuts)[-1].messages[len(whole.head) :]
    if last.role == "user":
        texts = [i for i, part in enumerate(last.content) if isinstance(part, Text)]
        cuts += [Conversation((*whole.head, Message("user", last.content[i:]), *rest)) for i in texts[1:]]
    return cuts


def expand_labels(example: Example, image_token_id: int, slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return ids and labels of an example with each image's token repeated once per slot, see `Prompt.expand`."""
    ids = _expand(example.ids, image_token_id, slots)
    return ids, [IGNORE] * (len(ids) - len(example.ids)) + example.labels  # context images stand before the target only


def with_system(conversation: Conversation, text: str) -> Conversation:
    """Return a conversation that begins with a system message: its own, else one of this text, if there is any."""
    if not text or conversation.bare or (conversation.messages and conversation.messages[0].role == "system"):
        return conversation
    return Conversation((Message("system", (Text(text),)), *conversation.messages))


def role_markers(backbone: PromptBackbone) -> tuple[str, ...]:
    """Return the texts by which the chat template begins turns ("ASSISTANT:"); no turns that special tokens begin."""
    talk = Conversation().add("user", "\0").add("assistant", "\0").add("user", "\0")
    special = "|".join(map(re.escape, backbone.tokenizer.all_special_tokens)) or "(?!)"
    _, *between, _ = re.sub(special, "", _render(backbone, talk.messages, reply=False)).split("\0")
    markers = [marker.strip() for marker in between]
    return tuple(marker for marker in markers if len(marker) > 2 and not marker[-1].isalnum())


def either_way(sample: Conversation, seed: int) -> Conversation:
    """Return an image and its caption as one bare text in an order that the caption and the seed choose, all of which
    is the target; a sample of anything else stays as it is."""
    images = sample.messages[-1].images
    if len(images) != 1 or not images[0].caption:
        return sample
    pair, chosen = (images[0], Text(images[0].caption)), int(digest(f"{seed} {images[0].caption}", size=1), 16) % 2
    return Conversation((Message("assistant", pair[:: 1 if chosen else -1]),), bare=True)


def check_length(backbone: PromptBackbone, length: int, reply: int = 0) -> None:
    """Raise Mgp5Error unless a prompt of `length` tokens and a reply of `reply` tokens fit the backbone's context."""
    room = backbone.context_length
    if length + reply > room:
        found = f"the prompt has {length} tokens and the reply may take {reply}, the model's context is {room}"
        raise Mgp5Error(found, "shorten the text or show fewer images")


def _expand(ids: Sequence[int], image_token_id: int, slots: Sequence[int]) -> list[int]:
    if (count := sum(i == image_token_id for i in ids)) != len(slots):
        raise ValueError(f"the prompt has {count} image tokens, but {len(slots)} images were given")
    counts = iter(slots)
    return [copy for i in ids for copy in [i] * (next(counts) if i == image_token_id else 1)]


def _encode(backbone: PromptBackbone, text: str) -> list[int]:
    bos = backbone.tokenizer.bos_token
    return backbone.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def _bare(backbone: PromptBackbone, messages: Sequence[Message]) -> list[int]:
    """Tokenize texts without the chat template, behind the token that begins a text, if there is one."""
    text = " ".join(_content(backbone, message, backbone.image_token).strip() for message in messages)
    begin = backbone.tokenizer.bos_token_id
    ids = backbone.tokenizer.encode(text, add_special_tokens=False)
    return ids if begin is None else [begin, *ids]


def _render(backbone: PromptBackbone, messages: Sequence[Message], *, reply: bool, trigger: str = "") -> str:
    # Some templates (LLaVA-1.5) move all images in front of all text; written into the text they keep their place.
    chat = []
    for message in messages:
        mark = trigger if trigger and message is messages[-1] else backbone.image_token
        text = _content(backbone, message, mark)
        chat.append({"role": message.role, "content": [{"type": "text", "text": text}]})
    return backbone.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=reply)


def _content(backbone: PromptBackbone, message: Message, mark: str) -> str:
    """Write a message as text with `mark` for each image; a blank stands between two pieces of text only.

    For MiniGPT-4, whose template has no blank behind a role, as the release of MiniGPT-5 writes it: each piece behind a
    blank, but the scenes of a story so far are glued and end with a newline.
    """
    if "<ImageHere>" in backbone.image_token and message.role != "system":
        pieces = [mark if isinstance(part, Image) else _plain(backbone, part.text) for part in message.content]
        asked = next((i for i, part in enumerate(message.content) if getattr(part, "words", None) is not None), 0)
        return "".join(pieces[:asked]) + "\n" * (asked > 0) + "".join(f" {piece}" for piece in pieces[asked:] if piece)
    glued = ""
    for part in message.content:
        if isinstance(part, Image):
            glued += mark
        elif text := _plain(backbone, part.text):
            glued += text if not glued or glued.endswith(("\n", " ")) else f" {text}"
    return glued


def _plain(backbone: PromptBackbone, text: str) -> str:
    """Set the spellings of special tokens in a text apart by a blank: what a user types is plain text."""
    pattern = _special(backbone.tokenizer)
    while (apart := pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)) != text:
        text = apart
    return text


def _special(tokenizer: Any) -> re.Pattern[str]:
    """Return what matches the special tokens of a tokenizer. To list thousands of them takes longer than to encode a
    text, so the last pattern of each tokenizer is kept until it has more."""
    size, names = len(tokenizer), tuple(tokenizer.all_special_tokens)
    kept = _PATTERNS.get(tokenizer)
    if kept is None or kept[0] != (size, names):
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(token for token in added | {*names} if len(token) > 1)
        kept = _PATTERNS[tokenizer] = ((size, names), re.compile("|".join(map(re.escape, special)) or "(?!)"))
    return kept[1]


_PATTERNS: WeakKeyDictionary[Any, tuple[tuple[int, tuple[str, ...]], re.Pattern[str]]] = WeakKeyDictionary()
