"""Model id -> a frozen target on its device."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.config import ServerSettings
from eagle3_server.transformers_target import TransformersTarget


def load_target(settings: ServerSettings) -> TransformersTarget:
    """Load the model the settings name: a hub id, a checkpoint's directory, or a .gguf file.

    Raises:
        InvalidRequest: no model was named, or it cannot be loaded; the message says why.
    """
    if settings.model is None:
        raise InvalidRequest("no model was named; give a hub id, a directory, or a .gguf file")
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device == "auto"
        else settings.device
    )
    dtype = (
        (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if settings.dtype == "auto"
        else getattr(torch, settings.dtype)
    )
    source, extra = settings.model, {}
    if settings.model.endswith(".gguf"):
        path = Path(settings.model)
        if not path.is_file():
            raise InvalidRequest(f"no such file: {path}")
        source, extra = str(path.parent), {"gguf_file": path.name}
    if settings.attn_implementation is not None:
        extra["attn_implementation"] = settings.attn_implementation
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            revision=settings.revision or "main",
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            **extra,
        )
    except (OSError, ValueError, ImportError, KeyError) as exc:
        # A wrong id, no network, an architecture transformers lacks, a missing optional package:
        # transformers tells them apart only in words, so pass its words on.
        raise InvalidRequest(f"cannot load {settings.model!r}: {exc}") from exc
    return TransformersTarget(
        model.to(device),  # type: ignore[arg-type]  # transformers wraps torch's `to` untyped
        # A directory's name, not its path: paths of the server's disk are nobody's business.
        model_id=Path(settings.model).name if Path(settings.model).exists() else settings.model,
        revision=settings.revision,
        aux_layer_ids=settings.aux_layer_ids,
        head_chunk_bytes=settings.head_chunk_bytes,
    )
