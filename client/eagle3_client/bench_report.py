"""`BenchReport`: what a benchmark found, as a table, for a program, and what it recommends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Final

import torch

from eagle3_client.bench_plan import BenchPlan
from eagle3_client.bench_shares import FULL_SHARE, STAGES, Figures, Visit
from eagle3_client.config import ClientSettings
from eagle3_client.json_answers import rounded
from eagle3_client.preflight_report import Check, as_lines, wrapped
from eagle3_schemas import DraftVocab, ModelInfo

_BOUNDS: Final[dict[str | None, tuple[str, str, str]]] = {
    "trainer": (
        "trainer", "the trainer's step",
        "the target keeps up, so a faster one gains nothing",
    ),
    "target_compute": (
        "forward", "the target's forward",
        "a faster target or another replica gains",
    ),
    "target_head_copy": (
        "head, copy", "the target's head and copies",
        "a smaller draft vocab or another replica gains",
    ),
    "server_queue": (
        "queue", "requests of other clients, in the server's queue",
        "another replica gains",
    ),
    "link": (
        "link", "the link",
        "fewer bytes a token gain: another encoding, or --aux-dtype float8_e4m3",
    ),
    "this_host": (
        "host", "this host, which encodes and rebuilds batches",
        "a GPU (--device cuda) or an encoding that is not rebuilt gains",
    ),
    None: (
        "?", "what is not known: no server-timing came",
        "see whether a proxy drops that header",
    ),
}  # fmt: skip
"""What can bound a cell: in the table, in a sentence, and what would gain then."""

_SPREAD = 0.1  # of rounds: above it, small differences between cells say nothing
_NEAR = 0.97  # of the fastest: as fast


@dataclass
class Cell:
    """An encoding at a prefetch depth."""

    encoding: str
    prefetch: int
    trouble: Check | None = None
    """Why it has no figures."""
    visits: list[Visit] = field(default_factory=list)
    slowest_s: float = 0.0
    """Seconds its slowest visit took, what is not measured included."""

    @property
    def figures(self) -> Figures | None:
        """What was measured, if anything was."""
        return Figures.of(self.visits) if self.visits else None


@dataclass
class BenchReport:
    """What was found; `str` of it is for a reader."""

    settings: ClientSettings
    plan: BenchPlan
    info: ModelInfo | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    elapsed_s: float = 0.0
    is_interrupted: bool = False
    unanswered: str | None = None  # when it ended: for how long, and from whom

    def describe(
        self, info: ModelInfo, vocab: DraftVocab, attended: torch.Tensor, supervised: torch.Tensor
    ) -> None:
        """Note the target, and what its batches are."""
        self.info = info
        self.setup = {
            "batch_size": attended.shape[0],
            "sequence_length": attended.shape[1],
            "tokens_per_batch": int(attended.sum()),
            "supervised_per_batch": int(supervised[:, 1:].sum()),
            "ids": "random" if self.plan.token_ids is None else "text",
            "draft_vocab_size": vocab.draft_vocab_size,
            "step_ms": 1000 * self.plan.step_s,
            "device": str(self.settings.device),
            "aux_layer_ids": self.settings.aux_layer_ids or info.aux_layer_ids,
            "aux_dtype": self.settings.aux_dtype,
            "exact": self.settings.exact,
            "rows": self.settings.rows,
        }

    @property
    def measured(self) -> list[tuple[Cell, Figures]]:
        """The cells that have figures."""
        return [(cell, found) for cell in self.cells if (found := cell.figures) is not None]

    @property
    def answered(self) -> dict[str, int]:
        """Measured requests by the server that answered, those that answered none included."""
        visits = [visit for cell in self.cells for visit in cell.visits]
        urls = [sample.url for visit in visits for sample in visit.delivered]
        named = {url.partition(" ")[0] for url in urls}  # the rest is one of its addresses
        silent = [url for url in self.settings.urls if url not in named]
        return {url: urls.count(url) for url in [*sorted(set(urls)), *silent]}

    @property
    def has_passed(self) -> bool:
        """Whether something was measured and nothing failed."""
        troubles = [cell.trouble for cell in self.cells if cell.trouble is not None]
        return bool(self.measured) and all(each.status != "failed" for each in troubles)

    @property
    def recommended(self) -> tuple[Cell, Figures] | None:
        """The cell to use: the least prefetch, then the fewest bytes, within 3 % of the fastest.

        One that was measured in one round only, if no other there was measured in more.
        """
        measured = self.measured
        fastest = max((found.tokens_per_s for _, found in measured), default=0.0)
        near = [each for each in measured if each[1].tokens_per_s >= _NEAR * fastest]
        near = [each for each in near if len(each[0].visits) > 1] or near
        return min(near, key=lambda e: (e[0].prefetch, e[1].received_bytes_per_token), default=None)

    def recommendation(self) -> str:
        """Say in a sentence what to use, what bounds it, and what would gain."""
        if (chosen := self.recommended) is None:
            return "nothing was measured"
        cell, found = chosen
        bound = _BOUNDS[found.bounded_by][1]
        share = found.bound_share
        deeper = any(
            each.encoding == cell.encoding and each.prefetch > cell.prefetch
            for each, _ in self.measured
        )
        if deeper:
            more = "; more prefetch gains nothing"
        elif share is None:
            more = "; no deeper prefetch was measured"
        elif share < FULL_SHARE:
            more = f"; nothing is full, so try --prefetch {2 * cell.prefetch}"
        elif found.bounded_by == "link":
            # Busy is not full here: round trips and TCP windows are each connection's own.
            more = f"; requests may overlap there, so try --prefetch {2 * cell.prefetch}"
        else:
            more = ", so more prefetch gains nothing"
        words = (
            f"encoding {cell.encoding}, prefetch {cell.prefetch}: {found.tokens_per_s:,.0f} "
            f"tokens/s, bounded by {bound}{_share(share, ' ({} of the time)')}{more}"
        )
        if len(cell.visits) == 1:
            words += (
                "; measured in one round only: repeat with a longer --time-limit, or fewer "
                "--encodings and --prefetch depths"
            )
        spread = max(
            (each.tokens_per_s_highest - each.tokens_per_s_lowest) / each.tokens_per_s
            for _, each in self.measured
        )
        if spread > _SPREAD:
            words += f"; but rounds differ by up to {spread:.0%}: is the server or this host busy?"
        return words

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; the keys are the same whatever was found.

        `format` changes when keys do.
        """
        chosen = self.recommended
        return {
            "format": 1,
            "passed": self.has_passed,
            "interrupted": self.is_interrupted,
            "unanswered": self.unanswered,
            "elapsed_s": round(self.elapsed_s, 3),
            "client": {"version": version("eagle3-remote"), "torch_version": torch.__version__},
            "urls": list(self.settings.urls),
            "target": {
                name: getattr(self.info, name, None)
                for name in ("model_id", "fingerprint", "dtype", "device_name", "encodings")
            },
            "setup": self.setup,
            "requests_answered": self.answered,
            "cells": [
                {
                    "encoding": cell.encoding,
                    "prefetch": cell.prefetch,
                    "status": "ok" if cell.trouble is None else cell.trouble.status,
                    "detail": cell.trouble and cell.trouble.detail,
                    "remedy": cell.trouble and cell.trouble.remedy,
                    "figures": rounded(asdict(found)) if (found := cell.figures) else None,
                }
                for cell in self.cells
            ],
            "recommended": {
                "encoding": chosen and chosen[0].encoding,
                "prefetch": chosen and chosen[0].prefetch,
                "detail": self.recommendation(),
                "remedy": chosen and _BOUNDS[chosen[1].bounded_by][2],
            },
        }

    def to_text(self, width: int = 80) -> str:
        """Return it as plain lines of at most `width` columns, from 80 on."""
        lines = [*self.settings.urls, *self._setup_lines(width), ""]
        if len(counts := self.answered) > 1:
            words = ", ".join(f"{url} {count}" for url, count in counts.items())
            lines += [*wrapped(f"requests answered: {words}", "", width, indent=2), ""]
        if measured := self.measured:
            lines += [_SPEED_TITLES, *(_speed_row(*each) for each in measured), ""]
            lines += [_TIMES_TITLES, *(_times_row(*each) for each in measured), ""]
        if repeats := sum(found.repeats for _, found in measured):
            lines += [f"  {repeats} requests were repeated: a server was full, or failed", ""]
        troubles: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            if cell.trouble is not None:
                troubles.setdefault((cell.encoding, cell.trouble.detail), []).append(cell)
        for (encoding, _), cells in troubles.items():
            depths = ",".join(str(cell.prefetch) for cell in cells)
            checks = {f"{encoding} {depths}": check for c in cells if (check := c.trouble)}
            lines += as_lines(checks, width)
        lines += [*([""] if troubles else []), *wrapped(self.recommendation(), "", width, indent=0)]
        if (chosen := self.recommended) is not None:
            lines += wrapped(_BOUNDS[chosen[1].bounded_by][2], "-> ", width, indent=3)
        ended = f"{'interrupted after' if self.is_interrupted else 'in'} {self.elapsed_s:.1f} s"
        ended += f", after {self.unanswered}" if self.unanswered else ""
        return "\n".join([*lines, *wrapped(ended, "", width, indent=0)])

    def _setup_lines(self, width: int) -> list[str]:
        if (info := self.info) is None:
            return []
        setup = self.setup
        words = (
            f"{info.model_id}, {info.dtype} on {info.device_name}; batches of "
            f"{setup['batch_size']} x {setup['sequence_length']} tokens "
            f"({'random ids' if setup['ids'] == 'random' else 'of the text'}), all attended, "
            f"{setup['supervised_per_batch']} supervised; draft vocab of "
            f"{setup['draft_vocab_size']:,}; the trainer, on {setup['device']}, takes "
            f"{setup['step_ms']:g} ms a step"
        )
        return wrapped(words, "", width, indent=2)

    def __str__(self) -> str:
        return self.to_text()


