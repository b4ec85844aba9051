"""The page in a real Chromium: what it shows of a server, what it keeps, and what it lets run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.page.conftest import HOSTILE, TOKEN, train, unlock
from tests.page.reading import TEXT, entries, is_quiet, milliseconds, rows, texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first may have to install Chromium


def test_with_a_token_it_shows_what_the_status_says(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    page.locator("#ask").wait_for()
    assert page.locator("#cards").is_hidden()
    assert "tells nothing without a token" in page.locator("#said").inner_text()
    unlock(page)
    page.locator("#facts li").first.wait_for()
    status, model = server.get("/v1/status"), server.get("/v1/model")
    assert page.locator("#model").inner_text() == status["model_id"]
    assert page.locator("#phase").inner_text() == "Ready"
    facts = " ".join(texts(page, "#facts li"))
    for fact in (model["architecture"], "float32 on cpu", model["fingerprint"][:12], "V 300"):
        assert fact in facts
    (trainer,) = status["clients"]
    digest = status["draft_vocabs"][0]["digest"]
    ((name, requests, _, vocab),) = rows(page, "trainers")
    assert (name, requests) == (trainer["client"], str(trainer["requests"]))
    assert vocab == f"{digest[:12]}…, 150 ids"
    assert page.locator("#coverage").inner_text() == f"{100 * status['draft_vocab_coverage']:.1f} %"
    use = entries(page, "use")
    assert use["padding"] == f"{100 * status['padding_share']:.1f} %"
    for kind in ("sent", "real", "supervised", "trained"):
        assert use[f"tokens {kind}"] == str(status["tokens"][kind])
    assert status["tokens"]["sent"] == 96
    assert page.locator("#queued").inner_text() == "0"
    assert page.locator("#places").inner_text() == "of 64 places taken"
    assert entries(page, "held")["tokens"] == "0 of 1,048,576"
    for stage, *shown in rows(page, "stages"):
        for text, kind in zip(shown, ("median_s", "p90_s", "longest_s"), strict=True):
            assert milliseconds(text) == pytest.approx(
                1000 * status["stages"][stage][kind], abs=0.6
            )
    shares = entries(page, "shares")
    assert list(shares) == ["model", "network", "trainers"]
    assert sum(float(share.split()[0]) for share in shares.values()) == pytest.approx(100, abs=0.2)
    assert page.locator("#bound").inner_text().lower() == status["bound_by"]
    ((code, _, words),) = rows(page, "errors")
    (error,) = status["errors"]
    assert code == error["code"]
    assert words == f"{error['detail']} ({error['client']}, request {error['request_id']})"
    assert page.locator("#no-trainers, #no-stages, #no-errors").locator("visible=true").count() == 0
    is_quiet(page)


def test_rates_are_the_counts_between_two_polls(start: Any, visit: Any) -> None:
    """By the server's own clock: 4,000 tokens more in the 2 s between two statuses."""
    server = start(token=None)
    page = visit("about:blank")
    status = server.get("/v1/status")
    polls = 0

    def answer(route: Any) -> None:
        nonlocal polls
        changed = json.loads(json.dumps(status)) | {"uptime_s": 100 + 2 * polls}
        for kind, each in (("sent", 5000), ("real", 4000), ("supervised", 3000), ("trained", 2000)):
            changed["tokens"][kind] = polls * each
        changed["body_bytes"] = {"received": polls * 2048, "sent": polls * 4 * 1024**2}
        polls += 1
        route.fulfill(json=changed)

    page.route("**/v1/status", answer)
    page.goto(server.url)
    page.locator("#window:has-text('over the last')").wait_for()
    assert page.locator("#rate").inner_text() == "2,000"
    assert entries(page, "rates") == {
        "with padding": "2,500",
        "supervised": "1,500",
        "trained on": "1,000",
        "bytes received": "1.0 KiB/s",
        "bytes sent": "2.0 MiB/s",
    }


def test_before_the_first_trainer_it_says_what_to_do_next(start: Any, visit: Any) -> None:
    server = start(token=None)
    page = visit(server.url)
    page.locator("#cards").wait_for()
    assert page.locator("#ask").is_hidden()
    assert page.locator("#forget").is_hidden()
    assert f'RemoteEagle3Backend("{server.url}"' in page.locator("#no-trainers").inner_text()
    assert page.locator("#no-stages").inner_text() == "No request has been computed yet."
    assert page.locator("#no-errors").inner_text() == "None since the start."
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#refused:not(:empty)").wait_for()
    words = page.locator("#refused").inner_text()
    assert words.startswith("409 vocab_mapping_missing: no trainer has registered a draft vocab")
    assert re.search(r"\(request [0-9a-f]{32}\)$", words)
    is_quiet(page, "error: Failed to load resource: the server responded with a status of 409")


def test_a_wrong_token_is_told_and_asked_for_again(start: Any, visit: Any) -> None:
    page = visit(start().url)
    page.locator("#token").fill("wrong-token")
    page.keyboard.press("Enter")
    page.locator("#wrong:not(:empty)").wait_for()
    assert "does not know this token" in page.locator("#wrong").inner_text()
    assert page.locator("#cards").is_hidden()
    assert page.evaluate("document.activeElement.id") == "token"
    page.locator("#token").fill("schlüssel")
    page.keyboard.press("Enter")
    page.locator("#wrong:has-text('printable ASCII')").wait_for()
    unlock(page)
    is_quiet(page)


def test_the_token_is_kept_in_memory_alone(start: Any, visit: Any) -> None:
    server = start()
    page = visit(server.url)
    unlock(page)
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#refused:not(:empty)").wait_for()
    kept = page.evaluate(
        "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie,"
        " location.href, document.documentElement.outerHTML,"
        " document.getElementById('token').value, window.name, JSON.stringify(history.state)]"
    )
    assert TOKEN not in "".join(map(str, kept))
    assert kept[:3] == ["{}", "{}", ""]
    assert page.evaluate("async () => (await indexedDB.databases()).length") == 0
    assert page.context.cookies() == []
    assert page.url == f"{server.url}/"
    sent = [request.all_headers() for request in page.asked if TOKEN in str(request.all_headers())]
    assert sent
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in sent)
    assert TOKEN not in "".join(request.url + (request.post_data or "") for request in page.asked)
    assert not any("referer" in request.all_headers() for request in page.asked)
    page.locator("#forget").click()
    page.locator("#ask").wait_for()
    page.reload()
    page.locator("#ask").wait_for()


def test_markup_from_a_model_stays_text(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    page.locator("#text").fill(TEXT)
    page.locator("#top").fill("20")
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    shown = texts(page, "#answer td:first-child .token")
    assert HOSTILE[0].replace(" ", "␣") in shown
    assert HOSTILE[1].replace(" ", "␣") in shown
    assert page.locator("#model").inner_text() == f"a{HOSTILE[0]}{HOSTILE[1]}b"
    assert "<img src=x onerror=1>" in page.locator("#errors").inner_text()
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    is_quiet(page)


def test_markup_in_any_text_of_a_status_stays_text(start: Any, visit: Any) -> None:
    """A server that lies: every text it could send, a trainer's name among them, is markup."""
    server = start(token=None)
    train(server)
    bad = HOSTILE[0] + HOSTILE[1]

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: spoil(each) for name, each in value.items()}
        if isinstance(value, list):
            return [spoil(each) for each in value]
        return bad if isinstance(value, str) else value

    status, model = spoil(server.get("/v1/status")), spoil(server.get("/v1/model"))
    refusal = {"code": bad, "detail": bad, "request_id": bad}
    page = visit("about:blank")
    page.route("**/v1/status", lambda route: route.fulfill(json={**status, "phase": "ready"}))
    page.route("**/v1/model", lambda route: route.fulfill(json=model))
    page.route("**/v1/inspect", lambda route: route.fulfill(status=422, json=refusal))
    page.goto(server.url)
    page.locator("#cards").wait_for()
    assert rows(page, "trainers")[0][0] == bad
    assert rows(page, "errors")[0][0] == bad
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#refused:not(:empty)").wait_for()
    assert page.locator("#refused").inner_text() == f"422 {bad}: {bad} (request {bad})"
    page.unroute("**/v1/status")
    page.route("**/v1/status", lambda route: route.fulfill(json={**status, "phase": bad}))
    page.locator(f"#phase:has-text('{HOSTILE[0][:8]}')").wait_for()
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    is_quiet(page, "error: Failed to load resource: the server responded with a status of 422")


def test_a_server_that_is_gone_is_told_and_found_again(start: Any, visit: Any) -> None:
    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    server.stop()
    page.locator("#phase:text-is('Unreachable')").wait_for()
    assert "does not answer" in page.locator("#said").inner_text()
    assert page.locator("#cards").is_visible()  # what was known stays
    assert rows(page, "trainers") != []
    page.locator("#said:has-text('every 4 s')").wait_for()  # it asks less and less often
    page.locator("#text").fill("tea")
    page.locator("#go").click()
    page.locator("#refused:has-text('did not answer')").wait_for()
    server.start()
    page.locator("#phase:text-is('Ready')").wait_for()
    page.locator("#no-trainers").wait_for()  # another process, which has served none
    is_quiet(page, "error: Failed to load resource: net::ERR_CONNECTION_REFUSED")


def test_draining_and_loading_are_told(start: Any, visit: Any) -> None:
    server = start()
    page = visit(server.url)
    unlock(page)
    server.service.drain()
    page.locator("#phase:text-is('Draining')").wait_for()
    assert page.locator("#said").inner_text() == (
        "It refuses requests: the server is stopping; ask another."
    )
    status = {**server.get("/v1/status"), "phase": "loading", "model_id": None}
    page.route("**/v1/status", lambda route: route.fulfill(json=status))
    page.locator("#phase:text-is('Loading')").wait_for()
    is_quiet(page)


def test_a_hidden_page_asks_nothing(start: Any, visit: Any) -> None:
    server = start(token=None)
    page = visit("about:blank")
    page.clock.install()
    page.goto(server.url)
    page.locator("#cards").wait_for()
    hide = (
        "(is) => {"
        " Object.defineProperty(document, 'hidden', { get: () => is, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(hide, True)
    page.clock.run_for(5000)
    before = len(page.asked)
    page.clock.run_for(60_000)
    assert len(page.asked) == before
    with page.expect_request("**/v1/status"):
        page.evaluate(hide, False)
    with page.expect_request("**/v1/status"):
        page.clock.run_for(2500)
