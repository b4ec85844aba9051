"""A target that expects its text, and what `verify` reports of servers of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.client.verify.planted import TEXT, Planted, tokenizer_of
from tests.tiny_tokenizer import save_with_tokenizer

from eagle3_client import RemoteEagle3Backend, verify, verify_served
from eagle3_client.verify_local import LocalTarget
from eagle3_client.verify_report import VerifyReport


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that has learnt the text: only such a one expects what follows in it."""
    path = save_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([tokenizer_of(path)(TEXT)["input_ids"][:512]]).view(4, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.7
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def run(serve: Any, model: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(error, …)`: the reports of servers, each with a planted error or none."""
    monkeypatch.setattr(verify_served, "_DRAFT_VOCAB_SIZE", 150)  # less than V: masks have zeros

    def build(
        *errors: str, local: bool = False, text: str = TEXT, tokenizer: Any = None, **how: Any
    ) -> Any:
        backends = []
        for number, error in enumerate(errors):
            served = how.get("models", [model] * len(errors))[number]
            target = Planted(served, model_id="tiny")
            target.error = error
            backend = RemoteEagle3Backend(
                "http://target", transport=serve(target), encoding="probs", rows="loss_mask"
            )
            backends.append((f"http://server-{number}", backend))
        load = (lambda _dtype: LocalTarget(model)) if local else None
        reports: list[VerifyReport] = verify.verify(
            backends, tokenizer or tokenizer_of(checkpoint), text, load
        )
        for _, backend in backends:
            backend.close()
        return reports

    return build
