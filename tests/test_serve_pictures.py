"""Pictures by URL: what is fetched from where, with a real server on this machine."""

import base64
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serve_process import data_url

from mgp5.errors import Mgp5Error
from mgp5.serving import images
from mgp5.serving.images import fetch, is_public, read_image_url
from mgp5.serving.request import Limits

LIMITS = Limits(remote_images=True, fetch_bytes=50_000, fetch_seconds=0.5)


class Site(BaseHTTPRequestHandler):
    """A page for each thing that can go wrong."""

    def do_GET(self):
        name, _, rest = self.path[1:].partition("?")
        self.server.asked.append(name)
        if name == "drip":
            for _ in range(50):
                self.wfile.write(b"H")
                self.server.asked.append("a byte")
                time.sleep(0.05)
            return
        targets = {"loop": "/loop", "away": f"http://localhost:{rest}/a.png", "file": "file:///etc/passwd"}
        targets["inside"] = "http://169.254.169.254/latest"
        self.send_response(404 if not name else 302 if name in targets else 200)
        self.send_header("Location", targets.get(name, "/"))
        self.end_headers()
        self.wfile.write({"a.png": b"\x89PNG", "huge": bytes(60_000)}.get(name, b""))

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """With TLS where it has a context."""

    context = None

    def get_request(self):
        connection, address = super().get_request()
        return self.context.wrap_socket(connection, server_side=True) if self.context else connection, address


@pytest.fixture
def site():
    with Server(("127.0.0.1", 0), Site) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_only_public_addresses_are_asked(site):
    private = "127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255"
    private += " ::1 :: fe80::1%eth0 fc00::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: ff02::1"
    assert [ip for ip in private.split() if is_public(ip)] == []
    assert is_public("8.8.8.8") and is_public("2606:4700::1111")
    port = site.server_port
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0"):
        with pytest.raises(Mgp5Error, match=r"not at a public address|cannot be fetched"):
            read_image_url(f"http://{host}:{port}/a.png", LIMITS)
    assert site.asked == []


def test_fetching_has_limits_and_follows_few_redirects(site):
    url, local = f"http://127.0.0.1:{site.server_port}", lambda ip: ip == "127.0.0.1"
    assert fetch(f"{url}/a.png?b=c", LIMITS, local) == b"\x89PNG"
    reasons = {"": "status 404", "loop": "redirects", "file": "plain http", "huge": "bytes", "drip": "be fetched"}
    for name, reason in reasons.items():
        with pytest.raises(Mgp5Error, match=reason):
            fetch(f"{url}/{name}", LIMITS, local)
    assert 0 < site.asked.count("a byte") < 50  # hung up on before its end
    asked = []
    with pytest.raises(Mgp5Error, match="not at a public address"):  # a redirect is looked at like the first
        fetch(f"{url}/away?{site.server_port}", LIMITS, lambda ip: asked.append(ip) or len(asked) == 1)
    for bad in ("http://", "http://a:b:c/", "http://user:word@127.0.0.1/", "http://127.0.0.1:99999/", "https://\x00/"):
        with pytest.raises(Mgp5Error):
            fetch(bad, LIMITS, local)
    with pytest.raises(Mgp5Error, match="fetches no remote images"):
        read_image_url(f"{url}/a.png", Limits())


def resolve(monkeypatch, *answers):
    """Let pictures.example be each of these addresses in turn; returns the names that were looked up."""
    real, asked, left = socket.getaddrinfo, [], list(answers)

    def resolver(host, port, *args, **more):
        if host != "pictures.example":
            return real(host, port, *args, **more)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in left.pop(0).split()]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return asked


CERTIFICATES = {  # the name that it is of, and whether the client trusts it
    "right": ("pictures.example", True),
    "another's": ("other.example", True),
    "signed by a stranger": ("pictures.example", False),
}


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")
@pytest.mark.parametrize("kind", CERTIFICATES)
def test_a_certificate_is_of_the_name_that_was_asked_for(kind, site, tmp_path, monkeypatch):
    name, trusted = CERTIFICATES[kind]
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    words = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -days 2"
    words += f" -addext subjectAltName=DNS:{name} -keyout {key} -out {certificate}"
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    site.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    site.context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate) if trusted else os.devnull)
    looked = resolve(monkeypatch, "127.0.0.1", "127.0.0.2")  # who looks twice gets another address
    limits, base = replace(LIMITS, fetch_seconds=20), f"https://pictures.example:{site.server_port}"
    get = partial(fetch, limits=limits, allowed=lambda ip: ip == "127.0.0.1")
    if kind == "right":
        assert get(f"{base}/a.png") == b"\x89PNG" and looked == ["pictures.example"]
        resolve(monkeypatch, "127.0.0.1")
        with pytest.raises(Mgp5Error, match="not at a public address"):
            get(f"{base}/inside")
        base = base.replace("pictures.example", "127.0.0.1")  # it has a certificate, of another name
    with pytest.raises(Mgp5Error, match="no valid certificate") as error:
        get(f"{base}/a.png")
    assert "\n" not in str(error.value) and site.asked.count("a.png") == (kind == "right")


def test_names_of_private_addresses_are_refused(site, monkeypatch):
    url = f"://pictures.example:{site.server_port}/a.png"
    for private in ("127.0.0.1", "8.8.8.8 127.0.0.1", "169.254.169.254", "10.0.0.1 8.8.8.8"):
        for scheme in ("http", "https"):
            looked = resolve(monkeypatch, private)
            with pytest.raises(Mgp5Error, match="not at a public address"):
                fetch(scheme + url, LIMITS)
            assert looked and not site.asked


def test_data_urls():
    image = read_image_url(data_url((40, 30), "blue", "JPEG"), Limits())
    assert image.load().size == (40, 30) and image.path is None
    assert set(images.FORMATS) == {"PNG", "JPEG", "WEBP", "GIF"}
    head, _, body = data_url((40, 30), "blue").partition(",")
    url = base64.urlsafe_b64encode(base64.b64decode(body)).decode()
    wrapped, quoted = base64.encodebytes(base64.b64decode(body)).decode(), body.replace("+", "%2B")
    kinds = ("image/png;charset=utf-8", "image/png;name=a.png", "image/PNG", "application/octet-stream", "")
    sent = [f"data:{kind};base64,{body}" for kind in kinds]
    sent += [f"{head},{other}" for other in (url, url.rstrip("="), wrapped, f" {body}\n", quoted)]
    for one in [*sent, f"{head.upper()},{body}"]:
        assert read_image_url(one, Limits()).load().getpixel((0, 0)) == (0, 0, 255)
    for kind in ("BMP", "TIFF"):
        with pytest.raises(Mgp5Error, match="not a PNG"):
            read_image_url(data_url(kind=kind), Limits())
