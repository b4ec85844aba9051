"""A target in two processes: what it serves, how it idles, and torchrun."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel.conftest import PATIENCE_S, TIMEOUT_S, D, GroupServer, V
from tests.ports import free_port

from eagle3_client import RemoteEagle3Error
from eagle3_schemas import pack_sequences
from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import HFEagle3TargetModel, TransformersTarget

pytestmark = pytest.mark.slow


def test_it_serves_what_one_process_does(
    group_server: GroupServer, backend: Any, model: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """Against a co-located target: within rounding; what is gathered, bit for bit."""
    client = backend(group_server.url)
    info = client.model_info()
    whole = TransformersTarget(model, model_id=info.model_id).describe()
    assert info.fingerprint == whole.fingerprint, "a group and one process may share a fleet"
    assert info.device_name == "2 x cpu"
    assert info.encodings == ("probs", "logits", "hidden")
    assert info.head == "rows"
    is_split = "--cp" in group_server.process.args
    assert info.packing == ("documents" if is_split else "masked")
    assert dict(info.outputs).keys() == set(whole.outputs)
    local, ids = HFEagle3TargetModel(model), frequency_ordered(V, D)
    for left in (False, True):
        inputs = batch_of(V, (41, 32, 5), left=left)
        expected = local.generate_batch(*inputs)
        assert expected.logits is not None
        attended = inputs.attention_mask.bool()
        for encoding in info.encodings:
            got = backend(client._settings.urls, encoding=encoding).generate_batch(*inputs)
            difference = got.aux_hidden_states - expected.aux_hidden_states
            scale = expected.aux_hidden_states[attended].square().mean().sqrt()
            assert difference[attended].abs().max() <= 1e-5 * scale
            assert not got.aux_hidden_states[~attended].any()
            probs = torch.softmax(expected.logits[..., ids], -1)
            mask = got.position_mask[..., 0]
            assert mask.any()
            assert (got.target_probs[mask] - probs[mask]).abs().max() <= 1e-5
            top = expected.logits.argmax(-1)
            is_in = torch.isin(top, ids) & expected.loss_mask.bool()
            assert torch.equal(mask, is_in)
    assert torch.equal(client.get_input_embeddings().weight, model.model.embed_tokens.weight)
    head = client.get_target_head()
    assert torch.equal(head.weight, model.lm_head.weight)
    assert head.norm is not None


def test_captures_packed_rows_and_exact_are_served_too(
    group_server: GroupServer, backend: Any, model: Any, batch_of: Any
) -> None:
    url = group_server.url
    client, inputs = backend(url), batch_of(V, (41, 32, 5))
    got = client.capture(*inputs, outputs=("last_hidden", "argmax", "logsumexp"))
    with torch.no_grad():
        out = model(inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False,
                    output_hidden_states=True)  # fmt: skip
    attended = inputs.attention_mask.bool()
    torch.testing.assert_close(
        got.last_hidden[attended], out.hidden_states[-1][attended], rtol=1e-4, atol=1e-4
    )
    documents = [torch.randint(1, V, (n,)) for n in (7, 45, 9, 1)]
    packed = pack_sequences(documents, [torch.ones_like(each) for each in documents])
    for exact in (False, True):
        batch = backend(url, exact=exact).generate_batch(**packed)
        again = backend(url, exact=exact).generate_batch(**packed)
        assert torch.equal(batch.aux_hidden_states, again.aux_hidden_states)
        start = 0
        for each in documents:
            alone = client.generate_batch(
                each[None], torch.ones_like(each)[None], torch.ones_like(each)[None]
            )
            torch.testing.assert_close(
                batch.aux_hidden_states[:, start : start + len(each)], alone.aux_hidden_states,
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip
            start += len(each)


def test_a_group_repeats_its_checks_and_serves_on(
    group_server: GroupServer, backend: Any, batch_of: Any
) -> None:
    client = backend(group_server.url)
    batch = batch_of(V)
    before = client.generate_batch(*batch)
    found = client.self_check()
    assert [each.name for each in found] == list(SELF_CHECKS)
    assert {each.status for each in found} == {"passed"}, found
    assert client.model_info().hooks == "verified"
    after = client.generate_batch(*batch)
    assert torch.equal(after.aux_hidden_states, before.aux_hidden_states)


def test_an_error_of_every_rank_is_the_clients_and_the_group_goes_on(
    group_server: GroupServer, backend: Any, batch_of: Any
) -> None:
    client = backend(group_server.url, exact=True, encoding="hidden")
    small = batch_of(V, (5,))
    with pytest.raises(RemoteEagle3Error, match="needs a CPU target and a batch of at least 16"):
        client.generate_batch(*small)  # raised in the target, on both ranks
    client.generate_batch(*batch_of(V))


def test_it_idles_for_twice_its_timeout_and_serves(
    group_server: GroupServer, backend: Any, batch_of: Any
) -> None:
    client = backend(group_server.url)
    first = client.generate_batch(*batch_of(V))
    time.sleep(2 * TIMEOUT_S)  # what is tested is that time passes
    assert torch.equal(
        client.generate_batch(*batch_of(V)).aux_hidden_states, first.aux_hidden_states
    )


def test_torchruns_variables_are_honoured(checkpoint: Path, backend: Any, batch_of: Any) -> None:
    """Two commands as two hosts would run them."""
    here = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here["MASTER_PORT"] = str(free_port())
    command = [checkpoint, "--tp", 2, "--device", "cpu", "--port", 0]
    follower = subprocess.Popen(
        [*GroupServer.command(), *map(str, command)], env={**here, "RANK": "1"},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    leader = GroupServer(*command, **{**here, "RANK": "0"})
    try:
        backend(leader.url).generate_batch(*batch_of(V))
        leader.process.terminate()
        assert leader.ended() == 0, leader.said
        assert follower.wait(PATIENCE_S) == 0
    finally:
        follower.kill()
        follower.wait()
        leader.close()
