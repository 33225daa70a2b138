"""The story folder: one PNG per picture, story.json, and events as JSON lines; what is made is kept at once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .. import __version__
from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, ImageStep, SceneStart, TextChunk
from ..files import read_json, write_bytes, write_text
from ..messages import Conversation, Image, inside

FORMAT, VERSION = "mgp5-story", 1
STORY = "story.json"
LOSSLESS = (".png", ".gif", ".bmp", ".tif", ".tiff")  # given pictures of these kinds stay lossless, others become JPEG


def write_png(image: Image, path: Path) -> None:
    """Write a picture as PNG with how it was made in its text chunks.

    `mgp5` holds `image.meta` as JSON; `prompt` and `seed` repeat the two that people look for; a picture without meta
    gets no chunks.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if image.meta:
        facts = {"version": __version__} | image.meta
        info.add_text("mgp5", json.dumps(facts, default=str))  # ASCII, so that every PNG reader shows it
        info.add_text("Software", f"mgp5 {facts['version']}")
        for key in ("prompt", "seed"):
            if key in facts:
                info.add_text(key, _clean(str(facts[key])))
    buffer = io.BytesIO()
    image.load().save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()  # PNG text knows neither NUL nor half surrogates


def read_png_metadata(path: Path) -> dict[str, Any]:
    """How a picture was made, as `write_png` noted it; {} for a picture that mgp5 did not make.

    Raises Mgp5Error for a file that is missing, no picture, or holds broken metadata.
    """
    from PIL import Image as pil

    try:
        with pil.open(path) as picture:
            text = getattr(picture, "text", {}).get("mgp5", "{}")
        facts = json.loads(text)
    except FileNotFoundError:
        raise Mgp5Error(f"no image at {path}", "check the path") from None
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise Mgp5Error(f"{path} has no metadata that can be read ({error})", "give a PNG made by mgp5") from None
    return facts if isinstance(facts, dict) else {}


class StoryFolder:
    """A folder that holds one story or chat and grows with it. Make one with `create` or `open`.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Equal in-memory images are told apart by their pixels; holding these keeps their ids from being used again.
        self._kept: dict[int | Path, tuple[str, object]] = {}
        self._numbers = count(1)

    @classmethod
    def create(cls, out: Path) -> StoryFolder:
        """A new folder for a new story. Raises Mgp5Error if `out` is taken or cannot be written."""
        try:
            if (out / STORY).exists():
                raise Mgp5Error(
                    f"--out {out} already holds a story", "choose another --out, or resume it with mgp5 chat --resume"
                )
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".mgp5-probe"
            probe.write_bytes(b"")
            probe.unlink()
        except (FileExistsError, NotADirectoryError):
            raise Mgp5Error(f"--out {out} has a file in its way, expected a folder", "choose another --out") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise Mgp5Error(f"--out {out} cannot be written ({reason})", "choose another --out") from None
        return cls(out)

    def discard(self) -> None:
        """Remove the folder if there is nothing in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> StoryFolder:
        """The folder of an earlier story, given as the folder or its story.json. Raises Mgp5Error if there is none."""
        folder = path.parent if path.name == STORY else path
        if not (folder / STORY).is_file():
            raise Mgp5Error(f"{folder} holds no {STORY}", "give a folder that mgp5 story or mgp5 chat wrote")
        return cls(folder)

    def keep(self, image: Image) -> Path:
        """Make sure a picture is in the folder, and say where. A picture kept before is not written again."""
        key = image.path if image.pixels is None else id(image.pixels)
        if key not in self._kept:
            self._kept[key] = (self._own_name(image) or self._write(image), image.pixels)
        return self.path / self._kept[key][0]

    def _own_name(self, image: Image) -> str:
        """The relative path of a picture that already lies in the folder, else ""."""
        if image.path is None:
            return ""
        path, root = image.path.resolve(), self.path.resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) and path.is_file() else ""

    def _write(self, image: Image) -> str:
        """Write a generated picture as PNG, a given one upright and without its private EXIF data; return the name."""
        lossless = image.meta or image.path is None or image.path.suffix.lower() in LOSSLESS
        name = self._free_stem() + (".png" if lossless else ".jpg")
        if lossless:
            write_png(image, self.path / name)
        else:
            buffer = io.BytesIO()
            image.load().save(buffer, "JPEG", quality=92)
            write_bytes(self.path / name, buffer.getvalue())
        return name

    def _free_stem(self) -> str:
        """The next of 001, 002, ... that no picture in the folder has, whoever put it there."""
        stems = map("{:03d}".format, self._numbers)
        return next(stem for stem in stems if not any((self.path / (stem + end)).exists() for end in (".png", ".jpg")))

    def save(
        self, conversation: Conversation, *, model: str, seed: int | None, options: Mapping[str, Any], title: str = ""
    ) -> None:
        """Write the pictures that are not in the folder yet, then story.json; meant to be called after every scene.

        Args:
            conversation: the whole story so far.
            model, seed, options: how it is made; `options` must be JSON-ready.
            title: heading of the page; "" for none.
        """
        names = [self.keep(image).relative_to(self.path).as_posix() for image in conversation.images]
        story = {
            "format": FORMAT,
            "version": VERSION,
            "title": title,
            "model": model,
            "seed": seed,
            "options": dict(options),
            "messages": conversation.to_chat(iter(names)),
        }
        text = json.dumps(story, ensure_ascii=False, indent=2, default=str)
        write_text(self.path / STORY, text)

    def load(self) -> tuple[Conversation, dict[str, Any]]:
        """The story so far, and its title, model, seed and options.

        Raises Mgp5Error when story.json is broken, of another format, or names a picture that is missing or elsewhere.
        """
        story = _read_story(self.path / STORY)
        for path in _image_paths(story["messages"], self.path / STORY):
            if not inside(self.path, path).is_file():
                raise Mgp5Error(f"{self.path / STORY} names the picture {path!r}, which is not there", "put it back")
        facts = {"title": "", "model": "", "seed": None, "options": {}}
        return Conversation.from_chat(story["messages"], self.path), facts | {
            key: value for key, value in story.items() if key not in ("format", "version", "messages")
        }


