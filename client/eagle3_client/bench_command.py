"""`eagle3-remote bench`: the command, its options and its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from eagle3_client.bench import Bench
from eagle3_client.bench_plan import BenchPlan
from eagle3_client.check_command import (
    device_named,
    load_tokenizer,
    named_servers,
    printable,
    read_text,
    split_ids,
    terminal_width,
)
from eagle3_client.config import ClientSettings, check_device
from eagle3_client.json_answers import end_with
from eagle3_client.preflight_compare import failed
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error

_RETRY_FOR_S = 10.0
_INTERRUPTED = 130  # as shells say it


def bench(
    urls: Annotated[
        list[str] | None,
        typer.Argument(help="Servers, as http://host:port; or comma-separated [EAGLE3_URLS]."),
    ] = None,
    encodings: Annotated[
        str | None, typer.Option(help="Some of probs,logits,hidden [those the servers offer].")
    ] = None,
    prefetch: Annotated[str, typer.Option(help="Depths: requests in flight.")] = "1,2,4",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a row [512, or what the servers take].")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Batches measured of an encoding at a depth, if there is time.")
    ] = 30,
    step_ms: Annotated[
        float, typer.Option(help="Milliseconds that the trainer computes for a batch, simulated.")
    ] = 0.0,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="D; its ids are random [32000, or V if less].")
    ] = None,
    supervised_share: Annotated[
        float, typer.Option(help="Share of the tokens that are supervised.")
    ] = 0.6,
    text: Annotated[
        Path | None, typer.Option(help="File to take the tokens from, with --tokenizer [random].")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Directory or hub id, for --text.")] = None,
    device: Annotated[
        str, typer.Option(help="Of the trainer, here: where batches are rebuilt.")
    ] = "cpu",
    aux_layer_ids: Annotated[
        str | None,
        typer.Option(
            help="Layer outputs, as the trainer will pass them to the client: 1,14,26 [the "
            "server's default]."
        ),
    ] = None,
    aux_dtype: Annotated[str, typer.Option(help="model, or float8_e4m3 (lossy).")] = "model",
    exact: Annotated[
        bool, typer.Option("--exact", help="Bit-for-bit equality with a co-located target.")
    ] = False,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", help="Seconds after which it ends, whatever.")
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")
    ] = False,
) -> None:
    """Measure encodings and prefetch depths as a trainer here would see them, and what bounds them.

    The token comes from EAGLE3_TOKEN. Exit code 0: measured; 1: something failed, or nothing could
    be measured; 2: an option that cannot work; 130: interrupted. The servers are kept busy.
    """
    try:
        settings = _settings(urls or [], device, aux_layer_ids, aux_dtype, exact, time_limit_s)
        plan = BenchPlan(
            encodings=None if encodings is None else _encodings(encodings),
            depths=_depths(prefetch),
            batch_size=batch_size,
            sequence_length=sequence_length,
            steps=steps,
            supervised_share=supervised_share,
            step_s=step_ms / 1000,
            draft_vocab_size=draft_vocab_size,
            time_limit_s=time_limit_s,
            token_ids=_token_ids(text, tokenizer),
        )
        report = Bench(settings, plan).run()
    except InvalidRequest as exc:
        end_with(exc, 2, as_json=as_json)
    except RemoteEagle3Error as exc:
        end_with(exc, 1, as_json=as_json, remedy=failed(exc).remedy)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(printable(report.to_text(max(terminal_width(), 80))))
    if report.is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(0 if report.has_passed else 1)


def _settings(
    urls: list[str],
    device: str,
    aux_layer_ids: str | None,
    aux_dtype: Any,
    exact: bool,
    time_limit_s: float,
) -> ClientSettings:
    torch_device = device_named(device)
    check_device(torch_device)
    return ClientSettings(
        urls=named_servers(urls),
        device=torch_device,
        token=os.environ.get("EAGLE3_TOKEN") or None,
        aux_layer_ids=None if aux_layer_ids is None else split_ids(aux_layer_ids),
        aux_dtype=aux_dtype,
        exact=exact,
        rows="loss_mask",
        retry_for_s=max(min(_RETRY_FOR_S, time_limit_s / 2), 0.0),  # a failure must show in time
    )


def _encodings(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as exc:
        raise InvalidRequest(f"--prefetch must be as 1,2,4; got {text!r}") from exc


def _token_ids(text: Path | None, tokenizer: str | None) -> torch.Tensor | None:
    """Tokenize a file; None without one.

    Raises:
        InvalidRequest: one of the two is missing, or cannot be read.
    """
    if text is None and tokenizer is None:
        return None
    if text is None or tokenizer is None:
        raise InvalidRequest("--text and --tokenizer go together; give both or neither")
    loaded: Any = load_tokenizer(tokenizer)
    ids = loaded(read_text(text), verbose=False)["input_ids"]
    if not ids:
        raise InvalidRequest(f"--text {text} has no tokens; give a file of some words")
    return torch.tensor(ids)
