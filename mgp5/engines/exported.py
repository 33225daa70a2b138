"""Exported files in the places of a model's parts: by ONNX Runtime or TensorRT, whole or without constant work.

Letters: n steps, B images, R rows of the guidance batch (2B), N vokens, C, h and w of the latents, L and D of the
condition, S columns of a step's row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import Mgp5Error
from . import DENOISERS, Engine, operations
from .precomputed import PrecomputedDenoiser, precompute

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion
    from ..heads.minigpt5 import FeatureMapper, MiniGPT5Head

GROUP_NORM = 21  # the first opset with a GroupNorm that has a type for its statistics


class Run(Protocol):
    """An exported component: tensors by the names of its inputs to tensors by the names of its outputs."""

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]: ...


class Exported:
    """See `PrecomputedDenoiser`.

    Args:
        run: the file.
        parts: what the file `denoiser` was exported from, whose constants it takes; None for a whole `unet` or
            `transformer`, which then has a timestep as row and the condition as context.
    """

    layout = torch.contiguous_format
    deep = 0

    def __init__(self, run: Run, denoiser: ModelMixin, parts: PrecomputedDenoiser | None) -> None:
        self.run, self.parts, self.model, self.dtype = run, parts, denoiser, denoiser.dtype

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the table (n, R, S) and the context; S is 1 for a whole denoiser."""
        table, context = timesteps[:, None, None], [condition]
        if self.parts is not None:
            table, context = self.parts.constants(timesteps, condition)
        return table.expand(-1, len(condition), -1), [part.contiguous() for part in context]

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:  # (R, C, h, w)
        """See `PrecomputedDenoiser`."""
        if self.parts is not None:
            named = {f"context_{i}": part for i, part in enumerate(context)}
            return self.run(sample=latents, row=row, **named)["out_sample"], None
        (condition,), times = context, row[:, 0]
        if pooled := self.model.config.get("pooled_projection_dim"):
            rows = {"encoder_hidden_states": condition[:, :-1], "pooled_projections": condition[:, -1, :pooled]}
            return self.run(hidden_states=latents, timestep=times, **rows)["out_hidden_states"], None
        return self.run(sample=latents, timestep=times, encoder_hidden_states=condition)["out_sample"], None

    def restore(self) -> None:
        """See `PrecomputedDenoiser`."""
        if self.parts is not None:
            self.parts.restore()


