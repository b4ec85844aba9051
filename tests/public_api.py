"""The public names, and the tables of docs/integrations.md: `python -m tests.public_api`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tests.generated import with_parts
from tests.pages import DOCS

PAGE = DOCS / "integrations.md"
PACKAGES = ("eagle3_client", "eagle3_schemas", "eagle3_server")
ADAPTERS = "eagle3_client.adapters"
"""Public too, and imported by name: it stands for other projects."""


def exported() -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield each public name with its package; one that two packages export, at the first."""
    seen: set[int] = set()
    for name in (*PACKAGES, ADAPTERS):
        module = importlib.import_module(name)
        names = [
            each
            for each, value in vars(module).items()
            if getattr(value, "__module__", "") == name and not each.startswith("_")
        ]
        for each in getattr(module, "__all__", names):
            found = getattr(module, each)
            if id(found) not in seen or not hasattr(found, "__doc__"):
                seen.add(id(found))
                yield module, each, found


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield a class' own public methods and properties, and its ancestors' of ours."""
    seen = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("eagle3_"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if inspect.isfunction(value) or isinstance(value, property):
                seen.add(name)
                yield name, value


def first_line(thing: Any) -> str:
    """Return a docstring's summary."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def tables() -> dict[str, str]:
    """Return the page's generated part by name."""
    rows = "| name | |\n|---|---|\n"
    for module, name, found in exported():
        summary = repr(found) if isinstance(found, (int, str)) else first_line(found)
        rows += f"| `{module.__name__}.{name}` | {summary} |\n"
    rows += "\n| `RemoteEagle3Backend` | |\n|---|---|\n"
    from eagle3_client import RemoteEagle3Backend

    for name, value in methods(RemoteEagle3Backend):
        call = "" if isinstance(value, property) else "()"
        rows += f"| `{name}{call}` | {first_line(value)} |\n"
    return {"api": rows}


def with_tables(page: str) -> str:
    """Return the page with its generated parts as they are now."""
    return with_parts(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
