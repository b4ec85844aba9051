"""What a quantised target changes on the real SmolLM2-135M-Instruct, and in a draft trained on it.

The table goes between the markers in ``docs/operations.md``. One small draft is trained on each
target with the same seed and batches, and then evaluated on held-out text with the float32 target's
supervision. Run as ``python benchmarks/quantised.py`` with bitsandbytes, torchao and
compressed-tensors installed; ten minutes on two idle cores.

SmolLM2's weights come from a Q4_1 GGUF file, so they lie on a 4-bit grid of their own already:
float32 here is that file expanded, not the model as it was trained.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from common import (
    REPOSITORY,
    add_output_options,
    caption,
    insert,
    markdown_table,
    provenance,
    publish,
)
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from eagle3_client import build_draft_vocab, count_token_ids
from eagle3_schemas import Eagle3TargetBatch, project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel, ServerSettings
from eagle3_server.loading import load_target
from smollm2 import download_gguf, smollm2_checkpoint
from text import (
    HELD_OUT_MODULES,
    TRAINING_MODULES,
    chunk,
    every_token,
    make_batches,
    module_documents,
    tokenize,
)
from training import evaluate, make_trainer, train

sys.path.insert(0, str(REPOSITORY))  # a checkpoint as compressed-tensors lays it is a test's too
from tests.quantised.checkpoints import save_compressed

BEGIN, END = "<!-- quantised: begin, generated -->", "<!-- quantised: end -->"
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bnb-nf4": {"dtype": "float32", "quantization": "bnb-nf4"},
    "bnb-int8": {"dtype": "float32", "quantization": "bnb-int8"},
    "torchao-int8": {"dtype": "float32", "quantization": "torchao-int8"},
    "compressed-tensors w8a8": {"dtype": "float32"},  # a checkpoint of its own
    "gguf": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(words)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    made = provenance("quantised.py", words)
    checkpoint = arguments.checkpoint or smollm2_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    training, held_out = (
        tokenize(chain.from_iterable(map(module_documents, modules)), tokenizer)
        for modules in (TRAINING_MODULES, HELD_OUT_MODULES)
    )
    sizes = {"batch_size": arguments.batch_size, "sequence_length": arguments.sequence_length}
    pieces, others = (chunk(each, arguments.sequence_length) for each in (training, held_out))
    batches = make_batches(pieces, num_batches=arguments.steps, **sizes)
    tests = make_batches(others, num_batches=arguments.test_batches, **sizes)
    results: dict[str, Any] = {"provenance": made, "targets": {}}
    vocab: tuple[Tensor, Tensor] | None = None
    reference: list[Eagle3TargetBatch] = []
    reference_losses: list[float] = []
    for name in arguments.forms.split(","):
        started = time.perf_counter()
        path = checkpoint_of(name, checkpoint, arguments.scratch)
        target = load_target(ServerSettings(model=str(path), device="cpu", **FORMS[name]))
        model, described = target._model, target.describe()
        local = HFEagle3TargetModel(model)
        if vocab is None:
            counts = count_token_ids(every_token(training), described.vocab_size)
            vocab = build_draft_vocab(counts, arguments.draft_vocab_size, tokenizer.all_special_ids)
        got = [projected(local, batch, vocab) for batch in tests]
        if not reference:
            reference = got
        trainer = make_trainer(
            local.get_input_embeddings().weight, *vocab, ttt_steps=3, seed=arguments.seed
        )
        losses = train(
            trainer,
            (projected(local, batch, vocab) for batch in batches),
            steps=arguments.steps,
            learning_rate=2e-3,
        )
        reference_losses = reference_losses or losses
        against = evaluate(trainer, reference)
        tail = max(1, len(losses) // 10)
        results["targets"][name] = {
            "quantization": described.quantization,
            "encodings": described.encodings,
            "can_trim": target._runner.can_trim,
            "weights_mib": weight_bytes(model) / 2**20,
            "losses": losses,
            "last_losses": sum(losses[-tail:]) / tail,
            "largest_step_difference": max(
                abs(a - b) for a, b in zip(losses, reference_losses, strict=True)
            ),
            "loss_on_own_supervision": evaluate(trainer, got).loss.item(),
            "loss_on_float32_supervision": against.loss.item(),
            "accept_length_on_float32": against.accept_length,
            **compare(got, reference),
            **padding(local, others, vocab, sizes),
            "seconds": time.perf_counter() - started,
        }
        parts = tables(results, arguments)  # after each: what follows may fail, or take too long
        publish(arguments.out, "quantised", "Quantised targets", results, parts)
    insert(arguments.docs, "\n\n".join([caption(made), *parts]), BEGIN, END)
    return 0


def checkpoint_of(name: str, plain: Path, scratch: Path) -> Path:
    """Return what a form is loaded from, made in `scratch` if it is not there."""
    if name == "gguf":
        scratch.mkdir(parents=True, exist_ok=True)
        found = list(scratch.rglob("*.gguf"))
        return found[0] if found else download_gguf(scratch)
    if name.startswith("compressed"):
        path = scratch / "compressed"
        scratch.mkdir(parents=True, exist_ok=True)
        return path if path.exists() else save_compressed(plain, path, "token")
    return plain


def projected(
    local: HFEagle3TargetModel, batch: Any, vocab: tuple[Tensor, Tensor]
) -> Eagle3TargetBatch:
    """Return the co-located target's batch with draft-vocab supervision, as a server sends it."""
    answer = local.generate_batch(*batch)
    assert answer.logits is not None
    probs, mask = project_to_draft_vocab(answer.logits, *vocab, answer.loss_mask)
    return Eagle3TargetBatch(
        aux_hidden_states=answer.aux_hidden_states.float(),
        input_ids=answer.input_ids,
        attention_mask=answer.attention_mask,
        loss_mask=answer.loss_mask,
        target_probs=probs,
        position_mask=mask,
    )


