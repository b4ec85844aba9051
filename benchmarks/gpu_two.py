"""A target whose layers lie on two GPUs against the same on one; only where there are two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eagle3_server import TransformersTarget


def two_gpus(
    build: Callable[[torch.device], Any], job_of: Callable[..., Any], vocab: Any
) -> dict[str, str]:
    """Return what of a target on two GPUs has the bits of one on the first, or why it did not run.

    Args:
        build: makes the same model on a device, each time in memory of its own.
        job_of: `job_of(target, encoding=…, exact=…)`.
        vocab: the draft vocab of those jobs.
    """
    count = torch.cuda.device_count()
    if count < 2:
        return {"not run": f"this host has {count} GPUs, and it takes two"}
    from accelerate import dispatch_model

    whole = TransformersTarget(build(torch.device("cuda:0")), model_id="two")
    model = build(torch.device("cuda:0"))
    layers = len(model.model.layers)
    mapped = dispatch_model(
        model,
        device_map={
            "model.embed_tokens": 0,
            "model.rotary_emb": 0,
            "model.norm": 1,
            "lm_head": 1,
            **{f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)},
        },
    )
    halves = TransformersTarget(mapped, model_id="two")
    cases: dict[str, Callable[[TransformersTarget], Any]] = {
        f"{encoding}, exact={exact}": lambda target, e=encoding, x=exact: target.supervise(
            job_of(target, encoding=e, exact=x)
        )
        for encoding, exact in (("probs", True), ("logits", True), ("hidden", False))
    }
    cases |= {
        "input embeddings": lambda target: target.input_embeddings(),
        "draft head": lambda target: target.draft_head(vocab),
        "whole head": lambda target: target.target_head(),
    }
    found = {}
    for name, compute in cases.items():
        got, expected = (compute(target).tensors for target in (halves, whole))
        torch.cuda.synchronize()
        is_same = all(torch.equal(got[key], expected[key]) for key in expected)
        on_first = all(tensor.device.index == 0 for tensor in got.values())
        found[name] = f"{'bit-equal' if is_same else 'differs'}{'' if on_first else ', elsewhere'}"
    return found
