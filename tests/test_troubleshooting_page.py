"""docs/troubleshooting.md quotes what the program really says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.pages import DOCS, ROOT, commands

from eagle3_schemas import errors

TEXT = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
SYMPTOMS = re.findall(r"^\| (.*?) \|", TEXT, re.MULTILINE)


def every_source() -> str:
    """The packages' text, with strings that stand on several lines joined."""
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("*/eagle3_*/*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", "".join(texts))


@pytest.mark.parametrize(
    "words", sorted({words for each in SYMPTOMS for words in re.findall(r"`([^`]+)`", each)})
)
def test_the_words_of_a_symptom_are_the_programs(words: str) -> None:
    assert words in every_source()


def test_every_error_is_on_the_page() -> None:
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, errors.RemoteEagle3Error):
            assert f"`{name}`" in TEXT, name


def test_the_first_command_names_what_is_wrong(documented: list[str], tmp_path: Path) -> None:
    """Nobody listens at the URL."""
    ((command,),) = map(commands, documented)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment: dict[str, Any] = {**os.environ, "PATH": path, "EAGLE3_URLS": "http://127.0.0.1:9"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAILED +reachable", done.stdout)
    assert "->" in done.stdout
