"""What the page lets go of: with its token, with the server's process, and after its patience."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.page.conftest import TOKEN, train, unlock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first may have to install Chromium

# Its patience, a hundredth as long, and a list of what it was.
HURRY = """
window.patience = [];
const timeout = AbortSignal.timeout.bind(AbortSignal);
AbortSignal.timeout = (ms) => { window.patience.push(ms); return timeout(ms / 100); };
"""
POLL = "document.dispatchEvent(new Event('visibilitychange'))"


class Held:
    """Requests of one path that get no answer until they are let go."""

    def __init__(self, page: Any, path: str) -> None:
        self._page, self._path = page, path
        self._routes: list[Any] = []
        page.route(path, lambda route: self._routes.append(route))

    def wait(self, ask: Callable[[], Any] = lambda: None) -> None:
        """Do what has the page ask, and wait until a request is held."""
        if not self._routes:
            with self._page.expect_request(self._path):
                ask()

    def let_go(self) -> None:
        """Have the server answer what was held, and all that comes."""
        while self._routes:
            self._routes.pop(0).continue_()
        self._page.unroute(self._path)


def all_of_it(page: Any) -> str:
    """Everything the document has, hidden or not: markup, title, and what stands in fields."""
    text: str = page.evaluate(
        "[document.documentElement.outerHTML, document.title,"
        " ...[...document.querySelectorAll('input, textarea')].map((each) => each.value)].join()"
    )
    return text


def secrets(server: Any) -> list[str]:
    """What only someone with the token knows."""
    status, model = server.get("/v1/status"), server.get("/v1/model")
    return [
        *(model["architecture"], model["fingerprint"][:12], model["dtype"], "V 300", "window.ran"),
        *(status["clients"][0]["client"], status["draft_vocabs"][0]["digest"][:12]),
        *(status["errors"][0]["code"], status["errors"][0]["request_id"], "a private text"),
    ]


def fill(page: Any) -> None:
    unlock(page)
    page.locator("#facts li:has-text('fingerprint')").wait_for()
    page.locator("#text").fill("a private text")
    page.locator("#go").click()
    page.locator("#answer").wait_for()


@pytest.mark.parametrize("how", ["the button", "a 401"])
def test_nothing_of_the_server_stays_without_its_token(start: Any, visit: Any, how: str) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    page.locator("#ask").wait_for()
    cards = "document.getElementById('cards').outerHTML"
    untouched = page.evaluate(cards)
    fill(page)
    known = all_of_it(page)
    words = secrets(server)
    assert [word for word in words if word not in known] == []
    if how == "the button":
        page.locator("#forget").click()
    else:
        page.route("**/v1/status", lambda route: route.fulfill(status=401, json={}))
    page.locator("#ask").wait_for()
    left = all_of_it(page)
    assert [word for word in words if word in left] == []
    assert page.evaluate(cards) == untouched
    assert page.locator("#up").inner_text() == ""
    assert page.title() == page.locator("#model").inner_text() == "eagle3-remote"
    assert page.locator("#cards").is_hidden()
    assert page.evaluate("document.activeElement.id") == "token"
    page.unroute_all()
    fill(page)  # and the probe works again


def test_forgetting_ends_a_poll_under_way(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    fill(page)
    held = Held(page, "**/v1/status")
    held.wait(lambda: page.evaluate(POLL))
    page.locator("#forget").click()
    page.locator("#ask").wait_for(timeout=2000)
    assert page.locator("#cards").is_hidden()
    held.let_go()
    with page.expect_response("**/v1/status"):  # a poll after it has ended
        page.evaluate(POLL)
    assert page.locator("#ask").is_visible()
    assert page.locator("#model").inner_text() == "eagle3-remote"


def test_a_poll_without_a_token_says_nothing_of_the_token_given_since(
    start: Any, visit: Any
) -> None:
    page = visit(start().url)
    page.locator("#ask").wait_for()
    held = Held(page, "**/v1/status")
    held.wait(lambda: page.evaluate(POLL))
    page.locator("#token").fill(TOKEN)
    page.keyboard.press("Enter")
    held.let_go()
    page.locator("#cards").wait_for(timeout=4000)
    assert page.locator("#wrong").inner_text() == ""
    assert page.locator("#ask").is_hidden()


def test_a_model_that_is_not_told_holds_nothing_up(start: Any, visit: Any) -> None:
    server = start()
    page = visit("about:blank")
    page.add_init_script(HURRY)
    page.route("**/v1/model", lambda _route: None)
    page.goto(server.url)
    unlock(page)
    page.locator("#window:has-text('over the last')").wait_for()  # two polls at least
    page.locator("#facts:has-text('did not come; asking again')").wait_for()
    page.unroute("**/v1/model")
    page.locator("#facts:has-text('fingerprint')").wait_for()


def test_a_probe_without_an_answer_ends_with_words(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit("about:blank")
    page.add_init_script(HURRY)
    page.goto(server.url)
    unlock(page)
    page.route("**/v1/inspect", lambda _route: None)
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#refused:has-text('did not answer within 120 s')").wait_for()
    assert 120_000 in page.evaluate("window.patience")
    page.unroute("**/v1/inspect")
    page.locator("#go").click()
    page.locator("#answer").wait_for()


def test_another_process_starts_the_rates_anew(start: Any, visit: Any) -> None:
    """Up for longer than the last one when it is first asked, with fewer tokens."""
    server = start(token=None)
    page = visit("about:blank")
    status = server.get("/v1/status")
    now: dict[str, Any] = {"instance": "a" * 32, "uptime_s": 100.0, "real": 9000}

    def answer(route: Any) -> None:
        now["uptime_s"] += 2
        changed = json.loads(json.dumps(status)) | {"uptime_s": now["uptime_s"]}
        changed["tokens"]["real"] = now["real"]
        route.fulfill(json=changed, headers={"x-eagle3-instance": now["instance"]})

    page.route("**/v1/status", answer)
    page.goto(server.url)
    page.locator("#window:has-text('over the last')").wait_for()
    now |= {"instance": "b" * 32, "real": 0}
    rate = page.locator("#rate:text-matches('^[^0-9]')")  # no number, or one below 0
    rate.wait_for()
    assert rate.inner_text() == "\N{EN DASH}"
    assert page.locator("#window").inner_text() == "measuring"
    page.locator("#window:has-text('over the last')").wait_for()
    assert page.locator("#rate").inner_text() == "0"


def test_another_model_that_loads_has_none_of_the_old_facts(start: Any, visit: Any) -> None:
    server = start(token=None)
    page = visit(server.url)
    page.locator("#facts:has-text('fingerprint')").wait_for()
    status, model = server.get("/v1/status"), server.get("/v1/model")
    status |= {"phase": "loading", "state": "loading the model", "uptime_s": 1.0}
    other = model | {"fingerprint": "0123456789abcdef" * 4}
    now = {"x-eagle3-instance": "b" * 32}
    page.route("**/v1/model", lambda route: route.fulfill(json=other))
    page.route("**/v1/status", lambda route: route.fulfill(json=status, headers=now))
    page.locator("#phase:text-is('Loading')").wait_for()
    assert page.locator("#facts").inner_text() == ""
    status["phase"] = "ready"
    page.locator("#facts:has-text('fingerprint 0123456789ab')").wait_for()


def test_a_strange_answer_is_told_from_none(start: Any, visit: Any) -> None:
    server = start(token=None)
    page = visit(server.url)
    page.locator("#cards").wait_for()
    status = server.get("/v1/status")
    del status["stages"]
    page.route("**/v1/status", lambda route: route.fulfill(json=status))
    page.locator("#phase:text-is('Not understood')").wait_for()
    words = page.locator("#said").inner_text()
    assert "answers in a form this page does not know; reload the page" in words
    page.unroute("**/v1/status")
    page.locator("#phase:text-is('Ready')").wait_for()


def test_an_age_is_right_though_the_clock_went_back(start: Any, visit: Any) -> None:
    page = visit(start(token=None).url)
    page.locator("#cards").wait_for()
    page.evaluate("(() => { const now = Date.now; Date.now = () => now() - 3600000; })()")
    page.route("**/v1/status", lambda route: route.abort())
    page.locator("#phase:text-is('Unreachable')").wait_for()
    found = re.search(r"what is below is (\S+) (m?s) old", page.locator("#said").inner_text())
    assert found is not None
    assert 0 <= float(found[1]) < 60


def test_the_probe_keeps_the_focus(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    page.locator("#text").fill("tea")
    held = Held(page, "**/v1/inspect")
    page.locator("#go").focus()
    held.wait(lambda: page.keyboard.press("Enter"))
    assert page.evaluate("document.activeElement.id") == "go"
    assert page.locator("#go").get_attribute("aria-disabled") == "true"
    page.keyboard.press("Enter")  # does nothing while one is under way
    held.let_go()
    page.locator("#answer").wait_for()
    assert page.evaluate("document.activeElement.id") == "go"
    assert page.locator("#go").get_attribute("aria-disabled") is None
    assert sum(request.url.endswith("/v1/inspect") for request in page.asked) == 1


def test_what_is_invisible_in_a_token_is_shown(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    answer = server.inspect(text="tea", top_k=1)
    answer["tokens"] = answer["tokens"][:1]
    answer["tokens"][0]["text"] = "a\x01b\x7fc\x85d\u200be\u202ef\u00a0g"
    page.route("**/v1/inspect", lambda route: route.fulfill(json=answer))
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    shown = page.locator("#answer td:first-child .token").inner_text()
    assert shown == "a␁b⟨U+007F⟩c⟨U+0085⟩d⟨U+200B⟩e⟨U+202E⟩f⟨U+00A0⟩g"


def test_the_fields_of_the_probe_stand_in_line(start: Any, visit: Any) -> None:
    page = visit(start(token=None).url)
    page.locator("#cards").wait_for()
    for one, other in (("#vocab", "#top"), ("label[for=vocab]", "label[for=top]")):
        assert page.locator(one).bounding_box()["y"] == page.locator(other).bounding_box()["y"]
