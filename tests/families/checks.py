"""One family in one dtype: the target under test, held against the full path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from tests.families.configs import Family, L, V
from tests.families.full_path import (
    LAYER_SETS,
    USED,
    B,
    D,
    Expected,
    T,
    make_job,
    run_full_path,
)
from tests.watching import HeadCall, HeadCalls, columns_seen
from torch import nn

from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.capture import OUTPUTS
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.supervision import unpack_bits
from eagle3_schemas.target_head import FinalNorm, TargetHead
from eagle3_server.engine import CaptureJob, SupervisionJob
from eagle3_server.transformers_target import TransformersTarget


@dataclass(frozen=True)
class Got:
    """A target's answer, decoded as a trainer does."""

    aux: torch.Tensor  # [n, 3H], attended positions in row order
    position_mask: torch.Tensor  # [B, T]
    probs: torch.Tensor  # [m, D]
    columns: int  # that the forward ran on
    head_calls: list[HeadCall]


class Case:
    """One family in one dtype; what is computed once is kept."""

    def __init__(
        self,
        family: Family,
        dtype: torch.dtype,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.family, self.dtype = family, dtype
        self._build = build or partial(family.build, dtype)
        self.model = self._build()
        self.target = TransformersTarget(self.model, model_id="tiny")
        self.description = self.target.describe()

    @cached_property
    def oracle(self) -> nn.Module:
        """A copy in memory of its own, on which no code under test ever ran; frozen, as all are.

        For a linear layer torch folds [B, T, H] into [B*T, H], or does not, depending on whether
        its weight needs gradients, under no_grad too.
        """
        return self._build().requires_grad_(False)

    @cached_property
    def transform(self) -> Any:
        return self.description.transform

    def expected(self, job: SupervisionJob) -> Expected:
        return run_full_path(self.oracle, self.family, job)

    def run(self, job: SupervisionJob, target: TransformersTarget | None = None) -> Got:
        target = target or self.target
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        with HeadCalls(head) as head_calls, columns_seen(embeddings) as columns:
            tensors = target.supervise(job).tensors
        encoding = ENCODINGS[job.encoding]
        draft_head = None
        if encoding.needs_draft_head:
            parts = target.draft_head(job.draft_vocab).tensors
            transform = target.describe().transform
            draft_head = DraftHead.build(parts["weight"], parts.get("bias"), transform)
        return Got(
            aux=tensors["aux_hidden_states"],
            position_mask=unpack_bits(tensors["position_mask"], (B, T)),
            probs=encoding.decode(tensors[encoding.tensor_name], draft_head),
            columns=columns[0],
            head_calls=head_calls.calls,
        )

    # --- what the tests assert and the table reports ---

    def check_head(self) -> None:
        """The rows-only path was found, with the transform the family is known to have."""
        assert self.description.head == "rows", self.description.head_reason
        expected = {"upcast": False, "multiply": None, "divide": None, "softcap": None}
        expected |= self.family.transform
        if self.dtype is torch.float32:
            expected["upcast"] = False
        assert vars(self.transform) == expected
        assert "hidden" in self.description.encodings

    def check_supervision(
        self, job: SupervisionJob, target: TransformersTarget | None = None
    ) -> Got:
        """Decoded probs and the mask, bit for bit, from a head that ran for rows alone."""
        probs, position_mask, shifted = self.expected(job).target(job)
        is_spread = 8 < int(position_mask.sum()) < int(shifted.sum()) - 8
        assert is_spread, "degenerate logits would prove nothing"
        assert (probs[position_mask].amax(-1) > 1.1 / D).all(), "uniform probs would prove nothing"
        mask = position_mask if job.rows == "position_mask" else shifted
        got = self.run(job, target)
        equal(got.position_mask, position_mask)
        equal(got.probs, probs[mask])
        if self.description.head == "rows":
            cut, *rest = got.head_calls
            assert cut == HeadCall(torch.Size((B, 1)), V), "the forward gives one row of logits"
            needed = int(shifted.sum())
            work = sum(call.rows * call.ids for call in rest)
            # Every needed row meets every id once; chunks may end in rows of padding.
            assert needed * V <= work < (needed + 16) * V < B * T * V
        return got

    def check_chunks(self, job: SupervisionJob) -> None:
        """Chunks of 16 rows and one chunk for all give the same bits, those of the full path."""
        small = TransformersTarget(self.model, model_id="tiny", head_chunk_bytes=1)
        got, whole = self.check_supervision(job, small), self.check_supervision(job)
        equal(got.probs, whole.probs)
        if self.description.head == "rows":
            needed = int(job.loss_mask[:, 1:].sum())
            assert needed % 16, "a last chunk that is full would show less"
            rounded = -(-needed // 16) * 16
            assert whole.head_calls[1:] == [HeadCall(torch.Size((rounded,)), V)]
            assert {call.rows for call in got.head_calls[1:]} == {16}

    def check_exact(self) -> None:
        """All that `exact=True` promises, on right- and left-padded batches."""
        for encoding in self.description.encodings:
            self.check_supervision(make_job(encoding=encoding))
        self.check_supervision(make_job(left_padded=True))
        self.check_chunks(make_job(encoding="logits", rows="loss_mask"))
        for left_padded in (False, True):
            self.check_aux(make_job(left_padded=left_padded))

    def check_aux(self, job: SupervisionJob) -> None:
        """The layers' outputs, bit for bit, by two routes that share nothing with the hooks."""
        expected = self.expected(job)
        attended = job.attention_mask
        for layer_ids in LAYER_SETS:
            got = self.run(replace(job, aux_layer_ids=layer_ids))
            equal(got.aux, expected.aux(layer_ids)[attended])
            for i, states in zip(layer_ids, got.aux.chunk(3, -1), strict=True):
                if i < L - 1:
                    own = expected.hidden_states[i + self.family.hidden_states_offset]
                    equal(states, own[attended])
        outputs = [states[attended] for states in expected.layer_outputs]
        for i in range(L):
            for j in range(i):
                assert not torch.equal(outputs[i], outputs[j]), "equal layers would prove nothing"

    def check_outputs(self, job: SupervisionJob) -> None:
        """Every output of `capture`, against the full path; hidden states bit for bit."""
        expected = self.expected(job)
        probs, position_mask, shifted = expected.target(job)
        layer_ids = (L - 1, *range(L - 1))  # all, not in order
        asked = CaptureJob(
            input_ids=job.input_ids,
            attention_mask=job.attention_mask,
            loss_mask=job.loss_mask,
            aux_layer_ids=layer_ids,
            exact=True,
            outputs=self.description.outputs,
            draft_vocab=job.draft_vocab,
        )
        got = self.target.capture(asked).tensors
        assert list(got) == list(self.description.outputs) == list(OUTPUTS)
        attended = job.attention_mask
        equal(got["aux"], expected.aux(layer_ids)[attended])
        equal(got["last_hidden_prenorm"], expected.layer_outputs[-1][attended])
        equal(got["last_hidden"], expected.normed[attended].to(self.dtype))  # Mamba's is float32
        equal(unpack_bits(got["position_mask"], (B, T)), position_mask)
        equal(got["loss_mask_probs"], probs[shifted])
        rows = expected.logits[:, 1:][shifted[:, :-1]]
        equal(got["argmax"], torch.stack([row.eq(row.max()).nonzero()[0, 0] for row in rows]).int())
        equal(got["loss_mask_logits"], rows[:, job.draft_vocab.selected_token_ids])
        for name, logits in (
            ("logsumexp", rows),
            ("draft_logsumexp", rows[:, job.draft_vocab.selected_token_ids]),
        ):
            exact = logits.double().logsumexp(-1)
            torch.testing.assert_close(got[name].double(), exact, rtol=1e-6, atol=1e-6)
        apart = replace(asked, outputs=("last_hidden",), aux_layer_ids=())
        with HeadCalls(self.model.get_output_embeddings()) as calls:  # type: ignore[operator]
            last_hidden = self.target.capture(apart).tensors["last_hidden"]
        equal(last_hidden, got["last_hidden"])
        assert calls.calls == [HeadCall(torch.Size((B, 1)), V)], "no output needs the head"

    def check_target_head(self, job: SupervisionJob) -> None:
        """The norm and the head that a trainer downloads give what the model gives."""
        expected = self.expected(job)
        tensors = self.target.target_head().tensors
        form = self.description.norm
        assert form is not None, self.description.outputs_reason
        norm = FinalNorm(form, tensors.get("norm_weight"), tensors.get("norm_bias"))
        head = TargetHead(tensors["weight"], tensors.get("bias"), self.transform, norm)
        last, module = expected.normed, self.oracle.get_submodule(self.family.norm)
        for scale in (1.0, 1e-2, 1e-4):  # beside small inputs an eps shows
            given = expected.layer_outputs[-1] * scale
            with torch.no_grad():
                own = module(given).float()
            error = (norm(given).float() - own).norm(dim=-1) / own.norm(dim=-1)
            assert error.max() <= (1e-6 if self.dtype is torch.float32 else 4e-3)
        equal(head.logits(last), expected.logits)

    def default_difference(self, job: SupervisionJob) -> Difference:
        """How far the default mode (trimmed) is from the full path on the padded batch."""
        expected = self.expected(job)
        probs, position_mask, shifted = expected.target(job)
        got = self.run(replace(job, exact=False, rows="loss_mask"))
        assert got.columns == USED < T, "nothing was trimmed"
        assert self.run(job).columns == T, "exact must not trim"
        # A loss position on padding, further than a sliding window from any attended token, has no
        # key to attend to: its logits are an average over all columns, and depend on their number.
        attended = shift_left_with_zero(job.attention_mask)
        aux = expected.aux(job.aux_layer_ids)[job.attention_mask]
        scale = aux.float().square().mean().sqrt()
        return Difference(
            probs=_largest((got.probs - probs[shifted])[attended[shifted]]),
            aux=_largest(got.aux.float() - aux.float()) / float(scale),
            masks=int((got.position_mask ^ position_mask).sum()),
        )


@dataclass(frozen=True)
class Difference:
    """Largest differences of the default mode from the full path."""

    probs: float  # absolute
    aux: float  # relative to the aux states' root mean square
    masks: int  # positions whose position_mask differs


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0
