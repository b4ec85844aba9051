"""Packed rows of one family, against each document alone; a table of docs/encodings.md.

`python -m tests.families.packing`, with the peer installed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from tests.families.configs import FAMILIES, Family, L
from tests.families.family import WINDOW
from tests.families.full_path import draft_vocab, make_job, run_full_path
from tests.generated import with_parts
from tests.pages import DOCS
from torch import nn

from eagle3_schemas import project_to_draft_vocab, shift_left_with_zero
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.packing import documents_of, restarting_positions
from eagle3_schemas.supervision import unpack_bits
from eagle3_server import HFEagle3TargetModel, TransformersTarget
from eagle3_server.engine import SupervisionJob

PAGE = DOCS / "encodings.md"
PART = "families"

SEQ_LENS = torch.tensor([[13, 24, 9], [30, 16, 0]])
LENGTH = 46
LAYERS = (4, 1, 3)
IMPLEMENTATIONS = (None, "eager")
"""None: what transformers takes by itself, sdpa where the family has it."""
SAME = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest |a - b| / |a| (Frobenius) to the documents alone."""

AMPLIFIED = {("Qwen3-Next", torch.bfloat16): 0.1}
"""Its linear attention makes ten times as much of rounding; see docs/encodings.md."""

PEER_WINDOW = 0.1
"""What the peer differs by, at least, where it loses windows or state leaks."""


def build(family: Family, dtype: torch.dtype, implementation: str | None) -> nn.Module:
    model = family.build(dtype).requires_grad_(False)
    if implementation is not None:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model


def packed_job(**fields: Any) -> SupervisionJob:
    generator = torch.Generator().manual_seed(11)
    shape = SEQ_LENS.shape[0], LENGTH
    job = make_job(
        input_ids=torch.randint(3, 200, shape, generator=generator),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        loss_mask=torch.rand(shape, generator=generator) < 0.7,
        aux_layer_ids=LAYERS,
        rows="loss_mask",
        seq_lens=SEQ_LENS,
    )
    return replace(job, **fields)


def alone(model: nn.Module, family: Family, job: SupervisionJob) -> tuple[Any, Any]:
    """Return aux states and logits of the documents, each in a forward of its own."""
    aux = torch.empty(0)
    logits = torch.empty(0)
    for row, start, length in documents_of(SEQ_LENS):
        ids = job.input_ids[row : row + 1, start : start + length]
        one = run_full_path(
            model, family, replace(job, input_ids=ids, attention_mask=torch.ones_like(ids).bool())
        )
        states = one.aux(job.aux_layer_ids)
        if not aux.numel():
            aux = states.new_empty(*job.input_ids.shape, states.shape[-1])
            logits = one.logits.new_empty(*job.input_ids.shape, one.logits.shape[-1])
        aux[row, start : start + length] = states[0]
        logits[row, start : start + length] = one.logits[0]
    return aux, logits


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.float(), expected.float()
    return float((got - expected).norm() / expected.norm())


class PackedCase:
    """One family, dtype and attention implementation."""

    def __init__(self, family: Family, dtype: torch.dtype, implementation: str | None) -> None:
        self.family, self.dtype = family, dtype
        self.model = build(family, dtype, implementation)
        self.oracle = build(family, dtype, implementation)
        self.target = TransformersTarget(self.model, model_id="tiny")
        self.job = packed_job()
        self.aux, self.logits = alone(self.oracle, family, self.job)

    @property
    def route(self) -> str:
        return str(self.target.describe().packing)

    def run(self, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return aux states, target_probs of the loss-mask rows, and the position mask."""
        job = replace(self.job, exact=exact)
        tensors = self.target.supervise(job).tensors
        probs = ENCODINGS["probs"].decode(tensors["target_probs"], None)
        shape = tuple(job.input_ids.shape)
        return tensors["aux_hidden_states"], probs, unpack_bits(tensors["position_mask"], shape)

    def co_located(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the same of the co-located target, in full."""
        batch = HFEagle3TargetModel(self.model, LAYERS).generate_batch(*self.inputs())
        return (batch.aux_hidden_states.flatten(0, 1), *self.projected(batch.logits))

    def inputs(self) -> tuple[torch.Tensor, ...]:
        positions = restarting_positions(SEQ_LENS, LENGTH)
        job = self.job
        return job.input_ids, job.attention_mask, job.loss_mask, positions, SEQ_LENS, positions

    def projected(self, shifted_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vocab = draft_vocab()
        loss_mask = shift_left_with_zero(self.job.loss_mask)
        probs, mask = project_to_draft_vocab(
            shifted_logits,
            vocab.selected_token_ids,
            vocab.mask(shifted_logits.shape[-1]),
            loss_mask,
        )
        return probs[loss_mask], mask[..., 0]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.aux.flatten(0, 1), *self.projected(shift_left_with_zero(self.logits))

    def worst(self, *, exact: bool) -> float:
        """Return the largest difference to the documents alone, of the aux states or the probs."""
        got, expected = self.run(exact=exact), self.expected()
        return max(difference(*pair) for pair in zip(got[:2], expected[:2], strict=True))


def peers_difference(case: PackedCase) -> float | None:
    """Return how far the peer's packed batch is from the documents alone; None if it refuses."""
    from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel as Peer

    try:
        batch = Peer(case.model, aux_layer_ids=list(LAYERS)).generate_batch(*case.inputs())
    except ValueError:
        return None
    probs, _ = case.projected(batch.logits)
    expected = case.expected()
    return max(
        difference(batch.aux_hidden_states.flatten(0, 1), expected[0]),
        difference(probs, expected[1]),
    )


def write_table() -> str:
    """Measure every family at one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [
        f"Generated by `python -m tests.families.packing`: random models of {L} layers, two rows "
        f"of {LENGTH} tokens with documents of 13, 24, 9 and 30, 16, and windows of {WINDOW} where "
        "a family has them. The largest relative difference (Frobenius) of aux states or target "
        "distribution to each document run alone, rounded up, at one thread on one CPU: with "
        "`exact` / without, and of the peer's packed path (NeMo AutoModel 0.7.0).",
        "",
        "| family | attention | way | fp32 | bf16 | eager, fp32 | the peer, fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    try:
        for family in FAMILIES:
            single, half, eager = (
                PackedCase(family, dtype, implementation)
                for dtype, implementation in (
                    (torch.float32, None), (torch.bfloat16, None), (torch.float32, "eager")
                )
            )  # fmt: skip
            peers = peers_difference(single)
            cells = [
                family.name,
                str(single.target.describe().attn_implementation),
                single.route if single.route == eager.route == half.route else "**unequal**",
                _both(single),
                _both(half),
                _both(eager),
                "refused" if peers is None else f"**{peers:.1f}**" if peers > PEER_WINDOW
                else _up(peers),
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    finally:
        torch.set_num_threads(before)
    return "\n".join(rows)


def _both(case: PackedCase) -> str:
    return f"{_up(case.worst(exact=True))} / {_up(case.worst(exact=False))}"


def _up(value: float) -> str:
    from tests.families.table import _round_up

    return _round_up(value)


def main() -> None:
    logging.disable(logging.WARNING)
    page = with_parts(PAGE.read_text(encoding="utf-8"), {PART: write_table() + "\n"})
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
