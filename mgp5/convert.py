"""Convert the checkpoints that the authors of the four papers published to a model folder of mgp5.

MiniGPT-5: their names for what the stages train differ, and they hold all rows of embedding and LM head: the last nine
of them belong to [IMG0]..[IMG7] and <ImageHere>. The others were meant to be frozen but shrank by weight decay; mgp5
keeps those of the LLM, and `Converted.shrunk` has the difference. The others: see `heads.seed_release`,
`heads.vargpt_release` and `heads.mm_release`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig

from .backbones.minigpt4 import compose, read_state
from .config import LoraConfig, ModelConfig
from .errors import Mgp5Error
from .generators import load_generator
from .generators.latent_diffusion import LatentDiffusion
from .generators.seed_stages import SeedTokenizerConfig
from .generators.unclip import StableUnCLIP
from .generators.var_weights import read_var, read_vargpt, read_vqvae
from .generators.vqvae import VQVAE
from .heads.mm_release import compose_llava, fitted, is_mm_interleaved, missing, read_release
from .heads.mm_release import released as released_name
from .heads.seed import SeedHead
from .heads.seed_release import compose_seed_llama, read_seed_tokenizer
from .heads.settings import SeedConfig
from .heads.vargpt_release import begin_decoder, is_vargpt, write_llava
from .hub import Parts, explain, find_part, from_hub, resolve
from .loading import (
    assemble,
    backbone_kind,
    build,
    load_backbone,
    load_trained_tensors,
    save_checkpoint,
    trained_tensors,
)
from .model import InterleavedModel

NAMES = {"fc.": "mapper.mlp.", "llm_to_t2i_mapping.": "mapper.transformer.", "t2i_decoder_prompt": "mapper.queries"}
ROWS = ("embed_tokens", "lm_head")
NEEDED = (*ROWS, "mapper.mlp.0.weight", "mapper.queries")
LORA = re.compile(r"layers\.\d+\.self_attn\.[qv]_proj\.lora_[AB]")
VOKENS, ADDED = 8, 9
LAYERS_14B = 40  # of SEED-LLaMA 14B, whose prompts differ from those of 8B


@dataclass(frozen=True)
class Converted:
    """Result of a conversion."""

    stage: str | None  # of the checkpoints; None: only a MiniGPT-4 was put together
    shrunk: dict[str, float]  # largest difference of any other row to the LLM's own, in embedding and LM head
    unused: tuple[str, ...]  # names of tensors that mgp5 does not need


def convert(checkpoints: Sequence[Path], model: str, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Converted:
    """Write `out/mgp5` from stage1_cc3m.ckpt, or from it and stage2_vist.ckpt or stage2_mmdialog.ckpt; later ones win.

    The model is "MINIGPT4+GENERATOR" as for `hub.resolve`, or "BLIP2+LLM+GENERATOR": then `out/mllm` is composed first,
    with MiniGPT-4's prerained_minigpt4_7b.pth among the checkpoints; or files of SEED's tokenizer, and the model is
    "BLIP2+LLM+WORDS+GENERATOR", see `convert_seed`; or files of VAR, and the model is one MLLM, see `convert_vargpt`;
    or those of MM-Interleaved, and the model is "CLIP+LLM+GENERATOR", see `convert_mm_interleaved`.
    Frozen parts are loaded in `dtype`. Raises Mgp5Error if a file cannot be read, something is missing in all of them,
    or does not fit the model.
    """
    if (out / "mgp5").exists():
        raise Mgp5Error(f"{out} holds a model already", "choose another --out", usage=True)
    if model.count("+") == 3:
        return convert_seed(checkpoints, model, out, dtype)
    if "+" not in model and any(map(_is_vqvae, checkpoints)):
        return convert_vargpt(checkpoints, model, out, dtype)
    if model.count("+") == 2 and is_mm_interleaved(checkpoints):
        return convert_mm_interleaved(checkpoints, model, out, dtype)
    return convert_minigpt5(checkpoints, model, out, dtype)


def convert_minigpt5(checkpoints: Sequence[Path], model: str, out: Path, dtype: torch.dtype) -> Converted:
    """Write `out/mgp5` with the mapper and what else the stages train, maybe `out/mllm`. Raises as `convert`."""
    states = {path: read_state(path) for path in checkpoints}
    projections = [path for path, state in states.items() if "llama_proj.weight" in state.get("model", state)]
    trained = [state for path, state in states.items() if path not in projections]
    released = _released(trained) if trained or model.count("+") != 2 else {}
    model, composed = _base(model, out, projections)
    if composed and not released:
        return Converted(None, {}, ())
    parts = resolve(model)
    minigpt5 = build(parts.mllm, parts.diffusion, num_vokens=VOKENS, dtype=dtype)
    shrunk = _check_rows(minigpt5, released)
    unused = _fill(minigpt5, released, parts)
    mllm = "mllm" if composed else _absolute(parts.mllm)
    minigpt5.config = replace(minigpt5.config, mllm=mllm, diffusion=_absolute(parts.diffusion))
    save_checkpoint(minigpt5, out)
    return Converted(minigpt5.config.stage, shrunk, unused)


def convert_vargpt(files: Sequence[Path], mllm: str, out: Path, dtype: torch.dtype) -> Converted:
    """Write `out/diffusion`, VAR's image tokenizer, and `out/mgp5` with VARGPT's decoder and projectors.

    `mllm` is the folder of VARGPT-LLaVA v1, whose LLaVA becomes `out/mllm`; or another multimodal LLM (a folder, hub id
    or name): then the projectors are fresh, and the decoder is that of var_d30.pth, as where the paper begins. `files`
    are vae_ch160v4096z32.pth and, for the second, var_d30.pth. Raises Mgp5Error if a file is missing or no such.
    """
    folder, whole = Path(mllm).expanduser(), is_vargpt(Path(mllm).expanduser())
    tokenizers = [path for path in files if _is_vqvae(path)]
    others = [path for path in files if path not in tokenizers]
    found = str(folder) if whole else find_part(mllm, "mllm")
    released = read_vargpt(folder) if whole else None
    kept = released and released.vqvae
    if not found or len(tokenizers) + bool(kept) < 1 or len(others) != (not whole):
        wrong = f"{len(tokenizers)} image tokenizers and {len(others)} other files for {mllm}"
        hint = "give vae_ch160v4096z32.pth with --model FOLDER of VARGPT-LLaVA v1, or it and var_d30.pth with an MLLM"
        raise Mgp5Error(wrong, hint, usage=True)
    shape, state = released.var if released else begin_decoder(*read_var(others[0]))
    config, weights = kept or read_vqvae(tokenizers[0], shape.patch_nums)
    painter = VQVAE(config)
    painter.load_state_dict(weights)
    if whole:
        write_llava(folder, out / "mllm")
    backbone = load_backbone(str(out / "mllm") if whole else found, dtype)
    names = ("mllm" if whole else _absolute(found), "diffusion")
    options = {"classes": "released" if whole else "trained", "guidance": 2.5}
    model = assemble(backbone, painter.eval(), *names, head="vargpt", var=shape, **options)
    model.head.decoder.load_state_dict(state)
    unused = []
    for side, module in (("in", model.head.projectors.to_llm), ("out", model.head.projectors.to_decoder)):
        given = released.projectors[side] if released else {}
        unused += [f"norm of projector {side}"] * ("norm.weight" in given)  # which the released forward does not apply
        own = {name.removeprefix("mlp."): value for name, value in given.items() if name.startswith("mlp.")}
        module.load_state_dict(own or module.state_dict())
    painter.save(out / "diffusion")
    save_checkpoint(model, out)
    return Converted("decode" if whole else "var", {}, tuple(unused))


def convert_seed(files: Sequence[Path], model: str, out: Path, dtype: torch.dtype) -> Converted:
    """Write `out/mllm`, a SEED-LLaMA with the vision tower of a BLIP-2, and `out/mgp5` with SEED's tokenizer.

    `files` are causal_qformer.pth and seed_tokenizer.pth of version 1, or seed_quantizer.pt of version 2; the others
    are folders, hub ids or names: `words` has the LLM's tokenizer, `generator` is what the version draws with: Stable
    Diffusion 1.4, or Stable unCLIP 2.1. Raises Mgp5Error if a part cannot be read or does not fit the others.
    """
    *parts, generator = model.split("+")
    found = [*(find_part(name, "part") for name in parts), find_part(generator, "generator")]
    if not all(found):
        wrong = f"{model} are not all parts"
        raise Mgp5Error(wrong, "expected BLIP2+LLM+WORDS+GENERATOR: folders, hub ids or names", usage=True)
    released, painter = read_seed_tokenizer(files), load_generator(found[3], dtype)
    shape, by_image = released.config, isinstance(painter, StableUnCLIP)
    _check_condition(shape, painter, generator)
    try:
        layers = from_hub(found[1], lambda name, revision: AutoConfig.from_pretrained(name, revision=revision))
        size = "14b" if layers.num_hidden_layers == LAYERS_14B else "8b"
        compose_seed_llama(*found[:3], out / "mllm", size, codes=shape.codes, dtype=dtype)
    except (OSError, ValueError) as error:
        raise explain(error, found[1]) from error
    backbone = load_backbone(str(out / "mllm"), dtype)
    if backbone.vision_width != shape.vision_width:
        case = f"the vision tower has width {backbone.vision_width}, the tokenizer reads {shape.vision_width}"
        raise Mgp5Error(case, "give a BLIP-2 with EVA-CLIP's ViT-g, as Salesforce/blip2-itm-vit-g")
    head = SeedHead(
        painter,
        SeedConfig(
            tokenizer=shape,
            unconditional="zeros" if by_image else "text",
            text_tokenizer="google-bert/bert-base-uncased" if shape.text_vocab else "",
        ),
    )
    head.tokenizer.load_state_dict(released.state)
    config = ModelConfig(
        mllm="mllm",
        diffusion=_absolute(found[3]),
        head="seed",
        head_config=head.config,
        guidance=10.0 if by_image else 7.5,
        mllm_kind=backbone_kind(backbone),
        head_kind=head.description,
        system="",
    )
    save_checkpoint(InterleavedModel(backbone, head, config), out)
    return Converted("finetune", {}, released.unused)


def convert_mm_interleaved(files: Sequence[Path], model: str, out: Path, dtype: torch.dtype) -> Converted:
    """Write `out/mllm`, a LLaVA of CLIP and LLM, and `out/mgp5` with all that MM-Interleaved's stage trained, its UNet
    too; `files` are those of the checkpoint, and maybe mm_inference.yaml. Raises Mgp5Error as `convert`."""
    *names, generator = model.split("+")
    found = [*(find_part(name, "part") for name in names), find_part(generator, "generator")]
    if not all(found):
        raise Mgp5Error(
            f"{model} are not all parts", "expected CLIP+LLM+GENERATOR: folders, hub ids or names", usage=True
        )
    try:
        vision = from_hub(found[0], lambda name, revision: CLIPVisionConfig.from_pretrained(name, revision=revision))
        released, painter = read_release(files, vision.num_attention_heads), load_generator(found[2], dtype)
        compose_llava(found[0], found[1], out / "mllm", dtype)
    except (OSError, ValueError) as error:
        raise explain(error, model) from error
    backbone = load_backbone(str(out / "mllm"), dtype)
    options = {"head": "mm-interleaved", "sizes": released.sizes, "guidance": released.guidance}
    made = assemble(backbone, painter, "mllm", _absolute(found[2]), **options)
    painter.denoiser.float()
    own = {name: value for name, value in trained_tensors(made).items() if name != "llm_mmfs.bias"}
    names = {name: released_name(name, released.sizes.every, len(made.head.unet_mmfs.blocks)) for name in own}
    if absent := [name for name in names.values() if name not in released.found]:
        raise missing(absent)
    tensors = {name: fitted(name, released.found[names[name]].float(), own[name]) for name in own}
    embedding, head, bias = released.rows
    with torch.no_grad():
        for weight, row in ((backbone.core.get_input_embeddings().weight, embedding), (backbone.lm_head.weight, head)):
            if row.shape != weight[0].shape:
                wrong = f"rows of the checkpoint have width {len(row)}, those of {found[1]} {weight.shape[1]}"
                raise Mgp5Error(wrong, "give the LLM it was trained with, lmsys/vicuna-13b-v1.3")
            weight[made.head.ids[0]] = row.to(weight)
    made.adapt(None, None)
    kept = {name: value for name, value in trained_tensors(made).items() if name.startswith("adapter.")}
    tensors |= kept | {"llm_mmfs.bias": bias.float()}
    load_trained_tensors(made, tensors, Parts(model, "", "", Path("the checkpoint")))
    made.config = replace(made.config, stage="pretrain", bare_captions=True, system="")
    save_checkpoint(made, out)
    return Converted("pretrain", {}, released.unused(names.values()))


def _is_vqvae(path: Path) -> bool:
    return path.suffix != ".yaml" and "post_quant_conv.weight" in read_state(path)


def _check_condition(shape: SeedTokenizerConfig, painter: LatentDiffusion, name: str) -> None:
    """Raise Mgp5Error if a tokenizer's codes do not become what a generator takes."""
    by_image = isinstance(painter, StableUnCLIP)
    made, by_code = (shape.condition_length, shape.condition_width), shape.detokenizer != "text"
    takes = (1, painter.image_width) if by_image else painter.condition_shape
    if made != takes or by_image != by_code:
        kinds = {True: "image embeddings", False: "text states"}
        case = f"the tokenizer makes {kinds[by_code]} of {made[0]}x{made[1]}"
        hint = "version 1 draws with Stable Diffusion 1.4, version 2 with stable-diffusion-2-1-unclip"
        raise Mgp5Error(f"{case}, and {name} takes {kinds[by_image]} of {takes[0]}x{takes[1]}", hint)


