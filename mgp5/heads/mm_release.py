"""Read what MM-Interleaved's authors published: its 13B checkpoint, before finetuning, and its configuration.

Certain of the names and shapes below: the attributes of the public modules whose `load_state_dict` reads the files
(mm_interleaved/models). Expected, as no file was opened here: that they hold all that was trained, and embedding and
head of the LLM, whose new rows are nowhere else; that the UNet's names are those of today's diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel, GenerationConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from ..backbones.minigpt4 import Layout, load_language, read_state
from ..errors import Mgp5Error, raise_all
from ..files import replacing
from ..hub import any_precision, from_hub
from .settings import MMInterleavedSizes

HINT = "give all pytorch_model*.bin of mm_interleaved_pretrain, with the CLIP, Vicuna and Stable Diffusion it names"
MARK = "image_decoder.neg_prompt_embeds"  # by which such a checkpoint is known
# The release has no roles: a text is what it is.
LAYOUT = Layout(
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}",
    image="<image>",
)
HEADS, BEGIN = 16, 32000  # of MMFS, in no shape; id of the token that begins an image
PERCEIVERS = ("visual_tokenizer_config", "image_decoder_config")  # in the configuration

Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
ATTENTION: Names = (
    (r"\boffsets\.", "sampling_offsets."),
    (r"\blogits\.", "attention_weights."),
    (r"\bvalue\.", "value_proj."),
    (r"\boutput\.", "output_proj."),
    (r"\bquery\.", "dynamic_offset_mask."),
    (r"\branks\.", "query_relpos."),
)
QFORMER: Names = (
    (r"^qformer\.", "blip2qformer."),
    (r"\.(query|key)\.0\.", r".\1."),
    (r"\.query\.1\.", ".q_norm."),
    (r"\.key\.1\.", ".k_norm."),
)
ADAPTER: Names = (
    (r"^prior\.stages\.0\.(\d)\.(\d)\.", lambda found: f"spm.stem.{3 * int(found[1]) + int(found[2])}."),  # with a ReLU
    (r"^prior\.stages\.(\d)\.", lambda found: f"spm.conv{int(found[1]) + 1}."),
    (r"^prior\.project\.(\d)\.", lambda found: f"spm.fc{int(found[1]) + 1}."),
    (r"^level_embedding$", "level_embed"),
    (r"\.extractors\.0\.", ".extractor."),
    (r"\.extractors\.([12])\.", lambda found: f".extra_extractors.{int(found[1]) - 1}."),
    (r"\.(?:attention|inject)\.", ".attn."),
    *ATTENTION[:4],
    (r"\.(rise|fall)\.", lambda found: {"rise": ".ffn.fc1.", "fall": ".ffn.fc2."}[found[1]]),
    (r"\.conv\.", ".ffn.dwconv.dwconv."),
    (r"(extractor.*)\.norm\.", r"\1.ffn_norm."),
    (r"\.(?:level|token)_norm\.", ".feat_norm."),
    (r"^(interactions\.\d+)\.(?=query_norm|feat_norm|attn|gamma)", r"\1.injector."),
)
PLACES: Names = ((r"^project\.", "pos_proj."), (r"^norm\.", "pos_ln."), (r"^placed_norm\.", "post_ln."))
LAYER: Names = (
    (r"\bfeature_norm\.", "norm2."),
    (r"\bnorm\.", "norm1."),
    (r"^(\d+)\.mmfs\.", r"\1.attn."),
    *ATTENTION,
    (r"^(\d+)\.", r"\1.llama_cross_attn."),
)
BLOCK: Names = ((r"\bfeature_norm\.", "feat_norm."), (r"\.norm\.", ".query_norm."), *ATTENTION)
# Beginning of an own name, of the release's, and what differs behind it: the first that fits applies.
PARTS: tuple[tuple[str, str, Names], ...] = (
    ("image_encoder.adapter.", "visual_tokenizer.encoder.vision_model.adapter_", ADAPTER),
    ("image_encoder.tokens.resampler.", "visual_tokenizer.perceiver_resampler.", QFORMER),
    ("image_encoder.tokens.output.", "visual_tokenizer.proj.", ()),
    ("image_encoder.tokens.", "visual_tokenizer.", PLACES),
    ("llm_mmfs.", "mm_decoder.layers.", LAYER),
    ("conditioner.resampler.", "image_decoder.perceiver_resampler.", QFORMER),
    ("conditioner.project.", "context_feat_proj.", ()),
    ("conditioner.unconditional", MARK, ()),
    ("unet_mmfs.", "image_decoder.decoder.mmfs_module.", BLOCK),
    ("denoiser.", "image_decoder.decoder.unet.", ()),
)


ROWS = ("weight", "bias")
FROZEN = re.compile(
    r"^mm_decoder\.|^visual_tokenizer\.(encoder\.vision_model\.(?!adapter_)|pos_embed$|clip_)|"
    r"^image_decoder\.decoder\.vae\.|\.(ignore_token|pos_embed)$"
)
NEEDED = (
    *("mm_decoder.embed_tokens.weight", "soi_token", MARK, "visual_tokenizer.perceiver_resampler.queries"),
    *(f"text_decoder.{head}.{name}" for head in ("head", "head_new") for name in ROWS),
)


class Released(NamedTuple):
    """A checkpoint that was read."""

    found: dict[str, Tensor]  # by the release's names
    sizes: MMInterleavedSizes
    guidance: float

    def unused(self, used: Iterable[str]) -> tuple[str, ...]:
        """Return names of what is neither used, nor known to be frozen or constant."""
        return tuple(sorted(name for name in self.found.keys() - {*used, *NEEDED} if not FROZEN.search(name)))

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row of embedding (D,) and head (D,) and the bias () of the token that begins an image: there each
        is a frozen one and a trained one."""
        embedding = self.found["mm_decoder.embed_tokens.weight"][BEGIN] + self.found["soi_token"][0]
        head = [self.found[f"text_decoder.head.{n}"][BEGIN] + self.found[f"text_decoder.head_new.{n}"][0] for n in ROWS]
        return embedding, *head