def _read_story(path: Path) -> dict[str, Any]:
    """The JSON object of a story file, checked for format and version."""
    story = read_json(path, "give a folder that mgp5 story or mgp5 chat wrote, or start a new one")
    if story.get("format") != FORMAT or not isinstance(story.get("messages"), list):
        raise Mgp5Error(f"{path} is no story, expected an object with format {FORMAT!r}", "give a story's folder")
    if story.get("version") != VERSION:
        raise Mgp5Error(f"{path} has version {story.get('version')!r}, expected {VERSION}", "upgrade mgp5")
    if not isinstance(story.get("options", {}), dict):
        raise Mgp5Error(f"{path} has options that are no object", "repair the file")
    return story


def _image_paths(messages: list[Any], source: Path) -> list[str]:
    """Paths of all image parts; refuses what `Conversation.from_chat` takes for granted."""
    paths = []
    for index, message in enumerate(messages):
        content = message.get("content", []) if isinstance(message, dict) else None
        if not isinstance(content, str | list) or not all(isinstance(part, str | dict) for part in content):
            raise Mgp5Error(f"message {index} of {source} is malformed", "repair the file")
        for part in content if isinstance(content, list) else []:
            good = isinstance(part, dict) and isinstance(part.get("meta", {}), dict)
            if not good or "\0" in str(part.get("path")):
                raise Mgp5Error(f"message {index} of {source} has a malformed part", "repair the file")
            if part.get("type") == "image":
                paths.append(str(part.get("path")))
    return paths


def free_folder(stem: str) -> Path:
    """The first of stem-1, stem-2, ... in the working directory that does not exist."""
    return next(path for number in count(1) if not (path := Path(f"{stem}-{number}")).exists())


def keep_images(events: Iterator[Event], folder: StoryFolder) -> Iterator[Event]:
    """Pass events on; every image is put into the folder as it comes, and its event names the file."""
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, ImageDone):
                event = replace(event, image=replace(event.image, path=folder.keep(event.image)))
            yield event


class JsonEvents:
    """A view that writes every event as one JSON object per line, flushed, for other programs to read.

    Args:
        stream: where the lines go. An image is named by its path; None where it is in memory only.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> JsonEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._stream.write(json.dumps(_fields(event), default=str) + "\n")
        self._stream.flush()


def _fields(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object."""
    match event:
        case SceneStart():
            return {"event": "scene", "scene": event.scene, "kind": event.kind, "total": event.total}
        case TextChunk():
            return {"event": "text", "text": event.text}
        case ImageStep():
            return {"event": "image_step", "image": event.image, "step": event.step, "total": event.total}
        case ImageDone():
            path, meta = event.image.path, event.image.meta
            fields = {"event": "image", "image": event.index, "path": None if path is None else str(path)}
            return fields | {"seed": meta.get("seed"), "meta": meta}
        case Finished():
            values = {"reason": event.reason, "text": event.message.text, "images": len(event.message.images)}
            return {"event": "finished"} | values | {"meta": event.meta}
