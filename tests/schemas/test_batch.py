"""`Eagle3TargetBatch` and `Eagle3TargetBackend`: the contract a trainer codes against."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import fields

import pytest
import torch

from eagle3_schemas import Eagle3TargetBackend, Eagle3TargetBatch

B, T, H, V, D = 2, 5, 3, 13, 7

INPUTS = {
    "aux_hidden_states": torch.zeros(B, T, 3 * H),
    "input_ids": torch.zeros(B, T, dtype=torch.int64),
    "attention_mask": torch.ones(B, T, dtype=torch.int64),
    "loss_mask": torch.ones(B, T, dtype=torch.int64),
}
SOURCES = {
    "logits": torch.zeros(B, T, V),
    "target_probs": torch.zeros(B, T, D),
    "position_mask": torch.zeros(B, T, 1, dtype=torch.bool),
}
PACKING = {
    "position_ids": torch.zeros(B, T, dtype=torch.int64),
    "seq_lens": torch.tensor([[3, 2], [5, 0]]),
    "doc_remaining": torch.zeros(B, T, dtype=torch.int64),
}
ONE_SOURCE = [("logits",), ("target_probs", "position_mask")]
EVERY_CHOICE = [chosen for count in range(4) for chosen in itertools.combinations(SOURCES, count)]


def batch(*names: str) -> Eagle3TargetBatch:
    """Return a batch with the inputs and these optional fields."""
    optional = {**SOURCES, **PACKING}
    return Eagle3TargetBatch(**INPUTS, **{name: optional[name] for name in names})


def test_fields_have_the_peers_names_order_and_defaults() -> None:
    """Positional construction and `dataclasses` users depend on all three."""
    assert [field.name for field in fields(Eagle3TargetBatch)] == [
        "aux_hidden_states",
        "input_ids",
        "attention_mask",
        "loss_mask",
        "logits",
        "target_probs",
        "position_mask",
        "position_ids",
        "seq_lens",
        "doc_remaining",
    ]
    parameters = inspect.signature(Eagle3TargetBatch).parameters.values()
    assert [p.name for p in parameters if p.default is inspect.Parameter.empty] == list(INPUTS)
    assert all(p.default is None for p in parameters if p.name not in INPUTS)


@pytest.mark.parametrize("chosen", [c for c in EVERY_CHOICE if c not in ONE_SOURCE], ids=str)
def test_any_other_than_one_supervision_source_is_a_value_error(chosen: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected exactly one supervision source") as caught:
        batch(*chosen)
    assert str(caught.value).endswith(f"got {list(chosen) or 'none'}")


@pytest.mark.parametrize("chosen", ONE_SOURCE, ids=str)
def test_one_supervision_source_is_kept_as_given(chosen: tuple[str, ...]) -> None:
    made = batch(*chosen)
    for name, tensor in SOURCES.items():
        assert getattr(made, name) is (tensor if name in chosen else None)
    for name, tensor in INPUTS.items():
        assert getattr(made, name) is tensor


@pytest.mark.parametrize(
    ("chosen", "keys"),
    [
        (("logits",), {"target_logits": "logits"}),
        (
            ("target_probs", "position_mask"),
            {"target_probs": "target_probs", "position_mask": "position_mask"},
        ),
    ],
    ids=["logits", "probs"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_trainer_inputs_are_the_source_carried_and_packing_when_packed(
    chosen: tuple[str, ...], keys: dict[str, str], packed: bool
) -> None:
    made = batch(*chosen, *(PACKING if packed else ()))
    inputs = made.to_trainer_inputs()
    expected = {
        **{name: name for name in INPUTS},
        **keys,
        **({name: name for name in PACKING} if packed else {}),
    }
    assert inputs.keys() == expected.keys()
    for key, field in expected.items():
        assert inputs[key] is getattr(made, field)


def test_position_ids_without_seq_lens_are_not_the_trainers_business() -> None:
    inputs = batch("logits", "position_ids", "doc_remaining").to_trainer_inputs()
    assert inputs.keys() == {*INPUTS, "target_logits"}


def test_seq_lens_bring_the_other_packing_fields_even_if_unset() -> None:
    inputs = batch("logits", "seq_lens").to_trainer_inputs()
    assert inputs["seq_lens"] is PACKING["seq_lens"]
    assert inputs["position_ids"] is None
    assert inputs["doc_remaining"] is None


# --- the backend interface ---


class Colocated(Eagle3TargetBackend):
    """The least a backend must define."""

    def generate_batch(self, *args: object, **kwargs: object) -> Eagle3TargetBatch:
        return batch("logits")

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(V, H)


BATCH_ARGUMENTS = [
    "input_ids",
    "attention_mask",
    "loss_mask",
    "position_ids",
    "seq_lens",
    "doc_remaining",
]


@pytest.mark.parametrize("method", ["generate_batch", "generate_batch_async"])
def test_both_ways_to_ask_take_the_peers_arguments(method: str) -> None:
    parameters = inspect.signature(getattr(Eagle3TargetBackend, method)).parameters
    assert list(parameters) == ["self", *BATCH_ARGUMENTS]
    assert [p.default for p in parameters.values()][4:] == [None, None, None]


def test_a_co_located_backend_needs_two_methods_and_ignores_the_mapping() -> None:
    backend = Colocated()
    backend.set_vocab_mapping(torch.arange(D), torch.ones(V, dtype=torch.bool))
    backend.close()
    backend.close()
    assert backend.supports_async is False
    with pytest.raises(
        NotImplementedError, match=r"Colocated is synchronous .*; call generate_batch"
    ):
        backend.generate_batch_async(*[torch.zeros(B, T)] * 3)


def test_a_backend_that_defines_neither_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Eagle3TargetBackend()  # type: ignore[abstract]
