"""`eagle3-remote serve --replicas` as its users run it: a command, Ray, two servers on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ports import free_port
from tests.processes import is_alive, read

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel

PATIENCE_S = 240.0
"""For what takes 15 s on an idle machine, such as Ray's start: busy ones take ten times as long."""
V, D = 131, 53  # of the checkpoint, and of its draft vocab
TOKEN = "only-for-trainers"


def parent_of(pid: int) -> int:
    stat = read(pid, "stat").decode()
    return int(stat.rpartition(")")[2].split()[1]) if stat else 0


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Command:
    """The command, what it says, and the processes it has started."""

    def __init__(self, *arguments: object, **variables: str) -> None:
        ambient = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EAGLE3_", "RAY_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eagle3_client.cli", "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ambient, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **variables},
        )
        self.said = self.printed = ""
        self.port = 0
        self.seen: set[int] = set()
        self._readers = [threading.Thread(target=each) for each in (self._hear, self._take)]
        for each in self._readers:
            each.start()

    def _hear(self) -> None:
        for line in self.process.stderr or ():
            self.said += line

    def _take(self) -> None:
        for line in self.process.stdout or ():
            self.printed += line

    def wait_for(self, pattern: str, count: int = 1) -> Any:
        """The last of `count` matches in what it says."""

        def is_said() -> bool:
            assert self.process.poll() is None or re.search(pattern, self.said), self.said
            return len(re.findall(pattern, self.said)) >= count

        wait_until(is_said, f"it did not say {pattern!r}:\n{self.said[-3000:]}")
        return re.findall(pattern, self.said)[-1]

    @property
    def urls(self) -> list[str]:
        wait_until(lambda: self.printed.endswith("\n"), "it printed no URLs")
        return self.printed.splitlines()[-1].split(",")

    def server_of(self, replica: int) -> int:
        """Process of the replica's present server."""
        return int(re.findall(rf"replica {replica} \(process (\d+) on [\d.]+\) is", self.said)[-1])

    def processes(self) -> set[int]:
        """Those it has started and that are alive."""
        parents = {int(each.name): parent_of(int(each.name))
                   for each in Path("/proc").iterdir() if each.name.isdigit()}  # fmt: skip
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self.seen |= found - {self.process.pid}
        return found - {self.process.pid}

    def ended(self) -> int:
        """Wait for its exit code; nothing that it started, or that we saw of it, may be left."""
        code = self.process.wait(PATIENCE_S)
        self.wait_until_gone()
        for each in self._readers:
            each.join(PATIENCE_S)
        return code

    def wait_until_gone(self) -> None:
        wait_until(lambda: not any(map(is_alive, self.seen)), f"{self.seen} outlive the command")

    def close(self) -> None:
        self.processes()
        self.process.kill()
        self.process.wait()
        for pid in filter(is_alive, self.seen):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for each in self._readers:
            each.join(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="module")
def urls_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("urls") / "urls"
    path.write_text("of a former run")
    return path


@pytest.fixture(scope="module")
def command(checkpoint: Path, urls_file: Path) -> Iterator[Command]:
    """Two replicas that are ready; the module's last test ends them."""
    port = free_port(in_a_row=2)
    started = Command(
        checkpoint, "--replicas", 2, "--port", port, "--device", "cpu", "--urls-file", urls_file,
        # Longer than the three seconds after which a handler of Ray's would abort.
        EAGLE3_TOKEN=TOKEN, EAGLE3_DRAIN_DELAY_S="4",
    )  # fmt: skip
    started.port = port
    try:
        started.wait_for("trainers use EAGLE3_URLS=")
        yield started
    finally:
        started.close()


@pytest.fixture
def other_command() -> Iterator[Callable[..., Command]]:
    """`other_command(*arguments, **variables)`: one that the test ends."""
    started: list[Command] = []

    def start(*arguments: object, **variables: str) -> Command:
        started.append(Command(*arguments, **variables))
        return started[-1]

    yield start
    for each in started:
        each.close()


# --- a trainer, and what it must get ---


@pytest.fixture
def trainer(mapping: Any, frequency_ordered: Any) -> Iterator[Callable[..., RemoteEagle3Backend]]:
    """`trainer(urls)`: a client with a draft vocab, for the bits of a co-located target."""
    made: list[RemoteEagle3Backend] = []

    def build(urls: Any, token: str | None = TOKEN) -> RemoteEagle3Backend:
        client = RemoteEagle3Backend(urls, exact=True, token=token, retry_for_s=PATIENCE_S)
        made.append(client)
        client.set_vocab_mapping(*mapping(frequency_ordered(V, D), V))
        return client

    yield build
    for client in made:
        client.close()


@pytest.fixture
def check(checkpoint: Path, mapping: Any, frequency_ordered: Any) -> Callable[[Any, Any], None]:
    """`check(batch, inputs)`: it is what a co-located target gives, bit for bit."""
    import transformers

    target = HFEagle3TargetModel(transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval())
    ids, mask = mapping(frequency_ordered(V, D), V)

    def compare(batch: Any, inputs: Any) -> None:
        local = target.generate_batch(*inputs)
        probs, position_mask = project_to_draft_vocab(local.logits, ids, mask, local.loss_mask)
        attended, trained = inputs.attention_mask.bool(), position_mask[..., 0]
        assert torch.equal(batch.aux_hidden_states[attended], local.aux_hidden_states[attended])
        assert torch.equal(batch.position_mask, position_mask)
        assert trained.any()
        assert torch.equal(batch.target_probs[trained], probs[trained])
        assert torch.equal(batch.input_ids, local.input_ids)

    return compare
