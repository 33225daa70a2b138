"""How to reply and which model to load, as plain values; and how settings are read: TOML, `--set a.b=c`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from .errors import Mgp5Error

SAMPLERS = ("dpm++", "ddim", "euler", "pndm", "flow-euler")  # names that `generators.sampler` has tables for
DrawMode = Literal["auto", "always", "never"]
Memory = Literal["auto", "low", "full"]
Backend = Literal["auto", "eager", "compile", "triton", "onnx", "trt"]
Quantize = Literal["none", "4bit", "8bit"]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How a head draws an image; each head has a subclass with the options that it understands."""

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return []


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ImageOptions):
    """How a latent-diffusion model draws an image.

    Args:
        steps: number of denoising steps, 1 to 1000.
        guidance: scale of classifier-free guidance; 1 turns it off, None takes the model's own.
        sampler: one of SAMPLERS.
        guidance_until: share of the steps that are guided, in [0, 1]; below 1 is faster and gives another image.
        reuse: run the whole UNet in one of so many steps only; above 1 is faster and gives another image.
        height, width: in pixels; None takes the generator's native size.
    """

    steps: int = 20
    guidance: float | None = None
    sampler: str = "dpm++"
    guidance_until: float = 1.0
    reuse: int = 1
    height: int | None = None
    width: int | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return _unexpected(
            self,
            ("steps", 1 <= self.steps <= 1000, "1 to 1000"),
            ("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("guidance", self.guidance is None or self.guidance >= 0, "0 or more"),
            ("guidance_until", 0 <= self.guidance_until <= 1, "0 to 1"),
            ("reuse", self.reuse >= 1, "1 or more"),
        )


# Name of a head -> class of the options that it draws with.
IMAGE_OPTIONS: dict[str, type[ImageOptions]] = {"minigpt5": DiffusionOptions}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reply. Text and images have seeds of their own: another image for the same text is one number away.

    Args:
        seed: of the text.
        image_seed: of the first image of the reply; image k takes image_seed + k. None: the text's seed.
        temperature: 0 takes the most likely token; None the model's own.
        top_p: nucleus sampling keeps the smallest set of tokens with this probability, in (0, 1].
        repetition_penalty: divides the logits of tokens that were generated already (1 = off); never of image tokens.
        max_tokens: of text in one reply; with 0 and draw="always" the reply is an image alone.
        max_images: in one reply.
        draw: "auto" lets the model decide, "always" adds an image if it made none, "never" forbids images.
        image: options of the head that draws.

    Raises:
        Mgp5Error: values out of range; all of them are named.
    """

    seed: int = 0
    image_seed: int | None = None
    temperature: float | None = None
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    max_images: int = 8
    draw: DrawMode = "auto"
    image: ImageOptions = field(default_factory=DiffusionOptions)

    def __post_init__(self) -> None:
        problems = _unexpected(
            self,
            ("temperature", self.temperature is None or self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("max_images", self.max_images >= 0, "0 or more"),
            ("image", self.draw in ("auto", "always", "never"), "auto, always or never"),
        )
        if problems := problems + self.image.problems():
            raise Mgp5Error("; ".join(problems), "change these options", usage=True)

    def flat(self) -> dict[str, Any]:
        """Return all options under one level of names, as files and metadata have them; `draw` is "image" there."""
        text = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("draw", "image")}
        return text | {"image": self.draw} | asdict(self.image)

    def updated(self, values: Mapping[str, Any]) -> Options:
        """Return a copy with some options replaced.

        Args:
            values: by flat names ("steps"), or those of the image in a table ({"image": {"steps": 8}}), as
                `--set image.steps=8` gives them; "image" with a word is `draw`.

        Raises:
            Mgp5Error: an unknown name, or a value of another type or out of range.
        """
        nested = values.get("image", {})
        text = {name: value for name, value in values.items() if name != "image"}
        names = {f.name for f in fields(self.image)}
        image = {name: text.pop(name) for name in [*text] if name in names}
        if isinstance(nested, Mapping):
            image |= nested
        else:
            text["draw"] = nested
        changed = override(self.image, image) if image else self.image
        return replace(override(self, text), image=changed) if text else replace(self, image=changed)


def reply_options(kind: type[ImageOptions] = DiffusionOptions, /, **values: Any) -> Options:
    """Return Options from flat names, such as `reply_options(seed=7, steps=8)`.

    Args:
        kind: the image options of the model's head.
        values: see `Options.updated`.
    """
    return Options(image=kind()).updated(values)


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Which model to load, and how to hold and run it.

    Args:
        model: a name, a hub id, MLLM+GENERATOR, or the folder of a model.
        device: auto, cpu, cuda or cuda:N.
        backend: what runs the denoiser, see `mgp5.engines`.
        exported: a folder that `mgp5 export` wrote, for the backends onnx and trt.
        memory: on a GPU, "low" saves all it can, "auto" what it must.
        quantize: bits of the LLM's layers.
    """

    model: str = "demo"
    device: str = "auto"
    backend: Backend = "auto"
    exported: Path | None = None
    memory: Memory = "auto"
    quantize: Quantize = "none"

    def given(self) -> dict[str, str]:
        """Return what images depend on beside their options, where it is not the default: for the record."""
        named = {name: str(getattr(self, name)) for name in ("backend", "exported", "quantize")}
        return {name: value for name, value in named.items() if value not in ("auto", "None", "none")}


def _unexpected(values: Any, *rules: tuple[str, bool, str]) -> list[str]:
    named = {"image": "draw"}
    return [
        f"{name} is {getattr(values, named.get(name, name))}, expected {expected}"
        for name, good, expected in rules
        if not good
    ]


def override(config: Any, settings: dict[str, Any]) -> Any:
    """Return a copy of a configuration with some values replaced.

    Args:
        config: a dataclass.
        settings: new values by field name; a nested dataclass takes a dictionary ({"lora": {"rank": 4}}).

    Raises:
        Mgp5Error: a field does not exist, or a value has the wrong type.
    """
    hints = get_type_hints(type(config))
    if unknown := sorted(settings.keys() - hints.keys()):
        known = ", ".join(hints)
        raise Mgp5Error(f"no setting {', '.join(unknown)}", f"the settings are {known}", usage=True)
    values = {}
    for name, value in settings.items():
        old = getattr(config, name)
        if isinstance(value, dict):
            kinds = [
                kind for kind in getattr(hints[name], "__args__", (hints[name],)) if dataclasses.is_dataclass(kind)
            ]
            if not kinds:
                raise Mgp5Error(f"{name} has no settings of its own", f"give {name} a value", usage=True)
            values[name] = override(kinds[0]() if old is None else old, value)
        else:
            values[name] = _convert(name, value, hints[name])
    return dataclasses.replace(config, **values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    kinds = set(getattr(hint, "__args__", (hint,)))
    if isinstance(value, list):
        value = tuple(value)
    if value is None and "none" in kinds:  # the word itself is one of the choices
        value = "none"
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
    """Parse `--set a.b=c` items to nested dictionaries; a value is TOML, or text if it is not valid TOML.

    Raises:
        Mgp5Error: an item is not of this form, or two items contradict each other.
    """
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
    """Read the settings of a TOML file. Raises Mgp5Error with file and line if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mgp5Error(f"cannot read {path} ({error.strerror})", "check the path", usage=True) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Mgp5Error(f"{path} is not valid TOML ({error})", "correct it", usage=True) from None
