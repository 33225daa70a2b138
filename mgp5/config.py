"""Configurations of models and of training as frozen dataclasses; each head has a subclass of its own settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import Mgp5Error, raise_all
from .options import Quantize
from .prompts import CHAT_SYSTEM, Context

VokenLabels = Literal["all", "first", "ends"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MapperKind = Literal["encoder-decoder", "decoder-only"]


def unknown_words(config: Any) -> list[str]:
    """Return a line for each field whose value is none of its Literal."""
    hints = {name: get_args(hint) for name, hint in get_type_hints(type(config)).items() if get_origin(hint) is Literal}
    found = {name: getattr(config, name) for name in hints}
    return [f"{k} is {v}, expected {' or '.join(hints[k])}" for k, v in found.items() if v not in hints[k]]


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """The shape of a FeatureMapper; the defaults are the paper's (arXiv 2310.02239, section 3.2)."""

    llm_width: int  # D, width of the LLM's hidden states (4096 for a 7B LLaMA)
    width: int  # C, width of the generator's condition (1024 for Stable Diffusion 2.1)
    queries: int = 77  # L, length of the condition
    encoder_layers: int = 4  # transformer layers over the vokens
    decoder_layers: int = 4  # transformer layers over the queries
    heads: int = 8  # attention heads; must divide the width of the transformer
    ffn_ratio: int = 4  # hidden width of the feed-forward layers, in units of the transformer's width
    inner: int = 0  # width of the transformer, with an output projection to C; 0: its width is C, without a projection
    pooled: int = 0  # width of the pooled vector in the last row (2048 for Stable Diffusion 3), 0 without one
    # "decoder-only" is the paper's ablation (table 7): causal layers over the vokens only, padded with zeros to L rows.
    kind: MapperKind = "encoder-decoder"

    def __post_init__(self) -> None:
        least = dict.fromkeys(("inner", "pooled"), 0)
        problems = [
            f"{name} is {value}, expected at least {least.get(name, 1)}"
            for name, value in vars(self).items()
            if isinstance(value, int) and value < least.get(name, 1)
        ]
        if self.heads >= 1 and self.transformer_width % self.heads:
            problems.append(f"width {self.transformer_width} is not a multiple of heads {self.heads}")
        if self.pooled > self.width:
            problems.append(f"pooled {self.pooled} is more than width {self.width}")
        if self.kind == "decoder-only" and self.pooled:
            problems.append("a decoder-only mapper has no pooled vector")
        raise_all(f"mapper: {problem}" for problem in problems + unknown_words(self))

    @property
    def transformer_width(self) -> int:
        """The width of the transformer."""
        return self.inner or self.width


