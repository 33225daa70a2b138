"""The loop of a batch: replies are scripts that ask for tokens, forwards and pictures, and are served together.

r rows read together, k tokens of a row, n of a piece, P pictures drawn together, D width of the LLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..events import Event, ImageStep
from ..heads import Embeds, Forced

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from ..options import Options
    from .session import Session


@dataclass(frozen=True)
class Speak:
    """Read a text token (None: all are read) and choose the next."""

    token: int | None


@dataclass(frozen=True)
class Paint:
    """Draw a picture; the answer is its pixels (3, H, W)."""

    condition: Any
    options: Options
    index: int  # in its reply
    seed: int


Need = Speak | Forced | Embeds | Paint
Script = Generator[Event | Need, Any, None]


@torch.inference_mode()
def serve(
    model: InterleavedModel, scripts: Sequence[Script], sessions: Sequence[Session], images_at_once: int
) -> Iterator[tuple[int, Event]]:
    """Run scripts until all have ended: (index of the script, event). Their sessions are on rows of one decoder."""
    turns = [Turn(script, session) for script, session in zip(scripts, sessions, strict=True)]
    while any(turn.running for turn in turns):
        for index, turn in enumerate(turns):
            for event in turn.run():
                yield index, event
        for turn, event in _serve(model, [turn for turn in turns if turn.running], images_at_once):
            yield turns.index(turn), event


@dataclass(eq=False)
class Turn:
    """A script, what it waits for, and tokens that were chosen ahead of it."""

    script: Script
    session: Session
    need: Need | None = None
    running: bool = True
    ahead: deque[tuple[Tensor, int]] = field(default_factory=deque)  # state (D,) that predicts a token, the token
    _answer: Any = None
    _ready: bool = True

    def run(self) -> Iterator[Event]:
        """Go on until something is needed that was not prepared; yields events."""
        while self._ready and self.running:
            try:
                said = self.script.send(self._answer)
            except StopIteration:
                self.running, said = False, None
            self._answer = None
            if isinstance(said, Event):
                yield said
                continue
            self.need, self._ready = said, False
            if isinstance(said, Speak) and self.ahead:
                self._next()
            elif self.ahead:  # the piece went on beyond the end of the text
                self.ahead.clear()
                self.session.decoder.cut(self.session.row, self.session.length)

    def answer(self, answer: Any) -> None:
        """Give what was needed."""
        self._answer, self._ready = answer, True

    def speak(self, tokens: list[int], states: Tensor) -> None:
        """Give tokens (n) that were chosen one after another, and the states (n, D) that predict them."""
        self.ahead.extend(zip(states, tokens, strict=True))
        self._next()

    def choose(self, token: int) -> None:
        """Give a token."""
        self.session.decoder.rows[self.session.row].voice.used()
        self.answer(token)

    def _next(self) -> None:
        state, token = self.ahead.popleft()
        self.session.took(state[None, None], [(self.need.token, "")])
        self.choose(token)


def _serve(model: InterleavedModel, turns: list[Turn], images_at_once: int) -> Iterator[tuple[Turn, ImageStep]]:
    """Do one thing of what turns wait for, for as many as wait for it: text comes first, pictures last."""
    if read_on(model, turns):
        return
    alike: dict[str, list[Turn]] = {}
    for turn in turns:
        alike.setdefault(_drawing(turn.need.options), []).append(turn)
    for group in alike.values():
        for start in range(0, len(group), images_at_once):
            yield from _paint(model, group[start : start + images_at_once])


def read_on(model: InterleavedModel, turns: Sequence[Turn]) -> bool:
    """Let the LLM do one thing of what turns wait for, for as many as wait for it; False: none waits for the LLM."""
    by_row = {turn.session.row: turn for turn in turns}
    waiting = {row: turn.need for row, turn in by_row.items()}
    first = {row for row, need in waiting.items() if isinstance(need, Speak) and need.token is None}
    runs = {row: need for row, need in waiting.items() if isinstance(need, Forced | Embeds)}
    spoken = {row: need.token for row, need in waiting.items() if isinstance(need, Speak)}
    decoder = turns[0].session.decoder if turns else None
    if first:
        for row, token in decoder.pick({row: by_row[row].session.state[0, 0] for row in first}).items():
            by_row[row].choose(token)
    elif runs:
        _read_runs(by_row, runs)
    elif spoken:
        room = model.backbone.context_length - max(by_row[row].session.length for row in spoken)
        for row, piece in decoder.steps(spoken, max(1, min(decoder.piece, room))).items():
            by_row[row].speak(*piece)
    return bool(first or runs or spoken)


def _read_runs(by_row: dict[int, Turn], runs: dict[int, Forced | Embeds]) -> None:
    """Read tokens or embeddings in one forward, of all rows that read as many as the first."""
    parts = {}
    for row, need in sorted(runs.items()):
        if isinstance(need, Forced):
            parts[row] = by_row[row].session.embed(need.ids)
        else:
            parts[row] = need.embeds, [(-1, "embeds")] * need.embeds.shape[1]
    length = len(next(iter(parts.values()))[1])
    rows = [row for row, (_, keys) in parts.items() if len(keys) == length]
    decoder = by_row[rows[0]].session.decoder
    hidden = decoder.feed(rows, torch.cat([parts[row][0] for row in rows]))  # (r, k, D)
    for row, states in zip(rows, hidden.split(1), strict=True):
        by_row[row].answer(by_row[row].session.took(states, parts[row][1]))


def _paint(model: InterleavedModel, turns: list[Turn]) -> Iterator[tuple[Turn, ImageStep]]:
    """Denoise the pictures of turns together."""
    paints = [turn.need for turn in turns]
    options, head = paints[0].options, model.head
    condition = torch.cat([paint.condition for paint in paints])
    generators = [torch.Generator().manual_seed(paint.seed) for paint in paints]
    total, canvas = head.num_steps(options), None
    for step, canvas in enumerate(head.draw(condition, options, generators), start=1):
        for i, (turn, paint) in enumerate(zip(turns, paints, strict=True)):
            yield turn, ImageStep(paint.index, step, total, canvas[i : i + 1])
    for turn, pixels in zip(turns, head.finish(canvas), strict=True):
        turn.answer(pixels)


def _drawing(options: Options) -> str:
    """What pictures that are drawn together agree in."""
    return repr(options.image)
