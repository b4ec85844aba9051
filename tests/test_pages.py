"""Pages for people: few, whole, linked, and no block that nobody ran passes for one that was."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from tests.pages import DOCS, FOR_PEOPLE, PAGES, RECORDS, ROOT, Block, blocks

EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]


def test_there_are_nine_pages_at_most_and_every_page_is_known() -> None:
    assert len(FOR_PEOPLE) <= 9
    assert {page for page in DOCS.glob("**/*.md")} == {
        page for page in PAGES if page.parent == DOCS
    }


@pytest.mark.parametrize("block", EVERY_BLOCK, ids=str)
def test_a_block_is_run_or_says_why_it_is_not(block: Block) -> None:
    if block.why_not is not None or block.language == "text":
        return
    if block.test == ".ci/run":
        ran = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
        lines = [line.removeprefix("$ ") for line in block.code.splitlines()]
        assert set(lines) <= set(ran)
        return
    assert block.test is not None, f"{block}: neither run nor marked: {block.marker!r}"
    name, _, function = block.test.partition("::")
    found = functions(ROOT / name)
    assert function in found, f"{block}: {block.test} is no test"
    fixtures = [found.get(name, set()) for name in found[function]]
    fetches = "documented" in set().union(found[function], *fixtures)
    fetches = fetches or f'run_by("{block.test}")' in every_test()
    assert fetches, f"{block}: {block.test} does not fetch it"
    source = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"mark\.(skip|xfail)|pytest\.(skip|xfail)\(", source), f"{name} may skip"


def test_what_a_test_fetches_it_uses() -> None:
    """An argument alone runs nothing."""
    for path in {ROOT / block.test.partition("::")[0] for block in EVERY_BLOCK if block.test}:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "documented" in {
                a.arg for a in node.args.args
            }:
                names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                assert "documented" in names, f"{path.name}: {node.name}"


@cache
def functions(path: Path) -> dict[str, set[str]]:
    """Return a module's functions, each with the names of its arguments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: {argument.arg for argument in node.args.args}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


@cache
def every_test() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text)}
    assert {*FOR_PEOPLE[1:], *RECORDS} <= linked
