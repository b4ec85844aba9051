"""`eagle3-remote verify` as its users run it: lines, JSON and exit codes, of several servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.client.verify.planted import TEXT, Planted, tokenizer_of
from tests.tiny_tokenizer import save_with_tokenizer
from typer.testing import CliRunner

from eagle3_client import verify_command
from eagle3_client.cli import app
from eagle3_schemas import tokenizer_digest
from eagle3_schemas.supervision import pack_bits
from eagle3_server import TransformersTarget


def test_the_command(live_server: Any, checkpoint: Path, tmp_path: Path, build_model: Any) -> None:
    from eagle3_server import ServerSettings
    from eagle3_server.loading import load_target

    url = live_server(load_target(ServerSettings(model=str(checkpoint), device="cpu")))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--tokenizer", str(checkpoint)]
    done = CliRunner().invoke(app, ["verify", url, *options, "--model", str(checkpoint), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["passed"] is True
    (server,) = document["servers"]
    assert {check["status"] for check in server["checks"].values()} == {"ok"}
    wrong = CliRunner().invoke(app, ["verify", live_server(build_model("llama")), *options])
    assert wrong.exit_code == 1
    assert "FAILED   tokenizer" in wrong.output
    assert "the target has 131" in " ".join(wrong.output.split())
    assert CliRunner().invoke(app, ["verify", url, "--text", "nope", *options[2:]]).exit_code == 2
    assert CliRunner().invoke(app, ["verify", *options]).exit_code == 2
    gone = CliRunner().invoke(app, ["verify", "http://127.0.0.1:9", *options])
    assert gone.exit_code == 1


def test_each_server_has_its_report_whatever_another_does(
    live_server: Any, checkpoint: Path, tmp_path: Path, model: Any
) -> None:
    class Foreign(Planted):
        """Its masks mark positions that the request's loss mask does not."""

        def supervise(self, job: Any) -> Any:
            result = super().supervise(job)
            mask = torch.ones(job.input_ids.shape, dtype=torch.bool)
            result.tensors["position_mask"] = pack_bits(mask)
            return result

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    foreign, right = (live_server(each(model, model_id="tiny")) for each in (Foreign, Planted))
    gone = "http://127.0.0.1:9"
    command = ["verify", gone, foreign, right, "--text", str(text)]
    command += ["--tokenizer", str(checkpoint), "--model", str(checkpoint), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["passed"] is False
    assert [(each["url"], each["passed"]) for each in document["servers"]] == [
        (gone, False), (foreign, False), (right, True),
    ]  # fmt: skip
    unreached, refused, full = (each["checks"] for each in document["servers"])
    assert [*unreached] == ["reachable"]
    assert unreached["reachable"]["remedy"].startswith("nothing listens there: start the server")
    assert refused["batch"]["status"] == "failed"
    assert "outside the shifted loss_mask" in refused["batch"]["detail"]
    assert {"hooks", "tokenizer"} < refused.keys()
    assert {"mapping", "text", "aux_layers", "supervision"} < full.keys()


def test_a_server_that_refuses_is_named_with_its_words(
    live_server: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAGLE3_TOKEN", "another")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    url = live_server(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), token="right")
    command = ["verify", url, "--text", str(text), "--tokenizer", str(checkpoint)]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 1
    assert told.stdout.splitlines()[0] == url
    assert "FAILED   auth           the bearer token is none of" in told.stdout
    assert "-> set EAGLE3_TOKEN" in told.stdout


def test_a_terminal_without_unicode_has_its_report(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_command, "_RETRY_FOR_S", 0.1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["verify", "http://127.0.0.1:9", "--text", str(text), "--tokenizer", str(checkpoint)]
    told = CliRunner(charset="ascii").invoke(app, command)
    assert told.exit_code == 1
    assert "FAILED   reachable" in told.stdout
    assert "serve MODEL --host ?" in told.stdout


def test_a_server_that_refuses_is_no_option_that_cannot_work(
    live_server: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """A target too shallow for default layers; and a wrong token, whose remedy is the variable."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        save_with_tokenizer(tmp_path / "shallow", num_hidden_layers=6)
    )
    digest = tokenizer_digest(tokenizer_of(checkpoint))
    target = TransformersTarget(model, model_id="shallow", tokenizer_digest=digest)
    url = live_server(target, token="right")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["verify", url, "--text", str(text), "--tokenizer", str(checkpoint)]
    refused = CliRunner().invoke(app, command, env={"EAGLE3_TOKEN": "right"})
    assert refused.exit_code == 1
    said = " ".join(refused.stdout.split())
    assert "name three aux_layer_ids in the request or on the server, as 0,2,4" in said
    wrong = CliRunner().invoke(app, command, env={"EAGLE3_TOKEN": "wrong"})
    assert wrong.exit_code == 1
    said = " ".join(wrong.stdout.split())
    assert "-> set EAGLE3_TOKEN to a token that the server was started with" in said
    assert "token=" not in said