def _base(model: str, out: Path, projections: list[Path]) -> tuple[str, bool]:
    """Return the model's parts as `resolve` takes them, and whether its MiniGPT-4 was composed in `out/mllm`."""
    names = model.split("+")
    if len(names) != 3:
        return model, False
    blip2, llm = (find_part(name, "part") for name in names[:2])
    if not (blip2 and llm and len(projections) == 1):
        raise Mgp5Error(
            f"{model} is to be put together of BLIP2+LLM+GENERATOR, with {len(projections)} projections",
            "give folders or hub ids, and prerained_minigpt4_7b.pth among the checkpoints",
            usage=True,
        )
    try:
        compose(blip2, llm, out / "mllm", projections[0])
    except (OSError, ValueError) as error:
        raise explain(error, model) from error
    return f"{out / 'mllm'}+{names[2]}", True


def _released(states: list[dict]) -> dict[str, Tensor]:
    """Return all tensors, under names that those of mgp5 can be given too. Raises Mgp5Error when some are missing."""
    tensors = {}
    for state in states:
        for name, value in state.get("state_dict", {}).items():
            if "original_module" not in name:
                tensors[_common(name)] = value
    if missing := [name for name in NEEDED if name not in tensors]:
        raise Mgp5Error(
            f"the checkpoints hold no {' and no '.join(missing)}",
            "give stage1_cc3m.ckpt before a file of stage 2, which lacks what that stage does not train",
        )
    return tensors


