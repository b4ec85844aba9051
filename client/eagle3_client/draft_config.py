"""`draft_config`: what a draft checkpoint must name, so that it is served as it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eagle3_schemas import AUX_LAYER_CONVENTION, DraftVocab, ModelInfo, to_layer_inputs
from eagle3_schemas.errors import InvalidRequest, ProtocolMismatch


def draft_config(
    info: ModelInfo, aux_layer_ids: Sequence[int] | None, draft_vocab: DraftVocab
) -> dict[str, Any]:
    """Return the fields of `RemoteEagle3Backend.draft_config`, which documents them.

    Args:
        info: of the target.
        aux_layer_ids: the trainer's (layer outputs), or None for the server's default.
        draft_vocab: the trainer's.

    Raises:
        InvalidRequest: `aux_layer_ids` are not layers of the target, or there are none.
        ProtocolMismatch: the server names layers otherwise than this side.
    """
    if info.aux_layer_convention != AUX_LAYER_CONVENTION:
        raise ProtocolMismatch(
            f"expected aux_layer_ids that name a {AUX_LAYER_CONVENTION}; the server's name a "
            f"{info.aux_layer_convention}. Upgrade the older side"
        )
    ids = info.aux_layer_ids if aux_layer_ids is None else aux_layer_ids
    if ids is None:
        raise InvalidRequest(
            f"the target's {info.num_hidden_layers} decoder layers are too few for the default "
            "aux_layer_ids; pass aux_layer_ids to the backend"
        )
    return {
        "eagle_aux_hidden_state_layer_ids": list(to_layer_inputs(ids, info.num_hidden_layers)),
        "draft_vocab_size": draft_vocab.draft_vocab_size,
        "draft_vocab_digest": draft_vocab.digest,
        "target_hidden_size": info.hidden_size,
        "target_model_id": info.model_id,
        "target_revision": info.revision,
        "target_fingerprint": info.fingerprint,
    }


class ExpectedDraft(NamedTuple):
    """What a saved `draft_config` asks of the run that goes on with its draft."""

    fingerprint: str
    aux_layer_ids: tuple[int, ...]
    """Layer outputs; the config names layer inputs, ours + 1."""
    vocab_digest: str

    @classmethod
    def of(cls, config: object) -> ExpectedDraft:
        """Read what `draft_config` returned.

        Raises:
            InvalidRequest: it is not that; the message says what it lacks.
        """
        if not isinstance(config, Mapping):
            raise InvalidRequest(
                "expect_draft_config must be what draft_config() returned; got "
                f"{type(config).__name__}"
            )
        ids = config.get("eagle_aux_hidden_state_layer_ids")
        are_ids = isinstance(ids, list | tuple) and all(type(i) is int and i >= 1 for i in ids)
        fingerprint, digest = config.get("target_fingerprint"), config.get("draft_vocab_digest")
        bad = {
            "target_fingerprint": not isinstance(fingerprint, str),
            "eagle_aux_hidden_state_layer_ids": not (ids and are_ids),
            "draft_vocab_digest": not isinstance(digest, str),
        }
        if any(bad.values()):
            names = ", ".join(name for name, is_bad in bad.items() if is_bad)
            raise InvalidRequest(
                f"expect_draft_config has no usable {names}; pass what draft_config() returned "
                "when the run began"
            )
        return cls(str(fingerprint), tuple(i - 1 for i in ids or ()), str(digest))

    def check_vocab(self, vocab: DraftVocab) -> None:
        """Raise InvalidRequest if a draft vocab is not the one that the draft was trained with."""
        if vocab.digest != self.vocab_digest:
            raise InvalidRequest(
                f"expected the draft vocab {self.vocab_digest[:12]}… of expect_draft_config; got "
                f"{vocab.digest[:12]}…: the draft's rows would mean other tokens. Save "
                "selected_token_ids with the draft and load them again, instead of counting again"
            )
