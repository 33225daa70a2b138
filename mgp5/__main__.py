"""`python -m mgp5`, and with it `torchrun -m mgp5`."""

import os
import sys

# Python looks for modules where it was called too: there, this project's own `kernels` would hide Hugging Face's.
sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]

from .cli import main  # noqa: E402

main(prog_name="mgp5")
