"""Which errors of a forward mean what, no memory left or a lost device, and what follows."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from eagle3_schemas.errors import NotReady, TargetOutOfMemory
from eagle3_server.engine import Target
from eagle3_server.group import GroupBroken

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# DefaultCPUAllocator raises a plain RuntimeError; so do CUDA's libraries and its driver.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|_ALLOC_FAILED|memory allocation")
# What a library does not support, or finds wrong in its arguments, leaves the device as it was.
_HARMLESS = re.compile(r"_STATUS_(NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM)")
_LOST = ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for lack of memory, which the next may have."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: every later call would fail too."""
    if isinstance(error, GroupBroken):
        return True
    if is_out_of_memory(error) or _HARMLESS.search(str(error)):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    return isinstance(error, accelerator_error) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    )


def attempt(
    work: Callable[[], Result],
    device: str,
    request_id: str,
    lost: Callable[[Exception], NotReady],
) -> Result:
    """Run work; once more, with all memory freed, if the device had none left.

    Args:
        work: to run on the calling thread.
        device: of the target.
        request_id: for the log.
        lost: told of an error after which the device is lost; returns what to raise then.

    Raises:
        TargetOutOfMemory: there is not enough for this request.
        NotReady: what `lost` returned.
    """
    for is_last in (False, True):
        try:
            return work()
        except Exception as exc:
            if is_fatal(exc):
                raise lost(exc) from exc
            if not is_out_of_memory(exc):
                raise
            logger.warning("request %s: out of memory: %s", request_id, str(exc)[:500])
        # Not inside `except`, whose traceback keeps the forward's tensors alive.
        free_memory(device)
        if is_last:
            break
    raise TargetOutOfMemory(
        "there is not enough memory for this request, with everything else freed. Send smaller "
        "batches, or lower max_tokens_per_request on the server to refuse them earlier"
    )


def free_memory(device: str) -> None:
    """Give back what is not in use, cycles included."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def allocated_bytes(target: Target) -> int:
    """Return what is allocated on a target's GPU; 0 on the CPU."""
    device = torch.device(target.describe().device)
    return 0 if device.type != "cuda" else torch.cuda.memory_allocated(device)
