"""What the demo found: printed, as JSON, and as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo; losses are in nats per supervised token.

    Attributes:
        target: name of the target.
        vocab_size: ids in the target's vocab.
        draft_vocab_size: ids in the draft vocab.
        threads: CPU threads of the trainer, and of the server.
        tokens: real (unpadded) tokens trained on.
        remote_losses: one per training step, target served over HTTP.
        colocated_losses: the same steps, target in the trainer's process.
        remote_tokens_per_s: trained tokens per second of wall time.
        colocated_tokens_per_s: likewise.
        response_bytes_per_token: body bytes received for supervision, per real token.
        held_out_tokens: supervised tokens in text neither trained on nor counted for the vocab.
        held_out_loss_start: mean loss over the held-out batches, before training.
        held_out_loss_end: the same after training.
        step_accuracies: held-out top-1 accuracy of each drafted token after training.
        accept_length: simulated tokens per verification, 1 + the sum of accuracy products.
        coverage: share of held-out supervised tokens whose target argmax is in the draft vocab.
        seconds: wall time of the whole demo.
    """

    target: str
    vocab_size: int
    draft_vocab_size: int
    threads: int
    tokens: int
    remote_losses: list[float]
    colocated_losses: list[float]
    remote_tokens_per_s: float
    colocated_tokens_per_s: float
    response_bytes_per_token: float
    held_out_tokens: int
    held_out_loss_start: float
    held_out_loss_end: float
    step_accuracies: list[float]
    accept_length: float
    coverage: float
    seconds: float

    @property
    def first_difference(self) -> int | None:
        """The first step, from 1, whose two losses differ in any bit; None when all are equal."""
        if len(self.remote_losses) != len(self.colocated_losses):
            return min(len(self.remote_losses), len(self.colocated_losses)) + 1
        pairs = zip(self.remote_losses, self.colocated_losses, strict=True)
        return next((step for step, (a, b) in enumerate(pairs, start=1) if a != b), None)

    @property
    def losses_equal(self) -> bool:
        """Whether training on the remote target gave the co-located losses bit for bit."""
        return self.first_difference is None

    def summary(self) -> str:
        """Return the report as text."""
        steps = len(self.remote_losses)
        accuracies = ", ".join(f"{accuracy:.1%}" for accuracy in self.step_accuracies[1:])
        lines = [
            ("target", f"{self.target}, float32, {self.threads} threads"),
            (
                "draft vocab",
                f"{self.draft_vocab_size:,} of {self.vocab_size:,} ids, "
                f"coverage {self.coverage:.1%} of held-out tokens",
            ),
            (
                "training loss",
                f"{self.remote_losses[0]:.4f} -> {self.remote_losses[-1]:.4f} nats/token "
                f"in {steps} steps, {self.tokens:,} tokens",
            ),
            (
                "held-out loss",
                f"{self.held_out_loss_start:.4f} -> {self.held_out_loss_end:.4f} nats/token "
                f"on {self.held_out_tokens:,} supervised tokens",
            ),
            (
                "held-out top-1 accuracy",
                f"{self.step_accuracies[0]:.1%}" + (f" (then {accuracies})" if accuracies else ""),
            ),
            ("simulated accept length", f"{self.accept_length:.2f} tokens per verification"),
            (
                "speed",
                f"{self.remote_tokens_per_s:,.0f} tokens/s remote, "
                f"{self.colocated_tokens_per_s:,.0f} tokens/s co-located",
            ),
            ("responses", f"{self.response_bytes_per_token:,.0f} bytes/token"),
            (
                "losses equal",
                f"yes, all {steps} steps, bit for bit"
                if self.losses_equal
                else f"NO, first difference in step {self.first_difference}",
            ),
            ("total time", f"{self.seconds:.0f} s"),
        ]
        return "\n".join(f"{label:<24} {value}" for label, value in lines)

    def save(self, directory: Path) -> tuple[Path, Path]:
        """Write ``report.json`` and ``losses.png`` and return their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        json_file, plot_file = directory / "report.json", directory / "losses.png"
        content = {**asdict(self), "losses_equal": self.losses_equal}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self._plot(plot_file)
        return json_file, plot_file

    def _plot(self, file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")  # no display needed
        from matplotlib import pyplot, ticker

        steps = range(1, len(self.remote_losses) + 1)
        verdict = "equal bit for bit" if self.losses_equal else "NOT equal"
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        # Equal curves lie on each other: a wide pale one shows under a thin dashed one.
        axes.plot(
            range(1, len(self.colocated_losses) + 1),
            self.colocated_losses,
            color="#f5b041",
            linewidth=6,
            solid_capstyle="round",
            label=f"co-located target, {self.colocated_tokens_per_s:,.0f} tokens/s",
        )
        axes.plot(
            steps,
            self.remote_losses,
            color="#1a5276",
            linewidth=1.8,
            linestyle="--",
            label=f"remote target over HTTP, {self.remote_tokens_per_s:,.0f} tokens/s",
        )
        axes.axhline(
            math.log(self.draft_vocab_size),
            color="gray",
            linewidth=1,
            linestyle=":",
            label=f"uniform guess over the draft vocab, ln {self.draft_vocab_size:,}",
        )
        axes.set_title(f"EAGLE-3 draft for {self.target}: losses {verdict}")
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss [nats per supervised token]")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
