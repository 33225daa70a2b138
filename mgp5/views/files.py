"""Keep a story or chat in a folder (an image file each, and story.json), and write events as JSON lines."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import __version__
from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, ImageStep, Note, SceneStart, TextChunk
from ..files import Claim, read_json, write_bytes, write_text
from ..messages import Conversation, Image

if TYPE_CHECKING:
    import PIL.Image

FORMAT, VERSION = "mgp5-story", 1
STORY = "story.json"
LOSSLESS = (".png", ".gif", ".bmp", ".tif", ".tiff")  # images of users in these formats become PNG, others JPEG


def encode(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    """Return the contents of an image file of a kind, with the options of Pillow's `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_png(image: Image, path: Path) -> None:
    """Write an image as PNG, with its `meta`, if any, in text chunks: all as JSON, and what people look for again."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if image.meta:
        metadata = {"version": __version__} | image.meta
        info.add_text("mgp5", json.dumps(metadata, default=str))  # ASCII, so that every PNG reader shows it
        info.add_text("Software", f"mgp5 {metadata['version']}")
        for key in ("prompt", "seed"):
            if key in metadata:  # PNG text knows neither NUL nor half surrogates
                info.add_text(key, str(metadata[key]).replace("\0", "").encode("utf-8", "replace").decode())
    write_bytes(path, encode(image.load(), "PNG", pnginfo=info))


def read_png_metadata(path: Path) -> dict[str, Any]:
    """Return the `meta` of an image that `write_png` has written, {} for another; raises Mgp5Error for a broken one."""
    from PIL import Image as pil

    try:
        with pil.open(path) as picture:
            text = getattr(picture, "text", {}).get("mgp5", "{}")
        metadata = json.loads(text)
    except FileNotFoundError:
        raise Mgp5Error(f"no image at {path}", "check the path") from None
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise Mgp5Error(f"{path} has no metadata that can be read ({error})", "give a PNG made by mgp5") from None
    return metadata if isinstance(metadata, dict) else {}


class StoryFolder:
    """A folder that holds one story or chat and grows with it. Make one with `create` or `open`, and `close` it."""

    def __init__(self, path: Path, claim: Claim | None = None) -> None:
        self.path, self._claim = path, claim  # without a claim it is read only
        # Images in memory are told apart by the ids of their pixels, which are held so that no id is used again.
        self._kept: dict[int | Path | None, tuple[str, object]] = {}
        self._numbers = count(1)

    @classmethod
    def create(cls, out: Path, overwrite: bool = False) -> StoryFolder:
        """Claim the folder of a new story; one that it holds stays there until it is cleared (`overwrite`).
        Raises Mgp5Error if `out` holds a story, is taken or cannot be written."""
        claim = Claim(out)
        if (out / STORY).exists() and not overwrite:
            claim.close()
            raise Mgp5Error(f"--out {out} already holds a story", "choose another --out, or go on with it by --resume")
        return cls(out, claim)

    @classmethod
    def open(cls, path: Path, write: bool = False) -> StoryFolder:
        """Open the folder of a story, by its path or that of its story.json; claim it to `write`.
        Raises Mgp5Error if it holds no story, or is taken."""
        folder = path.parent if path.name == STORY else path
        if not (folder / STORY).is_file():
            raise Mgp5Error(f"{folder} holds no {STORY}", "give a folder that mgp5 story or mgp5 chat wrote")
        return cls(folder, Claim(folder) if write else None)

    def close(self) -> None:
        """Let others write into the folder; it is removed if it is new, and there is nothing in it."""
        if self._claim:
            self._claim.close()

    def adopt(self, image: Image, kept: Image) -> None:
        """Take note that an image is in the folder already: `kept`."""
        name = kept.path.resolve().relative_to(self.path.resolve()).as_posix()
        self._kept[_key(image)] = (name, image.pixels)

    def remove(self, images: Iterable[Image]) -> None:
        """Remove the files of images that are in the folder."""
        for image in images:
            if image.path and image.path.resolve().is_relative_to(self.path.resolve()):
                image.path.unlink(missing_ok=True)

    def clear(self, inputs: Iterable[Image]) -> None:
        """Remove the story that is in the folder; `inputs`, images of the next one, and files of others stay."""
        used = {image.path.resolve() for image in inputs if image.path}
        with contextlib.suppress(Mgp5Error):  # it is broken
            self.remove(image for image in self.load()[0].images if image.path.resolve() not in used)
        for name in (STORY, "story.html"):
            (self.path / name).unlink(missing_ok=True)

    def keep(self, image: Image) -> Path:
        """Write an image into the folder unless it is there already; return its path."""
        key = _key(image)
        if key not in self._kept:
            path, root = image.path.resolve() if image.path else None, self.path.resolve()
            here = path and path.is_relative_to(root) and path.is_file()
            self._kept[key] = (path.relative_to(root).as_posix() if here else self._write(image), image.pixels)
        return self.path / self._kept[key][0]

    def _write(self, image: Image) -> str:
        """Write a generated image as PNG, a user's upright and without its EXIF data; return the file's name."""
        stems = map("{:03d}".format, self._numbers)
        stem = next(stem for stem in stems if not any((self.path / (stem + end)).exists() for end in (".png", ".jpg")))
        if image.meta or image.path is None or image.path.suffix.lower() in LOSSLESS:
            write_png(image, self.path / f"{stem}.png")
            return f"{stem}.png"
        write_bytes(self.path / f"{stem}.jpg", encode(image.load(), "JPEG", quality=92))
        return f"{stem}.jpg"

    def save(self, conversation: Conversation, **record: Any) -> None:
        """Write the images that are not in the folder yet, then story.json: the story so far, and what it is made with.

        `record` are the other fields of story.json, which `load` gives back: model, seed, options, title and more.
        Raises Mgp5Error if a file cannot be written; story.json is then what it was.
        """
        names = [self.keep(image).relative_to(self.path).as_posix() for image in conversation.images]
        story = {"format": FORMAT, "version": VERSION, "title": ""} | record
        story["messages"] = conversation.to_chat(iter(names))
        write_text(self.path / STORY, json.dumps(story, ensure_ascii=False, indent=2, default=str))

    def load(self) -> tuple[Conversation, dict[str, Any]]:
        """Return the story so far, and its title, model, seed and options.
        Raises Mgp5Error if story.json is broken, of another format, or names an image that is missing or elsewhere."""
        path = self.path / STORY
        story = read_json(path, "give a folder that mgp5 story or mgp5 chat wrote, or start a new one")
        if story.get("format") != FORMAT or not isinstance(story.get("messages"), list):
            raise Mgp5Error(f"{path} is no story, expected an object with format {FORMAT!r}", "give a story's folder")
        if story.get("version") != VERSION:
            raise Mgp5Error(f"{path} has version {story.get('version')!r}, expected {VERSION}", "upgrade mgp5")
        if not isinstance(story.get("options", {}), dict):
            raise Mgp5Error(f"{path} has options that are no object", "repair the file")
        conversation = Conversation.from_chat(story["messages"], self.path)
        for image in conversation.images:
            if not image.path.is_file():
                raise Mgp5Error(f"{path} names {image.path.name!r}, which is not there", "put it back")
        metadata = {"title": "", "model": "", "seed": None, "options": {}}
        names = story.keys() - {"format", "version", "messages"}
        return conversation, metadata | {name: story[name] for name in names}


def _key(image: Image) -> int | Path | None:
    return image.path if image.pixels is None else id(image.pixels)


def free_folder(stem: str) -> Path:
    """Return the first of stem-1, stem-2, ... in the working directory that does not exist."""
    return next(path for number in count(1) if not (path := Path(f"{stem}-{number}")).exists())


def keep_images(events: Iterator[Event], folder: StoryFolder) -> Iterator[Event]:
    """Yield the events; every image is put into the folder as it comes, and its event names the file."""
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, ImageDone):
                event = replace(event, image=replace(event.image, path=folder.keep(event.image)))
            yield event


class JsonEvents(contextlib.AbstractContextManager):
    """Write every event as one JSON object per line; an image has the path that `keep_images` gave it, or null.
    Without `steps` those of images are left out."""

    def __init__(self, stream: TextIO, steps: bool = True) -> None:
        self._stream, self._steps = stream, steps

    def __call__(self, event: Event) -> None:
        """Write one event, and flush."""
        if isinstance(event, ImageStep) and not self._steps:
            return
        self._stream.write(json.dumps(_fields(event), default=str) + "\n")
        self._stream.flush()

    def __exit__(self, *error: object) -> None:
        pass


def _fields(event: Event) -> dict[str, Any]:
    match event:
        case SceneStart():
            return {"event": "scene", "scene": event.scene, "kind": event.kind, "total": event.total}
        case Note():
            return {"event": "note", "text": event.text}
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
