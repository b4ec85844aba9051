"""Which errors of a forward mean what: no memory left, or a device that is lost."""

from __future__ import annotations

import gc

import torch

_LOST = ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")
_CPU_OUT_OF_MEMORY = "can't allocate memory"  # DefaultCPUAllocator raises a plain RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for lack of memory, which the next may have."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
    )


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: every later call would fail too."""
    if is_out_of_memory(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    return isinstance(error, accelerator_error) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    )


def free_memory(device: str) -> None:
    """Give back what is not in use, cycles included."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
