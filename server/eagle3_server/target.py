"""`HFEagle3TargetModel`: the co-located backend, a causal LM in the trainer's own process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from eagle3_schemas import (
    Eagle3TargetBackend,
    Eagle3TargetBatch,
    EmbeddingsLike,
    default_aux_layer_ids,
    shift_left_with_zero,
    validate_aux_layer_ids,
)
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.packing import check_packing
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.forward import forward_with_aux
from eagle3_server.layout import decoder_layers
from eagle3_server.packing import Packing, forward_packed
from eagle3_server.packing_probe import find_packing
from eagle3_server.quantization import compute_from_stored_weights
from eagle3_server.split_probe import ONE_BY_ONE, prove_split


class HFEagle3TargetModel(Eagle3TargetBackend):
    """Co-located EAGLE-3 target: full logits and three hidden states from a causal LM.

    The same contract as NeMo AutoModel's class of that name. Supervision carries full `logits`;
    the trainer projects them, so `set_vocab_mapping` does nothing. Not thread-safe: hooks sit on
    the shared model during a forward.

    Args:
        model: a Hugging Face causal LM, quantised or not; put into eval mode, its parameters
            frozen. Of one on several devices (`device_map`), batches go where its input
            embeddings are.
        aux_layer_ids: three distinct decoder layers whose outputs are captured; the default is
            `[1, L//2 - 1, L - 4]`.
        cp_mesh: one-dimensional `DeviceMesh` of ranks that each hold the whole model and split
            every sequence between them (context parallelism): each gathers keys and values, and
            gets the whole result. All must build the backend, and call it, at the same time and
            with the same arguments. None runs it here alone.

    Raises:
        InvalidRequest: bad `aux_layer_ids`, a target too shallow for the default, no decoder
            layers found, a model whose sequences cannot be split over `cp_mesh`, or 4-bit weights
            that an earlier forward has packed for this CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        aux_layer_ids: Sequence[int] | None = None,
        cp_mesh: DeviceMesh | None = None,
    ) -> None:
        num_layers = len(decoder_layers(model))
        self.aux_layer_ids = (
            default_aux_layer_ids(num_layers)
            if aux_layer_ids is None
            else validate_aux_layer_ids(aux_layer_ids, num_layers)
        )
        # Frozen, as the served one is: torch takes another matmul for weights that need gradients,
        # under no_grad too, which may round differently.
        compute_from_stored_weights(model)
        self.model = model.eval().requires_grad_(False)
        self._packing: Packing | None = None
        self._context: ContextParallel | None = None
        self._calls, self._is_out_of_step = 0, False
        if cp_mesh is not None and cp_mesh.size() > 1:
            device = self.get_input_embeddings().weight.device
            self._context = ContextParallel.of_mesh(cp_mesh, device)
            prove_split(model, self._context)
            self._packing = ONE_BY_ONE

    def get_input_embeddings(self) -> EmbeddingsLike:
        """Return the target's own input embedding module."""
        embeddings: EmbeddingsLike = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """Run the target on one batch; arguments and frame as `Eagle3TargetBackend` says.

        All tensors must be on the model's device; so are the results: `aux_hidden_states`
        [B, T, 3H] in model dtype, `logits` [B, T, V] shifted left. The first packed batch has the
        model tried for how it keeps documents apart, in a few tiny forwards.

        Raises:
            PackingUnsupported: packed rows, B > 1, and FlashAttention.
            RuntimeError: an earlier call failed in the middle, under `cp_mesh`.
            InvalidRequest: another rank of `cp_mesh` has another batch; the masks' shapes differ
                from [B, T], or see `check_packing`.
        """
        for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
            if mask.shape != input_ids.shape or input_ids.ndim != 2:
                raise InvalidRequest(
                    f"input_ids and {name} must both be [B, T]; got {list(input_ids.shape)} and "
                    f"{list(mask.shape)}"
                )
        check_packing(input_ids, attention_mask, position_ids, seq_lens, doc_remaining)
        if self._context is not None:
            if self._is_out_of_step:
                raise RuntimeError(
                    "an earlier call failed on this rank while others computed: the ranks of "
                    "cp_mesh are out of step; end them all, and start them again"
                )
            self._calls += 1
            self._context.check_same(self._calls, input_ids, attention_mask, loss_mask, seq_lens)
            self._is_out_of_step = True  # until it has ended here as on the others
        if seq_lens is None:
            result = forward_with_aux(
                self.model, input_ids, attention_mask, self.aux_layer_ids, context=self._context
            )
        else:
            if self._packing is None:
                self._packing = find_packing(self.model)
            result = forward_packed(
                self.model,
                self._packing,
                input_ids,
                seq_lens.long(),
                self.aux_layer_ids,
                context=self._context,
            )
        self._is_out_of_step = False
        return Eagle3TargetBatch(
            aux_hidden_states=result.aux_hidden_states,
            logits=shift_left_with_zero(result.logits),
            input_ids=shift_left_with_zero(input_ids),
            attention_mask=attention_mask,
            loss_mask=shift_left_with_zero(loss_mask),
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
