"""A `Capture` as the arguments of other trainers' models: speculators 0.9, SpecForge 0.2.

Neither package is imported. B, T of the batch; H, V of the target; D the draft vocab; n captured
layers; x token ids and l the caller's loss mask, counted from 0 in each row or document.
"""

from __future__ import annotations

import torch

from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.capture import Capture
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.packing import restarting_positions
from eagle3_schemas.target_head import TargetHead


def speculators_inputs(capture: Capture) -> dict[str, torch.Tensor]:
    """Return what speculators' EAGLE-3 and P-EAGLE models take for a batch, as its collate does.

    A document is the attended tokens of a row, whichever side is padded, or of one of `seq_lens` in
    packed rows. One of m tokens gives m - 1 positions, those of speculators' `shift_batch`, and one
    of fewer than 2 gives none. All follow each other in one row of N positions, without padding. N
    is 0 if no document has 2 tokens: skip such a batch.

    Args:
        capture: with `aux` and `last_hidden_prenorm`. speculators names layer inputs: ask for
            `aux_layer_ids=[i - 1 for i in config.eagle_aux_hidden_state_layer_ids]`, in that order.

    Returns:
        Keyword arguments of `forward`, on the capture's device. Position i of a document has

        - `hidden_states` [1, N, nH]: aux of token i; dtype as captured
        - `input_ids` [1, N] int64: x[i + 1]
        - `verifier_last_hidden_states` [1, N, H]: state of token i + 1 before the final norm, which
          the model applies itself; dtype as captured
        - `loss_mask` [1, N] int64: l[i + 1] as 0 or 1
        - `position_ids` [1, N] int64: i + 1
        - `document_ids` [1, N] int64: the number of its document, in order

    Raises:
        InvalidRequest: one of the two outputs was not captured.
    """
    _check_captured(capture, "aux", "last_hidden_prenorm")
    attended = capture.attention_mask.ne(0)
    batch_size, length = attended.shape
    if capture.seq_lens is None:
        documents = torch.arange(batch_size, device=attended.device).repeat_interleave(length)
    else:
        is_start = restarting_positions(capture.seq_lens, length) == 0
        documents = is_start.flatten().long().cumsum(0) - 1
    tokens = attended.flatten().nonzero().squeeze(1)  # indices into [B * T]
    documents = documents[tokens]
    is_pair = documents[1:] == documents[:-1]
    first, second = tokens[:-1][is_pair], tokens[1:][is_pair]
    order = torch.arange(len(tokens), device=tokens.device)
    starts = torch.cat((order[:1], order[1:] * ~is_pair)).cummax(0).values
    rows = {
        "hidden_states": capture.aux.flatten(0, 1)[first],
        # Shifted: what belongs to a token stands one before it, in the same row.
        "input_ids": capture.input_ids.flatten()[second - 1].long(),
        "verifier_last_hidden_states": capture.last_hidden_prenorm.flatten(0, 1)[second],
        "loss_mask": capture.loss_mask.flatten()[second - 1].ne(0).long(),
        "position_ids": (order - starts)[1:][is_pair],
        "document_ids": documents[1:][is_pair],
    }
    return {name: tensor.unsqueeze(0) for name, tensor in rows.items()}


