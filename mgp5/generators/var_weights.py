"""Read the published weights of VAR and VARGPT under the names that `vqvae` and `var` give them.

Certain, as the public module definitions say so (FoundationVision/VAR: models/vqvae.py, basic_vae.py, quant.py, var.py,
basic_var.py; VARGPT-family/VARGPT: vargpt_llava/modeling_vargpt_llava.py): all names and shapes that are read here, of
vae_ch160v4096z32.pth and var_d30.pth, which the release loads strictly, and of VARGPT-LLaVA v1's modules `vae_local`,
`vargpt_gen`, `image_gen_projector` and `image_gen_projector_out`. Not seen: the files themselves. Whether the shards of
VARGPT-LLaVA v1 hold `vae_local` is not certain, so that `read_vargpt` does without it. Its LLM and vision tower have
the names of LLaVA-1.5 in transformers 4.46.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..backbones.minigpt4 import read_state
from ..errors import Mgp5Error
from .var import VARConfig, VARDecoder
from .vqvae import VQVAE, VQVAEConfig

State = dict[str, Tensor]
PATCH_NUMS = VQVAEConfig().patch_nums
HINT = "give vae_ch160v4096z32.pth, var_d30.pth or the folder of VARGPT-LLaVA v1"

VQVAE_NAMES = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"^quantize\.embedding\.", "quantizer.codebook."),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phis."),
)
VAR_NAMES = (
    (r"^class_emb\.", "class_embed."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^pos_1LC$", "positions"),
    (r"^pos_start$", "start_positions"),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.ffn\.fc1\.", ".mlp.0."),
    (r"\.ffn\.fc2\.", ".mlp.2."),
    (r"\.attn\.proj\.", ".attention.to_out."),
    (r"\.attn\.q_bias$", ".attention.to_q.bias"),
    (r"\.attn\.v_bias$", ".attention.to_v.bias"),
    (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."),
)
# Statistics of training, and constants that follow from the configuration.
UNUSED = re.compile(r"ema_vocab_hit_SV$|lvl_1L$|attn_bias_for_masking$|zero_k_bias$")
FIRST_AXIS = re.compile(r"^pos_1LC$|^pos_start$|scale_mul_1H11$")  # has a first axis of length 1, which is left out


class VARGPTWeights(NamedTuple):
    """The part of VARGPT that generates images."""

    var: tuple[VARConfig, State]
    vqvae: tuple[VQVAEConfig, State] | None  # None where the shards have none: it is VAR's, unchanged
    projectors: dict[str, State]  # "in" and "out": norm, mlp.0, mlp.2; the released forward does not apply the norm


def read_vqvae(path: Path, patch_nums: tuple[int, ...] = PATCH_NUMS) -> tuple[VQVAEConfig, State]:
    """Read VAR's image tokenizer, vae_ch160v4096z32.pth; its file does not tell the sides of the scales' maps.
    Raises Mgp5Error if it cannot be read, or holds something else."""
    return _vqvae(_read(path), path, patch_nums)


def read_var(path: Path) -> tuple[VARConfig, State]:
    """Read a VAR with AdaLN layers of its own in each block, as var_d30.pth. Raises Mgp5Error as `read_vqvae`."""
    return _var(_read(path), path)


def read_vargpt(folder: Path) -> VARGPTWeights:
    """Read the safetensors files of VARGPT-LLaVA v1, without LLM and vision tower. Raises Mgp5Error as `read_vqvae`.
    Of the class embeddings only those of the start token and of the dropped class are kept, the last two."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= _read(file, ("vae_local.", "vargpt_gen.", "image_gen_projector"))
    var = _below(state, "vargpt_gen.")
    if "class_emb.weight" in var:
        var["class_emb.weight"] = var["class_emb.weight"][-2:]
    config, tensors = _var(var, folder)
    vae = _below(state, "vae_local.")
    projectors = {"in": _below(state, "image_gen_projector."), "out": _below(state, "image_gen_projector_out.")}
    projectors = {
        key: {name.replace("ln_q.", "norm."): value for name, value in part.items()} for key, part in projectors.items()
    }
    if missing := [f"projector {key!r}" for key, part in projectors.items() if "mlp.2.weight" not in part]:
        raise Mgp5Error(f"{folder} holds no {' and no '.join(missing)}, expected VARGPT-LLaVA", HINT)
    return VARGPTWeights((config, tensors), _vqvae(vae, folder, config.patch_nums) if vae else None, projectors)


