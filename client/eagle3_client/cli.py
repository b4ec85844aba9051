"""The `eagle3-remote` command. `serve` imports the server lazily, and says how to install it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from eagle3_client.bench_command import bench
from eagle3_client.json_answers import JsonCommand, end_with
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error

app = typer.Typer(
    name="eagle3-remote",
    help="Remote target-model server and client for EAGLE-3 draft training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would eat the defaults in brackets
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"eagle3-remote {version('eagle3-remote')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Remote target-model server and client for EAGLE-3 draft training."""


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, checkpoint directory, or .gguf file; or set EAGLE3_MODEL."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on [127.0.0.1]. Wider needs EAGLE3_TOKEN."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one [8001].")] = None,
    unix_socket: Annotated[
        Path | None, typer.Option(help="Listen on this Unix socket too (mode 0600).")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM certificate chain; the port then speaks https.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or float16 [auto: bfloat16 on CUDA, float32 on CPU]."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device [auto: cuda if there is one].")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Layers on several devices: auto, balanced …, or JSON (a file, too)."),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Quantise while loading: bnb-nf4, bnb-int8 or torchao-int8 [no]."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(help="Processes, one a device, to shard the weights over [1].")
    ] = None,
    cp: Annotated[
        int | None, typer.Option(help="Processes, one a device, to split each sequence over [1].")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Servers that Ray starts and restarts, on --port and those after it."),
    ] = None,
    urls_file: Annotated[
        Path | None, typer.Option(help="File to write the replicas' URLs to, for EAGLE3_URLS.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 … [the model's default].")
    ] = None,
    aux_layer_ids: Annotated[
        str | None,
        typer.Option(help="Default aux layers (layer outputs), as 1,14,26 [1, L//2-1, L-4]."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name told to trainers [the hub id or directory's name].")
    ] = None,
    max_tokens_per_request: Annotated[
        int | None, typer.Option(help="Largest B * T of one request [16384].")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code", help="Run Python code of the checkpoint."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with bearer tokens, one a line.")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Allow a wide bind without a token."),
    ] = None,
    drain_delay_s: Annotated[
        float | None,
        typer.Option("--drain-delay", help="Seconds after SIGTERM before the listener closes [0]."),
    ] = None,
    grace_period_s: Annotated[
        float | None,
        typer.Option("--grace-period", help="Seconds requests get to finish after that [25]."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json [console].")] = None,
) -> None:
    """Serve a frozen target LM to trainers.

    Every option can also be set as EAGLE3_NAME, for example EAGLE3_PORT; options win. Bearer
    tokens come from EAGLE3_TOKEN, comma-separated, or --token-file; never from arguments, which
    others can read. Limits that few need to change are EAGLE3_ variables alone: docs/operations.md.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        from pydantic import ValidationError

        from eagle3_server.config import ServerSettings
        from eagle3_server.serve import serve as run
    except ImportError as exc:
        typer.secho(
            f"`serve` needs the server's packages ({exc.name or exc} is missing). Install them "
            'with\n  pip install "eagle3-remote[server]"\nor, from a clone\n'
            '  pip install ".[server]"',
            err=True,
        )
        raise typer.Exit(2) from exc
    try:
        settings = ServerSettings(**given)
        code = run(settings)
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            name = ".".join(map(str, error["loc"]))
            got = "a secret" if name == "token" else repr(error["input"])
            variable = f"EAGLE3_{name.upper()}"
            words = error["msg"].removeprefix("Value error, ")
            typer.secho(f"setting {name} ({variable}): {words}; got {got}", err=True)
        raise typer.Exit(2) from exc
    except RemoteEagle3Error as exc:
        typer.secho(str(exc), err=True)
        raise typer.Exit(2) from exc
    raise typer.Exit(code)


@app.command(cls=JsonCommand)
def check(
    urls: Annotated[
        list[str] | None,
        typer.Argument(help="Servers, as http://host:port; or comma-separated [EAGLE3_URLS]."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Directory or hub id; compared with the served checkpoint's."),
    ] = None,
    aux_layer_ids: Annotated[
        str | None,
        typer.Option(
            help="Layer outputs, as the trainer will pass them to the client: 1,14,26 [the "
            "server's default]."
        ),
    ] = None,
    draft_config: Annotated[
        Path | None,
        typer.Option(
            help="The draft's config.json; its eagle_aux_hidden_state_layer_ids, layer inputs "
            "(ours + 1), must name those layers."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of the trainer, which need not be here; decides the encoding.")
    ] = "cpu",
    encoding: Annotated[str, typer.Option(help="auto, probs, logits or hidden.")] = "auto",
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="D, for the bytes per token [32000, or V if less].")
    ] = None,
    supervised_share: Annotated[
        float, typer.Option(help="Assumed share of the tokens that are supervised.")
    ] = 0.6,
    expect_fingerprint: Annotated[
        str | None, typer.Option(help="The only target accepted, as an earlier check printed it.")
    ] = None,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", help="Seconds after which the check ends, whatever.")
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")
    ] = False,
) -> None:
    """Check servers before a run: reachable, the same, as the draft expects, and how fast.

    The token comes from EAGLE3_TOKEN. Exit code 0: nothing failed; 1: something did; 2: an option
    that cannot work. The servers compute for a few seconds each.
    """
    from eagle3_client.check_command import check_servers, render

    try:
        report = check_servers(
            urls or (),
            tokenizer=tokenizer,
            aux_layer_ids=aux_layer_ids,
            draft_config=draft_config,
            device=device,
            encoding=encoding,
            draft_vocab_size=draft_vocab_size,
            supervised_share=supervised_share,
            expect_fingerprint=expect_fingerprint,
            time_limit_s=time_limit_s,
        )
    except InvalidRequest as exc:
        end_with(exc, 2, as_json=as_json)
    typer.echo(render(report, as_json=as_json))
    raise typer.Exit(0 if report.has_passed else 1)


@app.command(cls=JsonCommand)
def verify(
    text: Annotated[Path, typer.Option(help="File of ordinary text, a few hundred words.")],
    tokenizer: Annotated[
        str, typer.Option(help="Directory or hub id: what tokenizes the training data.")
    ],
    urls: Annotated[
        list[str] | None,
        typer.Argument(help="Servers, as http://host:port; or comma-separated [EAGLE3_URLS]."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of the target, to compare with a forward here."),
    ] = None,
    aux_layer_ids: Annotated[
        str | None, typer.Option(help="Layer outputs, as 1,14,26 [the server's default].")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")
    ] = False,
) -> None:
    """Verify what servers supervise, on a text, and with --model against a forward here.

    The token comes from EAGLE3_TOKEN. Exit code 0: nothing failed; 1: something did, or a server
    cannot be asked; 2: an option that cannot work.
    """
    from eagle3_client.verify_command import render, verify_servers

    try:
        reports = verify_servers(
            urls or (), tokenizer=tokenizer, text=text, model=model, aux_layer_ids=aux_layer_ids
        )
    except InvalidRequest as exc:
        end_with(exc, 2, as_json=as_json)
    typer.echo(render(reports, as_json=as_json))
    raise typer.Exit(0 if all(report.has_passed for report in reports) else 1)


app.command(cls=JsonCommand)(bench)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