def speculators_weights(
    embeddings: torch.Tensor,
    target_head: TargetHead,
    t2d: torch.Tensor | None,
    *,
    rms_norm_eps: float,
) -> dict[str, torch.Tensor]:
    """Return the target's weights that speculators' EAGLE-3 and P-EAGLE drafts need.

    For a model built with `VerifierConfig(name_or_path=None, ...)`, which then reads no checkpoint:

        t2d, d2t, _ = to_t2d_d2t(selected_token_ids, info.vocab_size)
        draft.load_vocab_mappings(t2d, d2t)
        draft.load_state_dict(speculators_weights(...), strict=False)

    The draft's supervision is `verifier_lm_head(verifier_norm(state))`: Llama's RMS norm, then a
    linear without bias. A target that computes otherwise would silently train it wrong: refused.

    Args:
        embeddings: [V, H], `backend.get_input_embeddings().weight`.
        target_head: `backend.get_target_head()`.
        t2d: [V] bool, true for the ids in the draft vocab, or None if that is the whole vocab.
        rms_norm_eps: that of the draft's `transformer_layer_config`, which `verifier_norm` takes.

    Returns:
        Entries for `load_state_dict(..., strict=False)`, model dtype: `embed_tokens.weight` [V, H],
        `lm_head.weight` and `verifier_lm_head.weight` [D, H], `verifier_norm.weight` [H].

    Raises:
        InvalidRequest: the target's head or norm is another, its eps too, or `t2d` is no such mask.
    """
    if not isinstance(embeddings, torch.Tensor):
        raise InvalidRequest(
            f"embeddings must be a tensor; got {type(embeddings).__name__}. Pass "
            "get_input_embeddings().weight"
        )
    weight, norm, got = target_head.weight, target_head.norm, ""
    if target_head.bias is not None:
        got = "a head with a bias"
    elif not target_head.transform.is_upcast_only:
        got = f"{target_head.transform}"
    elif norm is None:
        got = "a final norm of no form known here"
    elif norm.form.kind != "rms" or norm.form.gain_in_float32 or norm.bias is not None:
        got = f"{norm.form}" + (" with a bias" if norm.bias is not None else "")
    if got or norm is None:
        raise InvalidRequest(
            "speculators' drafts compute their supervision themselves: expected a target with a "
            "head without bias, its output as logits, and an RMS norm without bias whose gain "
            f"follows the cast; got {got}. Train this target's draft on generate_batch's "
            "target_probs instead"
        )
    if norm.form.eps != rms_norm_eps:
        raise InvalidRequest(
            f"the draft's verifier_norm must compute with the target's eps, {norm.form.eps}; got "
            f"rms_norm_eps={rms_norm_eps}. Set it in the draft's transformer_layer_config"
        )
    if t2d is not None and (t2d.dtype is not torch.bool or t2d.shape != weight.shape[:1]):
        raise InvalidRequest(
            f"t2d must be [{len(weight)}] bool, the target's V; got {list(t2d.shape)} {t2d.dtype}. "
            "eagle3_client.to_t2d_d2t makes it"
        )
    head = weight if t2d is None else weight[t2d.to(weight.device)]
    gain = weight.new_ones(weight.shape[1]) if norm.weight is None else norm.weight
    return {
        "embed_tokens.weight": embeddings,
        "lm_head.weight": head,
        "verifier_lm_head.weight": head,
        "verifier_norm.weight": gain,
    }


def specforge_inputs(
    capture: Capture, target_head: TargetHead, loss_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what SpecForge's `OnlineEagle3Model` takes for a padded batch.

    SpecForge 0.2 shifts ids and target but not its loss mask (`TargetHead.preprocess`,
    `modeling/target/target_head.py`): position t, which learns what follows x[t + 1], counts if
    l[t] does; in this package's EAGLE-3 batches, if l[t + 1] does. A capture's shifted mask has
    lost l[0], so the mask is passed once more. As in SpecForge's own normaliser
    (`algorithms/eagle3/data.py`), a row's last token is not supervised.

    Without a bias or a transform, its compact teacher spares the [B, T, V] of `target`: pass
    `target_hidden_for_compact=shift_left_with_zero(capture.last_hidden)` and `target_head_weight`.

    Args:
        capture: with `aux` and `last_hidden`, of rows that are not packed. SpecForge names layer
            outputs, as this package does.
        target_head: `backend.get_target_head()`; its bias and transform are applied.
        loss_mask: [B, T], unshifted, the one the batch was captured with.

    Returns:
        Keyword arguments of `forward`, on the capture's device:

        - `hidden_states` [B, T, nH]: aux of token t; dtype as captured
        - `input_ids` [B, T] integer: x[t + 1]
        - `target` [B, T, V]: `target_head.logits` of token t + 1, of zeros in the last column
        - `loss_mask` [B, T, 1] int64: 1 where l[t] is true and t, t + 1 are both attended
        - `attention_mask` [B, T] int64: 0 or 1

    Raises:
        InvalidRequest: an output was not captured, packed rows, or another mask.
    """
    _check_captured(capture, "aux", "last_hidden")
    if capture.seq_lens is not None:
        raise InvalidRequest(
            "SpecForge's model attends over whole rows: expected a padded batch; got packed rows. "
            "Send each document as a row of its own, without seq_lens"
        )
    mask = loss_mask.to(capture.loss_mask.device).ne(0)
    captured = capture.loss_mask.ne(0)
    if mask.shape != captured.shape or not torch.equal(shift_left_with_zero(mask), captured):
        raise InvalidRequest(
            f"loss_mask must be the unshifted mask {list(captured.shape)} that the batch was "
            f"captured with; got another one, {list(mask.shape)}. Pass the batch's own, not the "
            "capture's, which is shifted"
        )
    attended = capture.attention_mask.ne(0)
    supervised = mask & attended & shift_left_with_zero(attended)
    return {
        "hidden_states": capture.aux,
        "input_ids": capture.input_ids,
        "target": target_head.logits(shift_left_with_zero(capture.last_hidden)),
        "loss_mask": supervised.long().unsqueeze(-1),
        "attention_mask": attended.long(),
    }


def _check_captured(capture: Capture, *names: str) -> None:
    if missing := [name for name in names if name not in capture.outputs]:
        raise InvalidRequest(
            f"expected a capture with {list(names)}; got {list(capture.outputs)}. Ask for "
            f"{missing} as well: outputs={(*capture.outputs, *missing)}"
        )
