"""The probe in a real Chromium: its table is the endpoint's answer, and the answer is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.page.conftest import DRAFT_IDS, train, unlock
from tests.page.reading import TEXT, is_quiet, texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first may have to install Chromium


def test_the_probe_shows_the_answer_and_the_answer_is_right(
    start: Any, visit: Any, checkpoint: Path
) -> None:
    """Against the endpoint, and against transformers alone."""
    import transformers

    server = start()
    train(server)
    page = visit(server.url)
    unlock(page)
    page.locator("#text").fill(TEXT)
    page.locator("#top").fill("3")
    (digest,) = [each["digest"] for each in server.get("/v1/status")["draft_vocabs"]]
    page.locator("#vocab").select_option(digest)
    page.locator("#go").click()
    page.locator("#answer").wait_for()
    answer = server.inspect(text=TEXT, top_k=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double().numpy()
    lines = page.locator("#answer tbody tr").all()
    assert len(lines) == len(ids) == len(answer["tokens"])
    for token_id, row, line, told in zip(ids, logits, lines, answer["tokens"], strict=True):
        weights = np.exp(row[DRAFT_IDS.numpy()])
        probs = weights / weights.sum()
        best = np.argsort(-probs)[:3]
        cells = line.locator("td").all()
        assert cells[0].locator(".token").get_attribute("title") == f"id {token_id}"
        titles = [each.get_attribute("title") for each in cells[1].locator(".token").all()]
        assert titles == [f"id {DRAFT_IDS[i]}" for i in best]
        assert titles == [f"id {each['token_id']}" for each in told["next_expected"]]
        shown = [
            float(text.split()[0])
            for text in cells[1].locator(".next > :last-child").all_inner_texts()
        ]
        assert shown == pytest.approx([100 * probs[i] for i in best], abs=0.06)
        widths = cells[1].evaluate(
            "(cell) => [...cell.querySelectorAll('.bar')].map((bar) =>"
            " bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
        )
        assert widths == pytest.approx([probs[i] for i in best], abs=0.02)
        entropy = -(probs * np.log(probs)).sum()
        assert float(cells[2].inner_text().split()[0]) == pytest.approx(entropy, abs=0.006)
        is_inside = int(row.argmax()) in set(DRAFT_IDS.tolist())
        assert cells[3].locator(".token").get_attribute("title") == f"id {row.argmax()}"
        words = "✓ in the draft vocab" if is_inside else "✗ not in the draft vocab"
        assert cells[3].inner_text().endswith(words)
    forms = texts(page, "#answer td:first-child .token")
    assert {"␣", "⇥", "↵"} <= set(forms)
    is_quiet(page)
    assert server.get("/v1/status")["tokens"]["sent"] == 96  # nobody's training
