"""`eagle3-remote bench` as its users run it: the table, its JSON, and exit codes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_tokenizer import save_with_tokenizer
from typer.testing import CliRunner, Result

from eagle3_client.bench import Bench
from eagle3_client.cli import app

TOKEN = "s3cret-of-the-server"
SMALL = ("--batch-size", 2, "--sequence-length", 9, "--steps", 2, "--prefetch", "1,2")
CELL_KEYS = ["encoding", "prefetch", "status", "detail", "remedy", "figures"]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def url(build_model: Any, live_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that asks for a token, which the environment has."""
    monkeypatch.setenv("EAGLE3_TOKEN", TOKEN)
    return str(live_server(build_model("llama"), token=TOKEN))


def test_the_table_fits_80_columns_and_ends_with_what_to_use(url: str) -> None:
    result = bench(url, *SMALL)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == url
    assert [line for line in lines if len(line) > 80] == []
    (titles,) = (i for i, line in enumerate(lines) if line.startswith("  encoding prefetch"))
    rows = [line.split()[:2] for line in lines[titles + 1 : titles + 7]]
    assert rows == [[e, d] for d in ("1", "2") for e in ("probs", "logits", "hidden")]
    times = [line.split()[:3] for line in lines[titles + 9 : titles + 15]]
    assert times == [[e, d, {"1": "2", "2": "4"}[d]] for e, d in rows]
    assert "draft vocab of 131" in " ".join(lines[1:5])  # V: 32000 is more than it has
    assert any(line.startswith("encoding ") and "tokens/s" in line for line in lines)
    assert any(line.startswith("-> ") for line in lines)
    assert lines[-1].startswith("in ")
    assert "\x1b" not in result.stdout
    assert TOKEN not in result.output


