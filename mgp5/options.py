"""How to reply and which model to load, as plain values; and how settings are read: TOML, `--set a.b=c`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from .errors import Mgp5Error, raise_all

SAMPLERS = ("dpm++", "ddim", "euler", "pndm", "flow-euler")  # names that `generators.sampler` has tables for
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "none"}
DrawMode = Literal["auto", "always", "never"]
Memory = Literal["auto", "low", "full"]
Backend = Literal["auto", "eager", "compile", "triton", "onnx", "trt"]
Quantize = Literal["none", "4bit", "8bit", "int8", "fp8"]  # the last two: weights of LLM and denoiser, by torchao


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How a head draws an image; each head has a subclass with the options that it understands."""

    @classmethod
    def taking(cls, **values: Any) -> Self:
        """Return options with those of the values that they have a field for."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return []


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ImageOptions):
    """How a latent-diffusion model draws an image."""

    steps: int = 20  # number of denoising steps, 1 to 1000
    guidance: float | None = None  # scale of classifier-free guidance; 1 turns it off, None takes the model's own
    sampler: str = "dpm++"  # one of SAMPLERS
    guidance_until: float = 1.0  # share of the steps that are guided; below 1 is faster and gives another image
    reuse: int = 1  # run the whole UNet in one of so many steps only; above 1 is faster and gives another image
    height: int | None = None  # in pixels; None takes the generator's native size
    width: int | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return unexpected(
            self,
            steps=(1 <= self.steps <= 1000, "1 to 1000"),
            sampler=(self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            guidance=(self.guidance is None or self.guidance >= 0, "0 or more"),
            guidance_until=(0 <= self.guidance_until <= 1, "0 to 1"),
            reuse=(self.reuse >= 1, "1 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class SeedOptions(DiffusionOptions):
    """How SEED draws an image: how its codes are sampled, apart from the text, and how they are drawn."""

    code_temperature: float = 1.0  # 0 takes the most likely code
    code_top_p: float = 0.5  # nucleus sampling, in (0, 1]; that of the released scripts
    code_top_k: int = 0  # the most likely codes that may be taken; 0: all

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return super().problems() + unexpected(
            self,
            code_temperature=(self.code_temperature >= 0, "0 or more"),
            code_top_p=(0 < self.code_top_p <= 1, "above 0 and at most 1"),
            code_top_k=(self.code_top_k >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class VARGPTOptions(ImageOptions):
    """How VARGPT draws an image: how the codes of each scale are sampled (released numbers)."""

    guidance: float = 2.5  # scale of classifier-free guidance at the last scale, from 1 at the first; 1 turns it off
    code_top_k: int = 900  # the most likely codes that may be taken; 0: all
    code_top_p: float = 0.96  # nucleus sampling, in (0, 1]; the paper says 0.95

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        return unexpected(
            self,
            guidance=(self.guidance >= 0, "0 or more"),
            code_top_k=(self.code_top_k >= 0, "0 or more"),
            code_top_p=(0 < self.code_top_p <= 1, "above 0 and at most 1"),
        )


@dataclass(frozen=True, kw_only=True)
class MMInterleavedOptions(DiffusionOptions):
    """How MM-Interleaved draws an image."""

    earlier: Literal["all", "last", "none"] | None = None  # images that the UNet attends to; None: as it was trained

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one entry each."""
        known = self.earlier in (None, "all", "last", "none")
        return super().problems() + unexpected(self, earlier=(known, "all, last or none"))


