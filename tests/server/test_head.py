"""The rows-only head: found and proven at load, bit-equal to the full path, never [B, T, V]."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3_client import InvalidRequest
from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_server import TransformersTarget
from eagle3_server.engine import HostTensors, SupervisionJob
from eagle3_server.forward import forward_logits, forward_with_aux
from eagle3_server.head import HeadUnsupported, RowsHead, cut_head
from eagle3_server.supervise import HeadRows, SupervisionRows, logsumexp_rows, supervise_rows

V = 131
AUX = (1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRANSFORMS = {
    "llama": LogitsTransform(),
    "gemma2": LogitsTransform(softcap=2.0),
    "cohere": LogitsTransform(multiply=0.3),
    "granite": LogitsTransform(divide=3.0),
}


@pytest.fixture(params=TRANSFORMS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def find(model: Any, chunk_bytes: int = 1 << 20) -> RowsHead:
    return RowsHead.find(model, partial(forward_logits, model), chunk_bytes)


def whole(tiles: Any) -> Tensor:
    """Join logits that came in tiles; each is said to start where the one before ended."""
    parts, end = [], 0
    for start, tile in tiles:
        assert start == end
        end += tile.shape[1]
        parts.append(tile)
    return torch.cat(parts, dim=-1)


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.fixture
def job_of(batch_of: Any) -> Callable[..., SupervisionJob]:
    """`job_of(draft_ids, lengths, **fields)`: a validated request."""

    def build(
        draft_ids: Tensor,
        lengths: tuple[int, ...] = (10, 7, 4),
        vocab_size: int = V,
        **fields: Any,
    ) -> SupervisionJob:
        inputs = batch_of(vocab_size, lengths)
        job = SupervisionJob(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.bool(),
            loss_mask=inputs.loss_mask.bool(),
            aux_layer_ids=AUX,
            draft_vocab=DraftVocab.from_ids(draft_ids),
            encoding="probs",
            rows="position_mask",
            aux_dtype="model",
            exact=True,
        )
        return replace(job, **fields)

    return build


def equal_results(got: HostTensors, expected: HostTensors) -> None:
    assert list(got.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=0, atol=0)


# --- finding it ---


def test_the_head_of_each_family_is_found_with_what_follows_it(
    model: Any, family: str, dtype: torch.dtype
) -> None:
    before = hooks_left(model)
    head = find(model)
    assert head.module is model.lm_head
    assert head.vocab_size == V
    assert replace(head.transform, upcast=False) == TRANSFORMS[family]
    description = TransformersTarget(model, model_id="tiny").describe()
    assert (description.head, description.head_reason) == ("rows", None)
    assert description.encodings == ("probs", "logits", "hidden")
    assert hooks_left(model) == before


def test_logits_are_the_models_own(
    model: Any, dtype: torch.dtype, family: str, batch_of: Any, same: Any
) -> None:
    inputs = batch_of(V, (11, 6))
    logits = forward_logits(model, inputs.input_ids, inputs.attention_mask)
    head = find(model)
    with cut_head(head.module) as seen:
        cut = forward_logits(model, inputs.input_ids, inputs.attention_mask)
    assert cut.shape == (2, 1, V)
    assert [rows.shape for rows in seen] == [(2, 11, 48)]
    same(whole(head.tiles(seen[0].flatten(0, 1))), logits.flatten(0, 1))


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """A change of the model: its own forward, then `change` of the logits."""

    def apply(model: Any) -> None:
        def hook(_module: nn.Module, _args: object, output: Any) -> Any:
            output.logits = change(output.logits)
            return output

        model.register_forward_hook(hook)

    return apply


def call_head_twice(model: Any) -> None:
    head = model.lm_head.forward
    model.model.norm.register_forward_hook(lambda _, args, out: [model.lm_head(out), out][1])
    assert head is not None


def needs_all_of_t(model: Any) -> None:
    """A forward that takes its logits for [B, T, V], as remote code may."""
    norm_input: list[torch.Size] = []
    model.model.norm.register_forward_hook(lambda _, args, out: norm_input.append(out.shape))

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        output.logits = output.logits.reshape(*norm_input[-1][:2], V)
        return output

    model.register_forward_hook(hook)


def no_output_embeddings(model: Any) -> None:
    model.get_output_embeddings = lambda: None


class DoublingHead(nn.Module):
    """A head called by a keyword, so that its input is not where a hook looks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, *, state: Tensor) -> Tensor:
        return self.inner(state)


