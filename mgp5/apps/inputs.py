"""Read what the user gives of a story: images with the texts beside them, and lines to illustrate."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import SUFFIXES
from ..errors import Mgp5Error
from ..events import SceneKind
from ..files import read_text, text_lines
from ..messages import Image
from .open_model import Tell, silent

JUNK = ("Thumbs.db", "desktop.ini", "__MACOSX")  # that systems put into folders; left out without a word
LISTED = 9  # names in a line on what was left out


@dataclass(frozen=True)
class SceneInput:
    """What the user gives of a scene: image, text, both, or nothing, where the model continues."""

    image: Image | None = None
    text: str = ""

    @property
    def kind(self) -> SceneKind:
        """Which parts are given."""
        if self.image:
            return "given" if self.text else "narrated"
        return "illustrated" if self.text else "continued"

    def record(self, folder: Path) -> dict[str, str]:
        """Return what the story.json of a folder keeps: the text, and the image's path from there, "" in memory."""
        values = {"text": self.text} if self.text else {}
        if self.image:
            values["image"] = os.path.relpath(self.image.path.resolve(), folder.resolve()) if self.image.path else ""
        return values


def read_images(paths: Sequence[Path], tell: Tell = silent, skip_bad: bool = False) -> list[SceneInput]:
    """Return the images of files, and of folders in natural order, each with the text of the same stem, if any.

    `tell` is given a line for files that are left out. Raises Mgp5Error if there is no image, or one cannot be read;
    with `skip_bad` the latter is left out.
    """
    found, bad = [], []
    for file in (file for path in paths for file in (_images_in(path, tell) if path.is_dir() else [path])):
        note = _note_of(file)
        try:
            found.append(SceneInput(read_image(file), read_text(note).strip() if note else ""))
        except Mgp5Error as error:
            bad.append(error)
    if bad and not skip_bad:
        more = f"; and {len(bad) - 1} more" if bad[1:] else ""
        raise Mgp5Error(f"{bad[0]}{more}", "--skip-bad leaves out what cannot be read")
    for error in bad:
        tell(f"left out: {error}")
    if not found:
        names = ", ".join(map(str, paths))
        raise Mgp5Error(f"--images {names} holds no image", f"expected files with {', '.join(SUFFIXES)}", usage=True)
    return found


def _images_in(folder: Path, tell: Tell) -> list[Path]:
    """Return the image files of a folder, broken links among them; tell what else there is."""
    try:
        entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=natural)
    except OSError as error:
        raise Mgp5Error(f"--images {folder} cannot be read ({error.strerror})", "check its permissions") from None
    images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    used = {*images, *map(_note_of, images)}
    others = [f"{e.name}{'/' * e.is_dir()}" for e in entries if e not in used and e.name not in JUNK]
    if others:
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        tell(f"left out of {folder}: {', '.join(others[:LISTED])}{more}")
    return images


def _note_of(image: Path) -> Path | None:
    """Return the file with the text of an image."""
    notes = (image.with_suffix(suffix) for suffix in (".txt", ".TXT"))
    return next((note for note in notes if note.is_file()), None)


def read_image(path: Path) -> Image:
    """Return the image of a file, opened once, so that a broken one is reported before any work is done."""
    image = Image(path=path)
    image.load()
    return image


def read_lines(path: Path) -> list[SceneInput]:
    """Return each line of a text file that is not blank as a scene to illustrate."""
    lines = [SceneInput(text=line) for line in text_lines(read_text(path))]
    if not lines:
        raise Mgp5Error(f"--text {path} is empty", "write one scene per line", usage=True)
    return lines


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key of file names by which page2 comes before page10."""
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]
