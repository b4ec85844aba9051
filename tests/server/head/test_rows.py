"""Rows of the head: bit-equal to the full path, and no hook is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.head.jobs import (
    AUX,
    V,
    equal_results,
    find,
    hooks_left,
    whole,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_server import TransformersTarget
from eagle3_server.capturing import capture_rows
from eagle3_server.engine import SupervisionJob
from eagle3_server.forward import forward_logits, forward_with_aux
from eagle3_server.head import cut_head
from eagle3_server.supervise import HeadRows, SupervisionRows, supervise_rows


def test_hooks_are_gone_after_every_job(build_model: Any, job_of: Any) -> None:
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")
    before = hooks_left(model)
    for encoding in ("probs", "logits", "hidden"):
        for exact in (False, True):
            target.supervise(job_of(torch.arange(9), encoding=encoding, exact=exact))
            assert hooks_left(model) == before


@pytest.mark.parametrize("where", ["embed_tokens", "layers.4", "norm", "lm_head"])
def test_hooks_are_gone_after_a_forward_that_raised(
    build_model: Any, job_of: Any, where: str
) -> None:
    model = build_model("llama")
    target, job = TransformersTarget(model, model_id="tiny"), job_of(torch.arange(9))
    before, expected = hooks_left(model), target.supervise(job)
    module = model.lm_head if where == "lm_head" else model.model.get_submodule(where)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        target.supervise(job)
    handle.remove()
    assert hooks_left(model) == before
    equal_results(target.supervise(job), expected)


def test_the_cut_is_undone_when_its_block_raises(build_model: Any) -> None:
    model = build_model("llama")

    def run() -> None:
        with cut_head(model.lm_head):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert hooks_left(model) == 0
    assert model(input_ids=torch.ones(2, 5).long()).logits.shape == (2, 5, V)


def sources(model: Any, inputs: Any, chunk_bytes: int = 1 << 20) -> tuple[HeadRows, HeadRows]:
    """The rows-only head and the full path's logits, of one batch."""
    head = find(model, chunk_bytes)
    ids, attention_mask = inputs.input_ids, inputs.attention_mask
    cut = forward_with_aux(model, ids, attention_mask, AUX, head_to_cut=head.module)
    assert cut.head_input is not None
    head_input = cut.head_input.flatten(0, 1)
    logits = forward_logits(model, ids, attention_mask).flatten(0, 1)
    only_rows = HeadRows(
        lambda positions: head.tiles(head_input[positions]),
        head_input.__getitem__,
        head.transform,
        head.chunk_rows,
        head.device,
    )
    full = HeadRows(
        lambda positions: iter([(0, logits[positions])]), None, LogitsTransform(), 7, logits.device
    )
    return only_rows, full


def supervise(
    source: HeadRows, loss_mask: Tensor, ids: Tensor, encoding: str, rows: Any
) -> SupervisionRows:
    mask = torch.zeros(V, dtype=torch.bool)
    mask[ids] = True
    needs_draft_logits = encoding != "hidden"
    return supervise_rows(
        source, loss_mask, ids, mask, ENCODINGS[encoding], rows,
        needs_draft_logits=needs_draft_logits,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["small-chunks", "one-chunk"])
