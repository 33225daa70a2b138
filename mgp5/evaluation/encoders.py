"""The networks behind metrics, from local files: images and texts -> vectors on the CPU (B items, E embedding)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ..errors import Mgp5Error
from ..heads.minigpt5 import to_pixels
from ..messages import Image
from ..storyland.judge import load_judge, look
from ..storyland.world import ATTRIBUTES, Scene
from .weights import locate

BATCH = 32
ANTIALIAS = False  # how images are resized for Inception: the original's bilinear step; torchmetrics' default is True


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, kind.__name__, error) from error


def _unreadable(path: Path, expected: str, error: Exception) -> Mgp5Error:
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, UnpicklingError):  # torch's text advises to read it all the same
        reason = "it holds more than tensors"
    return Mgp5Error(f"cannot load {path} ({reason})", f"expected {expected}")


class Clip:
    """Encode images and texts by CLIP in float32; texts are cut at its 77 tokens.

    `processors` is the folder of tokenizer and image processor where `folder` has none, as HPS v2. With `pad` images
    become square by black bars, as HPS v2 does, instead of cutting the middle out.
    """

    def __init__(
        self, folder: Path, *, processors: Path | None = None, pad: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.model = _load(CLIPModel, folder).to(device, torch.float32).eval()
        self.tokenizer = _load(AutoTokenizer, processors or folder)
        self.processor = _load(CLIPImageProcessorPil, processors or folder)
        self.pad = pad

    @torch.inference_mode()
    def images(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        """Return unit vectors (B, E) of RGB images of any size."""
        side = self.model.config.vision_config.image_size
        if self.pad:
            pictures = [ImageOps.pad(p, (side, side), PIL.Image.Resampling.BICUBIC) for p in pictures]
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        return normalize(self.model.visual_projection(self.model.vision_model(**inputs).pooler_output), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, E) of texts."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.model.text_model(**inputs.to(self.model.device)).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1).cpu()


class SentenceEncoder:
    """Encode texts by all-MiniLM-L6-v2 in float32: the mean over a text's tokens, at most 256."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu") -> None:
        self.model = _load(AutoModel, folder).to(device, torch.float32).eval()
        self.tokenizer = _load(AutoTokenizer, folder)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, E) of texts."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        weights = inputs["attention_mask"][..., None].float()  # (B, tokens, 1)
        return normalize((self.model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1).cpu()


class Inception:
    """Encode images by torchmetrics' Inception v3 of FID and IS; torch-fidelity publishes its weights."""

    def __init__(self, weights: Path, *, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            hint = "pip install 'mgp5[eval,fid]', torchvision from where torch came from"
            raise Mgp5Error(f"torch-fidelity cannot be imported ({error})", hint) from error
        try:
            torch.load(weights, weights_only=True)  # the library would read any pickle: let nothing but tensors pass
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=ANTIALIAS)
        except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
            raise _unreadable(weights, "the Inception v3 of torch-fidelity", error) from error
        self.model, self.device = model.to(device), device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor]:
        """Return features (B, 2048) for FID and logits (B, 1008) without bias for IS of RGB images of any size."""
        parts = []
        for _, same in groupby(pictures, key=lambda picture: picture.size):
            pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in same]))
            parts.append(self.model(pixels.permute(0, 3, 1, 2).to(self.device)))
        features = torch.cat(parts)
        return features.cpu(), (features @ self.model.fc.weight.T).cpu()


