"""`preflight` of servers that cannot be used, or do not answer in time."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.client.preflight.conftest import (
    every_failure_has_a_remedy,
    only,
    statuses,
)
from tests.servers import GatedTarget

from eagle3_client import preflight
from eagle3_client.preflight_report import FLEET_CHECKS
from eagle3_schemas.protocol import MODEL_PATH, SUPERVISION_PATH
from eagle3_server import TransformersTarget


def test_a_wrong_token(build_model: Any, live_server: Any, connect: Any) -> None:
    url = live_server(build_model("llama"), token="right")
    for token in (None, "wrong"):
        report = connect(urls=url, token=token).preflight()
        checks = only(report)
        assert statuses(checks)["failed"] == {"auth"}
        assert statuses(checks)["ok"] == {"reachable", "ready", "round_trip"}
        assert "bearer token" in checks["auth"].detail
        assert "EAGLE3_TOKEN" in str(checks["auth"].remedy)
        assert checks["auth"].values["token_sent"] is (token is not None)
        assert "wrong" not in str(report)


def test_a_target_that_is_loading(build_model: Any, live_server: Any, connect: Any) -> None:
    may_load = threading.Event()

    def load() -> TransformersTarget:
        assert may_load.wait(60)
        return TransformersTarget(build_model("llama"), model_id="tiny")

    try:
        report = connect(urls=live_server(load)).preflight()
    finally:
        may_load.set()
    checks = only(report)
    assert statuses(checks)["failed"] == {"ready"}
    assert statuses(checks)["ok"] == {"reachable", "round_trip", "auth"}
    assert "the target is loading" in checks["ready"].detail
    assert "wait" in str(checks["ready"].remedy)


def test_nothing_listens(connect: Any, nothing_listens: str) -> None:
    report = connect(urls=nothing_listens).preflight()
    assert statuses(only(report))["failed"] == {"reachable"}
    assert "refused" in only(report)["reachable"].detail
    assert "nothing listens there" in str(only(report)["reachable"].remedy)


def test_a_name_that_does_not_resolve(connect: Any) -> None:
    report = connect(urls="http://no-such-host.invalid:1").preflight()
    assert statuses(only(report))["failed"] == {"reachable"}
    assert every_failure_has_a_remedy(report)


def test_a_web_server_of_another_kind(connect: Any, tmp_path: Path) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            report = connect(urls=f"http://127.0.0.1:{server.server_port}").preflight()
            assert statuses(only(report))["failed"] == {"reachable"}
            assert "HTTP 404 without an eagle3-remote error" in only(report)["reachable"].detail
            assert "correct the URL" in str(only(report)["reachable"].remedy)
            # One that says yes to all is found out by what it says it serves.
            for name in ("healthz", "readyz", "v1"):
                (tmp_path / name).mkdir() if name == "v1" else (tmp_path / name).write_text("{}")
            (tmp_path / "v1" / "model").write_text('{"protocol_version": 7}')
            checks = only(connect(urls=f"http://127.0.0.1:{server.server_port}").preflight())
        finally:
            server.shutdown()
            thread.join()
    assert statuses(checks)["failed"] == {"versions"}
    assert statuses(checks)["unknown"] == {"auth"}
    assert "expected protocol version 1; the server speaks 7" in checks["versions"].detail


def test_a_dtype_of_another_version_is_no_crash(bridge: Any, connect: Any) -> None:
    def change(request: httpx.Request) -> httpx.Response:
        response = bridge.handle_request(request)
        body = response.read().replace(b'"float32"', b'"float4_of_tomorrow"')
        headers = {"content-length": str(len(body))}
        return httpx.Response(response.status_code, headers=headers, stream=httpx.ByteStream(body))

    checks = only(connect(httpx.MockTransport(change)).preflight())
    assert statuses(checks)["failed"] == {"versions"}
    assert "float4_of_tomorrow" in checks["versions"].detail


def test_https_where_http_is_spoken_and_the_reverse(
    build_model: Any, live_server: Any, connect: Any, tcp: Any, certificate: tuple[Path, Path]
) -> None:
    url = live_server(build_model("llama")).replace("http://", "https://")
    checks = only(connect(urls=url).preflight())
    assert statuses(checks)["failed"] == {"reachable"}
    assert "try http://" in str(checks["reachable"].remedy)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def hand_shake(sock: socket.socket) -> None:
        try:
            context.wrap_socket(sock, server_side=True).close()
        except OSError:
            sock.close()

    checks = only(connect(urls=tcp(hand_shake)).preflight())
    assert statuses(checks)["failed"] == {"reachable"}
    assert "write https:// in the URL" in str(checks["reachable"].remedy)


# --- the time limit ---


def test_a_black_hole_does_not_outlast_the_limit_nor_hide_the_other(
    build_model: Any, live_server: Any, connect: Any, tcp: Any
) -> None:
    urls = [tcp(lambda _sock: None), live_server(build_model("llama"))]
    report = connect(urls=urls).preflight(time_limit_s=10)
    assert report.elapsed_s < 60  # not retry_for_s, which is 900 s
    hole, well = report.servers
    assert statuses(hole.checks)["failed"] == {"reachable"}
    assert "failed" not in statuses(well.checks)
    assert "supervision" in statuses(well.checks)["ok"]
    assert statuses(report.fleet) == {"skipped": set(FLEET_CHECKS)}


def test_an_answer_that_trickles_is_given_up(connect: Any, tcp: Any) -> None:
    is_over = threading.Event()

    def trickle(sock: socket.socket) -> None:
        with sock:
            sock.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not is_over.wait(0.05):
                try:
                    sock.sendall(b"x")
                except OSError:
                    return

    report = connect(urls=tcp(trickle)).preflight(time_limit_s=1)
    is_over.set()
    assert statuses(only(report))["failed"] == {"reachable"}
    assert "time limit, 1 s" in only(report)["reachable"].detail
    assert every_failure_has_a_remedy(report)


def test_a_forward_that_never_ends_is_given_up(
    build_model: Any, live_server: Any, connect: Any
) -> None:
    target = GatedTarget(TransformersTarget(build_model("llama"), model_id="tiny"))
    report = connect(urls=live_server(target)).preflight(time_limit_s=3, draft_vocab_size=50)
    checks = only(report)
    assert statuses(checks)["failed"] == {"supervision"}
    assert {"reachable", "ready", "round_trip", "fingerprint"} <= statuses(checks)["ok"]


@pytest.mark.slow
def test_an_answer_after_the_questions_time_does_not_count(
    build_model: Any, serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is given up before another is measured, which it would disturb."""
    a_is_measured, b_has_answered = threading.Event(), threading.Event()
    bridges = {name: serve(build_model("llama")) for name in "ab"}

    class LateB(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            host, path = request.url.host, request.url.path
            if host == "b" and path == MODEL_PATH:
                a_is_measured.wait(60)
                response = bridges[host].handle_request(request)
                threading.Timer(0.2, b_has_answered.set).start()
                return response
            if host == "a" and path == SUPERVISION_PATH:
                a_is_measured.set()
                b_has_answered.wait(60)
            return bridges[host].handle_request(request)

    monkeypatch.setattr(preflight, "_ASK_SHARE", 0.3)
    report = connect(LateB(), urls=["http://a", "http://b"]).preflight(time_limit_s=30)
    b = report.servers[1].checks
    assert statuses(b)["failed"] == {"auth"}
    assert "time limit" in b["auth"].detail
