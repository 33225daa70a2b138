"""How long a new process waits for its first compiled image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
from huggingface_hub.constants import HF_HOME

from ..engines import apply
from ..generators import load_generator
from ..hub import Parts
from .drawing import GUIDANCE, SAMPLERS, ends
from .suites import Row, waiting

FIRST = "import sys; from mgp5.bench.starting import first_image; first_image(*sys.argv[1:])"


def first_rows(parts: Parts, steps: int, tell: Callable[[str], None]) -> Iterator[Row]:
    """How long a process waits for its first compiled image: with nothing compiled before, then with what it left."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "HF_HOME": HF_HOME}
        for provider in ("compile, cold", "compile, warm"):
            tell(f"first image: {provider}")
            # -P: from the folder of a checkout, our kernels/ would be in the way of another package.
            command = [sys.executable, "-P", "-c", FIRST, parts.diffusion, str(steps)]
            done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True)
            row = {
                "name": "first image",
                "size": f"{parts.name}, {steps} steps, in a new process",
                "provider": provider,
            }
            if done.returncode:
                yield row | {"skipped": (done.stderr.strip() or "it was ended").splitlines()[-1][:160]}
                return
            yield row | json.loads(done.stdout.splitlines()[-1])


def first_image(name: str, steps: str) -> None:
    """Print how long the first image of this process takes, as columns of a row."""
    model = load_generator(name, torch.float32)
    apply(model, "compile")
    condition = torch.randn(2, *model.condition_shape, generator=torch.Generator().manual_seed(0))
    options = {
        "steps": int(steps),
        "guidance": GUIDANCE,
        "sampler": SAMPLERS[type(model)],
        "height": None,
        "width": None,
    }
    latents = model.draw(condition[1:], condition[:1], generators=[torch.Generator().manual_seed(0)], **options)
    seconds, _ = waiting(lambda: model.decode(ends(latents)[-1]), model.denoiser.device)
    print(json.dumps({"median": round(1000 * seconds, 1), "unit": "ms", "first_s": round(seconds, 2)}))