def test_every_count_of_rows_is_bit_equal_to_the_full_path(
    model: Any, dtype: torch.dtype, threads: int, batch_of: Any, frequency_ordered: Any, same: Any,
    chunk_bytes: int,
) -> None:  # fmt: skip
    """1 to 64 supervised rows, anywhere in the batch, in every encoding, decoded."""
    ids, inputs = frequency_ordered(V, 53), batch_of(V, (33, 31, 12))
    only_rows, full = sources(model, inputs, chunk_bytes)
    draft_head = DraftHead.build(*find(model).draft_rows(ids), only_rows.transform)
    candidates = torch.ones(3, 33, dtype=torch.bool)
    candidates[:, 0] = False  # nothing supervises the first column
    flat = candidates.flatten().nonzero().squeeze(1)
    order = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(3))]
    for count in range(1, 65):
        loss_mask = torch.zeros(3 * 33, dtype=torch.bool)
        loss_mask[order[:count]] = True
        loss_mask = loss_mask.view(3, 33)
        positions = loss_mask.flatten().nonzero().squeeze(1)
        chunk = positions[: only_rows.chunk_rows]
        same(whole(only_rows.tiles(chunk)), whole(full.tiles(chunk)))
        rows = ("position_mask", "loss_mask")[count % 2]
        expected = supervise(full, loss_mask, ids, "probs", rows)
        for encoding in (("probs", "logits")[count // 2 % 2], "hidden"):
            got = supervise(only_rows, loss_mask, ids, encoding, rows)
            same(got.position_mask, expected.position_mask)
            probs = ENCODINGS[encoding].decode(got.rows, draft_head)
            same(probs, expected.rows)


class HeadMatmuls(TorchDispatchMode):
    """Records the shape of every matmul with the head's weight, those of a cut forward apart."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight = head.weight.untyped_storage().data_ptr()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [a for a in args if isinstance(a, Tensor)]
        has_weight = any(a.untyped_storage().data_ptr() == self.weight for a in operands)
        if has_weight and len(operands) > 1 and isinstance(result, Tensor):
            self.shapes.append(tuple(result.shape))
        return result


def pieces(target: TransformersTarget, model: Any, job: SupervisionJob) -> list[tuple[int, ...]]:
    with HeadMatmuls(model.lm_head) as matmuls:
        target.supervise(job)
    (cut, *rest) = (shape for shape in matmuls.shapes if shape[-1] != 48)  # not the embeddings
    assert cut[0] == len(job.input_ids)
    return rest


@pytest.mark.parametrize("chunk_bytes", [1, 16 * 4 * V, 64 * 4 * V, 1 << 26])
@pytest.mark.parametrize("rows", ["position_mask", "loss_mask", "all"])
@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_chunks_of_any_size_give_the_same(
    build_model: Any, job_of: Any, frequency_ordered: Any, chunk_bytes: int, rows: str,
    encoding: str,
) -> None:  # fmt: skip
    """However the rows and the vocab are cut up, each row meets each id once, within the memory."""
    model = build_model("llama")
    job = job_of(frequency_ordered(V, 53), (33, 30, 17), rows=rows, encoding=encoding)
    target = TransformersTarget(model, model_id="tiny", head_chunk_bytes=chunk_bytes)
    got = pieces(target, model, job)
    needed = 3 * 32 if rows == "all" else int(job.loss_mask[:, 1:].sum())
    padding = 16 * len(got)  # at most so many rows of zeros
    assert needed * V <= sum(n * ids for n, ids in got) <= (needed + padding) * V
    assert all(n % 16 == 0 and ids >= 16 for n, ids in got)
    smallest = 16 * 2 * 64 * 4  # 16 rows, and ids enough for the usual kernels
    assert all(n * ids * 4 <= 2 * max(chunk_bytes, smallest) for n, ids in got)
    if chunk_bytes < needed * V * 4 / 2:
        assert len(got) > 1
    plain = TransformersTarget(model, model_id="tiny", head_chunk_bytes=1 << 26)
    equal_results(target.supervise(job), plain.supervise(job))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["small-chunks", "one-chunk"])
def test_logsumexp_is_that_of_the_full_logits(
    model: Any, dtype: torch.dtype, batch_of: Any, frequency_ordered: Any, chunk_bytes: int
) -> None:
    """Of V and of the draft vocab, however rows and vocab are cut up."""
    inputs, ids = batch_of(V, (33, 31)), frequency_ordered(V, 53)
    only_rows, full = sources(model, inputs, chunk_bytes)
    logits = whole(full.tiles(torch.arange(66)))
    mask = torch.zeros(V, dtype=torch.bool)
    mask[ids] = True
    names = ("logsumexp", "draft_logsumexp")
    for count in (0, 1, 15, 16, 17, 40, 64):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(count))[:count]
        loss_mask = torch.zeros(2, 33, dtype=torch.bool)
        loss_mask[order // 32, 1 + order % 32] = True
        loss_mask[:, 0] = True  # never supervised
        got = capture_rows(only_rows, loss_mask, (ids, mask), names)
        rows = logits[(loss_mask & (torch.arange(33) > 0)).flatten()]
        for name, columns in zip(names, (rows, rows[:, ids]), strict=True):
            assert got[name].dtype is torch.float32
            expected = columns.double().logsumexp(-1)
            torch.testing.assert_close(got[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_ties_go_to_the_lowest_id(build_model: Any, job_of: Any, encoding: str, same: Any) -> None:
    """Ids i and i + 65 have one row of the head: each top logit is there twice."""
    model = build_model("llama")
    with torch.no_grad():
        model.lm_head.weight[65:130] = model.lm_head.weight[:65]
        model.lm_head.weight[130] = 0
    target = TransformersTarget(model, model_id="tiny", head_chunk_bytes=1)
    assert target.describe().head == "rows"
    job = job_of(torch.arange(65), (20, 20), encoding=encoding, rows="loss_mask")
    low = target.supervise(job)
    high = target.supervise(replace(job, draft_vocab=DraftVocab.from_ids(torch.arange(65, 130))))
    supervised = int(job.loss_mask[:, 1:].sum())
    bits = [int(byte).bit_count() for byte in low.tensors["position_mask"]]
    assert sum(bits) == supervised > 20
    assert not high.tensors["position_mask"].any()
    name = ENCODINGS[encoding].tensor_name
    same(low.tensors[name], high.tensors[name])  # the probs themselves are equal
