"""Build the CPU image and try what its documentation promises; exit with 1 if anything fails.

    sudo .venv/bin/python docker/build_and_try.py    # Debian's podman; --store DIR keeps the image
    .venv/bin/python docker/build_and_try.py --engine docker    # not run by us: no engine at hand

A target that the script makes is served from the container, and a trainer in this process trains
against it. Nothing is skipped: what cannot be had ends the script with a message and 1.
"""

from __future__ import annotations

import argparse
import http.client
import secrets
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from engine import HARDENED, Docker, PipConf, Podman, free_port, wait_for
from pip._internal.models.index import PyPI
from small_training import STEPS, draft_vocab, random_batch, small_target, train_against

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import BatchHandle
from eagle3_server import HFEagle3TargetModel

TAG, KEPT = "eagle3-remote:cpu-try", "eagle3-remote:cpu"
THREADS = 2  # equal bits need as many inside as outside
TOKEN_IN_CONTAINER = "/run/secrets/eagle3_token"


class Trial:
    """An image, a target and a token; every method that begins with `check_` is one check."""

    def __init__(self, engine: Docker, folder: Path, torch_index: str) -> None:
        self.engine = engine
        self.token, self.mark = secrets.token_hex(16), secrets.token_hex(16)
        self.pip_conf = PipConf(folder / "pip.conf", comment=self.mark)
        self.port = free_port()
        self.name = f"eagle3-try-{self.mark[:8]}"
        print("building the image", flush=True)
        engine.build(TAG, torch_index, self.pip_conf)

        self.models = folder / "models"
        self.model = small_target()
        self.model.save_pretrained(self.models / "tiny-llama")
        self.token_file = folder / "token"
        self.token_file.write_text(self.token + "\n")
        for path in (folder, *folder.glob("models/**/*"), self.models, self.token_file):
            path.chmod(0o755 if path.is_dir() else 0o444)  # the container's user is another one

    def flags(self, *network: str) -> tuple[str, ...]:
        """Return the flags of a container as docs/operations.md runs it."""
        model = f"--volume={self.models}:/models:ro", "--env=EAGLE3_MODEL=/models/tiny-llama"
        return (*HARDENED, "--tmpfs", "/tmp", *network, *model)

    @contextmanager
    def container(self, name: str, *flags: str) -> Iterator[str]:
        """Run the server in a container for the time of a `with` block."""
        self.engine.run("run", "--detach", "--name", name, *flags, TAG)
        try:
            yield name
        except BaseException:
            print(self.engine.run("logs", name, check=False).stderr[-4000:], file=sys.stderr)
            raise
        finally:
            self.engine.run("rm", "--force", name, check=False)

    def inside(self, name: str, code: str) -> str:
        """Run Python in a container, as its user, and return what it printed."""
        return self.engine.run("exec", name, "/opt/eagle3/bin/python", "-c", code).stdout.strip()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve the target from a container that this host reaches, with a mounted token."""
        flags = [*self.flags(*self.engine.reachable(self.port))]
        flags += ["--volume", f"{self.token_file}:{TOKEN_IN_CONTAINER}:ro"]
        flags += ["--env", f"EAGLE3_TOKEN_FILE={TOKEN_IN_CONTAINER}"]
        flags += ["--env", f"OMP_NUM_THREADS={THREADS}", "--env", "EAGLE3_GRACE_PERIOD_S=100"]
        flags += ["--env", "EAGLE3_DRAIN_DELAY_S=2"]
        with self.container(self.name, *flags):
            yield

    def status_of(self, path: str, token: str | None = None) -> int | None:
        """Return the status that the server answers with, or None if it does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers=bearer(token))
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def backend(self, **options: int) -> RemoteEagle3Backend:
        """Return a trainer's backend, outside of the container."""
        url = f"http://127.0.0.1:{self.port}"
        return RemoteEagle3Backend(url, token=self.token, exact=True, retry_for_s=30, **options)

    def check_without_a_token_it_exits_and_names_the_secret(self) -> None:
        with self.container(self.name, *self.flags(*self.engine.hidden_network)) as name:
            code = self.engine.run("wait", name, timeout=60).stdout.strip()
            said = self.engine.run("logs", name).stderr
        assert code == "2", f"exit code {code}: {said}"
        for word in ("EAGLE3_TOKEN=", "EAGLE3_TOKEN_FILE", TOKEN_IN_CONTAINER):
            assert word in said, f"{word} is not in: {said}"

    def check_with_a_token_it_listens_wide(self) -> None:
        flags = self.flags(*self.engine.hidden_network)
        with self.container(self.name, *flags, "--env", f"EAGLE3_TOKEN={self.token}") as name:
            wait_for(lambda: self.is_healthy(name), "the health check to succeed")
            listeners = self.inside(name, "print(open('/proc/net/tcp').read())")
            assert "00000000:1F41 00000000:0000 0A" in listeners, listeners  # 0.0.0.0:8001, LISTEN

    def check_a_sigterm_at_once_ends_it(self) -> None:
        """Also while Python imports, when process 1 would not hear it."""
        flags = self.flags(*self.engine.hidden_network)
        with self.container(self.name, *flags, "--env", f"EAGLE3_TOKEN={self.token}") as name:
            self.engine.run("stop", "--time", "60", name)
            code = self.engine.inspect(name)["State"]["ExitCode"]
            assert code in (0, 143), f"exit code {code}; 137 is a SIGKILL after 60 s"

    def check_the_image_holds_no_secret_and_nothing_of_the_index(self) -> None:
        """All layers, the configuration and the history, as they are pushed to a registry."""
        environment = self.engine.inspect(TAG)["Config"]["Env"]
        assert not [each for each in environment if "TOKEN" in each], environment
        forbidden = {self.token, self.mark, "etc/pip.conf\0", "mnt/pip"}
        forbidden |= self.pip_conf.hosts - {PyPI.netloc}  # pip itself names that one
        known = "Target-model server for EAGLE-3 draft training"  # in the labels
        code = "eagle3_server/checking.py\0"  # in a layer
        found = self.words_of_the_image({*forbidden, known, code})
        assert {known, code} <= found, "the search does not find what is in the image"
        assert not found & forbidden, f"in the image: {sorted(found & forbidden)}"

    def words_of_the_image(self, words: set[str]) -> set[str]:
        """Return those words that occur in the image's archive."""
        wanted = {word.encode() for word in words}
        found: set[bytes] = set()
        overlap = max(map(len, wanted))
        saving = self.engine.save(TAG)
        assert saving.stdout is not None
        rest = b""
        while piece := saving.stdout.read(1 << 24):
            piece = rest + piece
            found |= {word for word in wanted - found if word in piece}
            rest = piece[-overlap:]
        assert saving.wait() == 0, "the image could not be saved"
        return {word.decode() for word in found}

    def check_it_becomes_ready_read_only(self) -> None:
        wait_for(lambda: self.status_of("/readyz") == http.client.OK, "/readyz to answer 200")
        code = "import os\ntry: open('/opt/eagle3/x', 'w')\nexcept OSError as e: print(e.errno)"
        assert self.inside(self.name, code) == "30", "its root file system is not read-only"

    def check_it_runs_as_a_user_without_rights(self) -> None:
        status = self.inside(self.name, "print(open('/proc/1/status').read())").splitlines()
        fields = dict(line.split(":\t", 1) for line in status)
        assert fields["Uid"].split() == ["10001"] * 4, fields["Uid"]
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, fields["CapBnd"]
        assert fields["NoNewPrivs"] == "1"

    def check_its_health_check_succeeds_and_can_fail(self) -> None:
        assert self.is_healthy(self.name)
        assert not self.is_healthy(self.name, "--env", f"EAGLE3_PORT={free_port()}")

    def is_healthy(self, name: str, *flags: str) -> bool:
        """Run the health check that the image declares."""
        kind, *command = self.engine.inspect(TAG)["Config"]["Healthcheck"]["Test"]
        assert kind == "CMD", kind
        return self.engine.run("exec", *flags, name, *command, check=False).returncode == 0

    def check_it_refuses_who_has_no_token(self) -> None:
        got = [self.status_of("/v1/model", token) for token in (None, "wrong", self.token)]
        assert got == [401, 401, 200], got

    def check_a_trainer_outside_gets_the_losses_of_a_co_located_one(self) -> None:
        version = self.inside(self.name, "import torch; print(torch.__version__)")
        assert version == torch.__version__, (
            f"equal bits need the same torch: {version} in the image, {torch.__version__} here"
        )
        with self.backend() as backend:
            backend.set_vocab_mapping(*draft_vocab())
            remote = train_against(backend, backend.get_input_embeddings().weight)
        embeddings = self.model.get_input_embeddings().weight.detach()
        co_located = train_against(HFEagle3TargetModel(self.model), embeddings)
        assert remote == co_located, f"{remote} is not {co_located}"
        assert len(set(remote)) == STEPS, f"nothing was trained: {remote}"
        print(
            f"            {STEPS} steps, losses {remote[0]:.6f} to {remote[-1]:.6f}, the same bits"
        )

    def check_it_drains_when_stopped(self) -> None:
        """Requests under way are answered right, though new ones are refused; it ends with 0."""
        batches = [random_batch(8, 2048, seed=seed) for seed in range(4)]
        with self.backend(max_in_flight=len(batches)) as backend:
            backend.set_vocab_mapping(*draft_vocab())
            handles = [backend.generate_batch_async(*batch) for batch in batches]
            wait_for(lambda: self.queued() > 0, "a request to wait in the queue")
            stop = ["stop", "--time", "120", self.name]
            stopping = threading.Thread(target=self.engine.run, args=stop)
            stopping.start()
            wait_for(lambda: self.status_of("/readyz") == 503, "/readyz to answer 503")
            under_way = sum(map(is_under_way, handles))
            answers = [handle.result() for handle in handles]
            stopping.join()
        assert under_way > 0, "all were answered before it drained: nothing was shown"
        state = self.engine.inspect(self.name)["State"]
        assert state["ExitCode"] == 0, state
        local = HFEagle3TargetModel(self.model)
        for batch, answer in zip(batches, answers, strict=True):
            attended = batch.attention_mask.bool()  # elsewhere a server sends zeros
            expected = local.generate_batch(*batch).aux_hidden_states[attended]
            assert answer.aux_hidden_states[attended].equal(expected), "a wrong answer"
        print(f"            {under_way} of {len(batches)} were under way when it refused new ones")

    def queued(self) -> float:
        """Return how many requests wait for the model."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/metrics", headers=bearer(self.token))
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(float(x.split()[1]) for x in lines if x.startswith("eagle3_queued_requests "))


def bearer(token: str | None) -> dict[str, str]:
    """Return the headers that carry a token."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def is_under_way(handle: BatchHandle) -> bool:
    """Whether a request has no answer yet."""
    try:
        handle.result(timeout=0)
    except TimeoutError:
        return True
    return False


