"""Targets whose weights are quantised: at load, by `--quantization`, or in the checkpoint."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
import transformers
from torch import nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.config import Quantization
from eagle3_server.forward import forward_with_aux
from eagle3_server.head import probe_batch
from eagle3_server.layout import decoder_layers, positions_depend_on_length

_PACKAGES: Final = {  # transformers' names of methods -> package to import, extra to install
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}
PACKAGE_OF: Final[dict[Quantization, str]] = {
    "bnb-nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "torchao-int8": "torchao",
}
"""What each quantisation at load needs."""

NOT_SHARDED: Final = (
    "quantised weights cannot be sharded, be it by --quantization or in the checkpoint; serve them "
    "without --tp, or lay the layers on several devices (--device-map)"
)

logger = logging.getLogger(__name__)

_SAME = {torch.float32: 1e-4}  # largest relative difference that is rounding
_SAME_HALF = 2e-2


def quantization_config(name: Quantization, dtype: torch.dtype) -> Any:
    """Return transformers' config of a quantisation at load; embeddings and head stay as they are.

    Args:
        name: as the setting has it.
        dtype: of everything else; 4-bit weights are expanded to it for each matmul.

    Raises:
        InvalidRequest: its package is not installed.
    """
    need_package(PACKAGE_OF[name])
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    config: Any = transformers.BitsAndBytesConfig
    if name == "bnb-int8":
        return config(load_in_8bit=True)
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def need_package(method: str) -> None:
    """Raise InvalidRequest if a method's package is missing."""
    package, extra = _PACKAGES.get(method, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise InvalidRequest(
            f"{method} is not installed. Install it with\n"
            f'  pip install "eagle3-remote[server,{extra}]"\nor, from a clone\n'
            f'  pip install ".[server,{extra}]"'
        )


def check_checkpoint(config: object, wanted: Quantization | None) -> bool:
    """Return whether a checkpoint is quantised already.

    Raises:
        InvalidRequest: it is, and is to be quantised besides; or its package is not installed.
    """
    own = _as_dict(getattr(config, "quantization_config", None))
    if not own:
        return False
    if wanted is not None:
        raise InvalidRequest(
            f"the checkpoint is quantised already ({_in_words(own)}); serve it without "
            f"--quantization {wanted}"
        )
    need_package(_method(own))
    return True


def quantization_of(model: nn.Module) -> str | None:
    """Return how a model's weights are quantised, in words, or None."""
    own = _as_dict(getattr(model.config, "quantization_config", None))
    return _in_words(own) if own else None


def quantised_share(model: nn.Module) -> float:
    """Return how much of the decoder layers' weights is quantised, 0 to 1.

    Packages reach linear layers; experts that transformers keeps in one tensor, and linear layers
    of a class of their own (Falcon), they leave as they are, without a word.
    """
    quantised, plain = 0, 0
    for parameter in (p for layer in decoder_layers(model) for p in layer.parameters()):
        if parameter.dtype is torch.uint8:  # two to a byte
            quantised += 2 * parameter.numel()
        elif parameter.dtype is torch.int8 or hasattr(parameter.data, "__tensor_flatten__"):
            quantised += parameter.numel()
        else:
            plain += parameter.numel()
    return quantised / max(quantised + plain, 1)


def check_share(model: nn.Module, name: Quantization) -> None:
    """Warn if a quantisation at load left most of the weights as they were.

    Raises:
        InvalidRequest: it left all of them.
    """
    share, kind = quantised_share(model), type(model).__name__
    if share == 0:
        raise InvalidRequest(
            f"--quantization {name} reaches none of {kind}'s layers, which have linear modules of "
            "their own or none; serve it without"
        )
    logger.info("%s: %.0f %% of the layers' weights are quantised", name, 100 * share)
    if share < 0.5:
        logger.warning(
            "--quantization %s reaches %.0f %% of %s's layers alone: the rest, such as experts in "
            "one tensor, takes the memory it took", name, 100 * share, kind,
        )  # fmt: skip


def compute_from_stored_weights(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit layers compute from their weights as stored, on every CPU alike.

    Where a CPU has AVX512-BF16, bitsandbytes 0.50 packs a layer's weights anew in its first
    forward: scales are rounded to bfloat16, widths that 32 does not divide are refused, and the
    next `state_dict()` leaves the layer with its scales in another order: silently wrong.

    Raises:
        InvalidRequest: a forward has packed them already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise InvalidRequest(
                f"a forward has packed the 4-bit weights of {name} for this CPU, and they cannot "
                "be had back as they were; load the model again, and make the target of it first"
            )
        module.support_avx512bf16_for_cpu = False


def why_not_to_trim(model: nn.Module) -> str | None:
    """Return why a position's result depends on more than rounding on the padding, or None.

    Of quantised models, their config tells if it is one of a known method, else a probe: a row by
    itself without padding, against the row in a batch.
    Activations that are quantised over a whole batch make rows depend on one another; of those that
    are quantised token by token a rounding error becomes one of a quantisation step.
    """
    if positions_depend_on_length(model):
        return "its rotary positions change with the length of a row"
    own = _as_dict(getattr(model.config, "quantization_config", None))
    if not own:
        return None
    if own.get("load_in_8bit") and float(own.get("llm_int8_threshold", 6.0)) > 0:
        return "which columns bitsandbytes keeps in 16 bits depends on all rows of a batch"
    if _quantises_activations(own):  # a probe of random tokens may happen to show nothing
        return "its activations are quantised, which makes steps of what was rounding"
    input_ids, attention_mask = probe_batch(model)
    layers = range(len(decoder_layers(model)))
    batch = forward_with_aux(model, input_ids, attention_mask, layers)
    worst = 0.0
    for row, length in enumerate(attention_mask.sum(1).tolist()):
        alone = forward_with_aux(
            model, input_ids[row : row + 1, :length], attention_mask[row : row + 1, :length], layers
        )
        for a, b in zip(alone.aux_states, batch.aux_states, strict=True):
            a, b = a.float(), b[row : row + 1, :length].float()
            error = float((a - b).norm() / a.norm().clamp_min(1e-12))
            worst = error if error != error or error > worst else worst
    if worst <= _SAME.get(batch.aux_states[0].dtype, _SAME_HALF):
        return None
    return f"a row moves by {worst:.2g} (relative) when padding and other rows are taken away"


def _quantises_activations(own: Mapping[str, Any]) -> bool:
    """Whether a config says that inputs of matmuls are quantised, in the methods known here."""
    groups = (own.get("config_groups") or {}).values()
    return (
        any(_as_dict(group.get("input_activations")) for group in groups)
        or own.get("activation_scheme") is not None  # fp8
        or (_method(own) == "torchao" and "Activation" in _in_words(own))
    )


def _as_dict(config: Any) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    found: Mapping[str, Any] = config.to_dict()
    return found


def _method(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _in_words(config: Mapping[str, Any]) -> str:
    """Name a method and its form; the config's digest, in the fingerprint, tells finer ones."""
    method = _method(config)
    if method == "bitsandbytes":
        if config.get("load_in_8bit"):
            return f"{method} int8"
        is_nested = config.get("bnb_4bit_use_double_quant")
        return f"{method} {config.get('bnb_4bit_quant_type', 'fp4')}{' nested' * bool(is_nested)}"
    if method == "torchao":
        kind = config.get("quant_type")
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
        kind = kind.get("_type", kind) if isinstance(kind, Mapping) else kind
        return f"{method} {kind if isinstance(kind, str) else type(kind).__name__}"
    if method == "compressed-tensors":
        parts = [f"{method} {config.get('format', '')}".strip()]
        for group in (config.get("config_groups") or {}).values():
            for name, short in (("weights", "w"), ("input_activations", "a")):
                part = _as_dict(group.get(name))
                if part:
                    parts.append(f"{short} {_plain(part.get('type'))}{part.get('num_bits')}")
        return " ".join(dict.fromkeys(parts))
    bits = config.get("bits") or config.get("num_bits")
    return f"{method} {bits}-bit" if bits else method


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
