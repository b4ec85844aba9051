"""Model id -> a frozen target on its device."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from eagle3_schemas import tokenizer_digest
from eagle3_schemas.errors import InvalidRequest
from eagle3_server.config import ServerSettings
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.group import Group, GroupBroken
from eagle3_server.placement import DeviceMap, only_cpu, parse_device_map
from eagle3_server.quantization import (
    NOT_SHARDED,
    check_checkpoint,
    check_share,
    quantization_config,
)
from eagle3_server.sharding import is_sharded
from eagle3_server.transformers_target import TransformersTarget

logger = logging.getLogger(__name__)


def load_target(settings: ServerSettings, group: Group | None = None) -> TransformersTarget:
    """Load the model the settings name: a hub id, a checkpoint's directory, or a .gguf file.

    A multimodal checkpoint whose family has no text-only class is loaded whole and served on text.

    Args:
        settings: what to load.
        group: processes to shard it over, or with `settings.cp` its sequences, which all call
            this; None runs it here alone.

    Raises:
        InvalidRequest: no model was named, it cannot be loaded, or the checkpoint lacks weights;
            the message says why.
    """
    if settings.model is None:
        raise InvalidRequest("no model was named; give a hub id, a directory, or a .gguf file")
    device_map = _device_map(settings, group)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device == "auto"
        else settings.device
    )
    if group is not None:
        device = group.device
    is_cpu = device.type != "cuda" if device_map is None else only_cpu(device_map)
    dtype = (
        (torch.float32 if is_cpu else torch.bfloat16)
        if settings.dtype == "auto"
        else getattr(torch, settings.dtype)
    )
    source = settings.model
    if source.startswith(("/", "./", "../", "~")) and not Path(source).exists():
        raise InvalidRequest(f"no such file or directory: {source}")
    auto_class: Any = None  # of transformers, whose types say nothing of the loading report
    extra: dict[str, Any] = {}
    if settings.model.endswith(".gguf"):
        path = Path(settings.model)
        if not path.is_file():
            raise InvalidRequest(f"no such file: {path}")
        source, extra["gguf_file"] = str(path.parent), path.name
        auto_class = transformers.AutoModelForCausalLM
    shards = None if settings.cp > 1 else group
    if shards is not None:
        if "gguf_file" in extra:
            raise InvalidRequest("a .gguf file cannot be sharded; serve it without --tp")
        if settings.quantization is not None:
            raise InvalidRequest(NOT_SHARDED)
        extra["distributed_config"] = DistributedConfig(tp_size=shards.size, tp_plan="auto")
    if settings.quantization is not None:
        if "gguf_file" in extra:
            raise InvalidRequest(
                "a .gguf file is quantised already, and transformers expands it to --dtype; serve "
                f"it without --quantization {settings.quantization}, or quantise the checkpoint "
                "that it was made of"
            )
        extra["quantization_config"] = quantization_config(settings.quantization, dtype)
    if settings.attn_implementation is not None:
        extra["attn_implementation"] = settings.attn_implementation
    try:
        where: dict[str, Any] = {
            "revision": settings.revision or "main",
            "trust_remote_code": settings.trust_remote_code,
        }
        is_quantized = settings.quantization is not None
        if auto_class is None:
            config = transformers.AutoConfig.from_pretrained(source, **where)
            auto_class = _auto_class(config)
            is_quantized |= check_checkpoint(config, settings.quantization)
        if is_quantized and shards is not None:
            raise InvalidRequest(NOT_SHARDED)
        if device_map is None and is_quantized and shards is None:
            device_map = {"": str(device)}  # such weights are put in place as they are read
        if device_map is not None:
            extra["device_map"] = device_map
        model, report = auto_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **where, **extra
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as exc:
        # A wrong id, no network, an architecture transformers lacks, a missing optional package,
        # weights of another shape: transformers tells them apart only in words, so pass them on.
        raise InvalidRequest(f"cannot load {settings.model!r}: {exc}{_hint(source)}") from exc
    if report["missing_keys"]:
        # transformers makes random weights of these, and only warns.
        missing = sorted(report["missing_keys"])
        raise InvalidRequest(
            f"cannot load {settings.model!r}: the checkpoint lacks {len(missing)} of the weights "
            f"of {type(model).__name__}, such as {', '.join(missing[:3])}"
        )
    if shards is not None:
        _report_shards(model, shards)
    if settings.quantization is not None:
        check_share(model, settings.quantization)
    described: dict[str, Any] = {
        # A directory's name, not its path: paths of the server's disk are nobody's business.
        "model_id": settings.model_name
        or (Path(settings.model).name if Path(settings.model).exists() else settings.model),
        "revision": settings.revision,
        "tokenizer_digest": _tokenizer_digest(settings),
        "aux_layer_ids": settings.aux_layer_ids,
        "head_chunk_bytes": settings.head_chunk_bytes,
        "context": None
        if group is None or shards is not None
        else ContextParallel(None, group.rank, group.size, device),
    }
    if device_map is None:
        model.to(device)
    try:
        return TransformersTarget(model, **described)
    except (RuntimeError, TypeError) as exc:
        # Of a sharded forward: torch has not the operation for DTensors, or the shapes do not meet.
        if shards is None or isinstance(exc, GroupBroken):
            raise
        raise InvalidRequest(
            f"{type(model).__name__} does not run under transformers' plan for it ({exc!s:.300}). "
            "Try a --tp that divides its heads, or serve it without"
        ) from exc


def _device_map(settings: ServerSettings, group: Group | None) -> DeviceMap | None:
    """Return what the settings say of several devices; refuse what cannot go with it."""
    if settings.device_map is None:
        return None
    if group is not None or settings.ranks > 1:
        raise InvalidRequest(
            f"{settings.ranks_flag} runs a target in several processes, and --device-map lays its "
            "layers on the devices of one: give one of them"
        )
    if settings.device != "auto":
        raise InvalidRequest(
            f"--device {settings.device} is for a target on one device; drop it, or say in "
            "--device-map where each part lies"
        )
    return parse_device_map(settings.device_map)


def _report_shards(model: Any, group: Group) -> None:
    """Say how much of the model is here; warn if most of it is on every rank."""
    whole, here = 0, 0
    for parameter in model.parameters():
        whole += parameter.numel() * parameter.element_size()
        here += (parameter.to_local() if is_sharded(parameter) else parameter).nbytes
    share = here / max(whole, 1)
    logger.info(
        "rank %d holds %.0f %% of the weights' %.1f GB", group.rank, 100 * share, whole / 1e9
    )
    if share > (1 + 1 / group.size) / 2:
        logger.warning(
            "transformers' plan for %s shards little of it: %d devices hold hardly more than one",
            type(model).__name__,
            group.size,
        )


def load_tokenizer(settings: ServerSettings) -> Any:
    """Load the tokenizer of the model that the settings name.

    Raises:
        Exception: there is none, in transformers' words: missing files, an unknown class, a
            missing package.
    """
    source = settings.model or ""
    where: dict[str, Any] = {
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
    }
    if source.endswith(".gguf"):
        source, where["gguf_file"] = str(Path(source).parent), Path(source).name
    return transformers.AutoTokenizer.from_pretrained(source, **where)


def _tokenizer_digest(settings: ServerSettings) -> str | None:
    """Digest the checkpoint's tokenizer, if it has one; the target itself needs none."""
    try:
        return tokenizer_digest(load_tokenizer(settings))
    except Exception as exc:  # no such files, an unknown class, a missing package: all in words
        reason = " ".join(str(exc).split())
        logger.info("no tokenizer found, so trainers cannot compare theirs: %.200s", reason)
        return None


def _auto_class(config: object) -> Any:
    """Return the auto class that loads this config's checkpoints with a language-model head.

    The text-only one where a family has it; vision-language families often have the other alone.
    """
    if (
        type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM  # of a config in neither, it says what it knows


def _hint(source: str) -> str:
    """Return what transformers' words for a failed load do not say: hub, permissions, /tmp."""
    path = Path(source)
    if not path.exists():
        return f". No folder {source!r} is here, so the hub was asked for it"
    closed = [str(each) for each in [path, *path.glob("*")] if not os.access(each, os.R_OK)]
    if closed:
        return (
            f". User {os.getuid()} may not read {closed[0]}; let all read it: "
            f"chmod -R a+rX {source}"
        )
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return ". No folder for temporary files can be written to: in a container add --tmpfs /tmp"
    return ""
