"""The one error a user meets: what was found and expected, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any


class Mgp5Error(Exception):
    """A failure the user can act on.

    The message is one line that names the file or flag, what was found and what was expected; the hint says what to do
    next. With `usage` the command line itself is wrong (exit code 2 instead of 1).
    """

    def __init__(self, message: str, hint: str = "", *, usage: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 2 if usage else 1

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


def told(error: Exception) -> str:
    """Return the line that tells an error. One that nobody foresaw is raised again where MGP5_DEBUG=1 asks for it."""
    known = isinstance(error, Mgp5Error)
    if not known and os.environ.get("MGP5_DEBUG") == "1":
        raise error
    line = str(error) if known else f"{type(error).__name__}: {error} (MGP5_DEBUG=1 shows where)"
    return " ".join(line.splitlines())


def counted(number: int, noun: str) -> str:
    """Return "1 update", "1,200 updates"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def raise_all(problems: Iterable[str], checks: Iterable[Callable[[], Any]] = ()) -> None:
    """Run all checks; raise one Mgp5Error (wrong usage) with the problems given and those that checks raise, if any."""
    found = list(problems)
    for check in checks:
        try:
            check()
        except Mgp5Error as error:
            found.append(str(error))
    if found:
        raise Mgp5Error("; ".join(dict.fromkeys(found)), usage=True)
