"""The final norm: found and proven on a probe, so that `last_hidden_prenorm` means what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.target_head import FinalNorm, NormForm
from eagle3_server.head import RowsHead, cut_head, probe_batch
from eagle3_server.layout import decoder_layers
from eagle3_server.placement import device_of, weights_of

_SAME = {torch.float32: 1e-5}  # largest relative difference of a form to the model's own norm
_SAME_HALF = 1e-2
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class Found:
    """What stands between the last decoder layer and the head.

    Attributes:
        has_hidden: whether what the head is given has the layers' width, H.
        has_prenorm: whether the last layer's output is what the final norm is given.
        norm: the norm in a form a trainer can apply, or None.
        reason: why one of them is missing, or None.
    """

    has_hidden: bool
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

    Raises:
        InvalidRequest: hooks do not run, so that nothing could be captured.
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
    if not inputs or not last:
        raise InvalidRequest(
            f"hooks on the layers of {type(model).__name__} do not run in its forward, as happens "
            "when it is compiled as a whole. Serve it as it was, or compile its layers one by one"
        )
    if inputs[0].shape != last[0].shape:
        return Found(
            False, False, None, f"the head is given {inputs[0].shape[-1]} values a token, and the "
            f"layers give {last[0].shape[-1]}",
        )  # fmt: skip
    # The last such call: NanoChat norms its embeddings with the same module. Mamba casts after it.
    module, given = next(
        (
            (module, given)
            for module, given, result in reversed(calls)
            if result.shape == given.shape == inputs[0].shape
            and torch.equal(result.to(inputs[0].dtype), inputs[0])
        ),
        (None, None),
    )
    if module is None or given is None:
        return Found(True, False, None, "no module's output is what the head is given")
    name = type(module).__name__
    if not torch.equal(given, last[0]):
        reason = f"{name}, before the head, is not given the last layer's output"
        return Found(True, False, None, reason)
    try:
        error, norm = _closest(module, given)
    except Exception as exc:  # whatever a module does when it is called by itself
        return Found(True, True, None, f"{name} cannot be called by itself: {exc!r:.200}")
    if norm is None or not error <= _SAME.get(given.dtype, _SAME_HALF):
        return Found(True, True, None, f"{name} is a norm of no form known here")
    return Found(True, True, norm, None)


def _closest(module: nn.Module, given: torch.Tensor) -> tuple[float, FinalNorm | None]:
    """Return the form that comes closest to a module, and its error.

    On inputs as they are, and far smaller ones: beside those of a forward no eps would show.
    """
    if any(True for _ in module.parameters(recurse=False)):
        given = given.to(device_of(module))
    with torch.no_grad():
        probes = [given * scale for scale in (1.0, 1e-2, 1e-4)]
        results = [module(probe) for probe in probes]
        best: tuple[float, FinalNorm | None] = float("inf"), None
    # After its calls, each of which sends offloaded weights away again.
    with torch.no_grad(), weights_of(module):
        for form in _forms(module):
            errors = [_error(form, *pair) for pair in zip(probes, results, strict=True)]
            if max(errors) < best[0]:  # the first of equals, the plainest
                best = max(errors), form
    return best


def _is_state(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


def _error(norm: FinalNorm, given: torch.Tensor, result: torch.Tensor) -> float:
    """Return the largest |a - b| / |a| of a position; NaN is the largest."""
    expected, got = result.float(), norm(given).float()
    error = ((expected - got).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max().item()
    return error if error == error else float("inf")


def _forms(module: nn.Module) -> Iterator[FinalNorm]:
    """Give the forms that families have, the plainest first."""
    named = [getattr(module, name, None) for name in _EPS_NAMES]
    found = [float(e) for e in named if isinstance(e, (int, float, torch.Tensor))]
    # What modules have that do not say: OLMo's, others', and nn.RMSNorm's without one.
    epsilons = found or [1e-5, 1e-6, torch.finfo(torch.float32).eps]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gains: list[torch.Tensor | None] = [None]
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        weight = weight.detach()
        gains = [weight, 1.0 + weight.float(), 1.0 + weight]  # Llama, Gemma, Nemotron
    bias = bias.detach() if isinstance(bias, torch.Tensor) and bias.ndim == 1 else None
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for eps, kind, gain, in_float32 in product(epsilons, kinds, gains, (False, True)):
        yield FinalNorm(NormForm(kind, eps, in_float32), gain, bias)
