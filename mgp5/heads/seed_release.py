"""Read the files that SEED's authors published: tokenizer version 1 and 2, and the words of SEED-LLaMA.

What is certain of the names below: the attributes of the public classes whose `load_state_dict` reads the files
(version 1: models/visual_tokenizer.py; version 2: models/seed_qformer/qformer_quantizer.py). Those of stage I (temp,
vision_proj, text_proj, word and position embeddings) are of the training class and may lack in a file. No file was
opened here: whether they also hold `blocks`, ln_vision or the vision tower is not known, so each may lack or be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from ..backbones.minigpt4 import Layout, compose, read_state
from ..backbones.processors import load_tokenizer
from ..errors import Mgp5Error
from ..generators.seed_stages import SeedTokenizerConfig
from ..generators.seed_tokenizer import SeedTokenizer
from ..hub import from_hub

# Pattern in an own name -> text in the release's; all apply, in this order. KIND is "text" or "image".
NAMES = (
    (r"^causal\.norm\.", "ln_vision."),
    (r"^causal\.queries$", "query_tokens"),
    (r"^causal\.words\.", "Qformer.bert.embeddings.word_embeddings."),
    (r"^causal\.positions\.", "Qformer.bert.embeddings.position_embeddings."),
    (r"^causal\.image_projection\.", "vision_proj."),
    (r"^causal\.text_projection\.", "text_proj."),
    (r"^causal\.log_temperature$", "temp"),
    (r"^causal\.transformer\.", "Qformer.bert."),
    (r"^reverse\.transformer\.", "Reverse_Qformer.bert."),
    (r"\.bert\.layernorm\.", ".bert.embeddings.LayerNorm."),
    (r"attention\.attention\.", "attention.self."),
    (r"^(encode|decode)_layer\.", r"\1_task_layer."),
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"^reconstruction\.positions$", "pos_embed"),
    (r"^reconstruction\.blocks\.", "blocks."),
    (r"^generation\.positions$", "pos_embed_KIND"),
    (r"^generation\.blocks\.", "blocks_KIND."),
    (r"\.self_attn\.in_proj_", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^reverse\.queries$", "reverse_tokens"),
    (r"^reverse\.projection\.", "distill_KIND_proj."),
    (r"^reverse\.layers\.0\.", "image_down.0."),  # a ReLU stands between two layers
    (r"^reverse\.layers\.1\.", "image_down.2."),
    (r"^reverse\.layers\.2\.", "image_down.4."),
)
# What tells the shapes; without it there is no tokenizer.
NEEDED = ("query_tokens", "ln_vision.weight", "quantize.embedding.weight", "Qformer.bert.embeddings.LayerNorm.weight")
# Template with the words before and behind a question, and before an answer.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ {'system': '', 'user': 'BEFORE', 'assistant': 'OWN'}[m['role']] }}"
    "{% for c in m['content'] %}{{ '<ImageHere>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ {'system': '', 'user': 'BEHIND', 'assistant': '\\n'}[m['role']] }}{% endfor %}"
)
# Size of a SEED-LLaMA -> the prompt of its inference script, "USER: {image}{question}\nASSISTANT:" and
# "[INST] {image}{question} [/INST]\n". It has one turn and no system text; how earlier turns end is our choice.
LAYOUTS = {
    "8b": TURNS.replace("BEFORE", "USER: ").replace("BEHIND", "\\n").replace("OWN", "ASSISTANT: ")
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "14b": TURNS.replace("BEFORE", "[INST] ").replace("BEHIND", " [/INST]\\n").replace("OWN", ""),
}


class ReleasedTokenizer(NamedTuple):
    """A tokenizer that was read."""

    config: SeedTokenizerConfig
    state: dict[str, Tensor]  # of SeedTokenizer, in float32
    unused: tuple[str, ...]  # names in the files that it has no use for


def read_seed_tokenizer(paths: Sequence[Path], heads: int = 12) -> ReleasedTokenizer:
    """Read version 1 (causal_qformer.pth and seed_tokenizer.pth) or version 2 (seed_quantizer.pt); later files win.

    The version is known by what the codes are decoded to. `heads` of attention are in no shape. The frozen vision tower
    is not taken from them: it is BLIP-2's. Raises Mgp5Error for a file that is no dictionary of tensors, or if tensors
    are missing or do not fit one another.
    """
    files = [state.get("model", state) for state in map(read_state, paths)]
    found = {name: value for file in files for name, value in file.items() if isinstance(value, Tensor)}
    kinds = [kind for kind in ("image", "text") if f"distill_{kind}_proj.weight" in found]
    absent = [name for name in NEEDED if name not in found] + ([] if kinds else ["distill_{text,image}_proj.weight"])
    if absent:
        raise _missing(absent)
    config = _config(found, kinds[0], heads)
    with torch.device("meta"):
        expected = SeedTokenizer(config).state_dict()
    names = {name: _released(name, kinds[0]) for name in expected}
    if absent := [name for name in names.values() if name not in found]:
        raise _missing(absent)
    state = {name: found[released].float() for name, released in names.items()}
    if "causal.log_temperature" in state:
        state["causal.log_temperature"] = state["causal.log_temperature"].log()
    wrong = [
        f"{names[name]} is {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        for name, value in state.items()
        if value.shape != expected[name].shape
    ]
    if wrong:
        raise Mgp5Error("; ".join(wrong[:5]), "give files of one version of SEED's tokenizer")
    return ReleasedTokenizer(config, state, tuple(sorted(found.keys() - set(names.values()))))


def _released(name: str, kind: str) -> str:
    """Return the release's name of a tensor."""
    for pattern, text in NAMES:
        name = re.sub(pattern, text.replace("KIND", kind), name)
    return name


