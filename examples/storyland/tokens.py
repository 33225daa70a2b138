"""Build the two byte-level tokenizers of the demo: the language model's, and CLIP's for the diffusion model.

A word of Storyland is one token in both; every other text is spelled with pieces of words or single bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import click
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from mgp5.prompts import CAPTION_INSTRUCTIONS, CAPTION_SYSTEM, CHAT_SYSTEM, STORY_SYSTEM, TASK_PROMPTS
from mgp5.storyland.talk import dialog
from mgp5.storyland.tell import caption, story
from mgp5.storyland.world import random_scene, rng

VOCABULARY = 1024  # at most, specials included
LENGTH = 32  # tokens of a CLIP prompt, with start and end
CLIP_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # as in transformers' CLIPTokenizer
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if content is not string %}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {{- content + ' ' }}
    {%- elif message['role'] == 'user' %}
        {{- 'USER: ' + content + ' ' }}
    {%- else %}
        {{- 'ASSISTANT: ' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def captions(count: int) -> list[str]:
    """Captions of uniform scenes."""
    return [caption(random_scene(rng("tokens", 0, i)), rng("tokens", 1, i)) for i in range(count)]


def prompts() -> list[str]:
    """Every fixed sentence that the prompts of the data sets are made of."""
    questions = [*chain(*TASK_PROMPTS.values()), *CAPTION_INSTRUCTIONS]
    systems = [STORY_SYSTEM, CHAT_SYSTEM, CAPTION_SYSTEM]
    return [question.replace("{text}", "") for question in questions] + systems


def tales(count: int) -> list[str]:
    """Sentences of stories and dialogues."""
    told = [step.text for i in range(count) for step in story(rng("tokens", 2, i), "train").steps]
    return told + [turn.text for i in range(count) for turn in dialog(rng("tokens", 3, i), "train").turns]


def llm_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Whole words of `texts` (with the blank before them) first, then pieces for all other text, then bytes."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    alphabet = sorted(split.alphabet())
    words = sorted({word for word in counts if len(word) > 1})
    room = VOCABULARY - len(specials) - len(alphabet) - len(words)
    pieces = trained(counts, split, len(alphabet) + room)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*specials, *alphabet, *words]))}
    merges = []
    for left, right in pieces:
        if len(vocabulary) < VOCABULARY or left + right in vocabulary:
            vocabulary.setdefault(left + right, len(vocabulary))
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))  # a whole word needs no merges
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def trained(counts: Counter[str], split: pre_tokenizers.PreTokenizer, size: int) -> list[tuple[str, str]]:
    """Merges of a byte-level BPE with `size` tokens, learned from pre-tokens and how often they occur."""
    scratch = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(split.alphabet()), show_progress=False)
    # Square roots, so that rare words of the prompts are not drowned by the captions.
    repeated = (word for word, count in sorted(counts.items()) for _ in range(1 + int(count**0.5)))
    scratch.train_from_iterator(repeated, trainer)
    merges = json.loads(scratch.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Every frequent word of `texts` becomes one token. Lower case, words end in </w>."""
    scratch = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    scratch.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    scratch.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_SPLIT), "removed", invert=True), letters]
    )
    alphabet = sorted(letters.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    scratch.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(scratch.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    kept: list[tuple[str, str]] = []
    for left, right in merges:
        if left in tokens and right in tokens and len(tokens) < VOCABULARY - 2:
            kept.append((left, right))
            tokens.extend([left + right] if left + right not in tokens else [])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, kept, model_max_length=LENGTH)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder that gets mllm and diffusion.")
def main(work: Path) -> None:
    described, told = captions(20000), tales(4000)
    texts = [*described, *told, *prompts(), "USER: ASSISTANT:"]
    mllm = llm_tokenizer([*texts, *(f" {text}" for text in texts)])
    mllm.save_pretrained(work / "mllm")
    clip = clip_tokenizer(described + told)
    clip.save_pretrained(work / "diffusion" / "tokenizer")
    model = json.loads(clip.backend_tokenizer.to_str())["model"]
    (work / "diffusion" / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (work / "diffusion" / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n")
    longest = max(len(ids) for ids in clip(described).input_ids)
    if longest >= LENGTH:
        raise SystemExit(f"the longest caption has {longest} tokens, more than fit into {LENGTH}")
    click.echo(f"language model {len(mllm)} tokens, CLIP {len(clip)} tokens, longest caption {longest}")


if __name__ == "__main__":
    main()
