"""`VerifyReport`: what `verify` found of a server, for a reader and for a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagle3_client.preflight_report import Check, as_lines


@dataclass(frozen=True)
class VerifyReport:
    """What was found of one server; `str` of it is for a reader."""

    url: str
    checks: dict[str, Check]
    elapsed_s: float

    @property
    def has_passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != "failed" for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        checks = {
            name: {
                "status": check.status,
                "detail": check.detail,
                "remedy": check.remedy,
                "values": check.values,
            }
            for name, check in self.checks.items()
        }
        return {"url": self.url, "passed": self.has_passed, "checks": checks}

    def to_text(self, width: int = 80) -> str:
        """Return it as lines of at most `width` columns."""
        return "\n".join([self.url, *as_lines(self.checks, width)])

    def __str__(self) -> str:
        return self.to_text()