def test_the_json_document_has_all_figures_by_name(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAGLE3_URLS", url)
    result = bench("--json", *SMALL, "--encodings", "hidden,probs", "--draft-vocab-size", 50)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert " ".join(report) == (
        "format passed interrupted unanswered elapsed_s client urls target setup "
        "requests_answered cells recommended"
    )
    assert (report["format"], report["passed"], report["interrupted"]) == (1, True, False)
    assert report["unanswered"] is None
    assert report["urls"] == [url]
    assert report["requests_answered"] == {url: 12}
    assert report["target"]["encodings"] == ["probs", "logits", "hidden"]
    assert report["setup"] == {
        "batch_size": 2, "sequence_length": 9, "tokens_per_batch": 18, "supervised_per_batch": 10,
        "ids": "random", "draft_vocab_size": 50, "step_ms": 0.0, "device": "cpu",
        "aux_layer_ids": [1, 2, 3], "aux_dtype": "model", "exact": False, "rows": "loss_mask",
    }  # fmt: skip
    order = [(cell["encoding"], cell["prefetch"]) for cell in report["cells"]]
    assert order == [("hidden", 1), ("probs", 1), ("hidden", 2), ("probs", 2)]
    for cell in report["cells"]:
        assert list(cell) == CELL_KEYS
        assert cell["status"] == "ok"
        figures = cell["figures"]
        assert " ".join(figures) == (
            "requests rounds repeats tokens_per_s tokens_per_s_lowest tokens_per_s_highest "
            "received_bytes_per_token sent_bytes_per_token latency_ms wait_share busy_shares "
            "stages_ms bounded_by"
        )
        assert list(figures["latency_ms"]) == ["p50", "p90", "p99", "max"]
        assert list(figures["busy_shares"]) == ["target", "queue", "link", "host"]
        assert list(figures["stages_ms"]) == ["queue", "compute", "head", "copy", "send", "host"]
        counts = figures["requests"], figures["rounds"], figures["repeats"]
        assert counts == (2 * cell["prefetch"], 2, 0)
        assert figures["latency_ms"]["p99"] is None
        assert all(0 <= share <= 1 for share in figures["busy_shares"].values())
        assert 0 < figures["tokens_per_s_lowest"] <= figures["tokens_per_s"]
    assert list(report["recommended"]) == ["encoding", "prefetch", "detail", "remedy"]


def test_a_text_is_tokenized(build_model: Any, live_server: Any, tmp_path: Path) -> None:
    import transformers

    path = save_with_tokenizer(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on my mat. ")
    arguments = (live_server(model), *SMALL, "--encodings", "probs", "--text", text)
    result = bench(*arguments, "--tokenizer", path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["setup"]["ids"] == "text"
    alone = bench(*arguments)
    assert (alone.exit_code, alone.stderr) == (
        2, "--text and --tokenizer go together; give both or neither\n",
    )  # fmt: skip


def test_layers_are_asked_for_as_the_trainer_will(url: str, build_model: Any) -> None:
    result = bench(url, *SMALL, "--encodings", "probs", "--aux-layer-ids", "0,2,4")
    assert result.exit_code == 0, result.output
    result = bench(url, *SMALL, "--encodings", "probs", "--aux-layer-ids", "0,2,77")
    assert result.exit_code == 1
    assert "got [0, 2, 77]" in " ".join(result.output.split())


def test_several_servers_are_one_fleet(build_model: Any, live_server: Any) -> None:
    urls = [live_server(build_model("llama")) for _ in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = bench(*urls, dead, *SMALL[:-1], "4", "--steps", 6, "--encodings", "probs")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split("requests answered: ")[1].split()[:6]).split(", ")
    counts = {url: int(count) for url, count in (each.split() for each in words)}
    assert counts[dead] == 0
    assert sum(counts.values()) == 12
    assert counts.keys() == {*urls, dead}


def test_failures_end_with_1_in_the_servers_words(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAGLE3_TOKEN", "another-token")
    result = bench(url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the bearer token is none of" in result.stderr
    assert "\n-> set EAGLE3_TOKEN to a token that the server was started with\n" in result.stderr
    assert "token=" not in result.stderr
    assert "another-token" not in result.output
    result = bench("http://127.0.0.1:9", "--time-limit", 1)
    assert result.exit_code == 1
    assert "-> nothing listens there: start the server" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--encodings", "probs,topk", "encodings must be some of probs, logits, hidden; got"),
        ("--prefetch", "1,x", "--prefetch must be as 1,2,4; got '1,x'"),
        ("--prefetch", "0,1", "prefetch depths must be >= 1; got [0, 1]"),
        ("--batch-size", "0", "batch_size must be >= 1; got 0"),
        ("--sequence-length", "1", "sequence_length must be >= 2; got 1"),
        ("--steps", "1", "steps must be >= 2; got 1"),
        ("--step-ms", "-1", "step_s must be >= 0 and finite"),
        ("--supervised-share", "1.5", "supervised_share must be in (0, 1]; got 1.5"),
        ("--draft-vocab-size", "0", "draft_vocab_size must be >= 1; got 0"),
        ("--time-limit", "0", "time_limit_s must be > 0 and finite"),
        ("--aux-layer-ids", "one", "--aux-layer-ids must be as 1,14,26; got 'one'"),
        ("--aux-dtype", "int4", "aux_dtype must be 'model' or 'float8_e4m3'; got 'int4'"),
        ("--device", "tpu9", "--device must be cpu, cuda or cuda:0; got 'tpu9'"),
        ("--text", "nowhere.txt", "--text and --tokenizer go together"),
    ],
)
def test_bad_options_end_with_2_and_say_what_would_do(option: str, value: str, words: str) -> None:
    result = bench("http://127.0.0.1:9", option, value)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_without_a_server_it_says_how_to_name_one() -> None:
    result = bench()
    assert (result.exit_code, result.stderr) == (
        2, "name a server, as http://host:port, or set EAGLE3_URLS\n",
    )  # fmt: skip


def test_json_is_a_document_where_nothing_was_measured(
    url: str, build_model: Any, live_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = live_server(build_model("gemma2"), token=TOKEN)
    gone = "http://127.0.0.1:9"
    for arguments, code, kind, words in (
        ((gone, "--time-limit", 1), 1, "transport_error", "nothing listens there"),
        ((url, other), 1, "fingerprint_mismatch", "serve one model"),
        ((), 2, "invalid_request", "name a server, as http://host:port"),
        ((gone, "--prefetch", "1,x"), 2, "invalid_request", "--prefetch must be as 1,2,4"),
        ((gone, "--steps", "x"), 2, "invalid_request", "'--steps'"),
    ):
        result = bench(*arguments, "--json")
        assert result.exit_code == code, result.output
        document = json.loads(result.stdout)
        assert (document["format"], document["passed"]) == (1, False)
        error = document["error"]
        assert [*error] == ["code", "detail", "remedy"]
        assert error["code"] == kind
        assert words in f"{error['detail']} {error['remedy']}"
        assert words in result.stderr
    monkeypatch.setenv("EAGLE3_TOKEN", "another-token")
    assert json.loads(bench(url, "--json").stdout)["error"]["code"] == "unauthorized"
    assert bench(gone, "--steps", "x").stdout == ""


@pytest.mark.parametrize("command", ["check", "verify"])
def test_json_of_the_other_commands_is_one_too(command: str, tmp_path: Path) -> None:
    needed = ("--text", tmp_path / "none.txt", "--tokenizer", tmp_path)
    given = needed if command == "verify" else ()
    for options, words in (
        (given, "name a server, as http://host:port"),
        ((*given, "http://127.0.0.1:9", "--aux-layer-ids", "x"), "--aux-layer-ids must be as"),
        ((*given, "--none"), "--none"),
    ):
        result = CliRunner().invoke(app, [command, *map(str, options), "--json"])
        assert result.exit_code == 2, result.output
        document = json.loads(result.stdout)
        assert (document["passed"], document["error"]["code"]) == (False, "invalid_request")
        assert words in document["error"]["detail"]
        assert words in result.stderr


def test_an_interrupt_prints_what_there_is_and_ends_with_130(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Bench.run

    def interrupted(self: Bench) -> Any:
        report = run(self)
        report.is_interrupted = True
        return report

    monkeypatch.setattr(Bench, "run", interrupted)
    result = bench(url, *SMALL, "--encodings", "probs")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1].startswith("interrupted after ")
    assert "  probs           1" in result.stdout
