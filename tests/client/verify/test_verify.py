"""`eagle3-remote verify` passes what is right, and names each planted error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny_tokenizer import VOCAB_SIZE, save_with_tokenizer
from typer.testing import CliRunner

from eagle3_client import RemoteEagle3Backend, verify, verify_served
from eagle3_client.cli import app
from eagle3_client.verify_local import LocalTarget
from eagle3_client.verify_report import VerifyReport
from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.supervision import pack_bits, unpack_bits
from eagle3_server import TransformersTarget

TEXT = "the cat sat on my mat, which is big; a dog ran up. " * 12
LAYERS = (1, 2, 3)  # defaults of seven layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that has learnt the text: only such a one expects what follows in it."""
    path = save_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([tokenizer_of(path)(TEXT)["input_ids"][:512]]).view(4, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.7
    model.save_pretrained(path)
    return path


def tokenizer_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()


class Planted(TransformersTarget):
    """A target of which one thing is wrong."""

    error = ""

    def supervise(self, job: Any) -> Any:
        if self.error.startswith("layers"):
            by = int(self.error.removeprefix("layers"))
            job = replace(job, aux_layer_ids=tuple(i + by for i in job.aux_layer_ids))
        if self.error == "permuted":
            ids = job.draft_vocab.selected_token_ids
            job = replace(job, draft_vocab=DraftVocab.from_ids(ids.sort().values))
        result = super().supervise(job)
        if self.error.startswith(("shift", "rows")):
            by = int(self.error.removeprefix("shift").removeprefix("rows"))
            shape = job.input_ids.shape
            probs = result.tensors["target_probs"]
            rows = probs.view(shape[0], shape[1] - 1, -1)
            result.tensors["target_probs"] = rows.roll(-by, dims=1).reshape(probs.shape)
        if self.error.startswith("shift"):
            mask = unpack_bits(result.tensors["position_mask"], shape)
            mask[:, :-1] = mask[:, :-1].roll(-by, dims=1)
            result.tensors["position_mask"] = pack_bits(mask)
        if self.error == "mask":
            result.tensors["position_mask"] = result.tensors["position_mask"] ^ 1
        return result

    def capture(self, job: Any) -> Any:
        result = super().capture(job)
        if self.error.startswith("shift") and "argmax" in result.tensors:
            by = int(self.error.removeprefix("shift"))
            rows = result.tensors["argmax"].view(job.input_ids.shape[0], -1)
            result.tensors["argmax"] = rows.roll(-by, dims=1).flatten()
        return result


@pytest.fixture
def run(serve: Any, model: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(error, …)`: the reports of servers, each with a planted error or none."""
    monkeypatch.setattr(verify_served, "_DRAFT_VOCAB_SIZE", 150)  # less than V: masks have zeros

    def build(*errors: str, local: bool = False, tokenizer: Any = None, **how: Any) -> Any:
        backends = []
        for number, error in enumerate(errors):
            served = how.get("models", [model] * len(errors))[number]
            target = Planted(served, model_id="tiny")
            target.error = error
            backend = RemoteEagle3Backend(
                "http://target", transport=serve(target), encoding="probs", rows="loss_mask"
            )
            backends.append((f"http://server-{number}", backend))
        load = (lambda _dtype: LocalTarget(model)) if local else None
        reports: list[VerifyReport] = verify.verify(
            backends, tokenizer or tokenizer_of(checkpoint), TEXT, load
        )
        for _, backend in backends:
            backend.close()
        return reports

    return build


def failed(report: VerifyReport) -> dict[str, str]:
    return {n: c.detail for n, c in report.checks.items() if c.status == "failed"}


def test_what_is_right_passes(run: Any) -> None:
    (report,) = run("", local=True)
    assert report.has_passed, str(report)
    assert [*report.checks] == [
        "hooks", "head", "packing", "bits_repeat",
        "tokenizer", "mapping", "text", "aux_layers", "supervision",
    ]  # fmt: skip
    assert report.checks["text"].values["perplexity"] < 3
    assert report.checks["supervision"].values["kl"] < 1e-6
    assert report.checks["aux_layers"].values["relative_error"] < 1e-5


@pytest.mark.parametrize("by", [1, -1])
def test_layers_that_are_one_off_are_named_by_a_copy(run: Any, by: int) -> None:
    (report,) = run(f"layers{by}", local=True)
    assert failed(report).keys() == {"aux_layers"}
    for layer in LAYERS:
        words = f"layer {layer}'s is layer {layer + by}'s output (off by {by:+d})"
        assert words in failed(report)["aux_layers"]


@pytest.mark.parametrize("by", [1, -1])
def test_layers_that_hardly_differ_are_told_from_each_other(run: Any, model: Any, by: int) -> None:
    """As in deep models, whose massive activations outweigh what a layer adds."""
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    (right,) = run("", local=True)
    assert right.checks["aux_layers"].status == "ok"
    (wrong,) = run(f"layers{by}", local=True)
    assert f"layer 3's is layer {3 + by}'s output (off by {by:+d})" in failed(wrong)["aux_layers"]


@pytest.mark.parametrize("by", [1, -1])
def test_rows_that_are_shifted_alone_are_no_permuted_mapping(run: Any, by: int) -> None:
    (report,) = run(f"rows{by}")
    assert failed(report).keys() == {"mapping", "text"}
    for words in failed(report).values():
        assert f"shifted by {by:+d}" in words


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("local", [False, True])
def test_a_shift_is_named_with_and_without_a_copy(run: Any, by: int, local: bool) -> None:
    (report,) = run(f"shift{by}", local=local)
    assert failed(report).keys() == {"text"} | ({"supervision"} if local else set())
    assert f"shifted by {by:+d}" in failed(report)["text"]
    if local:
        assert f"shifted by {by:+d} against the local forward" in failed(report)["supervision"]


def test_a_permuted_mapping_is_named(run: Any) -> None:
    """A sort on the way, say."""
    (report,) = run("permuted")
    assert "permuted mapping" in failed(report)["mapping"]


def test_a_mask_that_marks_other_positions_is_named(run: Any) -> None:
    (report,) = run("mask")
    assert failed(report).keys() == {"mapping"}
    assert "position_mask is wrong at" in failed(report)["mapping"]


def test_a_wrong_replica_is_named(run: Any, build_model: Any, model: Any, checkpoint: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        other.model.layers[3].mlp.down_proj.weight.mul_(3)
    first, second, third = run("", "", "", models=[model, other, model])
    assert not failed(first)
    assert not failed(third)
    assert "names another target, and its distributions are" in failed(second)["replica"]


def test_a_copy_of_another_target_is_told(run: Any, model: Any, monkeypatch: Any) -> None:
    copy = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    monkeypatch.setattr(LocalTarget, "__init__", lambda self, _: setattr(self, "_model", copy))
    (report,) = run("", local=True)
    assert failed(report).keys() == {"aux_layers", "supervision"}
    assert "is no layer's output" in failed(report)["aux_layers"]
    assert "another target than --model" in failed(report)["supervision"]


class Renumbered:
    """A tokenizer with the same tokens under other numbers."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def get_vocab(self) -> dict[str, int]:
        return {token: self._other(i) for token, i in self._inner.get_vocab().items()}

    def __call__(self, text: str, **how: Any) -> Any:
        ids = self._inner(text, **how)["input_ids"]
        return {"input_ids": [self._other(i) for i in ids]}

    def _other(self, token_id: int) -> int:
        return (token_id * 7 + 3) % VOCAB_SIZE


def test_a_wrong_tokenizer_shows_in_the_text(run: Any, checkpoint: Path) -> None:
    """This server has none to compare with."""
    (report,) = run("", tokenizer=Renumbered(tokenizer_of(checkpoint)))
    assert report.checks["tokenizer"].status == "unknown"
    assert failed(report).keys() == {"text"}
    assert "have no mass" in failed(report)["text"]
    assert "another tokenizer" in str(report.checks["text"].remedy)


def test_a_short_text_is_refused(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.TEXT", "the cat")
    with pytest.raises(InvalidRequest, match=r"the text has \d+ tokens, and 48 are needed"):
        run("")


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
