"""`ServerSettings`: every server knob, its unit and default, from flags or `EAGLE3_*` variables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from eagle3_schemas.aux_layers import NUM_AUX_LAYERS
from eagle3_schemas.errors import InvalidRequest

Quantization = Literal["bnb-nf4", "bnb-int8", "torchao-int8"]

_CLIENT_VARIABLES = frozenset({"EAGLE3_URLS"})


class ServerSettings(BaseSettings):
    """Settings of one server process; frozen, checked once. Arguments win over variables.

    A field `name` is also read from the environment variable `EAGLE3_NAME`.
    """

    model_config = SettingsConfigDict(
        env_prefix="EAGLE3_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    model: str | None = None
    """Hub id, directory of a checkpoint, or path of a .gguf file. Everybody who runs `serve`."""
    revision: str | None = None
    """Hub branch, tag or commit. Who wants a run to be repeatable from a hub id."""
    model_name: str | None = None
    """Name told to trainers, part of the fingerprint; default the hub id, or the file's or
    directory's name. Who serves one target from differently named directories."""
    host: str = "127.0.0.1"
    """Address to listen on. Who serves trainers on other hosts: 0.0.0.0, with a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """TCP port; 0 takes a free one. Who runs several servers on a host."""
    unix_socket: Path | None = None
    """Listen on this Unix socket too, mode 0600. Who runs trainers beside the server, as the same
    user, and wants no port open."""
    tls_certificate: Path | None = None
    """PEM certificate chain; the TCP port then speaks https. Who crosses a network of others."""
    tls_key: Path | None = None
    """PEM private key of the certificate, if that file does not hold it. Who sets the former."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is bfloat16 on CUDA and float32 on the CPU. Who needs exact
    equality with a co-located target of another dtype."""
    device: str = "auto"
    """torch device; auto is cuda if there is one. Who has several GPUs: cuda:1."""
    device_map: str | None = None
    """Lay the layers on several devices of this process: auto, balanced, balanced_low_0,
    sequential, or a JSON object of module names and devices, or a file with one. Who serves a
    target larger than a GPU whose family --tp cannot shard, or has no NCCL."""
    quantization: Quantization | None = None
    """Quantise the weights while loading: bnb-nf4 (4 bits), bnb-int8 or torchao-int8. Who has not
    the memory for the checkpoint's own dtype; docs/operations.md says what it costs."""
    tp: Annotated[int, Field(ge=1)] = 1
    """Processes, one a device, that the weights are sharded over. Who serves a target larger than a
    device."""
    cp: Annotated[int, Field(ge=1)] = 1
    """Processes, one a device with the whole model, that each sequence is split over. Who serves
    sequences whose activations do not fit a device, or wants one long sequence sooner."""
    group_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds a process of the group waits for the others before it gives up. Who has a network
    that stalls longer, or wants to know sooner."""
    replicas: Annotated[int | None, Field(ge=1)] = None
    """Servers of the target that Ray places and restarts, with `tp` or `cp` devices each; default
    none: this process serves. Who needs more throughput than one server has."""
    urls_file: Path | None = None
    """File that has the replicas' URLs, as EAGLE3_URLS takes them, while all of them have been
    ready. Who starts trainers by script."""
    attn_implementation: str | None = None
    """transformers' attention (sdpa, eager, flash_attention_2). Who compares with such a target."""
    aux_layer_ids: Annotated[tuple[int, ...] | None, NoDecode] = None
    """Layers captured when a request names none, as `1,14,26`; default [1, L//2 - 1, L - 4]. Who
    trains drafts on other layers and cannot say so in the trainer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Who serves an architecture transformers does
    not have, and has read that code."""
    token: SecretStr | None = None
    """Bearer token(s) clients must send, comma-separated. Who listens beyond this host. There is no
    flag for it, since arguments show in process lists: set EAGLE3_TOKEN."""
    token_file: Path | None = None
    """File with bearer tokens, one a line, beside those of EAGLE3_TOKEN. Who gets secrets mounted
    as files."""
    insecure: bool = False
    """Allow listening beyond this host without a token. Who has a network nobody else is on."""
    max_tokens_per_request: Annotated[int, Field(ge=1)] = 16384
    """Largest B * T of one request, padding included. Who has memory for more, or for less."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024
    """Largest request body, bytes. Who registers draft vocabs of more than 8 million ids."""
    head_chunk_bytes: Annotated[int, Field(ge=1024)] | None = None
    """Memory the full-vocab logits of one chunk of rows may take, bytes; None is 256 MiB on a GPU
    and 64 MiB elsewhere, where a plain head takes 4 MiB at most, which stay in the cache. Who is
    short of device memory."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that may wait for the model. Who has more than 32 trainers on one server."""
    max_tokens_in_flight: Annotated[int, Field(ge=1)] = 1 << 20
    """B * T of all requests that wait or compute. Who wants requests refused, not kept waiting."""
    max_bytes_in_flight: Annotated[int, Field(ge=1024)] = 8 << 30
    """Host memory that request bodies and answers may take together, bytes. Who has less memory, or
    more slow readers."""
    max_connections: Annotated[int, Field(ge=1)] = 1024
    """Open connections. Who has more than a hundred trainers with deep prefetch."""
    header_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds a request's head may take to arrive. Nobody, but behind a very slow link."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A body must move 16 KiB/s on average over so many seconds; else its connection is aborted.
    Who suspends trainers in the middle of a download."""
    drain_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds after SIGTERM in which the server is unready but still answers, with 503. Who runs
    behind a load balancer that takes so long to notice."""
    grace_period_s: Annotated[float, Field(gt=0)] = 25.0
    """Seconds that requests under way get to finish after that. Who has forwards that take longer,
    and a supervisor that waits as long."""
    log_format: Literal["console", "json"] = "console"
    """Form of the log's lines. Who collects logs by machine."""
    max_draft_vocabs: Annotated[int, Field(ge=1)] = 64
    """Draft vocabs kept; the least recently used goes first. Who has more drafts in training."""

    @field_validator("aux_layer_ids", mode="before")
    @classmethod
    def _split_ids(cls, value: object) -> object:
        """Take `1,14,26` as well as a sequence of ints; refuse what no target has, unloaded."""
        if value is None:
            return None
        parts = value.split(",") if isinstance(value, str) else value
        try:
            ids = tuple(int(str(part)) for part in parts)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            ids = ()
        if len(ids) != NUM_AUX_LAYERS or len(set(ids)) != NUM_AUX_LAYERS or min(ids) < 0:
            raise ValueError(f"aux_layer_ids must be {NUM_AUX_LAYERS} distinct layers, as 1,14,26")
        return ids

    @property
    def ranks(self) -> int:
        """Processes that run the target together."""
        return self.tp * self.cp

    @property
    def ranks_flag(self) -> str:
        """The option that says so, with its value."""
        return f"--tp {self.tp}" if self.tp > 1 else f"--cp {self.cp}"

    def tokens(self) -> tuple[str, ...]:
        """Return the accepted bearer tokens; none means that no token is asked for.

        Raises:
            InvalidRequest: one that no client can send; the message does not tell it.
            OSError, UnicodeDecodeError: the file cannot be read.
        """
        parts = (self.token.get_secret_value() if self.token else "").split(",")
        if self.token_file is not None:
            lines = self.token_file.read_text(encoding="utf-8").splitlines()
            parts += [line for line in lines if not line.lstrip().startswith("#")]
        tokens = tuple(part.strip() for part in parts if part.strip())
        if any(re.fullmatch(r"[!-+\--~]+", token) is None for token in tokens):
            raise InvalidRequest(
                "a token must be printable ASCII without spaces or commas, and one of those set is "
                "not; in a file, write one a line (# begins a comment)"
            )
        return tokens


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Return the `EAGLE3_*` names no setting reads: a misspelt variable must not be ignored."""
    known = {f"EAGLE3_{name.upper()}" for name in ServerSettings.model_fields} | _CLIENT_VARIABLES
    return sorted(name for name in names if name.startswith("EAGLE3_") and name not in known)


def nearest_variable(name: str) -> str:
    """Return the variable most like a misspelt one."""
    known = [f"EAGLE3_{each.upper()}" for each in ServerSettings.model_fields]
    return difflib.get_close_matches(name, known, 1, 0.0)[0]