def is_mm_interleaved(paths: Sequence[Path]) -> bool:
    """Return whether one of some files holds a part of the checkpoint that tells it."""
    return any(MARK in read_state(path) for path in paths if path.suffix != ".yaml")


def read_release(paths: Sequence[Path], vision_heads: int) -> Released:
    """Read all files of the checkpoint, and maybe its mm_inference.yaml; the ViT-Adapter has as many heads as the ViT.

    Raises Mgp5Error for what is missing, or where weights and configuration disagree.
    """
    files = [read_state(path) for path in paths if path.suffix != ".yaml"]
    found = {name: value for file in files for name, value in file.items() if isinstance(value, Tensor)}
    absent = [name for name in NEEDED if name not in found]
    if not (gates := _numbers(found, r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.gate$")):
        absent.append("mm_decoder.layers.0.llama_cross_attn.gate")
    if absent:
        raise missing(absent)
    settings = [_settings(path) for path in paths if path.suffix == ".yaml"]
    parts, guidance = settings[-1] if settings else ({}, 7.5)
    sizes = _sizes(found, gates, vision_heads, parts.get(PERCEIVERS[1], {}).get("num_attention_heads", HEADS))
    visual = {"num_queries": sizes.queries, "hidden_size": sizes.token_width, "num_hidden_layers": sizes.token_layers}
    visual |= {"num_attention_heads": sizes.token_heads, "cross_attention_frequency": sizes.token_every}
    given = parts.get(PERCEIVERS[0], {})
    raise_all(
        f"{name} of visual tokens is {given[name]} in the configuration, {value} in the weights"
        for name, value in visual.items()
        if given.get(name, value) != value
    )
    return Released(found, sizes, guidance)


def _settings(path: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Return the settings of both resamplers in a configuration, and its guidance scale. Raises Mgp5Error."""
    try:
        values = yaml.safe_load(path.read_text())
        parts = {name: values["model"][name]["perceiver_config"] for name in PERCEIVERS}
        return parts, float(values.get("inference", {}).get("generation_kwargs", {}).get("guidance_scale", 7.5))
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise Mgp5Error(f"{path} is no configuration of MM-Interleaved ({error})", "give mm_inference.yaml") from None


def _sizes(found: Mapping[str, Tensor], gates: list[int], vision_heads: int, context_heads: int) -> MMInterleavedSizes:
    """Return the sizes that the shapes tell."""
    adapter, tokens = "visual_tokenizer.encoder.vision_model.adapter_", "visual_tokenizer.perceiver_resampler."
    layers, cross = tokens + r"blip2qformer\.encoder\.layer\.(\d+)\.", "crossattention"
    reading = _numbers(found, f"^{layers}{cross}")
    decoder = "image_decoder.perceiver_resampler.blip2qformer.encoder.layer."
    width = found[f"{tokens}queries"].shape[2]
    norms = (value for name, value in found.items() if name.startswith(tokens) and name.endswith("q_norm.weight"))
    mmfs = f"mm_decoder.layers.{gates[0]}.llama_cross_attn.attn."
    try:
        logits = found[f"{adapter}interactions.0.injector.attn.attention_weights.bias"]
        return MMInterleavedSizes(
            queries=found[f"{tokens}queries"].shape[1],
            token_width=width,
            token_layers=len(_numbers(found, f"^{layers}")),
            token_heads=width // len(next(norms)),
            token_every=reading[1] - reading[0] if len(reading) > 1 else len(_numbers(found, f"^{layers}")),
            interactions=len(_numbers(found, rf"^{adapter}interactions\.(\d+)\.")),
            adapter_heads=vision_heads,
            adapter_points=len(logits) // 3 // vision_heads,  # for each of three levels
            stem=len(found[f"{adapter}spm.stem.0.weight"]),
            resized=True,
            channel_norm=True,
            every=gates[1] - gates[0] if len(gates) > 1 else max(1, gates[0]),
            heads=HEADS,
            points=len(found[f"{mmfs}sampling_offsets.bias"]) // 2 // HEADS,
            images=len(found[f"{mmfs}query_relpos.weight"]) - 1,
            context_layers=len(_numbers(found, rf"^{decoder}(\d+)\.")),
            context_heads=context_heads,
            context_inner=len(found[f"{decoder}0.intermediate_query.dense.bias"]),
            earlier="last",
        )
    except (KeyError, IndexError, StopIteration) as error:
        raise missing([str(error).strip("'") or f"{tokens}*.q_norm.weight"]) from None


def _numbers(names: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in names if (found := re.search(pattern, name))})


def missing(names: Sequence[str]) -> Mgp5Error:
    """Return the error for tensors that are not there."""
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return Mgp5Error(f"the checkpoint of MM-Interleaved is incomplete, it has no {some}", HINT)


def released(name: str, every: int, blocks: int) -> str:
    """Return the release's name of a tensor of `trained_tensors`; MMFS is in one of `every` layers of the LLM, and in
    so many blocks of the UNet, of which the last is the mid block."""
    for own, theirs, changes in PARTS:
        if name.startswith(own):
            rest = name.removeprefix(own)
            if own == "llm_mmfs.":
                rest = re.sub(r"^\d+", lambda found: str(int(found[0]) * every), rest)
            elif own == "unet_mmfs.":
                rest = re.sub(
                    r"^blocks\.(\d+)",
                    lambda found: "mmfs_mid_block" if int(found[1]) == blocks - 1 else f"mmfs_down_blocks.{found[1]}",
                    rest,
                )
            for pattern, text in changes:
                rest = re.sub(pattern, text, rest)
            return theirs + rest
    raise KeyError(name)


def fitted(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the release as the own one is shaped: without the logit for nothing of each level, which is
    overwritten there, and with as many images as the LLM tells apart, the last of which are as far as the farthest."""
    if name.endswith((".mmfs.logits.weight", ".mmfs.logits.bias")) and len(value) != len(like):
        levels = (len(value) - len(like)) // HEADS  # one more for each head and level
        return value.unflatten(0, (HEADS, levels, -1))[:, :, :-1].flatten(0, 2)
    if name.endswith(".ranks.weight") and len(value) < len(like):
        return torch.cat([value, value[-1:].expand(len(like) - len(value), -1)])
    return value.view(like.shape) if value.numel() == like.numel() == 1 else value


def compose_llava(clip: str, llm: str, out: Path, dtype: torch.dtype) -> None:
    """Write a LLaVA's folder of a CLIP's vision tower and a LLaMA, folders or hub ids; its projector is zero, as the
    head has its own."""
    language, words, stops = from_hub(llm, partial(load_language, dtype=dtype, words=None, layout=LAYOUT))
    load = partial(any_precision, CLIPVisionModel.from_pretrained, dtype=dtype)
    tower = from_hub(clip, lambda name, revision: load(name, revision=revision))
    if len(words) > language.config.vocab_size:
        language.resize_token_embeddings(len(words), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language.config.to_dict(),
        image_token_index=words.convert_tokens_to_ids(LAYOUT.image),
        vision_feature_layer=-1,
    )
    with torch.device("meta"):
        model = Llava(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, language.model, language.lm_head
    projector = model.model.multi_modal_projector.to(dtype).to_empty(device="cpu")
    for parameter in projector.parameters():
        torch.nn.init.zeros_(parameter)
    model.generation_config = GenerationConfig(bos_token_id=words.bos_token_id, eos_token_id=stops)
    size = tower.config.image_size
    with replacing(out) as part:
        for piece in (model, words, CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)):
            piece.save_pretrained(part)