def _missing(names: Sequence[str]) -> Mgp5Error:
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    hint = "give causal_qformer.pth and seed_tokenizer.pth of version 1, or seed_quantizer.pt of version 2"
    return Mgp5Error(f"SEED's tokenizer is incomplete, it has no {some}", hint)


def _config(found: Mapping[str, Tensor], kind: str, heads: int) -> SeedTokenizerConfig:
    """Return the configuration that the shapes tell."""
    words = found.get("Qformer.bert.embeddings.word_embeddings.weight")
    text = words is not None and {"vision_proj.weight", "text_proj.weight", "temp"} <= found.keys()
    mlp = [found[name] for index in (0, 2, 4) if (name := f"image_down.{index}.weight") in found]
    optional: dict[str, Any] = {"text_vocab": 0}
    if text:
        optional = {"text_vocab": len(words), "projection": len(found["text_proj.weight"])}
        optional["text_positions"] = len(found["Qformer.bert.embeddings.position_embeddings.weight"])
    if mlp:
        optional["mlp_widths"] = tuple(len(weight) for weight in mlp)
    else:
        optional["reverse_layers"] = _layers(found, "Reverse_Qformer.bert.encoder.layer.")
    return SeedTokenizerConfig(
        vision_width=len(found["ln_vision.weight"]),
        queries=found["query_tokens"].shape[1],
        width=found["query_tokens"].shape[2],
        heads=heads,
        causal_layers=_layers(found, "Qformer.bert.encoder.layer."),
        codes=found["quantize.embedding.weight"].shape[0],
        code_width=found["quantize.embedding.weight"].shape[1],
        quantizer_loss="legacy",
        reconstruction="pos_embed" in found,
        block_layers=_layers(found, f"blocks_{kind}."),
        detokenizer="image-mlp" if mlp else kind,
        condition_length=found["reverse_tokens"].shape[1] if kind == "text" and "reverse_tokens" in found else 1,
        condition_width=len(found[f"distill_{kind}_proj.weight"]),
        **optional,
    )


def _layers(names: Iterable[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def code_words(codes: int) -> list[str]:
    """Return the words of SEED-LLaMA's vocabulary for an image: the one that begins it, its codes, the one that ends
    it."""
    return ["<img>", *(f"<img_{code:05d}>" for code in range(codes)), "</img>"]


def seed_llama_ids(vocabulary: Mapping[str, int], rows: int, codes: int = 8192) -> tuple[int, ...]:
    """Return the ids of `code_words` in the tokenizer of a SEED-LLaMA (8B or 14B), whose LLM has so many rows.

    The released LLMs are plain LLaMAs with LoRA merged; their code words have the ids 32000 to 40191, in order. Raises
    Mgp5Error if words are missing, have no row in the LLM, or codes are not in order.
    """
    words = code_words(codes)
    if missing := [word for word in words if word not in vocabulary]:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        case = f"the tokenizer lacks {len(missing)} of the {len(words)} words of images ({some})"
        raise Mgp5Error(case, "give the tokenizer of AILab-CVC/seed-tokenizer-2 with the LLM")
    ids = tuple(vocabulary[word] for word in words)
    if max(ids) >= rows:
        case = f"the LLM has {rows} rows, expected at least {max(ids) + 1} with the words of images"
        raise Mgp5Error(case, "give a SEED-LLaMA, not the LLaMA it was trained from")
    if ids[1:-1] != tuple(range(ids[1], ids[1] + codes)):
        raise Mgp5Error("the code words of the tokenizer are not in order", "give SEED-LLaMA's own tokenizer")
    return ids


def compose_seed_llama(blip2: str, llm: str, tokenizer: str, out: Path, size: str, **options: Any) -> tuple[int, ...]:
    """Write a backbone's folder of a SEED-LLaMA ("8b" or "14b") and the vision tower of a BLIP-2, that of SEED's
    tokenizer; return the ids of `code_words`.

    `llm` and `tokenizer` are folders or hub ids, such as AILab-CVC/seed-llama-8b-sft and AILab-CVC/seed-tokenizer-2;
    `options` are `codes` of `seed_llama_ids` and the `dtype` of the weights. Raises Mgp5Error as `seed_llama_ids` does,
    before anything is read in full, and as `backbones.minigpt4.compose`.
    """
    if size not in LAYOUTS:
        raise Mgp5Error(f"unknown SEED-LLaMA {size!r}", f"expected {' or '.join(LAYOUTS)}", usage=True)
    codes = options.pop("codes", 8192)
    config = from_hub(llm, lambda name, revision: AutoConfig.from_pretrained(name, revision=revision))
    words = from_hub(tokenizer, lambda name, revision: load_tokenizer(name, revision=revision))
    ids = seed_llama_ids(words.get_vocab(), config.vocab_size, codes)
    compose(blip2, llm, out, tokenizer=tokenizer, layout=Layout(LAYOUTS[size], square=True), **options)
    return ids
