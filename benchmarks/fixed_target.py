"""A target that answers at once with tensors made before: what is left is the service and the wire.

Letters: B batch, T sequence, H hidden size, D draft vocab.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3_schemas import DraftVocab, shift_left_with_zero
from eagle3_schemas.aux_states import encode_aux
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tokens import TokenBatch
from eagle3_server.engine import DeviceTensors, SupervisionJob, TargetDescription


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a target; the defaults are those of an 8B Llama."""

    hidden_size: int = 4096
    layers: int = 32
    vocab_size: int = 128256
    draft_vocab_size: int = 32000


EIGHT_B = Dimensions()


class FixedTarget:
    """A bf16 target of the engine's Protocol whose forward is a wait.

    Every supervised position counts as in the draft vocab. Results are random, made at a job's
    first coming and kept for its like; they leave by the way of any other result, through the copy
    stage with its checksums.

    Args:
        dimensions: sizes it claims to have.
        forward_s: seconds a forward takes, with the GIL released as a GPU's would be.
    """

    def __init__(self, dimensions: Dimensions = EIGHT_B, forward_s: float = 0.0) -> None:
        self._dimensions = dimensions
        self._forward_s = forward_s
        self._results: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def describe(self) -> TargetDescription:
        """Return what is served."""
        sizes = self._dimensions
        return TargetDescription(
            model_id="fixed",
            revision=None,
            architecture="Fixed",
            fingerprint="0" * 16,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden_size,
            vocab_size=sizes.vocab_size,
            input_vocab_size=sizes.vocab_size,
            max_sequence_length=None,
            dtype="bfloat16",
            device="cpu",
            device_name="none",
            attn_implementation=None,
            aux_layer_ids=(1, sizes.layers // 2 - 1, sizes.layers - 4),
            num_threads=torch.get_num_threads(),
            head="rows",
            head_reason=None,
            encodings=("probs", "logits", "hidden"),
            transform=LogitsTransform(),
        )

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """Wait, then answer."""
        masks = (job.attention_mask.numpy().tobytes(), job.loss_mask.numpy().tobytes())
        draft_vocab_size = job.draft_vocab.draft_vocab_size
        key = (*masks, *job.input_ids.shape, draft_vocab_size, job.encoding, job.aux_dtype)
        if key not in self._results:
            self._results[key] = supervision(
                TokenBatch(job.input_ids, job.attention_mask, job.loss_mask),
                self._dimensions.hidden_size,
                draft_vocab_size,
                job.encoding,
                job.aux_dtype,
            )
        time.sleep(self._forward_s)
        return DeviceTensors(self._results[key])

    def input_embeddings(self) -> DeviceTensors:
        """Return zeros."""
        sizes = self._dimensions
        weight = torch.zeros(sizes.vocab_size, sizes.hidden_size, dtype=torch.bfloat16)
        return DeviceTensors({"weight": weight}, is_constant=True)

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """Return zeros."""
        rows = draft_vocab.draft_vocab_size
        weight = torch.zeros(rows, self._dimensions.hidden_size, dtype=torch.bfloat16)
        return DeviceTensors({"weight": weight}, is_constant=True)


def supervision(
    batch: TokenBatch, hidden_size: int, draft_vocab_size: int, encoding: str, aux_dtype: str
) -> dict[str, Tensor]:
    """Return a bf16 target's supervision response of random numbers, as it is before the frame.

    Every supervised position counts as in the draft vocab.
    """
    position_mask = shift_left_with_zero(batch.loss_mask)
    rows, attended = int(position_mask.sum()), int(batch.attention_mask.sum())
    codec = ENCODINGS[encoding]
    columns = hidden_size if codec.needs_draft_head else draft_vocab_size
    dtype = torch.float32 if encoding == "probs" else torch.bfloat16
    return {
        **encode_aux(_random(attended, 3 * hidden_size, torch.bfloat16), aux_dtype),
        "position_mask": pack_bits(position_mask),
        codec.tensor_name: _random(rows, columns, dtype),
    }


def token_batch(tokens: int, supervised: float, dimensions: Dimensions = EIGHT_B) -> TokenBatch:
    """Return four rows of random ids, all attended, of each the last part supervised."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (4, tokens // 4)
    input_ids = torch.randint(dimensions.vocab_size, shape, generator=generator)
    columns = torch.arange(shape[1]).expand(shape)
    loss_mask = columns >= round((1 - supervised) * shape[1])
    return TokenBatch(input_ids, torch.ones(shape, dtype=torch.bool), loss_mask)


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float32).to(dtype)
