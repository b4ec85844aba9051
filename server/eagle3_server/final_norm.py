"""The final norm: found and proven on a probe, so that `last_hidden_prenorm` means what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from eagle3_schemas.target_head import FinalNorm, NormForm
from eagle3_server.head import RowsHead, cut_head, probe_batch
from eagle3_server.layout import decoder_layers

_SAME = {torch.float32: 1e-5}  # largest relative difference of a form to the model's own norm
_SAME_HALF = 1e-2
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class Found:
    """What stands between the last decoder layer and the head.

    Attributes:
        has_prenorm: whether the last layer's output is what the final norm is given.
        norm: the norm in a form a trainer can apply, or None.
        reason: why one of the two is missing, or None.
    """

    has_prenorm: bool
    norm: FinalNorm | None
    reason: str | None


def find_final_norm(
    model: nn.Module,
    head: RowsHead,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Found:
    """Find the module between the last decoder layer and the head, and the form of its norm.

    Args:
        model: the target.
        head: its head.
        forward: runs the model.
    """
    layer = decoder_layers(model)[-1]
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    last: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if last and args and _is_state(args[0]) and _is_state(output):
            calls.append((module, args[0], output))

    def note_layer(_module: nn.Module, _args: object, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note_layer)]
    handles += [m.register_forward_hook(note) for m in model.modules() if not [*m.children()]]
    try:
        with cut_head(head.module) as inputs:
            forward(*probe_batch(model))
    finally:
        for handle in handles:
            handle.remove()
    # The last such call: NanoChat norms its embeddings with the same module. Mamba casts after it.
    module, given, result = next(
        (
            call
            for call in reversed(calls)
            if call[2].shape == inputs[0].shape
            and torch.equal(call[2].to(inputs[0].dtype), inputs[0])
        ),
        (None, None, None),
    )
    if module is None or given is None or result is None:
        return Found(False, None, "no module's output is what the head is given")
    if not torch.equal(given, last[0]):
        return Found(
            False, None, f"{type(module).__name__}, before the head, is not given the last layer's "
            "output",
        )  # fmt: skip
    error, norm = min(
        ((_error(form, given, result), form) for form in _forms(module)),
        key=lambda pair: pair[0],
        default=(float("inf"), None),
    )
    if norm is None or not error <= _SAME.get(result.dtype, _SAME_HALF):
        return Found(True, None, f"{type(module).__name__} is a norm of no form known here")
    return Found(True, norm, None)


def _is_state(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


def _error(norm: FinalNorm, given: torch.Tensor, result: torch.Tensor) -> float:
    """Return the largest |a - b| / |a| of a position; NaN is the largest."""
    expected, got = result.float(), norm(given).float()
    error = ((expected - got).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max().item()
    return error if error == error else float("inf")


def _forms(module: nn.Module) -> Iterator[FinalNorm]:
    """Give the forms that families have, the plainest first."""
    eps = next((e for n in _EPS_NAMES if isinstance(e := getattr(module, n, None), float)), None)
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # nn.RMSNorm's
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gains: list[torch.Tensor | None] = [None]
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        weight = weight.detach()
        gains = [weight, 1.0 + weight.float(), 1.0 + weight]  # Llama, Gemma, Nemotron
    bias = bias.detach() if isinstance(bias, torch.Tensor) and bias.ndim == 1 else None
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind, gain, in_float32 in product(kinds, gains, (False, True)):
        yield FinalNorm(NormForm(kind, eps, in_float32), gain, bias)
