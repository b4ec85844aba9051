"""The hooks against transformers' own `output_hidden_states`, both taken from one forward.

transformers calls layer i's output `hidden_states[i + 1]`, but for the last layer: its last entry
has passed the final norm. What that norm was given stands for it, so nothing here relies on where
this package believes the layers to be. One forward gives both sides, so that equal bits can be
asked for of any target, whether or not it repeats itself.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error
from eagle3_server.device_errors import is_fatal, is_out_of_memory
from eagle3_server.forward import forward_with_aux
from eagle3_server.head import probe_batch
from eagle3_server.layout import decoder_layers
from eagle3_server.sharding import whole

_COLUMNS = 16
_LAST_CALLS = 16  # of modules that keep the shape: the final norm is among the last of a forward
_OTHERS = "all layers but the last are transformers' own hidden_states, bit for bit"


class CaptureMismatch(InvalidRequest):
    """The hooks catch something else than the layers' outputs: all supervision would be wrong."""


@dataclass(frozen=True)
class CaptureFinding:
    """What the comparison found.

    Attributes:
        status: `verified`: each layer's capture is, bit for bit, what transformers says;
            `not comparable`: transformers does not say; `wrong`: one is something else.
        words: what was compared, why not, or which layer's capture is what.
        largest_difference: relative (Frobenius), of any layer; None if nothing was compared.
    """

    status: Literal["verified", "not comparable", "wrong"]
    words: str
    largest_difference: float | None = None


def prove_capture(model: nn.Module, num_layers: int) -> CaptureFinding:
    """Do as `compare_capture`, for a target that is about to be served.

    Raises:
        CaptureMismatch: the hooks catch something else than the layers' outputs.
    """
    found = compare_capture(model, num_layers)
    if found.status == "wrong":
        raise CaptureMismatch(
            f"{type(model).__name__} is not served: its captured layers are not what transformers "
            f"gives as hidden_states of the same forward: {found.words}. Drafts would be trained "
            "on the wrong aux_hidden_states. Install the transformers version that this package "
            "was tested with, and report the model"
        )
    return found


def compare_capture(model: nn.Module, num_layers: int) -> CaptureFinding:
    """Capture all layers of one short forward as requests do, and hold them against its own.

    Args:
        model: the target; every rank of a sharded one must call this.
        num_layers: of its decoder.

    Raises:
        Exception: what the forward raised, if no memory was left or the device is lost.
    """
    if not _takes_hidden_states(model):
        return _unknown("its forward takes no output_hidden_states")
    input_ids, attention_mask = (each[:1, :_COLUMNS] for each in probe_batch(model))
    own: list[Any] = []
    calls: deque[_Call] = deque(maxlen=_LAST_CALLS)
    names = {module: name for name, module in model.named_modules()}
    at_once: dict[int, torch.Tensor] = {}

    def copy_of(layer_id: int) -> Any:
        def copy(_module: nn.Module, _args: object, output: Any) -> None:
            at_once[layer_id] = whole(output[0] if isinstance(output, tuple) else output).clone()

        return copy

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        own.append(getattr(output, "hidden_states", None))

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and _is_state(args[0]) and _is_state(output) and args[0].shape == output.shape:
            calls.append(_Call(names[module], args[0], output))

    with _hooks_as_before(model):
        model.register_forward_pre_hook(ask, with_kwargs=True)
        model.register_forward_hook(keep)
        for module in names:
            if not [*module.children()]:
                module.register_forward_hook(note)
        for i, layer in enumerate(decoder_layers(model)):
            layer.register_forward_hook(copy_of(i))
        try:
            result = forward_with_aux(model, input_ids, attention_mask, range(num_layers))
        except RemoteEagle3Error:
            raise
        except Exception as exc:  # whatever a model does when it is asked for more than usual
            if own or is_fatal(exc) or is_out_of_memory(exc):
                raise  # its forward ended well, or would fail without output_hidden_states too
            return _unknown(f"its forward fails with output_hidden_states: {exc!r:.200}")
    found = _judge(result.aux_states, own[-1], list(calls))
    if found.status == "verified":  # transformers' list, too, has the tensors and not copies
        for i, states in enumerate(result.aux_states):
            if not same_bits(states, at_once[i]):
                words = f"layer {i}'s output is changed in place by what follows it"
                return CaptureFinding("wrong", words, relative_difference(states, at_once[i]))
    return found


@dataclass(frozen=True)
class _Call:
    """A module's call: its name in the model, what it was given, and what it made of that."""

    name: str
    given: torch.Tensor
    result: torch.Tensor

    @property
    def is_in_a_layer(self) -> bool:
        """Whether it is a part of one of a list of modules, and so not what follows the last."""
        return any(part.isdigit() for part in self.name.split("."))


