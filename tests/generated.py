"""Pages with parts that code writes, between `<!-- NAME: begin, generated -->` and its end."""

from __future__ import annotations

from collections.abc import Mapping


def with_parts(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with its generated parts, by name, as they are now."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin, generated -->\n", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{part}\n{end}{after}"
    return page
