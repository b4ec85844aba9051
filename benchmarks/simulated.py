"""A simulated GPU at the dimensions of an 8B model: supervision that takes a fixed time and no CPU.

A forward is a sleep, which releases the GIL as waiting for a GPU does; its results are tensors of
the right shapes, made before. Run as a script it serves one by ours or by the peer's server.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
from children import LOOPBACK
from fixed_target import Dimensions, FixedTarget
from head_model import ModelShape, Vocab, draft_vocab, make_batch
from torch import Tensor

from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.encodings import ENCODINGS, HiddenEncoding
from eagle3_schemas.supervision import shift_left_with_zero
from eagle3_server.engine import SupervisionJob
from text import TokenBatch

SHAPE = ModelShape(hidden_size=4096, layers=32, vocab_size=128256, draft_vocab_size=32000)
LENGTH, AUX_LAYER_IDS, DTYPE = 512, (1, 15, 28), torch.bfloat16


def simulated_target(shape: ModelShape, seconds: float) -> FixedTarget:
    """Return a target of a shape whose every supervision takes `seconds`."""
    sizes = (shape.hidden_size, shape.layers, shape.vocab_size, shape.draft_vocab_size)
    return FixedTarget(Dimensions(*sizes), seconds)


def simulated_job(batch: TokenBatch, vocab: Vocab) -> SupervisionJob:
    """Return a batch as the server's job."""
    return SupervisionJob(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.bool(),
        loss_mask=batch.loss_mask.bool(),
        aux_layer_ids=AUX_LAYER_IDS,
        draft_vocab=DraftVocab.from_ids(*vocab),
        encoding="hidden",
        rows="position_mask",
        aux_dtype="model",
        exact=False,
    )


class RebuiltElsewhere(HiddenEncoding):
    """`hidden` on a trainer whose GPU rebuilds the rows in a millisecond: here they stay as sent.

    On this CPU the matmul would take seconds, and would measure the trainer instead of the wire.
    """

    def decode(self, rows: Tensor, head: DraftHead | None) -> Tensor:
        """Return no columns; what follows has nothing to spread."""
        return torch.empty(rows.shape[0], 0)


def rebuild_elsewhere() -> None:
    """Let this process's clients rebuild nothing."""
    ENCODINGS["hidden"] = RebuiltElsewhere()


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DTYPE)


def serve_ours(shape: ModelShape, arguments: argparse.Namespace) -> None:
    """Run our app as `eagle3-remote serve` does, on the simulated target."""
    from unittest import mock

    from eagle3_server import ServerSettings, serve

    target = simulated_target(shape, arguments.seconds)
    with mock.patch.object(serve, "load_target", return_value=target):
        serve.serve(ServerSettings(model="simulated", port=arguments.port))


def serve_peer(shape: ModelShape, arguments: argparse.Namespace) -> None:
    """Run the peer's server on a target with its logits ready; shifting them is simulated too."""
    from nemo_automodel.components.speculative.eagle.remote import server
    from nemo_automodel.components.speculative.eagle.target import Eagle3TargetBatch

    batch = make_batch(shape, arguments.length)
    size = tuple(batch.input_ids.shape)
    shifted = {
        "input_ids": shift_left_with_zero(batch.input_ids),
        "loss_mask": shift_left_with_zero(batch.loss_mask),
    }
    aux = random(*size, 3 * shape.hidden_size)
    logits = random(1, 1, shape.vocab_size).expand(*size, -1).contiguous()

    def generate_batch(input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Any:
        time.sleep(arguments.seconds)
        return Eagle3TargetBatch(
            aux_hidden_states=aux, logits=logits, attention_mask=attention_mask, **shifted
        )

    if arguments.path == "peer":  # its projection to the draft vocab, on a GPU part of the sleep
        ids, mask = draft_vocab(shape)
        ready = server._compute_target_distribution(logits, ids, mask, shifted["loss_mask"])
        server._compute_target_distribution = lambda **_: ready
    target = SimpleNamespace(generate_batch=generate_batch, aux_layer_ids=list(AUX_LAYER_IDS))
    logic = server.TargetModelServer(target, nccl_port=0)
    server.serve(logic, LOOPBACK, arguments.port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ModelShape.add_to(parser)
    parser.add_argument("--path", choices=("ours", "peer", "peer-projecting"), required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    shape = ModelShape(**{name: getattr(arguments, name) for name in vars(ModelShape())})
    (serve_ours if arguments.path == "ours" else serve_peer)(shape, arguments)


if __name__ == "__main__":
    main()
