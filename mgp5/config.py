"""Configurations of models and of training, as frozen values; presets are functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_origin, get_type_hints

from .errors import Mgp5Error

VokenLabels = Literal["all", "first", "ends"]
Stage = Literal["pretrain", "finetune"]
Precision = Literal["fp32", "bf16", "fp16"]
MAPPER_KINDS = ("encoder-decoder", "decoder-only")


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """The shape of a FeatureMapper; the defaults are the paper's (arXiv 2310.02239, section 3.2).

    Args:
        llm_width: D, width of the LLM's hidden states (4096 for a 7B LLaMA).
        width: C, width of the diffusion model's condition (1024 for Stable Diffusion 2.1).
        queries: L, length of the condition in rows.
        encoder_layers: transformer layers over the vokens.
        decoder_layers: transformer layers over the queries.
        heads: attention heads; must divide the width of the transformer.
        ffn_ratio: hidden width of the feed-forward layers, in units of the transformer's width.
        inner: W, width of the transformer where it is not C; 0 is C, and then there is no output projection.
        pooled: P, length of the pooled vector in the last row (2048 for Stable Diffusion 3), 0 where there is none.
        kind: "decoder-only" is the paper's ablation (table 7): the vokens alone run through causal layers, and what
            comes out is padded with zeros to L rows.

    Raises:
        Mgp5Error: a value that cannot be; all of them are named.
    """

    llm_width: int
    width: int
    queries: int = 77
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 8
    ffn_ratio: int = 4
    inner: int = 0
    pooled: int = 0
    kind: Literal["encoder-decoder", "decoder-only"] = "encoder-decoder"

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        least = dict.fromkeys(("inner", "pooled"), 0)
        problems = [
            f"{name} is {value}, expected at least {least.get(name, 1)}"
            for name, value in counts.items()
            if value < least.get(name, 1)
        ]
        if self.heads >= 1 and self.transformer_width % self.heads:
            problems.append(f"width {self.transformer_width} is not a multiple of heads {self.heads}")
        if self.pooled > self.width:
            problems.append(f"pooled {self.pooled} is more than width {self.width}")
        if self.kind not in MAPPER_KINDS:
            problems.append(f"kind is {self.kind!r}, expected {' or '.join(MAPPER_KINDS)}")
        elif self.kind == "decoder-only" and self.pooled:
            problems.append("a decoder-only mapper has no pooled vector")
        if problems:
            raise Mgp5Error("mapper: " + "; ".join(problems), "correct these values in the mapper's settings")

    @property
    def transformer_width(self) -> int:
        """W."""
        return self.inner or self.width


@dataclass(frozen=True, kw_only=True)
class MiniGPT5Config:
    """What the head of MiniGPT-5 is built from.

    Args:
        num_vokens: n, 1 to 16.
        mapper: shape of the feature mapper.
        unconditional: where the unconditional condition of guidance comes from: the mapper at zeros, or, of a model
            trained without guidance dropout, the generator's own encoding of the empty text (the paper's ablation,
            section 4.4).
    """

    num_vokens: int = 8
    mapper: MapperConfig
    unconditional: Literal["mapper", "text"] = "mapper"


# Name of a head -> class of its configuration.
HEAD_CONFIGS: dict[str, type] = {"minigpt5": MiniGPT5Config}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a checkpoint was trained with; stored beside its weights and checked when it is loaded.

    Args:
        mllm, diffusion: LLM and generator: hub ids, or folders (relative ones lie in the model's folder).
        head: name of the head, a key of HEAD_CONFIGS.
        head_config: what the head is built from.
        guidance, temperature: defaults of this model where the user gives none (the paper's are 7.5 and 1).
        narrate_from: how much of the history a story's narration shows; a small model tells an image better by itself.
        mllm_kind: type, layers, width and vocabulary of the LLM that it was trained for; "" in older ones.
        head_kind: `Head.description` of the frozen parts that the head was trained for.
        lora: rank, alpha and target modules of the adapter, or None.
        prefix: of a model with prefix tuning, or None.
        stage: the last stage that trained it.
    """

    mllm: str
    diffusion: str
    head: str = "minigpt5"
    head_config: Any
    guidance: float = 7.5
    temperature: float = 1.0
    narrate_from: Literal["full", "text", "none"] = "full"
    mllm_kind: str = ""
    head_kind: str = ""
    lora: LoraConfig | None = None
    prefix: PrefixConfig | None = None
    stage: Stage | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the LLM (MiniGPT-5: r 8, alpha 16 on the query and value projections)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.targets:
            raise Mgp5Error(
                f"lora has rank {self.rank}, dropout {self.dropout} and targets {', '.join(self.targets) or 'none'}",
                "expected a rank of at least 1, a dropout of 0 or more and below 1, and at least one target",
                usage=True,
            )


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prefix tuning of the LLM (the paper's variant): keys and values of `tokens` virtual tokens in every layer, made
    by a two-layer MLP of hidden width `hidden`."""

    tokens: int = 5
    hidden: int = 1024

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 1:
            found = f"prefix has {self.tokens} tokens and hidden width {self.hidden}"
            raise Mgp5Error(found, "expected at least 1 of both", usage=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are made of the data; see the loaders of the formats.

    Args:
        instruct_every: CC3M and shards: after how many rows one is repeated as an instruction; 0 = never.
        tasks, context: VIST: which of the three tasks, and how much history their prompts show.
        narrate_first: VIST: also narrate a story's first picture.
        history: MMDialog: utterances before the answer that are kept; None = all.
        user_targets: MMDialog: learn the turns of both speakers.
        turn_tokens: MMDialog: a dialogue ends before a turn with more tokens of the LLM; None = no limit.
    """

    instruct_every: int = 100
    tasks: tuple[str, ...] = ("illustrate", "continue", "narrate")
    context: Literal["full", "text", "none"] = "full"
    narrate_first: bool = False
    history: int | None = None
    user_targets: bool = False
    turn_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one stage is trained; the defaults are the paper's numbers for the stage, see `preset`.

    Args:
        lr: peak learning rate of mapper, queries and adapter.
        rows_lr: of the voken rows of embedding and LM head; no weight decay on them.
        text_weight, ldm_weight, caption_weight: of the three losses; a loss of weight 0 is not computed.
        voken_labels: vokens with a text loss: "all" (eq. 1), the "first" (the others are forced at inference),
            or both "ends" (what the release does).
        caption_distance: "mse" (eq. 4), or GILL's mean L2 distance of rows.
        guidance_dropout: probability that a picture's voken states are replaced by zeros before the mapper.
        min_snr: gamma of the min-SNR weights of the LDM loss; None leaves it plain.
        train_queries: False is the paper's ablation of fixed queries.
        batch, accumulation: samples of a step on one device, and steps of one update.
        steps: updates in all; None: `epochs` passes over the data.
        schedule, warmup: updates of linear warm-up, then linear or cosine decay to zero.
        clip: norm to which gradients are clipped; 0 = never.
        optimizer: "adamw8bit" keeps its moments in 8 bits (extra `quant`, GPU only).
        ema: decay of a moving average of what trains, which is then what a run saves to use; 0 = none.
        lora, prefix: adapter of the LLM in the finetuning stage; at most one.
        encoder_layers, decoder_layers, inner, kind: of a fresh mapper; without effect on a trained one. inner None is
            1024 for generators with conditions wider than 2048, else none.
        precision: of the computation; weights that train stay in float32.
        quantize: of the frozen LLM ("4bit", "8bit"; extra `quant`).
        checkpointing: recompute activations of LLM and generator in the backward pass: slower, far less memory.
        keep: how many of the last checkpoints stay.
        sample_every: updates between pages of sample pictures; 0 = none.
        trackers: of Accelerate ("tensorboard", "trackio"); log.jsonl is always written.
    """

    stage: Stage
    lr: float
    rows_lr: float
    text_weight: float = 0.01
    ldm_weight: float = 1.0
    caption_weight: float = 0.0
    voken_labels: VokenLabels = "all"
    caption_distance: Literal["mse", "l2"] = "mse"
    guidance_dropout: float = 0.1
    min_snr: float | None = None
    train_queries: bool = True
    weight_decay: float = 0.01
    clip: float = 1.0
    batch: int = 4
    accumulation: int = 12
    epochs: int = 2
    steps: int | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: int = 1000
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema: float = 0.0
    lora: LoraConfig | None = None
    prefix: PrefixConfig | None = None
    encoder_layers: int = 4
    decoder_layers: int = 4
    inner: int | None = None
    kind: Literal["encoder-decoder", "decoder-only"] = "encoder-decoder"
    data: DataConfig = DataConfig()
    seed: int = 42
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    sample_every: int = 0
    trackers: tuple[str, ...] = ()
    workers: int = 0
    precision: Precision = "bf16"
    quantize: Literal["none", "4bit", "8bit"] = "none"
    checkpointing: bool = True

    def __post_init__(self) -> None:
        expected = {
            "0 or more and below 1": ("guidance_dropout", "ema"),
            "at least 1": ("batch", "accumulation", "epochs", "log_every", "save_every", "keep"),
            "0 or more": ("warmup", "workers", "sample_every", "clip", "rows_lr"),
            "above 0": ("lr",),
        }
        good = {
            "0 or more and below 1": lambda value: 0 <= value < 1,
            "at least 1": lambda value: value >= 1,
            "0 or more": lambda value: value >= 0,
            "above 0": lambda value: value > 0,
        }
        problems = [
            f"{name} is {getattr(self, name)}, expected {rule}"
            for rule, names in expected.items()
            for name in names
            if not good[rule](getattr(self, name))
        ]
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in hint.__args__:
                problems.append(f"{name} is {getattr(self, name)}, expected {' or '.join(hint.__args__)}")
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps is {self.steps}, expected at least 1")
        if self.lora and self.prefix:
            problems.append("lora and prefix are both given, expected one adapter")
        if problems:
            raise Mgp5Error("; ".join(problems), "correct the training configuration", usage=True)


def preset(stage: Stage, name: str = "paper") -> TrainConfig:
    """The numbers of a stage; examples/train/README.md has a table of what differs.

    `paper` as printed, `release` as the papers' code has them, `gill` the paper's baseline (GILL's objective),
    `prefix` the paper's with prefix tuning, `demo` for the tiny model.
    """
    if stage not in ("pretrain", "finetune"):
        raise Mgp5Error(f"unknown stage {stage!r}", "expected pretrain or finetune", usage=True)
    if name not in PRESETS:
        raise Mgp5Error(f"unknown preset {name!r}", f"expected one of {', '.join(PRESETS)}", usage=True)
    return PRESETS[name](stage)


def _paper(stage: Stage) -> TrainConfig:
    """Batch 48 and two epochs, then batch 32 and four (section 4.1)."""
    data = DataConfig(history=3, turn_tokens=50)
    if stage == "pretrain":
        return TrainConfig(stage=stage, lr=2e-4, rows_lr=2e-4, caption_weight=0.1, data=data)
    return TrainConfig(stage=stage, lr=2e-5, rows_lr=2e-5, epochs=4, accumulation=8, lora=LoraConfig(), data=data)


def _release(stage: Stage) -> TrainConfig:
    paper = _paper(stage)
    data = dataclasses.replace(paper.data, user_targets=True)
    common = {"rows_lr": 2e-5, "min_snr": 5.0, "voken_labels": "ends", "clip": 0.0, "epochs": 2, "accumulation": 12}
    return dataclasses.replace(paper, data=data, **common)


def _gill(stage: Stage) -> TrainConfig:
    """Only the distance to the generator's encoding of the caption: finetuning needs captions too."""
    objective = {"ldm_weight": 0.0, "caption_weight": 1.0, "caption_distance": "l2", "guidance_dropout": 0.0}
    return dataclasses.replace(_paper(stage), voken_labels="first", **objective)


def _prefix(stage: Stage) -> TrainConfig:
    prefix = PrefixConfig() if stage == "finetune" else None
    return dataclasses.replace(_paper(stage), lora=None, prefix=prefix)


def _demo(stage: Stage) -> TrainConfig:
    own = {"accumulation": 1, "warmup": 100, "voken_labels": "first", "checkpointing": False}
    if stage == "pretrain":
        layers = {"encoder_layers": 2, "decoder_layers": 3}
        return TrainConfig(stage=stage, lr=1e-3, rows_lr=1e-3, caption_weight=0.1, batch=32, **layers, **own)
    return TrainConfig(stage=stage, lr=3e-4, rows_lr=1e-3, batch=16, lora=LoraConfig(dropout=0.0), **own)


PRESETS = {"paper": _paper, "release": _release, "gill": _gill, "prefix": _prefix, "demo": _demo}


def model_config_from(raw: dict[str, Any], path: str) -> ModelConfig:
    """Return the configuration stored beside a checkpoint.

    Args:
        raw: as JSON gives it; of versions before heads had names, too.
        path: of the file, for errors.

    Raises:
        Mgp5Error: fields are missing or unknown, or the head is not known.
    """
    raw = dict(raw)
    if "head_config" not in raw:
        raw["head_config"] = {name: raw.pop(name) for name in ("num_vokens", "mapper", "unconditional") if name in raw}
        raw["head_kind"] = raw.pop("diffusion_kind", "")
    kind = raw.get("head", "minigpt5")
    if kind not in HEAD_CONFIGS:
        known = ", ".join(HEAD_CONFIGS)
        raise Mgp5Error(f"{path} is of a model with the head {kind!r}, expected one of {known}", "update mgp5")
    try:
        raw["head_config"] = _from_dict(HEAD_CONFIGS[kind], raw["head_config"])
        return _from_dict(ModelConfig, raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise Mgp5Error(f"{path} is not a configuration of mgp5 ({error})", "train or copy the model again") from None


def _from_dict(kind: type, raw: dict[str, Any]) -> Any:
    """Build a dataclass of what `asdict` made of one."""
    values = dict(raw)
    for name, hint in get_type_hints(kind).items():
        kinds = [k for k in getattr(hint, "__args__", (hint,)) if dataclasses.is_dataclass(k)]
        if kinds and isinstance(values.get(name), dict):
            values[name] = _from_dict(kinds[0], values[name])
        elif isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return kind(**values)
