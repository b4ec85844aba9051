"""`warm_up`: the largest request the limits admit, run twice before the server is ready."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_server.device_errors import free_memory, is_fatal, is_out_of_memory
from eagle3_server.engine import SupervisionJob, Target, TargetDescription

_DRAFT_VOCAB_SIZE = 32_768
_SHORT = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up found.

    Attributes:
        max_tokens_per_request: the limit, or the largest half of it that the device has room for.
        deterministic: whether both runs gave the same bits; None if no run gave any.
    """

    max_tokens_per_request: int
    deterministic: bool | None


def warm_up(target: Target, max_tokens_per_request: int) -> WarmUp:
    """Run one request of the largest shape twice, and lower the limit until it fits.

    All positions are supervised, the sequences as long as they may be, with a draft vocab of
    32,768 ids; larger ones, and what `exact` computes besides, may still find no memory later. A
    short exact request is run twice too. Kernels are so chosen, and the allocator's blocks are
    there, before the first trainer waits for them. On the CPU, where a lack of memory ends the
    process instead of raising, 64 tokens are run and the limit is kept.

    Args:
        target: just loaded; called from the thread that owns it.
        max_tokens_per_request: the limit set.

    Raises:
        InvalidRequest: not even one token fits.
        Exception: the device failed for good, or the forward is at fault: what it raised.
    """
    description = target.describe()
    is_cpu = torch.device(description.device).type == "cpu"
    most = min(max_tokens_per_request, _SHORT) if is_cpu else max_tokens_per_request
    tokens = most
    while True:
        job = _largest_job(description, tokens)
        try:
            exact = _largest_job(description, min(tokens, _SHORT), exact=True)
            deterministic = _repeats(target, job) and _repeats(target, exact)
            break
        except TargetFailed as exc:
            # Random ids may overflow where text does not; every request is checked anyway.
            logger.warning("the warm-up of random token ids failed: %s", exc)
            deterministic = None
            break
        except Exception as exc:
            if is_fatal(exc) or not is_out_of_memory(exc):
                raise
            cause = str(exc)[:300]
        # Not inside `except`, whose traceback keeps the forward's tensors alive.
        free_memory(description.device)
        shape = "x".join(map(str, job.input_ids.shape))
        if tokens == 1:
            raise InvalidRequest(
                f"{description.device} has no memory for a single token beside the weights: "
                f"{cause}. Serve a smaller model, a narrower --dtype, or on a larger device"
            )
        tokens //= 2
        logger.warning(
            "a request of %s tokens does not fit on %s: max_tokens_per_request is lowered to %d. "
            "Set EAGLE3_MAX_TOKENS_PER_REQUEST to what trainers send, or free memory (%s)",
            shape, description.device, tokens, cause,
        )  # fmt: skip
    if deterministic is False:
        logger.warning(
            "two runs of one batch differ in their bits on %s: `exact` is refused",
            description.device_name,
        )
    return WarmUp(max_tokens_per_request if tokens == most else tokens, deterministic)


def _largest_job(
    description: TargetDescription, tokens: int, *, exact: bool = False
) -> SupervisionJob:
    """Return a job of at most so many tokens, in sequences as long as the target takes."""
    columns = min(tokens, description.max_sequence_length or tokens)
    shape = (tokens // columns, columns)
    generator = torch.Generator().manual_seed(0)
    bound = min(description.vocab_size, description.input_vocab_size)
    # Any three: a target too shallow for the default rule has fewer layers, and repeats some.
    layers = description.aux_layer_ids or tuple(
        min(i, description.num_hidden_layers - 1) for i in range(3)
    )
    size = min(_DRAFT_VOCAB_SIZE, description.vocab_size)
    return SupervisionJob(
        input_ids=torch.randint(bound, shape, generator=generator),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        loss_mask=torch.ones(shape, dtype=torch.bool),
        aux_layer_ids=layers,
        draft_vocab=DraftVocab.from_ids(torch.arange(size)),
        encoding="probs",
        rows="loss_mask",
        aux_dtype="model",
        exact=exact,
    )


def _repeats(target: Target, job: SupervisionJob) -> bool:
    """Whether two runs of a job give the same bits."""
    first, second = (target.supervise(job).tensors for _ in range(2))
    return all(
        torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )
