"""`LocalTarget`: a copy of the target on this host, run by transformers alone, for `verify`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eagle3_client.preflight_report import Check
from eagle3_client.verify_served import Served, kl
from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.errors import InvalidRequest

_SAME_STATES = 0.05  # relative (Frobenius): bfloat16 on another device stays below
# Neighbours may be as near as that: a massive activation outweighs what each layer adds. Rounding
# then still leaves the right one nearest.
_CLEARLY_NEARER = 0.5
_SAME_DISTRIBUTION = 0.02  # mean KL, nats
_SAME_MASK = 0.97  # near-equal logits may turn in bfloat16


class LocalTarget:
    """Not thread-safe.

    Args:
        model: a transformers causal LM in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def load(cls, name: str, dtype: str) -> LocalTarget:
        """Load a checkpoint directory or hub id on the CPU, in the served dtype.

        Raises:
            InvalidRequest: it cannot be loaded, or transformers is missing.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as exc:
            raise InvalidRequest(
                "--model needs transformers, which is not installed. Install it with\n"
                '  pip install "transformers>=5,<6"'
            ) from exc
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except Exception as exc:  # OSError, ValueError, or whatever its files make it raise
            words = " ".join(str(exc).split())[:500]
            raise InvalidRequest(f"--model {name} cannot be loaded: {words}") from exc
        model.eval()  # type: ignore[no-untyped-call]
        return cls(model.requires_grad_(False))

    def compare(self, served: Served) -> dict[str, Check]:
        """Compare aux states with each layer's output, and supervision with the full logits."""
        outputs, logits = self._forward(served.input_ids)
        if logits.shape[-1] != served.info.vocab_size:
            return {
                "supervision": Check(
                    "failed",
                    f"--model gives logits of {logits.shape[-1]:,} ids, the server's target "
                    f"{served.info.vocab_size:,}: another target",
                    "name the checkpoint that is served",
                )
            }
        return {
            "aux_layers": self._aux_layers(served, outputs),
            "supervision": self._supervision(served, logits),
        }

    def _forward(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return every decoder layer's output, as a hook on it sees it, and the logits."""
        decoder, depth = self._model.get_decoder(), None
        config = self._model.config.get_text_config(decoder=True)
        depth = config.num_hidden_layers
        layers = next(
            (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None
        )
        if layers is None:
            raise InvalidRequest(f"--model: no list of {depth} decoder layers was found in it")
        outputs: list[Tensor] = []
        last: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, out: Any) -> None:
            last.append(out[0] if isinstance(out, tuple) else out)

        handle = layers[-1].register_forward_hook(keep)
        try:
            with torch.no_grad():
                answer = self._model(
                    input_ids=input_ids, output_hidden_states=True, use_cache=False
                )
        finally:
            handle.remove()
        # The last of them has passed the final norm; the hook's has not.
        outputs = [*answer.hidden_states[1:depth], last[0]]
        return outputs, answer.logits

    def _aux_layers(self, served: Served, outputs: list[Tensor]) -> Check:
        got = served.aux_hidden_states.float().chunk(len(served.aux_layer_ids), dim=-1)
        wrong, worst = [], 0.0
        for states, layer in zip(got, served.aux_layer_ids, strict=True):
            errors = [float((states - o.float()).norm() / o.float().norm()) for o in outputs]
            best = min(range(len(errors)), key=errors.__getitem__)
            worst = max(worst, errors[layer])
            is_nearest = errors[best] >= _CLEARLY_NEARER * errors[layer]  # both may be 0
            if errors[layer] <= _SAME_STATES and is_nearest:
                continue
            wrong.append(
                f"layer {layer}'s is layer {best}'s output (off by {best - layer:+d})"
                if errors[best] <= _SAME_STATES
                else f"layer {layer}'s is no layer's output (nearest: {best}, {errors[best]:.2g})"
            )
        values = {"relative_error": worst, "aux_layer_ids": list(served.aux_layer_ids)}
        if not wrong:
            return Check("ok", f"outputs of the layers named, to {worst:.1e}", None, values)
        return Check(
            "failed",
            "aux states: " + "; ".join(wrong),
            "a draft trained on them would be served with others: name layers as outputs, "
            "transformers' hidden_states[i + 1], on both sides; if none fits, other weights",
            values,
        )

    def _supervision(self, served: Served, logits: Tensor) -> Check:
        shifted = shift_left_with_zero(logits.float())
        probs = shifted[..., served.selected_token_ids].softmax(-1)
        mask = torch.isin(shifted.argmax(-1), served.selected_token_ids)
        rows = slice(None), slice(0, served.input_ids.shape[1] - 1)
        agree = float((mask[rows] == served.position_mask[rows]).float().mean())
        distance = kl(probs[rows], served.target_probs[rows])
        largest = float((probs[rows] - served.target_probs[rows]).abs().max())
        values = {"kl": distance, "largest_difference": largest, "mask_agreement": agree}
        found = f"KL {distance:.1e}, largest difference {largest:.1e}, masks agree at {agree:.1%}"
        if distance <= _SAME_DISTRIBUTION and agree >= _SAME_MASK:
            return Check("ok", found, None, values)
        length = served.input_ids.shape[1]
        for k in (-1, 1):
            mine = probs[:, max(k, 0) + 1 : length - 2 + min(k, 0)]
            theirs = served.target_probs[:, max(-k, 0) + 1 : length - 2 + min(-k, 0)]
            if kl(mine, theirs) <= _SAME_DISTRIBUTION:
                return Check(
                    "failed", f"shifted by {k:+d} against the local forward ({found})",
                    "supervision would be wrong at every position: do not train on it", values,
                )  # fmt: skip
        return Check(
            "failed",
            f"another target than --model, or another mapping: {found}",
            "serve and name the same checkpoint, revision and dtype",
            values,
        )
