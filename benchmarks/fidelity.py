"""What each encoding costs and keeps, on the real SmolLM2-135M-Instruct and real text.

Every batch travels over HTTP from a server in this process. The table goes between the markers in
``docs/encodings.md``. Run as ``python benchmarks/fidelity.py``; two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from common import (
    REPOSITORY,
    RESULTS,
    caption,
    insert,
    markdown_table,
    provenance,
    served,
    write_json,
)
from draft_step import cosine, gradients, start_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from eagle3_client import RemoteEagle3Backend, build_draft_vocab, count_token_ids
from eagle3_schemas import Eagle3TargetBatch, project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel, TransformersTarget
from smollm2 import smollm2_checkpoint
from text import (
    HELD_OUT_MODULES,
    TRAINING_MODULES,
    TokenBatch,
    chunk,
    every_token,
    make_batches,
    module_documents,
    tokenize,
)

BEGIN, END = "<!-- fidelity: begin, generated -->", "<!-- fidelity: end -->"
ENCODINGS, AUX_DTYPES = ("probs", "logits", "hidden"), ("model", "float8_e4m3")
SUPERVISED, REAL = 0.6, 0.27


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    disable_progress_bar()
    made = provenance("fidelity.py", sys.argv[1:] if argv is None else argv)
    checkpoint = arguments.checkpoint or smollm2_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    training, held_out = (
        tokenize(chain.from_iterable(map(module_documents, modules)), tokenizer)
        for modules in (TRAINING_MODULES, HELD_OUT_MODULES)
    )
    results: dict[str, Any] = {"provenance": made, "targets": {}}
    exact: dict[str, list[Eagle3TargetBatch]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        counts = count_token_ids(every_token(training), model.config.vocab_size)
        vocab = build_draft_vocab(counts, arguments.draft_vocab_size, tokenizer.all_special_ids)
        name = str(dtype).removeprefix("torch.")
        results["targets"][name], exact[name] = measure_target(
            model, vocab, training, held_out, arguments
        )
    results["bfloat16_against_float32"] = compare(exact["bfloat16"], exact["float32"])
    block = report(results, arguments)
    print(block)
    write_json(arguments.results, results)
    insert(arguments.docs, block, BEGIN, END)
    return 0


def measure_target(
    model: Any,
    vocab: tuple[Tensor, Tensor],
    training: list[list[int]],
    held_out: list[list[int]],
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], list[Eagle3TargetBatch]]:
    """Measure every encoding, exactness and the default mode's rounding for one dtype.

    Returns:
        The measurements, and the padded batches as `exact=True` gave them.
    """
    length = arguments.sequence_length
    full = [piece for piece in chunk(held_out, length) if len(piece) == length]
    short = chunk(held_out, int(REAL * length), min_length=16)
    sizes = {"batch_size": arguments.batch_size, "sequence_length": length}
    prompt = round((1 - SUPERVISED) * length)
    batches = make_batches(full, num_batches=arguments.batches, prompt_tokens=prompt, **sizes)
    padded = make_batches(short, num_batches=arguments.batches, **sizes)
    local = HFEagle3TargetModel(model)
    target = TransformersTarget(model, model_id="smollm2")
    assert target.describe().head == "rows", target.describe().head_reason
    with served(target) as url:

        def answers(
            wanted: list[TokenBatch], **options: Any
        ) -> tuple[list[Eagle3TargetBatch], int]:
            with RemoteEagle3Backend(url, retry_for_s=2, timeout_s=600, **options) as backend:
                backend.set_vocab_mapping(*vocab)
                if options.get("encoding") == "hidden":
                    backend.generate_batch(*short_batch(wanted[0]))  # fetches the head's rows
                before = backend.bytes_received
                got = [backend.generate_batch(*batch) for batch in wanted]
                return got, backend.bytes_received - before

        check_exact(local, vocab, batches[:1] + padded[:1], answers)
        trainer = start_trainer(
            local.get_input_embeddings().weight, vocab, training, answers, arguments
        )
        reference, _ = answers(batches, encoding="probs")
        gradient = gradients(trainer, reference)
        rows = []
        for encoding, aux_dtype in product(ENCODINGS, AUX_DTYPES):
            got, nbytes = answers(batches, encoding=encoding, aux_dtype=aux_dtype)
            row = {"encoding": encoding, "aux_dtype": aux_dtype, **compare(got, reference)}
            row["bytes_per_row"] = row_bytes(encoding, vocab[0].numel(), target)
            row["bytes_per_token"] = nbytes / sum(batch.input_ids.numel() for batch in batches)
            row["gradient_cosine"] = cosine(gradients(trainer, got), gradient)
            rows.append(row)
        default, _ = answers(padded, encoding="hidden")
        untrimmed, _ = answers(padded, encoding="hidden", exact=True)
    measured = {
        "rows": rows,
        "exact": dict.fromkeys(ENCODINGS, "bit-identical"),  # asserted above
        "default_against_exact": compare(default, untrimmed),
        "loss_mask_share": share([batch.loss_mask for batch in batches]),
        "position_mask_share": share([batch.position_mask for batch in reference]),
        "real_token_share": share([batch.attention_mask for batch in padded]),
    }
    return measured, untrimmed


def short_batch(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(*(tensor[:1, :32] for tensor in batch))


def check_exact(
    local: HFEagle3TargetModel,
    vocab: tuple[Tensor, Tensor],
    batches: list[TokenBatch],
    answers: Any,
) -> None:
    """Assert that every encoding with `exact=True` has the bits of the co-located target."""
    for encoding in ENCODINGS:
        got, _ = answers(batches, encoding=encoding, exact=True)
        for batch, remote in zip(batches, got, strict=True):
            expected = local.generate_batch(*batch)
            assert expected.logits is not None
            probs, mask = project_to_draft_vocab(expected.logits, *vocab, expected.loss_mask)
            attended = batch.attention_mask.bool()
            aux = expected.aux_hidden_states
            assert torch.equal(remote.position_mask, mask), encoding
            assert torch.equal(remote.aux_hidden_states[attended], aux[attended]), encoding
            assert torch.equal(remote.target_probs[mask[..., 0]], probs[mask[..., 0]]), encoding
            assert torch.equal(remote.input_ids, expected.input_ids), encoding
            assert torch.equal(remote.loss_mask, expected.loss_mask), encoding


def compare(got: list[Eagle3TargetBatch], reference: list[Eagle3TargetBatch]) -> dict[str, float]:
    """Compare supervision where both have it, and aux states where they are attended."""
    errors, divergences, kept, aux_errors, aux_largest, masks = [], [], [], [], [], 0
    for ours, theirs in zip(got, reference, strict=True):
        masks += int((ours.position_mask != theirs.position_mask).sum())
        rows = (ours.position_mask & theirs.position_mask).squeeze(-1)
        probs, expected = ours.target_probs[rows].double(), theirs.target_probs[rows].double()
        errors.append((probs - expected).abs().max())
        tiny = torch.finfo(torch.float64).tiny
        # Float32 rows sum to 1 within rounding, which would drown the smallest divergences.
        probs, expected = (p / p.sum(-1, keepdim=True) for p in (probs, expected))
        logs = expected.clamp_min(tiny).log() - probs.clamp_min(tiny).log()
        divergences.append((expected * logs).sum(-1))
        kept.append(probs.argmax(-1) == expected.argmax(-1))
        attended = ours.attention_mask.bool()
        aux = ours.aux_hidden_states[attended].double()
        base = theirs.aux_hidden_states[attended].double()
        aux_errors.append((aux - base).norm(dim=-1) / base.norm(dim=-1))
        aux_largest.append((aux - base).abs().max())
    relative = torch.cat(aux_errors)
    return {
        "probs_max_error": float(torch.stack(errors).max()),
        "mean_kl": max(float(torch.cat(divergences).mean()), 0.0),
        "top1_kept": float(torch.cat(kept).double().mean()),
        "aux_median_relative_error": statistics.median(relative.tolist()),
        "aux_max_relative_error": float(relative.max()),
        "aux_max_error": float(torch.stack(aux_largest).max()),
        "position_mask_differences": masks,
        "rows": sum(int(part.numel()) for part in kept),
    }


def row_bytes(encoding: str, draft_vocab_size: int, target: TransformersTarget) -> int:
    itemsize = getattr(torch, target.describe().dtype).itemsize
    hidden = target.describe().hidden_size * itemsize
    return {"probs": 4 * draft_vocab_size, "logits": itemsize * draft_vocab_size, "hidden": hidden}[
        encoding
    ]


def share(masks: list[Any]) -> float:
    return float(torch.cat([mask.bool().flatten() for mask in masks]).double().mean())


def report(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return the generated part of the page."""
    header = "target, encoding, aux_dtype, bytes/row, bytes/token, max probs error, mean KL"
    header += ", top-1 kept, aux error: median (max), gradient cosine"
    lines, bounds = [], []
    for name, target in results["targets"].items():
        for row in target["rows"]:
            aux = f"{row['aux_median_relative_error']:.2%} ({row['aux_max_relative_error']:.2%})"
            lines.append(
                [
                    *(name, f"`{row['encoding']}`", f"`{row['aux_dtype']}`"),
                    *(f"{row['bytes_per_row']:,}", f"{row['bytes_per_token']:,.0f}"),
                    *(number(row["probs_max_error"]), number(row["mean_kl"])),
                    *(f"{row['top1_kept']:.2%}", "0" if row["aux_max_error"] == 0 else aux),
                    cosine_text(row["gradient_cosine"]),
                ]
            )
        bounds.append([f"{name}, default", *bound_cells(target["default_against_exact"])])
    scale = bound_cells(results["bfloat16_against_float32"])
    bounds.append(["for scale: bfloat16, exact, against float32, exact", *scale])
    first = next(iter(results["targets"].values()))
    shape = f"{arguments.batches} batches of {arguments.batch_size} x {arguments.sequence_length}"
    text = [
        caption(results["provenance"]),
        f"SmolLM2-135M-Instruct, D = {arguments.draft_vocab_size}, {shape} tokens of the standard "
        f"library's documentation, {first['loss_mask_share']:.0%} of them in `loss_mask`, "
        f"{first['position_mask_share']:.0%} in `position_mask` (the rows sent), CPU to CPU over "
        f"HTTP. Reference: `probs` with aux states as they are. The gradient is a draft's after "
        f"{arguments.draft_steps} steps.",
        markdown_table(header.split(", "), lines),
        "With `exact=True` each of the three encodings gave the bits of `HFEagle3TargetModel` in "
        "both dtypes, on a full and on a padded batch (asserted by the same run).",
        "Default mode (trimmed) against `exact=True` on right-padded batches of the same shape, "
        f"{first['real_token_share']:.0%} real tokens, largest difference unless it says mean:",
        markdown_table(
            [
                *("target", "probs", "mean KL", "top-1 kept"),
                *("aux, relative per token: median (max)", "aux, absolute", "`position_mask`"),
            ],
            bounds,
        ),
    ]
    return "\n\n".join(text)


def bound_cells(bound: dict[str, float]) -> list[str]:
    median, largest = bound["aux_median_relative_error"], bound["aux_max_relative_error"]
    return [
        *(number(bound["probs_max_error"]), number(bound["mean_kl"]), f"{bound['top1_kept']:.2%}"),
        *(f"{number(median)} ({number(largest)})", number(bound["aux_max_error"])),
        f"{bound['position_mask_differences']} differ, {bound['rows']} common",
    ]


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def cosine_text(value: float) -> str:
    return "1" if value == 1.0 else f"1 - {1 - value:.1e}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="SmolLM2's checkpoint directory, else it is downloaded")
    add("--batches", type=int, default=2)
    add("--batch-size", type=int, default=4)
    add("--sequence-length", type=int, default=256)
    add("--draft-vocab-size", type=int, default=12288)
    add("--draft-steps", type=int, default=10, help="training steps before the gradient is taken")
    add("--docs", type=Path, default=REPOSITORY / "docs" / "encodings.md")
    add("--results", type=Path, default=RESULTS / "fidelity.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
