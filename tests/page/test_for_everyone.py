"""The page in both schemes, on a phone, and by keyboard alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.page.conftest import TOKEN, train, unlock
from tests.page.reading import TEXT, is_quiet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first may have to install Chromium


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_both_schemes(start: Any, visit: Any, scheme: str) -> None:
    """WCAG's AA: a contrast of 4.5 at least, computed from what the browser computed."""
    server = start()
    train(server)
    page = visit(server.url, color_scheme=scheme)
    page.locator("#token").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#wrong:not(:empty)").wait_for()
    found = page.evaluate(CONTRASTS)
    unlock(page)
    page.locator("#text").fill(TEXT)
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    page.locator("#go:not([aria-disabled])").wait_for()
    found += page.evaluate(CONTRASTS)
    assert {"Ready", "Probe", "✓ in the draft vocab", "malformed_payload"} <= {
        each["text"] for each in found
    }
    low = [each for each in found if each["ratio"] < 4.5]
    assert low == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, re.findall(r"\d+", back)[:3])) / 765
    assert (lightness > 0.9) == (scheme == "light")
    assert (lightness < 0.1) == (scheme == "dark")


CONTRASTS = """() => {
  const numbers = (color) => color.match(/[0-9.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
  };
  return [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
      && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .map((node) => {
    const ends = [light(getComputedStyle(node).color), light(behind(node))].sort();
    let opacity = 1;
    for (let each = node; each; each = each.parentElement)
      opacity *= getComputedStyle(each).opacity;
    const ratio = (Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05);
    return { text: node.textContent.trim().slice(0, 40), ratio: opacity < 1 ? 0 : ratio };
  });
}"""


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_wider_than_the_screen(start: Any, visit: Any, width: int) -> None:
    """With the longest names that there can be."""
    server = start()
    train(server)
    status = server.get("/v1/status")
    status["model_id"] = "m" * 200
    status["clients"] = [{**status["clients"][0], "client": "t" * 64}] * 40
    status["errors"] = [{**status["errors"][0], "detail": "d" * 300, "request_id": "r" * 64}] * 20
    page = visit(server.url, viewport={"width": width, "height": 700})
    page.locator("#ask").wait_for()
    wide = "[document.documentElement.scrollWidth, window.innerWidth]"
    assert page.evaluate(wide) == [width, width]
    page.route("**/v1/status", lambda route: route.fulfill(json=status))
    unlock(page)
    page.locator("#text").fill(TEXT + "w" * 100)
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    assert page.evaluate(wide) == [width, width]
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll, .card, td, dl, .next')].filter((node) =>"
        " node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== 'inline')"
        ".map((node) => node.id || node.className)"
    )
    assert cut == []


def test_all_of_it_is_reached_by_tab_and_shows_where_one_is(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    page.locator("#token").wait_for()
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.locator("#cards").wait_for()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "(() => { const at = document.activeElement; const style = getComputedStyle(at);"
            " return [at.id || at.getAttribute('aria-labelledby') || at.tagName,"
            " style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth)]; })()"
        )
        if name != "BODY":
            assert outline >= 2, name
        reached.append(name)
    expected = ["forget", "h-trainers", "h-errors", "text", "vocab", "top", "go"]
    assert reached[:7] == expected
    page.locator("#text").focus()
    page.keyboard.type("tea")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#answer").wait_for()
    is_quiet(page)