def _read(path: Path, prefixes: tuple[str, ...] = ("",)) -> State:
    """Read the tensors of a .safetensors or .pth file whose names start with one of the prefixes."""
    if path.suffix != ".safetensors":
        return read_state(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Mgp5Error(f"cannot read {path} ({error})", HINT) from None


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _vqvae(state: State, path: Path, patch_nums: tuple[int, ...]) -> tuple[VQVAEConfig, State]:
    blocks = [f"encoder.down.{i}.block" for i in range(1 + _highest(state, r"encoder\.down\.(\d+)\."))]
    if not blocks or "quantize.embedding.weight" not in state:
        raise Mgp5Error(f"{path} holds no quantize.embedding.weight, expected VAR's image tokenizer", HINT)
    codes, width = state["quantize.embedding.weight"].shape
    config = VQVAEConfig(
        patch_nums=patch_nums,
        num_codes=codes,
        code_width=width,
        channels=tuple(len(_tensor(state, f"{block}.0.conv1.weight", path)) for block in blocks),
        layers_per_block=1 + _highest(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention="encoder.mid.attn_1.qkv.weight" in state,
    )
    renamed: State = {"quantizer.usage": torch.ones(codes)}
    for name, value in state.items():
        # The release counts the decoder's resolutions from the image, diffusers from the latents.
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{len(blocks) - 1 - int(m[1])}", name)
        attention = re.search(r"\.attn(_1|\.\d+)\.(qkv|proj_out)\.weight$", name)
        renamed |= _split(_rename(name, VQVAE_NAMES), value[..., 0, 0] if attention else value)
    return config, _checked(renamed, lambda: VQVAE(config), path)


def _var(state: State, path: Path) -> tuple[VARConfig, State]:
    if any("ada_gss" in name for name in state):
        raise Mgp5Error(f"{path} shares its AdaLN layers, as VAR-d36-s does", "give a VAR with layers of its own: d30")
    levels = _tensor(state, "lvl_1L", path).flatten().long().bincount().tolist()
    width, code_width = _tensor(state, "word_embed.weight", path).shape
    config = VARConfig(
        patch_nums=tuple(round(size**0.5) for size in levels),
        num_codes=len(_tensor(state, "head.weight", path)),
        code_width=code_width,
        width=width,
        depth=1 + _highest(state, r"^blocks\.(\d+)\."),
        heads=_tensor(state, "blocks.0.attn.scale_mul_1H11", path).numel(),
        mlp_ratio=len(_tensor(state, "blocks.0.ffn.fc1.weight", path)) // width,
        num_classes=len(_tensor(state, "class_emb.weight", path)) - 1,
        drop_path=round(0.1 * (1 + _highest(state, r"^blocks\.(\d+)\.")) / 24, 4),  # the release's rule
    )
    renamed: State = {}
    for name, value in state.items():
        renamed |= _split(_rename(name, VAR_NAMES), value[0] if FIRST_AXIS.search(name) else value)
    return config, _checked(renamed, lambda: VARDecoder(config), path)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name


def _split(name: str, value: Tensor) -> State:
    """Return a tensor by its name, the one of queries, keys and values as three, and nothing for one without use."""
    if UNUSED.search(name):
        return {}
    if ".qkv." not in name:
        return {name: value}
    return {name.replace(".qkv.", f".to_{part}."): piece for part, piece in zip("qkv", value.chunk(3), strict=True)}


def _tensor(state: State, name: str, path: Path) -> Tensor:
    if name not in state:
        raise Mgp5Error(f"{path} holds no {name}, expected weights of VAR or VARGPT", HINT)
    return state[name]


def _highest(state: State, pattern: str) -> int:
    """Return the largest number in names that match, -1 without any."""
    return max((int(match[1]) for name in state if (match := re.search(pattern, name))), default=-1)


def _checked(state: State, build: Callable[[], nn.Module], path: Path) -> State:
    """Return the state if it has just the names and shapes of a module."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        first = f"{wrong[0]} is {found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}"
        raise Mgp5Error(f"{path}: {first} ({len(wrong)} tensors differ)", HINT)
    return state
