"""Conversation -> token ids and labels by the backbone's chat template; the only place that counts image slots.

T tokens, S slots of one picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import VokenLabels
from .errors import Mgp5Error
from .messages import Conversation, Image, Message, Text

if TYPE_CHECKING:
    from .backbones import Backbone

IGNORE = -100  # label of tokens without a loss


@dataclass(frozen=True)
class Prompt:
    """A conversation as the LLM reads it. One image token stands for each picture until `expand`."""

    ids: list[int]
    images: tuple[Image, ...]  # pictures to be seen, in reading order

    def expand(self, image_token_id: int, slots: Sequence[int]) -> list[int]:
        """Ids with each picture's token repeated once per slot. Raises ValueError when the counts disagree."""
        return _expand(self.ids, image_token_id, slots)


@dataclass(frozen=True)
class Example:
    """A training sample: context, target, and the image the target draws."""

    ids: list[int]  # (T,) one token per picture
    labels: list[int]  # (T,) IGNORE in the context and on forced vokens
    images: tuple[Image, ...]  # pictures to be seen
    targets: tuple[Image, ...]  # pictures to be drawn, one per run of vokens


def prompt(backbone: Backbone, conversation: Conversation) -> Prompt:
    """The conversation up to where the assistant's reply begins."""
    ids = _encode(backbone, _render(backbone, conversation.messages, reply=True))
    return Prompt(ids, conversation.images)


def example(
    backbone: Backbone, conversation: Conversation, vokens: Sequence[str], voken_labels: VokenLabels = "all"
) -> Example:
    """The last message of the conversation as the target of all messages before it.

    Pictures of the target are written as their vokens. The paper's text loss is over all tokens (eq. 1), vokens too;
    since all but the first are forced at inference, "first" leaves the others without a label, and "ends" all but the
    first and the last, as the release does.
    """
    *context, target = conversation.messages
    if target.role != "assistant":
        raise Mgp5Error(f"the last message of a sample is of role {target.role!r}", "end it with the assistant's reply")
    run = Text("".join(vokens))
    body = Message("assistant", tuple(run if isinstance(part, Image) else part for part in target.content))
    head = _render(backbone, context, reply=True)
    whole = _render(backbone, [*context, body], reply=False, vokens=vokens)
    tail = whole[len(head) :] if whole.startswith(head) else _content(backbone, body, vokens)
    if tail.lstrip().startswith(vokens[0]):
        tail = tail.lstrip()  # a picture follows the prompt at once: no blank may come between
    end = backbone.tokenizer.eos_token
    tail = tail.rstrip() if tail.rstrip().endswith(end) else tail.rstrip() + end
    before, after = _encode(backbone, head), backbone.tokenizer.encode(tail, add_special_tokens=False)
    silent = {"all": (), "first": vokens[1:], "ends": vokens[1:-1]}[voken_labels]
    forced = set(backbone.tokenizer.convert_tokens_to_ids(list(silent)))
    labels = [IGNORE] * len(before) + [IGNORE if i in forced else i for i in after]
    seen = tuple(image for message in context for image in message.images)
    return Example(before + after, labels, seen, target.images)


def shorter(conversation: Conversation) -> list[Conversation]:
    """The sample with ever more of its history cut from the left, the least first; empty when nothing can be cut.

    First whole turns go, such that a user's turn comes first; then, of the last user's turn, its leading scenes, each a
    text and the pictures behind it. Kept are the system message, the last text of that turn and all that follows.
    """
    messages = conversation.messages
    head = messages[:1] if messages[0].role == "system" else ()
    users = [i for i, message in enumerate(messages[:-1]) if message.role == "user"]
    cuts = [messages[i:] for i in users if i > len(head)]
    if users:
        last, *rest = messages[users[-1] :]
        texts = [i for i, part in enumerate(last.content) if isinstance(part, Text)]
        cuts += [(Message("user", last.content[i:]), *rest) for i in texts[1:]]
    return [Conversation((*head, *cut)) for cut in cuts]


def expand_labels(example: Example, image_token_id: int, slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids and labels of an example with each picture's token repeated once per slot."""
    ids = _expand(example.ids, image_token_id, slots)
    return ids, [IGNORE] * (len(ids) - len(example.ids)) + example.labels  # pictures stand in the context only


def check_length(backbone: Backbone, length: int, reply: int = 0) -> None:
    """Raises Mgp5Error when a prompt and its reply (tokens) do not fit the backbone's context."""
    if length + reply > backbone.context_length:
        raise Mgp5Error(
            f"the prompt has {length} tokens and the reply may take {reply}, the model's context is "
            f"{backbone.context_length}",
            "shorten the text or show fewer images",
        )


def _expand(ids: Sequence[int], image_token_id: int, slots: Sequence[int]) -> list[int]:
    if (found := sum(i == image_token_id for i in ids)) != len(slots):
        raise ValueError(f"the prompt has {found} image tokens, but {len(slots)} pictures were given")
    counts = iter(slots)
    return [copy for i in ids for copy in [i] * (next(counts) if i == image_token_id else 1)]


def _encode(backbone: Backbone, text: str) -> list[int]:
    bos = backbone.tokenizer.bos_token
    return backbone.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def _render(backbone: Backbone, messages: Sequence[Message], *, reply: bool, vokens: Sequence[str] = ()) -> str:
    # Some templates (LLaVA-1.5) move all pictures in front of all text; written into the text they keep their place.
    chat = [{"role": m.role, "content": [{"type": "text", "text": _content(backbone, m, vokens)}]} for m in messages]
    return backbone.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=reply)


def _content(backbone: Backbone, message: Message, vokens: Sequence[str]) -> str:
    pieces = [
        backbone.image_token if isinstance(part, Image) else _plain(backbone, part.text, vokens)
        for part in message.content
    ]
    glued = ""
    for piece in filter(None, pieces):
        special = piece == backbone.image_token or (vokens and piece.startswith(vokens[0]))
        glued += piece if special or not glued or glued.endswith(("\n", " ")) else f" {piece}"
    return glued


def _plain(backbone: Backbone, text: str, keep: Sequence[str]) -> str:
    """Text without the spellings of special tokens: a user's "<image>" or "[IMG0]" must not become one."""
    special = {*backbone.tokenizer.all_special_tokens, *backbone.tokenizer.get_added_vocab()} - set(keep)
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.sub(pattern, "", text) if pattern else text
