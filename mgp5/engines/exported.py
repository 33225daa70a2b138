"""Run exported components in place of a model's parts: read their manifest, check the files, attach them.

Letters: n steps, B images, R guidance rows (2B), K vokens, Z latent channels, h and w latents, L condition
length, C condition width, S width of a step's time embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import Mgp5Error
from ..files import read_json, sha256
from .cuda_graph import StepGraphs
from .engine import Engine, operations
from .precomputed import PrecomputedDenoiser, precompute

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion

MANIFEST = "manifest.json"
FORMAT = 2  # version of the components' inputs and outputs; 1 had one timestep for all rows
DENOISERS = ("denoiser", "unet", "transformer")  # components that denoise, the fastest first
GROUP_NORM = 21  # the first opset whose GroupNormalization has a dtype for its statistics


Session = Callable[..., dict[str, Tensor]]  # an exported component: tensors by name of an input -> those of its outputs
Load = Callable[[str], Session]  # name of a component -> what runs it


class ExportedDenoiser:
    """An exported denoiser with the interface of `PrecomputedDenoiser`: the component `denoiser`, which takes the
    constants of `parts`; or, without these, a whole `unet` or `transformer`, which takes timesteps (S = 1) and the
    condition. `model` is the module that was exported."""

    layout = torch.contiguous_format

    def __init__(self, session: Session, model: ModelMixin, parts: PrecomputedDenoiser | None) -> None:
        self.session, self.parts, self.model, self.dtype = session, parts, model, model.dtype
        self.deep = parts.deep if parts else 0  # steps that reuse features run by `ExportedEngine.fallback`
        self.per_image = parts is not None and parts.per_image

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:  # (n, R, S), (R, ...)
        embeddings, cross_attention = timesteps[:, None, None], [condition]
        if self.parts is not None:
            embeddings, cross_attention = self.parts.constants(timesteps, condition)
        return embeddings.expand(-1, len(condition), -1), [part.contiguous() for part in cross_attention]

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:  # (R, Z, h, w)
        time_embedding = time_embedding.expand(len(latents), -1)
        if self.parts is not None:
            named = {f"context_{i}": part for i, part in enumerate(cross_attention)}
            return self.session(sample=latents, row=time_embedding, **named)["out_sample"], None
        (condition,), times = cross_attention, time_embedding[:, 0]
        if pooled := self.model.config.get("pooled_projection_dim"):
            rows = {"encoder_hidden_states": condition[:, :-1], "pooled_projections": condition[:, -1, :pooled]}
            return self.session(hidden_states=latents, timestep=times, **rows)["out_hidden_states"], None
        inputs = {"sample": latents, "timestep": times}
        if width := class_width(self.model):
            inputs["class_labels"] = condition[:, -2:, : width // 2].flatten(1)
            condition = condition[:, :-2]
        return self.session(**inputs, encoder_hidden_states=condition)["out_sample"], None


class ExportedEngine(Engine):
    """An engine that runs exported files; steps that leave out layers (`reuse`) run by PyTorch."""

    def __init__(self, name: str, model: ExportedDenoiser, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        """Prepare "onnx" or "trt"; without the exported VAE decoder, PyTorch decodes."""
        self.name, self.model, self.decode, self.graphed = name, model, decode, False
        self.fallback: Engine | None = None
        if name == "trt":
            device = model.model.device
            self.graphed = device.type == "cuda"
            self.graphs = StepGraphs(model, operations("triton", device, model.dtype).guided_step)

    def model_for(self, reuse: int) -> ExportedDenoiser | PrecomputedDenoiser:
        if reuse == 1:
            return self.model
        self.fallback = self.fallback or Engine("eager", self.model.model)
        return self.fallback.model


class ExportedMapper(nn.Module):
    """An exported feature mapper with the interface of the module that was exported."""

    def __init__(self, session: Session, mapper: nn.Module) -> None:
        super().__init__()
        self.session, self.config, self.like = session, mapper.config, mapper.mlp[0].weight

    def forward(self, states: Tensor) -> Tensor:  # (B, K, D) -> (B, L, C)
        """Return the condition, for Stable Diffusion 3 with the pooled vector in its last row."""
        outputs = self.session(states=states)
        return self._packed(outputs["condition"], outputs.get("pooled"))

    def unconditional(self, num_vokens: int) -> Tensor:  # (1, L, C)
        """Return the unconditional condition of guidance, a constant of the file."""
        outputs = self.session(states=self.like.new_zeros(1, num_vokens, self.config.llm_width))
        return self._packed(outputs["unconditional"], outputs.get("unconditional_pooled"))

    def _packed(self, rows: Tensor, pooled: Tensor | None) -> Tensor:
        if pooled is not None:
            rows = torch.cat([rows, pad(pooled, (0, self.config.width - self.config.pooled))[:, None]], dim=1)
        return rows.to(self.like)


def class_width(unet: ModelMixin) -> int:
    """Return the width of what Stable unCLIP's UNet takes of an image, which two rows of its condition hold; 0 of
    others."""
    kind = unet.config.get("class_embed_type")
    return unet.config.projection_class_embeddings_input_dim if kind == "projection" else 0


def split_denoiser(generator: LatentDiffusion, opset: int = 23) -> PrecomputedDenoiser:
    """Return a denoiser in two parts, made of operations that every ONNX runtime knows; in half precision GroupNorm
    stays one operation where the opset has it: GPUs have fused kernels for it."""
    model = generator.denoiser
    ops = operations("eager", model.device, model.dtype)
    if model.dtype == torch.float32 or opset < GROUP_NORM:
        ops.group_norm = plain_group_norm
    return precompute(model, ops, packed=False, layout=torch.contiguous_format)


def plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Return the group norm of x (B, C, *) with statistics in float32 at any precision, followed by SiLU if asked for.

    Exported in this form, ONNX Runtime runs it faster on a CPU than its own GroupNormalization.
    """
    flat = x.float().flatten(2).reshape(x.shape[0], groups, -1)
    normed = nn.functional.instance_norm(flat, eps=eps).reshape(x.shape)
    over = (-1, *[1] * (x.ndim - 2))
    normed = normed * weight.float().view(over) + bias.float().view(over)
    return (normed * torch.sigmoid(normed) if silu else normed).to(x.dtype)


