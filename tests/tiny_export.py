"""A complete tiny model whose graphs are quickly exported: a UNet of one size with one transformer, few layers."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny import SIZE, WIDTH, tiny_text_encoder, tiny_tokenizer


def small_unet(**options) -> UNet2DConditionModel:
    """A UNet of one size, with one transformer: examples of two are the demo's, in test_ort.py, and of slow tests."""
    return UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None, up_block_types=("UpBlock2D",), cross_attention_dim=WIDTH, attention_head_dim=2,
        use_linear_projection=True, norm_num_groups=4, **options,
    )  # fmt: skip


def save_small(folder: Path, llava: Path) -> Path:
    """A trained folder, as `mgp5 train` makes one; the weights are random."""
    from mgp5.loading import build, save_checkpoint
    from mgp5.prompts import CHAT_SYSTEM
    from mgp5.training.presets import preset

    torch.manual_seed(0)
    unet = small_unet()
    vae = AutoencoderKL(
        block_out_channels=(4, 8), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(scheduler=DDIMScheduler(beta_schedule="scaled_linear"), **parts, **extras)
    pipeline.save_pretrained(folder / "diffusion")
    shutil.copytree(llava, folder / "mllm")
    layers = {"num_vokens": 4, "encoder_layers": 1, "decoder_layers": 1}
    model = build(str(folder / "mllm"), str(folder / "diffusion"), **layers)
    model.prepare(preset("pretrain"))
    save_checkpoint(model, folder)
    path = folder / "mgp5/config.json"
    more = {"mllm": "mllm", "diffusion": "diffusion", "system": CHAT_SYSTEM}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def draw(generator, count: int = 1, **options) -> torch.Tensor:
    """The pixels of images whose conditions and noise are always the same."""
    conditions = torch.randn(count + 1, *generator.condition_shape, generator=torch.Generator().manual_seed(3))
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    settings = {"steps": 3, "guidance": 3.0, "sampler": "ddim"} | options
    *_, latents = generator.draw(conditions[1:], conditions[:1], generators=generators, **settings)
    return generator.decode(latents)


def without_denoiser(export: Path, folder: Path) -> Path:
    """A copy of an exported folder as `mgp5 export` writes it without --split."""
    shutil.copytree(export, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["components"]["denoiser"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
