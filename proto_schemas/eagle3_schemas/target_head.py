"""`TargetHead`: the target's final norm and whole head, for trainers that apply them themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import layer_norm, linear

from eagle3_schemas.draft_head import LogitsTransform, pad_rows
from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.frame import Frame
from eagle3_schemas.messages import TargetHeadFields, parse


@dataclass(frozen=True)
class NormForm:
    """How a final norm computes.

    Attributes:
        kind: `rms` (x / sqrt(mean(x^2) + eps)), or `layer`, which subtracts the mean first.
        eps: added to the mean square, or to the variance.
        gain_in_float32: whether the gain multiplies before the result is cast to the model's dtype
            (Gemma, OLMo 2), or after it (Llama).
    """

    kind: Literal["rms", "layer"]
    eps: float
    gain_in_float32: bool


@dataclass(frozen=True)
class FinalNorm:
    """A target's final norm: what turns `last_hidden_prenorm` into `last_hidden`.

    Attributes:
        form: how it computes.
        weight: [H], the factor itself (of Gemma 1 + its parameter), or None.
        bias: [H], or None.
    """

    form: NormForm
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H], in float32 inside; the result has the dtype of `hidden`."""
        dtype, x = hidden.dtype, hidden.float()
        if self.form.kind == "layer" and self.form.gain_in_float32:
            # One call, as the models that are built on it do.
            weight = None if self.weight is None else self.weight.float()
            bias = None if self.bias is None else self.bias.float()
            return layer_norm(x, x.shape[-1:], weight, bias, self.form.eps).to(dtype)
        if self.form.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.form.eps)
        if not self.form.gain_in_float32:
            x = x.to(dtype)
        if self.weight is not None:
            x = self.weight * x
        if self.bias is not None:
            x = x + self.bias
        return x.to(dtype)


@dataclass(frozen=True)
class TargetHead:
    """The target's head over its whole vocab, and the norm before it, on the trainer's device.

    Attributes:
        weight: [V, H], model dtype.
        bias: [V], or None.
        transform: what follows the head.
        norm: the final norm, or None if it is of no form known here; then ask for `last_hidden`,
            to which it has been applied.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitsTransform
    norm: FinalNorm | None

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """Turn `last_hidden` [..., H] into logits [..., V], in the model's own precision.

        `last_hidden_prenorm` goes through `norm` first.

        Raises:
            InvalidRequest: another width than H.
        """
        if last_hidden.shape[-1] != self.weight.shape[1]:
            raise InvalidRequest(
                f"last_hidden must be [..., {self.weight.shape[1]}]; got {list(last_hidden.shape)}"
            )
        rows = last_hidden.reshape(-1, last_hidden.shape[-1]).to(self.weight.dtype)
        output = self.transform(linear(pad_rows(rows), self.weight, self.bias)[: rows.shape[0]])
        return output.view(*last_hidden.shape[:-1], output.shape[-1])


def unpack_target_head(
    frame: Frame, vocab_size: int, hidden_size: int, device: torch.device
) -> TargetHead:
    """Rebuild a target's head on `device`; every shape is checked first.

    Raises:
        InvalidRequest: not a target head's fields.
        MalformedPayload: its tensors are not [V, H], [V] and [H].
    """
    fields = parse(TargetHeadFields, frame.fields)
    shapes = {
        "weight": (vocab_size, hidden_size),
        "bias": (vocab_size,),
        "norm_weight": (hidden_size,),
        "norm_bias": (hidden_size,),
    }
    got = {name: tuple(tensor.shape) for name, tensor in frame.tensors.items()}
    wrong = {name: shape for name, shape in got.items() if shape != shapes.get(name)}
    if wrong or "weight" not in got:
        raise MalformedPayload(f"expected a target head's {shapes}, got {got}")
    tensors = {name: tensor.to(device) for name, tensor in frame.tensors.items()}
    norm = None
    if fields.norm is not None and fields.norm_eps is not None:
        form = NormForm(fields.norm, fields.norm_eps, fields.norm_gain_in_float32)
        norm = FinalNorm(form, tensors.get("norm_weight"), tensors.get("norm_bias"))
    transform = LogitsTransform(fields.upcast, fields.multiply, fields.divide, fields.softcap)
    return TargetHead(tensors["weight"], tensors.get("bias"), transform, norm)
