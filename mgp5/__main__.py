"""`python -m mgp5`, and with it `torchrun -m mgp5`."""

from .cli import main

main(prog_name="mgp5")
