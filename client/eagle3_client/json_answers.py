"""What commands print with `--json`: one document on stdout, also where they end early."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from eagle3_client.preflight_compare import failed
from eagle3_schemas.errors import ERROR_KINDS, RemoteEagle3Error, Unauthorized


class JsonCommand(TyperCommand):
    """A command whose `--json` also holds for options that cannot be read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options; exit code 2 follows where that fails."""
        wants_json = "--json" in args  # they are consumed
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:  # UsageError, of click or of the copy that typer has
            if wants_json and hasattr(exc, "format_message"):
                typer.echo(_document("invalid_request", exc.format_message(), None))
            raise


def end_with(
    error: RemoteEagle3Error, exit_code: int, *, as_json: bool, remedy: str | None = None
) -> NoReturn:
    """End the command: the words on stderr, and with `--json` as a document on stdout too.

    Raises:
        typer.Exit: with that code.
    """
    words = str(error)
    if isinstance(error, Unauthorized):  # without what is for who calls from code
        check = failed(error)
        words, remedy = f"{check.detail} (url={error.url})", check.remedy
    if as_json:
        typer.echo(_document(_code(error), words, remedy))
    typer.secho(words if remedy is None else f"{words}\n-> {remedy}", err=True)
    raise typer.Exit(exit_code) from error


def rounded(value: Any) -> Any:
    """Round the numbers of JSON values; nobody needs more."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _document(code: str, detail: str, remedy: str | None) -> str:
    error = {"code": code, "detail": detail, "remedy": remedy}
    return json.dumps({"format": 1, "passed": False, "error": error}, indent=2)


def _code(error: RemoteEagle3Error) -> str:
    """Return the error's code on the wire; of one that no server sends, its class's name."""
    for kind in ERROR_KINDS:
        if kind.error is type(error):
            return kind.code
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