def compare(got: list[Eagle3TargetBatch], reference: list[Eagle3TargetBatch]) -> dict[str, float]:
    """Return how supervision differs: KL and top-1 where both supervise, masks, aux states."""
    kl, top, rows, differ, wanted, aux = 0.0, 0, 0, 0, 0, []
    for ours, theirs in zip(got, reference, strict=True):
        a, b = ours.position_mask.squeeze(-1), theirs.position_mask.squeeze(-1)
        both = a & b
        p, q = theirs.target_probs[both].double(), ours.target_probs[both].double()
        kl += float((p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum())
        top += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows += int(both.sum())
        differ += int((a ^ b).sum())
        wanted += int(ours.loss_mask.bool().sum())
        attended = ours.attention_mask.bool()
        x, y = ours.aux_hidden_states[attended], theirs.aux_hidden_states[attended]
        aux.append(((x - y).norm(dim=-1) / y.norm(dim=-1)).flatten())
    return {
        "mean_kl": kl / rows,
        "top1_kept": top / rows,
        "position_mask_agreement": 1 - differ / wanted,
        "aux_median_relative_error": float(torch.cat(aux).median()),
    }


def padding(
    local: HFEagle3TargetModel, pieces: Any, vocab: tuple[Tensor, Tensor], sizes: dict[str, int]
) -> dict[str, float]:
    """Return how far a batch's supervision moves when a quarter more columns of padding come."""
    length = sizes["sequence_length"]
    short = [piece for piece in pieces if len(piece) <= length - length // 4]
    (batch,) = make_batches(short, num_batches=1, **sizes)
    used = length - length // 4
    cut = projected(local, [tensor[:, :used] for tensor in batch], vocab)
    whole = projected(local, batch, vocab)
    names = ("aux_hidden_states", "input_ids", "attention_mask", "loss_mask")
    names += ("target_probs", "position_mask")
    same = Eagle3TargetBatch(**{name: getattr(whole, name)[:, :used] for name in names})
    found = compare([cut], [same])
    return {f"padding_{name}": value for name, value in found.items()}


def weight_bytes(model: Any) -> int:
    """Return what the parameters take, those that are several tensors included."""
    total = 0
    for parameter in model.parameters():
        data = parameter.data
        names = data.__tensor_flatten__()[0] if hasattr(data, "__tensor_flatten__") else []
        total += sum(getattr(data, name).nbytes for name in names) or data.nbytes
    return total


def tables(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    reference = next(iter(results["targets"].values()))
    rows = []
    for name, found in results["targets"].items():
        keys = ("last_losses", "loss_on_float32_supervision")
        differences = {key: found[key] - reference[key] for key in keys}
        rows.append(
            [
                f"`{name}`",
                f"{found['weights_mib']:.0f}",
                f"{found['last_losses']:.4f} ({differences['last_losses']:+.4f})",
                f"{found['largest_step_difference']:.4f}",
                f"{found['loss_on_float32_supervision']:.4f} "
                f"({differences['loss_on_float32_supervision']:+.4f})",
                f"{found['accept_length_on_float32']:.3f}",
                f"{found['mean_kl']:.2g}",
                f"{found['top1_kept']:.2%}",
                f"{found['position_mask_agreement']:.2%}",
                f"{found['aux_median_relative_error']:.2%}",
                f"{found['padding_mean_kl']:.2g}",
                "yes" if found["can_trim"] else "no",
            ]
        )
    header = [
        "target", "weights, MiB", "training loss (difference)", "largest of a step",
        "held-out loss on float32's supervision (difference)", "accept length", "mean KL",
        "top-1 kept", "`position_mask` equal", "aux error, median", "KL by padding", "trimmed",
    ]  # fmt: skip
    return [
        f"SmolLM2-135M-Instruct, whose weights are a Q4_1 GGUF file expanded; the same draft, seed "
        f"and {arguments.steps} batches of {arguments.batch_size} x {arguments.sequence_length} "
        f"tokens on each target, D = {arguments.draft_vocab_size}, 3 steps of test-time training. "
        "Training loss: mean of the last tenth. The draft is then given held-out text with the "
        "float32 target's states and supervision. KL, top-1, mask and aux: each target's held-out "
        "supervision against float32's. KL by padding: the same batch with and without a third "
        "more columns of padding.",
        markdown_table(header, rows),
    ]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_options(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="SmolLM2's checkpoint directory, else it is downloaded")
    add("--docs", type=Path, default=REPOSITORY / "docs" / "operations.md", help="gets the table")
    add("--scratch", type=Path, default=REPOSITORY / ".cache" / "quantised")
    add("--steps", type=int, default=40)
    add("--test-batches", type=int, default=4)
    add("--batch-size", type=int, default=4)
    add("--sequence-length", type=int, default=128)
    add("--draft-vocab-size", type=int, default=4096)
    add("--seed", type=int, default=0)
    add("--forms", default=",".join(FORMS), help="the first is what the others are compared with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
