"""mgp5 export: models for other runtimes."""

from __future__ import annotations

from typing import Any

import click

from .flags import COUNT, PATH, say, settings_option


@click.command("export")
@click.option("--onnx", is_flag=True, help="Write ONNX files and prove that they compute what PyTorch does.")
@click.option("--trt", is_flag=True, help="Build TensorRT engines from them too.")
@click.option("--cache", is_flag=True, help="Make once what --backend auto then draws by on this CPU, and keep it.")
@click.option("--empty-cache", is_flag=True, help="Remove all that --cache made.")
@click.option("--model", default="demo", help="A name, or the folder of a model.")
@click.option("--out", type=PATH, help="New folder for the files.")
@click.option("--from", "source", type=PATH, help="Build engines from this exported folder.")
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="mapper, detokenizer, unet, transformer, scale, vae_decoder; --split: condition, denoiser; repeatable.",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32")
@click.option("--opset", type=click.Choice(["23", "20", "18"]), default="23")
@click.option("--split", is_flag=True, help="Also what is constant over the steps, and a denoiser that takes it.")
@click.option("--height", type=COUNT, help="Of the image that proves.  [default: the model's, or 256]")
@click.option("--width", type=COUNT, help="The same.")
@settings_option("settings", "Of --trt: batches, sizes, level.")
def export(
    cache: bool,
    empty_cache: bool,
    opset: str,
    height: int | None,
    width: int | None,
    settings: dict[str, Any],
    **values: Any,
) -> None:
    """Write the mapper or de-tokenizer, the denoiser or decoder of scales, and the VAE's decoder as ONNX files, and
    TensorRT engines of denoisers.

    The files are compared with PyTorch at several sizes, and by a whole image; only what agrees is kept.
    manifest.json beside them tells how well. Engines can be built on another machine from the files alone:

      mgp5 export --trt --from DIR
    """
    if bool(height) != bool(width):
        raise click.UsageError("--height and --width go together: give both or none")
    from ..device import quiet_libraries

    if cache or empty_cache:
        quiet_libraries()
        from ..export.cache import empty, fill

        if empty_cache:
            empty(say)
        return fill(values["model"], say) if cache else None
    from ..export.request import EngineOptions, ExportRequest
    from ..options import override

    size = (height, width) if height else None
    request = ExportRequest(opset=int(opset), size=size, engine=override(EngineOptions(), settings), **values)
    quiet_libraries()  # before transformers and diffusers are imported: they warn while they are
    from ..export.run import export as run

    run(request, say)
