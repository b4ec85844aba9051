"""Sequences of unequal length: packed on the way, and as a padded batch in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eagle3_schemas import Eagle3TargetBatch, pack_sequences, unpack_sequences
from eagle3_schemas.errors import InvalidRequest
from eagle3_server import HFEagle3TargetModel

LENGTHS = (9, 31, 1, 17, 2)
DRAFT_IDS = torch.arange(5, 65).flip(0)


def sequences() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(131, (n,), generator=generator) for n in LENGTHS]
    return ids, [torch.ones(n, dtype=torch.int32) for n in LENGTHS]


def padded(ids: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The batch that a trainer without packing would send."""
    pad = torch.nn.utils.rnn.pad_sequence
    attended = pad([torch.ones(n, dtype=torch.int64) for n in LENGTHS], batch_first=True)
    return pad(ids, batch_first=True), attended, pad(masks, batch_first=True)


@pytest.mark.parametrize("exact", [True, False])
def test_what_comes_back_is_the_padded_batch(
    build_model: Any, serve: Any, connect: Any, exact: bool
) -> None:
    model = build_model("llama")
    bridge = serve(model)
    backend = connect(bridge, DRAFT_IDS, exact=exact)
    ids, masks = sequences()
    got = unpack_sequences(backend.generate_batch(**pack_sequences(ids, masks)))
    expected = connect(bridge, DRAFT_IDS, exact=True).generate_batch(*padded(ids, masks))
    for name in ("input_ids", "attention_mask", "loss_mask", "position_mask"):
        one, other = getattr(got, name), getattr(expected, name)
        assert torch.equal(one, other.to(one.dtype)), name
        assert one.dtype == other.dtype, name
    for name in ("aux_hidden_states", "target_probs"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5), name
    assert got.seq_lens is None


def test_each_sequence_is_as_it_is_alone_when_co_located(build_model: Any) -> None:
    target = HFEagle3TargetModel(build_model("llama"))
    ids, masks = sequences()
    got = unpack_sequences(target.generate_batch(**pack_sequences(ids, masks)), pad_token_id=7)
    assert got.logits is not None
    for row, (one, mask) in enumerate(zip(ids, masks, strict=True)):
        n = one.numel()
        alone = target.generate_batch(one[None], torch.ones_like(one)[None], mask[None])
        assert alone.logits is not None
        assert torch.allclose(got.logits[row, :n], alone.logits[0], atol=1e-4)
        assert torch.equal(got.loss_mask[row, :n], alone.loss_mask[0])
        assert torch.equal(got.input_ids[row, : n - 1], alone.input_ids[0, : n - 1])
        assert bool((got.input_ids[row, n - 1 :] == 7).all())
        assert not bool(got.logits[row, n:].any())


def test_a_prefetch_takes_them(build_model: Any, serve: Any, connect: Any) -> None:
    backend = connect(serve(build_model("llama")), DRAFT_IDS)
    batches = [pack_sequences(*sequences()) for _ in range(3)]
    for given, batch in backend.prefetch(batches):
        assert torch.equal(batch.seq_lens, given["seq_lens"])
        # No sequence's end is supervised by the next one's first token.
        assert not bool(given["loss_mask"][given["position_ids"] == 0].any())
        assert torch.equal(batch.doc_remaining, given["doc_remaining"])


def test_slips_are_named() -> None:
    ids, masks = sequences()
    with pytest.raises(InvalidRequest, match="got 0 sequences"):
        pack_sequences([], [])
    with pytest.raises(InvalidRequest, match="5 sequences and 4 loss masks"):
        pack_sequences(ids, masks[1:])
    with pytest.raises(InvalidRequest, match="index 2"):
        pack_sequences(ids, [*masks[:2], masks[0], *masks[3:]])
    with pytest.raises(InvalidRequest, match="not empty"):
        pack_sequences([ids[0][:0]], [masks[0][:0]])
    with pytest.raises(InvalidRequest, match="loss_mask must be a list of tensors; got list at"):
        pack_sequences(ids[:1], [masks[0].tolist()])  # type: ignore[list-item]
    plain = Eagle3TargetBatch(*(torch.zeros(1, 2) for _ in range(5)))
    with pytest.raises(InvalidRequest, match="packed rows"):
        unpack_sequences(plain)
