"""Two devices that are not there: tensors that say cpu:1 or cpu:2, and refuse to meet.

Their numbers are in ordinary memory, so every operation is computed, by the same kernels as on one
device; but one that is given tensors of two devices raises, as CUDA's would. Stricter than CUDA,
also for an index that lies on the host; a number without dimensions may meet any, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
HOST = torch.device("cpu")
_MAY_CROSS = {"aten::copy_", "aten::_to_copy"}


class Placed(torch.Tensor):
    """A tensor that says it is on a device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: Any = None, requires_grad: bool = False) -> Placed:
        if isinstance(held, Placed):
            held, device = held.held, held.device
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=device,
        )  # fmt: skip
        self.held = held
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held!r}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` makes its tensor below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


class TwoDevices(TorchDispatchMode):
    """Inside, tensors can be made on the two devices, and moved there."""

    def __enter__(self) -> Any:
        self._literals = _Literals()
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._literals.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors if t.dim() > 0} or {t.device for t in tensors}
    if len(devices) > 1 and name not in _MAY_CROSS:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {' and '.join(sorted(map(str, devices)))}!"
        )
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": HOST}
        device = torch.device(device)
    elif tensors:
        device = tensors[0].device if name == "aten::copy_" else next(iter(devices))
    held = {id(t.held): t for t in tensors if isinstance(t, Placed)}

    def wrapped(value: Any) -> Any:
        if id(value) in held:  # an operation in place
            return held[id(value)]
        is_away = isinstance(value, torch.Tensor) and device not in (None, HOST)
        return Placed(value, device) if is_away and not isinstance(value, Placed) else value

    def opened(value: Any) -> Any:
        return value.held if isinstance(value, Placed) else value

    return tree_map(wrapped, func(*tree_map(opened, args), **tree_map(opened, kwargs)))
