"""MiniGPT-5 = multimodal LLM + image head + diffusion model; what each stage trains.

B samples, T tokens, D width, P pictures to be drawn, n vokens, L and C of a condition.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .backbones.hf import HFBackbone
from .collate import Batch
from .config import LoraConfig, ModelConfig, Stage, TrainConfig
from .diffusion import LatentDiffusion, load_diffusion
from .errors import Mgp5Error
from .heads.vokens import VokenHead, predicting_states, voken_tokens
from .hub import explain, resolve
from .losses import Losses, caption_loss, labelled, text_loss
from .mapper import FeatureMapper, MapperConfig


class MiniGPT5(nn.Module):
    """The whole model. Built frozen; `prepare` unfreezes what a stage trains."""

    def __init__(self, backbone: HFBackbone, diffusion: LatentDiffusion, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.diffusion = diffusion
        self.config = config
        ids = backbone.add_tokens(list(voken_tokens(config.num_vokens)))
        self.head = VokenHead(FeatureMapper(config.mapper), diffusion, ids)
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, batch: Batch, config: TrainConfig, generator: torch.Generator) -> Losses:
        """The losses of a stage on a batch; `generator` (CPU) draws dropout, timesteps and noise."""
        hidden = self.hidden(batch)
        states, targets = labelled(hidden, batch.labels)
        terms = {"text": text_loss(self.backbone.logits(states), targets)}
        if batch.pixels is not None:
            drawn = predicting_states(hidden, batch.rows, batch.starts, self.head.num_vokens)  # (P, n, D)
            terms |= self.image_losses(drawn, batch.pixels, batch.captions, config, generator)
        weights = {"text": config.text_weight, "ldm": config.ldm_weight, "caption": config.caption_weight}
        return Losses(terms, weights)

    def hidden(self, batch: Batch) -> Tensor:
        """The LLM's last hidden states (B, T, D) on whole samples."""
        with torch.no_grad():
            features = self.backbone.encode_images(batch.seen) if batch.seen else []
        embeds = self.backbone.embed(batch.ids, features)
        positions = self.backbone.positions(batch.ids, batch.seen.get("image_grid_thw"), batch.mask)
        return self.backbone(embeds, positions, batch.mask)

    def image_losses(
        self,
        states: Tensor,  # (P, n, D)
        pixels: Tensor,  # (P, 3, H, W) in [-1, 1]
        captions: tuple[str, ...],
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
            latents = self.diffusion.encode(pixels, generator)
            terms["ldm"] = self.diffusion.loss(latents, condition, generator, config.min_snr).mean()
        told = [i for i, caption in enumerate(captions) if caption or dropped[i]]
        if config.caption_weight and told:
            texts = ["" if dropped[i] else captions[i] for i in told]
            terms["caption"] = caption_loss(condition[told], self.diffusion.encode_text(texts).to(condition.device))
        return terms

    def prepare(self, stage: Stage, lora: LoraConfig | None) -> None:
        """Unfreeze exactly what a stage trains.

        pretrain: voken rows, whole mapper. finetune: voken rows, LoRA, the mapper's transformer; its MLP and queries
        stay as the first stage left them (section 3.4).
        """
        self._unfreeze_rows(lora if stage == "finetune" else None)
        mapper = self.head.mapper
        mapper.transformer.requires_grad_(True)
        mapper.mlp.requires_grad_(stage == "pretrain")
        mapper.queries.requires_grad_(stage == "pretrain")
        self.config = replace(self.config, stage=stage, lora=lora if stage == "finetune" else None)

    def _unfreeze_rows(self, lora: LoraConfig | None) -> None:
        from peft import LoraConfig as PeftLora
        from peft import TrainableTokensConfig, get_peft_model

        rows = list(self.head.ids)
        names = ["embed_tokens"]
        core = self.backbone.core
        if core.lm_head.weight is not core.get_input_embeddings().weight:
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

    def merge(self) -> None:
        """Fold rows and LoRA into the weights: inference then runs the plain LLM."""
        if self.backbone.model is not self.backbone.core:
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


def diffusion_kind(diffusion: LatentDiffusion) -> str:
    """A short description by which a checkpoint is matched to its generator."""
    length, width = diffusion.condition_shape
    return f"{type(diffusion).__name__} {diffusion.schedule.prediction_type} {length}x{width}"


def build(
    mllm: str,
    diffusion: str,
    *,
    num_vokens: int = 8,
    encoder_layers: int = 4,
    decoder_layers: int = 4,
    dtype: torch.dtype = torch.float32,
    guidance: float = 7.5,
) -> MiniGPT5:
    """A model with a fresh mapper, ready for the pretraining stage; parts are folders or hub ids."""
    backbone, generator = _load_parts(mllm, diffusion, dtype)
    length, width = generator.condition_shape
    layers = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    mapper = MapperConfig(llm_width=backbone.width, width=width, queries=length, **layers)
    config = ModelConfig(
        mllm=mllm,
        diffusion=diffusion,
        num_vokens=num_vokens,
        mapper=mapper,
        guidance=guidance,
        diffusion_kind=diffusion_kind(generator),
    )
    return MiniGPT5(backbone, generator, config)


def load(name: str | Path = "demo", *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MiniGPT5:
    """A trained model, ready to generate.

    Args:
        name: "demo" or a folder that `mgp5 train` has written.
        dtype: of the LLM and the diffusion model; the mapper stays in float32.

    Raises:
        Mgp5Error: no such model, nothing trained in it, or parts that do not fit together.
    """
    from .checkpoint import load_checkpoint

    parts = resolve(str(name))
    if parts.trained is None:
        raise Mgp5Error(f"{name} has no trained mapper", f"train one: mgp5 train --stage pretrain --model {name}")
    model = load_checkpoint(parts, dtype=dtype)
    model.merge()
    return model.to(device).eval()


def _load_parts(mllm: str, diffusion: str, dtype: torch.dtype) -> tuple[HFBackbone, LatentDiffusion]:
    try:
        backbone = HFBackbone.load(mllm, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise explain(error, mllm) from error
    return backbone, load_diffusion(diffusion, dtype=dtype)
