"""What is exported, loaded without the LLM, which export does not need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import model_config_from
from ..errors import Mgp5Error
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion
from ..heads.minigpt5 import FeatureMapper, MiniGPT5Head
from ..hub import Parts, read_config, resolve
from ..loading import CONFIG, WEIGHTS, read_weights


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is exported.

    Args:
        name: of the model, for people.
        source: where `diffusion` is from, for its scheduler's configuration; "" leaves that out.
        mapper, unconditional: None where there is none, or none is asked for; (1, L, C) is guidance's other half.
    """

    name: str
    diffusion: LatentDiffusion
    source: str = ""
    mapper: FeatureMapper | None = None
    unconditional: Tensor | None = None
    num_vokens: int = 8


def load(name: str, components: Sequence[str] = ()) -> Subject:
    """The parts that export needs: no LLM. A model without a mapper gives its diffusion model's components.

    Raises:
        Mgp5Error: no such model, or `components` need a mapper that it does not have.
    """
    parts = resolve(name)
    if parts.trained is None and (not components or {"mapper", "condition"} & {*components}):
        hint = f"train one: mgp5 train --stage pretrain --model {name}; or export --component unet, say"
        raise Mgp5Error(f"{name} has no trained mapper", hint)
    diffusion = load_generator(parts.diffusion, torch.float32)
    if parts.trained is None:
        return Subject(name=name, source=parts.diffusion, diffusion=diffusion)
    return Subject(name=name, source=parts.diffusion, diffusion=diffusion, **_mapper(parts, diffusion))


def _mapper(parts: Parts, diffusion: LatentDiffusion) -> dict[str, Any]:
    path = parts.trained / CONFIG
    config = model_config_from(read_config(path), str(path))
    head = MiniGPT5Head(diffusion, config.head_config).eval()
    weights = {k[7:]: v.float() for k, v in read_weights(parts.trained / WEIGHTS).items() if k.startswith("mapper.")}
    try:
        head.mapper.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Mgp5Error(f"the mapper in {parts.trained} does not fit its config ({reason})", "copy it again") from None
    with torch.no_grad():
        unconditional = head.unconditional(next(head.mapper.parameters()))
    return {"mapper": head.mapper, "unconditional": unconditional, "num_vokens": head.num_vokens}