class Keyworded(nn.Module):
    """Calls a head by a keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.head = DoublingHead(inner)

    def forward(self, state: Tensor) -> Tensor:
        return self.head(state=state)


def keyword_head(model: Any) -> None:
    outer = Keyworded(model.lm_head)
    model.lm_head = outer
    model.get_output_embeddings = lambda: outer.head


class PositionalHead(nn.Linear):
    """A row's logits depend on where it stands: rows taken alone are others."""

    def forward(self, state: Tensor) -> Tensor:
        logits = super().forward(state)
        return logits + torch.arange(logits.shape[-2]).to(logits)[:, None].sin()


def positional_head(model: Any) -> None:
    head = PositionalHead(48, V, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


UNKNOWN = "the model changes its head's output in a way this version does not know"
FALLBACKS = {
    "unknown-change": (changed(lambda z: z + 0.25 * torch.sin(3 * z)), UNKNOWN),
    "a-scale-of-its-own": (changed(lambda z: z * 1.001), UNKNOWN),
    "unknown-bias": (changed(lambda z: z + torch.linspace(0, 1, z.shape[-1])), UNKNOWN),
    "padded-vocab": (changed(lambda z: torch.cat((z, z[..., :1] - 9), -1)), UNKNOWN),
    "cut-shows": (changed(lambda z: z if z.shape[1] > 1 else z.expand(-1, 2, -1)), "not the same"),
    "needs-all-of-t": (needs_all_of_t, "its forward fails with a cut head: shape"),
    "called-twice": (call_head_twice, "call the output embeddings once"),
    "no-module": (no_output_embeddings, "no output embeddings module"),
    "positional": (positional_head, "rows differ from the full logits by "),
    "keyword": (keyword_head, "call the output embeddings once"),
}


@pytest.mark.parametrize("change", FALLBACKS)
@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_a_model_that_is_not_understood_falls_back_says_why_and_is_still_right(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, expect: Any,
    matches: Any, caplog: Any, change: str, encoding: str,
) -> None:  # fmt: skip
    model = build_model("llama")
    apply, reason = FALLBACKS[change]
    apply(model)
    before = hooks_left(model)
    with caplog.at_level(logging.WARNING, logger="eagle3_server"):
        bridge = serve(model)
    assert hooks_left(model) == before
    (record,) = [r for r in caplog.records if r.name.startswith("eagle3_server")]
    assert "the head runs for every position" in record.getMessage()
    assert reason in record.getMessage()
    vocab_size = V + (change == "padded-vocab")
    draft_ids, inputs = frequency_ordered(vocab_size, 53), batch_of(V)
    for rows in ("position_mask", "loss_mask", "all"):
        backend = connect(bridge, draft_ids, exact=True, encoding=encoding, rows=rows)
        info = backend.model_info()
        assert info.head == "full"
        assert info.head_reason is not None
        assert reason in info.head_reason
        assert info.encodings == ("probs", "logits")
        assert info.vocab_size == vocab_size
        expected = expect(model, inputs, draft_ids, rows=rows)
        matches(backend.generate_batch(*inputs), expected)


class Quantised(nn.Linear):
    """Not a plain linear: whoever multiplies by its weight alone gets something else."""

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state) * 2


