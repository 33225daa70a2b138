"""The parts of a model that can be exported, loaded without the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import model_config_from
from ..errors import Mgp5Error
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion
from ..heads.minigpt5 import FeatureMapper, MiniGPT5Head
from ..hub import read_config, resolve
from ..loading import CONFIG, WEIGHTS, read_weights


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """What is exported of a model; its weights may be rounded on the way."""

    name: str  # for people
    generator: LatentDiffusion  # on the CPU in float32
    source: str = ""  # folder or hub id of the generator, for its scheduler's configuration; "" leaves that out
    mapper: FeatureMapper | None = None
    unconditional: Tensor | None = None  # (1, L, C), the unconditional condition of guidance; with a mapper
    num_vokens: int = 8  # how many states the mapper takes

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules whose hashes the manifest has, by name."""
        parts = {"denoiser": self.generator.denoiser, "vae": self.generator.vae}
        return parts | ({} if self.mapper is None else {"mapper": self.mapper})


def load_exportable(name: str, components: Sequence[str] = ()) -> Exportable:
    """Load the parts of a MiniGPT-5 that export needs, or of a model without a mapper those of its generator.

    Raises Mgp5Error if there is no such model, or the named components (none: all) need a mapper that it lacks.
    """
    parts = resolve(name)
    if parts.trained is None and (not components or {"mapper", "condition"} & {*components}):
        hint = f"train one: mgp5 train --stage pretrain --model {name}; or export --component unet, say"
        raise Mgp5Error(f"{name} has no trained mapper", hint)
    generator = load_generator(parts.diffusion, torch.float32)
    if parts.trained is None:
        return Exportable(name=name, source=parts.diffusion, generator=generator)
    path = parts.trained / CONFIG
    config = model_config_from(read_config(path), str(path))
    head = MiniGPT5Head(generator, config.head_config).eval()
    weights = {k[7:]: v.float() for k, v in read_weights(parts.trained / WEIGHTS).items() if k.startswith("mapper.")}
    try:
        head.mapper.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Mgp5Error(f"the mapper in {parts.trained} does not fit its config ({reason})", "copy it again") from None
    with torch.no_grad():
        unconditional = head.unconditional(next(head.mapper.parameters()))
    return Exportable(
        name=name,
        generator=generator,
        source=parts.diffusion,
        mapper=head.mapper,
        unconditional=unconditional,
        num_vokens=head.num_vokens,
    )
