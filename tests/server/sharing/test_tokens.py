"""Bearer tokens: on every path but the probes and the page, from files or the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.seeded_target import SeededTarget
from tests.server.sharing.conftest import VOCAB, problem

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings, app

PROBES = ["/healthz", "/readyz"]
OPEN = [*PROBES, "/"]
PAGE = Path(app.__file__).with_name("page.html")
GUARDED = [
    ("GET", "/v1/model"),
    ("GET", "/v1/status"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/input-embeddings"),
    ("GET", f"/v1/draft-vocabs/{VOCAB.digest}/head"),
    ("PUT", f"/v1/draft-vocabs/{VOCAB.digest}"),
    ("GET", "/v1/head"),
    ("POST", "/v1/supervision"),
    ("POST", "/v1/capture"),
    ("POST", "/v1/inspect"),
    ("POST", "/v1/self-check"),
    ("GET", "/no-such-path"),
]
WRONG = [
    None,
    "Bearer # rotated on Monday",
    "Bearer wrong",
    "Bearer",
    "Basic b25l",
    "Bearer one two",
    "one",
    "Bearer ONE",
]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("# rotated on Monday\nthree\n\n  four  \n")
    return path


def test_every_path_of_the_app_is_in_these_lists(trainer: Any, live_server: Any) -> None:
    one = trainer(live_server(SeededTarget()))
    paths = set(one.http.get("/openapi.json").json()["paths"])
    listed = {path.replace(VOCAB.digest, "{digest}") for _, path in GUARDED} | set(OPEN)
    assert paths <= listed


@pytest.mark.parametrize("token", [None, "one"])
def test_the_document_says_which_paths_ask_for_a_token(
    trainer: Any, live_server: Any, token: str | None
) -> None:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    one = trainer(live_server(SeededTarget(), token=token), **headers)
    document = one.http.get("/openapi.json").json()
    guarded = {
        path
        for path, item in document["paths"].items()
        for operation in item.values()
        if operation.get("security") == [{"bearer": []}]
    }
    assert guarded == (set(document["paths"]) - set(OPEN) if token else set())
    schemes = document.get("components", {}).get("securitySchemes", {})
    assert [(each["type"], each["scheme"]) for each in schemes.values()] == (
        [("http", "bearer")] if token else []
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_without_a_right_token_only_the_probes_and_the_page_answer(
    live_server: Any, trainer: Any, tokens: Path, wrong: str | None
) -> None:
    url = live_server(SeededTarget(), token="one,two", token_file=tokens)
    one = trainer(url, authorization="Bearer one")
    headers = {} if wrong is None else {"authorization": wrong}
    one.http.headers.pop("authorization")
    assert one.http.get("/", headers=headers).content == PAGE.read_bytes()
    for path in PROBES:
        assert one.http.get(path, headers=headers).json() in (
            {"status": "alive"},
            {"status": "ready"},
        )
    for method, path in GUARDED:
        answer = one.http.request(method, path, headers=headers)
        assert problem(answer)[:2] == (401, "unauthorized"), path
        assert answer.headers["www-authenticate"] == "Bearer"
        for secret in ("one", "two", "three", "four"):
            assert f" {secret} " not in problem(answer)[2]


@pytest.mark.parametrize("token", ["a b", "schlüssel", "a\x7f"])
def test_a_token_that_no_client_can_send_is_refused_untold(token: str) -> None:
    with pytest.raises(InvalidRequest, match="printable ASCII") as caught:
        ServerSettings(token=SecretStr(token)).tokens()
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", ["one", "two", "three", "four"])
def test_any_of_the_tokens_will_do(
    live_server: Any, trainer: Any, is_right: Any, tokens: Path, token: str
) -> None:
    url = live_server(SeededTarget(), token="one, two", token_file=tokens)
    one = trainer(url, authorization=f"Bearer {token}")
    assert is_right(1, one.ask(1))
    assert one.http.get("/metrics").status_code == 200
