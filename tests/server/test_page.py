"""`GET /`, as far as it can be told without a browser; `tests/page` has the rest."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.seeded_target import SeededTarget

import eagle3_server

FILE = Path(eagle3_server.__file__).with_name("page.html")


class Inline(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.texts: dict[str, list[str]] = {"script": [], "style": []}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in self.texts:
            self.texts[self.inside].append(data)


@pytest.fixture
def answer(serve: Any) -> Any:
    return serve(SeededTarget(), token="right").app_client.get("/")


def parsed(text: str) -> Inline:
    parser = Inline()
    parser.feed(text)
    return parser


def test_it_is_open_and_is_the_file(answer: Any) -> None:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == FILE.read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    assert "set-cookie" not in answer.headers


def test_the_policy_admits_its_own_script_and_style_alone(answer: Any) -> None:
    """The hashes are taken here of what a parser finds between the tags."""
    texts = parsed(answer.text).texts
    hashes = {}
    for tag, (text,) in texts.items():
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
    parts = answer.headers["content-security-policy"].split("; ")
    assert dict(part.split(" ", 1) for part in parts) == {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_it_stays_small_and_loads_nothing() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert "http://" not in text
    assert "https://" not in text
    page = parsed(text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "style", "action", "srcdoc"}
    assert not [name for name in names if name.startswith("on")]
    assert {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "base"} == set()


def test_its_script_makes_no_markup_and_keeps_nothing() -> None:
    ((script,), (style,)) = parsed(FILE.read_text(encoding="utf-8")).texts.values()
    for word in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser"),
        *("setHTML", "createContextualFragment", "eval(", "Function(", "import("),
        *("localStorage", "sessionStorage", "indexedDB", "cookie", "history.", "location.hash"),
        *("XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon"),
    ):
        assert word not in script, word
    assert "url(" not in style
    assert "@import" not in style
    assert re.findall(r"fetch\((\w+)", script) == ["path"]
    asked = set(re.findall(r"ask\('([^']+)'", script))
    assert asked == {"v1/status", "v1/model", "v1/inspect"}


def test_everything_a_user_fills_in_has_a_label() -> None:
    elements = parsed(FILE.read_text(encoding="utf-8")).elements
    labels = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    fields = {
        attributes["id"] for tag, attributes in elements if tag in ("input", "select", "textarea")
    }
    assert fields == labels
    assert len(fields) == 4
    for tag, attributes in elements:
        if tag == "th":
            assert attributes["scope"] == "col"
        if "aria-labelledby" in attributes:
            named = attributes["aria-labelledby"]
            assert named in {each.get("id") for _, each in elements}
