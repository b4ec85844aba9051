"""How a test asks for an inspection, and what the definition says of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_tokenizer import VOCAB_SIZE

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab

TEXT = "Tea for two, 茶 \n <s>"
DRAFT_IDS = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))[:150]


def register(bridge: Any, ids: torch.Tensor = DRAFT_IDS) -> str:
    """Set a draft vocab as a trainer does."""
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[ids] = True
    with RemoteEagle3Backend("http://target", transport=bridge) as backend:
        backend.set_vocab_mapping(ids, mask)
    return DraftVocab.from_ids(ids).digest


def inspect(bridge: Any, text: str = TEXT, **fields: Any) -> Any:
    return bridge.app_client.post("/v1/inspect", json={"text": text, **fields})


def problem(answer: Any) -> tuple[int, str]:
    document = answer.json()
    return answer.status_code, f"{document['code']}: {document['detail']}"


def oracle(checkpoint: Path, text: str, draft_ids: torch.Tensor) -> list[dict[str, Any]]:
    """The definition, with transformers alone: the logits at a token are of what follows it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double().numpy()
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    found = []
    for token_id, row in zip(ids, logits, strict=True):
        draft = row[draft_ids.numpy()]
        weights = np.exp(draft - draft.max())
        probs = weights / weights.sum()
        order = np.argsort(-probs)
        found.append(
            {
                "token_id": token_id,
                "token": names[token_id],
                "text": tokenizer.decode([token_id]),
                "expected": draft_ids.numpy()[order].tolist(),
                "probs": probs[order].tolist(),
                "entropy": float(-(probs * np.log(probs)).sum()),
                "argmax": int(row.argmax()),
                "in_vocab": int(row.argmax()) in set(draft_ids.tolist()),
            }
        )
    return found


def check(answer: Any, expected: list[dict[str, Any]], top_k: int) -> None:
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["tokens"]
    assert len(tokens) == len(expected)
    for token, right in zip(tokens, expected, strict=True):
        assert [token[name] for name in ("token_id", "token", "text")] == [
            right[name] for name in ("token_id", "token", "text")
        ]
        assert [each["token_id"] for each in token["next_expected"]] == right["expected"][:top_k]
        probabilities = [each["probability"] for each in token["next_expected"]]
        assert probabilities == pytest.approx(right["probs"][:top_k], rel=1e-4)
        assert token["next_entropy_nats"] == pytest.approx(right["entropy"], rel=1e-5)
        assert token["next_argmax"]["token_id"] == right["argmax"]
        assert token["next_argmax_in_draft_vocab"] == right["in_vocab"]
