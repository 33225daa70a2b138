"""A hub on this machine: the few pages of it that its client asks for, over HTTP, from a dictionary of files."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
LARGE = (".safetensors", ".bin", ".ckpt")  # kept as LFS files, with a SHA-256


class Hub(ThreadingHTTPServer):
    """Serves repositories, {id: {path: bytes}}, each at any revision.

    Attributes:
        asked: (method, path of the file, Range or None) of every request for a file.
        cut: path -> bytes after which the connection breaks, once.
        hold: path whose download stops in the middle until `go` is set; `reached` tells that it has.
        damaged: paths that are sent with another first byte.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked, self.cut, self.damaged = repos, [], {}, set()
        self.hold, self.reached, self.go = "", threading.Event(), threading.Event()
        self.daemon_threads = True

    def fetched(self) -> set[str]:
        """Files that were downloaded since the last call."""
        paths = {path for method, path, _ in self.asked if method == "GET"}
        self.asked.clear()
        return paths


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        pattern = r"/(api/models/)?([^/]+/[^/?]+)(?:/(revision|tree|resolve)/([^/?]+)(?:/([^?]+))?)?(?:\?.*)?"
        known = re.fullmatch(pattern, self.path)
        if known is None:  # what else a client asks for
            return self.answer(404, b"", {})
        _, place, page, revision, path = known.groups()
        page, revision = page or "revision", COMMIT if revision in (None, "main") else revision
        files = self.server.repos.get(place)
        if files is None or (path and path not in files):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if files is None else "EntryNotFound"})
        elif page == "resolve":
            self.send_file(files[path], path, revision)
        else:
            entries = [entry(path, data) for path, data in files.items()]
            body = {"id": place, "sha": revision, "siblings": entries} if page == "revision" else entries
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def send_file(self, data: bytes, path: str, revision: str) -> None:
        hub, part = self.server, self.headers["Range"]
        hub.asked.append((self.command, path, part))
        start = int(re.match(r"bytes=(\d+)-", part)[1]) if part else 0
        head = {"ETag": f'"{digest(path, data)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        head |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if part else {}
        if self.command == "GET" and path in hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "GET" and (path in hub.cut or path == hub.hold):
            self.start(206 if part else 200, len(data) - start, head)
            end = start + hub.cut.pop(path) if path in hub.cut else len(data) // 2  # a second try gets no further
            self.wfile.write(data[start:end])
            self.wfile.flush()
            if path == hub.hold:
                hub.reached.set()
                hub.go.wait(60)
            self.close_connection = True
        else:
            self.answer(206 if part else 200, data[start:], head)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.start(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def digest(path: str, data: bytes) -> str:
    """As git, or git LFS, names contents."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it, for both of its pages."""
    names = {"path": path, "rfilename": path, "oid": _git(data), "blobId": _git(data)}
    lfs = {"oid": digest(path, data), "sha256": digest(path, data), "size": len(data), "pointerSize": 130}
    return {"type": "file", "size": len(data)} | names | ({"lfs": lfs} if path.endswith(LARGE) else {})


@contextmanager
def running(hub: Hub):
    """A hub that answers."""
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        hub.shutdown()
        hub.server_close()
