"""What `gpu.py` measures on, and how it shows what it found."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from common import Target, markdown_table
from head_model import ModelShape

# Dense bfloat16 FLOP/s of the SXM parts, from NVIDIA's H100 and H200 datasheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Shape:
    """Sizes of Llama 3.1 8B, and of a batch."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocab_size: int = 128256
    draft_vocab_size: int = 32000
    batch_size: int = 8
    length: int = 2048
    batches: int = 12

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch_size * self.length

    @property
    def model_shape(self) -> ModelShape:
        """Return the sizes that the other benchmarks have too."""
        sizes = (self.hidden_size, self.layers, self.vocab_size, self.draft_vocab_size)
        return ModelShape(*sizes, self.batch_size)


def tables(results: dict[str, Any], shape: Shape) -> list[str]:
    parameters = results["parameters"] - shape.vocab_size * shape.hidden_size  # ids are looked up
    peak_flops = next((v for k, v in PEAK_FLOPS.items() if k in results["card"]), None)
    lines = []
    for name, values in results["seconds"].items():
        mean = statistics.mean(values)  # of what arrives in pairs, a median says nothing
        rate = shape.tokens / mean
        mfu = "-" if peak_flops is None else f"{2 * parameters * rate / peak_flops:.0%}"
        ranged = f"{1000 * min(values):,.1f}-{1000 * max(values):,.1f}"
        lines.append([name, f"{1000 * mean:,.1f} ({ranged})", f"{rate:,.0f}", mfu])
    memory = [[name, f"{mib:,.0f}"] for name, mib in results["peak_mib"].items()]
    copies = [
        [name, f"{statistics.median(values):.1f}"] for name, values in results["copy_gb_s"].items()
    ]
    equal = [
        [name, *(str(value) for value in found.values())]
        for name, found in results["equality"].items()
    ]
    header = ["encoding", "aux bit-equal", "masks that differ", "probs bit-equal"]
    return [
        f"{results['card']}; bfloat16, H {shape.hidden_size}, {shape.layers} layers, V "
        f"{shape.vocab_size}, D {shape.draft_vocab_size}, B {shape.batch_size}, T {shape.length}, "
        "60 % supervised, encoding `hidden`. MFU counts 2 FLOP a parameter and token, attention "
        "not, and all tokens through the head; the served head runs where training looks.",
        f"Tests of `tests/gpu`: {results['tests']}.",
        markdown_table(["path", "ms/batch", "tokens/s", "MFU"], lines),
        "Bare supervision by `EAGLE3_HEAD_CHUNK_BYTES`, and the device memory it takes:",
        markdown_table(
            ["chunk", "ms", "MiB"],
            [[n, f"{f['ms']:,.1f}", f"{f['MiB']:,.0f}"] for n, f in results["chunks"].items()],
        ),
        "Device memory of a batch above the weights:",
        markdown_table(["path", "MiB"], memory),
        "Copies:",
        markdown_table(["copy", "GB/s"], copies),
        "Served and rebuilt on the same card, against the co-located path, one row of the batch:",
        markdown_table([*header, "largest difference", "repeats bit-equal"], equal),
        "Layers on two GPUs (`--device-map`) against one, a smaller model:",
        markdown_table(["result", "found"], [[*pair] for pair in results["two_gpus"].items()]),
        markdown_table(["what", "measured", "target", ""], results["verdicts"]),
    ]


def verdicts(seconds: dict[str, list[float]], shape: Shape) -> list[list[str]]:
    """Hold the served rates against our goals."""
    rows = []
    for name, values in seconds.items():
        if name.startswith("served"):
            floor = Target(f"8B-shaped bf16, {name}, tokens/s", 27000, " tokens/s", at_least=True)
            rows.append(floor.row(shape.tokens / statistics.mean(values)))
            kept = Target(f"{name} / bare supervision", 0.95, at_least=True)
            bare = statistics.mean(seconds["bare supervision"])
            rows.append(kept.row(bare / statistics.mean(values)))
    return rows
