"""Make an ordinary LLaVA folder of what VARGPT's authors published, and a decoder to begin with of a VAR.

Certain of VARGPT-LLaVA v1: its LLM, vision tower and projector have the names of LLaVA-1.5 in transformers 4.46, and
its configuration the fields of LlavaConfig (vargpt_llava/modeling_vargpt_llava.py and its configuration). No file was
opened here: that its tokenizer has the three words of images, and that its image processor is CLIP's, is expected.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig

from ..backbones.processors import load_tokenizer
from ..errors import Mgp5Error
from ..files import read_json, write_json
from ..generators.var import VARConfig
from .vargpt import TOKENS

HINT = "give the folder of VARGPT-LLaVA v1, as it was downloaded"
OWN = ("vargpt_gen.", "vae_local.", "image_gen_projector")  # names of what generates images
KEPT = (".json", ".jinja", ".model", ".txt")  # suffixes of files of a tokenizer and a processor


def is_vargpt(folder: Path) -> bool:
    """Return whether a folder holds VARGPT-LLaVA v1."""
    return (folder / "config.json").is_file() and "vargpt" in read_json(folder / "config.json", HINT).get(
        "model_type", ""
    )


def write_llava(folder: Path, out: Path) -> None:
    """Write the LLaVA inside VARGPT-LLaVA v1 as transformers reads one.
    Raises Mgp5Error if the tokenizer lacks the words of images, whose rows the LLM was trained with."""
    words = load_tokenizer(folder).get_vocab()
    if missing := [word for word in TOKENS if word not in words]:
        raise Mgp5Error(f"the tokenizer of {folder} lacks {' and '.join(missing)}", HINT)
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.suffix in KEPT and path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    config, known = read_json(folder / "config.json", HINT), LlavaConfig().to_dict()
    kept = {name: value for name, value in config.items() if name in known or name == "image_token_index"}
    write_json(out / "config.json", kept | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys() if not n.startswith(OWN)}  # noqa: SIM118
        if tensors:
            save_file(tensors, out / path.name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, path.name)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def begin_decoder(config: VARConfig, state: dict[str, Tensor]) -> tuple[VARConfig, dict[str, Tensor]]:
    """Return a VAR's decoder for VARGPT: of its classes the mean is left, which the start token has, and the dropped
    one."""
    classes = state["class_embed.weight"]
    few = torch.stack([classes[:-1].mean(0), classes[-1]])
    return replace(config, num_classes=1), state | {"class_embed.weight": few}