class ExportedEngine(Engine):
    """An engine of exported files.

    Args:
        decode: the VAE's decoder; None leaves it to PyTorch.
    """

    other: Engine | None = None

    def __init__(self, model: Exported, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.decode, self.graphed = model, decode, False

    def stand_in(self, make: Callable[[], Engine]) -> None:
        """Let another engine do what files cannot: leave layers out of a step (`reuse`)."""
        self.make, self.model.deep = make, self.model.parts.deep if self.model.parts else 0

    def model_for(self, reuse: int) -> Exported | PrecomputedDenoiser:
        """See `Engine`."""
        if reuse == 1:
            return self.model
        self.other = self.other or self.make()
        return self.other.model


class ExportedMapper(nn.Module):
    """A mapper's file in its place: states (B, N, D) -> condition (B, L, C), pooled vector and all."""

    def __init__(self, run: Run, mapper: FeatureMapper) -> None:
        super().__init__()
        self.run, self.config, self.like = run, mapper.config, mapper.mlp[0].weight

    def forward(self, states: Tensor) -> Tensor:  # (B, L, C)
        """See `FeatureMapper`."""
        made = self.run(states=states)
        return self._packed(made["condition"], made.get("pooled"))

    def unconditional(self, num_vokens: int) -> Tensor:  # (1, L, C)
        """See `FeatureMapper`; a constant of the file."""
        made = self.run(states=self.like.new_zeros(1, num_vokens, self.config.llm_width))
        return self._packed(made["unconditional"], made.get("unconditional_pooled"))

    def _packed(self, rows: Tensor, pooled: Tensor | None) -> Tensor:
        if pooled is not None:
            rows = torch.cat([rows, pad(pooled, (0, self.config.width - self.config.pooled))[:, None]], dim=1)
        return rows.to(self.like)


def precomputed(diffusion: LatentDiffusion, opset: int = 23) -> PrecomputedDenoiser:
    """The denoiser in two parts, by operations that every ONNX runtime knows.

    In half precision GroupNorm stays whole where the opset has one: it is for GPUs, where fused kernels do it.
    """
    model = diffusion.denoiser
    ops = operations("eager", model.device, model.dtype)
    if model.dtype == torch.float32 or opset < GROUP_NORM:
        ops = dataclasses.replace(ops, group_norm=plain_group_norm)
    return precompute(model, ops, packed=False, layout=torch.contiguous_format)


def plain_group_norm(
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:  # (B, C, *)
    """GroupNorm with statistics in float32 at any precision; as this, ONNX Runtime does it faster than its own."""
    flat = x.float().flatten(2).reshape(len(x), groups, -1)
    normed = nn.functional.instance_norm(flat, eps=eps).reshape(x.shape)
    over = (-1, *[1] * (x.ndim - 2))
    normed = normed * weight.float().view(over) + bias.float().view(over)
    return (normed * torch.sigmoid(normed) if silu else normed).to(x.dtype)


def engine_of(
    diffusion: LatentDiffusion, folder: Path, names: Collection[str], load: Callable[[Path], Run]
) -> ExportedEngine:
    """An engine of the files in a folder; a decoder that is not among `names` stays in PyTorch.

    Args:
        load: a file to what runs it.

    Raises:
        Mgp5Error: no denoiser is among them.
    """
    name = next((name for name in DENOISERS if name in names), None)
    if name is None:
        hint = "export it again with --component unet, or transformer for Stable Diffusion 3"
        raise Mgp5Error(f"{folder} has {', '.join(names)}, expected a denoiser", hint)
    parts = precomputed(diffusion) if name == "denoiser" else None
    model = Exported(load(folder / name / "model.onnx"), diffusion.denoiser, parts)
    if "vae_decoder" not in names:
        return ExportedEngine(model)
    decoder = load(folder / "vae_decoder" / "model.onnx")
    return ExportedEngine(model, lambda latents: decoder(latent_sample=latents)["sample"])


def put_on(diffusion: LatentDiffusion, folder: Path | None) -> ExportedEngine:
    """The engine of an exported folder, run by ONNX Runtime; None takes the one in the user's own store.

    Raises:
        Mgp5Error: another model's export, or a file is missing or damaged, or it cannot be exported here.
    """
    from .onnx import Session

    device, parts = diffusion.denoiser.device, {"denoiser": diffusion.denoiser, "vae": diffusion.vae}
    if folder is None:
        from ..export.job import missing
        from ..export.store import stored

        if device.type != "cpu" or diffusion.denoiser.dtype != torch.float32:
            hint = "export it: mgp5 export --onnx --split --precision fp16, and give --exported DIR"
            raise Mgp5Error(f"nothing is exported for {device.type} by itself", hint, usage=True)
        if reason := missing():
            raise Mgp5Error("the denoiser cannot be exported", reason)
        folder, parts = stored(diffusion), {}  # it was found by a hash of them
    manifest = open_folder(folder, parts)
    return engine_of(diffusion, folder, manifest["components"], lambda path: Session(path, device))


def open_folder(folder: Path, parts: dict[str, nn.Module]) -> dict[str, Any]:
    """The manifest of an exported folder, when its files are whole and it was made of these parts.

    Args:
        parts: "denoiser", "vae" or "mapper" to the loaded module.

    Raises:
        Mgp5Error: another model's export, or a file is missing or damaged.
    """
    from ..export.manifest import check, read_manifest, weights_hash

    manifest = read_manifest(folder)
    if wrong := [
        name for name, part in parts.items() if manifest.get("weights", {}).get(name) not in (None, weights_hash(part))
    ]:
        hint = "take that model, or export this one"
        raise Mgp5Error(f"{folder} is an export of {manifest['model']}, with another {', '.join(wrong)}", hint)
    check(folder, manifest)
    return manifest


def put_mapper_on(head: MiniGPT5Head, folder: Path, device: torch.device, backend: str) -> None:
    """Let the mapper of an exported folder do the work of a model's own, where there is one. Raises as `put_on`."""
    manifest = open_folder(folder, {"mapper": head.mapper})
    if "mapper" in manifest["components"]:
        if backend == "trt":
            from .tensorrt import sessions

            run = sessions(folder, manifest, device)(folder / "mapper" / "model.onnx")
        else:
            from .onnx import Session

            run = Session(folder / "mapper" / "model.onnx", device)
        head.mapper = ExportedMapper(run, head.mapper)
        head.train(head.training)  # forget what was computed by the old one
