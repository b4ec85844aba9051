"""One trainer of the end-to-end benchmark, in a process of its own; `end_to_end.py` starts it.

It asks for one batch at a time, when its parent says so, and measures itself. Two are none: `bare`
is the same supervision called in a loop, without any server; `floor` is what nothing that uses this
backbone can do without, its forward and one matmul of the supervised rows by the full vocab.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from children import answer_commands, tcp_bytes, tcp_bytes_since
from common import in_flight
from simulated import rebuild_elsewhere
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab, Eagle3TargetBatch
from eagle3_server import TransformersTarget
from eagle3_server.allocator import keep_freed_memory
from eagle3_server.engine import SupervisionJob

PATHS = ("peer", "peer-colocated", "ours", "bare", "floor")
Batch = tuple[Tensor, Tensor, Tensor]


class Trainer:
    """The commands of `end_to_end.py`; each returns what JSON can carry."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._batches: dict[str, list[Batch]] = torch.load(arguments.batches)
        self._vocab: tuple[Tensor, Tensor] | None = None
        self._backend: Any = None
        self._logits: Tensor | None = None
        if arguments.path == "ours":
            self._backend = RemoteEagle3Backend(
                arguments.url,
                encoding=arguments.encoding,
                exact=arguments.exact,
                timeout_s=600,
                retry_for_s=10,
            )
        elif arguments.path == "peer":
            from nemo_automodel.components.speculative.eagle.remote import RemoteEagle3TargetModel

            self._backend = RemoteEagle3TargetModel.from_urls([arguments.url], device="cpu")
        else:
            disable_progress_bar()
            self._model = AutoModelForCausalLM.from_pretrained(
                arguments.checkpoint, dtype=torch.float32
            )

    def set_vocab(self, file: str) -> None:
        """Use the draft vocab saved in a file."""
        self._vocab = torch.load(file)
        if self._backend is not None:
            self._backend.set_vocab_mapping(*self._vocab)
        elif self._arguments.path == "bare":
            self._target = TransformersTarget(self._model, model_id="bare")
        elif self._arguments.path == "peer-colocated":
            from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel

            ids = self._arguments.aux_layer_ids
            self._colocated = HFEagle3TargetModel(self._model, aux_layer_ids=ids)

    def top_ids(self, file: str) -> None:
        """Save the ids this process's target puts first anywhere in the batches."""
        with torch.no_grad():
            found = [
                self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
                for ids, mask, _ in next(iter(self._batches.values()))
            ]
        torch.save(torch.cat(found).unique(), file)

    def run(self, level: str, index: int) -> dict[str, float]:
        """Get one batch: seconds, and bytes on the wire in both directions."""
        batch, before = self._batches[level][index], tcp_bytes()
        started = time.perf_counter()
        answer = self._supervise(batch)
        seconds = time.perf_counter() - started
        sent, received = tcp_bytes_since(before)
        del answer
        return {"seconds": seconds, "sent": sent, "received": received}

    def stream(self, level: str, count: int, depth: int) -> dict[str, float]:
        """Get `count` batches after the first `depth`, `depth` in flight: seconds for each.

        The first ones are sent at once and may overtake each other, so the time between their
        deliveries says nothing.
        """
        batches = self._batches[level]
        wanted = [batches[i % len(batches)] for i in range(count + depth)]
        answers: Iterable[object]
        if self._backend is None:
            answers = map(self._supervise, wanted)
        else:
            answers = in_flight(self._backend, wanted, depth)
        times = [time.perf_counter() for _ in answers]
        return {"seconds": (times[-1] - times[depth - 1]) / count}

    def save(self, level: str, index: int, file: str) -> None:
        """Save a batch's aux states, position mask and the probabilities it marks."""
        batch = self._batches[level][index]
        answer: Eagle3TargetBatch = self._supervise(batch)
        assert answer.position_mask is not None
        assert answer.target_probs is not None
        kept = {
            "aux_hidden_states": answer.aux_hidden_states[batch[1].bool()],
            "position_mask": answer.position_mask,
            "target_probs": answer.target_probs[answer.position_mask.squeeze(-1)],
        }
        torch.save(kept, file)

    def _supervise(self, batch: Batch) -> Any:
        if self._backend is not None:
            return self._backend.generate_batch(*batch)
        assert self._vocab is not None
        if self._arguments.path == "bare":
            return self._target.supervise(self._job(batch))
        if self._arguments.path == "floor":
            return self._floor(batch)
        from nemo_automodel.components.speculative.eagle import core

        answer = self._colocated.generate_batch(*batch)
        projected = core._compute_target_distribution(answer.logits, *self._vocab, answer.loss_mask)
        return answer, projected

    @torch.no_grad()
    def _floor(self, batch: Batch) -> Tensor:
        input_ids, attention_mask, loss_mask = batch
        states = self._model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        rows = states[:, :-1][loss_mask[:, 1:].bool()]
        weight = self._model.get_output_embeddings().weight
        shape = (rows.shape[0], weight.shape[0])
        if self._logits is None or self._logits.shape != shape:
            self._logits = torch.zeros(shape)  # used again: it pays for no page faults
        return torch.mm(rows, weight.T, out=self._logits)

    def _job(self, batch: Batch) -> SupervisionJob:
        assert self._vocab is not None
        return SupervisionJob(
            input_ids=batch[0],
            attention_mask=batch[1].bool(),
            loss_mask=batch[2].bool(),
            aux_layer_ids=tuple(self._arguments.aux_layer_ids),
            draft_vocab=DraftVocab.from_ids(*self._vocab),
            encoding=self._arguments.encoding,
            rows="position_mask",
            aux_dtype="model",
            exact=self._arguments.exact,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=PATHS, required=True)
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--aux-layer-ids", type=int, nargs=3, required=True)
    parser.add_argument("--url")
    parser.add_argument("--encoding", default="auto")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--rebuild-elsewhere", action="store_true")
    arguments = parser.parse_args()
    if arguments.path in ("bare", "floor"):
        keep_freed_memory()  # as `serve` does
    if arguments.rebuild_elsewhere:
        rebuild_elsewhere()
    trainer = Trainer(arguments)
    names = ("set_vocab", "top_ids", "run", "stream", "save")
    commands: dict[str, Callable[..., object]] = {name: getattr(trainer, name) for name in names}
    answer_commands(commands)


if __name__ == "__main__":
    main()