@dataclass(frozen=True, kw_only=True)
class MiniGPT5Config:
    """The configuration of the head of MiniGPT-5."""

    num_vokens: int = 8  # K, 1 to 16
    mapper: MapperConfig
    # Source of the unconditional condition: the mapper at zeros, or the generator's encoding of the empty text, for a
    # model trained without guidance dropout (the paper's ablation, section 4.4).
    unconditional: Literal["mapper", "text"] = "mapper"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a model; stored beside its trained weights and checked when it is loaded."""

    mllm: str  # LLM and generator, as hub ids or folders (relative ones are in the model's folder)
    diffusion: str
    head: str = "minigpt5"  # a key of `heads.HEADS`
    head_config: Any
    guidance: float = 7.5  # defaults of this model (the paper's are 7.5 and 1)
    temperature: float = 1.0
    # Of a context image, for LLMs whose slots grow with its size: 576 slots of Qwen2.5-VL, 441 of Qwen3-VL.
    max_pixels: int = 672 * 672
    narrate_from: Context = "full"  # history in prompts of narrations; small models narrate better without it
    history: int | None = (
        None  # messages before a reply that dialogues of its training had, and a chat shows; None: all
    )
    mllm_kind: str = ""  # type, layers, width and vocabulary of the LLM it was trained with; "" in old checkpoints
    head_kind: str = ""  # `Head.description` of the frozen parts that the head was trained with
    lora: LoraConfig | None = None  # adapter of the LLM, at most one
    prefix: PrefixConfig | None = None
    stage: str | None = None  # last stage that trained it
    bare_captions: bool = False  # as `DataConfig` had them in the stages that trained it
    history: int | None = None
    system: str = CHAT_SYSTEM  # system text of conversations that have none of their own
    world: str = ""  # the only one that it knows, see `apps.world`; training on other data removes the name


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA on the LLM (Hu et al., arXiv 2106.09685); MiniGPT-5 has rank 8, alpha 16 on query and value projections."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.targets:
            values = f"rank {self.rank}, dropout {self.dropout} and targets {', '.join(self.targets) or 'none'}"
            hint = "expected a rank of at least 1, a dropout of 0 or more and below 1, and at least one target"
            raise Mgp5Error(f"lora has {values}", hint, usage=True)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prefix tuning of the LLM (Li & Liang, arXiv 2101.00190): keys and values of virtual tokens in every layer."""

    tokens: int = 5
    hidden: int = 1024  # width of the MLP that computes them

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 1:
            values = f"prefix has {self.tokens} tokens and hidden width {self.hidden}"
            raise Mgp5Error(values, "expected at least 1 of both", usage=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How training samples are built from the data; see the loaders of the formats."""

    instruct_every: int = 100  # CC3M and shards: one of so many rows is repeated as an instruction; 0: none
    bare_captions: bool = False  # CC3M and shards: captions without the chat template, as the papers and the release
    caption_column: str | None = (
        None  # CC3M, tables: name of the column; shards: suffix of the member, as "outputs.txt"
    )
    image_column: str | None = None
    tasks: tuple[str, ...] = ("illustrate", "continue", "narrate")  # VIST, and stories of jsonl
    context: Context = "full"  # VIST: how much of the history the prompts have
    narrate_first: bool = False  # VIST: the first image of a story is narrated too
    history: int | None = None  # MMDialog: utterances before the answer; None: all
    user_targets: bool = False  # MMDialog: the turns of both speakers are targets
    turn_tokens: int | None = None  # MMDialog: a dialogue ends before a turn with more tokens; None: no limit
    max_pixels: int | None = None  # of a context image; None: `ModelConfig.max_pixels` of the model
    # Samples of a microbatch one behind another: with positions and self-attention of their own, in rows with the least
    # padding ("isolated"), or with those of the row, in as few as hold them, as MM-Interleaved's release ("plain").
    pack: Literal["none", "isolated", "plain"] = "none"

    def __post_init__(self) -> None:
        problems = unknown_words(self)
        if self.max_pixels is not None and self.max_pixels < 1:
            problems.append(f"max_pixels is {self.max_pixels}, expected at least 1")
        raise_all(f"data: {problem}" for problem in problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one stage is trained, for any head; see `training.presets`. Raises Mgp5Error that names all bad values.

    A loss of weight 0 is not computed. Checkpoints store the moving average instead of the weights, where there is one.
    """

    stage: str  # name of one of `Head.stages`
    lr: float  # peak learning rate of the head and the adapter
    rows_lr: float  # of the new tokens' rows of embedding and LM head, which have no weight decay
    text_weight: float = 0.01
    guidance_dropout: float = 0.1  # probability that an image is trained without its condition
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW, and what its divisor has added
    eps: float = 1e-8
    clip: float = 1.0  # norm to which gradients are clipped; 0: they are not
    batch: int = 4  # samples of a microbatch on one device
    accumulation: int = 12  # microbatches of one update
    epochs: int = 2
    steps: int | None = None  # number of updates, instead of epochs
    schedule: Literal["linear", "cosine"] = "linear"  # decay of the learning rate to zero
    warmup: int = 1000  # updates of linear growth before
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # in 8 bits: extra `quant`, GPU only
    ema: float = 0.0  # decay of a moving average of the trained weights; 0: none
    whole_llm: bool = False  # merge the adapter, then train the whole LLM but its embeddings
    lora: LoraConfig | None = None  # adapter of the LLM in stages that may have one; at most one
    prefix: PrefixConfig | None = None
    data: DataConfig = DataConfig()
    seed: int = 42
    log_every: int = 10  # updates between rows of log.jsonl
    save_every: int = 500  # between checkpoints
    keep: int = 2  # checkpoints
    sample_every: int = 0  # updates between pages of samples; 0: none
    trackers: tuple[str, ...] = ()  # of Accelerate ("tensorboard", "trackio"), beside log.jsonl
    workers: int | None = None  # processes that read data; None: by the cores where a GPU trains, else 0
    precision: Precision = "auto"  # of the computation (see `device.pick_precision`); trained weights stay in float32
    quantize: Quantize = "none"  # of the frozen LLM; extra `quant`
    checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory

    def __post_init__(self) -> None:
        at_least_0 = ("warmup", "workers", "sample_every", "clip", "rows_lr")
        counts = ("batch", "accumulation", "epochs", "log_every", "save_every", "keep", "steps", "generator_batch")
        ranges = {
            "0 or more and below 1": (lambda value: 0 <= value < 1, ("guidance_dropout", "ema")),
            "at least 1": (lambda value: value is None or value >= 1, counts),
            "0 or more": (lambda value: value is None or value >= 0, at_least_0),
            "above 0": (lambda value: value > 0, ("lr", "eps")),
            "two of 0 or more and below 1": (lambda value: all(0 <= beta < 1 for beta in value), ("betas",)),
        }
        problems = [
            f"{name} is {getattr(self, name)}, expected {rule}"
            for rule, (fits, names) in ranges.items()
            for name in names
            if not fits(getattr(self, name, None))  # not all heads have all of them
        ]
        if self.whole_llm and (self.lora or self.prefix or self.quantize != "none"):
            problems.append("whole_llm is set beside an adapter or a quantised LLM, expected it alone")
        if self.lora and self.prefix:
            problems.append("lora and prefix are both given, expected one adapter")
        raise_all(problems + unknown_words(self))

    @property
    def shape(self) -> dict[str, Any]:
        """Return the settings that shape a fresh head, as `Head.configure` takes them."""
        return {}

    @property
    def captions_alone(self) -> bool:
        """Return whether nothing but captions trains the head: data without any is refused."""
        return False


@dataclass(frozen=True, kw_only=True)
class MiniGPT5TrainConfig(TrainConfig):
    """The settings of the head of MiniGPT-5: its losses, and the shape of a fresh mapper (see MapperConfig)."""

    ldm_weight: float = 1.0
    caption_weight: float = 0.0
    voken_labels: VokenLabels = "all"  # with a text loss: all (eq. 1), or first, or first and last (released code)
    caption_distance: Literal["mse", "l2"] = "mse"  # eq. 4, or the mean distance of rows of GILL (arXiv 2305.17216)
    min_snr: float | None = None  # gamma of the min-SNR weights of the LDM loss
    generator_batch: int = 4  # target images that the frozen generator takes at a time, of those of a microbatch
    train_queries: bool = True  # False is the paper's ablation with fixed queries
    num_vokens: int = 8  # of an image, 1 to 16; as the others below, of a new model
    encoder_layers: int = 4
    decoder_layers: int = 4
    inner: int | None = None  # None is 1024 for generators with a condition wider than 2048, else 0
    kind: MapperKind = "encoder-decoder"

    @property
    def shape(self) -> dict[str, Any]:
        """Return the number of vokens and the layers of the mapper."""
        names = ("num_vokens", "encoder_layers", "decoder_layers", "inner", "kind")
        return {name: getattr(self, name) for name in names}

    @property
    def captions_alone(self) -> bool:
        """Return whether there is a caption loss and no LDM loss."""
        return bool(self.caption_weight and not self.ldm_weight)
