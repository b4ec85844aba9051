"""ServerSettings -> target -> app -> uvicorn; what `eagle3-remote serve` runs."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import threading
import time

import transformers
import uvicorn

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.allocator import return_large_blocks
from eagle3_server.app import create_app
from eagle3_server.config import ServerSettings, unknown_variables
from eagle3_server.engine import TargetDescription
from eagle3_server.loading import load_target
from eagle3_server.transformers_target import TransformersTarget

_KEEP_ALIVE_S = 600  # uvicorn's 5 s would close connections between two optimizer steps

logger = logging.getLogger("eagle3_server")


def serve(settings: ServerSettings) -> int:
    """Load the target and serve it until a signal; returns the process's exit code.

    Raises:
        InvalidRequest: settings that must not be served, such as a wide bind without a token.
    """
    _check(settings)
    return_large_blocks()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not sys.stderr.isatty():  # a log file or a container: bars would be thousands of lines
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    failures: list[BaseException] = []
    loading_ended = threading.Event()

    def load() -> TransformersTarget:
        started = time.monotonic()
        try:
            target = load_target(settings)
        finally:
            loading_ended.set()
        logger.info("%s", _summary(target.describe(), time.monotonic() - started))
        logger.info("ready: trainers use %s", url)
        return target

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(load, settings, on_load_failure=stop)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=_KEEP_ALIVE_S,
        access_log=False,
        log_config=None,
    )
    server = uvicorn.Server(config)
    listener = _listen(
        settings.host, settings.port
    )  # before loading: a port in use must not cost minutes
    host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    logger.info("loading %s", settings.model)
    try:
        server.run(sockets=[listener])
    finally:
        if not loading_ended.is_set():
            # The thread that loads cannot be interrupted, and torch aborts an interpreter that
            # exits under it.
            logger.info("stopped while loading")
            logging.shutdown()
            os._exit(1)
    return 1 if failures or not server.started else 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        raise InvalidRequest(
            f"cannot listen on {host} port {port}: {exc.strerror}; choose another --port or --host"
        ) from exc


def _check(settings: ServerSettings) -> None:
    """Refuse settings that are unsafe, or variables that nothing reads."""
    if settings.model is None:
        raise InvalidRequest(
            "no model was named; give a hub id, a directory, or a .gguf file, as an argument or in "
            "EAGLE3_MODEL"
        )
    unknown = unknown_variables(os.environ)
    if unknown:
        raise InvalidRequest(
            f"unknown environment variables {', '.join(unknown)}: no setting has these names; "
            "see `eagle3-remote serve --help`, and unset or correct them"
        )
    if not (_is_loopback(settings.host) or settings.tokens() or settings.insecure):
        raise InvalidRequest(
            f"--host {settings.host} lets other hosts in, and no token is set. Run\n"
            "  export EAGLE3_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(16))')\n"
            "and give trainers the same variable; or add --insecure on a network of your own"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
