"""Generates the tables of docs/performance.md: `python -m tests.sizing_page`.

Arithmetic from published sizes of models; the formulas stand on the page, in the same letters.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.generated import with_parts

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

SUPERVISED = 0.6
TTT_STEPS = 7
RATE = 10_000  # tokens/s of one trainer, for the links


@dataclass(frozen=True)
class Model:
    """A target's published sizes; its draft is one dense decoder layer of the same width.

    Attributes:
        name: of the target.
        params: weights a token passes through, without embeddings: the active ones of a MoE.
        total: weights that must be held.
        hidden: H.
        kv: width of keys (or values): key heads x head size.
        inner: width of a dense MLP of its family.
        vocab: V.
        draft_vocab: D.
        itemsize: bytes of a weight and a state.
    """

    name: str
    params: float
    total: float
    hidden: int
    kv: int
    inner: int
    vocab: int
    draft_vocab: int
    itemsize: int = 2

    @property
    def draft_step_params(self) -> float:
        """Weights a step of the test runs: a layer whose attention reads 2H, and the head."""
        h = self.hidden
        attention = 2 * h * h + 2 * (2 * h) * self.kv + h * h
        return attention + 3 * h * self.inner + h * self.draft_vocab

    def target_flops(self) -> float:
        """FLOPs a token: the backbone, and the head on the supervised rows."""
        backbone = self.params - self.hidden * self.vocab
        return 2 * backbone + 2 * SUPERVISED * self.hidden * self.vocab

    def draft_flops(self) -> float:
        """FLOPs a token of training: forward and backward, of 3H -> H once, of the rest often."""
        return 6 * (3 * self.hidden**2 + TTT_STEPS * self.draft_step_params)


MODELS = (
    Model("SmolLM2-135M", 0.135e9, 0.135e9, 576, 192, 1536, 49_152, 12_288),
    Model("Llama-3.1-8B", 7.5e9, 8.03e9, 4096, 1024, 14_336, 128_256, 32_000),
    Model("Qwen3-30B-A3B", 3.0e9, 30.5e9, 2048, 512, 6144, 151_936, 32_000),
    Model("Llama-3.1-70B", 69.5e9, 70.6e9, 8192, 1024, 28_672, 128_256, 32_000),
    Model("Llama-3.1-405B", 403.7e9, 405.9e9, 16_384, 1024, 53_248, 128_256, 32_000),
)


def bytes_per_token(model: Model, encoding: str) -> float:
    """Return the bytes of an answer per token: aux states, and rows for the supervised ones."""
    rows = {
        "hidden": model.hidden * model.itemsize,
        "logits": model.draft_vocab * model.itemsize,
        "probs": model.draft_vocab * 4,
    }
    return 3 * model.hidden * model.itemsize + SUPERVISED * rows[encoding]


def tables() -> dict[str, str]:
    """Return the page's generated parts by name."""
    work = "| target | GFLOP a token: target | draft | draft / target |\n|---|---|---|---|\n"
    for model in MODELS:
        target, draft = model.target_flops() / 1e9, model.draft_flops() / 1e9
        work += f"| {model.name} | {target:,.1f} | {draft:,.1f} | {draft / target:.2f} |\n"
    links = (
        "| target | encoding | bytes/token | Gb/s at 10,000 tokens/s | tokens/s over 10 Gb/s |\n"
    )
    links += "|---|---|---|---|---|\n"
    for model in MODELS:
        for encoding in ("hidden", "logits", "probs"):
            size = bytes_per_token(model, encoding)
            links += f"| {model.name} | `{encoding}` | {size:,.0f} | {RATE * size * 8 / 1e9:.2f} | "
            links += f"{10e9 / 8 / size:,.0f} |\n"
    return {"work": work, "links": links, "measured": measured()}


def measured() -> str:
    """Return what `benchmarks/sizing.py` measured, as its page has it."""
    page = (RESULTS / "sizing.md").read_text(encoding="utf-8")
    tables_of_it = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    made = json.loads((RESULTS / "sizing.json").read_text(encoding="utf-8"))["provenance"]
    return f"{_when(made)}\n\n" + "\n".join(tables_of_it[:2])


def _when(made: dict[str, Any]) -> str:
    return f"Measured {made['date']} with `{made['command']}` on {made['hardware']}."


def with_tables(page: str) -> str:
    """Return the page with its generated parts as they are now."""
    return with_parts(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
