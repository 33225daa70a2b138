"""Optimum's ONNX Runtime pipeline on an exported folder of the demo, beside PyTorch: the same prediction and image.

optimum-onnx 0.1.0 wants transformers < 4.58, so it needs an environment of its own. There and here:

    python -m venv reader && reader/bin/pip install optimum-onnx[onnxruntime]==0.1.0 torch==2.13.0 diffusers==0.39.0
    python examples/export/independent.py ours --exported DIR --out ours.npz
    reader/bin/python examples/export/independent.py optimum --exported DIR --out optimum.npz --beside ours.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

STEPS, GUIDANCE = 20, 7.5


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Latents, timestep and conditions for the folder's UNet, the same in both environments."""
    import onnx

    graph = onnx.load(folder / "unet" / "model.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, shapes["sample"][1], 16, 16, generator=generator)
    condition = torch.randn(2, 77, shapes["encoder_hidden_states"][2], generator=generator)
    return {"sample": sample, "timestep": torch.tensor(500.0), "encoder_hidden_states": condition}


def ours(folder: Path) -> dict[str, np.ndarray]:
    """By PyTorch and diffusers, from the demo's own weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from mgp5.hub import DEMO

    given = inputs(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "diffusion", safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    with torch.no_grad():
        prediction = pipeline.unet(*given.values(), return_dict=False)[0]
    return {"unet": prediction.numpy(), "image": _image(pipeline, given["encoder_hidden_states"])}


def optimum(folder: Path) -> dict[str, np.ndarray]:
    """By ORTStableDiffusionPipeline, from the exported folder alone."""
    from diffusers import DDIMScheduler
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    given = inputs(folder)
    pipeline = ORTStableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    prediction = pipeline.unet(**{k: v.clone() for k, v in given.items()}, return_dict=False)[0]
    return {"unet": prediction.numpy(), "image": _image(pipeline, given["encoder_hidden_states"])}


def _image(pipeline: object, condition: torch.Tensor) -> np.ndarray:  # (1, H, W, 3) in [0, 1]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=condition[1:],
        negative_prompt_embeds=condition[:1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=["ours", "optimum"])
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    args = parser.parse_args()
    made = {"ours": ours, "optimum": optimum}[args.reader](args.exported)
    np.savez(args.out, **made)
    if args.beside:
        for name, other in np.load(args.beside).items():
            error = np.abs(made[name] - other).max()
            psnr = -10 * np.log10(max(np.square(made[name] - other).mean(), 1e-20))
            print(f"{name}: at most {error:.2g} apart, {psnr:.0f} dB")


if __name__ == "__main__":
    main()
