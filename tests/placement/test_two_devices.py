"""A target on two devices gives what it gives on one, bit for bit, and never mixes them.

The devices are pretended: see `pretended.py`. What a real pair of GPUs adds are their streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from tests.families.full_path import B, T, make_job
from tests.placement.pretended import FIRST, SECOND, Placed, TwoDevices
from torch import Tensor, nn

from eagle3_schemas import DraftVocab
from eagle3_schemas.capture import OUTPUTS
from eagle3_schemas.packing import restarting_positions
from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import HFEagle3TargetModel, TransformersTarget, capturing, head, supervise
from eagle3_server.engine import CaptureJob, DeviceTensors
from eagle3_server.head import HeadUnsupported, RowsHead

V, L = 131, 7
LAYERS = (5, 0, 3)  # on both, in no order
SEQ_LENS = torch.tensor([[30, 40, 7], [50, 27, 0], [77, 0, 0]])


def lay_out(model: nn.Module) -> nn.Module:
    """Embeddings and three layers on the first device, the rest and the head on the second."""
    device_map = {
        "model.embed_tokens": str(FIRST),
        "model.rotary_emb": str(FIRST),
        "model.norm": str(SECOND),
        "lm_head": str(SECOND),
        **{f"model.layers.{i}": str(FIRST if i < 3 else SECOND) for i in range(L)},
    }
    mapped: nn.Module = accelerate.dispatch_model(model, device_map=device_map)
    return mapped


@contextmanager
def two_devices(head_at: torch.device = SECOND) -> Iterator[None]:
    """Where the code asks for an ordinary tensor, or makes one in host memory, it gets a placed."""
    plain = head._is_plain_linear
    with pytest.MonkeyPatch.context() as patch, TwoDevices():
        patch.setattr(head, "_is_plain_linear", lambda m: isinstance(m.weight, Placed) or plain(m))
        for module in (supervise, capturing):
            patch.setattr(
                module,
                "host_zeros",
                lambda shape, dtype: torch.zeros(shape, dtype=dtype).to(head_at),
            )
        yield


@pytest.fixture(scope="module")
def mapped(build_model: Any) -> nn.Module:
    with two_devices():
        return lay_out(build_model("llama"))


@pytest.fixture(scope="module")
def targets(mapped: nn.Module, build_model: Any) -> tuple[TransformersTarget, TransformersTarget]:
    with two_devices():
        target = TransformersTarget(mapped, model_id="tiny")
    return target, TransformersTarget(build_model("llama"), model_id="tiny")


def job_of(**fields: Any) -> Any:
    job = make_job(aux_layer_ids=LAYERS, **fields)
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:53]
    return replace(job, input_ids=job.input_ids % V, draft_vocab=DraftVocab.from_ids(ids))


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in got.items():
        assert isinstance(tensor, Placed), name
        assert tensor.device == FIRST, name
        torch.testing.assert_close(tensor.held, expected[name], rtol=0, atol=0)


def compare(targets: Any, compute: Callable[[TransformersTarget], DeviceTensors]) -> None:
    """What both give must be the same; of two devices, on the first."""
    with two_devices():
        got = compute(targets[0]).tensors
    same(got, compute(targets[1]).tensors)


def test_pretended_devices_refuse_to_meet() -> None:
    with two_devices():
        first, second = torch.ones(3).to(FIRST), torch.ones(3).to(SECOND)
        for combine in (
            lambda: first + second,
            lambda: torch.cat([first, second]),
            lambda: first[torch.ones(3, dtype=torch.bool)],
        ):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                combine()
        assert (first + second.to(FIRST)).device == FIRST
        assert (first + second.to(FIRST)).tolist() == [2, 2, 2]


def test_what_is_found_of_a_target_is_the_same(targets: Any) -> None:
    mapped, whole = (target.describe() for target in targets)
    assert mapped.device == str(FIRST)
    assert mapped.device_name == "2 x cpu"
    assert replace(mapped, device="cpu", device_name="cpu") == whole
    assert (whole.head, whole.packing, whole.outputs) == ("rows", "masked", tuple(OUTPUTS))


def test_what_was_proved_at_load_is_proved_again(targets: Any) -> None:
    for name in SELF_CHECKS:
        with two_devices():
            found = targets[0].self_check(name)
        assert found == targets[1].self_check(name)
        assert found.status == "passed"


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exact": False, "rows": "all", "aux_dtype": "float8_e4m3"},
        {"seq_lens": SEQ_LENS},
        {"seq_lens": SEQ_LENS, "exact": False},
    ],
    ids=["exact", "all-rows-fp8", "packed-exact", "packed"],
)
def test_supervision_is_bit_equal(targets: Any, encoding: str, fields: dict[str, Any]) -> None:
    job = job_of(encoding=encoding, **fields)
    compare(targets, lambda target: target.supervise(job))


def test_the_full_path_is_bit_equal(targets: Any, mapped: nn.Module) -> None:
    def refuse(*_: object) -> RowsHead:
        raise HeadUnsupported("for a test")

    # accelerate brings full logits back to where the ids were.
    with two_devices(head_at=FIRST):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RowsHead, "find", refuse)
            full = TransformersTarget(mapped, model_id="tiny")
        assert full.describe().head == "full"
        got = full.supervise(job_of()).tensors
    same(got, targets[1].supervise(job_of()).tensors)


def test_captured_outputs_are_bit_equal(targets: Any) -> None:
    job = job_of()
    asked = CaptureJob(
        input_ids=job.input_ids,
        attention_mask=job.attention_mask,
        loss_mask=job.loss_mask,
        aux_layer_ids=LAYERS,
        exact=True,
        outputs=tuple(OUTPUTS),
        draft_vocab=job.draft_vocab,
    )
    compare(targets, lambda target: target.capture(asked))


def test_downloads_are_bit_equal_and_on_one_device(targets: Any) -> None:
    vocab = job_of().draft_vocab
    compare(targets, lambda target: target.input_embeddings())
    compare(targets, lambda target: target.draft_head(vocab))
    compare(targets, lambda target: target.target_head())


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_a_co_located_target_is_bit_equal(
    build_model: Any, mapped: nn.Module, is_packed: bool
) -> None:
    job = job_of()
    attention_mask = torch.ones(B, T, dtype=torch.long) if is_packed else job.attention_mask
    inputs = [job.input_ids, attention_mask, job.loss_mask]
    if is_packed:
        inputs += [restarting_positions(SEQ_LENS, T), SEQ_LENS]
    expected = HFEagle3TargetModel(build_model("llama"), LAYERS).generate_batch(*inputs)
    with two_devices():
        target = HFEagle3TargetModel(mapped, LAYERS)
        got = target.generate_batch(*(tensor.to(FIRST) for tensor in inputs))
    for name in ("aux_hidden_states", "logits", "loss_mask"):
        same({name: getattr(got, name)}, {name: getattr(expected, name)})
