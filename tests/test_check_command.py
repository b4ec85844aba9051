"""`eagle3-remote check` as its users run it: exit codes, what it prints, and its JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from eagle3_client.cli import app
from eagle3_client.preflight_report import FLEET_CHECKS, SERVER_CHECKS
from eagle3_schemas import tokenizer_digest
from eagle3_server import TransformersTarget

pytestmark = pytest.mark.slow

TOKEN = "s3cret-of-the-server"


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory with a tokenizer of 131 words."""
    import transformers
    from tokenizers import Tokenizer, models

    words = models.WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0")
    path = tmp_path / "tokenizer"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def url(build_model: Any, live_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that asks for a token, which the environment has."""
    monkeypatch.setenv("EAGLE3_TOKEN", TOKEN)
    return str(live_server(build_model("llama"), token=TOKEN))


@pytest.fixture
def draft_config(tmp_path: Path) -> Any:
    """`draft_config(content)`: its path."""

    def write(content: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_what_passes_ends_with_0_and_lines_that_fit(url: str) -> None:
    result = check(url, "--aux-layer-ids", "1,2,3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == url
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1].startswith("all passed, in ")
    shown = [
        line[11:25].strip().replace(" ", "_") for line in lines if line[:2] == "  " != line[1:3]
    ]
    assert shown == list(SERVER_CHECKS)
    assert "1, 2, 3 (layer outputs), as passed\n" in result.stdout
    assert "\x1b" not in result.stdout  # plain where no terminal is
    assert TOKEN not in result.output


def test_what_fails_ends_with_1_and_its_remedy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLE3_TOKEN", "another-token")
    result = check(url)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    (place,) = (i for i, line in enumerate(lines) if "FAILED" in line)
    assert lines[place].startswith("  FAILED   auth           the bearer token is none of ")
    assert any(line.lstrip().startswith("-> set EAGLE3_TOKEN to a ") for line in lines[place:])
    assert "token=" not in result.output
    assert lines[-1].startswith("1 check failed, in ")
    assert "another-token" not in result.output


def test_the_json_document_has_the_same_keys_whatever_is_found(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("EAGLE3_URLS", f"{url},{dead}")
    result = check("--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert list(report) == ["format", "passed", "elapsed_s", "client", "servers", "fleet"]
    assert report["format"] == 1
    assert report["passed"] is False
    assert list(report["client"]) == ["version", "torch_version"]
    assert [server["url"] for server in report["servers"]] == [url, dead]
    for server in report["servers"]:
        assert_keys(server["checks"], SERVER_CHECKS)
    assert_keys(report["fleet"], FLEET_CHECKS)
    assert report["servers"][0]["checks"]["supervision"]["status"] == "ok"
    assert report["servers"][1]["checks"]["reachable"]["status"] == "failed"
    assert report["servers"][1]["checks"]["bandwidth"]["values"]["bytes_per_s"] is None


def assert_keys(checks: dict[str, Any], keys: dict[str, tuple[str, ...]]) -> None:
    assert list(checks) == list(keys)
    for name, found in checks.items():
        assert list(found) == ["status", "detail", "remedy", "values"]
        assert tuple(found["values"]) == keys[name]


def test_the_keys_are_pinned() -> None:
    """Programs read them: another set of keys needs another `format`."""
    assert {name: " ".join(keys) for name, keys in {**SERVER_CHECKS, **FLEET_CHECKS}.items()} == {
        "reachable": "",
        "ready": "",
        "round_trip": "median_ms requests",
        "auth": "token_sent",
        "versions": "server_version protocol_version torch_version",
        "fingerprint": "fingerprint expected model_id revision dtype device_name",
        "tokenizer": "digest expected",
        "aux_layer_ids": "aux_layer_ids expected",
        "supervision": "batch_size sequence_length elapsed_ms queue_ms compute_ms head_ms copy_ms "
        "server_ms answer_bytes",
        "bandwidth": "bytes_per_s is_lower_bound answer_bytes transfer_ms",
        "encoding": "encoding aux_bytes_per_token row_bytes supervised_share draft_vocab_size "
        "bytes_per_token",
        "throughput": "link_tokens_per_s compute_tokens_per_s tokens_per_s bound_by",
        "same_target": "servers compared",
        "same_numbers": "compared",
    }


def test_a_device_that_is_not_here_decides_the_encoding(url: str) -> None:
    report = json.loads(check(url, "--json", "--device", "cuda").stdout)
    values = report["servers"][0]["checks"]["encoding"]["values"]
    assert values["encoding"] == "hidden"
    assert values["row_bytes"] == 48 * 4
    report = json.loads(check(url, "--json", "--draft-vocab-size", 10).stdout)
    values = report["servers"][0]["checks"]["encoding"]["values"]
    assert (values["encoding"], values["row_bytes"]) == ("probs", 40)


@pytest.mark.parametrize("nested", [False, True])
def test_a_draft_config_names_layer_inputs(url: str, draft_config: Any, nested: bool) -> None:
    for theirs, code in (([2, 3, 4], 0), ([1, 2, 3], 1)):
        content: Any = {"eagle_aux_hidden_state_layer_ids": theirs, "model_type": "llama"}
        path = draft_config({"eagle_config": content} if nested else content)
        result = check(url, "--draft-config", path)
        assert result.exit_code == code, result.output


def test_layers_that_the_trainer_will_pass_are_asked_for_and_compared(
    url: str, draft_config: Any
) -> None:
    path = draft_config({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]})
    result = check(url, "--aux-layer-ids", "0,2,4")
    assert result.exit_code == 0, result.output
    assert (
        "0, 2, 4 (layer outputs), as passed; not the server's default 1, 2, 3: pass "
        "aux_layer_ids=[0,2,4] to the client"
    ) in " ".join(result.stdout.split())
    assert check(url, "--aux-layer-ids", "0,2,4", "--draft-config", path).exit_code == 0
    for arguments in ((), ("--aux-layer-ids", "1,2,3")):
        result = check(url, *arguments, "--draft-config", path)
        assert result.exit_code == 1, result.output
        assert "-> pass aux_layer_ids=[0,2,4] to the client, and --aux-layer-ids 0,2,4 here" in (
            " ".join(result.stdout.split())
        )


def test_a_draft_of_another_target_or_too_large_a_vocab_is_told(
    url: str, draft_config: Any, connect: Any
) -> None:
    ours = connect(urls=url, token=TOKEN).model_info().fingerprint
    for changes, code, words in (
        ({"target_fingerprint": ours, "draft_vocab_size": 100}, 0, "draft vocab of 100"),
        ({"target_fingerprint": "0" * 32}, 1, "the target that the run began with"),
        ({"draft_vocab_size": 5000}, 1, "a draft vocab of 5000 is larger"),
    ):
        path = draft_config({"eagle_aux_hidden_state_layer_ids": [2, 3, 4]} | changes)
        result = check(url, "--draft-config", path)
        assert result.exit_code == code, result.output
        assert words in " ".join(result.output.split())


def test_a_tokenizer_is_compared(
    build_model: Any, live_server: Any, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    digest = tokenizer_digest(AutoTokenizer.from_pretrained(tokenizer))
    for served, code in ((digest, 0), ("0" * 32, 1)):
        target = TransformersTarget(build_model("llama"), model_id="tiny", tokenizer_digest=served)
        result = check(live_server(target), "--tokenizer", tokenizer)
        assert result.exit_code == code, result.output
        assert ("numbers the tokens as the server's does" in result.stdout) == (code == 0)


def test_without_transformers_it_says_how_to_get_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = check("http://127.0.0.1:9", "--tokenizer", tokenizer)
    assert result.exit_code == 2
    assert 'pip install "transformers' in result.stderr


def test_bad_usage_ends_with_2_and_says_what_would_do(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"
    for arguments, words in (
        ([], "EAGLE3_URLS"),
        (["127.0.0.1:9"], "http://host:port"),
        ([url, url], "named once"),
        ([url, "--aux-layer-ids", "one"], "as 1,14,26"),
        ([url, "--draft-config", tmp_path / "absent.json"], "cannot be read"),
        ([url, "--device", "gpu"], "--device"),
        ([url, "--encoding", "topk"], "encoding must be"),
        ([url, "--expect-fingerprint", "abc"], "32 hex digits"),
        ([url, "--time-limit", "0"], "time_limit_s"),
        ([url, "--supervised-share", "2"], "supervised_share"),
        ([url, "--tokenizer", tmp_path / "absent"], "cannot be loaded"),
        ([url, "--token", TOKEN], "No such option"),
    ):
        result = check(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr, arguments
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "has no eagle_aux_hidden_state_layer_ids"),
        ({"eagle_aux_hidden_state_layer_ids": "2,3"}, "must be a list"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "inputs from 1 on"),
    ],
)
def test_a_draft_config_that_cannot_be_used_is_refused(
    draft_config: Any, content: Any, words: str
) -> None:
    result = check("http://127.0.0.1:9", "--draft-config", draft_config(content))
    assert result.exit_code == 2
    assert words in result.stderr


def test_as_a_process_stdout_is_the_document_alone(url: str) -> None:
    for arguments, code in (((url, "--json"), 0), ((url, "--aux-layer-ids", "9,9,9"), 1)):
        # An ASCII terminal too can print whatever a server says.
        ended = subprocess.run(
            [sys.executable, "-m", "eagle3_client.cli", "check", *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert ended.returncode == code, ended.stderr
        assert ended.stderr == ""
        if code == 0:
            assert json.loads(ended.stdout)["passed"] is True
        else:
            assert "FAILED   aux layer ids" in ended.stdout
