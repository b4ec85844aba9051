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
from head_model import ModelShape, draft_vocab, make_batch
from torch import Tensor

from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS, HiddenEncoding
from eagle3_schemas.supervision import pack_bits, shift_left_with_zero
from eagle3_server.engine import DeviceTensors, SupervisionJob, TargetDescription

SHAPE = ModelShape(hidden_size=4096, layers=32, vocab_size=128256, draft_vocab_size=32000)
LENGTH, AUX_LAYER_IDS, DTYPE = 512, (1, 15, 28), torch.bfloat16


class SimulatedTarget:
    """A `Target` whose every supervision takes `seconds`; `hidden` rows of `make_batch` alone."""

    def __init__(self, shape: ModelShape, length: int, seconds: float) -> None:
        self._shape, self._seconds = shape, seconds
        loss_mask = make_batch(shape, length).loss_mask.bool()
        position_mask = shift_left_with_zero(loss_mask)
        tensors = {
            "aux_hidden_states": random(loss_mask.numel(), 3 * shape.hidden_size),
            "position_mask": pack_bits(position_mask),
            "head_input": random(int(position_mask.sum()), shape.hidden_size),
        }
        # This result's own memory, as a GPU's would be: the copy stage copies and sums it.
        self._result = DeviceTensors(tensors)

    def describe(self) -> TargetDescription:
        """Return what is served, as of an 8B Llama."""
        return TargetDescription(
            model_id="simulated",
            revision=None,
            architecture="Simulated",
            fingerprint="0" * 16,
            num_hidden_layers=self._shape.layers,
            hidden_size=self._shape.hidden_size,
            vocab_size=self._shape.vocab_size,
            input_vocab_size=self._shape.vocab_size,
            max_sequence_length=None,
            dtype="bfloat16",
            device="cpu",
            device_name="simulated",
            attn_implementation=None,
            aux_layer_ids=AUX_LAYER_IDS,
            num_threads=torch.get_num_threads(),
            head="rows",
            head_reason=None,
            encodings=("hidden",),
            transform=LogitsTransform(),
        )

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """Sleep; what it returns was made before."""
        time.sleep(self._seconds)
        return self._result

    def input_embeddings(self) -> DeviceTensors:
        """Refuse."""
        raise NotImplementedError("no client of this benchmark asks for embeddings")

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """Return zeros: no client of this benchmark multiplies by them."""
        weight = torch.zeros(draft_vocab.draft_vocab_size, self._shape.hidden_size, dtype=DTYPE)
        return DeviceTensors({"weight": weight}, is_constant=True)


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

    target = SimulatedTarget(shape, arguments.length, arguments.seconds)
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