class Lpips:
    """Measure LPIPS by SqueezeNet (Zhang et al., 2018): torchmetrics' layers over torchvision's network."""

    def __init__(self, weights: Path, *, device: torch.device | str = "cpu") -> None:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        self.model, self.device = _NoTrainLpips(net="squeeze", pnet_rand=True), device  # its trunk is read below
        try:
            state, trunk = torch.load(weights, weights_only=True), self.model.net
            trunk.load_state_dict({name: state[f"features.{name.split('.', 2)[2]}"] for name in trunk.state_dict()})
        except (OSError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
            raise _unreadable(weights, "the SqueezeNet 1.1 of torchvision", error) from error
        self.model.to(device)

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:  # (N, 3, H, W), (N, 3, H, W) in [0, 255] -> (N,)
        """Return the distances of pairs, one by one, on pixels in [-1, 1]; CoMM's code divides by 255 twice, so that it
        compares images that are all but black."""
        sides = (side.float().to(self.device) / 127.5 - 1 for side in (a, b))
        pairs = zip(*sides, strict=True)
        return torch.stack([self.model(x[None], y[None]).double().cpu().reshape(()) for x, y in pairs])


class Encoders:
    """All encoders of an evaluation: a network is loaded when it is first needed, an item is encoded once.
    `paths` are of weights, by the names of `weights.WEIGHTS`; `scenes` are what the true images of Storyland show."""

    def __init__(self, paths: Mapping[str, Path], device: torch.device, scenes: Mapping[Path, Scene]) -> None:
        self.paths, self._device, self._scenes = paths, device, scenes
        self._network = cache(self._load)
        self._encoded: dict[tuple[str, str], Any] = {}

    def clip_images(self, name: str, images: Sequence[Image]) -> Tensor:
        """Return unit vectors (B, E) by one of "clip-l", "clip-b" and "hps"."""
        return torch.stack(self._images(name, images, lambda batch: self._network(name).images(batch)))

    def clip_texts(self, name: str, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, E), see `clip_images`."""
        return torch.stack(self._items(f"{name}, texts", texts, texts, lambda batch: self._network(name).texts(batch)))

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, E) by MiniLM."""
        return torch.stack(self._items("minilm", texts, texts, lambda batch: self._network("minilm")(batch)))

    def inception(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Return features (B, 2048) and logits (B, 1008)."""
        rows = self._images("inception", images, lambda batch: zip(*self._network("inception")(batch), strict=True))
        return tuple(map(torch.stack, zip(*rows, strict=True)))

    def lpips(self, a: Tensor, b: Tensor) -> Tensor:
        """Return LPIPS (N,) of pairs of images, see `Lpips`."""
        return self._network("squeezenet")(a, b)

    def judge(self, images: Sequence[Image | None]) -> tuple[Tensor, Tensor]:
        """Return the attributes that Storyland's judge reads (B, 7), -1 for no image, and features of the images."""

        def encode(batch: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
            pixels = torch.stack([to_pixels(picture, (128, 128)) for picture in batch])
            return zip(*look(self._network("judge"), pixels), strict=True)

        rows = self._images("judge", [image for image in images if image], encode)
        each = iter(rows)
        read = [next(each)[0] if image else torch.full((len(ATTRIBUTES),), -1) for image in images]
        return torch.stack(read), torch.stack([features for _, features in rows]) if rows else torch.zeros(0, 1)

    def scene(self, image: Image) -> Scene:
        """Return what a true image of Storyland shows."""
        return self._scenes[image.path.resolve()]

    def _load(self, name: str) -> Any:
        if name == "judge":
            return load_judge().to(self._device)
        path = locate(name, self.paths)
        if name == "hps":
            return Clip(path, processors=locate("clip-b", self.paths), pad=True, device=self._device)
        kind = {"inception": Inception, "minilm": SentenceEncoder, "squeezenet": Lpips}.get(name, Clip)
        return kind(path, device=self._device)

    def _images(self, name: str, images: Sequence[Image], encode: Callable[[list[Any]], Iterable[Any]]) -> list[Any]:
        keys = [str(image.path) for image in images]
        return self._items(name, keys, images, lambda batch: encode([image.load() for image in batch]))

    def _items(
        self, name: str, keys: Sequence[str], items: Sequence[Any], encode: Callable[[list[Any]], Iterable[Any]]
    ) -> list[Any]:
        items_of = dict(zip(keys, items, strict=True))
        new = [key for key in items_of if (name, key) not in self._encoded]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            rows = encode([items_of[key] for key in batch])
            self._encoded |= {(name, key): row for key, row in zip(batch, rows, strict=True)}
        return [self._encoded[name, key] for key in keys]
