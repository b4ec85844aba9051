"""The PromQL of `docker/grafana`, and what its parts ask of the metrics."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))["groups"][
    0
]["rules"]
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [target["expr"] for target in TARGETS] + [rule["expr"] for rule in RULES]

SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds to what it scrapes."""

_WORDS = {"and", "or", "unless", "bool", "offset", "group_left", "group_right"}


@dataclass(frozen=True)
class Selector:
    """One metric in an expression, with its matchers (label, operator, value)."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expression: str) -> list[Selector]:
    """Return the metrics an expression reads."""
    bare = re.sub(r"\[[^\]]*\]", "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    found = []
    for name, matchers in re.findall(
        r"(?<![\w\"|.$])([a-zA-Z_:][\w:]*)\b(?!\s*\()\s*(?:\{([^}]*)\})?",
        re.sub(r"\{[^}]*\}", lambda match: match[0].replace(" ", ""), bare),
    ):
        if name not in _WORDS:
            parsed = re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers)
            found.append(Selector(name, tuple(parsed)))
    return found


def grouped_by(expression: str) -> set[str]:
    """Return the labels an expression groups or matches by."""
    lists = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    return {label.strip() for labels in lists for label in labels.split(",")}
