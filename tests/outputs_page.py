"""Generates the tables of docs/integrations.md: `python -m tests.outputs_page`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.generated import with_parts

from eagle3_schemas.capture import DRAFT_VOCAB_OUTPUTS, OUTPUTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "integrations.md"

NEMO = "NeMo AutoModel 0.7.0, `components/speculative/"
SPECFORGE = "SpecForge 0.2.0, `specforge/"
SPECULATORS = "speculators 0.9.0, `speculators/"
EAGLE = "SafeAILab/EAGLE, `eagle/"


@dataclass(frozen=True)
class Trainer:
    """One row: what a trainer's code reads of its target.

    Attributes:
        name: method and implementation.
        layers: aux layers, as that implementation names them.
        outputs: of `capture`; none means that `generate_batch` gives everything.
        notes: frames, and what the trainer computes itself.
        shown_by: the test that trains it on a served target; None: not run.
        source: where its code reads them.
    """

    name: str
    layers: str
    outputs: tuple[str, ...]
    notes: str
    source: str
    shown_by: str | None = None


TRAINERS = (
    Trainer(
        "EAGLE-1, EAGLE-2: SafeAILab",
        "none",
        ("last_hidden",),
        "post-norm; the distribution over V from the whole head; loss mask unshifted",
        EAGLE + "train/main.py` 231-237; `ge_data/ge_data_all_vicuna.py` (2320d52)",
    ),
    Trainer(
        "EAGLE-1, EAGLE-2: NeMo AutoModel",
        "none",
        ("last_hidden",),
        "post-norm, unshifted and shifted; the distribution over V from the whole head",
        NEMO + "eagle/target_v12.py` 144-156, `core_v12.py` 194-213",
    ),
    Trainer(
        "EAGLE-3: NeMo AutoModel",
        "3 outputs, `1, L//2-1, L-4`",
        (),
        "ids, loss mask and distribution shifted by one; rows of the position mask",
        NEMO + "eagle/core.py` 153-164",
        "tests/peer/test_nemo_automodel.py",
    ),
    Trainer(
        "EAGLE-3: SafeAILab",
        "3 inputs, `2, L//2, L-3` (our default layers)",
        ("aux", "last_hidden"),
        "the distribution from the whole head; loss mask not shifted: your own, not the capture's",
        EAGLE + "traineagle3/cnets.py` 714-732, 833-856",
    ),
    Trainer(
        "EAGLE-3: SpecForge",
        "3 outputs, `1, L//2-1, L-4`",
        ("aux", "last_hidden"),
        "post-norm; it runs the whole head itself; loss mask [B, T, 1], not shifted; draft vocab "
        "ascending (`t2d`)",
        SPECFORGE + "modeling/target/target_head.py` 103-108, `algorithms/eagle3/model.py` 488-501",
        "tests/peer/test_specforge.py",
    ),
    Trainer(
        "EAGLE-3: speculators",
        "any number of inputs, default `2, L//2, L-3` (our default layers)",
        ("aux", "last_hidden_prenorm"),
        "**pre-norm**; it applies norm and draft head itself, at every loss-mask row; one row of "
        "documents",
        SPECULATORS + "models/eagle3/core.py` 193-254, `data.py` 8-44",
        "tests/peer/test_speculators.py",
    ),
    Trainer(
        "P-EAGLE: NeMo AutoModel",
        "as its EAGLE-3",
        ("aux", "loss_mask_logits"),
        "the draft vocab's columns of the logits, at every loss-mask row",
        NEMO + "eagle/peagle_trainer.py` 204, 269-282",
        "tests/peer/test_peagle.py",
    ),
    Trainer(
        "P-EAGLE: speculators",
        "as its EAGLE-3",
        ("aux", "last_hidden_prenorm"),
        "**pre-norm**, every loss-mask row",
        SPECULATORS + "models/peagle/core.py` 55-86, 190-195",
        "tests/peer/test_speculators.py",
    ),
    Trainer(
        "P-EAGLE: SpecForge",
        "as its EAGLE-3",
        ("aux", "last_hidden"),
        "post-norm; rows whose argmax is in the draft vocab alone",
        SPECFORGE + "algorithms/peagle/model.py` 170-175",
    ),
    Trainer(
        "DFlash: NeMo AutoModel, SpecForge",
        "any number of outputs, spread over 1 to L-3",
        ("aux",),
        "cross-entropy on the data's own tokens; ids and mask not shifted: your own",
        NEMO + "dflash/target.py` 43-79; " + SPECFORGE + "algorithms/common/"
        "dflash_family_model.py` 332-383",
    ),
    Trainer(
        "DFlash: speculators",
        "any number of inputs",
        ("aux", "last_hidden_prenorm"),
        "**pre-norm**; the draft vocab's logits; rows not shifted: your own ids and mask",
        SPECULATORS + "models/dflash/core.py` 436-484",
    ),
    Trainer(
        "DSpark: NeMo AutoModel",
        "outputs, -1 the embeddings; **its id L-1 is post-norm**",
        ("aux", "last_hidden"),
        "post-norm; the distribution over V from the whole head; ids and mask not shifted: your "
        "own. Take `last_hidden` for its id L-1",
        NEMO + "dspark/target.py` 320-334, `common.py` 71-84",
    ),
    Trainer(
        "DSpark: SpecForge",
        "outputs",
        ("aux", "last_hidden"),
        "post-norm; the distribution over V from the whole head; ids not shifted: your own",
        SPECFORGE + "algorithms/common/dflash_family_model.py` 755-881",
    ),
    Trainer(
        "DSpark: speculators",
        "inputs",
        ("aux", "last_hidden_prenorm"),
        "**pre-norm**; the draft vocab's distribution; rows not shifted: your own ids and mask",
        SPECULATORS + "models/dspark/core.py` 121-137",
    ),
    Trainer(
        "LK losses: NeMo AutoModel",
        "as its EAGLE-3",
        (),
        "renormalised over the draft vocab",
        NEMO + "eagle/core.py` 292-358",
        "tests/peer/test_nemo_automodel.py",
    ),
    Trainer(
        "LK losses: SpecForge",
        "as its EAGLE-3",
        ("aux", "loss_mask_probs", "logsumexp", "draft_logsumexp"),
        "probabilities over V of the draft vocab's ids: `loss_mask_probs * exp(draft_logsumexp - "
        "logsumexp)`; or as its EAGLE-3",
        SPECFORGE + "core/lk_loss.py` 83-99, `algorithms/eagle3/model.py` 494-497",
    ),
    Trainer(
        "LK losses: speculators",
        "as its EAGLE-3",
        ("aux", "last_hidden_prenorm"),
        "renormalised over the draft vocab",
        SPECULATORS + "losses/eager.py` 145-213",
    ),
)


def tables() -> dict[str, str]:
    """Return the page's generated parts by name."""
    outputs = "| output | what it is | needs a draft vocab |\n|---|---|---|\n"
    for name, convention in OUTPUTS.items():
        outputs += f"| `{name}` | {convention} | {'yes' if name in DRAFT_VOCAB_OUTPUTS else ''} |\n"
    trainers = "| trainer | its aux layers | ask for | what it does | shown by | its code |\n"
    trainers += "|---|---|---|---|---|---|\n"
    for each in TRAINERS:
        asks = ", ".join(f"`{name}`" for name in each.outputs) or "`generate_batch`"
        test = "not run" if each.shown_by is None else f"`{each.shown_by}`"
        cells = (each.name, each.layers, asks, each.notes, test, each.source)
        trainers += f"| {' | '.join(cells)} |\n"
    return {"outputs": outputs, "trainers": trainers}


def with_tables(page: str) -> str:
    """Return the page with its generated parts as they are now."""
    return with_parts(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
