"""A first remote EAGLE-3 training run on real text, compared with the same run co-located.

Starts ``eagle3-remote serve`` on SmolLM2-135M-Instruct as a process of its own, trains a small
draft against it, trains the same draft with the target in this process, and reports. ``make demo``
runs it; ``--help`` lists what can be made smaller.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

# Trainer and server share the cores. OpenMP's waiting threads spin by default, and so would take
# the cores from the other process. Read once, when torch loads; the server inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo_report import DemoReport
from eagle3_client import RemoteEagle3Backend, build_draft_vocab, count_token_ids
from eagle3_schemas import Eagle3TargetBackend
from eagle3_server import HFEagle3TargetModel
from served_target import served_target
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
from training import Eagle3Trainer, Metrics, evaluate, make_trainer, supervise, train

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Data:
    """Everything made from text, the same for both runs."""

    training_batches: list[TokenBatch]
    held_out_batches: list[TokenBatch]
    training_documents: list[list[int]]
    special_token_ids: list[int]

    @property
    def training_tokens(self) -> int:
        """Real (unpadded) tokens in the training batches."""
        return sum(int(batch.attention_mask.sum()) for batch in self.training_batches)


@dataclass(frozen=True)
class Run:
    """One training run."""

    losses: list[float]
    seconds: float
    response_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0 when the losses are equal."""
    arguments = parse_arguments(argv)
    # A plain kill ends this process like an exception, so that the server is stopped as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    disable_progress_bar()  # of loading weights; it garbles output that is not a terminal
    torch.set_num_threads(arguments.threads)
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.model or smollm2_checkpoint()

    started = time.perf_counter()
    data = prepare_data(checkpoint, arguments)
    say("starting the target server")
    log_file = arguments.report_dir / "server.log"
    with (
        served_target(checkpoint, log_file=log_file, threads=arguments.threads) as url,
        RemoteEagle3Backend(url, device="cpu", exact=True) as backend,
    ):
        say(f"target ready at {url} after {time.perf_counter() - started:.0f} s")
        vocab_size = backend.model_info().vocab_size
        draft_vocab = build_draft_vocab(
            count_token_ids(every_token(data.training_documents), vocab_size),
            min(arguments.draft_vocab_size, vocab_size),
            data.special_token_ids,
        )
        backend.set_vocab_mapping(*draft_vocab)
        held_out = list(supervise(backend, data.held_out_batches))
        trainer = new_trainer(backend, draft_vocab, arguments)
        before = evaluate(trainer, held_out)
        remote = run(trainer, backend, data, arguments, "remote")
        after = evaluate(trainer, held_out)

    target = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    colocated_backend = HFEagle3TargetModel(target)
    trainer = new_trainer(colocated_backend, draft_vocab, arguments)
    colocated = run(trainer, colocated_backend, data, arguments, "co-located")

    report = DemoReport(
        target=checkpoint.name if arguments.model else "SmolLM2-135M-Instruct",
        vocab_size=vocab_size,
        draft_vocab_size=len(draft_vocab[0]),
        threads=arguments.threads,
        tokens=data.training_tokens,
        remote_losses=remote.losses,
        colocated_losses=colocated.losses,
        remote_tokens_per_s=data.training_tokens / remote.seconds,
        colocated_tokens_per_s=data.training_tokens / colocated.seconds,
        response_bytes_per_token=remote.response_bytes / data.training_tokens,
        held_out_tokens=int(after.supervised[0]),
        held_out_loss_start=before.loss.item(),
        held_out_loss_end=after.loss.item(),
        step_accuracies=after.step_accuracies,
        accept_length=after.accept_length,
        coverage=after.coverage,
        seconds=time.perf_counter() - started,
    )
    print("\n" + report.summary())
    for file in report.save(arguments.report_dir):
        print(f"{'saved':<24} {file}")
    return 0 if report.losses_equal else 1


def prepare_data(checkpoint: Path, arguments: argparse.Namespace) -> Data:
    """Turn the standard library's documentation into batches of the target's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    training, held_out = (
        tokenize(chain.from_iterable(map(module_documents, modules)), tokenizer)
        for modules in (TRAINING_MODULES, HELD_OUT_MODULES)
    )

    def batches(documents: list[list[int]], num_batches: int) -> list[TokenBatch]:
        return make_batches(
            chunk(documents, arguments.sequence_length),
            num_batches=num_batches,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            pad_token_id=tokenizer.pad_token_id or 0,
            seed=arguments.seed,
        )

    return Data(
        training_batches=batches(training, arguments.steps),
        held_out_batches=batches(held_out, arguments.held_out_batches),
        training_documents=training,
        special_token_ids=tokenizer.all_special_ids,
    )


def new_trainer(
    backend: Eagle3TargetBackend, draft_vocab: tuple[Tensor, Tensor], arguments: argparse.Namespace
) -> Eagle3Trainer:
    """Return a trainer that starts from the same weights in every run."""
    return make_trainer(
        backend.get_input_embeddings().weight,
        *draft_vocab,
        ttt_steps=arguments.ttt_steps,
        seed=arguments.seed,
    )


def run(
    trainer: Eagle3Trainer,
    backend: Eagle3TargetBackend,
    data: Data,
    arguments: argparse.Namespace,
    description: str,
) -> Run:
    """Train on every training batch, with a progress bar."""
    bytes_before, started = response_bytes(backend), time.perf_counter()
    with progress(f"training, {description}", arguments.steps) as on_step:
        losses = train(
            trainer,
            supervise(backend, data.training_batches),
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            on_step=on_step,
        )
    seconds = time.perf_counter() - started
    return Run(losses, seconds, response_bytes(backend) - bytes_before)


def response_bytes(backend: Eagle3TargetBackend) -> int:
    """Return the response body bytes a backend has received so far; a local one receives none."""
    return backend.bytes_received if isinstance(backend, RemoteEagle3Backend) else 0


@contextmanager
def progress(description: str, steps: int) -> Iterator[Callable[[int, Metrics], None]]:
    """Yield a callback that shows a bar on a terminal, and about ten lines elsewhere."""
    if not sys.stdout.isatty():

        def print_some(step: int, metrics: Metrics) -> None:
            if step == 1 or step == steps or step % max(1, steps // 10) == 0:
                say(f"{description}: step {step}/{steps}, loss {metrics.loss.item():.4f}")

        yield print_some
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    loss_column = TextColumn("loss {task.fields[loss]:.4f}")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), loss_column, Remaining())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=steps, loss=float("nan"))
        yield lambda step, metrics: bar.update(task, completed=step, loss=metrics.loss.item())


def say(message: str) -> None:
    """Print at once, also into a pipe."""
    print(message, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an EAGLE-3 draft on a served target and co-located; compare and report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="another target's checkpoint directory, with its tokenizer")
    add("--steps", type=int, default=48, help="training steps")
    add("--batch-size", type=int, default=2, help="sequences per step")
    add("--sequence-length", type=int, default=128, help="tokens per sequence")
    add("--held-out-batches", type=int, default=12)
    add("--draft-vocab-size", type=int, default=4096)
    add("--ttt-steps", type=int, default=3, help="tokens drafted in a row while training")
    add("--learning-rate", type=float, default=2e-3)
    add("--threads", type=int, default=torch.get_num_threads(), help="trainer and server each")
    add("--seed", type=int, default=0)
    add("--report-dir", type=Path, default=REPOSITORY / "demo-report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
