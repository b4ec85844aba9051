"""A short digest of a target's weights, so that a fleet or a resumed run notices another target."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from eagle3_schemas.tensors import byte_view, flat_bytes
from eagle3_server.placement import state_of
from eagle3_server.sharding import whole

_SAMPLE_BYTES = 64 * 1024


_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Config entries that differ between equal models: where it lay, and who saved it."""


def _config_text(model: nn.Module) -> str:
    to_dict = getattr(model.config, "to_dict", None)
    if to_dict is None:
        return ""

    def cleaned(value: object) -> object:
        if isinstance(value, dict):
            return {str(k): cleaned(v) for k, v in value.items() if k not in _NOT_THE_MODEL}
        return value

    return json.dumps(cleaned(to_dict()), sort_keys=True, default=str)


def target_fingerprint(**identity: str | int | None) -> str:
    """Digest everything that makes a target another one; 32 hex digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(b"eagle3-target-v1\0" + text.encode()).hexdigest()[:32]


def config_digest(model: nn.Module) -> str:
    """Digest a model's config, which decides as much as its weights do; 32 hex digits.

    Rotary base, norm epsilon, softcap: all but where the checkpoint lay and who saved it.
    """
    text = _config_text(model).encode()
    return hashlib.sha256(b"eagle3-config-v1\0" + text).hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Digest names, shapes, dtypes and 64 KiB of every tensor of a model's state.

    The bytes are taken at an offset fixed by the tensor's name and size, so that equal models agree
    wherever they lie, and reading an 8B costs a few megabytes of copies.

    Returns:
        32 hex digits.
    """
    digest = hashlib.sha256(b"eagle3-weights-v1\0")
    for name, tensor in state_of(model):
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        data = _bytes_of(whole(tensor.detach()))
        spare = max(data.numel() - _SAMPLE_BYTES, 0)
        # Spread by the name, so that the samples of 32 equal layers are not the same 32 rows.
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % (spare + 1)
        digest.update(byte_view(data[start : start + _SAMPLE_BYTES].to("cpu", copy=True)))
    return digest.hexdigest()[:32]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes [n] uint8; of one made of several (torchao's), all of theirs."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return flat_bytes(tensor)
    names, _ = tensor.__tensor_flatten__()
    parts = [_bytes_of(getattr(tensor, name)) for name in names]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
