"""How a server process ends: drained on SIGTERM, at once on the second, non-zero when broken."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.sharing.conftest import PATIENCE_S, Trainer, problem


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to pass")


def test_a_server_drains_on_sigterm(started: Any, trainer: Any, is_right: Any) -> None:
    """Unready at once, still listening, what was admitted is finished, then exit code 0."""
    server = started(EAGLE3_DRAIN_DELAY_S="600", EAGLE3_GRACE_PERIOD_S="60")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        waiting = pool.submit(one.ask, 8)
        until(lambda: one.status()["queued_requests"] == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: one.http.get("/readyz").status_code == 503)
        assert one.http.get("/healthz").status_code == 200
        refused = one.ask(9)
        assert problem(refused)[:2] == (503, "not_ready")
        assert "stopping" in problem(refused)[2]
        assert "retry-after" in refused.headers
        server.go_on()
        assert is_right(7, computing.result(PATIENCE_S))
        assert is_right(8, waiting.result(PATIENCE_S))
    assert server.process.poll() is None  # it listens for the drain delay
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_without_a_delay_it_ends_when_its_work_is_done(
    started: Any, trainer: Any, is_right: Any
) -> None:
    server = started()
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in server.said)
        server.go_on()
        assert is_right(7, computing.result(PATIENCE_S))
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_work_that_outlasts_the_grace_period_is_given_up(started: Any, trainer: Any) -> None:
    server = started(EAGLE3_GRACE_PERIOD_S="1")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        server.process.send_signal(signal.SIGTERM)
        assert problem(computing.result(PATIENCE_S))[:2] == (503, "not_ready")
    assert server.ended() == 0
    assert "stopped without waiting for the model" in server.said
    assert "Traceback" not in server.said


def test_a_second_sigterm_ends_at_once(started: Any, trainer: Any) -> None:
    server = started(EAGLE3_GRACE_PERIOD_S="600", EAGLE3_DRAIN_DELAY_S="600")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.said)
        with suppress(httpx.TransportError):  # it may be told, or not
            assert problem(computing.result(PATIENCE_S))[:2] == (503, "not_ready")
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_a_lost_device_ends_the_process_with_an_error(started: Any, trainer: Any) -> None:
    server = started()
    one: Trainer = trainer(server.url)
    assert problem(one.ask(13))[:2] == (503, "not_ready")
    assert server.ended() == 1
    assert "the device failed for good" in server.said
    assert "device-side assert" in server.said


def test_sigterm_under_load_loses_no_request_that_was_admitted(
    started: Any, trainer: Any, is_right: Any
) -> None:
    """Four trainers ask one batch after the other until they are refused or cut off."""
    server = started(EAGLE3_GRACE_PERIOD_S="60")
    served = threading.Semaphore(0)

    def train(number: int) -> tuple[int, str]:
        one: Trainer = trainer(server.url, f"trainer-{number}")
        for count in range(1000):
            seed = 20 + (count + number) % 10
            try:
                answer = one.ask(seed, f"{number}-{count}")
            except httpx.TransportError:  # no listener, or a connection that it closed unasked
                return count, "no answer"
            if answer.status_code != 200:
                assert problem(answer)[:2] == (503, "not_ready")
                return count, "refused"
            assert is_right(seed, answer)
            served.release()
        raise AssertionError("the server never ended")

    def drain_output() -> None:
        for _ in server.process.stdout:
            pass

    reader = threading.Thread(target=drain_output)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        trainers = [pool.submit(train, number) for number in range(4)]
        for _ in range(12):
            assert served.acquire(timeout=PATIENCE_S)
        server.process.send_signal(signal.SIGTERM)
        outcomes = [each.result(PATIENCE_S) for each in trainers]
    assert server.ended() == 0
    reader.join(PATIENCE_S)
    assert sum(count for count, _ in outcomes) >= 12
    assert "Traceback" not in server.said


def test_no_token_is_ever_told(started: Any, trainer: Any, tmp_path: Path) -> None:
    """Whatever is asked, right or wrong: not in the log, nor in any answer."""
    secrets = {name: f"{name}-{os.urandom(8).hex()}" for name in ("environ", "file", "wrong")}
    file = tmp_path / "tokens"
    file.write_text(secrets["file"])
    server = started(
        EAGLE3_TOKEN=secrets["environ"],
        EAGLE3_TOKEN_FILE=str(file),
        EAGLE3_LOG_FORMAT="json",
        EAGLE3_MAX_TOKENS_PER_REQUEST="5000",
    )
    answers: list[httpx.Response] = []
    for name in ("environ", "file"):
        one: Trainer = trainer(server.url, name, authorization=f"Bearer {secrets[name]}")
        answers += [one.ask(1), one.ask(2), one.http.get("/v1/status")]
        answers += [one.http.get("/metrics"), one.http.get("/no-such-path")]
        answers += [one.http.post("/v1/supervision", content=b"no frame")]
    for text in (secrets["wrong"], f"{secrets['environ']}x", secrets["environ"][:-1]):
        for path in ("/healthz", "/readyz", "/v1/status", "/v1/model", "/nowhere"):
            headers = {"authorization": f"Bearer {text}", "x-request-id": f"of {text}"}
            answers.append(httpx.get(server.url + path, headers=headers))
    lost = trainer(server.url, "lost", authorization=f"Bearer {secrets['environ']}").ask(13)
    assert problem(lost)[0] == 503  # with its traceback in the log
    assert server.ended() == 1
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 404}
    told = [server.said, *(f"{a.headers} {a.text}" for a in [*answers, lost])]
    for secret in secrets.values():
        assert not [text for text in told if secret in text]


@pytest.mark.parametrize("content", ["\n \n", None], ids=["empty", "missing"])
def test_a_token_file_that_cannot_serve_is_refused(tmp_path: Path, content: str | None) -> None:
    from typer.testing import CliRunner

    from eagle3_client.cli import app

    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["serve", "/no/such/model", "--token-file", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.output
    assert "token" in result.output
