"""`eagle3-remote serve` as its users run it: a process, flags, variables, words on failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.servers import save_tiny_llama
from typer.testing import CliRunner

from eagle3_client import Unauthorized
from eagle3_client.cli import app


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """A server process with two threads, as the tests have, and no hub."""
    ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
    return subprocess.Popen(
        [sys.executable, "-m", "eagle3_client.cli", "serve", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**ambient, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **variables},
    )


class Server:
    """A process that said where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process, self.said, self.url = process, "", ""
        for line in process.stderr:
            self.said += line
            if found := re.search(r"trainers use (https?://\S+)(?: or (unix://\S+))?", line):
                self.url, self.unix_url = found[1], found[2]
                break
        assert self.url, f"it ended without serving:\n{self.said}"
        self._rest = threading.Thread(target=lambda: list(process.stderr or ()))
        self._rest.start()  # a full pipe would stop it

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._rest.join(60)
        if self.process.stderr is not None:
            self.process.stderr.close()


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def run(*arguments: object, **variables: str) -> Server:
            process = start(*arguments, **variables)
            stack.callback(process.kill)  # nothing if it has ended
            server = Server(process)
            stack.callback(server.stop)
            return server

        yield run


@pytest.fixture(scope="module")
def from_flags(checkpoint: Path, serving: Callable[..., Server]) -> Server:
    """Flags alone, but for a variable that a flag overrides."""
    arguments = (checkpoint, "--port", 0, "--aux-layer-ids", "4,0,2")
    return serving(*arguments, EAGLE3_AUX_LAYER_IDS="1,2,3", EAGLE3_PORT="9")


@pytest.fixture(scope="module")
def from_variables(checkpoint: Path, serving: Callable[..., Server]) -> Server:
    return serving(
        checkpoint,
        EAGLE3_PORT="0",
        EAGLE3_DTYPE="bfloat16",
        EAGLE3_AUX_LAYER_IDS="6,0,3",
        EAGLE3_TOKEN="secret",
        EAGLE3_HOST="127.0.0.2",
        EAGLE3_MAX_TOKENS_PER_REQUEST="77",
    )


def test_it_says_what_it_loaded_and_where_it_listens(from_flags: Server) -> None:
    for part in (
        "loaded tiny-llama (LlamaForCausalLM)", "7 layers", "H 48", "V 131", "float32",
        "aux layers 4, 0, 2 (layer outputs)", "fingerprint",
    ):  # fmt: skip
        assert part in from_flags.said
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+", from_flags.url)


def test_a_flag_wins_over_its_variable(from_flags: Server, connect: Any) -> None:
    assert connect(urls=from_flags.url).model_info().aux_layer_ids == (4, 0, 2)
    assert not from_flags.url.endswith(":9")


def test_a_served_checkpoint_equals_the_co_located_one(
    checkpoint: Path, from_flags: Server, connect: Any, batch_of: Any, frequency_ordered: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    draft_ids, inputs = frequency_ordered(131, 53), batch_of(131)
    backend = connect(None, draft_ids, urls=from_flags.url, exact=True)
    assert backend.model_info().num_threads == torch.get_num_threads()
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids, (4, 0, 2)))


def test_no_path_of_the_servers_disk_is_told(
    checkpoint: Path, from_flags: Server, connect: Any
) -> None:
    info = connect(urls=from_flags.url).model_info()
    assert info.model_id == "tiny-llama"
    assert str(checkpoint.parent) not in info.model_dump_json()


def test_variables_are_honoured(from_variables: Server, connect: Any) -> None:
    info = connect(urls=from_variables.url, token="secret").model_info()
    assert info.dtype == "bfloat16"
    assert info.aux_layer_ids == (6, 0, 3)
    assert info.limits.max_tokens_per_request == 77
    assert from_variables.url.startswith("http://127.0.0.2:")
    with pytest.raises(Unauthorized):
        connect(urls=from_variables.url).model_info()


