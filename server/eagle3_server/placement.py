"""Models whose parts lie on several devices: what `--device-map` says, and what lies where.

accelerate moves inputs from part to part by hooks of its own, and fetches weights that lie on the
host or on a disk for the time of a forward; between forwards they are on `meta`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from eagle3_schemas.errors import InvalidRequest

AUTOMATIC: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that transformers computes from the memory of the devices."""

DeviceMap = str | dict[str, str | int]


def parse_device_map(text: str) -> DeviceMap:
    """Return what transformers takes for `device_map`, every device checked.

    Args:
        text: one of `AUTOMATIC`; a JSON object, or the path of a file with one: module names to
            devices, such as `{"model.embed_tokens": "cuda:0", "model.layers.0": 1, …}`, `""` for
            all that is not named. A number is a GPU; `cpu` and `disk` keep weights there and fetch
            them for each forward.

    Raises:
        InvalidRequest: none of these, or a device that this host has not.
    """
    if text in AUTOMATIC:
        return text
    source = text
    if not text.lstrip().startswith("{"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise InvalidRequest(
                f"device map {text!r} is none of {', '.join(AUTOMATIC)}, no JSON object, and no "
                "file with one"
            )
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidRequest(f"cannot read the device map {path}: {exc}") from exc
    try:
        parsed = json.loads(source)
    except ValueError as exc:
        raise InvalidRequest(f"the device map is not JSON: {exc}") from exc
    if not isinstance(parsed, dict) or not parsed:
        raise InvalidRequest(
            "a device map in JSON is an object of module names and devices, such as "
            f'{{"model.layers.0": "cuda:0"}}; got {parsed!s:.100}'
        )
    return {str(name): _checked(name, device) for name, device in parsed.items()}


def _checked(name: str, device: object) -> str | int:
    """Return a device that this host has."""
    if device == "disk":
        return "disk"
    count = torch.cuda.device_count()
    try:
        if isinstance(device, bool) or not isinstance(device, str | int):
            raise TypeError(type(device).__name__)
        parsed = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise InvalidRequest(
            f"the device map puts {name!r} on {device!r}, which is no device ({exc!s:.100}); name "
            "cpu, disk, a GPU's number, or cuda:N"
        ) from exc
    if parsed.type == "meta":
        raise InvalidRequest(
            f"the device map puts {name!r} on meta, where weights have no values; name cpu, disk, "
            "a GPU's number, or cuda:N"
        )
    if parsed.type not in ("cpu", "cuda"):
        raise InvalidRequest(
            f"the device map puts {name!r} on {device!r}; expected cpu, disk, a GPU's number, or "
            "cuda:N"
        )
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise InvalidRequest(
            f"the device map puts {name!r} on {device!r}, and this host has {count} GPUs"
        )
    return device


def only_cpu(device_map: DeviceMap) -> bool:
    """Whether a map uses no GPU: the dtype is then a CPU's."""
    if isinstance(device_map, str):
        return not torch.cuda.is_available()
    return all(
        device == "disk" or (isinstance(device, str) and torch.device(device).type == "cpu")
        for device in device_map.values()
    )


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: where its weights are, or are fetched to.

    Raises:
        InvalidRequest: its weights are nowhere.
    """
    weight = next(module.parameters(), None)
    if weight is not None and weight.device.type != "meta":
        return weight.device
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None and device != "meta":
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    raise InvalidRequest(
        f"the weights of {type(module).__name__} are on meta, without values; load the model with "
        "them, or give it a device_map"
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are fetched for each forward."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights in place inside the block; nothing to do unless offloaded."""
    hooks = [hook for hook in _hooks(module) if getattr(hook, "offload", False)]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices that a model's parts compute on, in the order of the parts."""
    found: dict[torch.device, None] = {}
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            found.setdefault(device_of(module))
    return list(found)


def state_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give a model's state by name, in the order of names, offloaded weights fetched one by one."""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type != "meta":
            yield name, tensor
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        with weights_of(owner):
            yield name, getattr(owner, leaf)


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
