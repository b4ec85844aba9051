"""One forward of the target: logits, and the outputs of three decoder layers caught by hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.head import cut_head
from eagle3_server.layout import decoder_layers, reset_rotary


@contextmanager
def capture_layers(
    model: nn.Module, aux_layer_ids: Sequence[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Catch the outputs of decoder layers during forwards inside the block; hooks always go.

    Yields:
        A dict that each forward fills: layer id -> that layer's output, [B, T, H].

    Raises:
        IndexError: an id outside the model's layers; validate ids first.
    """
    captured: dict[int, torch.Tensor] = {}
    layers = decoder_layers(model)

    def hook(layer_id: int) -> Any:  # torch's own hook type is not importable
        def catch(_module: nn.Module, _inputs: object, output: Any) -> None:
            # Falcon, Bloom and MPT return a tuple whose first entry is the state.
            captured[layer_id] = output[0] if isinstance(output, tuple) else output

        return catch

    handles: list[Any] = []
    try:
        handles += [layers[i].register_forward_hook(hook(i)) for i in aux_layer_ids]
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class ForwardResult:
    """What one forward gave; everything unshifted."""

    aux_states: tuple[torch.Tensor, ...]  # [B, T, H] for each aux layer, model dtype
    logits: torch.Tensor  # [B, T, V]; with a cut head [B, 1, V]
    head_input: torch.Tensor | None  # [B, T, H], with a cut head

    # All on the device of `input_ids`, wherever the layers are.

    @property
    def aux_hidden_states(self) -> torch.Tensor:
        """The aux layers' outputs concatenated: a new [B, T, 3H]."""
        return torch.cat(self.aux_states, dim=-1)

    def gathered(self, context: ContextParallel, length: int) -> ForwardResult:
        """Return all ranks' columns, `length` of them, where this has those of one rank."""
        head_input = self.head_input
        return ForwardResult(
            tuple(context.gather(states, 1, length) for states in self.aux_states),
            self.logits if head_input is not None else context.gather(self.logits, 1, length),
            None if head_input is None else context.gather(head_input, 1, length),
        )

    def attended_aux(self, attention_mask: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """Return `aux_hidden_states` where `attention_mask` [B, T] bool is true: [n, 3H].

        Layer by layer into one buffer: the states are never there twice. `count` takes the first
        so many layers alone.
        """
        layers = self.aux_states[:count]
        hidden_size = layers[0].shape[-1]
        rows = layers[0].new_empty(int(attention_mask.sum()), hidden_size * len(layers))
        for part, states in zip(torch.split(rows, hidden_size, dim=1), layers, strict=True):
            part.copy_(states[attention_mask])
        return rows


def forward_logits(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: Any,
    *,
    position_ids: torch.Tensor | None = None,
    past: Cache | None = None,
) -> torch.Tensor:
    """Run the model once under `no_grad`, without a cache, and return its logits.

    Never `inference_mode`: a co-located trainer saves these states for its backward.

    Args:
        model: a causal LM in eval mode; Hugging Face's, or one that returns the logits tensor.
        input_ids: [B, T] integer, on the model's device.
        attention_mask: [B, T], non-zero where attended, any dtype; or, with `position_ids`, what
            the model itself takes for one.
        position_ids: [B, T], of packed rows only: else the model counts them.
        past: of the columns before `input_ids`, which `attention_mask` then has too.
    """
    reset_rotary(model)
    taken: dict[str, Any] = {} if past is None else {"past_key_values": past}
    if position_ids is None:
        # One dtype for all callers: an equal mask must give equal bits.
        taken |= {"attention_mask": attention_mask.ne(0).long()}
    else:
        taken |= {"attention_mask": attention_mask, "position_ids": position_ids}
    with torch.no_grad():
        output = model(input_ids=input_ids, **taken, **_flags(model))
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output
    return logits


def forward_with_aux(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: Any,
    aux_layer_ids: Sequence[int],
    head_to_cut: nn.Module | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    context: ContextParallel | None = None,
) -> ForwardResult:
    """Run the target once, as `forward_logits`, and catch its aux layers.

    Args:
        model: as in `forward_logits`.
        input_ids: as in `forward_logits`.
        attention_mask: as in `forward_logits`.
        aux_layer_ids: validated layer ids.
        head_to_cut: the output embeddings, to compute one row of logits only.
        position_ids: as in `forward_logits`; never with a `context`.
        context: ranks to split the sequence over; all call this with the same arguments, and all
            get the whole result.

    Raises:
        InvalidRequest: the forward did not pass through every aux layer, or a layer's output is not
            [B, T, H].
    """
    length, past = input_ids.shape[1], None
    if context is not None and context.splits(length):
        start, stop = context.span(length)
        input_ids, attention_mask = input_ids[:, start:stop], attention_mask[:, :stop]
        past = context.cache(len(decoder_layers(model)), length)
    head_inputs: list[torch.Tensor] = []
    with capture_layers(model, aux_layer_ids) as captured, ExitStack() as stack:
        if head_to_cut is not None:
            head_inputs = stack.enter_context(cut_head(head_to_cut))
        logits = forward_logits(
            model, input_ids, attention_mask, position_ids=position_ids, past=past
        )
    missing = [i for i in aux_layer_ids if i not in captured]
    if missing:
        raise InvalidRequest(
            f"the forward did not pass through decoder layers {missing}, or their hooks did not "
            "run, as in a model that is compiled as a whole: serve it as it was, or compile its "
            "layers one by one"
        )
    for i in aux_layer_ids:
        if captured[i].ndim != 3 or captured[i].shape[:2] != input_ids.shape:
            # Gemma 3n carries four streams, [4, B, T, H]; none of them is the hidden state.
            raise InvalidRequest(
                f"{type(model).__name__}: decoder layer {i} gives {list(captured[i].shape)} for "
                f"input_ids {list(input_ids.shape)}, not [B, T, H]; its aux_hidden_states are "
                "undefined, so this model cannot be a target"
            )
    # A model on several devices leaves each layer's output where that layer is.
    device = input_ids.device
    aux_states = tuple(captured[i].to(device) for i in aux_layer_ids)
    head_input = head_inputs[0].to(device) if head_inputs else None
    result = ForwardResult(aux_states, logits.to(device), head_input)
    return result if context is None or past is None else result.gathered(context, length)


def _flags(model: nn.Module) -> dict[str, bool]:
    """Switch off what costs memory; models that declare none of these take no such argument."""
    parameters = inspect.signature(model.forward).parameters
    names = ("use_cache", "output_hidden_states", "output_attentions")
    return {name: False for name in names if name in parameters}
