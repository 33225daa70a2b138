"""The networks behind metrics, from local files: pictures and texts -> vectors on the CPU (B items, E embedding)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

BATCH = 32


def _unreadable(path: Path, expected: str, error: Exception) -> Mgp5Error:
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, UnpicklingError):  # torch's text advises to read it all the same
        reason = "it holds more than tensors"
    return Mgp5Error(f"cannot load {path} ({reason})", f"expected {expected}")


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, kind.__name__, error) from error


@torch.inference_mode()
def _batches(items: Sequence[Any], width: int, encode: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Unit vectors (B, E) of items, some at a time."""
    parts = [encode(items[start : start + BATCH]).float().cpu() for start in range(0, len(items), BATCH)]
    return normalize(torch.cat([torch.zeros(0, width), *parts]), dim=-1)


class Clip:
    """CLIP in float32: unit vectors of pictures and of texts, which are cut at its 77 tokens.

    Args:
        folder: a CLIPModel, with tokenizer and image processor.
        processors: folder of the last two where `folder` has none, as HPS v2: all OpenAI CLIPs share them.
        pad: make pictures square by black bars, as HPS v2 does, instead of cutting the middle out.
        device: where it runs.
    """

    def __init__(
        self, folder: Path, *, processors: Path | None = None, pad: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.model = _load(CLIPModel, folder).to(device, torch.float32).eval()
        self.tokenizer = _load(AutoTokenizer, processors or folder)
        self.processor = _load(CLIPImageProcessorPil, processors or folder)
        self.width = self.model.config.projection_dim
        self._device = device
        self._pad = pad

    def images(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        """RGB pictures of any size -> (B, E)."""

        def encode(some: Sequence[PIL.Image.Image]) -> Tensor:
            side = self.model.config.vision_config.image_size
            square = [ImageOps.pad(p, (side, side), PIL.Image.Resampling.BICUBIC) if self._pad else p for p in some]
            pixels = self.processor(images=square, return_tensors="pt")["pixel_values"].to(self._device)
            return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

        return _batches(pictures, self.width, encode)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, E)."""
        length = self.model.config.text_config.max_position_embeddings

        def encode(some: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(list(some), padding=True, truncation=True, max_length=length, return_tensors="pt")
            ids, mask = tokens["input_ids"].to(self._device), tokens["attention_mask"].to(self._device)
            return self.model.text_projection(self.model.text_model(ids, attention_mask=mask).pooler_output)

        return _batches(texts, self.width, encode)


class SentenceEncoder:
    """all-MiniLM-L6-v2 in float32: the mean over a text's tokens, at most 256, as a unit vector.

    Args:
        folder: a BertModel with its tokenizer.
        device: where it runs.
    """

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu") -> None:
        self.model = _load(AutoModel, folder).to(device, torch.float32).eval()
        self.tokenizer = _load(AutoTokenizer, folder)
        self._device = device

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, E)."""

        def encode(some: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(list(some), padding=True, truncation=True, max_length=256, return_tensors="pt")
            tokens = tokens.to(self._device)
            weights = tokens["attention_mask"][..., None].float()  # (B, tokens, 1)
            return (self.model(**tokens).last_hidden_state * weights).sum(1) / weights.sum(1)

        return _batches(texts, self.model.config.hidden_size, encode)


class Inception:
    """The Inception v3 of FID and IS, weights converted from the TensorFlow original (torch-fidelity).

    Args:
        weights: the file that torch-fidelity publishes.
        antialias: how pictures are brought to 299 x 299. False is the bilinear step of the original network, True what
            torchmetrics does unless told otherwise; numbers of one kind must not be compared with the other's.
        device: where it runs.

    Raises:
        Mgp5Error: torch-fidelity cannot be imported, or the file holds something else.
    """

    def __init__(self, weights: Path, *, antialias: bool = False, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            hint = "pip install 'mgp5[eval,fid]', torchvision from where torch came from"
            raise Mgp5Error(f"torch-fidelity cannot be imported ({error})", hint) from error
        try:
            torch.load(weights, weights_only=True)  # the library would read any pickle: let nothing but tensors pass
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=antialias)
        except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
            raise _unreadable(weights, "the Inception v3 of torch-fidelity", error) from error
        self.model = model.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor]:
        """RGB pictures of any size -> features (B, 2048) for FID, logits (B, 1008) without bias for IS."""
        parts = []
        for _, run in groupby(pictures, key=lambda picture: picture.size):
            same = list(run)
            for start in range(0, len(same), BATCH):
                pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in same[start : start + BATCH]]))
                parts.append(self.model(pixels.permute(0, 3, 1, 2).to(self._device)))
        features = torch.cat(parts)
        return features.cpu(), (features @ self.model.fc.weight.T).cpu()
