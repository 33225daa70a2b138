"""InterleavedModel = multimodal LLM + image head; its losses, and what each stage trains.

B samples, T tokens, D width of the LLM, N context images.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from .backbones.adapters import adapt, merge, put_on, take_off
from .backbones.hf import HFBackbone
from .backbones.positions import isolated
from .config import LoraConfig, ModelConfig, PrefixConfig, TrainConfig
from .errors import Mgp5Error
from .heads import Head, ImageContext, TrainRule
from .heads.batch import Batch
from .heads.losses import Losses, labelled, text_loss
from .prompts import CHAT_SYSTEM

ADAPTERS = re.compile("lora_|trainable_tokens|token_adapter")  # in names of weights that peft added
WHOLE = r"^backbone\.(?!prefix\.).*language_model\.(?!.*(embed_tokens|lm_head|lora_))"  # the LLM but its embeddings


class InterleavedModel(nn.Module):
    """The whole model: the head adds its tokens to the LLM. Built frozen; `prepare` unfreezes what a stage trains."""

    def __init__(self, backbone: HFBackbone, head: Head, config: ModelConfig) -> None:
        super().__init__()
        self.backbone, self.head, self.config = backbone, head, config
        backbone.limit_pixels(config.max_pixels)
        head.install(backbone)
        self.llm_names: frozenset[str] = frozenset()  # of the LLM's own weights that were trained
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the LLM computes."""
        return self.backbone.device

    def limit_pixels(self, most: int | None) -> None:
        """Let context images take at most so many pixels, from now on and when the model is loaded; None: as before."""
        self.config = replace(self.config, max_pixels=most or self.config.max_pixels)
        self.backbone.limit_pixels(self.config.max_pixels)

    def forward(self, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Losses:
        """Return the losses of a stage on a batch: text, and the head's image terms; none of an empty batch.

        `rng` is on the CPU and draws whatever is random in the losses.
        """
        if not len(batch.ids):
            return Losses()
        if not self.head.stage(config.stage).llm:
            return self.head.losses(None, batch, config, rng) if batch.num_targets else Losses()
        batch = self.head.complete(self.backbone, batch, config, rng) if batch.num_targets else batch
        batch = replace(batch, context=self.context(batch))
        hidden, losses = self.hidden(batch), Losses()
        if config.text_weight:
            states, targets = labelled(hidden, batch.labels)
            losses = Losses({"text": text_loss(self.backbone.logits(states), targets)}, {"text": config.text_weight})
        if batch.num_targets:
            losses = losses | self.head.losses(hidden, batch, config, rng)
        return losses

    def context(self, batch: Batch) -> ImageContext:
        """Return the context images of whole samples as the LLM gets them.

        Raises Mgp5Error if they are cached, but for a head that attends to more of them.
        """
        if batch.features and self.head.spec.reads_side:
            case = f"cached features of context images, without those that the head {self.head.spec.name} attends to"
            raise Mgp5Error(case, "leave the features out of the cache")
        if batch.features:
            return self.head.cached_images(self.backbone, batch.features)
        if batch.context_images:
            return self.head.encode_images(self.backbone, batch.context_images)
        return ImageContext([])

    def hidden(self, batch: Batch) -> Tensor:  # (B, T, D)
        """Return the LLM's last hidden states on whole samples."""
        context = batch.context or self.context(batch)
        ids, tokens = batch.ids, context.tokens
        if context.ids:
            ids, tokens = ids.masked_scatter(ids == self.backbone.image_token_id, torch.cat(context.ids).to(ids)), []
        embeds = self.backbone.embed(ids, tokens)
        if batch.num_targets:
            embeds = self.head.embed_targets(embeds, batch)
        positions = self.backbone.positions(batch.ids, batch.context_images.get("image_grid_thw"), batch.mask)
        side, mask, slots = None, batch.mask, [len(tokens) for tokens in context.tokens]
        if batch.begins is not None and batch.isolated:
            positions, mask = isolated(positions, batch.begins, embeds.dtype)
        if self.head.spec.reads_side:
            side = self.backbone.side_inputs(batch.ids, slots, context.side, batch.begins)
        return self.backbone(embeds, positions, mask, side=side)

    def prepare(self, config: TrainConfig) -> None:
        """Unfreeze exactly what a stage trains: what the head's plan says."""
        stage = self.head.stage(config.stage)
        if config.whole_llm:
            self.merge()
        self.adapt(config.lora if stage.adapter else None, config.prefix if stage.adapter else None)
        self.head.prepare(config)
        head_config = getattr(self.head, "config", self.config.head_config)
        talks = stage.data == "conversations"
        system = self.config.system or CHAT_SYSTEM if talks else ""  # captions are learnt bare
        data = {"history": config.data.history} if talks else {"bare_captions": config.data.bare_captions}
        self.config = replace(self.config, stage=config.stage, head_config=head_config, system=system, **data)
        for parameter, rule in self._planned(config):
            parameter.requires_grad_(rule is not None and rule.lr is not None)
        trained = {_plain(name) for name, p in self.backbone.core.named_parameters() if p.requires_grad}
        self.llm_names |= trained & {*self.llm_weights(everything=True)}
        self.backbone.checkpointing(config.checkpointing)

    def llm_weights(self, everything: bool = False) -> dict[str, nn.Parameter]:
        """Return the LLM's own weights that were trained, or all of them, by their names in transformers."""
        weights = {_plain(name): p for name, p in self.backbone.core.named_parameters() if not ADAPTERS.search(name)}
        return {name: p for name, p in weights.items() if everything or name in self.llm_names}

    def adapt(self, lora: LoraConfig | None, prefix: PrefixConfig | None) -> None:
        """Put trainable rows of the head's tokens into embedding and LM head, and LoRA or a prefix into the LLM.

        An adapter that is there goes on in the new one.
        """
        old, before = take_off(self.backbone), self.config.lora
        adapt(self.backbone, self.head.ids, lora, prefix)
        if old:
            scale = before.alpha / before.rank / (lora.alpha / lora.rank) if before and lora else 1.0
            put_on(self.backbone, old, scale)
        self.config = replace(self.config, lora=lora, prefix=prefix)

    def merge(self) -> None:
        """Fold rows and LoRA into the weights: inference then runs the plain LLM; only a quantised one keeps LoRA."""
        merge(self.backbone, keep_lora=self.config.lora is not None)
        self.requires_grad_(False)

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """Return the optimizer's groups: parameters that train, by learning rate and weight decay."""
        rules = [rule for rule in self._plan(config) if rule.lr is not None]
        groups = {(rule.lr, rule.weight_decay): [] for rule in rules}  # in the order of the plan
        for parameter, rule in self._planned(config):
            if rule is not None and rule.lr is not None:
                groups[rule.lr, rule.weight_decay].append(parameter)
        named = [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
        return [group for group in named if group["params"]]

    def _plan(self, config: TrainConfig) -> tuple[TrainRule, ...]:
        """Return the head's plan, and what is trained of any LLM."""
        whole = (TrainRule(WHOLE, config.lr, config.weight_decay),) if config.whole_llm else ()
        return (*self.head.train_plan(config), *whole)

    def _planned(self, config: TrainConfig) -> list[tuple[nn.Parameter, TrainRule | None]]:
        """Return each parameter with the first rule that matches its name."""
        plan = self._plan(config)
        return [
            (parameter, next((rule for rule in plan if re.search(rule.pattern, name)), None))
            for name, parameter in self.named_parameters()
        ]


def _plain(name: str) -> str:
    """Return the name that a weight has without peft's wrappers."""
    return name.replace(".base_layer", "")
