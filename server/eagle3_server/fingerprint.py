"""A short digest of a target's weights, so that a fleet or a resumed run notices another target."""

from __future__ import annotations

import hashlib
import json

from torch import nn

from eagle3_schemas.tensors import byte_view, flat_bytes

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


def model_fingerprint(model: nn.Module) -> str:
    """Digest a model's config, and names, shapes, dtypes and 64 KiB of every tensor of its state.

    The config decides as much as the weights do: rotary base, norm epsilon, softcap. The bytes are
    taken at an offset fixed by the tensor's name and size, so that equal models agree wherever they
    lie, and reading an 8B costs a few megabytes of copies.

    Returns:
        32 hex digits.
    """
    digest = hashlib.sha256(b"eagle3-fingerprint-v1\0")
    digest.update(_config_text(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        data = flat_bytes(tensor.detach())
        spare = max(data.numel() - _SAMPLE_BYTES, 0)
        # Spread by the name, so that the samples of 32 equal layers are not the same 32 rows.
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % (spare + 1)
        digest.update(byte_view(data[start : start + _SAMPLE_BYTES].to("cpu", copy=True)))
    return digest.hexdigest()[:32]
