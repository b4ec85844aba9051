"""ServerSettings -> target -> app -> uvicorn; what `eagle3-remote serve` runs."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from types import FrameType
from typing import NoReturn

import torch
import transformers
import uvicorn

from eagle3_schemas.aux_layers import FEWEST_LAYERS, NUM_AUX_LAYERS, example_aux_layer_ids
from eagle3_schemas.errors import InvalidRequest
from eagle3_server.allocator import give_back_freed_memory, keep_freed_memory
from eagle3_server.app import create_app
from eagle3_server.checking import check_settings
from eagle3_server.children import tell_parent
from eagle3_server.config import ServerSettings
from eagle3_server.engine import Target, TargetDescription
from eagle3_server.group import Group, GroupBroken, rank_here
from eagle3_server.http_protocol import bounded
from eagle3_server.launching import launch
from eagle3_server.leading import LeadingTarget, follow
from eagle3_server.listening import (
    allow_open_files,
    hold_unix,
    listen_tcp,
    listen_unix,
    remove_unix,
)
from eagle3_server.loading import load_target
from eagle3_server.logs import set_up_logging
from eagle3_server.replicas import serve_replicas
from eagle3_server.service import Service
from eagle3_server.transformers_target import TransformersTarget

_KEEP_ALIVE_S = 600  # uvicorn's 5 s would close connections between two optimizer steps
_CLOSE_S = 2  # a closing TLS connection waits up to 30 s for a word that an idle trainer never says

logger = logging.getLogger("eagle3_server")


def serve(settings: ServerSettings) -> int:
    """Load the target and serve it until a signal; returns the process's exit code.

    Raises:
        InvalidRequest: settings that must not be served, such as a wide bind without a token.
    """
    check_settings(settings)
    set_up_logging(settings.log_format)
    if settings.replicas is not None:
        return serve_replicas(settings)
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        keep_freed_memory()
    if not sys.stderr.isatty():  # a log file or a container: bars would be thousands of lines
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if settings.ranks > 1:
        rank = rank_here()
        if rank is None:
            return launch(settings)
        if rank > 0:
            _follow(settings)
    failures: list[BaseException] = []
    fingerprint = ""

    def load() -> Target:
        nonlocal fingerprint
        started = time.monotonic()
        try:
            target = _load(settings)
        except BaseException:
            _end_quietly()  # now: the reason may be logged before uvicorn has said that it started
            raise
        give_back_freed_memory()
        fingerprint = target.describe().fingerprint
        logger.info("%s", _summary(target.describe(), time.monotonic() - started))
        _warn_of_shallow(target.describe())
        logger.info("warming up")
        return target

    def announce() -> None:
        logger.info("ready: trainers use %s", " or ".join(urls))
        tell_parent(urls[0], fingerprint)

    def stop(error: BaseException) -> None:
        _end_quietly()
        failures.append(error)
        server.should_exit = True

    app = create_app(load, settings, on_failure=stop, on_ready=announce)
    # Both are faster than what uvicorn falls back to without a word where they are missing.
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(settings, app.state.service.telemetry.refused_connection),
        loop="eagle3_server.loop:Loop",
        proxy_headers=False,  # who asks is who connected
        timeout_keep_alive=_KEEP_ALIVE_S,
        access_log=False,
        log_config=None,
        backlog=settings.max_connections,
        timeout_graceful_shutdown=math.ceil(settings.grace_period_s),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    server = _Server(config, app.state.service, settings.drain_delay_s)
    app.state.service.telemetry.gauge(
        "eagle3_connections", "Open connections", lambda: len(server.server_state.connections)
    )
    allow_open_files(settings.max_connections)
    listeners = [listen_tcp(settings.host, settings.port)]
    host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "http" if settings.tls_certificate is None else "https"
    host = f"[{host}]" if ":" in host else host
    urls = [f"{scheme}://{host}:{listeners[0].getsockname()[1]}"]
    if settings.unix_socket is not None:
        listeners.append(listen_unix(settings.unix_socket))
        socket_file = hold_unix(settings.unix_socket)
        urls.append(f"unix://{settings.unix_socket.absolute()}")
    logger.info("loading %s", settings.model)
    try:
        server.run(sockets=listeners)
    finally:
        if settings.unix_socket is not None:
            remove_unix(settings.unix_socket, socket_file)
        if app.state.service.is_working:
            # It loads or computes and cannot be interrupted, and torch aborts an interpreter that
            # exits under it.
            if not failures:
                logger.info("stopped without waiting for the model")
            logging.shutdown()
            os._exit(0 if server.was_terminated and not failures else 1)
    code = 1 if failures or not server.started else 0
    if settings.ranks > 1:
        _end(code)
    return code


def _end_quietly() -> None:
    """Keep uvicorn from telling how it stops: the log's last line is then why."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _end(code: int) -> NoReturn:
    """End a process of a group: about 1 in 8 interpreters aborts under what torch leaves running.

    That is how often one did that destroyed its process group and returned.
    """
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _load(settings: ServerSettings) -> Target:
    if settings.ranks == 1:
        return load_target(settings)
    group = _join(settings)
    return LeadingTarget(_shards(settings, group), group)


