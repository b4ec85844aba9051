"""One family in one dtype: the target under test, and the full path computed independently.

The full path is the model's own forward on a copy of the model (same seed, other memory), with
everything that follows spelt out position by position from the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from tests.families.configs import SEED, Family, L, V
from tests.watching import HeadCall, HeadCalls, columns_seen
from torch import nn

from eagle3_schemas import DraftVocab, shift_left_with_zero
from eagle3_schemas.capture import OUTPUTS
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.supervision import unpack_bits
from eagle3_schemas.target_head import FinalNorm, TargetHead
from eagle3_server.engine import CaptureJob, SupervisionJob
from eagle3_server.transformers_target import TransformersTarget

B, T, D = 3, 77, 127
LENGTHS = (35, 58, 13)  # attended; the longest row is not the first
USED = 60  # a loss position beyond them all; the columns after it are padding in every row
LAYER_SETS = ((1, 2, 4), (L - 1, 0, 3))  # every layer, the last one too, and not in order


def draft_vocab() -> DraftVocab:
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(SEED))[:D]
    return DraftVocab.from_ids(ids)


def make_job(
    *, left_padded: bool = False, encoding: str = "probs", **fields: Any
) -> SupervisionJob:
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(3, 200, (B, T), generator=generator)
    attention_mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    loss_mask = (torch.rand(B, T, generator=generator) < 0.8) & attention_mask
    loss_mask[2, [LENGTHS[2] + 2, USED - 1]] = True  # supervised but not attended
    if left_padded:
        attention_mask, loss_mask = attention_mask.flip(1), loss_mask.flip(1)
    loss_mask[:, 0] = True  # never supervised: no position precedes it
    input_ids[~attention_mask] = 2
    job = SupervisionJob(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        aux_layer_ids=LAYER_SETS[0],
        draft_vocab=draft_vocab(),
        encoding=encoding,  # type: ignore[arg-type]
        rows="position_mask",
        aux_dtype="model",
        exact=True,
    )
    return replace(job, **fields)


@dataclass(frozen=True)
class Expected:
    """The full path's answer to a job."""

    logits: torch.Tensor  # [B, T, V], unshifted
    hidden_states: tuple[torch.Tensor, ...]  # of the model's own output
    layer_outputs: list[torch.Tensor]  # [B, T, H], as the module after each layer receives them
    normed: torch.Tensor  # [B, T, H], what the final norm gives

    def target(self, job: SupervisionJob) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return probs [B, T, D], position_mask [B, T] and shifted loss mask, per position."""
        ids = job.draft_vocab.selected_token_ids
        selected = set(ids.tolist())
        probs = torch.zeros(B, T, D)
        position_mask = torch.zeros(B, T, dtype=torch.bool)
        shifted = torch.zeros(B, T, dtype=torch.bool)
        for b in range(B):
            for t in range(T - 1):  # the last column's loss mask is 0
                shifted[b, t] = job.loss_mask[b, t + 1]
                row = self.logits[b, t + 1]
                values = row.tolist()
                argmax = values.index(max(values))  # ties: the lowest id
                position_mask[b, t] = argmax in selected and bool(shifted[b, t])
                probs[b, t] = torch.softmax(row[ids].float(), dim=-1)
        return probs, position_mask, shifted

    def aux(self, layer_ids: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([self.layer_outputs[i] for i in layer_ids], dim=-1)


def run_full_path(model: nn.Module, family: Family, job: SupervisionJob) -> Expected:
    """Run the model's own forward, recording what the module after each decoder layer receives."""
    layers = list(model.get_submodule(family.layers).children())
    followers = [*layers[1:], model.get_submodule(family.norm)]
    received: dict[int, torch.Tensor] = {}
    handles = []
    for index, follower in enumerate(followers):

        def keep(_module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            received[index] = args[0] if args else kwargs["hidden_states"]

        handles.append(follower.register_forward_pre_hook(keep, with_kwargs=True))
    normed: list[torch.Tensor] = []
    handles.append(followers[-1].register_forward_hook(lambda _, __, out: normed.append(out)))
    with torch.no_grad():
        output = model(
            input_ids=job.input_ids,
            attention_mask=job.attention_mask.long(),
            output_hidden_states=True,
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    assert sorted(received) == list(range(L))
    outputs = [received[i] for i in range(L)]
    return Expected(output.logits, output.hidden_states, outputs, normed[-1])


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

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self.family, self.dtype = family, dtype
        self.model = family.build(dtype)
        self.target = TransformersTarget(self.model, model_id="tiny")
        self.description = self.target.describe()

    @cached_property
    def oracle(self) -> nn.Module:
        """A copy in memory of its own, on which no code under test ever ran; frozen, as all are.

        For a linear layer torch folds [B, T, H] into [B*T, H], or does not, depending on whether
        its weight needs gradients, under no_grad too.
        """
        return self.family.build(self.dtype).requires_grad_(False)

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