# Name of a head -> class of the options that it draws with.
IMAGE_OPTIONS: dict[str, type[ImageOptions]] = {
    "minigpt5": DiffusionOptions,
    "seed": SeedOptions,
    "vargpt": VARGPTOptions,
    "mm-interleaved": MMInterleavedOptions,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reply. Raises Mgp5Error with all values that are out of range.
    Text and images have seeds of their own: another image for the same text is one number away."""

    seed: int = 0  # of the text
    image_seed: int | None = None  # of the first image of the reply, image k takes image_seed + k; None: the text's
    temperature: float | None = None  # 0 takes the most likely token; None the model's own
    top_p: float = 0.9  # nucleus sampling keeps the smallest set of tokens with this probability, in (0, 1]
    repetition_penalty: float = 1.0  # divides the logits of tokens that were generated already; never of image tokens
    max_tokens: int = 256  # of text in one reply; with 0 and draw="always" the reply is an image alone
    max_images: int = 8  # in one reply
    stop: tuple[str, ...] = ()  # texts that end a reply, beside the model's own, and are no part of it
    draw: DrawMode = "auto"  # "auto" lets the model decide, "always" adds an image if it made none
    image: ImageOptions = field(default_factory=DiffusionOptions)  # options of the head that draws

    def __post_init__(self) -> None:
        problems = unexpected(
            self,
            temperature=(self.temperature is None or self.temperature >= 0, "0 or more"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
            repetition_penalty=(self.repetition_penalty > 0, "above 0"),
            max_tokens=(self.max_tokens >= 0, "0 or more"),
            max_images=(self.max_images >= 0, "0 or more"),
            stop=(all(self.stop), "texts of one character or more"),
        )
        if self.draw not in get_args(DrawMode):
            problems.append(f"image is {self.draw}, expected {', '.join(get_args(DrawMode))}")
        raise_all(problems + self.image.problems())

    def flat(self) -> dict[str, Any]:
        """Return all options under one level of names, as files and metadata have them; `draw` is "image" there."""
        left_out = ("draw", "image", *(() if self.stop else ("stop",)))
        text = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return text | {"image": self.draw} | asdict(self.image)

    def updated(self, values: Mapping[str, Any]) -> Options:
        """Return a copy with some options replaced. Raises Mgp5Error for an unknown name or a wrong value.

        Args:
            values: by flat names ("steps"), or those of the image in a table ({"image": {"steps": 8}}), as
                `--set image.steps=8` gives them; "image" with a word is `draw`.
        """
        text, of_image = dict(values), {f.name for f in fields(self.image)}
        image = {name: text.pop(name) for name in values.keys() & of_image}
        nested = text.pop("image", {})
        if isinstance(nested, Mapping):
            image |= nested
        else:
            text["draw"] = nested
        if unknown := sorted(text.keys() - {f.name for f in fields(self)}):
            names = ", ".join(self.flat() | {"stop": ()})
            raise Mgp5Error(f"no setting {', '.join(unknown)}", f"this model's are {names}", usage=True)
        return override(self, text | {"image": image})


def reply_options(kind: type[ImageOptions] = DiffusionOptions, /, **values: Any) -> Options:
    """Return Options from flat names, see `Options.updated`; `kind` is the class of the head's image options."""
    return Options(image=kind()).updated(values)


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Which model to load, and how to hold and run it."""

    model: str = "demo"  # a name, a hub id, MLLM+GENERATOR, or the folder of a model
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    backend: Backend = "auto"  # what runs the denoiser, see `mgp5.engines`
    exported: Path | None = None  # a folder that `mgp5 export` wrote, for the backends onnx and trt
    memory: Memory = "auto"  # on a GPU, "low" saves all it can, "auto" what it must
    quantize: Quantize = "none"  # see `backbones.quantization`

    def given(self) -> dict[str, str]:
        """Return what images depend on beside their options, where it is not the default: for the record."""
        named = {name: str(getattr(self, name)) for name in ("backend", "exported", "quantize")}
        return {name: value for name, value in named.items() if value not in ("auto", "None", "none")}


def unexpected(values: Any, **rules: tuple[bool, str]) -> list[str]:
    """Return a line for each value that is wrong; a rule is whether the value of its name is right, and what is."""
    return [
        f"{name} is {getattr(values, name)}, expected {expected}"
        for name, (right, expected) in rules.items()
        if not right
    ]


def override(config: Any, settings: dict[str, Any]) -> Any:
    """Return a copy of a dataclass with some values replaced; a nested one takes a dictionary ({"lora": {"rank": 4}}).
    Raises Mgp5Error if a field does not exist, or a value has the wrong type."""
    hints = get_type_hints(type(config))
    if unknown := sorted(settings.keys() - hints.keys()):
        known = ", ".join(hints)
        raise Mgp5Error(f"no setting {', '.join(unknown)}", f"the settings are {known}", usage=True)
    values = {}
    for name, value in settings.items():
        old = getattr(config, name)
        if isinstance(value, dict):
            kinds = [kind for kind in kinds_of(hints[name]) if is_dataclass(kind)]
            if not kinds:
                raise Mgp5Error(f"{name} has no settings of its own", f"give {name} a value", usage=True)
            values[name] = override(kinds[0]() if old is None else old, value)
        else:
            values[name] = _convert(name, value, hints[name])
    return replace(config, **values)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the choices of a Literal; of other annotations themselves."""
    return get_args(hint) or (hint,)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return a value of TOML or JSON as a field takes it. Raises Mgp5Error if it has another type."""
    kinds = set(kinds_of(hint))
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
    elif any(map(is_dataclass, kinds)):
        expected = "" if value is None else f"settings of its own, as in {name}.NAME=VALUE"
    elif simple and len(simple) == len(kinds) and type(value) not in simple:
        expected = " or ".join(words for kind, words in WORDS.items() if kind in simple)
    if expected:
        raise Mgp5Error(f"{name} is {value!r}, expected {expected}", "correct its value", usage=True)
    return value


def parse_settings(items: tuple[str, ...]) -> dict[str, Any]:
    """Parse `--set a.b=c` items to nested dictionaries; a value is TOML, or text if it is not valid TOML.
    Raises Mgp5Error if an item is not of this form, or two items contradict each other."""
    import tomllib  # here, and in `read_toml`: every --help would wait for it

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
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Mgp5Error(f"cannot read {path} ({error.strerror})", "check the path", usage=True) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Mgp5Error(f"{path} is not valid TOML ({error})", "correct it", usage=True) from None