def _shards(settings: ServerSettings, group: Group) -> TransformersTarget:
    """Load this rank's part, and compare what was found of it with the others'."""
    target = load_target(settings, group)
    found = replace(target.describe(), device="")
    group.check_same(f"{found} {settings.head_chunk_bytes}", "targets or settings")
    return target


def _join(settings: ServerSettings) -> Group:
    is_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    group = Group.join(torch.device("cpu" if is_cpu else "cuda"), settings.group_timeout_s)
    if group.size != settings.ranks:
        raise InvalidRequest(
            f"{settings.ranks_flag} needs as many processes; WORLD_SIZE is {group.size}. Start "
            f"{settings.ranks} with torchrun, or set {settings.ranks_flag.split()[0]} {group.size}"
        )
    return group


def _follow(settings: ServerSettings) -> NoReturn:
    """Be a rank that does not serve, until the leader ends; then end the process."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the leader's to obey: it drains first
        signal.signal(number, signal.SIG_IGN)
    try:
        group = _join(settings)
        follow(_shards(settings, group), group)
        group.leave()
    except GroupBroken as exc:
        logger.critical("rank %s ends: %s", os.environ["RANK"], exc)
        _end(1)
    _end(0)


class _Server(uvicorn.Server):
    """Drains on SIGTERM and ends with exit code 0; ends at once on a second one.

    uvicorn's own raises a caught signal again when it has stopped, so that the process dies of it
    before it has tidied up. Connections whose answers were sent get two seconds to close.
    """

    was_terminated = False

    def __init__(self, config: uvicorn.Config, service: Service, drain_delay_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_delay_s = drain_delay_s
        self._stops_at = math.inf

    async def on_tick(self, counter: int) -> bool:
        """Begin to drain after a SIGTERM, and stop listening some time later."""
        if self.was_terminated and self._stops_at == math.inf:
            logger.info("draining: requests under way are finished, new ones refused")
            self._service.drain()
            self._stops_at = time.monotonic() + self._drain_delay_s
        self.should_exit = self.should_exit or time.monotonic() >= self._stops_at
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; answer what was asked; close."""
        cutting = asyncio.create_task(self._cut_what_does_not_close())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut_what_does_not_close(self) -> None:
        connections = self.server_state.connections
        while True:
            closing = {each for each in connections if each.transport.is_closing()}
            await asyncio.sleep(_CLOSE_S)
            for connection in closing & connections:
                connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; the event loop acts on it."""
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
            return
        if self.was_terminated:
            self.force_exit = self.should_exit = True
            # What it would say of the tasks it interrupts is no news.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.was_terminated = True


def _warn_of_shallow(target: TargetDescription) -> None:
    """Say that requests must name layers, where the target has none by default."""
    count = target.num_hidden_layers
    if count < NUM_AUX_LAYERS:
        logger.warning("%d layers are too few for supervision, which takes three", count)
    elif target.aux_layer_ids is None:
        logger.warning(
            "%d layers are too few for the default aux layers (%d are needed): trainers must name "
            "three; or serve with --aux-layer-ids %s",
            count, FEWEST_LAYERS, ",".join(map(str, example_aux_layer_ids(count))),
        )  # fmt: skip


def _summary(target: TargetDescription, seconds: float) -> str:
    layers = "none (name three per request)"
    if target.aux_layer_ids is not None:
        layers = ", ".join(map(str, target.aux_layer_ids))
    return (
        f"loaded {target.model_id} ({target.architecture}) in {seconds:.1f} s: "
        f"{target.num_hidden_layers} layers, H {target.hidden_size}, V {target.vocab_size}, "
        f"{target.dtype} on {target.device_name}, attention {target.attn_implementation}; "
        f"head {target.head}; aux layers {layers} (layer outputs); fingerprint {target.fingerprint}"
    )
