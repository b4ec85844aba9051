"""`TransformersTarget`: the engine that runs a Hugging Face causal LM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from eagle3_schemas import (
    DraftVocab,
    default_aux_layer_ids,
    shift_left_with_zero,
    validate_aux_layer_ids,
)
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tensors import checksum
from eagle3_server.engine import HostTensors, SupervisionJob, TargetDescription
from eagle3_server.fingerprint import model_fingerprint
from eagle3_server.forward import forward_with_aux
from eagle3_server.layout import decoder_layers, max_sequence_length

_CACHED_DRAFT_VOCABS = 16


class TransformersTarget:
    """A frozen causal LM that supervises. Not thread-safe: one thread owns it.

    A short forward at construction finds V (the width of the logits) and proves that the hooks
    catch every layer.

    Args:
        model: a causal LM on its device; put into eval mode, its parameters frozen.
        model_id: name shown to clients: a hub id, or a directory's name.
        revision: the hub revision served, or None.
        aux_layer_ids: layers used when a request names none; the default is the EAGLE-3 rule, or
            nothing if the target is too shallow for it.

    Raises:
        InvalidRequest: bad `aux_layer_ids`, or no decoder layers found in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_id: str,
        revision: str | None = None,
        aux_layer_ids: Sequence[int] | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        num_layers = len(decoder_layers(model))
        if aux_layer_ids is not None:
            default = validate_aux_layer_ids(aux_layer_ids, num_layers)
        else:
            try:
                default = default_aux_layer_ids(num_layers)
            except InvalidRequest:  # too shallow: every request must then name its own
                default = None
        embedding = self._embedding_weight()
        self._device = embedding.device
        self._on_device: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        probe_ids = torch.arange(2, device=self._device).unsqueeze(0)
        aux, logits = forward_with_aux(
            model, probe_ids, torch.ones_like(probe_ids), range(num_layers)
        )
        self._description = TargetDescription(
            model_id=model_id,
            revision=revision,
            architecture=type(model).__name__,
            fingerprint=model_fingerprint(model),
            num_hidden_layers=num_layers,
            hidden_size=aux.shape[-1] // num_layers,
            vocab_size=logits.shape[-1],
            input_vocab_size=embedding.shape[0],
            max_sequence_length=max_sequence_length(model),
            dtype=str(aux.dtype).removeprefix("torch."),
            device=str(self._device),
            device_name=_device_name(self._device),
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            aux_layer_ids=default,
            num_threads=torch.get_num_threads(),
        )

    def describe(self) -> TargetDescription:
        """Return what is served."""
        return self._description

    def input_embeddings(self) -> HostTensors:
        """Return the input embeddings' `weight` in host memory, with its checksum."""
        return _to_host({"weight": self._embedding_weight().detach()})

    def supervise(self, job: SupervisionJob) -> HostTensors:
        """Run the target on one job: full logits, then the draft-vocab rows asked for."""
        input_ids = job.input_ids.to(self._device)
        attention_mask = job.attention_mask.to(self._device)
        loss_mask = shift_left_with_zero(job.loss_mask.to(self._device))
        aux, logits = forward_with_aux(self._model, input_ids, attention_mask, job.aux_layer_ids)
        selected_token_ids, selected_token_mask = self._draft_vocab(job.draft_vocab)
        # argmax of the zeros that shifting appends is 0, which is what shifting the argmax gives.
        top_ids = shift_left_with_zero(logits.argmax(dim=-1))
        position_mask = selected_token_mask[top_ids] & loss_mask
        rows = {
            "position_mask": position_mask,
            "loss_mask": loss_mask,
            "all": torch.ones_like(loss_mask),
        }[job.rows]
        draft_logits = shift_left_with_zero(logits.index_select(-1, selected_token_ids))[rows]
        attended = aux[attention_mask]
        _check_finite(aux, attention_mask, job.aux_layer_ids)
        # A NaN counts as the largest, so the top logit tells of one anywhere in its row: such a row
        # must not pass for one whose argmax is outside the draft vocab.
        top_logits = logits[:, 1:].gather(-1, top_ids[:, :-1, None])[loss_mask[:, :-1]]
        _check_finite_rows(top_logits, loss_mask)
        _check_finite_rows(draft_logits, rows)
        return _to_host(
            {
                "aux_hidden_states": attended,
                "position_mask": pack_bits(position_mask),
                **ENCODINGS[job.encoding].encode(draft_logits),
            }
        )

    def _embedding_weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    def _draft_vocab(self, vocab: DraftVocab) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask on the device; the last few vocabs stay there."""
        cached = self._on_device.pop(vocab.digest, None)
        if cached is None:
            ids = vocab.selected_token_ids.to(self._device)
            cached = ids, vocab.mask(self._description.vocab_size).to(self._device)
        self._on_device[vocab.digest] = cached
        if len(self._on_device) > _CACHED_DRAFT_VOCABS:
            self._on_device.popitem(last=False)
        return cached


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _to_host(tensors: dict[str, torch.Tensor]) -> HostTensors:
    """Take each checksum where the tensor was computed, then copy it to the host."""
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    return HostTensors({name: t.contiguous().cpu() for name, t in tensors.items()}, checksums)


def _check_finite(
    aux: torch.Tensor, attention_mask: torch.Tensor, aux_layer_ids: tuple[int, ...]
) -> None:
    """Raise TargetFailed naming the first layer and row whose aux states are not finite."""
    for layer_id, states in zip(aux_layer_ids, aux.chunk(len(aux_layer_ids), -1), strict=True):
        bad = ~states.isfinite().all(dim=-1) & attention_mask
        if bool(bad.any()):
            row, position = bad.nonzero()[0].tolist()
            raise TargetFailed(
                f"decoder layer {layer_id} gave non-finite aux_hidden_states at row {row}, "
                f"position {position}; nothing was sent. Look at this row, or serve the target in "
                "a wider dtype (--dtype bfloat16 or float32)"
            )


def _check_finite_rows(logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise TargetFailed naming the first of `rows` [B, T] whose logits [N, any] are not finite."""
    bad = ~logits.isfinite().all(dim=-1)
    if bool(bad.any()):
        row, position = rows.nonzero()[bad.nonzero()[0, 0]].tolist()
        raise TargetFailed(
            f"the head gave non-finite logits for row {row}, position {position} "
            "(shifted); nothing was sent. Look at this row, or serve the target in a wider dtype "
            "(--dtype bfloat16 or float32)"
        )
