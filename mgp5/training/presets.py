"""Presets of the training stages: for each head the numbers of its paper, of its release, of small models and machines.

examples/train/README.md compares them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..config import DataConfig, LoraConfig, MiniGPT5TrainConfig, PrefixConfig, TrainConfig
from ..errors import Mgp5Error
from ..generators.seed_stages import SeedTokenizerConfig
from ..generators.var import VARConfig
from ..heads import head_class
from ..heads.settings import MMInterleavedSizes, MMInterleavedTrainConfig, SeedTrainConfig, VARGPTTrainConfig


def preset(stage: str, name: str = "paper", head: str = "minigpt5") -> TrainConfig:
    """Return the configuration of a stage of a head. Raises Mgp5Error for an unknown head, stage or preset.

    Of MiniGPT-5 they are "paper" (as printed), "paper-80gb" (the same, faster), "release" (as in the released code),
    "gill" (the paper's baseline with GILL's objective), "prefix" (the paper's with prefix tuning), "demo" (for the tiny
    model), and for own stories "own-laptop" (the demo on a CPU), "own-24gb" and "own-80gb" (7B models on a GPU).
    """
    head_class(head).stage(stage)
    if name not in PRESETS[head]:
        found = f"no preset {name!r} of the head {head}"
        raise Mgp5Error(found, f"expected one of {', '.join(PRESETS[head])}", usage=True)
    return PRESETS[head][name](stage)


def _paper(stage: str) -> MiniGPT5TrainConfig:
    """Return the paper's numbers: batch 48 and two epochs, then batch 32 and four (section 4.1)."""
    data = DataConfig(history=3, turn_tokens=50, bare_captions=True, pack="isolated")
    if stage == "pretrain":
        sizes = {"batch": 16, "accumulation": 3}
        return MiniGPT5TrainConfig(stage=stage, lr=2e-4, rows_lr=2e-4, caption_weight=0.1, data=data, **sizes)
    return MiniGPT5TrainConfig(
        stage=stage, lr=2e-5, rows_lr=2e-5, epochs=4, accumulation=8, lora=LoraConfig(), data=data
    )


def _paper_80gb(stage: str) -> MiniGPT5TrainConfig:
    """Return the paper's numbers in the largest pass of the LLM that 80 GB hold; captions need no recomputing."""
    sizes = {"batch": 16, "accumulation": 2}
    if stage == "pretrain":
        sizes = {"batch": 48, "accumulation": 1, "checkpointing": False}
    return dataclasses.replace(_paper(stage), generator_batch=16, **sizes)


