"""Train a tiny Stable Diffusion 3 on Storyland by flow matching, on the demo's VAE and on frozen text encoders.

Letters: B pictures, z latents (B, 8, 16, 16) of unit scale, L rows and D width of a condition.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from clip import captions
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from fit import Run, autocast, device, fit, step_generator
from renders import renders, right, scores
from tokens import captions as described
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from unet import EMPTY, SHOWN, moments, sheet

import mgp5
from mgp5.generators.flow import FlowSchedule
from mgp5.generators.sd3 import StableDiffusion3
from mgp5.storyland.judge import load_judge
from mgp5.storyland.world import ATTRIBUTES

DEMO = Path(mgp5.__file__).parent / "demo" / "diffusion"
WIDTH = 256  # D, and the width of T5
LENGTH = 32  # tokens of each encoder: no caption is longer, and 256 rows of T5 would cost three times as much


def new_transformer(pooled: int) -> SD3Transformer2DModel:
    """5.1M parameters on 8x8 patches; queries and keys are normed as in 3.5, and blocks begin as identities."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=pooled,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def text_parts() -> dict[str, nn.Module | CLIPTokenizer | T5TokenizerFast]:
    """Frozen encoders: the demo's trained CLIP, its pooled state as it is, and a CLIP and a T5 of random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    trained = CLIPTextModel.from_pretrained(DEMO / "text_encoder")
    trained.config.layer_norm_eps /= 8**2  # see below
    first = CLIPTextModelWithProjection(trained.config)
    first.text_model.load_state_dict(trained.state_dict())
    nn.init.eye_(first.text_projection.weight)
    for name, weight in first.text_model.named_parameters():
        if any(part in name for part in ("embedding", "out_proj", "fc2")):
            # Stable Diffusion 3 reads the states before the last layer and its norm: of deviation 8 here, now 1 as the
            # others' are. What a layer reads is normed, so no other state changes.
            weight.data /= 8
    small = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "projection_dim": 64}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**trained.config.to_dict() | small))
    nn.init.normal_(second.get_input_embeddings().weight)  # with the usual 0.02 nothing of the words would be seen
    tokenizer_3 = t5_tokenizer()
    sizes = {"d_model": WIDTH, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
    third = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), feed_forward_proj="gated-gelu", **sizes))
    return {
        "text_encoder": first,
        "tokenizer": tokenizer,
        "text_encoder_2": second,
        "tokenizer_2": tokenizer,
        "text_encoder_3": third,
        "tokenizer_3": tokenizer_3,
    }


def t5_tokenizer() -> T5TokenizerFast:
    """A piece for each word of Storyland's captions, and for each letter."""
    words = {f"▁{word}" for text in described(4000) for word in text.split()}
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("a"), ord("z") + 1)), *sorted(words)]
    vocabulary = [(piece, -1.0 if piece in words else -9.0) for piece in pieces]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)


def new_painter() -> StableDiffusion3:
    """Everything together; frozen but for the transformer."""
    parts = text_parts()
    pooled = sum(parts[name].config.projection_dim for name in ("text_encoder", "text_encoder_2"))
    vae = AutoencoderKL.from_pretrained(DEMO / "vae")
    painter = StableDiffusion3(new_transformer(pooled), vae, FlowSchedule(), **parts)
    painter.transformer.requires_grad_(True)
    return painter.to(device())


@torch.no_grad()
def paint(painter: StableDiffusion3, condition: Tensor, empty: Tensor, guidance: float, steps: int = 20) -> Tensor:
    """Pictures (B, 3, 128, 128) of conditions (B, L, D); noise of seeds 0, 1, ..."""
    generators = [torch.Generator().manual_seed(k) for k in range(len(condition))]
    with autocast():
        *_, z = painter.draw(condition, empty, steps=steps, guidance=guidance, sampler="euler", generators=generators)
    return torch.cat([painter.decode(part).cpu() for part in z.split(8)])


def save_pipeline(folder: Path, painter: StableDiffusion3) -> None:
    """Write `folder` as a StableDiffusion3Pipeline, with safetensors weights."""
    names = ("vae", *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
    parts = {name: getattr(painter, name) for name in names}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=painter.schedule.shift)
    StableDiffusion3Pipeline(transformer=painter.transformer, scheduler=scheduler, **parts).save_pretrained(folder)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder that gets sd3/diffusion.")
@click.option("--steps", default=2800)
@click.option("--minutes", default=1e9, help="Stop after this time; the next call goes on.")
@click.option("--batch", default=32)
@click.option("--lr", default=1e-3)
@click.option("--every", default=500, help="Steps between evaluations.")
@click.option("--train", "amount", default=6000, help="Number of training renders.")
def main(work: Path, steps: int, minutes: float, batch: int, lr: float, every: int, amount: int) -> None:
    painter, progress = new_painter(), {"step": 0}
    pictures, rows = renders(work, "train", amount)
    latents = moments(work, painter.vae, pictures)

    def encode(texts: list[str]) -> Tensor:
        with torch.autocast(device().type, enabled=False):
            return painter.encode_text(texts)

    def loss(step: int) -> dict[str, Tensor]:
        progress["step"] = step + 1
        generator = step_generator(step, 7)
        chosen = torch.randint(len(latents), (batch,), generator=generator).numpy()
        dropped = (torch.rand(batch, generator=generator) < EMPTY).tolist()
        texts = ["" if drop else text for drop, text in zip(dropped, captions(rows[chosen], step), strict=True)]
        z = painter.sample(torch.from_numpy(latents[chosen]), generator).to(device())
        return {"flow": painter.loss(z, encode(texts), generator).mean()}

    judge, run = load_judge().to(device()), Run(name="sd3", work=work, steps=steps, lr=lr, minutes=minutes)
    asked = renders(work, "test", 512)[1][:SHOWN]

    def evaluate(transformer: nn.Module, guidance: float = 3.0) -> dict[str, float]:
        trained, painter.transformer = painter.transformer, transformer
        pixels = paint(painter, encode(captions(asked, -1)), encode([""]), guidance)
        painter.transformer = trained
        sheet(pixels, run.folder / f"{progress['step']:06d}.png")
        return scores(right(judge, pixels, asked))

    painter.transformer = fit(run, painter.transformer, loss, evaluate, every)
    save_pipeline(work / "sd3" / "diffusion", painter)
    for guidance in (1.0, 2.0, 3.0, 5.0):
        report = evaluate(painter.transformer, guidance)
        click.echo(" ".join(f"{name} {report[name]:.3f}" for name in (*ATTRIBUTES, "mean", "all")) + f" at {guidance}")


if __name__ == "__main__":
    main()
