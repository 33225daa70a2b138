"""Renders of random Storyland scenes, drawn once with all cores and kept as one array on disk."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgp5.storyland.draw import draw
from mgp5.storyland.judge import Judge, look
from mgp5.storyland.world import ATTRIBUTES, Scene, random_scene, rng


def _one(args: tuple[str, int]) -> tuple[np.ndarray, tuple[int, ...]]:
    split, index = args
    scene = random_scene(rng(split, 1, index), split)
    return np.asarray(draw(scene, _picture_seed(split, index))), scene.indices()


def _picture_seed(split: str, index: int) -> int:
    return rng(split, 2, index).getrandbits(31)


def renders(work: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, 128, 128, 3) uint8, memory-mapped, and their attribute indices (count, 7)."""
    pixels, attributes = work / f"{split}-{count}.npy", work / f"{split}-{count}-attributes.npy"
    if not attributes.exists():
        work.mkdir(parents=True, exist_ok=True)
        out = np.lib.format.open_memmap(pixels, "w+", np.uint8, (count, 128, 128, 3))
        rows = np.zeros((count, 7), np.int64)
        with ProcessPoolExecutor() as pool:
            jobs = ((split, index) for index in range(count))
            for index, (picture, indices) in enumerate(pool.map(_one, jobs, chunksize=64)):
                out[index], rows[index] = picture, indices
        out.flush()
        np.save(attributes, rows)
    return np.load(pixels, mmap_mode="r"), np.load(attributes)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 pictures (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scenes(rows: np.ndarray) -> list[Scene]:
    """Attribute indices (B, 7) -> scenes."""
    return [Scene.from_indices(row.tolist()) for row in rows]


def right(judge: Judge, pixels: Tensor, rows: np.ndarray | Tensor) -> Tensor:  # -> (B, 7) bool
    """Which attributes of pictures (B, 3, 128, 128) are read as the true ones, indices (B, 7)."""
    return look(judge, pixels)[0] == torch.as_tensor(rows)


def scores(hits: Tensor) -> dict[str, float]:  # (B, 7) bool
    """Share of pictures with each attribute right, their mean, and the share with all of them right."""
    shares = dict(zip(ATTRIBUTES, hits.float().mean(0).tolist(), strict=True))
    return shares | {"mean": hits.float().mean().item(), "all": hits.all(1).float().mean().item()}