def load_engine(generator: LatentDiffusion, folder: Path, backend: str, same_weights: bool = False) -> ExportedEngine:
    """Return the engine of an exported folder, run by ONNX Runtime ("onnx") or TensorRT ("trt").

    With `same_weights` it is known to be of these weights. Raises Mgp5Error if it holds another model's export or no
    denoiser, a file is missing or damaged, or a TensorRT engine is missing or was built for another machine.
    """
    manifest = open_folder(folder, {} if same_weights else {"denoiser": generator.denoiser, "vae": generator.vae})
    load = sessions(folder, manifest, backend, generator.denoiser.device)
    return engine_of(generator, folder, manifest["components"], load, backend)


def engine_of(
    generator: LatentDiffusion, folder: Path, names: Collection[str], load: Load, backend: str = "onnx"
) -> ExportedEngine:
    """Return the engine of a folder's components. Raises Mgp5Error if there is no denoiser among their names."""
    name = next((name for name in DENOISERS if name in names), None)
    if name is None:
        hint = "export it again with --component unet, or transformer for Stable Diffusion 3"
        raise Mgp5Error(f"{folder} has {', '.join(names)}, expected a denoiser", hint)
    parts = split_denoiser(generator) if name == "denoiser" else None
    model = ExportedDenoiser(load(name), generator.denoiser, parts)
    if "vae_decoder" not in names:
        return ExportedEngine(backend, model)
    decoder = load("vae_decoder")
    return ExportedEngine(backend, model, lambda latents: decoder(latent_sample=latents)["sample"])


def attach_condition(head: Any, folder: Path, backend: str) -> None:
    """Run what makes conditions, a mapper or a de-tokenizer, by its exported file, where both have one. Raises as
    `load_engine` does."""
    if backend == "onnx" and (tokenizer := getattr(head, "tokenizer", None)) is not None:
        manifest = open_folder(folder, {"detokenizer": tokenizer.detokenizer})
        if "detokenizer" in manifest["components"]:
            session = sessions(folder, manifest, backend, head.device)("detokenizer")
            head.condition = lambda codes: session(codes=codes)["condition"].float()
    if (mapper := getattr(head, "mapper", None)) is None:
        return
    manifest = open_folder(folder, {"mapper": mapper})
    if "mapper" in manifest["components"]:
        load = sessions(folder, manifest, backend, next(mapper.parameters()).device)
        head.mapper = ExportedMapper(load("mapper"), mapper)
        head.train(head.training)  # drops the unconditional condition of the old mapper


def sessions(folder: Path, manifest: Mapping[str, Any], backend: str, device: torch.device) -> Load:
    """Return what loads components of an exported folder for a backend and a device."""
    if backend == "trt":
        from .tensorrt import TensorRTSession, Workspace

        workspace = Workspace(device)
        return lambda name: TensorRTSession(folder / name, manifest["components"][name], workspace)
    from .onnx import OnnxSession

    return lambda name: OnnxSession(folder / name / "model.onnx", device)


def open_folder(folder: Path, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return the manifest of an exported folder. Raises Mgp5Error if it is another model's than that of these parts (by
    name), or a file is missing or damaged."""
    manifest = read_manifest(folder)
    hashes = manifest.get("weights", {})
    if wrong := [name for name, part in parts.items() if hashes.get(name) not in (None, weights_hash(part))]:
        hint = "take that model, or export this one"
        raise Mgp5Error(f"{folder} is an export of {manifest['model']}, with another {', '.join(wrong)}", hint)
    check_files(folder, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that `mgp5 export` wrote. Raises Mgp5Error if it is missing, broken, of another
    version, or names files outside the folder."""
    try:
        manifest = read_json(folder / MANIFEST)
        for name, entry in manifest["components"].items():
            if not entry["files"] or any(Path(file).parts != (name, Path(file).name) for file in entry["files"]):
                raise ValueError(f"it lists no files of {name}, or others")
    except (Mgp5Error, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "give a folder that mgp5 export has written"
        raise Mgp5Error(f"no readable {MANIFEST} in {folder} ({str(error) or type(error).__name__})", hint) from None
    if (version := manifest.get("format", 1)) != FORMAT:
        message = f"{folder} was exported by another version of mgp5 (format {version}, expected {FORMAT})"
        raise Mgp5Error(message, "export it again")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], names: Collection[str] = ()) -> None:
    """Raise Mgp5Error if a file of the named components, or without names of any, is missing or damaged."""
    for name in names or manifest["components"]:
        for file, expected in manifest["components"][name]["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                state = "is damaged" if path.is_file() else "is missing"
                raise Mgp5Error(f"{path} {state}: it is not the file that was compared", "copy or export it again")


def weights_hash(module: nn.Module) -> str:
    """Return a hash of a module's weights in bfloat16, so that copies in most precisions have the same, and their
    names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().bfloat16().cpu().contiguous().reshape(-1).view(torch.int16).numpy())
    return digest.hexdigest()
