"""Configurations: frozen values with TOML in, JSON out and `--set a.b=c`; presets are functions."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from .errors import Mgp5Error
from .mapper import MapperConfig

Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a checkpoint was trained with; stored beside its weights and checked when it is loaded.

    Args:
        mllm, diffusion: hub ids, or folders (relative ones lie in the model's folder).
        num_vokens: n, 1 to 16.
        mapper: shape of the feature mapper.
        guidance, temperature: defaults of this model where the user gives none (the paper's are 7.5 and 1).
        narrate_from: how much of the history a story's narration sees; a small model tells a picture better by itself.
        diffusion_kind: class, prediction type and condition shape of the generator that the mapper was trained for.
        lora: rank, alpha and target modules of the adapter, or None.
        stage: the last stage that trained it.
    """

    mllm: str
    diffusion: str
    num_vokens: int = 8
    mapper: MapperConfig
    guidance: float = 7.5
    temperature: float = 1.0
    narrate_from: Literal["full", "text", "none"] = "full"
    diffusion_kind: str = ""
    lora: LoraConfig | None = None
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
class TrainConfig:
    """How one stage is trained; the defaults are the paper's numbers for the stage, see `preset`.

    Args:
        lr: peak learning rate of mapper, queries and adapter.
        rows_lr: of the voken rows of embedding and LM head; no weight decay on them.
        text_weight, ldm_weight, caption_weight: of the three losses.
        guidance_dropout: probability that a picture's voken states are replaced by zeros before the mapper.
        min_snr: gamma of the min-SNR weights of the LDM loss; None leaves it plain.
        batch, accumulation: samples of a step on one device, and steps of one update.
        steps: updates in all; None: `epochs` passes over the data.
        warmup: updates of linear warm-up, then linear decay to zero.
        encoder_layers, decoder_layers: of a fresh mapper; without effect on a trained one.
        precision: of the computation; weights that train stay in float32.
    """

    stage: Stage
    lr: float
    rows_lr: float
    text_weight: float = 0.01
    ldm_weight: float = 1.0
    caption_weight: float = 0.0
    guidance_dropout: float = 0.1
    min_snr: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    batch: int = 4
    accumulation: int = 12
    epochs: int = 2
    steps: int | None = None
    warmup: int = 1000
    lora: LoraConfig | None = None
    encoder_layers: int = 4
    decoder_layers: int = 4
    seed: int = 42
    log_every: int = 10
    save_every: int = 500
    workers: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected {expected}"
            for name, good, expected in (
                ("stage", self.stage in ("pretrain", "finetune"), "pretrain or finetune"),
                ("guidance_dropout", 0 <= self.guidance_dropout < 1, "0 or more and below 1"),
                ("batch", self.batch >= 1, "at least 1"),
                ("accumulation", self.accumulation >= 1, "at least 1"),
                ("lr", self.lr > 0, "above 0"),
                ("rows_lr", self.rows_lr >= 0, "0 or more"),
                ("epochs", self.epochs >= 1, "at least 1"),
                ("steps", self.steps is None or self.steps >= 1, "at least 1"),
                ("warmup", self.warmup >= 0, "0 or more"),
                ("log_every", self.log_every >= 1, "at least 1"),
                ("save_every", self.save_every >= 1, "at least 1"),
                ("workers", self.workers >= 0, "0 or more"),
                ("precision", self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            )
            if not good
        ]
        if problems:
            raise Mgp5Error("; ".join(problems), "correct the training configuration", usage=True)


