"""`POST /v1/inspect` and the target's tokenizer: none, slow ones, and what its tokens stand for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.inspecting.asking import (
    DRAFT_IDS,
    inspect,
    problem,
    register,
)
from tests.servers import PATIENCE_S
from tests.tiny_tokenizer import VOCAB_SIZE, save_tokenizer

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas.errors import InvalidRequest
from eagle3_server import app
from eagle3_server.inspecting import TokenTexts


def test_a_checkpoint_without_a_tokenizer_says_so(
    serve: Any, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_server.inspecting._FAILED_FOR_S", 0.0)
    bridge = serve(target, model=str(tmp_path))
    register(bridge)
    status, words = problem(inspect(bridge))
    assert status == 422
    assert "has no tokenizer that loads" in words
    assert "tokenizer.json" in words
    assert str(tmp_path) not in words
    save_tokenizer(tmp_path)  # not the one that the target was loaded with
    status, words = problem(inspect(bridge))
    assert (status, words) == (
        422,
        "invalid_request: the tokenizer beside the target's weights is not the one that was there "
        "when the server loaded them; restart the server",
    )


def test_parts_of_characters_and_ids_without_a_token_are_told(
    bridge: Any, checkpoint: Path
) -> None:
    register(bridge, torch.tensor([VOCAB_SIZE - 1]))
    tokens = inspect(bridge, "茶 two").json()["tokens"]
    assert [token["text"] for token in tokens] == ["<s>", "\ufffd", "\ufffd", "\ufffd", " two"]
    assert len({token["token"] for token in tokens}) == 5
    (expected,) = tokens[0]["next_expected"]
    assert expected == {
        "token_id": VOCAB_SIZE - 1, "token": None, "text": "", "probability": 1.0,
    }  # fmt: skip
    assert tokens[0]["next_entropy_nats"] == 0


@pytest.mark.parametrize("loads", [True, False])
def test_a_slow_tokenizer_keeps_no_trainer_waiting(
    serve: Any, target: Any, checkpoint: Path, batch_of: Any, monkeypatch: pytest.MonkeyPatch,
    loads: bool,
) -> None:  # fmt: skip
    """Twenty texts come while it is loaded, more than the event loop has threads."""
    inner, gate, calls = app.load_tokenizer, threading.Event(), []

    def load(settings: Any) -> Any:
        calls.append(settings)
        assert gate.wait(PATIENCE_S)
        if not loads:
            raise OSError("no tokenizer")
        return inner(settings)

    monkeypatch.setattr(app, "load_tokenizer", load)
    bridge = serve(target, model=str(checkpoint))
    register(bridge)
    with ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(inspect, bridge) for _ in range(20)]
        try:
            while not calls:
                time.sleep(0.01)
            with RemoteEagle3Backend("http://target", transport=bridge, retry_for_s=5) as backend:
                mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
                mask[DRAFT_IDS] = True
                backend.set_vocab_mapping(DRAFT_IDS, mask)
                handle = backend.generate_batch_async(*batch_of(VOCAB_SIZE))
                handle.result(PATIENCE_S / 2)
        finally:
            gate.set()
        assert {each.result().status_code for each in asked} == {200 if loads else 422}
    assert len(calls) == 1, "a failure is remembered"


def test_a_text_that_the_tokenizer_does_not_take_is_refused() -> None:
    class WithoutUnknown:
        def get_vocab(self) -> dict[str, int]:
            return {"tea": 0}

        def __call__(self, text: str, **_: Any) -> Any:
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")

    with pytest.raises(InvalidRequest, match=r"does not take this text \(Exception: WordLevel"):
        TokenTexts(WithoutUnknown).ids_of("coffee", None)


def test_sentencepiece_keeps_its_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁tea": 1, "?": 2, "▁▁▁": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    texts = TokenTexts(lambda: PreTrainedTokenizerFast(tokenizer_object=words))
    assert texts.ids_of("the tea", None) == [0, 1]
    assert [texts.text_of(token_id).text for token_id in (0, 1, 3)] == [" the", " tea", "   "]
