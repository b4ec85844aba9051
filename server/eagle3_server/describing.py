"""`describe_target`: what a server tells of its target, from what was found of it at load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from eagle3_schemas import AUX_LAYER_CONVENTION
from eagle3_schemas.capture import OUTPUTS
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.protocol import PROTOCOL_VERSION
from eagle3_server.capture_probe import CaptureFinding
from eagle3_server.engine import TargetDescription
from eagle3_server.final_norm import Found
from eagle3_server.fingerprint import config_digest, target_fingerprint, weights_digest
from eagle3_server.forward import ForwardResult
from eagle3_server.head import RowsHead
from eagle3_server.layout import max_sequence_length
from eagle3_server.packing import Packing
from eagle3_server.placement import device_of, devices_of
from eagle3_server.quantization import quantization_of


def describe_target(
    model: nn.Module,
    *,
    model_id: str,
    revision: str | None,
    tokenizer_digest: str | None,
    aux_layer_ids: tuple[int, ...] | None,
    probe: ForwardResult,
    head: RowsHead | None,
    head_reason: str | None,
    packing: Packing,
    between: Found,
    hooks: CaptureFinding,
) -> TargetDescription:
    """Describe a target; the digests read a few megabytes of its weights.

    Args:
        model: the target.
        model_id: as in `TransformersTarget`.
        revision: as in `TransformersTarget`.
        tokenizer_digest: as in `TransformersTarget`.
        aux_layer_ids: used when a request names none; None where there is no default.
        probe: a forward that caught every layer, with full logits.
        head: the rows-only head, or None.
        head_reason: why there is none.
        packing: how packed rows run.
        between: what stands between the last layer and the head.
        hooks: how the captured layers compare with transformers' own; not `wrong`.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    device, vocab_size = device_of(embeddings), probe.logits.shape[-1]
    dtype = str(probe.aux_states[0].dtype).removeprefix("torch.")
    quantization = quantization_of(model)
    parts = {"config_digest": config_digest(model), "weights_digest": weights_digest(model)}
    return TargetDescription(
        model_id=model_id,
        revision=revision,
        architecture=type(model).__name__,
        **parts,
        fingerprint=target_fingerprint(
            **parts,
            model_id=model_id,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            tokenizer_digest=tokenizer_digest,
            vocab_size=vocab_size,
            aux_layer_convention=AUX_LAYER_CONVENTION,
            protocol_version=PROTOCOL_VERSION,
        ),
        quantization=quantization,
        tokenizer_digest=tokenizer_digest,
        num_hidden_layers=len(probe.aux_states),
        hidden_size=probe.aux_states[0].shape[-1],
        vocab_size=vocab_size,
        input_vocab_size=int(embeddings.weight.shape[0]),
        max_sequence_length=max_sequence_length(model),
        dtype=dtype,
        device=str(device),
        device_name=_device_name(devices_of(model)),
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        aux_layer_ids=aux_layer_ids,
        num_threads=torch.get_num_threads(),
        head="full" if head is None else "rows",
        head_reason=head_reason,
        encodings=(
            ("probs", "logits", "hidden")
            if head is not None and head.is_plain_linear
            else ("probs", "logits")
        ),
        transform=LogitsTransform() if head is None else head.transform,
        packing=packing.route,
        packing_reason=packing.reason,
        outputs=tuple(
            name
            for name in OUTPUTS
            if (name != "last_hidden" or between.has_hidden)
            and (name != "last_hidden_prenorm" or between.has_prenorm)
        ),
        outputs_reason=between.reason,
        norm=None if between.norm is None else between.norm.form,
        hooks="verified" if hooks.status == "verified" else "not comparable",
        hooks_reason=None if hooks.status == "verified" else hooks.words,
    )


def _device_name(devices: Sequence[torch.device]) -> str:
    names = Counter(
        torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices
    )
    return " + ".join(f"{n} x {name}" if n > 1 else name for name, n in names.items())
