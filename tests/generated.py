"""Pages with parts that code writes, between `<!-- NAME: begin, generated -->` and its end."""

from __future__ import annotations

from collections.abc import Mapping


def part_of(page: str, name: str) -> str:
    """Return a generated part as a page has it.

    Raises:
        LookupError: the page has no such part.
    """
    _, begin, rest = page.partition(f"<!-- {name}: begin, generated -->\n\n")
    part, end, _ = rest.partition(f"\n<!-- {name}: end -->\n")
    if not begin or not end:
        raise LookupError(f"the page has no generated part {name!r}")
    return part


def with_parts(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with its generated parts, by name, as they are now."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin, generated -->\n", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{part}\n{end}{after}"
    return page
