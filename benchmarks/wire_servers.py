"""Servers for the wire benchmarks, each in a process of its own, which ends with its stdin.

`raw` answers eight bytes, a body's size in MiB, with that many MiB over a plain socket; `frame`
sends our frames as the service does; `service` is the service in front of a `FixedTarget`;
`peer_body` and `peer_service` are the peer's server with a body, or with supervision, made before.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import uvicorn
from common import MIB
from fastapi import FastAPI, Request, Response
from fixed_target import EIGHT_B, FixedTarget, token_batch

from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.frame import encode
from eagle3_schemas.protocol import REQUEST_ID_HEADER, SUPERVISION_PATH
from eagle3_server import ServerSettings, create_app
from eagle3_server.asgi import FrameResponse

SIZE = struct.Struct("<Q")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds: dict[str, Callable[[argparse.Namespace], None]] = {
        "raw": raw,
        "frame": frame,
        "service": service,
        "peer_body": peer_body,
        "peer_service": peer_service,
    }
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--mib", type=int, nargs="+", default=[])
    parser.add_argument("--unix-socket", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--supervised", type=float, default=0.6)
    arguments = parser.parse_args()
    threading.Thread(target=kinds[arguments.kind], args=(arguments,), daemon=True).start()
    sys.stdin.read()
    sys.stdout.flush()
    os._exit(0)  # what still serves is a daemon thread that nothing waits for


def say(**content: object) -> None:
    print(json.dumps(content), flush=True)


def body_tensor(mib: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(mib)
    words = torch.randint(1 << 62, (mib * MIB // 8,), generator=generator)
    return words.view(torch.uint8)


def raw(arguments: argparse.Namespace) -> None:
    bodies = {mib: memoryview(body_tensor(mib).numpy()) for mib in arguments.mib}
    tcp = socket.create_server(("127.0.0.1", 0))
    listeners = [tcp]
    if arguments.unix_socket:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(arguments.unix_socket))
        unix.listen()
        listeners.append(unix)

    def answer(connection: socket.socket) -> None:
        while question := connection.recv(SIZE.size, socket.MSG_WAITALL):
            connection.sendall(bodies[SIZE.unpack(question)[0]])

    def accept(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    for listener in listeners:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    say(port=tcp.getsockname()[1])


def frame(arguments: argparse.Namespace) -> None:
    """Frames made before, by the service's own response: the request's id is the size in MiB."""
    frames = {str(mib): encode({}, {"body": body_tensor(mib)}) for mib in arguments.mib}
    app = FastAPI()

    @app.post(SUPERVISION_PATH)
    async def supervision(request: Request) -> Response:
        await request.body()
        return FrameResponse(frames[request.headers[REQUEST_ID_HEADER]])

    run_uvicorn(app, arguments)


def service(arguments: argparse.Namespace) -> None:
    run_uvicorn(create_app(FixedTarget(), ServerSettings()), arguments)


def run_uvicorn(app: FastAPI, arguments: argparse.Namespace) -> None:
    """Serve as `eagle3-remote serve` does."""
    tls = {}
    if arguments.certificate:
        tls = {"ssl_certfile": arguments.certificate, "ssl_keyfile": arguments.key}
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        timeout_keep_alive=600,
        access_log=False,
        log_level="warning",
        **tls,
    )
    tcp = socket.create_server(("127.0.0.1", 0))
    listeners = [tcp]
    if arguments.unix_socket:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(arguments.unix_socket))
        listeners.append(unix)
    server = Announcing(config, tcp.getsockname()[1])
    server.run(sockets=listeners)


class Announcing(uvicorn.Server):
    """Says its port once it accepts connections."""

    def __init__(self, config: uvicorn.Config, port: int) -> None:
        super().__init__(config)
        self._port = port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        say(port=self._port)


def peer_body(arguments: argparse.Namespace) -> None:
    """The peer's server; a request's body is the size in MiB of what its codec made before."""
    from nemo_automodel.components.speculative.eagle.remote import server, wire

    bodies = {
        str(mib).encode(): wire.encode_to_bytes({"body": body_tensor(mib)}) for mib in arguments.mib
    }

    class Logic(server.TargetModelServer):
        def handle_generate(self, raw: bytes, *, client_wants_nccl: bool) -> tuple[bytes, bool]:
            return bodies[raw], False

    run_peer(server, Logic(None, nccl_port=0))


def peer_service(arguments: argparse.Namespace) -> None:
    """The peer's server, its codec included, with supervision made before."""
    from nemo_automodel.components.speculative.eagle.remote import server

    batch = token_batch(arguments.tokens, arguments.supervised)
    shape = batch.input_ids.shape
    made = {
        "aux_hidden_states": torch.rand(*shape, 3 * EIGHT_B.hidden_size).bfloat16(),
        "target_probs": torch.rand(*shape, EIGHT_B.draft_vocab_size),
        "position_mask": shift_left_with_zero(batch.loss_mask).unsqueeze(-1),
        "input_ids": shift_left_with_zero(batch.input_ids),
        "loss_mask": shift_left_with_zero(batch.loss_mask.long()),
    }
    logic = server.TargetModelServer(None, nccl_port=0)
    with mock.patch.object(server, "compute_supervision", return_value=made):
        run_peer(server, logic)


def run_peer(server: Any, logic: Any) -> None:
    class Announced(server.ThreadingHTTPServer):
        def server_activate(self) -> None:
            super().server_activate()
            say(port=self.server_address[1])

    with mock.patch.object(server, "ThreadingHTTPServer", Announced):
        server.serve(logic, "127.0.0.1", 0)


if __name__ == "__main__":
    main()