def preset(stage: Stage, name: str = "paper") -> TrainConfig:
    """The numbers of a stage: `paper` as printed (batch 48 and 32 in all), `demo` for the tiny model."""
    if stage not in ("pretrain", "finetune"):
        raise Mgp5Error(f"unknown stage {stage!r}", "expected pretrain or finetune", usage=True)
    presets = {
        ("paper", "pretrain"): TrainConfig(stage="pretrain", lr=2e-4, rows_lr=2e-4, caption_weight=0.1),
        ("paper", "finetune"): TrainConfig(
            stage="finetune", lr=2e-5, rows_lr=2e-5, epochs=4, accumulation=8, lora=LoraConfig()
        ),
        ("demo", "pretrain"): TrainConfig(
            stage="pretrain",
            lr=1e-3,
            rows_lr=1e-3,
            caption_weight=0.1,
            batch=32,
            accumulation=1,
            warmup=100,
            encoder_layers=2,
            decoder_layers=3,
        ),
        ("demo", "finetune"): TrainConfig(
            stage="finetune", lr=3e-4, rows_lr=1e-3, batch=16, accumulation=1, warmup=100, lora=LoraConfig(dropout=0.0)
        ),
    }
    if (name, stage) not in presets:
        known = sorted({key for key, _ in presets})
        raise Mgp5Error(f"unknown preset {name!r}", f"expected one of {', '.join(known)}", usage=True)
    return presets[name, stage]


def override(config: Any, settings: dict[str, Any]) -> Any:
    """A copy of a configuration with some values replaced; nested ones are tables ({"lora": {"rank": 4}})."""
    hints = get_type_hints(type(config))
    if unknown := sorted(settings.keys() - hints.keys()):
        known = ", ".join(hints)
        raise Mgp5Error(f"no setting {', '.join(unknown)}", f"the settings are {known}", usage=True)
    values = {}
    for name, value in settings.items():
        old = getattr(config, name)
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(old):
                raise Mgp5Error(f"{name} has no settings of its own", f"give {name} a value", usage=True)
            values[name] = override(old, value)
        else:
            values[name] = _convert(name, value, hints[name])
    return dataclasses.replace(config, **values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    kinds = set(getattr(hint, "__args__", (hint,)))
    if isinstance(value, list):
        value = tuple(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    simple = {k for k in kinds if k in (int, float, str, bool, type(None))}
    expected = ""
    if get_origin(hint) is tuple:
        expected = "" if isinstance(value, tuple) else "a list"
    elif any(map(dataclasses.is_dataclass, kinds)):
        expected = "" if value is None else f"settings of its own, as in {name}.NAME=VALUE"
    elif simple and len(simple) == len(kinds) and type(value) not in simple:
        expected = " or ".join(sorted(k.__name__ for k in simple))
    if expected:
        raise Mgp5Error(f"{name} is {value!r}, expected {expected}", "correct its value", usage=True)
    return value


def parse_settings(items: tuple[str, ...]) -> dict[str, Any]:
    """`--set a.b=c` items -> nested tables; values are read as TOML, and as text where that fails."""
    tree: dict[str, Any] = {}
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise Mgp5Error(f"--set {item!r} is not of the form name=value", "write it like --set lr=1e-4", usage=True)
        try:
            value = None if text == "none" else tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *tables, name = path.strip().split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise Mgp5Error(f"--set gives {table} a value, and {path.strip()} too", "keep one of them", usage=True)
        node[name] = value
    return tree


def read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file. Raises Mgp5Error that names the file and line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mgp5Error(f"cannot read {path} ({error.strerror})", "check the path", usage=True) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Mgp5Error(f"{path} is not valid TOML ({error})", "correct it", usage=True) from None


def model_config_from(raw: dict[str, Any], place: str) -> ModelConfig:
    """The configuration stored beside a checkpoint. Raises Mgp5Error when fields are missing or unknown."""
    try:
        lora = raw.get("lora")
        nested = {
            "mapper": MapperConfig(**raw["mapper"]),
            "lora": LoraConfig(**{**lora, "targets": tuple(lora["targets"])}) if lora else None,
        }
        return ModelConfig(**{**raw, **nested})
    except (KeyError, TypeError, AttributeError) as error:
        raise Mgp5Error(f"{place} is not a configuration of mgp5 ({error})", "train or copy the model again") from None
