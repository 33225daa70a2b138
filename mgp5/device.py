"""Which device and precision to use, where results are kept, and how quiet the libraries are."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import Mgp5Error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 100_000_000  # parameters; below, a CPU thread has so little to do that threads mostly wait for each other


def pick_device(name: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and weight type: float32 on a CPU, bfloat16 (float16 on older cards) on a GPU.

    Raises:
        Mgp5Error: the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Mgp5Error(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N", usage=True) from None
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise Mgp5Error(f"there is no device {name} here", "use --device cpu", usage=True)
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return device, torch.float32


def user_cache() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgp5"


def quiet_libraries() -> None:
    """Leave stderr to us: no loading bars and no advice from transformers, diffusers and the hub."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it misses a kernel that it can do without
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging
    from huggingface_hub.utils import disable_progress_bars

    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    for library in (transformers_logging, diffusers_logging, hub_logging):  # the hub's tells of every retry
        library.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries say to each other
    warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter")  # tests hold that it merges


def limit_threads_for_small_models(model: torch.nn.Module) -> None:
    """Run a small model on one CPU thread, unless OMP_NUM_THREADS says otherwise.

    Two threads gain the demo little on an idle machine, and on a busy one they cost it a factor of ten: OpenMP spins.
    """
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
