"""MiniGPT-4 (arXiv 2304.10592) as a BLIP-2 checkpoint: EVA ViT-g, Q-Former, one linear layer, Vicuna.

`compose` writes such a folder from the published parts; `hf.HFBackbone` loads it like any other backbone.
"""

from __future__ import annotations

import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPImageProcessorPil,
    GenerationConfig,
)

from ..errors import Mgp5Error
from ..files import replacing
from ..hub import any_precision, from_hub
from .processors import load_tokenizer

IMAGE, STOP = "<ImageHere>", "▁###"  # " ###" is one token of LLaMA's vocabulary
# The layout of the released code: system text, then "###Human: ... ###Assistant: ... ###Human: ..."; the blanks behind
# the roles are those of `prompts`, as a story has none. The first token is
# that of the LLM, which differs between versions of Vicuna.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '', 'user': '###Human:', 'assistant': '###Assistant:'}[m['role']] }}"
    "{% for c in m['content'] %}{{ '<Img><ImageHere></Img>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '' if m['role'] == 'system' else ' ' }}{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
)


class Layout(NamedTuple):
    """How chats are laid out for an LLM."""

    template: str  # Jinja, with `image` for an image
    stops: tuple[str, ...] = ()  # tokens that end a reply beside the end of text, which the first of them replaces
    square: bool = False  # images are resized to a square (bicubic), instead of cropped to one
    image: str = IMAGE


MINIGPT4 = Layout(TEMPLATE, (STOP, "##"))


def compose(
    blip2: str | Path,
    llm: str | Path,
    out: Path,
    projection: Path | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    tokenizer: str | Path | None = None,
    layout: Layout = MINIGPT4,
) -> Path:
    """Write a MiniGPT-4 folder: BLIP-2's vision tower and Q-Former, a LLaMA, and the linear layer between them.

    `blip2` and `llm` are folders or hub ids; the paper's are Salesforce/blip2-flan-t5-xxl (its T5 is not read) and
    Vision-CAIR/vicuna-7b (Vicuna v0). `projection` is MiniGPT-4's prerained_minigpt4_7b.pth; None leaves the linear
    layer random. Weights are written in `dtype`, but the Q-Former stays float32. Returns `out`. Raises Mgp5Error if
    `out` exists, or the shapes of the projection do not fit these parts.

    A turn ends with "###". If the vocabulary has " ###" as a token, it becomes the tokenizer's end of text, which
    training targets end with. Generation also stops at the end of text of the LLM, and at "##", the first token of
    "###" in LLaMA's vocabulary after any character but a blank.
    """
    if out.exists():
        raise Mgp5Error(f"{out} exists already", "choose another folder", usage=True)
    language, words, stops = from_hub(str(llm), partial(load_language, dtype=dtype, words=tokenizer, layout=layout))
    if len(words) > language.config.vocab_size:
        language.resize_token_embeddings(len(words), mean_resizing=False)
    model = from_hub(str(blip2), partial(_vision, width=language.config.hidden_size, dtype=dtype))
    model.language_model = language
    model.config.text_config = language.config
    model.config.image_token_id = words.convert_tokens_to_ids(IMAGE)
    model.language_projection = _linear(model.config, projection).to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=words.bos_token_id, eos_token_id=stops)
    # As in the released code: resize the shorter side (bilinear), center-crop, normalize.
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, resample=2)
    if layout.square:
        sides = {"height": size, "width": size}
        processor = CLIPImageProcessorPil(size=sides, do_center_crop=False, resample=3)
    with replacing(out) as part:
        for piece in (model, words, processor):
            piece.save_pretrained(part)
    return out


def read_state(path: Path) -> dict[str, Any]:
    """Read a file of `torch.save` that holds tensors and plain data only. Raises Mgp5Error for anything else."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except OSError as error:
        raise Mgp5Error(f"cannot read {path} ({error.strerror})", "check the path") from None
    except Exception as error:  # an unpickler can raise any exception on a broken file
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {blocked[1]}" if blocked else f"no file of torch.save, {type(error).__name__}"
        raise Mgp5Error(f"cannot read {path} ({reason})", "expected tensors by name and plain data") from None


def load_language(
    llm: str, revision: str | None, dtype: torch.dtype, words: str | Path | None, layout: Layout
) -> tuple[nn.Module, Any, list[int]]:
    """Load the LLM and its tokenizer, add image token and chat template; return them and the ids that end a reply."""
    # legacy as in the released code: a blank after special tokens.
    tokenizer = load_tokenizer(words or llm, revision=None if words else revision, legacy=True)
    # Pickled weights are read too (weights_only, no code): Vicuna has no others.
    language = any_precision(AutoModelForCausalLM.from_pretrained, llm, revision=revision, dtype=dtype)
    tokenizer.init_kwargs["legacy"] = True  # else it is not saved
    tokenizer.add_tokens([layout.image], special_tokens=True)
    tokenizer.chat_template = layout.template
    end, vocabulary = tokenizer.eos_token, tokenizer.get_vocab()
    tokenizer.pad_token = tokenizer.pad_token or end
    first, others = layout.stops[:1], layout.stops[1:]
    if vocabulary.keys() & first:
        tokenizer.add_special_tokens({"eos_token": first[0]})
    return language, tokenizer, [vocabulary[token] for token in (*first, end, *others) if token in vocabulary]


def _vision(blip2: str, revision: str | None, width: int, dtype: torch.dtype) -> Blip2ForConditionalGeneration:
    """Load vision tower and Q-Former of BLIP-2, with an empty language model of a given width."""
    config = Blip2Config.from_pretrained(blip2, revision=revision)
    empty = {"num_hidden_layers": 0, "vocab_size": 1, "intermediate_size": 1, "hidden_size": width}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = Blip2Config(
        vision_config=config.vision_config.to_dict(),
        qformer_config=config.qformer_config.to_dict(),
        text_config={"model_type": "llama", **empty, **ends},
        num_query_tokens=config.num_query_tokens,
    )
    options = {"revision": revision, "config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    return any_precision(Blip2ForConditionalGeneration.from_pretrained, blip2, **options)


def _linear(config: Blip2Config, path: Path | None) -> nn.Linear:
    linear = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
    if path is not None:
        state = read_state(path)
        state = state.get("model", state)
        tensors: dict[str, Tensor] = {name: state.get(f"llama_proj.{name}") for name in ("weight", "bias")}
        shapes = [None if value is None else tuple(value.shape) for value in tensors.values()]
        if shapes != (expected := [tuple(linear.weight.shape), tuple(linear.bias.shape)]):
            raise Mgp5Error(f"{path} holds llama_proj of shapes {shapes}, expected {expected}", "use the LLM it is for")
        linear.load_state_dict(tensors)
    return linear
