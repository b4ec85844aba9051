"""A target in two processes: what it serves, how it idles, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel.conftest import PATIENCE_S, TIMEOUT_S, GroupServer

from eagle3_client import RemoteEagle3Backend, RemoteEagle3Error
from eagle3_schemas import pack_sequences
from eagle3_server import HFEagle3TargetModel, TransformersTarget

pytestmark = pytest.mark.slow

V, D = 131, 53


@pytest.fixture
def backend(mapping: Any, frequency_ordered: Any) -> Any:
    """`backend(url)`: a client with a draft vocab."""
    made: list[RemoteEagle3Backend] = []

    def build(url: str, **kwargs: Any) -> RemoteEagle3Backend:
        client = RemoteEagle3Backend(url, **kwargs)
        made.append(client)
        client.set_vocab_mapping(*mapping(frequency_ordered(V, D), V))
        return client

    yield build
    for client in made:
        client.close()


@pytest.fixture
def model(checkpoint: Path) -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()


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
    assert info.packing == "masked"
    assert dict(info.outputs).keys() == set(whole.outputs)
    local, ids = HFEagle3TargetModel(model), frequency_ordered(V, D)
    for left in (False, True):
        inputs = batch_of(V, (12, 9, 5), left=left)
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
    client, inputs = backend(url), batch_of(V)
    got = client.capture(*inputs, outputs=("last_hidden", "argmax", "logsumexp"))
    with torch.no_grad():
        out = model(inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False,
                    output_hidden_states=True)  # fmt: skip
    attended = inputs.attention_mask.bool()
    torch.testing.assert_close(
        got.last_hidden[attended], out.hidden_states[-1][attended], rtol=1e-4, atol=1e-4
    )
    documents = [torch.randint(1, V, (n,)) for n in (7, 4, 9)]
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


def test_an_error_of_every_rank_is_the_clients_and_the_group_goes_on(
    group_server: GroupServer, backend: Any, batch_of: Any
) -> None:
    client = backend(group_server.url, exact=True, encoding="hidden")
    small = batch_of(V, (5,))
    with pytest.raises(RemoteEagle3Error, match="needs a CPU target and a batch of at least 16"):
        client.generate_batch(*small)  # raised in the target, on both ranks
    client.generate_batch(*batch_of(V))


@pytest.mark.timeout(600)
def test_it_starts_and_stops_five_times_in_a_row(
    serve_group: Any, backend: Any, batch_of: Any
) -> None:
    for _ in range(int(os.environ.get("EAGLE3TEST_GROUPS", "5"))):
        server: GroupServer = serve_group()
        backend(server.url).generate_batch(*batch_of(V))
        server.process.terminate()
        assert server.ended() == 0, server.said


def test_it_idles_for_twice_its_timeout_and_serves(
    group_server: GroupServer, backend: Any, batch_of: Any
) -> None:
    client = backend(group_server.url)
    first = client.generate_batch(*batch_of(V))
    time.sleep(2 * TIMEOUT_S)  # what is tested is that time passes
    assert torch.equal(
        client.generate_batch(*batch_of(V)).aux_hidden_states, first.aux_hidden_states
    )


class Load(threading.Thread):
    """Asks for batches until one fails or it is told to stop."""

    def __init__(self, client: RemoteEagle3Backend, inputs: Any) -> None:
        super().__init__()
        self.client, self.inputs = client, inputs
        self.served, self.errors = 0, []  # type: ignore[var-annotated]
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            try:
                self.client.generate_batch(*self.inputs)
                self.served += 1
            except RemoteEagle3Error as exc:
                self.errors.append(exc)
                return

    def wait_until_served(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.served < count:
            assert time.monotonic() < deadline
            assert self.is_alive(), self.errors
            time.sleep(0.005)


@pytest.mark.parametrize(
    ("rank", "loaded"), [(0, True), (1, True), (1, False)], ids=["leader", "follower", "idle"]
)
def test_a_rank_that_is_killed_ends_the_group(
    serve_group: Any, backend: Any, batch_of: Any, rank: int, loaded: bool
) -> None:
    """With its number and a non-zero exit code, so that a supervisor starts all of it again."""
    server: GroupServer = serve_group()
    client = backend(server.url, retry_for_s=1.0)
    client.generate_batch(*batch_of(V))
    load = Load(client, batch_of(V)) if loaded else None
    if load is not None:
        load.wait_until_served(3)
    server.kill_rank(rank)
    started = time.monotonic()
    assert server.ended() == 1, server.said
    assert time.monotonic() - started < 30
    if load is not None:
        load.join(PATIENCE_S)
        assert len(load.errors) == 1
    if rank == 1:
        assert "rank 1 (process" in server.said or "a process of the group is gone" in server.said
        assert "has to start it again" in server.said


def test_sigterm_under_load_loses_nothing_that_was_admitted(
    serve_group: Any, backend: Any, batch_of: Any
) -> None:
    server: GroupServer = serve_group()
    clients = [backend(server.url, retry_for_s=0.0) for _ in range(3)]
    loads = [Load(client, batch_of(V)) for client in clients]
    for load in loads:
        load.wait_until_served(3)
    server.process.terminate()
    assert server.ended() == 0, server.said
    for load in loads:
        load.join(PATIENCE_S)
        (error,) = load.errors
        assert type(error).__name__ in ("NotReady", "TransportError"), error


def test_a_launcher_that_is_killed_takes_its_ranks_with_it(serve_group: Any) -> None:
    server: GroupServer = serve_group()
    server.process.kill()
    server.process.wait(PATIENCE_S)
    server.wait_until_gone()


def test_an_interrupt_is_a_clean_end(serve_group: Any) -> None:
    server: GroupServer = serve_group()
    server.process.send_signal(signal.SIGINT)
    assert server.ended() == 0, server.said


def test_what_cannot_be_loaded_ends_all_of_it_with_the_reason(tmp_path: Path) -> None:
    server = GroupServer(tmp_path / "nothing", "--tp", 2, "--port", 0, "--device", "cpu")
    try:
        assert server.ended() != 0
        assert "no such file or directory" in server.said
    finally:
        server.close()


def test_torchruns_variables_are_honoured(
    checkpoint: Path, backend: Any, batch_of: Any, free_port: int
) -> None:
    """Two commands as two hosts would run them."""
    here = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here["MASTER_PORT"] = str(free_port)
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


def run_ranks(free_port: int, *arguments: object) -> str:
    """What rank 0 of `ranks.py` printed."""
    here = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here["MASTER_PORT"] = str(free_port)
    command = [sys.executable, "-m", "tests.parallel.ranks", *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**here, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    return said[0]


def test_an_error_of_the_model_leaves_the_group_whole(free_port: int) -> None:
    said = run_ranks(free_port, 0, 60).splitlines()
    assert said[0] == "target_head: RuntimeError: of the model"
    assert said[1:] == ["input_embeddings: done"] * 2


def test_a_rank_that_stalls_beyond_the_timeout_breaks_the_group(free_port: int) -> None:
    """Its collective fails on both, as a forward would, and so would every one after it."""
    said = run_ranks(free_port, 9, 6).splitlines()
    assert said[0] == "target_head: RuntimeError: of the model"
    assert said[1].startswith("input_embeddings: GroupBroken: ")
    assert len(said) == 2


@pytest.mark.parametrize(
    ("variables", "arguments", "words"),
    [
        ({"RANK": "0"}, (), "expected RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (), "numbers"),
        ({}, ("--device", "cuda"), "needs as many GPUs, or --device cpu; this host has 0"),
        ({}, ("--device", "cuda:1"), "expected --device auto, cpu or cuda, got cuda:1"),
        ({"EAGLE3_TP_TIMEOUT_S": "inf"}, (), "setting tp_timeout_s"),
        ({"EAGLE3_TP": "0"}, (), "setting tp "),
    ],
)
def test_what_cannot_be_is_refused_in_words_before_anything_starts(
    checkpoint: Path, variables: dict[str, str], arguments: tuple[str, ...], words: str
) -> None:
    server = GroupServer(checkpoint, *arguments, "--port", 0, **{"EAGLE3_TP": "2", **variables})
    try:
        assert server.ended() == 2
        assert words in server.said
        assert not server.ranks
    finally:
        server.close()


def test_modules_of_the_current_directory_are_not_imported(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "uvloop.py").write_text("raise SystemExit('imported from the current directory')")
    here = os.pathsep.join(
        str(Path(each).resolve()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    )
    server = GroupServer(
        checkpoint, "--tp", 2, "--port", 0, "--device", "cpu", cwd=tmp_path, PYTHONPATH=here
    )
    try:
        assert server.url, server.said
        server.process.terminate()
        assert server.ended() == 0
    finally:
        server.close()


def test_it_meets_on_loopback_alone(group_server: GroupServer) -> None:
    """Whatever listens of rank 0 and its followers: torch's own store would on every interface."""
    inodes = {
        os.readlink(link)
        for pid in group_server.ranks
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                listening.append(columns[1].partition(":")[0])
    assert listening
    assert set(listening) <= {"0100007F", "00000000000000000000000001000000"}


def test_a_sigterm_before_it_serves_is_a_clean_end(checkpoint: Path) -> None:
    process = subprocess.Popen(
        [*GroupServer.command(), str(checkpoint), "--tp", "2", "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "are processes" in line:
            break
    process.terminate()
    said += process.stderr.read()
    assert process.wait(PATIENCE_S) == 0, said
    process.stderr.close()
