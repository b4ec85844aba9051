"""How packed rows are run: the probe at load, the groups, and what a server refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.families.packing import packed_job
from transformers.masking_utils import create_masks_for_generate

from eagle3_client import LimitExceeded
from eagle3_schemas.errors import InvalidRequest, PackingUnsupported
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.packing import Document, restarting_positions
from eagle3_schemas.tokens import TokenBatch
from eagle3_server import HFEagle3TargetModel, TransformersTarget, packing, packing_probe
from eagle3_server.packing import Packing, grouped
from eagle3_server.packing_probe import find_packing

SEQ_LENS = torch.tensor([[13, 24, 9], [30, 16, 0]])
DRAFT_IDS = torch.arange(5, 65).flip(0)


def packed(length: int = 46) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(131, (2, length), generator=generator)
    ones, positions = torch.ones_like(ids), restarting_positions(SEQ_LENS, length)
    return {
        "input_ids": ids, "attention_mask": ones, "loss_mask": ones,
        "position_ids": positions, "seq_lens": SEQ_LENS, "doc_remaining": positions.flip(1),
    }  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
def test_a_packed_batch_comes_with_its_description(
    build_model: Any, serve: Any, connect: Any, same: Any, exact: bool
) -> None:
    model = build_model("llama")
    given = packed()
    got = connect(serve(model), DRAFT_IDS, exact=exact).generate_batch(**given)
    expected = HFEagle3TargetModel(model).generate_batch(**given)
    for name in ("position_ids", "seq_lens", "doc_remaining"):
        assert torch.equal(getattr(got, name), given[name])
        assert torch.equal(getattr(expected, name), given[name])
        assert torch.equal(got.to_trainer_inputs()[name], given[name])
    if exact:
        same(got.aux_hidden_states, expected.aux_hidden_states)
    else:
        assert torch.allclose(got.aux_hidden_states, expected.aux_hidden_states, atol=1e-5)


def masks_of_5_24(
    config: Any, inputs_embeds: Any, attention_mask: Any, cache: Any, position_ids: Any
) -> Any:
    """The cache has another name there."""
    return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, position_ids)


def test_masks_are_built_by_the_names_that_a_transformers_has(build_model: Any) -> None:
    model = build_model("llama")
    model.create_masks_for_generate = masks_of_5_24
    found = find_packing(model)
    assert (found.route, found.reason) == ("masked", None)


def test_a_mask_that_leaks_is_found(build_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an all-ones 2-D mask does, in silence."""
    model = build_model("llama")
    assert find_packing(model).route == "masked"

    def leaks(_model: Any, input_ids: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(input_ids)

    monkeypatch.setattr(packing, "_block_causal_masks", leaks)
    found = find_packing(model)
    assert found.route == "documents"
    assert "differ from the same alone" in str(found.reason)
    monkeypatch.setattr(packing_probe, "_SAME", {torch.float32: 1e9})  # also by what moves alone
    assert "moves by" in str(find_packing(model).reason)


def test_positions_that_change_with_the_length_keep_documents_unpadded(
    build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_probe, "positions_depend_on_length", lambda _model: True)
    found = find_packing(build_model("llama"))
    assert (found.route, found.surplus) == ("documents", 1.0)
    assert "change with the length" in str(found.reason)


def test_exact_rows_of_a_small_forward_take_the_full_head(build_model: Any) -> None:
    """A matmul of fewer than 16 rows takes another kernel, in the co-located target too."""
    target = TransformersTarget(build_model("llama"), model_id="tiny")
    for surplus, is_full in ((1.0, True), (1.125, False)):
        runner = replace(target._runner, packing=Packing("documents", None, surplus))
        assert runner.needs_full_head(packed_job(exact=True)) == is_full


def test_padding_behind_the_last_document_is_not_trimmed_away(
    build_model: Any, serve: Any, connect: Any
) -> None:
    model, given = build_model("llama"), packed()
    for name in ("attention_mask", "loss_mask"):
        given[name] = given[name].clone()
        given[name][:, 44:] = 0
    got = connect(serve(model), DRAFT_IDS).generate_batch(**given)
    expected = HFEagle3TargetModel(model).generate_batch(**given).aux_hidden_states
    assert torch.allclose(got.aux_hidden_states[:, :44], expected[:, :44], atol=1e-5)
    assert not bool(got.aux_hidden_states[:, 44:].any())


def test_a_model_that_fails_under_masks_runs_documents(
    build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: Any) -> None:
        raise TypeError("no such mask")

    monkeypatch.setattr(packing, "_block_causal_masks", fails)
    found = find_packing(build_model("llama"))
    assert found.route == "documents"
    assert "no such mask" in str(found.reason)


def test_flash_attention_takes_one_packed_row(build_model: Any) -> None:
    model = build_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PackingUnsupported, match=r"one a batch, B = 1.*got B = 2"):
        packing.forward_masked(model, packed()["input_ids"], SEQ_LENS, [0])