def test_the_token_is_not_logged(from_variables: Server) -> None:
    assert "secret" not in from_variables.said


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--version"], "eagle3-remote 0."), (["serve", "--help"], "--port")]
)
def test_version_and_help_are_answered(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert words in result.stdout


LAYERS = (
    "setting aux_layer_ids (EAGLE3_AUX_LAYER_IDS): aux_layer_ids must be 3 distinct layers, as "
    "1,14,26"
)


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {"EAGLE3_PROT": "0"}, "unknown environment variables EAGLE3_PROT"),
        (["--host", "0.0.0.0"], {}, "export EAGLE3_TOKEN="),
        (["--host", "0.0.0.0"], {}, "name it in EAGLE3_TOKEN_FILE"),
        (["--host", "::"], {"EAGLE3_TOKEN": " , "}, "--insecure"),
        (["--host", "::"], {"EAGLE3_TOKN": "x"}, "nearest: EAGLE3_TOKEN)"),
        (["--port", "70000"], {}, "setting port"),
        (["--dtype", "int8"], {}, "setting dtype"),
        (["--aux-layer-ids", "one,two,3"], {}, f"{LAYERS}; got 'one,two,3'"),
        (["--aux-layer-ids", "0,2"], {}, f"{LAYERS}; got '0,2'"),
        ([], {"EAGLE3_AUX_LAYER_IDS": "0,2,2"}, f"{LAYERS}; got '0,2,2'"),
        (["--aux-layer-ids", "-1,2,3"], {}, f"{LAYERS}; got '-1,2,3'"),
    ],
    ids=[
        "unknown-variable",
        "wide-bind",
        "wide-bind-in-a-container",
        "wide-bind-empty-token",
        "wide-bind-misspelt-token",
        "port",
        "dtype",
        "layers-by-name",
        "two-layers",
        "a-layer-twice",
        "a-layer-from-the-end",
    ],
)
def test_settings_that_must_not_be_served_are_refused_in_words(
    arguments: list[str],
    variables: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In this process: they are refused before anything is loaded or bound."""
    from typer.testing import CliRunner

    from eagle3_client.cli import app

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "absent"), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_wide_bind_asks_for_the_token_before_the_model() -> None:
    """An image that is run with nothing says first what makes it safe."""
    from typer.testing import CliRunner

    from eagle3_client.cli import app

    result = CliRunner().invoke(app, ["serve"], env={"EAGLE3_HOST": "0.0.0.0"})
    assert result.exit_code == 2
    assert "no token is set" in result.stderr


def test_a_target_too_shallow_for_default_layers_says_who_must_name_some(
    serving: Callable[..., Server], tmp_path: Path
) -> None:
    shallow = save_tiny_llama(tmp_path / "shallow", num_hidden_layers=6)
    said = serving(shallow, "--port", 0).said
    (line,) = (line for line in said.splitlines() if " WARNING " in line)
    assert line.endswith(
        " WARNING 6 layers are too few for the default aux layers (7 are needed): trainers must "
        "name three; or serve with --aux-layer-ids 0,2,4"
    )


def test_what_cannot_be_loaded_ends_the_process_with_the_reason(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Both at once, since each spends seconds on importing torch."""
    wrong_path = start(tmp_path / "absent", "--port", 0)
    wrong_layers = start(checkpoint, "--port", 0, "--aux-layer-ids", "1,2,7")
    for process, words in (
        (wrong_path, "absent"),
        (wrong_layers, "3 distinct ids in [0, 7)"),
    ):
        with process:
            try:
                _, said = process.communicate(timeout=100)
            finally:
                process.kill()
        assert process.returncode == 1, said
        last = said.splitlines()[-1]
        assert " ERROR loading failed: " in last, said
        assert words in last
        assert "trainers use" not in said


def test_it_listens_on_a_unix_socket_too_and_tidies_up(
    checkpoint: Path, serving: Callable[..., Server], tmp_path: Path, connect: Any
) -> None:
    path = tmp_path / "eagle3.sock"
    server = serving(checkpoint, "--port", 0, "--unix-socket", path)
    assert server.unix_url == f"unix://{path}"
    expected = connect(urls=server.url).model_info()
    assert connect(urls=server.unix_url).model_info() == expected
    server.stop()
    assert server.process.returncode == 0
    assert not path.exists()


def test_it_speaks_https_with_a_certificate(
    checkpoint: Path, serving: Callable[..., Server], tmp_path: Path, connect: Any,
    monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path],
) -> None:  # fmt: skip
    cert, key = certificate
    server = serving(checkpoint, "--port", 0, "--tls-certificate", cert, "--tls-key", key)
    assert server.url.startswith("https://127.0.0.1:")
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    url = server.url.replace("127.0.0.1", "localhost")
    assert connect(urls=url).model_info().model_id == "tiny-llama"
    server.process.terminate()  # the client stays connected, and would be waited for for 30 s
    assert server.process.wait(15) == 0