def _common(name: str) -> str:
    """Return one name for what is the same in the release and in mgp5, where peft adds prefixes of its own."""
    if lora := LORA.search(name):
        return lora[0]
    for rows in ROWS:
        if rows in name:
            return rows
    theirs = next((theirs for theirs in NAMES if name.startswith(theirs)), "")
    return NAMES.get(theirs, "") + name.removeprefix(theirs)


def _check_rows(model: InterleavedModel, released: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of the LLM's rows. Raises Mgp5Error when vocabulary or width differ."""
    weights = model.backbone.core.get_input_embeddings().weight, model.backbone.lm_head.weight
    known = len(model.backbone.tokenizer) - ADDED
    shrunk = {}
    for name, weight in zip(ROWS, weights, strict=True):
        expected, found = (known + ADDED, weight.shape[1]), tuple(released[name].shape)
        if found != expected:
            raise Mgp5Error(
                f"{name} of the checkpoints is {found}, of {model.config.mllm} with 9 tokens more {expected}",
                "give the MiniGPT-4 with the LLM that they were trained with",
            )
        shrunk[name] = float((released[name][:known].float() - weight[:known].float()).abs().max())
    return shrunk


def _fill(model: InterleavedModel, released: dict[str, Tensor], parts: Parts) -> tuple[str, ...]:
    """Load the released tensors into the model; return the names of those that are not needed."""
    ranks = [len(value) for name, value in released.items() if name.endswith("lora_A")]
    model.adapt(LoraConfig(rank=ranks[0], alpha=2 * ranks[0]) if ranks else None, None)
    # Of dialogues the release keeps three messages; stories are one message.
    model.config = replace(model.config, stage="finetune" if ranks else "pretrain", history=3 if ranks else None)
    names = {name: _common(name.removeprefix("adapter.")) for name in trained_tensors(model)}
    cut = {name: value[-ADDED : VOKENS - ADDED] if name in ROWS else value for name, value in released.items()}
    tensors = {ours: cut[common].float() for ours, common in names.items() if common in cut}
    load_trained_tensors(model, tensors, replace(parts, trained=Path("the checkpoints")))
    return tuple(sorted(released.keys() - set(names.values())))


def _absolute(part: str) -> str:
    return str(Path(part).resolve()) if Path(part).is_dir() else part