def _release(stage: str) -> MiniGPT5TrainConfig:
    paper = _paper(stage)
    data = dataclasses.replace(paper.data, user_targets=True)
    common = {"rows_lr": 2e-5, "min_snr": 5.0, "voken_labels": "ends", "clip": 0.0, "epochs": 2}
    return dataclasses.replace(paper, data=data, accumulation=48 // paper.batch, **common)


def _gill(stage: str) -> MiniGPT5TrainConfig:
    """Return GILL's objective, the distance to the generator's encoding of the caption alone, in both stages."""
    objective = {"ldm_weight": 0.0, "caption_weight": 1.0, "caption_distance": "l2", "guidance_dropout": 0.0}
    return dataclasses.replace(_paper(stage), voken_labels="first", **objective)


def _prefix(stage: str) -> MiniGPT5TrainConfig:
    prefix = PrefixConfig() if stage == "finetune" else None
    return dataclasses.replace(_paper(stage), lora=None, prefix=prefix)


def _demo(stage: str) -> MiniGPT5TrainConfig:
    common = {"accumulation": 1, "warmup": 100, "voken_labels": "first", "checkpointing": False, "generator_batch": 32}
    if stage == "pretrain":
        layers = {"encoder_layers": 2, "decoder_layers": 3}
        return MiniGPT5TrainConfig(stage=stage, lr=1e-3, rows_lr=1e-3, caption_weight=0.1, batch=32, **layers, **common)
    return MiniGPT5TrainConfig(stage=stage, lr=3e-4, rows_lr=1e-3, batch=16, lora=LoraConfig(dropout=0.0), **common)


def _own(stage: str, **machine: Any) -> MiniGPT5TrainConfig:
    """Return settings for some tens to thousands of own stories: short runs, a page of samples in between."""
    own = {"warmup": 20, "voken_labels": "first", "sample_every": 100}
    own["data"] = DataConfig(narrate_first=True, pack="isolated")
    return dataclasses.replace(_paper(stage), **{"lr": 1e-4, "rows_lr": 1e-4, "epochs": 5, **own, **machine})


def _own_laptop(stage: str) -> MiniGPT5TrainConfig:
    lora = LoraConfig(dropout=0.0) if stage == "finetune" else None
    rates = {"lr": 3e-4, "rows_lr": 1e-3, "lora": lora, "data": DataConfig(narrate_first=True)}
    return _own(stage, batch=8, generator_batch=8, accumulation=1, epochs=10, checkpointing=False, **rates)


def _own_24gb(stage: str) -> MiniGPT5TrainConfig:
    return _own(stage, batch=2, accumulation=8)  # 22 GiB with LLaVA-1.5-7B and five images a story, by the estimate


def _own_80gb(stage: str) -> MiniGPT5TrainConfig:
    return _own(stage, batch=16, generator_batch=16, accumulation=1)


def _seed(stage: str) -> SeedTrainConfig:
    """Return what the papers and facts say of SEED: 10 epochs of the contrastive stage, then the tokenizer (SEED,
    section 2.2); LoRA on all projections over captions and images half and half, then over stories."""
    common = {"text_weight": 1.0, "guidance_dropout": 0.0, "schedule": "cosine", "weight_decay": 0.05}
    data = DataConfig(bare_captions=True, instruct_every=0)
    if stage == "tokenizer-contrastive":
        return SeedTrainConfig(stage=stage, lr=3e-5, rows_lr=0.0, epochs=10, batch=64, accumulation=64, **common)
    if stage == "tokenizer":
        return SeedTrainConfig(stage=stage, lr=1e-4, rows_lr=0.0, epochs=500, batch=256, accumulation=1, **common)
    lora = LoraConfig(rank=16, alpha=32, targets=SEVEN)
    if stage == "pretrain":
        common |= {"data": data, "both_ways": True}
        return SeedTrainConfig(stage=stage, lr=1.5e-4, rows_lr=1.5e-4, steps=30_000, lora=lora, **common)
    return SeedTrainConfig(stage=stage, lr=1e-4, rows_lr=1e-4, steps=50_000, lora=lora, **common)


def _seed_release(stage: str) -> SeedTrainConfig:
    """Return the released numbers where they differ: the quantizer's weights exchanged, norms of the LLM trained."""
    paper = _seed(stage)
    tokenizer = dataclasses.replace(paper.tokenizer, quantizer_loss="legacy")
    return dataclasses.replace(paper, norms=stage in ("pretrain", "finetune"), tokenizer=tokenizer)


def _seed_demo(stage: str) -> SeedTrainConfig:
    """Return the numbers of the tiny model: see examples/storyland."""
    tokenizer = SeedTokenizerConfig(
        width=128, heads=4, causal_layers=4, codes=1024, code_width=16, split_codes=True, block_layers=2,
        reverse_layers=3, dropout=0.0,
    )  # fmt: skip
    common = {"accumulation": 1, "warmup": 100, "checkpointing": False, "guidance_dropout": 0.0, "tokenizer": tokenizer}
    common |= {"text_weight": 1.0, "schedule": "cosine"}
    if stage.startswith("tokenizer"):
        rates = {"lr": 1e-3 if stage == "tokenizer" else 5e-4, "rows_lr": 0.0}
        return SeedTrainConfig(stage=stage, batch=64, tokenizer_weights=(1.0, 1.0, 5.0), **rates, **common)
    lora = LoraConfig(rank=16, alpha=32, dropout=0.0, targets=SEVEN)
    data = DataConfig(bare_captions=stage == "pretrain", instruct_every=0)
    both = stage == "pretrain"
    return SeedTrainConfig(stage=stage, lr=1e-3, rows_lr=2e-3, batch=32, lora=lora, data=data, both_ways=both, **common)


def _vargpt(stage: str) -> VARGPTTrainConfig:
    """Return the paper's numbers (VARGPT, table 2)."""
    common = {"text_weight": 1.0, "weight_decay": 0.0, "schedule": "cosine", "rows_lr": 0.0}
    if stage in ("var", "align"):
        return VARGPTTrainConfig(stage=stage, lr=1e-3, batch=16, accumulation=64, epochs=1, **common)
    if stage == "instruct":
        return VARGPTTrainConfig(stage=stage, lr=5e-5, batch=4, accumulation=64, epochs=1, whole_llm=True, **common)
    return VARGPTTrainConfig(stage=stage, lr=5e-5, batch=16, accumulation=64, epochs=12, **common)


def _vargpt_release(stage: str) -> VARGPTTrainConfig:
    """Return the released choices: prompts are learnt too, all rows have the dropped class when they draw."""
    return dataclasses.replace(_vargpt(stage), learn_prompts=True, classes="released")


def _vargpt_demo(stage: str) -> VARGPTTrainConfig:
    """Return the numbers of the tiny model: see examples/storyland."""
    var = VARConfig(width=192, depth=6, heads=6, drop_path=0.0)
    common = {"text_weight": 0.1, "accumulation": 1, "warmup": 100, "checkpointing": False, "schedule": "cosine"}
    common |= {"batch": 32, "weight_decay": 0.0, "rows_lr": 2e-3, "train_decoder": True, "unconditional": "learned"}
    return VARGPTTrainConfig(stage=stage, lr=1e-3, var=var, **common)


def _mm_interleaved(stage: str) -> MMInterleavedTrainConfig:
    """Return the paper's numbers (MM-Interleaved, tables 11 and 15): 11 billion tokens of captions and documents, then
    stories, with a rate of the image decoder ten times that of all else instead of a tenth."""
    common = {"text_weight": 1.0, "weight_decay": 0.05, "schedule": "cosine"}
    if stage == "pretrain":
        common |= {"lr": 1e-4, "rows_lr": 1e-4, "unet_lr": 1e-5, "offsets_lr": 1e-5, "steps": 15_000, "warmup": 1000}
        return MMInterleavedTrainConfig(
            stage=stage, batch=2, data=DataConfig(bare_captions=True), both_ways=True, **common
        )
    common |= {"lr": 1e-5, "rows_lr": 1e-5, "unet_lr": 1e-4, "offsets_lr": 1e-5, "steps": 4000, "warmup": 200}
    return MMInterleavedTrainConfig(stage=stage, batch=2, accumulation=64, **common)


def _mm_interleaved_release(stage: str) -> MMInterleavedTrainConfig:
    """Return the released shape and numbers: pyramids of resized images, norms of channels, a UNet that sees the last
    image only, documents packed into rows that self-attention does not part."""
    paper = _mm_interleaved(stage)
    sizes = MMInterleavedSizes(resized=True, channel_norm=True, earlier="last", images=49, context_inner=3072)
    data = dataclasses.replace(paper.data, pack="plain")
    return dataclasses.replace(paper, sizes=sizes, data=data, betas=(0.9, 0.995), eps=1e-6)


def _mm_interleaved_demo(stage: str) -> MMInterleavedTrainConfig:
    """Return the numbers of the tiny model, whose UNet has a small adapter: see examples/storyland."""
    sizes = MMInterleavedSizes(
        queries=16, token_width=128, token_layers=2, token_heads=4, interactions=2, adapter_heads=4, stem=16,
        resized=True, every=2, heads=4, points=4, images=8, context_heads=4, unet="adapter",
    )  # fmt: skip
    common = {"text_weight": 1.0, "accumulation": 1, "warmup": 100, "checkpointing": False, "schedule": "cosine"}
    common |= {"rows_lr": 1e-3, "unet_lr": 1e-3, "offsets_lr": 1e-4, "sizes": sizes}
    if stage == "pretrain":
        return MMInterleavedTrainConfig(stage=stage, lr=1e-3, batch=32, both_ways=True, **common)
    return MMInterleavedTrainConfig(stage=stage, lr=5e-4, batch=16, lora=LoraConfig(dropout=0.0), **common)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Name of a head -> name of a preset -> the settings of a stage.
PRESETS: dict[str, dict[str, Callable[[str], TrainConfig]]] = {
    "minigpt5": {
        "paper": _paper,
        "paper-80gb": _paper_80gb,
        "release": _release,
        "gill": _gill,
        "prefix": _prefix,
        "demo": _demo,
        "own-laptop": _own_laptop,
        "own-24gb": _own_24gb,
        "own-80gb": _own_80gb,
    },
    "vargpt": {"paper": _vargpt, "release": _vargpt_release, "demo": _vargpt_demo},
    "mm-interleaved": {"paper": _mm_interleaved, "release": _mm_interleaved_release, "demo": _mm_interleaved_demo},
    "seed": {"paper": _seed, "release": _seed_release, "demo": _seed_demo},
}
