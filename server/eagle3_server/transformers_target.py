"""`TransformersTarget`: the engine that runs a Hugging Face causal LM."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from eagle3_schemas import (
    DraftVocab,
    default_aux_layer_ids,
    shift_left_with_zero,
    validate_aux_layer_ids,
)
from eagle3_schemas.aux_states import encode_aux
from eagle3_schemas.draft_head import ROW_MULTIPLE
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.self_check import SelfCheck
from eagle3_schemas.supervision import pack_bits
from eagle3_server.capture_probe import prove_capture
from eagle3_server.capturing import capture
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.describing import describe_target
from eagle3_server.engine import (
    CaptureJob,
    DeviceTensors,
    SupervisionJob,
    TargetDescription,
)
from eagle3_server.final_norm import Found, find_final_norm
from eagle3_server.forward import forward_logits, forward_with_aux
from eagle3_server.head import HeadUnsupported, RowsHead, probe_batch
from eagle3_server.layout import decoder_layers
from eagle3_server.packing_probe import find_packing
from eagle3_server.placement import device_of, weights_of
from eagle3_server.quantization import compute_from_stored_weights, why_not_to_trim
from eagle3_server.running import JobRunner, aux_names, check_finite
from eagle3_server.self_check import check_target
from eagle3_server.sharding import is_sharded, whole
from eagle3_server.split_probe import ONE_BY_ONE, prove_split
from eagle3_server.supervise import supervise_rows

_CACHED_DRAFT_VOCABS = 16

logger = logging.getLogger(__name__)


class TransformersTarget:
    """A frozen causal LM that supervises. Not thread-safe: one thread owns it.

    A short forward at construction finds V (the width of the logits) and proves that the hooks
    catch every layer.

    Args:
        model: a causal LM on its device; put into eval mode, its parameters frozen.
        model_id: name shown to clients: a hub id, or a directory's name.
        revision: the hub revision served, or None.
        tokenizer_digest: of the checkpoint's tokenizer, or None.
        aux_layer_ids: layers used when a request names none; the default is the EAGLE-3 rule, or
            nothing if the target is too shallow for it.
        head_chunk_bytes: memory the full-vocab logits of a chunk of rows may take; None is 256 MiB
            on a GPU and 64 MiB elsewhere.
        context: ranks to split each sequence over, all of which do the same with this target.

    Raises:
        InvalidRequest: bad `aux_layer_ids`, no decoder layers found in the model, or one whose
            sequences cannot be split.
        CaptureMismatch: what the hooks catch is not transformers' own `hidden_states`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_id: str,
        revision: str | None = None,
        tokenizer_digest: str | None = None,
        aux_layer_ids: Sequence[int] | None = None,
        head_chunk_bytes: int | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        compute_from_stored_weights(model)
        self._model = model.eval().requires_grad_(False)
        num_layers = len(decoder_layers(model))
        if aux_layer_ids is not None:
            default = validate_aux_layer_ids(aux_layer_ids, num_layers)
        else:
            try:
                default = default_aux_layer_ids(num_layers)
            except InvalidRequest:  # too shallow: every request must then name its own
                default = None
        self._on_device: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        # Where inputs go, and where results are brought to from wherever a part of the model is.
        self._device = device_of(self._embeddings())
        if head_chunk_bytes is None:
            # A GPU's chunk has a thousand rows at V = 128k in bfloat16: with fewer, reading the
            # head's weights takes longer than the matmul (benchmarks/results/gpu.md).
            head_chunk_bytes = (64 if self._device.type == "cpu" else 256) * 1024 * 1024
        probe = forward_with_aux(model, *probe_batch(model), range(num_layers))
        hooks = prove_capture(model, num_layers)
        if hooks.status != "verified":
            logger.warning("the captured layers could not be compared: %s", hooks.words)
        vocab_size = probe.logits.shape[-1]
        self._head: RowsHead | None = None
        head_reason = None
        forward = partial(forward_logits, model)
        try:
            self._head = RowsHead.find(model, forward, head_chunk_bytes)
        except HeadUnsupported as exc:
            head_reason = str(exc)
            logger.warning("the head runs for every position, not for rows alone: %s", exc)
        packing = find_packing(model) if context is None else ONE_BY_ONE
        if packing.reason is not None:
            logger.info("packed documents run as rows of their own: %s", packing.reason)
        untrimmed = why_not_to_trim(model)
        if untrimmed is not None:
            logger.info("trailing padding is computed: %s", untrimmed)
        self._runner = JobRunner(
            model=model,
            device=self._device,
            head=self._head,
            packing=packing,
            can_trim=untrimmed is None,
            full_chunk_rows=max(head_chunk_bytes // (4 * vocab_size), 1),
            context=context,
        )
        if context is not None:
            prove_split(model, context)
        between = Found(False, False, None, head_reason)
        if self._head is not None:
            between = find_final_norm(model, self._head, forward)
        self._norm, self._has_hidden = between.norm, between.has_hidden
        self._description = describe_target(
            model,
            model_id=model_id,
            revision=revision,
            tokenizer_digest=tokenizer_digest,
            aux_layer_ids=default,
            probe=probe,
            head=self._head,
            head_reason=head_reason,
            packing=packing,
            between=between,
            hooks=hooks,
        )

    def describe(self) -> TargetDescription:
        """Return what is served."""
        return self._description

    def input_embeddings(self) -> DeviceTensors:
        """Return the input embeddings' `weight`."""
        embeddings = self._embeddings()
        with weights_of(embeddings):
            weight: torch.Tensor = embeddings.weight.detach()  # type: ignore[operator]
        is_constant = not is_sharded(weight)
        return DeviceTensors.queued(
            {"weight": whole(weight)}, self._device, is_constant=is_constant
        )

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """Return the head's rows for a draft vocab; see `Target`."""
        self._plain_head("encoding 'hidden'")
        assert self._head is not None
        ids, _ = self._draft_vocab(draft_vocab)
        weight, bias = self._head.draft_rows(ids)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return self._here(tensors)

    def target_head(self) -> DeviceTensors:
        """Return the whole head and the final norm; see `Target`.

        Raises:
            InvalidRequest: the head is no plain linear, or does more than its weights say.
        """
        head = self._plain_head("the whole head")
        if not self._has_hidden:
            raise InvalidRequest(
                f"the whole head is of no use here: {self._description.outputs_reason}. Ask for "
                "outputs of the head instead"
            )
        with weights_of(head):
            tensors = {"weight": whole(head.weight.detach())}
            if head.bias is not None:
                tensors["bias"] = whole(head.bias.detach())
        if self._norm is not None:
            parts = {"norm_weight": self._norm.weight, "norm_bias": self._norm.bias}
            tensors |= {name: part for name, part in parts.items() if part is not None}
        is_constant = not is_sharded(head.weight)
        return self._here(tensors, is_constant=is_constant)

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """Run the target on one job: one forward, then the head for the rows asked for.

        Args:
            job: checked already, as `checking` does it; on the CPU.

        Raises:
            InvalidRequest: `exact` with an encoding that cannot keep its bits here.
            TargetFailed: values that are not finite, with their layer or row.
        """
        runner, encoding = self._runner, ENCODINGS[job.encoding]
        head = self._head
        if runner.needs_full_head(job):
            if encoding.needs_draft_head:
                raise InvalidRequest(
                    "exact=True with encoding 'hidden' needs a CPU target and a batch of at least "
                    f"{ROW_MULTIPLE} tokens; use 'probs' or 'logits'"
                )
            head = None
        columns = job.input_ids.shape[1] if job.rows == "all" else runner.used_columns(job)
        result = runner.run(job, columns, job.aux_layer_ids, head)
        attention_mask = job.attention_mask[:, :columns].to(self._device)
        attended = result.attended_aux(attention_mask)
        source = runner.head_rows(head, result)
        del result  # frees the layers' outputs before the head runs
        check_finite(attended, attention_mask, aux_names(job.aux_layer_ids))
        started = time.monotonic()
        loss_mask = job.loss_mask[:, :columns].to(self._device)
        draft_vocab = self._draft_vocab(job.draft_vocab)
        supervision = runner.rows(
            lambda share: vars(
                supervise_rows(
                    source,
                    loss_mask,
                    *draft_vocab,
                    encoding,
                    job.rows,
                    needs_draft_logits=not encoding.needs_draft_head,
                    share=share,
                )
            )
        )
        head_seconds = time.monotonic() - started  # its checks have waited for the device
        position_mask = torch.zeros(job.loss_mask.shape, dtype=torch.bool, device=self._device)
        position_mask[:, :columns] = shift_left_with_zero(supervision["position_mask"])
        return self._here(
            {
                **encode_aux(attended, job.aux_dtype),
                "position_mask": pack_bits(position_mask),
                encoding.tensor_name: supervision["rows"],
            },
            head_seconds=head_seconds,
        )

    def capture(self, job: CaptureJob) -> DeviceTensors:
        """Run the target on one job: a forward, and the head if an output needs it.

        Args:
            job: checked already, as `checking` does it; on the CPU.

        Raises:
            TargetFailed: values that are not finite, with their layer or row.
        """
        selected = None if job.draft_vocab is None else self._draft_vocab(job.draft_vocab)
        tensors, head_seconds = capture(self._runner, job, selected)
        return self._here(tensors, head_seconds=head_seconds)

    def self_check(self, name: str) -> SelfCheck:
        """Check anew what was proved at load; see `check_target`."""
        return check_target(name, self._runner, self._description.num_hidden_layers)

    def _here(self, tensors: dict[str, torch.Tensor], **how: Any) -> DeviceTensors:
        """Bring a result to one device: the head's part comes from where the head is."""
        here = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        return DeviceTensors.queued(here, self._device, **how)

    def _plain_head(self, what: str) -> nn.Linear:
        head = None if self._head is None else self._head.module
        if self._head is None or not self._head.is_plain_linear or not isinstance(head, nn.Linear):
            raise InvalidRequest(
                f"{what} needs a head that is a plain linear, which this target's is not; it "
                f"offers encodings {list(self._description.encodings)}"
            )
        return head

    def _embeddings(self) -> nn.Module:
        embeddings: nn.Module = self._model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

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
