"""Commands in this process, for tests of whole runs of a head."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

from accelerate.state import AcceleratorState
from click.testing import CliRunner

from mgp5.cli import main


def run(*args: object, home: Path, code: int = 0) -> str:
    """Run a command in a folder; return what it writes to stdout, or where it is refused to stderr."""
    AcceleratorState._reset_state(True)
    with chdir(home):
        result = CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout
