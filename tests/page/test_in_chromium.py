"""The page in a real Chromium: what it shows, keeps, and lets run; by keyboard, small and dark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.page.conftest import DRAFT_IDS, HOSTILE, TOKEN, train, unlock

pytestmark = pytest.mark.slow

UNAUTHORIZED = "error: Failed to load resource: the server responded with a status of 401"
TEXT = f"Tea for\ttwo\n{HOSTILE[0]} {HOSTILE[1]}"


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def entries(page: Any, list_id: str) -> dict[str, str]:
    return dict(zip(texts(page, f"#{list_id} dt"), texts(page, f"#{list_id} dd"), strict=True))


def rows(page: Any, table_id: str) -> list[list[str]]:
    lines = page.locator(f"#{table_id} tbody tr").all()
    return [[" ".join(cell.split()) for cell in line.locator("td").all_inner_texts()]
            for line in lines]  # fmt: skip


def is_quiet(page: Any, *expected: str) -> None:
    """No script failed, nothing was blocked, and nobody else was asked."""
    heard = [line for line in page.heard if not line.startswith((UNAUTHORIZED, *expected))]
    assert heard == []
    assert page.evaluate("window.violations") == []
    assert page.evaluate("window.ran") is None
    origin = re.match(r"http://[^/]+/", page.url)
    assert origin is not None
    assert all(request.url.startswith(origin[0]) for request in page.asked)


def milliseconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000}[unit]


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


def test_the_probe_shows_the_answer_and_the_answer_is_right(
    start: Any, visit: Any, checkpoint: Path
) -> None:
    """Against the endpoint, and against transformers alone."""
    import transformers

    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    page.locator("#text").fill(TEXT)
    page.locator("#top").fill("3")
    (digest,) = [each["digest"] for each in server.get("/v1/status")["draft_vocabs"]]
    page.locator("#vocab").select_option(digest)
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    answer = server.inspect(text=TEXT, top_k=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double().numpy()
    lines = page.locator("#answer tbody tr").all()
    assert len(lines) == len(ids) == len(answer["tokens"])
    for token_id, row, line, told in zip(ids, logits, lines, answer["tokens"], strict=True):
        weights = np.exp(row[DRAFT_IDS.numpy()])
        probs = weights / weights.sum()
        best = np.argsort(-probs)[:3]
        cells = line.locator("td").all()
        assert cells[0].locator(".token").get_attribute("title") == f"id {token_id}"
        titles = [each.get_attribute("title") for each in cells[1].locator(".token").all()]
        assert titles == [f"id {DRAFT_IDS[i]}" for i in best]
        assert titles == [f"id {each['token_id']}" for each in told["next_expected"]]
        shown = [
            float(text.split()[0])
            for text in cells[1].locator(".next > :last-child").all_inner_texts()
        ]
        assert shown == pytest.approx([100 * probs[i] for i in best], abs=0.06)
        widths = cells[1].evaluate(
            "(cell) => [...cell.querySelectorAll('.bar')].map((bar) =>"
            " bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
        )
        assert widths == pytest.approx([probs[i] for i in best], abs=0.02)
        entropy = -(probs * np.log(probs)).sum()
        assert float(cells[2].inner_text().split()[0]) == pytest.approx(entropy, abs=0.006)
        is_inside = int(row.argmax()) in set(DRAFT_IDS.tolist())
        assert cells[3].locator(".token").get_attribute("title") == f"id {row.argmax()}"
        words = "✓ in the draft vocab" if is_inside else "✗ not in the draft vocab"
        assert cells[3].inner_text().endswith(words)
    forms = texts(page, "#answer td:first-child .token")
    assert {"␣", "⇥", "↵"} <= set(forms)
    is_quiet(page)
    assert server.get("/v1/status")["tokens"]["sent"] == 96  # nobody's training


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