def attempt(check: Callable[[], None]) -> bool:
    """Run a check and print how it ended."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        check()
    except Exception as exc:
        traceback.print_exc()
        print(f"  FAILED    {name}: {exc}", flush=True)
        return False
    print(f"  ok        {name}", flush=True)
    return True


def main() -> int:
    """Build, try, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=("podman", "docker"), default="podman")
    parser.add_argument("--torch-index", default="", help="extra index with torch for the CPU")
    parser.add_argument("--store", type=Path, help="folder that keeps the image")
    arguments = parser.parse_args()
    # A plain kill ends it like an exception, so that container and folder are removed as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="eagle3-try-") as temporary:
        folder = Path(temporary)
        (store := arguments.store or folder / "podman").mkdir(parents=True, exist_ok=True)
        engine = Docker() if arguments.engine == "docker" else Podman(store.absolute())
        try:
            trial = Trial(engine, folder, arguments.torch_index)
            print("trying it", flush=True)
            ended = [
                attempt(trial.check_without_a_token_it_exits_and_names_the_secret),
                attempt(trial.check_with_a_token_it_listens_wide),
                attempt(trial.check_a_sigterm_at_once_ends_it),
                attempt(trial.check_the_image_holds_no_secret_and_nothing_of_the_index),
            ]
            with trial.serving():
                ended += [
                    attempt(trial.check_it_becomes_ready_read_only),
                    attempt(trial.check_it_runs_as_a_user_without_rights),
                    attempt(trial.check_its_health_check_succeeds_and_can_fail),
                    attempt(trial.check_it_refuses_who_has_no_token),
                    attempt(trial.check_a_trainer_outside_gets_the_losses_of_a_co_located_one),
                    attempt(trial.check_it_drains_when_stopped),
                ]
        finally:
            if arguments.store is None:
                engine.close()
    if arguments.store is not None:
        print(f"kept as {KEPT}:\n  {engine.keep(TAG, KEPT)}")
    print(f"{sum(ended)} checks passed, {len(ended) - sum(ended)} failed")
    return int(not all(ended))


if __name__ == "__main__":
    sys.exit(main())
