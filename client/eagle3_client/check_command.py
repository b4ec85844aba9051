"""`eagle3-remote check`: the command line of a preflight, apart from its options."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3_client.config import ClientSettings, split_urls
from eagle3_client.preflight import run_preflight
from eagle3_client.preflight_report import PreflightReport
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.tokenizer import HasVocab

_IDS_KEY = "eagle_aux_hidden_state_layer_ids"
_NO_TTY_WIDTH = 80


def check_servers(
    urls: Sequence[str],
    *,
    tokenizer: str | None,
    aux_layer_ids: str | None,
    draft_config: Path | None,
    device: str,
    encoding: str,
    draft_vocab_size: int | None,
    supervised_share: float,
    expect_fingerprint: str | None,
    time_limit_s: float,
) -> PreflightReport:
    """Run a preflight as the command's options say; URLs and token may come from the environment.

    Raises:
        InvalidRequest: an option that cannot work, with what would.
    """
    named = named_servers(urls)
    expected = None
    if draft_config is not None:
        config = read_draft_config(draft_config)
        expected = config.aux_layer_ids
        expect_fingerprint = expect_fingerprint or config.fingerprint
        draft_vocab_size = draft_vocab_size or config.draft_vocab_size
    settings = ClientSettings(
        urls=named,
        device=device_named(device),
        token=os.environ.get("EAGLE3_TOKEN") or None,
        aux_layer_ids=None if aux_layer_ids is None else split_ids(aux_layer_ids),
        encoding=encoding,
        expect_fingerprint=expect_fingerprint,
    )
    return run_preflight(
        settings,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        expect_aux_layer_ids=expected,
        draft_vocab_size=draft_vocab_size,
        supervised_share=supervised_share,
        time_limit_s=time_limit_s,
    )


def named_servers(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the servers that the command names, or else EAGLE3_URLS.

    Raises:
        InvalidRequest: neither names one.
    """
    named = split_urls(",".join(urls) or os.environ.get("EAGLE3_URLS", ""))
    if not named:
        raise InvalidRequest("name a server, as http://host:port, or set EAGLE3_URLS")
    return named


def device_named(name: str) -> torch.device:
    """Read `--device`.

    Raises:
        InvalidRequest: torch knows no such device.
    """
    try:
        return torch.device(name)
    except RuntimeError as exc:
        raise InvalidRequest(f"--device must be cpu, cuda or cuda:0; got {name!r}") from exc


def render(report: PreflightReport, *, as_json: bool) -> str:
    """Return the report as one JSON document, or as lines that fit the terminal."""
    if as_json:
        return json.dumps(report.to_dict(), indent=2)
    return printable(report.to_text(terminal_width()))


def printable(text: str) -> str:
    """Return a text with `?` for what stdout cannot print."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def terminal_width() -> int:
    """Return the columns that a report may take."""
    if not sys.stdout.isatty():
        return _NO_TTY_WIDTH
    return min(max(shutil.get_terminal_size((_NO_TTY_WIDTH, 24)).columns, 60), 120)


class DraftConfig(NamedTuple):
    """What a draft's config says of the target it is for."""

    aux_layer_ids: tuple[int, ...]
    """Layer outputs; the file names layer inputs, ours + 1."""
    fingerprint: str | None
    draft_vocab_size: int | None


def read_draft_config(path: Path) -> DraftConfig:
    """Read a draft's config: `backend.draft_config()`'s, or a serving engine's.

    Raises:
        InvalidRequest: not such a file.
    """
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidRequest(f"--draft-config {path} cannot be read as JSON: {exc}") from exc
    fields = fields if isinstance(fields, dict) else {}
    nested = fields.get("eagle_config")
    for place in (fields, nested if isinstance(nested, dict) else {}):
        ids = place.get(_IDS_KEY)
        if ids is None:
            continue
        if not isinstance(ids, list) or not all(type(i) is int and i >= 1 for i in ids):
            raise InvalidRequest(
                f"{_IDS_KEY} in {path} must be a list of layer inputs from 1 on; got {ids!r:.200}"
            )
        fingerprint, size = fields.get("target_fingerprint"), fields.get("draft_vocab_size")
        return DraftConfig(
            tuple(i - 1 for i in ids),
            fingerprint if isinstance(fingerprint, str) else None,
            size if type(size) is int else None,
        )
    raise InvalidRequest(
        f"{path} has no {_IDS_KEY}; leave it out, and name the layers with --aux-layer-ids, as "
        "outputs"
    )


def load_tokenizer(name: str) -> HasVocab:
    """Load a tokenizer from a directory or the hub, with transformers.

    Raises:
        InvalidRequest: it cannot be loaded, or transformers is missing.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as exc:
        raise InvalidRequest(
            "--tokenizer needs transformers, which is not installed. Install it with\n"
            '  pip install "transformers>=5,<6"'
        ) from exc
    try:
        tokenizer: HasVocab = AutoTokenizer.from_pretrained(name)
    except Exception as exc:  # OSError, ValueError, or whatever its file makes it raise
        words = " ".join(str(exc).split())[:500]
        raise InvalidRequest(
            f"--tokenizer {name} cannot be loaded: {words}. Name a directory that holds one, or a "
            "hub id"
        ) from exc
    return tokenizer


def read_text(path: Path) -> str:
    """Read `--text`.

    Raises:
        InvalidRequest: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"--text {path} cannot be read as UTF-8: {exc}") from exc


def split_ids(text: str) -> tuple[int, ...]:
    """Read `--aux-layer-ids`.

    Raises:
        InvalidRequest: not numbers with commas.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise InvalidRequest(f"--aux-layer-ids must be as 1,14,26; got {text!r}") from exc
