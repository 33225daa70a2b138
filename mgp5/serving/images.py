"""Images that clients send: data URLs and, where allowed, addresses on the public internet; never files."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from io import BytesIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from ..errors import Mgp5Error
from ..images import read_image
from ..messages import Image
from .request import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # decoders of other formats run programs or read other files
REDIRECTS = 3
URLSAFE = str.maketrans("-_", "+/")


def read_image_url(url: str, limits: Limits) -> Image:
    """Return the image at a URL; it is decoded once, so that a damaged one is refused here.
    Raises Mgp5Error for another kind of URL, what is no image of FORMATS, and an image above the limits."""
    url = url.strip()
    if url[:5].lower() == "data:":
        data = _data_of(url)
    elif not url.lower().startswith(("https://", "http://")):
        raise Mgp5Error("an image_url is neither a data URL nor an http address", "send data:image/png;base64,...")
    elif not limits.remote_images:
        raise Mgp5Error("this server fetches no remote images", "send the picture as a data URL")
    else:
        data = fetch(url, limits)
    return read_image_bytes(data, limits)


def read_image_bytes(data: bytes, limits: Limits) -> Image:
    """Return the image that the bytes of a file hold. Raises Mgp5Error as `read_image_url` does."""
    try:
        picture = read_image(BytesIO(data), "an image", formats=FORMATS, max_pixels=limits.pixels)
    except Mgp5Error as error:
        if error.message.endswith("is not an image"):
            raise Mgp5Error("an image is not a PNG, JPEG, WebP or GIF picture", "send one of these") from None
        raise
    return Image(pixels=picture)


def _data_of(url: str) -> bytes:
    """Return the bytes that a data URL holds (RFC 2397): base64 of either alphabet, wrapped, with padding or without.
    Its media type does not matter: the bytes tell what they are."""
    head, _, body = url.partition(",")
    if "base64" not in head.lower().split(";")[1:]:
        raise Mgp5Error("a data URL does not begin with data:image/TYPE;base64,", "encode the picture in base64")
    body = "".join(unquote(body).split()).translate(URLSAFE).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        raise Mgp5Error("a data URL is not valid base64", "encode the picture again") from None


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet: not this machine, its network, or a cloud's services."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    tunnelled = ip.version == 6 and (ip.sixtofour or ip.teredo or ip in ipaddress.ip_network("64:ff9b::/96"))
    return ip.is_global and not (ip.is_multicast or tunnelled)


def fetch(url: str, limits: Limits, allowed: Callable[[str], bool] = is_public) -> bytes:
    """Return the bytes at an http or https address, behind at most REDIRECTS redirects.

    A name is resolved once, and the IP address that `allowed` has checked is the one that is connected to; the same
    holds for each redirect. The certificate is checked for the name. Raises Mgp5Error if the address is not public, or
    the answer is an error, too large, or too slow.
    """
    deadline = time.monotonic() + limits.fetch_seconds
    try:
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
                raise Mgp5Error("a remote image is not at a plain http or https address", "send a data URL")
            with closing(_connect(parts, deadline, allowed)) as connection:
                # an answer that drips in slowly is ended from outside
                watch = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [connection.sock])
                watch.start()
                try:
                    answer = _ask(connection, parts, limits.fetch_bytes)
                finally:
                    watch.cancel()
            if time.monotonic() > deadline:
                raise TimeoutError
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    except ssl.SSLCertVerificationError:
        raise Mgp5Error("a remote image's server has no valid certificate of its name", "send a data URL") from None
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: a port or host that cannot be
        raise Mgp5Error("a remote image cannot be fetched", "send it as a data URL") from None
    raise Mgp5Error(f"a remote image is behind more than {REDIRECTS} redirects", "send it as a data URL")


def _connect(url: SplitResult, deadline: float, allowed: Callable[[str], bool]) -> http.client.HTTPConnection:
    """Return an open connection to the host of a URL; the deadline is one of `time.monotonic`."""
    port = url.port or (443 if url.scheme == "https" else 80)
    addresses = [info[4][0] for info in socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(map(allowed, addresses)):
        raise Mgp5Error("a remote image is not at a public address", "send it as a data URL")
    connection = http.client.HTTPConnection(url.hostname, port)
    connection.sock = socket.create_connection((addresses[0], port), timeout=max(0.001, deadline - time.monotonic()))
    if url.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=url.hostname)
    return connection


def _ask(connection: http.client.HTTPConnection, url: SplitResult, most: int) -> bytes | str:
    """Return the body of the answer, of at most so many bytes, or the address that it redirects to."""
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
    answer = connection.getresponse()
    if answer.status in (301, 302, 303, 307, 308):
        return answer.headers.get("Location", "")
    if answer.status != 200:
        raise Mgp5Error(f"a remote image answered with status {answer.status}", "check its address")
    data = answer.read(most + 1)
    if len(data) > most:
        raise Mgp5Error(f"a remote image has more than {most:,} bytes", "send a smaller one")
    return data


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
