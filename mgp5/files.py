"""Write files that appear whole or not at all, claim folders, hash contents, read JSON; for all, without torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from .errors import Mgp5Error

GiB = 2**30  # bytes; the unit of all memory that mgp5 measures or estimates


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file, a folder or a link; move it there when the block succeeds.

    A reader, or whoever comes after a crash, finds the old content or the new one; with `durable`, also after a loss of
    power. A folder cannot replace one that has files in it. Raises OSError if it cannot be moved.
    """
    part = _part(path)
    _remove(part)
    try:
        yield part
        for written in (part, *part.rglob("*")) if durable else ():
            _flush(written)
        os.replace(part, path)
        if durable:
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def write_bytes(path: Path, contents: bytes | memoryview, durable: bool = False) -> None:
    """Write a file that appears whole or not at all. Raises Mgp5Error when the disk is full or `path` not writable."""
    try:
        with replacing(path, durable) as part:
            part.write_bytes(contents)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Mgp5Error(f"cannot write {path} ({reason})", "make room there or choose another --out") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as `write_bytes` does; half surrogate pairs, which UTF-8 cannot hold, become "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write a JSON file as `write_bytes` does; values that JSON does not know are written as their `str`."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode(), durable)


def read_json(path: Path, hint: str = "check the file") -> dict[str, Any]:
    """Read a JSON file that holds an object.
    Raises Mgp5Error with the file, the line in it that is not JSON, and the hint what to do."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Mgp5Error(f"no {path}", hint) from None
    except OSError as error:
        raise Mgp5Error(f"{path} cannot be read ({error.strerror})", hint) from None
    except json.JSONDecodeError as error:
        raise Mgp5Error(f"{path}:{error.lineno} is not JSON ({error.msg})", hint) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise Mgp5Error(f"{path} is not JSON ({error})", hint) from None
    if not isinstance(value, dict):
        raise Mgp5Error(f"{path} holds a JSON {type(value).__name__}, expected an object", hint)
    return value


def read_text(path: Path) -> str:
    """Return the contents of a UTF-8 file without a byte-order mark. Raises Mgp5Error when it cannot be read so."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Mgp5Error(f"{path} cannot be read as UTF-8 text ({error})", "save it as UTF-8") from None


def text_lines(text: str) -> list[str]:
    """Return the lines of a text that are not blank, stripped; form feeds, NEL and U+2028 end no line."""
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


class Claim(contextlib.AbstractContextManager):
    """The right of this process to write into a folder, until `close` or its end; a forked process does not inherit it.

    A file says whose it is: `.lock` in the folder, or `beside` one that is going to be replaced, or a file. Raises
    Mgp5Error if another process has the folder, or it cannot be written.
    """

    _file: TextIO | None = None

    def __init__(self, folder: Path, beside: bool = False) -> None:
        self._path = folder.resolve().with_name(f".{folder.resolve().name}.lock") if beside else folder / ".lock"
        self._process, self._new = os.getpid(), not self._path.parent.exists()
        try:
            while not self._take(folder):
                pass
        except (FileExistsError, NotADirectoryError):
            found = f"--out {folder} has a file in its way, expected a folder"
            raise Mgp5Error(found, "choose another --out") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise Mgp5Error(f"--out {folder} cannot be written ({reason})", "choose another --out") from None
        with contextlib.suppress(OSError):  # a full disk is told by what is written next
            program = " ".join((Path(sys.argv[0]).name, *sys.argv[1:2]))
            self._file.truncate(0)
            self._file.write(f"{program}, process {self._process}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
            self._file.flush()

    def _take(self, folder: Path) -> bool:
        """Lock the file; return False if whoever had it has removed it meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with self._file as file:
                file.seek(0)
                self._file = None
                found = f"another process is at work in {folder} ({file.read() or 'it has just begun'})"
            raise Mgp5Error(found, "wait for it, or choose another --out") from None
        except OSError:
            return True  # some network file systems have no locks
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False

    def close(self) -> None:
        """Let others write; a folder that this claim made and that is empty is removed."""
        file, self._file = self._file, None
        if file and self._process == os.getpid():
            with contextlib.suppress(OSError), file:
                self._path.unlink(missing_ok=True)
                if self._new:
                    self._path.parent.rmdir()

    def __exit__(self, *error: object) -> None:
        self.close()

    __del__ = close


def remove_folder(folder: Path) -> None:
    """Remove a folder; one that is removed only in part, as by a kill, no longer has its name."""
    part = _part(folder)
    _remove(part)
    shutil.rmtree(folder.rename(part))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that `replacing` left when its process was killed."""
    for part in folder.glob(".*.part"):
        _remove(part)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in 64 hexadecimal digits: for files whose hash other programs know."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any, size: int = 16) -> str:
    """Return the BLAKE2b hash of bytes, of a text, or of a value as JSON, in 2 x `size` hexadecimal digits."""
    if not isinstance(value, bytes):
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        value = text.encode(errors="surrogatepass")
    return hashlib.blake2b(value, digest_size=size).hexdigest()


def _part(path: Path) -> Path:
    path = path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.part")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