def test_a_head_that_is_no_plain_linear_runs_for_rows_alone_but_offers_no_hidden(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    model = build_model("llama")
    head = Quantised(48, V, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    bridge, draft_ids, inputs = serve(model), frequency_ordered(V, 53), batch_of(V)
    info = connect(bridge).model_info()
    assert (info.head, info.encodings) == ("rows", ("probs", "logits"))
    for encoding in info.encodings:
        batch = connect(bridge, draft_ids, exact=True, encoding=encoding).generate_batch(*inputs)
        matches(batch, expect(model, inputs, draft_ids))
    with pytest.raises(InvalidRequest, match=r"'hidden'.*\['probs', 'logits'\]") as caught:
        connect(bridge, draft_ids, encoding="hidden").generate_batch(*inputs)
    assert caught.value.attempts == 1
    with pytest.raises(HeadUnsupported, match="plain"):
        find(model).draft_rows(draft_ids)


def test_draft_rows_are_the_heads_own_in_the_order_of_the_ids(build_model: Any, same: Any) -> None:
    model, ids = build_model("llama"), torch.tensor([90, 5, 130, 0])
    model.lm_head.bias = nn.Parameter(torch.arange(float(V)))
    weight, bias = find(model).draft_rows(ids)
    for row, i in enumerate(ids.tolist()):
        same(weight[row], model.lm_head.weight[i].detach())
        assert bias is not None
        assert bias[row] == i


# --- hooks ---


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


# --- the rows, against the full path ---


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
    )
    full = HeadRows(lambda positions: iter([(0, logits[positions])]), None, LogitsTransform(), 7)
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


def test_logsumexp_is_that_of_the_full_logits(
    model: Any, dtype: torch.dtype, batch_of: Any, same: Any
) -> None:
    inputs = batch_of(V, (33, 31))
    only_rows, full = sources(model, inputs, chunk_bytes=1)
    logits = whole(full.tiles(torch.arange(66)))
    for count in (1, 15, 16, 17, 40, 66):
        positions = torch.randperm(66, generator=torch.Generator().manual_seed(count))[:count]
        got = logsumexp_rows(only_rows, positions)
        assert got.dtype is torch.float32
        torch.testing.assert_close(
            got, torch.logsumexp(logits[positions].double(), -1).float(), rtol=1e-6, atol=1e-6
        )
    assert logsumexp_rows(only_rows, torch.empty(0, dtype=torch.int64)).shape == (0,)


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


# --- memory ---


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation inside gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


WIDE_V, ROWS_B, ROWS_T = 4001, 4, 24


@pytest.fixture(scope="module")
def wide_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WIDE_V, hidden_size=16, intermediate_size=24, num_hidden_layers=7,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def largest_numel(target: TransformersTarget, job: SupervisionJob) -> int:
    with Largest() as largest:
        target.supervise(job)
    return largest.numel


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("rows", ["position_mask", "loss_mask", "all"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_no_tensor_of_all_positions_by_the_vocab_is_ever_made(
    wide_model: Any, job_of: Any, frequency_ordered: Any, encoding: str, rows: str, exact: bool
) -> None:
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    job = job_of(
        frequency_ordered(WIDE_V, 53), (ROWS_T,) * ROWS_B, WIDE_V,
        encoding=encoding, rows=rows, exact=exact,
    )  # fmt: skip
    budget = 16 * WIDE_V  # elements of float32; also the head's weight, of which views are taken
    assert largest_numel(target, job) <= 1.1 * budget < ROWS_B * ROWS_T * WIDE_V / 5


def test_memory_grows_with_rows_not_with_t_times_v(
    wide_model: Any, job_of: Any, frequency_ordered: Any
) -> None:
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    short, long = (
        largest_numel(target, job_of(frequency_ordered(WIDE_V, 53), (length,) * 4, WIDE_V))
        for length in (16, 64)
    )
    assert long <= 1.1 * short, "four times the T"


def test_the_full_path_does_make_one(
    wide_model: Any, job_of: Any, frequency_ordered: Any, monkeypatch: Any
) -> None:
    """Else the tests above would see nothing."""
    monkeypatch.setattr(wide_model, "get_output_embeddings", lambda: None)
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    job = job_of(frequency_ordered(WIDE_V, 53), (ROWS_T,) * ROWS_B, WIDE_V)
    assert largest_numel(target, job) >= ROWS_B * ROWS_T * WIDE_V
