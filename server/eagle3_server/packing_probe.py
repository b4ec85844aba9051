"""Whether documents that share a row see one another, found on a probe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from eagle3_schemas.errors import PackingUnsupported
from eagle3_server.forward import ForwardResult
from eagle3_server.layout import decoder_layers, positions_depend_on_length, text_config
from eagle3_server.packing import Packing, forward_documents, forward_masked, is_flash
from eagle3_server.placement import device_of

_SAME = {torch.float32: 1e-4}  # largest relative difference to the document alone
_UNMOVED = {torch.float32: 1e-5}  # ... and to itself, next to another document
_SAME_HALF, _UNMOVED_HALF = 2e-2, 2e-3
_PROBE_LENS = ((7, 12, 5), (9, 15, 0))


def find_packing(model: nn.Module) -> Packing:
    """Find whether a block-causal mask keeps this model's documents apart, on a tiny probe.

    Each document must come out as it does alone, in every layer and in the logits, and must not
    move when another one in its row changes: recurrent layers leak through any mask.
    """
    if positions_depend_on_length(model):
        reason = "its rotary positions change with the length of a row"
        return Packing("documents", reason, surplus=1.0)
    device = device_of(model.get_input_embeddings())  # type: ignore[operator]
    layers = range(len(decoder_layers(model)))
    seq_lens, input_ids, changed = leak_probe(model)
    try:
        packed, moved = (
            forward_masked(model, ids.to(device), seq_lens, layers) for ids in (input_ids, changed)
        )
    except PackingUnsupported as exc:
        return Packing("documents", exc.detail)
    except Exception as exc:  # whatever a model does with a mask it does not know
        return Packing("documents", f"its forward fails under a block-causal mask: {exc!r:.200}")
    alone = forward_documents(model, input_ids.to(device), seq_lens, layers, surplus=1.0)
    leak = Leak.of(alone, packed, moved)
    return Packing("masked" if leak.reason is None else "documents", leak.reason)


def leak_probe(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return lengths of packed documents, their input_ids, and the same with another first one."""
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    config = text_config(model)
    count = min(weight.shape[0], int(getattr(config, "vocab_size", weight.shape[0])))
    seq_lens = torch.tensor(_PROBE_LENS)
    shape = len(_PROBE_LENS), int(seq_lens[0].sum())
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(count, shape, generator=generator)
    changed = input_ids.clone()
    changed[0, : _PROBE_LENS[0][0]] = torch.randint(
        count, (_PROBE_LENS[0][0],), generator=generator
    )
    if is_flash(model):  # its condition: one row
        seq_lens, input_ids, changed = seq_lens[:1], input_ids[:1], changed[:1]
    return seq_lens, input_ids, changed


@dataclass(frozen=True)
class Leak:
    """Whether documents of `leak_probe` see one another: a reason, or None; and the difference."""

    reason: str | None
    difference: float

    @classmethod
    def of(
        cls, alone: ForwardResult, packed: ForwardResult, moved: ForwardResult, slack: float = 1.0
    ) -> Leak:
        """Hold packed documents against each one alone, and against them beside another one.

        `slack` is how much more than by default they may differ from each one alone.
        """
        dtype = packed.aux_states[0].dtype
        apart = largest_difference(alone, packed)
        if not apart <= slack * _SAME.get(dtype, _SAME_HALF):
            words = f"packed documents differ from the same alone by {apart:.2g} (relative)"
            return cls(words, apart)
        # The documents beside the one that changed; another row is no neighbour.
        error = largest_difference(packed, moved, slice(0, 1), slice(_PROBE_LENS[0][0], None))
        if not error <= _UNMOVED.get(dtype, _UNMOVED_HALF):
            return cls(f"a document moves by {error:.2g} when another one changes", error)
        return cls(None, apart)


def largest_difference(
    first: ForwardResult,
    second: ForwardResult,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> float:
    """Return the largest |a - b| / |a| (Frobenius) of a layer or the logits; NaN is the largest."""
    worst = 0.0
    pairs = [*zip(first.aux_states, second.aux_states, strict=True), (first.logits, second.logits)]
    for a, b in pairs:
        a, b = a[rows, columns].float(), b[rows, columns].float()
        error = float((a - b).norm() / a.norm().clamp_min(1e-12))
        worst = error if error != error or error > worst else worst
    return worst
