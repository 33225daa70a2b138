"""Models of real classes and shapes without weights: on the meta device they take no memory, which is enough to count
what trains and to estimate what a run takes.

`known_models.json` has the configurations of the named models, as their config.json files say but for the defaults of
the classes, so that no network is needed. "minigpt4" has no repository: `backbones.minigpt4.compose` puts it together.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers import DDIMScheduler
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import local_torch_dtype

from ..backbones.hf import HFBackbone
from ..backbones.processors import load_image_processor, load_tokenizer
from ..files import read_json
from ..generators import generator_class
from ..generators.latent_diffusion import AUTOENCODERS, CLIP_LENGTH
from ..generators.pipeline import load_part, read_index
from ..heads import head_class
from ..heads.settings import model_config_from
from ..hub import REPOS, Parts, explain, read_config
from ..loading import CONFIG, assemble
from ..model import InterleavedModel

if TYPE_CHECKING:
    from ..config import ModelConfig, TrainConfig


@cache
def known_models(kind: str) -> dict[str, dict[str, Any]]:
    """Return the configurations of named models of a kind, "mllm" or "generator"."""
    return read_json(Path(__file__).with_name("known_models.json"))[kind]


def skeleton(
    mllm: str,
    diffusion: str,
    config: TrainConfig,
    *,
    head: str = "minigpt5",
    trained: ModelConfig | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.float32,
) -> InterleavedModel:
    """Return a model without real weights, prepared for a stage by the code that trains; on a real device with random
    weights.

    `mllm` and `diffusion` are known names or their hub ids, whose tokenizers have the real number of tokens but spell
    none; or folders and other hub ids, whose configurations and tokenizers are read. `trained` is the configuration of
    a model that goes on from an earlier stage; `dtype` is that of frozen parts. Raises Mgp5Error for another pipeline.
    """
    with torch.device(device):
        model = _assemble(mllm, diffusion, dtype, trained, head=head, **config.shape)
        model.limit_pixels(config.data.max_pixels)
        model.prepare(config)
    return model


def generating_skeleton(parts: Parts, dtype: torch.dtype) -> InterleavedModel:
    """Return a model without weights on the meta device, with what was trained merged, or raise Mgp5Error."""
    trained = None
    if parts.trained:
        path = parts.trained / CONFIG
        trained = model_config_from(read_config(path), str(path))
    with torch.device("meta"):
        try:
            return _assemble(parts.mllm, parts.diffusion, dtype, trained)
        except (OSError, ValueError) as error:
            raise explain(error, parts.mllm) from error


def _assemble(
    mllm: str, diffusion: str, dtype: torch.dtype, trained: ModelConfig | None, **options: Any
) -> InterleavedModel:
    """Return a model with frozen parts in `dtype`; with a fresh head by `options` if none is trained."""
    with local_torch_dtype(dtype, "a skeleton"):
        backbone, generator = backbone_shape(mllm), generator_shape(diffusion).to(dtype)  # buffers too, as when loaded
    if trained is None:
        return assemble(backbone, generator, mllm, diffusion, **options)
    return InterleavedModel(backbone, head_class(trained.head)(generator, trained.head_config), trained)


def backbone_shape(name: str) -> HFBackbone:
    """Return the multimodal LLM `name` with random weights, of torch's default device and type."""
    known = known_models("mllm").get(_known_name(name))
    if known:
        config, processor = AutoConfig.for_model(**known["config"]), dict(known["processor"])
        processor = getattr(transformers, processor.pop("class"))(**processor)
        tokenizer = _llm_tokenizer(**known["tokenizer"])
    else:
        config = AutoConfig.from_pretrained(name)
        tokenizer, processor = load_tokenizer(name), load_image_processor(name)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.get_default_dtype())
    return HFBackbone(model.eval().requires_grad_(False), tokenizer, processor)


def generator_shape(name: str) -> Any:
    """Return the latent-diffusion model `name` with random weights, of torch's default device and type, or raise
    Mgp5Error."""
    known = known_models("generator").get(_known_name(name))
    index = known or read_index(name)
    model_class = generator_class(name, index.get("_class_name"))
    if hasattr(model_class, "from_index"):
        return model_class.from_index(index)
    denoiser, denoiser_class = model_class.denoiser_name, model_class.denoiser_class

    def config(kind: Any, part: str) -> dict[str, Any]:
        return known[part] if known else load_part(kind.load_config, name, part, None)

    vae = config(AUTOENCODERS["AutoencoderKL"], "vae")
    parts: dict[str, Any] = {
        denoiser: denoiser_class.from_config(config(denoiser_class, denoiser)),
        "vae": AUTOENCODERS[vae["_class_name"]].from_config(vae),
        "schedule": model_class.schedule_class.from_config(config(DDIMScheduler, "scheduler")),
    }
    for encoder, (encoder_class, tokenizer, tokenizer_class) in model_class.text_parts.items():
        if known:
            parts[encoder] = encoder_class(encoder_class.config_class(**known[encoder]))
            parts[tokenizer] = _clip_tokenizer() if tokenizer_class is CLIPTokenizer else None
        elif (index.get(encoder) or [None])[-1] is not None:
            parts[encoder] = encoder_class(load_part(encoder_class.config_class.from_pretrained, name, encoder, None))
            parts[tokenizer] = load_part(tokenizer_class.from_pretrained, name, tokenizer, None)
    parts |= model_class.more_shapes(name) if hasattr(model_class, "more_shapes") else {}
    return model_class(**parts)


def _known_name(name: str) -> str:
    """Return the name of a hub id in REPOS; other names stay as they are."""
    return next((known for known, repo in REPOS.items() if name in (repo.id, *repo.mirrors)), name)


def _llm_tokenizer(size: int, special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens that have no spelling, but for special ones."""
    words = {f"<{number}>": number for number in set(range(size)) - set(special.values())} | special
    end = "<|im_end|>" if "<|im_end|>" in special else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token=end)


def _clip_tokenizer() -> CLIPTokenizer:
    words = {"<|startoftext|>": 49406, "<|endoftext|>": 49407} | {f"{chr(97 + i)}</w>": i for i in range(26)}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=CLIP_LENGTH)
