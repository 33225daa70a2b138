"""What networks make of pictures and texts, each of which is encoded once (B items, E embedding, F features)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..heads.minigpt5 import to_pixels
from ..messages import Image
from ..storyland.judge import load_judge, look
from ..storyland.world import ATTRIBUTES, Scene
from .encoders import Clip, Inception, SentenceEncoder
from .weights import locate

Encode = Callable[[list[Any]], Iterable[Any]]
AT_ONCE = 64  # pictures in memory
ANTIALIAS = False  # of Inception's pictures


class Encoded:
    """What networks make of pictures and texts: each is loaded when needed, each item encoded once.

    Args:
        given: paths of weights by their names.
        device: where networks run.
        scenes: of Storyland, what pictures show.
    """

    def __init__(self, given: Mapping[str, Path], device: torch.device, scenes: Mapping[Path, Scene]) -> None:
        self.given, self._device, self._scenes = given, device, scenes
        self._networks: dict[str, Any] = {}
        self._kept: dict[tuple[str, str], Any] = {}

    def clip_images(self, name: str, pictures: Sequence[Image]) -> Tensor:  # (B, E)
        return torch.stack(self._of_pictures(name, pictures, lambda some: self._network(name).images(some)))

    def clip_texts(self, name: str, words: Sequence[str]) -> Tensor:  # (B, E)
        return torch.stack(self._of(f"{name}, texts", words, words, lambda some: self._network(name).texts(some)))

    def sentences(self, words: Sequence[str]) -> Tensor:  # (B, E)
        return torch.stack(self._of("minilm", words, words, lambda some: self._network("minilm")(some)))

    def inception(self, pictures: Sequence[Image]) -> tuple[Tensor, Tensor]:  # (B, 2048), (B, 1008)
        rows = self._of_pictures(
            "inception", pictures, lambda some: zip(*self._network("inception")(some), strict=True)
        )
        return tuple(map(torch.stack, zip(*rows, strict=True)))

    def judged(self, pictures: Sequence[Image | None]) -> tuple[Tensor, Tensor]:  # (B, 7), (B, F)
        """Attributes that the judge reads, -1 where there is no picture, and features of those there are."""

        def encode(some: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
            pixels = torch.stack([to_pixels(picture, (128, 128)) for picture in some])
            return zip(*look(self._network("judge"), pixels), strict=True)

        rows = self._of_pictures("judge", [picture for picture in pictures if picture], encode)
        found = iter(rows)
        read = [next(found)[0] if picture else torch.full((len(ATTRIBUTES),), -1) for picture in pictures]
        return torch.stack(read), torch.stack([features for _, features in rows]) if rows else torch.zeros(0, 1)

    def scene(self, picture: Image) -> Scene:
        """What a true picture of Storyland shows."""
        return self._scenes[picture.path.resolve()]

    def _network(self, name: str) -> Any:
        if name not in self._networks:
            self._networks[name] = self._load(name)
        return self._networks[name]

    def _load(self, name: str) -> Any:
        if name == "judge":
            return load_judge().to(self._device)
        path = locate(name, self.given)
        if name == "hps":
            return Clip(path, processors=locate("clip-b", self.given), pad=True, device=self._device)
        if name == "inception":
            return Inception(path, antialias=ANTIALIAS, device=self._device)
        return (SentenceEncoder if name == "minilm" else Clip)(path, device=self._device)

    def _of_pictures(self, name: str, pictures: Sequence[Image], encode: Encode) -> list[Any]:
        keys = [str(picture.path) for picture in pictures]
        return self._of(name, keys, pictures, lambda some: encode([picture.load() for picture in some]))

    def _of(self, name: str, keys: Sequence[str], items: Sequence[Any], encode: Encode) -> list[Any]:
        new = {key: item for key, item in zip(keys, items, strict=True) if (name, key) not in self._kept}
        names, values = list(new), list(new.values())
        for start in range(0, len(names), AT_ONCE):
            found = encode(values[start : start + AT_ONCE])
            self._kept |= {(name, key): row for key, row in zip(names[start : start + AT_ONCE], found, strict=True)}
        return [self._kept[name, key] for key in keys]
