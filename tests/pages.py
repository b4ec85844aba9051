"""The pages that users read, and their blocks of code.

Before each fenced block stands, on a line of its own, either
`<!-- run: tests/FILE.py::TEST -->`, which the test named fetches by `run_by`, or
`*Not run: WHY.*`, which readers see. `tests/test_pages.py` holds all blocks to that.

Processes import this too, so it needs no pytest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOR_PEOPLE = (
    ROOT / "README.md",
    *(
        DOCS / f"{name}.md"
        for name in (
            "training", "operations", "protocol", "encodings", "performance", "security",
            "troubleshooting", "integrations",
        )
    ),
)  # fmt: skip
"""At most nine, so that a reader can know them."""

RECORDS = (
    DOCS / "decisions.md",
    DOCS / "not-verified.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
)
"""For who builds it, or wants to know why."""

PAGES = FOR_PEOPLE + RECORDS


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: that holds it.
        line: of its fence, from 1.
        language: after the fence's backticks.
        code: what is inside.
        marker: the last line with text before it.
    """

    page: Path
    line: int
    language: str
    code: str
    marker: str

    @property
    def test(self) -> str | None:
        """The test that runs it, as `tests/FILE.py::TEST`."""
        found = re.fullmatch(r"<!-- run: (\S+) -->", self.marker)
        return found and found[1]

    @property
    def why_not(self) -> str | None:
        """Why nothing runs it, in the words that readers see."""
        found = re.fullmatch(r"\*Not run: (.+)\.\*", self.marker)
        return found and found[1]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield a page's fenced blocks in order."""
    marker, opened, language, code = "", 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if opened:
                yield Block(page, opened, language, "".join(code), marker)
                marker, opened, code = "", 0, []
            else:
                opened, language = number, line[3:]
        elif opened:
            code.append(line + "\n")
        elif line.strip():
            marker = line.strip()
    if opened:
        raise ValueError(f"{page}:{opened}: a block that does not end")


def run_by(test: str) -> list[str]:
    """Return the code of the blocks that `tests/FILE.py::TEST` runs, in the order of the pages."""
    found = [block.code for page in PAGES for block in blocks(page) if block.test == test]
    if not found:
        raise LookupError(f"no page has a block that {test} runs")
    return found


def commands(code: str) -> list[str]:
    """Return the commands of a console block, each as one line, without what they print."""
    joined = code.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