def _judge(captured: Sequence[torch.Tensor], own: Any, calls: Sequence[_Call]) -> CaptureFinding:
    """Compare captured layers with a forward's `hidden_states` and the last calls of modules."""
    count = len(captured)
    if not isinstance(own, tuple | list) or not all(_is_state(each) for each in own):
        return _unknown("its forward returns no hidden_states")
    if len(own) != count + 1:
        return _unknown(f"its forward returns {len(own)} hidden_states for {count} layers")
    hidden = [whole(each).to(captured[0].device) for each in own]
    shapes = {tuple(each.shape) for each in (*hidden, *captured)}
    if len(shapes) != 1:
        return _unknown(f"its hidden_states and layers have several shapes: {sorted(shapes)}")
    calls = [_Call(each.name, whole(each.given), whole(each.result)) for each in calls]
    calls = [each for each in calls if not same_bits(each.given, each.result)]
    final = [each for each in calls if same_bits(each.result, hidden[-1])]
    if final and final[-1].is_in_a_layer:
        ways = [hidden[1:]]  # no norm follows: BERT's and BART's layers end with theirs
    elif final:
        # By what the final norm is given; Mamba2's list starts behind the first layer.
        given = final[-1].given.to(hidden[-1].device)
        ways = [[*hidden[1:-1], given]]
        if same_bits(given, hidden[-2]):
            ways.append(hidden[:-1])
    elif any(same_bits(each.given, hidden[-1]) for each in calls):
        ways = [hidden[1:]]  # its last entry is what the final norm is given
    else:
        reason = "no module's output is the last of its hidden_states"
        if all(same_bits(a, b) for a, b in zip(captured[:-1], hidden[1:-1], strict=True)):
            reason += f"; {_OTHERS}"
        return _unknown(reason)
    for outputs in ways:
        if all(same_bits(a, b) for a, b in zip(captured, outputs, strict=True)):
            words = f"all {count} layers are transformers' own hidden_states, bit for bit"
            return CaptureFinding("verified", words, 0.0)
    outputs = ways[-1]
    wrong = [i for i in range(count) if not same_bits(captured[i], outputs[i])]
    worst = max(relative_difference(captured[i], outputs[i]) for i in wrong)
    named = {"the input of layer 0": hidden[0]} if outputs[0] is not hidden[0] else {}
    named |= {f"layer {j}'s output": each for j, each in enumerate(outputs)}
    named["the final norm's output"] = hidden[-1]
    is_what = {
        i: next((name for name, each in named.items() if same_bits(captured[i], each)), None)
        for i in wrong
    }
    if wrong == [count - 1] and is_what[count - 1] is None:
        return _unknown(
            f"the final norm is not given layer {count - 1}'s output as it is; {_OTHERS}"
        )
    said = []
    for i, name in is_what.items():
        away = f"no layer's output ({relative_difference(captured[i], outputs[i]):.2g} away)"
        said.append(f"what was caught of layer {i} is {name or away}")
    more = f", and {len(said) - 3} layers more" if len(said) > 3 else ""
    return CaptureFinding("wrong", "; ".join(said[:3]) + more, worst)


@contextmanager
def _hooks_as_before(model: nn.Module) -> Iterator[None]:
    """Take away what hooks the block leaves behind.

    Those of transformers too: asked for hidden states once, it hooks the layers for good, and each
    forward of a trainer's request would pay for it.
    """
    before = {module: (_hooks_of(module), _flags_of(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (hooks, flags) in before.items():
            for there, kept in zip(_hook_lists(module), hooks, strict=True):
                for key in there.keys() - kept:
                    del there[key]
            for name in _flags_of(module) - flags:
                delattr(module, name)  # or it would take its own hooks for being there


def _hooks_of(module: nn.Module) -> list[set[int]]:
    return [set(each) for each in _hook_lists(module)]


def _hook_lists(module: nn.Module) -> list[dict[int, Any]]:
    return [
        module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
        module._forward_hooks, module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]  # fmt: skip


def _flags_of(module: nn.Module) -> set[str]:
    return {name for name in vars(module) if name.endswith("_hooks_installed")}


def _unknown(reason: str) -> CaptureFinding:
    return CaptureFinding("not comparable", reason)


def _takes_hidden_states(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "output_hidden_states" in parameters or any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
    )


def _is_state(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two states have equal bits, of NaN too; of another dtype, those of the values."""
    if a.shape != b.shape:
        return False
    b = b.to(device=a.device, dtype=a.dtype)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a - b| / |b| (Frobenius)."""
    a, b = a.float(), b.float().to(a.device)
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
