"""`eagle3-remote verify`: the command line of `verify`, apart from its options."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_client.check_command import (
    load_tokenizer,
    named_servers,
    printable,
    read_text,
    split_ids,
    terminal_width,
)
from eagle3_client.verify import verify
from eagle3_client.verify_local import LocalTarget
from eagle3_client.verify_report import VerifyReport

_RETRY_FOR_S = 10.0


def verify_servers(
    urls: Sequence[str],
    *,
    tokenizer: str,
    text: Path,
    model: str | None,
    aux_layer_ids: str | None,
) -> list[VerifyReport]:
    """Verify servers as the command's options say; URLs and token may come from the environment.

    Raises:
        InvalidRequest: an option that cannot work, with what would.
    """
    named = named_servers(urls)
    layers = None if aux_layer_ids is None else split_ids(aux_layer_ids)
    words = read_text(text)
    loaded = load_tokenizer(tokenizer)
    with ExitStack() as stack:
        backends = [
            (
                url,
                stack.enter_context(
                    RemoteEagle3Backend(
                        url,
                        token=os.environ.get("EAGLE3_TOKEN") or None,
                        aux_layer_ids=layers,
                        encoding="probs",
                        rows="loss_mask",
                        retry_for_s=_RETRY_FOR_S,
                    )
                ),
            )
            for url in named
        ]
        load = None if model is None else partial(LocalTarget.load, model)
        return verify(backends, loaded, words, load, layers)


def render(reports: Sequence[VerifyReport], *, as_json: bool) -> str:
    """Return the reports as one JSON document, or as lines that fit the terminal."""
    if as_json:
        document = {
            "format": 1,
            "passed": all(report.has_passed for report in reports),
            "servers": [report.to_dict() for report in reports],
        }
        return json.dumps(document, indent=2)
    width = terminal_width()
    return printable("\n\n".join(report.to_text(width) for report in reports))
