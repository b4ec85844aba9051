"""`check_settings`: what must not be served is refused before anything is loaded or bound."""

from __future__ import annotations

import os
import ssl

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.config import ServerSettings, nearest_variable, unknown_variables
from eagle3_server.listening import is_loopback
from eagle3_server.quantization import NOT_SHARDED, PACKAGE_OF, need_package
from eagle3_server.replicas import check_replicas


def check_settings(settings: ServerSettings) -> None:
    """Refuse settings that are unsafe or cannot be had together, and variables that nothing reads.

    Raises:
        InvalidRequest: it says what was expected and what to do.
    """
    unknown = unknown_variables(os.environ)
    if unknown:
        raise InvalidRequest(
            f"unknown environment variables {', '.join(unknown)}: no setting has these names; "
            f"unset or correct them (nearest: {', '.join(map(nearest_variable, unknown))})"
        )
    _check_tokens(settings)
    if settings.model is None:
        raise InvalidRequest(
            "no model was named; give a hub id, a directory, or a .gguf file, as an argument or in "
            "EAGLE3_MODEL"
        )
    if settings.tp > 1 and settings.cp > 1:
        raise InvalidRequest(
            f"--tp {settings.tp} and --cp {settings.cp} cannot be had together: choose --tp where "
            "the weights do not fit a device, --cp where the sequences do not"
        )
    if settings.ranks > 1 and settings.device_map is not None:
        raise InvalidRequest(
            f"{settings.ranks_flag} runs a target in several processes, and --device-map lays its "
            "layers on the devices of one: give one of them"
        )
    if settings.quantization is not None:
        if settings.tp > 1:
            raise InvalidRequest(NOT_SHARDED)
        if settings.model.endswith(".gguf"):
            raise InvalidRequest(
                "a .gguf file is quantised already, and transformers expands it to --dtype; serve "
                f"it without --quantization {settings.quantization}, or quantise the checkpoint "
                "that it was made of"
            )
        need_package(PACKAGE_OF[settings.quantization])
    is_alone = settings.ranks == 1 and settings.replicas is None
    if is_alone and settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest(
            f"--device {settings.device} needs a GPU, and torch {torch.__version__} sees none: "
            "serve on --device cpu, or install a CUDA build of torch"
        )
    check_replicas(settings)
    if settings.tls_certificate is not None:
        if settings.unix_socket is not None:
            raise InvalidRequest(
                "--unix-socket and --tls-certificate cannot be had together: the Unix socket would "
                "ask for TLS too; run one server for each, or leave one out"
            )
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_certificate, settings.tls_key)
        except (OSError, ssl.SSLError) as exc:
            raise InvalidRequest(
                f"cannot use --tls-certificate {settings.tls_certificate} with --tls-key "
                f"{settings.tls_key}: {exc}; give a PEM certificate chain and its unencrypted key"
            ) from exc
    elif settings.tls_key is not None:
        raise InvalidRequest("--tls-key needs --tls-certificate, its PEM certificate chain")


def _check_tokens(settings: ServerSettings) -> None:
    """Refuse tokens that cannot be read, and a wide bind without one."""
    try:
        has_tokens = bool(settings.tokens())
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"cannot read --token-file {settings.token_file}: {exc}") from exc
    if settings.token_file is not None and not has_tokens:
        raise InvalidRequest(f"--token-file {settings.token_file} holds no token; write one a line")
    if not (is_loopback(settings.host) or has_tokens or settings.insecure):
        raise InvalidRequest(
            f"--host {settings.host} lets other hosts in, and no token is set. Run\n"
            "  export EAGLE3_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(16))')\n"
            "and give trainers the same variable. In a container, pass it on (--env EAGLE3_TOKEN), "
            "or mount the secret as a file and name it in EAGLE3_TOKEN_FILE, such as "
            "/run/secrets/eagle3_token. Or add --insecure on a network of your own"
        )