def test_groups_waste_little_and_hold_every_document_once() -> None:
    generator = random.Random(4)
    for _ in range(50):
        count, longest = generator.choice([1, 3, 40, 300]), generator.choice([5, 200, 4000])
        documents = [Document(0, i, generator.randint(1, longest)) for i in range(count)]
        groups = list(grouped(documents, 1.125))
        assert sorted(each for group in groups for each in group) == sorted(documents)
        for group in groups:
            computed = len(group) * max(each.length for each in group)
            real = sum(each.length for each in group)
            assert computed <= max(1.125 * real, real + 128)
        for group in grouped(documents, 1.0):
            assert len({each.length for each in group}) == 1


def test_learned_positions_bound_documents_and_not_rows(
    build_model: Any, serve: Any, connect: Any
) -> None:
    model = build_model("gpt2")
    longest = TransformersTarget(model, model_id="tiny").describe().max_sequence_length
    assert longest is not None
    backend = connect(serve(model), DRAFT_IDS)
    for lens, is_refused in (([longest, longest // 2], False), ([longest + 1, 1], True)):
        seq_lens = torch.tensor([lens])
        ids = torch.ones(1, sum(lens), dtype=torch.int64)
        given = {
            "input_ids": ids, "attention_mask": ids, "loss_mask": ids, "seq_lens": seq_lens,
            "position_ids": restarting_positions(seq_lens, sum(lens)),
        }  # fmt: skip
        if is_refused:
            with pytest.raises(LimitExceeded, match=f"got documents of {longest + 1}"):
                backend.generate_batch(**given)
        else:
            backend.generate_batch(**given)


def test_a_server_checks_what_it_is_sent(build_model: Any, serve: Any, connect: Any) -> None:
    """Whatever the client did."""
    backend = connect(serve(build_model("llama")), DRAFT_IDS)
    given = packed()
    batch = TokenBatch(
        given["input_ids"],
        given["attention_mask"].bool(),
        given["loss_mask"].bool(),
        SEQ_LENS + 1,
    )
    request, frame = pack_request(
        batch, request_id="id-1", draft_vocab_digest=backend._vocab().digest
    )
    connection = backend._dispatcher.fleet.members.all[0].connection
    with pytest.raises(InvalidRequest, match=r"seq_lens must be >= 0 and sum to T = 46"):
        connection.supervise(frame, request.request_id)


def test_a_target_that_takes_none_refuses_packed_rows(
    build_model: Any, serve: Any, connect: Any
) -> None:
    import dataclasses

    target = TransformersTarget(build_model("llama"), model_id="tiny")
    target._description = dataclasses.replace(target.describe(), packing=None)
    backend = connect(serve(target), DRAFT_IDS)
    with pytest.raises(PackingUnsupported, match="takes no packed rows there"):
        backend.generate_batch(**packed())
    given = packed()
    batch = TokenBatch(
        given["input_ids"], given["attention_mask"].bool(), given["loss_mask"].bool(), SEQ_LENS
    )
    request, frame = pack_request(
        batch, request_id="id-1", draft_vocab_digest=backend._vocab().digest
    )
    connection = backend._dispatcher.fleet.members.all[0].connection
    with pytest.raises(PackingUnsupported, match="packing in model info is none"):
        connection.supervise(frame, request.request_id)


def test_the_smallest_forward_is_told() -> None:
    assert Packing("masked", None).fewest_tokens(SEQ_LENS) == 92
    assert Packing("documents", None).fewest_tokens(SEQ_LENS) == 5 * 30
    assert Packing("documents", None, surplus=1.0).fewest_tokens(SEQ_LENS) == 9
