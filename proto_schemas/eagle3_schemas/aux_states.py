"""How aux hidden states travel: as they are, or (opt-in, lossy) as fp8 in groups of 64."""

from __future__ import annotations

from typing import Final

import torch

GROUP: Final = 64
_FP8: Final = torch.float8_e4m3fn
_FP8_MAX: Final = 448.0


def encode_aux(aux: torch.Tensor, aux_dtype: str) -> dict[str, torch.Tensor]:
    """Rows [N, C] in model dtype -> tensors for the wire, on the same device.

    Args:
        aux: aux hidden states of the attended positions.
        aux_dtype: `model` sends them as they are; `float8_e4m3` sends C bytes a row and a float32
            scale per group of 64 (the last one may be shorter): the group's largest magnitude
            becomes 448, the largest fp8 number. It halves a bf16 response's largest part.
    """
    if aux_dtype == "model":
        return {"aux_hidden_states": aux}
    groups = _grouped(aux.float())
    scales = groups.abs().amax(-1) / _FP8_MAX
    # A group of zeros has scale 0; it divides by 1 and stays zero.
    # A scale too small for a normal float32 is rounded, to two thirds at worst: what is too large
    # then is cut, where a cast may make it NaN (torch 2.6).
    quotients = groups / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    codes = quotients.clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8)
    codes = codes.flatten(1)[:, : aux.shape[1]]
    return {"aux_codes": codes.contiguous(), "aux_scales": scales}


def decode_aux(
    tensors: dict[str, torch.Tensor], aux_dtype: str, dtype: torch.dtype
) -> torch.Tensor:
    """Invert `encode_aux`: rows [N, C] in `dtype`, on the tensors' device."""
    if aux_dtype == "model":
        return tensors["aux_hidden_states"]
    codes, scales = tensors["aux_codes"], tensors["aux_scales"]
    groups = _grouped(codes.float()) * scales.unsqueeze(-1)
    return groups.flatten(1)[:, : codes.shape[1]].to(dtype)


def aux_shapes(
    count: int, width: int, aux_dtype: str, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Return name -> (shape, dtype) of the tensors that `encode_aux` makes of [count, width]."""
    if aux_dtype == "model":
        return {"aux_hidden_states": ((count, width), dtype)}
    return {
        "aux_codes": ((count, width), _FP8),
        "aux_scales": ((count, -(-width // GROUP)), torch.float32),
    }


def _grouped(rows: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [N, ceil(C / 64), 64], zero-padded."""
    missing = -rows.shape[1] % GROUP
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.view(rows.shape[0], rows.shape[1] // GROUP, GROUP)
