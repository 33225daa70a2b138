"""MiniGPT-5 = multimodal LLM + image head + diffusion model; what each stage trains.

B samples, T tokens, D width, P pictures to be drawn, n vokens, L and C of a condition.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .backbones.hf import HFBackbone
from .backbones.quantization import Quantize, is_quantized, merge_rows
from .config import LoraConfig, ModelConfig, PrefixConfig, TrainConfig
from .errors import Mgp5Error
from .generators import LatentDiffusion, load_diffusion
from .heads.losses import Losses, caption_loss, labelled, text_loss
from .heads.mapper import FeatureMapper, MapperConfig
from .heads.minigpt5 import MiniGPT5Head, predicting_states, voken_tokens
from .hub import explain, from_hub, resolve
from .training.batch import Batch

if TYPE_CHECKING:
    from .engines import Backend, Choice
    from .memory.offload import Memory, Plan


class InterleavedModel(nn.Module):
    """The whole model. Built frozen; `prepare` unfreezes what a stage trains."""

    def __init__(self, backbone: HFBackbone, diffusion: LatentDiffusion, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.diffusion = diffusion
        self.config = config
        ids = backbone.add_tokens(list(voken_tokens(config.num_vokens)))
        self.head = MiniGPT5Head(FeatureMapper(config.mapper), diffusion, ids, config.unconditional == "text")
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, batch: Batch, config: TrainConfig, generator: torch.Generator) -> Losses:
        """The losses of a stage on a batch; `generator` (CPU) draws dropout, timesteps and noise.

        The weights are the stage's: 0.01 text + 1 LDM + 0.1 caption, then 0.01 text + 1 LDM (section 3.3).
        """
        weights = {"text": config.text_weight, "ldm": config.ldm_weight, "caption": config.caption_weight}
        if not len(batch.ids):
            return Losses({}, weights)
        hidden, terms = self.hidden(batch), {}
        if config.text_weight:
            states, targets = labelled(hidden, batch.labels)
            terms["text"] = text_loss(self.backbone.logits(states), targets)
        if batch.drawn:
            drawn = predicting_states(hidden, batch.rows, batch.starts, self.head.num_vokens)  # (P, n, D)
            terms |= self.image_losses(drawn, batch, config, generator)
        return Losses(terms, weights)

    def hidden(self, batch: Batch) -> Tensor:
        """The LLM's last hidden states (B, T, D) on whole samples."""
        features = list(batch.features)
        if not features and batch.seen:
            with torch.no_grad():
                features = self.backbone.encode_images(batch.seen)
        embeds = self.backbone.embed(batch.ids, features)
        positions = self.backbone.positions(batch.ids, batch.seen.get("image_grid_thw"), batch.mask)
        return self.backbone(embeds, positions, batch.mask)

    def image_losses(
        self,
        states: Tensor,  # (P, n, D)
        batch: Batch,
        config: TrainConfig,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """LDM and caption loss. Some pictures see zeros instead of states, which trains the unconditional branch.

        The zeros go in before the MLP, as at inference (section 3.3), and their caption target is the empty text.
        """
        dropped = torch.rand(len(states), generator=generator) < config.guidance_dropout  # (P,)
        condition = self.head.mapper(states * ~dropped[:, None, None].to(states.device))
        terms = {}
        if config.ldm_weight:
            moments = self.diffusion.moments(batch.pixels) if batch.moments is None else batch.moments
            latents = self.diffusion.sample(moments, generator)
            terms["ldm"] = self.diffusion.loss(latents, condition, generator, config.min_snr).mean()
        told = [i for i, caption in enumerate(batch.captions) if caption or dropped[i]]
        if config.caption_weight and told:
            encoding = self._encodings(batch, told, dropped).to(condition.device)
            pooled = self.config.mapper.pooled
            terms["caption"] = caption_loss(condition[told], encoding, pooled, config.caption_distance)
        return terms

    def _encodings(self, batch: Batch, told: list[int], dropped: Tensor) -> Tensor:  # (len(told), L, C)
        if batch.encodings is None:
            return self.diffusion.encode_text(["" if dropped[i] else batch.captions[i] for i in told])
        if not dropped.any():
            return batch.encodings[told]
        empty = self.diffusion.encode_text([""]).to(batch.encodings)
        return torch.where(dropped[told, None, None].to(empty.device), empty, batch.encodings[told])

    def prepare(self, config: TrainConfig) -> None:
        """Unfreeze exactly what a stage trains.

        pretrain: voken rows, whole mapper. finetune: voken rows, LoRA or prefix, the mapper's transformer; its MLP and
        queries stay as the first stage left them (section 4.1).
        """
        finetune = config.stage == "finetune"
        self.adapt(config.lora if finetune else None, config.prefix if finetune else None)
        mapper = self.head.mapper
        mapper.requires_grad_(True)
        mapper.mlp.requires_grad_(not finetune)
        if hasattr(mapper, "queries"):
            mapper.queries.requires_grad_(not finetune and config.train_queries)
        unconditional = "mapper" if config.guidance_dropout else "text"
        self.head.empty_text = unconditional == "text"
        self.config = replace(self.config, stage=config.stage, unconditional=unconditional)
        self.backbone.checkpointing(config.checkpointing)
        self.diffusion.checkpointing(config.checkpointing)

    def adapt(self, lora: LoraConfig | None, prefix: PrefixConfig | None) -> None:
        """Put trainable rows of the vokens into embedding and LM head, and LoRA or a prefix into the LLM."""
        from peft import LoraConfig as PeftLora
        from peft import TrainableTokensConfig, get_peft_model

        rows = list(self.head.ids)
        names = ["embed_tokens"]
        core = self.backbone.core
        if self.backbone.lm_head.weight is not core.get_input_embeddings().weight:
            names.append("lm_head")  # with tied embeddings one set of rows serves both
        if lora is None:
            adapter = TrainableTokensConfig(target_modules=names, token_indices=rows)
        else:
            adapter = PeftLora(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                # Only the language model: vision towers have projections of the same names.
                target_modules=rf".*language_model.*\.({'|'.join(lora.targets)})",
                trainable_token_indices=dict.fromkeys(names, rows),
            )
        self.backbone.model = get_peft_model(core, adapter)
        if prefix:
            self.backbone.add_prefix(prefix.tokens, prefix.hidden)
        self.config = replace(self.config, lora=lora, prefix=prefix)

    def merge(self) -> None:
        """Fold rows and LoRA into the weights: inference then runs the plain LLM, only a quantised one keeps LoRA."""
        if self.backbone.model is self.backbone.core:
            return
        if self.config.lora and is_quantized(self.backbone.core):
            merge_rows(self.backbone.model)
        else:
            self.backbone.model = self.backbone.model.merge_and_unload()
        self.requires_grad_(False)

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """Optimizer groups: voken rows (own rate, no decay: they are embeddings), and everything else that trains."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        rows = [p for name, p in named if "trainable_tokens" in name]
        rest = [p for name, p in named if "trainable_tokens" not in name]
        return [
            {"params": rows, "lr": config.rows_lr, "weight_decay": 0.0},
            {"params": rest, "lr": config.lr, "weight_decay": config.weight_decay},
        ]


def backbone_kind(backbone: HFBackbone) -> str:
    """A short description by which a checkpoint is matched to its LLM, as that was before vokens were added."""
    text = backbone.core.config.get_text_config()
    layers = f"{text.num_hidden_layers}x{text.hidden_size}"
    return f"{backbone.core.config.model_type} {layers} with {len(backbone.tokenizer)} tokens"


def diffusion_kind(diffusion: LatentDiffusion) -> str:
    """A short description by which a checkpoint is matched to its generator."""
    length, width = diffusion.condition_shape
    return f"{type(diffusion).__name__} {diffusion.schedule.prediction_type} {length}x{width}"


def build(
    mllm: str, diffusion: str, *, dtype: torch.dtype = torch.float32, quantize: Quantize = "none", **options: Any
) -> InterleavedModel:
    """A model with a fresh mapper, ready for the pretraining stage; parts are folders or hub ids.

    Args:
        dtype: of the frozen parts.
        quantize: "4bit" or "8bit" for the LLM's layers.
        options: of `assemble`.
    """
    backbone, generator = _load_parts(mllm, diffusion, dtype, quantize)
    return assemble(backbone, generator, mllm, diffusion, **options)


def assemble(
    backbone: HFBackbone,
    generator: LatentDiffusion,
    mllm: str,
    diffusion: str,
    *,
    num_vokens: int = 8,
    encoder_layers: int = 4,
    decoder_layers: int = 4,
    inner: int | None = None,
    kind: str = "encoder-decoder",
    guidance: float = 7.5,
) -> InterleavedModel:
    """A model of these parts with a fresh mapper.

    Args:
        mllm, diffusion: where the parts are from.
        encoder_layers, decoder_layers, inner, kind: of the mapper, see `MapperConfig` and `mapper_for`.
    """
    layers = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "kind": kind}
    config = ModelConfig(
        mllm=mllm,
        diffusion=diffusion,
        num_vokens=num_vokens,
        mapper=mapper_for(backbone.width, generator, inner, **layers),
        guidance=guidance,
        mllm_kind=backbone_kind(backbone),
        diffusion_kind=diffusion_kind(generator),
    )
    return InterleavedModel(backbone, generator, config)


def mapper_for(llm_width: int, generator: LatentDiffusion, inner: int | None = None, **layers: Any) -> MapperConfig:
    """The mapper between an LLM and a generator; `inner` None projects from 1024 to conditions wider than 2048."""
    length, width = generator.condition_shape
    inner = (1024 if width > 2048 else 0) if inner is None else inner
    own = {"inner": inner, "pooled": generator.pooled_width}
    return MapperConfig(llm_width=llm_width, width=width, queries=length, **own, **layers)


def load(
    name: str | Path = "demo",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize: Quantize = "none",
    backend: Backend | None = "auto",
    memory: Memory | Plan = "auto",
) -> InterleavedModel:
    """A trained model, ready to generate.

    Args:
        name: "demo" or a folder that `mgp5 train` has written.
        dtype: of the LLM and the diffusion model; the mapper stays in float32.
        quantize: "4bit" or "8bit" for the LLM's layers.
        backend: the engine that draws, see `mgp5.engines`; None leaves it to diffusers alone. With compile, and on a
            GPU with triton, the LLM's tokens are decoded by compiled code too.
        memory: on a GPU, "low" saves all it can, "auto" what it must; or a plan of `placement.select_memory_plan`.

    Raises:
        Mgp5Error: no such model, nothing trained in it, parts that do not fit together, or what cannot run here.
    """
    from .loading import load_checkpoint
    from .memory import offload as placement

    parts = resolve(str(name))
    if parts.trained is None:
        raise Mgp5Error(f"{name} has no trained mapper", f"train one: mgp5 train --stage pretrain --model {name}")
    if not isinstance(memory, placement.Plan):
        memory = placement.select_memory_plan(memory, parts, torch.device(device), dtype, quantize)
    backend = memory.engine(backend)
    model = load_checkpoint(parts, dtype=dtype, quantize=memory.quantize)
    model.merge()
    placement.place(model.eval(), memory, torch.device(device))
    if backend:
        set_backend(model, backend)
    return model


def set_backend(model: InterleavedModel, backend: Backend, exported: Path | None = None) -> Choice:
    """Let pictures be drawn by an engine, and tokens be decoded by what goes with it: see `engines.apply`."""
    from . import engines

    choice, on_gpu = engines.apply(model.diffusion, backend, exported), model.backbone.device.type == "cuda"
    # On a CPU only for who asked for the compiler: it takes longer than most replies.
    model.backbone.compiled = choice.name == "compile" or (choice.name == "triton" and on_gpu)
    if model.backbone.compiled:
        engines.keep_compiled()
    return choice


def load_backbone(mllm: str, dtype: torch.dtype, quantize: Quantize = "none") -> HFBackbone:
    """The LLM from a folder or the hub. Raises Mgp5Error."""

    def read(name: str, revision: str | None) -> HFBackbone:
        return HFBackbone.load(name, dtype=dtype, quantize=quantize, revision=revision)

    try:
        return from_hub(mllm, read)
    except (OSError, ValueError, SafetensorError) as error:
        raise explain(error, mllm) from error


def load_generator(diffusion: str, dtype: torch.dtype) -> LatentDiffusion:
    """The diffusion model from a folder or the hub. Raises Mgp5Error."""
    return from_hub(diffusion, lambda name, revision: load_diffusion(name, dtype=dtype, revision=revision))


def _load_parts(
    mllm: str, diffusion: str, dtype: torch.dtype, quantize: Quantize
) -> tuple[HFBackbone, LatentDiffusion]:
    return load_backbone(mllm, dtype, quantize), load_generator(diffusion, dtype)
