r"""Train an EAGLE-3 draft on a target served by ``eagle3-remote serve``.

Complete but small: one process, no resume, no mixed precision. The loss and the loop are in
``training.py``, the draft in ``draft.py``.

    # on the target's host; EAGLE3_TOKEN is a secret of your choice, the same on both hosts
    EAGLE3_TOKEN=... eagle3-remote serve Qwen/Qwen3-8B --host 0.0.0.0 --port 8001

    # on the trainer's host
    EAGLE3_TOKEN=... python examples/train_eagle3.py --urls http://target-host:8001 \
        --tokenizer Qwen/Qwen3-8B --text corpus.txt --steps 1000
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from text import TokenBatch, chunk, every_token, make_batches, tokenize
from training import Metrics, make_trainer, train


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import AutoTokenizer

    from eagle3_client import RemoteEagle3Backend, build_draft_vocab, count_token_ids

    arguments = parse_arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    documents = tokenize((file.read_text(encoding="utf-8") for file in arguments.text), tokenizer)
    batches = make_batches(
        chunk(documents, arguments.sequence_length),
        num_batches=arguments.steps,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        prompt_tokens=arguments.prompt_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        seed=arguments.seed,
    )
    token = os.environ.get("EAGLE3_TOKEN")
    with RemoteEagle3Backend(
        arguments.urls,
        device=arguments.device,
        token=token,
        aux_layer_ids=arguments.aux_layer_ids,
    ) as backend:
        backend.wait_until_ready(arguments.timeout_s)
        info = backend.model_info()
        # Ids of another tokenizer would train a draft all the same, of nothing.
        report = backend.preflight(tokenizer)
        if not report.has_passed:
            print(report)
            sys.exit(1)
        selected_token_ids, selected_token_mask = build_draft_vocab(
            count_token_ids(every_token(documents), info.vocab_size),
            min(arguments.draft_vocab_size, info.vocab_size),
            tokenizer.all_special_ids,
        )
        backend.set_vocab_mapping(selected_token_ids, selected_token_mask)
        config = backend.draft_config()
        trainer = make_trainer(
            backend.get_input_embeddings().weight,
            selected_token_ids,
            selected_token_mask,
            ttt_steps=arguments.ttt_steps,
            seed=arguments.seed,
            device=arguments.device,
        )
        with backend.prefetch(batches, depth="auto") as prefetch:
            train(
                trainer,
                (target_batch for _, target_batch in prefetch),
                steps=arguments.steps,
                learning_rate=arguments.learning_rate,
                on_step=print_each_step(batches),
            )
        print(prefetch.stats)
    if arguments.output is not None:
        # A draft served with other aux layers than these collapses, so the config names them.
        saved = {
            "draft": trainer.draft.state_dict(),
            "selected_token_ids": selected_token_ids,
            "config": config,
        }
        torch.save(saved, arguments.output)
        print(f"saved {arguments.output}")


def print_each_step(batches: Sequence[TokenBatch]) -> Callable[[int, Metrics], None]:
    """Return a callback for `train` that prints one line per step."""
    started, tokens_done = time.perf_counter(), 0

    def report(step: int, metrics: Metrics) -> None:
        nonlocal tokens_done
        tokens_done += int(batches[step - 1].attention_mask.sum())
        tokens_per_s = tokens_done / (time.perf_counter() - started)
        accuracies = " ".join(f"{accuracy:.3f}" for accuracy in metrics.step_accuracies)
        print(
            f"step {step}/{len(batches)}  loss {metrics.loss.item():.4f}  accuracy {accuracies}  "
            f"accept length {metrics.accept_length:.2f}  {tokens_per_s:,.0f} tokens/s",
            flush=True,
        )

    return report


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an EAGLE-3 draft on a target served by `eagle3-remote serve`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--urls", type=lambda text: text.split(","), required=True, help="comma-separated")
    add("--tokenizer", required=True, help="the target's tokenizer: a path or a hub id")
    add("--text", type=Path, nargs="+", required=True, help="UTF-8 files, one document each")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=4, help="sequences per step")
    add("--sequence-length", type=int, default=512, help="tokens per sequence")
    add("--prompt-tokens", type=int, default=0, help="leading tokens without supervision")
    add("--draft-vocab-size", type=int, default=32000)
    add(
        "--aux-layer-ids",
        type=lambda text: tuple(map(int, text.split(","))),
        help="three layers, outputs, as 0,2,4; the server's default if not given",
    )
    add("--ttt-steps", type=int, default=3, help="tokens drafted in a row while training")
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timeout-s", type=float, default=600, help="how long to wait for the server")
    add("--output", type=Path, help="where to save the draft; not saved without it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
