"""Bytes per token of real frames at real sizes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Target, markdown_table
from head_model import ModelShape

from eagle3_schemas.frame import encode
from eagle3_schemas.messages import SupervisionResponse
from eagle3_schemas.supervision import pack_bits


def sizes(
    shape: ModelShape, arguments: argparse.Namespace, results: dict[str, Any], tables: list[str]
) -> list[list[str]]:
    """Bytes per token of real frames of the right shapes, every supervised row sent."""
    targets = {
        ("8B", 4096, 32000): Target("bytes/token, `hidden`, 8B (H 4096, D 32000)", 29_500, " B"),
        ("SmolLM2", 576, 12288): Target("bytes/token, `hidden`, SmolLM2 (D 12288)", 4_200, " B"),
    }
    lines, rows = [], []
    tokens = shape.batch_size * arguments.length
    count = round(shape.supervised * tokens)
    for (name, hidden, draft), target in targets.items():
        widths = {"hidden": (hidden, 2), "logits": (draft, 2), "probs": (draft, 4)}
        for encoding, (width, itemsize) in widths.items():
            dtype = torch.bfloat16 if itemsize == 2 else torch.float32
            tensors = {
                "aux_hidden_states": torch.zeros(tokens, 3 * hidden, dtype=torch.bfloat16),
                "position_mask": pack_bits(torch.ones(tokens, dtype=torch.bool)),
                "rows": torch.zeros(count, width, dtype=dtype),
            }
            fields = SupervisionResponse(
                request_id="0" * 32,
                fingerprint="0" * 16,
                draft_vocab_digest="0" * 64,
                aux_layer_ids=(1, 15, 28),
                encoding=encoding,
                rows="position_mask",
                aux_dtype="model",
            )
            nbytes = encode(fields.model_dump(), tensors).nbytes / tokens
            lines.append([name, encoding, f"{nbytes:,.0f}"])
            if encoding == "hidden":
                rows.append(target.row(nbytes))
    results["bytes_per_token"] = lines
    tables.append(
        f"Bytes per token of a bf16 target's frame, {tokens} tokens, {shape.supervised:.0%} "
        "supervised and all of these in the draft vocab:\n\n"
        + markdown_table(["target", "encoding", "bytes/token"], lines)
    )
    return rows
