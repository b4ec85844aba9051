"""`eagle3-remote verify` passes what is right, and names each planted error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.client.verify.planted import failed, tokenizer_of
from tests.tiny_tokenizer import VOCAB_SIZE

from eagle3_client.verify_local import LocalTarget
from eagle3_schemas.errors import InvalidRequest

LAYERS = (1, 2, 3)  # defaults of seven layers


def test_what_is_right_passes(run: Any) -> None:
    (report,) = run("", local=True)
    assert report.has_passed, str(report)
    assert [*report.checks] == [
        "hooks", "head", "packing", "bits_repeat",
        "tokenizer", "mapping", "text", "row_sums", "position_mask", "aux_layers", "supervision",
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


@pytest.mark.parametrize("error", ["loss mask", "thinned"])
def test_a_mask_that_does_not_heed_the_loss_mask_is_named(run: Any, error: str) -> None:
    """Shifted twice, say; where every token is supervised, that cannot be seen."""
    (report,) = run(error)
    assert failed(report).keys() == {"position_mask"}
    words = {"loss mask": "outside the shifted loss_mask", "thinned": "position_mask is wrong at"}
    assert words[error] in failed(report)["position_mask"]
    assert "do not train on it" in str(report.checks["position_mask"].remedy)


@pytest.mark.parametrize("error", ["halved", "negative", "nan"])
def test_rows_that_are_no_distributions_are_named(run: Any, error: str) -> None:
    (report,) = run(error)
    assert "row_sums" in failed(report)
    count = 1 if error in ("negative", "nan") else 508
    assert f"{count} of 508 rows" in failed(report)["row_sums"]


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


def test_a_short_text_is_refused(run: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"the text has \d+ tokens, and 48 are needed"):
        run("", text="the cat")
