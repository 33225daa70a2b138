"""What tests look at pages with: the system's Chromium, without which they are skipped, and a parser."""

import html.parser
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HERE = "file:", "data:", "blob:", "about:", "http://127.0.0.1", "http://localhost", "ws://127.0.0.1"


@contextmanager
def browser_page(width: int = 1280, height: int = 800) -> Iterator[Any]:
    """A page of a fresh browser. `page.context.browser.new_context()` is another visitor.

    When the block ends well, the test fails if the console showed an error, a script failed, or something was asked
    of another host than this machine.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium in PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    problems: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
            context.on("weberror", lambda error: problems.append(str(error.error)))
            context.on("request", lambda asked: None if asked.url.startswith(HERE) else problems.append(asked.url))
            yield context.new_page()
        finally:
            browser.close()
    assert not problems, problems


def overflow(page: Any) -> int:
    """Pixels by which a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of a page; its tags have to close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._open = "", []
        self.feed(path.read_text())
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""

    def links(self, tag: str = "") -> list[str]:
        """What a page loads, or its tags of a name do."""
        names = ("src", "href", "srcset", "data")
        return [attrs[name] for found, attrs in self.tags for name in names if name in attrs and tag in (found, "")]
