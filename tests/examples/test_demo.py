"""The parts of the demo around the loss: draft vocab, text, prefetch and report."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_client import count_token_ids
from eagle3_server import HFEagle3TargetModel

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
sys.path.insert(0, EXAMPLES)
try:
    import demo_report
    import text
    import training
finally:
    sys.path.remove(EXAMPLES)


def test_every_token_of_documents_counts() -> None:
    documents = [[4, 4, 4, 1, 1], [], [6, 1, 6, 2, 7]]
    counts = count_token_ids(text.every_token(documents), vocab_size=9)
    assert counts.tolist() == [0, 3, 1, 0, 3, 0, 2, 1, 0]


def test_batches_are_padded_on_the_right_and_repeatable() -> None:
    documents = [list(range(1, 10)), list(range(20, 23))]
    sequences = text.chunk(documents, sequence_length=4, min_length=2)
    assert sequences == [[1, 2, 3, 4], [5, 6, 7, 8], [20, 21, 22]]
    arguments = {"num_batches": 2, "batch_size": 3, "sequence_length": 4, "prompt_tokens": 1}
    batches = text.make_batches(sequences, **arguments)
    rows = {tuple(row) for row in batches[0].input_ids.tolist()}
    assert rows == {(1, 2, 3, 4), (5, 6, 7, 8), (20, 21, 22, 0)}
    short = batches[0].input_ids[:, 0].tolist().index(20)
    assert batches[0].attention_mask[short].tolist() == [1, 1, 1, 0]
    assert batches[0].loss_mask[short].tolist() == [0, 1, 1, 0]
    again = text.make_batches(sequences, **arguments)
    assert all(
        torch.equal(a, b)
        for x, y in zip(batches, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_held_out_modules_are_disjoint_from_training_modules() -> None:
    assert not set(text.TRAINING_MODULES) & set(text.HELD_OUT_MODULES)


def test_documents_of_a_module_are_its_own_functions_and_classes_with_methods() -> None:
    module, text_wrapper, *functions = text.module_documents("textwrap")
    assert module == "Text wrapping and filling."
    assert text_wrapper.startswith("TextWrapper\nObject for wrapping/filling text.")
    assert "\n\nTextWrapper.fill\nfill(text : string) -> string" in text_wrapper
    names = [document.partition("\n")[0] for document in functions]
    assert names == ["dedent", "fill", "indent", "shorten", "wrap"]


@pytest.fixture
def model(build_model: Any) -> Any:
    return build_model("llama")


def test_both_kinds_of_target_supervise_the_same_batches_in_order(
    model: Any, serve: Any, connect: Any, batch_of: Any, same: Any
) -> None:
    batches = [text.TokenBatch(*batch_of(131, (9, 4), seed=seed)) for seed in range(5)]
    remote = connect(serve(model), torch.tensor([3, 80, 7]), exact=True)
    fetched = list(training.supervise(remote, batches, depth=3))
    computed = list(training.supervise(HFEagle3TargetModel(model), batches))
    for batch, one, other in zip(batches, fetched, computed, strict=True):
        assert torch.equal(one.input_ids[:, :-1], batch.input_ids[:, 1:])
        attended = one.attention_mask.bool()
        same(one.aux_hidden_states[attended], other.aux_hidden_states[attended])


def test_stopping_early_leaves_the_remote_target_usable(
    model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    batches = [text.TokenBatch(*batch_of(131, seed=seed)) for seed in range(5)]
    remote = connect(serve(model), torch.tensor([3, 80, 7]))
    supervision = training.supervise(remote, batches)
    next(supervision)
    supervision.close()
    assert len(list(training.supervise(remote, batches))) == 5


@pytest.fixture
def make_report() -> Callable[..., demo_report.DemoReport]:
    def make(remote_losses: list[float]) -> demo_report.DemoReport:
        return demo_report.DemoReport(
            target="tiny",
            vocab_size=31,
            draft_vocab_size=11,
            threads=1,
            tokens=100,
            remote_losses=remote_losses,
            colocated_losses=[3.0, 2.0, 1.0],
            remote_tokens_per_s=10.0,
            colocated_tokens_per_s=20.0,
            response_bytes_per_token=30.0,
            held_out_tokens=40,
            held_out_loss_start=3.0,
            held_out_loss_end=1.5,
            step_accuracies=[0.5, 0.25],
            accept_length=1.625,
            coverage=0.9,
            seconds=5.0,
        )

    return make


def test_report_names_the_first_step_that_differs(
    make_report: Callable[..., demo_report.DemoReport],
) -> None:
    assert make_report([3.0, 2.0, 1.0]).losses_equal
    assert "yes, all 3 steps" in make_report([3.0, 2.0, 1.0]).summary()
    different = make_report([3.0, math.nextafter(2.0, 3.0), 1.0])
    assert different.first_difference == 2
    assert "NO, first difference in step 2" in different.summary()
    assert make_report([3.0, 2.0]).first_difference == 3
    assert make_report([math.nan, 2.0, 1.0]).first_difference == 1
