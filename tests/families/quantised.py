"""A family loaded with 4-bit weights, against the full path of the same quantised model."""

from __future__ import annotations

import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tests.families.checks import Case
from tests.families.configs import Family
from tests.families.full_path import make_job
from torch import nn

from eagle3_server.quantization import quantised_share, quantization_config

FORM: Final = "bnb-nf4"


def in_four_bits(family: Family) -> str:
    """Return the table's cell."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package, while it is imported
        family.build(torch.float32).save_pretrained(folder)
        loaded = load(family, Path(folder))
        share = quantised_share(loaded)
        if share == 0:
            return "refused"
        # The oracle's, before any code under test has run.
        case = Case(family, torch.float32, [deepcopy(loaded), loaded].pop)
        return f"{_exact(case)}, {share:.0%}"


def load(family: Family, folder: Path) -> nn.Module:
    """Load a saved family with the 4-bit weights, as `load_target` does."""
    cls = getattr(transformers, family.architecture)
    config: Any = quantization_config(FORM, torch.float32)
    model: nn.Module = cls.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # the oracle computes alike on every CPU
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model.eval()


def _exact(case: Case) -> str:
    encodings = case.description.encodings
    try:
        case.check_aux(make_job())
        case.check_supervision(make_job(encoding=encodings[-1], rows="loss_mask"))
    except AssertionError:
        return "**differs**"
    if encodings == ("probs", "logits", "hidden"):
        return "equal"
    return f"equal, {' and '.join(f'`{name}`' for name in encodings)} alone"
