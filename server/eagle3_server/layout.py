"""Where things are in a transformers model: its decoder layers and its learned positions."""

from __future__ import annotations

from torch import nn

from eagle3_schemas.errors import InvalidRequest


def text_config(model: nn.Module) -> object:
    """Return the config of the decoder: the model's own, or the text part of a multimodal one."""
    config = model.config
    getter = getattr(config, "get_text_config", None)
    if getter is not None:
        return getter(decoder=True)
    return getattr(config, "text_config", None) or config


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers in order.

    They are the outermost ModuleList (or ModuleDict keyed by `str(i)`) of length
    `num_hidden_layers` under the model's decoder: `model.layers`, `transformer.h`, `blocks`, …

    Raises:
        InvalidRequest: no such container; the model is not one whose layers can be hooked.
    """
    count = text_config(model).num_hidden_layers  # type: ignore[attr-defined]
    for module in _decoder(model).modules():
        # modules() goes from the outside in, so the layers come before lists of experts in them.
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
        if isinstance(module, nn.ModuleDict) and list(module) == [str(i) for i in range(count)]:
            return [module[str(i)] for i in range(count)]
    raise InvalidRequest(
        f"{type(model).__name__}: found no ModuleList or ModuleDict of num_hidden_layers={count} "
        "decoder layers; aux_hidden_states cannot be captured from this model"
    )


def _decoder(model: nn.Module) -> nn.Module:
    """Return the decoder of a model that tells it from its towers and its head, else the model."""
    getter = getattr(model, "get_decoder", None)
    root = getter() if getter is not None else model
    return root if isinstance(root, nn.Module) else model


def max_sequence_length(model: nn.Module) -> int | None:
    """Return the longest T a table of learned positions admits (GPT-2, OPT), or None without one.

    Most rotary and ALiBi models have no such table; GPT-J and CodeGen keep their rotary positions
    in one, MPT its ALiBi. A position beyond it would be a device-side assert on a GPU, which
    poisons the process.
    """
    for name, module in _decoder(model).named_modules():  # a vision tower's positions are its own
        leaf = name.rpartition(".")[2]
        if leaf in ("wpe", "embed_positions", "position_embeddings") and isinstance(
            module, nn.Embedding
        ):
            return module.num_embeddings - int(getattr(module, "offset", 0))
        table = vars(module).get("_buffers", {}).get("embed_positions")  # GPT-J, CodeGen
        if table is not None:
            return int(table.shape[-2])
        if hasattr(module, "build_mpt_alibi_tensor"):
            return int(text_config(model).max_seq_len)  # type: ignore[attr-defined]
    return None


def positions_depend_on_length(model: nn.Module) -> bool:
    """Whether the rotary positions change with T itself (`dynamic` and `longrope`).

    Another padded length then changes every state, not by rounding: such a target is not trimmed.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
        if any(kind in ("dynamic", "longrope") for kind in kinds):
            return True
    return False


def reset_rotary(model: nn.Module) -> None:
    """Undo what earlier forwards left in rotary modules, so that a result has no history.

    transformers 5.23 keeps the frequencies of the longest sequence seen (`dynamic`) until a short
    one comes.
    """
    for module in model.modules():
        longest = getattr(module, "original_max_seq_len", None)
        if longest is None:
            continue
        for name in [*vars(module), *dict(module.named_buffers(recurse=False))]:
            if not name.endswith("original_inv_freq"):
                continue
            prefix = name.removesuffix("original_inv_freq")
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, name).to(device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            if hasattr(module, f"{prefix}max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", longest)
