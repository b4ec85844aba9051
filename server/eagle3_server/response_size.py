"""How many bytes an answer takes, told before anything is allocated for it."""

from __future__ import annotations

from eagle3_schemas import DraftVocab
from eagle3_schemas.tensors import DTYPES
from eagle3_server.engine import CaptureJob, SupervisionJob, TargetDescription


def supervision_bytes(job: SupervisionJob, target: TargetDescription) -> int:
    """Return an upper bound: every row asked for is taken to be trained on."""
    itemsize = DTYPES[target.dtype].itemsize
    width = len(job.aux_layer_ids) * target.hidden_size
    aux = int(job.attention_mask.sum()) * width * itemsize
    rows = job.input_ids.numel() if job.rows == "all" else int(job.loss_mask.sum())
    draft_vocab_size = job.draft_vocab.draft_vocab_size
    # Logits may come in float32 whatever the model's dtype is.
    row = target.hidden_size * itemsize if job.encoding == "hidden" else draft_vocab_size * 4
    return aux + rows * row + job.input_ids.numel()


def capture_bytes(job: CaptureJob, target: TargetDescription) -> int:
    """Return an upper bound; hidden states may come in float32 whatever the model's dtype is."""
    states = sum(name in job.outputs for name in ("last_hidden", "last_hidden_prenorm"))
    width = (len(job.aux_layer_ids) + states) * target.hidden_size
    row = 12  # argmax and two logsumexps
    if job.draft_vocab is not None:
        drafts = sum(name in job.outputs for name in ("loss_mask_probs", "loss_mask_logits"))
        row += drafts * job.draft_vocab.draft_vocab_size * 4
    rows = int(job.loss_mask.sum())
    return int(job.attention_mask.sum()) * width * 4 + rows * row + job.input_ids.numel()


def target_head_bytes(target: TargetDescription) -> int:
    """Return the size of the whole head, its bias and the final norm included."""
    rows = (target.vocab_size + 2) * target.hidden_size + target.vocab_size
    return rows * DTYPES[target.dtype].itemsize


def embeddings_bytes(target: TargetDescription) -> int:
    """Return the size of the input embeddings."""
    return target.input_vocab_size * target.hidden_size * DTYPES[target.dtype].itemsize


def head_bytes(draft_vocab: DraftVocab, target: TargetDescription) -> int:
    """Return the size of a draft head, its bias included."""
    width = target.hidden_size + 1
    return draft_vocab.draft_vocab_size * width * DTYPES[target.dtype].itemsize