_SPEED_TITLES = (
    f"  {'encoding':<8}{'prefetch':>9}{'tokens/s':>10}{'range':>16}{'bytes/token':>13}{'wait':>6}"
    "  bounded by"
)
_TIMES_TITLES = (
    f"  {'ms':<10}{'n':>5}{'p50':>6}{'p90':>6}{'p99':>6}{'max':>6}"
    f"{'queue':>6}{'forward':>8}{'head':>6}{'copy':>6}{'send':>6}{'host':>6}"
)


def _speed_row(cell: Cell, found: Figures) -> str:
    traffic = f"{found.received_bytes_per_token:,.0f}+{found.sent_bytes_per_token:.1f}"
    speeds = f"{found.tokens_per_s_lowest:,.0f}-{found.tokens_per_s_highest:,.0f}"
    return (
        f"  {cell.encoding:<8}{cell.prefetch:>9}{found.tokens_per_s:>10,.0f}{speeds:>16}"
        f"{traffic:>13}{found.wait_share:>6.0%}  {_BOUNDS[found.bounded_by][0]}"
        f"{_share(found.bound_share, ' {}')}"
    )


def _times_row(cell: Cell, found: Figures) -> str:
    latency, stages = found.latency_ms, found.stages_ms
    return "".join(
        [
            f"  {f'{cell.encoding} {cell.prefetch}':<10}{found.requests:>5}",
            *(f"{_say_ms(latency[name]):>6}" for name in ("p50", "p90", "p99", "max")),
            *(
                f"{_say_ms(stages[name]):>{length}}"
                for name, length in zip((*STAGES, "send", "host"), (6, 8, 6, 6, 6, 6), strict=True)
            ),
        ]
    )


def _say_ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _share(share: float | None, form: str) -> str:
    return "" if share is None else form.format(f"{share:.0%}")
