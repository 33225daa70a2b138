"""Export at the sizes of the paper's model, with random weights, as no download is needed to see that it can be done:
Stable Diffusion 2.1's UNet and VAE, and the mapper from an LLM of width 4096 to conditions of 77x1024."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from mgp5.export.components import Exportable
from mgp5.export.request import ExportRequest
from mgp5.export.run import write_export

from mgp5.device import quiet_libraries
from mgp5.heads.minigpt5 import FeatureMapper, mapper_for
from mgp5.memory.skeletons import generator_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="sd-2.1-base", help="sd-1.5, sd-2.1-base, sd-2.1, sd-3 or sd-3.5-medium")
    parser.add_argument("--component", action="append", default=[], help="repeatable; all, if none is given")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--side", type=int, default=128, help="of the image that proves, in pixels")
    args = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    generator = generator_shape(args.model)
    for name in [name for name, _ in generator.named_children() if name.startswith("text_encoder")]:
        setattr(generator, name, None)
    mapper = FeatureMapper(mapper_for(4096, generator)).eval()
    with torch.no_grad():
        unconditional = mapper.unconditional(8)
    name = f"{args.model}, random weights"
    model = Exportable(name=name, generator=generator, mapper=mapper, unconditional=unconditional)
    options = {"components": tuple(args.component), "precision": args.precision, "split": args.split}
    request = ExportRequest(onnx=True, out=args.out, size=(args.side, args.side), **options)
    started = time.monotonic()
    manifest = write_export(model, request, args.out, lambda line: print(line, flush=True))
    print(f"{time.monotonic() - started:.0f} s, at most {manifest['peak_gib']} GiB of memory")


if __name__ == "__main__":
    main()
