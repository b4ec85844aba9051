"""The head is found and proven at load, or the target falls back and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.head.jobs import (
    TRANSFORMS,
    V,
    find,
    hooks_left,
    whole,
)
from torch import Tensor, nn

from eagle3_client import InvalidRequest
from eagle3_server import TransformersTarget
from eagle3_server.forward import forward_logits
from eagle3_server.head import HeadUnsupported, cut_head


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
