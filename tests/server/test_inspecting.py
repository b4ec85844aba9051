"""`POST /v1/inspect`: what the target expects after each token of a text, told as it is."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.servers import PATIENCE_S, GatedTarget
from tests.tiny_tokenizer import VOCAB_SIZE, save_tokenizer, save_with_tokenizer

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings, app
from eagle3_server.inspecting import MAX_INSPECT_BODY_BYTES, MAX_INSPECT_TOKENS, TokenTexts
from eagle3_server.loading import load_target

TEXT = "Tea for two, 茶 \n <s>"
DRAFT_IDS = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))[:150]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny", [" two", "unused"])


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Any:
    return load_target(ServerSettings(model=str(checkpoint), device="cpu"))


@pytest.fixture
def bridge(serve: Any, target: Any, checkpoint: Path) -> Any:
    return serve(target, model=str(checkpoint))


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


def test_each_token_has_what_the_target_expects_after_it(bridge: Any, checkpoint: Path) -> None:
    """Its own row, the last token's included: nothing is shifted into another's place."""
    digest = register(bridge)
    expected = oracle(checkpoint, TEXT, DRAFT_IDS)
    assert {right["in_vocab"] for right in expected} == {True, False}
    assert expected[0]["token"] == "<s>"  # the tokenizer's default, told as it is
    answer = inspect(bridge)
    check(answer, expected, 5)
    document = answer.json()
    assert (document["draft_vocab_digest"], document["draft_vocab_size"]) == (digest, 150)
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["fingerprint"] == bridge.app_client.get("/v1/model").json()["fingerprint"]
    check(inspect(bridge, top_k=20), expected, 20)
    check(inspect(bridge, "a"), oracle(checkpoint, "a", DRAFT_IDS), 5)


def test_a_text_of_one_token_has_its_row(serve: Any, target: Any, tmp_path: Path) -> None:
    import transformers

    save_tokenizer(tmp_path, begins=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("a")["input_ids"]) == 1
    path = save_with_tokenizer(tmp_path)
    save_tokenizer(path, begins=False)
    bridge = serve(load_target(ServerSettings(model=str(path), device="cpu")), model=str(path))
    register(bridge)
    check(inspect(bridge, "a"), oracle(path, "a", DRAFT_IDS), 5)


def test_the_draft_vocab_used_last_is_meant_unless_one_is_named(
    bridge: Any, checkpoint: Path
) -> None:
    few = torch.tensor([260, 7, 3])
    first, second = register(bridge), register(bridge, few)
    check(inspect(bridge), oracle(checkpoint, TEXT, few), 3)  # has no five
    named = inspect(bridge, draft_vocab_digest=first)
    check(named, oracle(checkpoint, TEXT, DRAFT_IDS), 5)
    assert inspect(bridge).json()["draft_vocab_digest"] == first  # used last, now
    assert second != first


def test_without_a_draft_vocab_there_is_nothing_to_expect_in(bridge: Any) -> None:
    status, words = problem(inspect(bridge))
    assert status == 409
    assert words.startswith("vocab_mapping_missing: no trainer has registered a draft vocab")
    status, words = problem(inspect(bridge, draft_vocab_digest="0" * 64))
    assert status == 409
    assert "000000000000… is not registered" in words


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


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, f"{MAX_INSPECT_TOKENS} tokens (limit: of this path)"),
        ({"max_tokens_per_request": 9}, "8 tokens (limit: max_tokens_per_request - 1)"),
    ],
)
def test_a_text_may_have_so_many_tokens(
    serve: Any, target: Any, checkpoint: Path, settings: dict[str, int], most: str
) -> None:
    bridge = serve(target, model=str(checkpoint), **settings)
    register(bridge)
    bound = int(most.split()[0])
    answer = inspect(bridge, "a" * (bound - 1), top_k=1)  # and <s>
    assert len(answer.json()["tokens"]) == bound
    status, words = problem(inspect(bridge, "a" * bound))
    assert status == 413
    assert f"a text may have {most}; this one has {bound + 1}" in words


def test_learned_positions_bound_it_too(serve: Any, build_model: Any, checkpoint: Path) -> None:
    model = build_model("gpt2")
    model.resize_token_embeddings(VOCAB_SIZE)
    bridge = serve(model, model=str(checkpoint), aux_layer_ids=(0, 1, 2))
    register(bridge)
    assert len(inspect(bridge, "a" * 15).json()["tokens"]) == 16
    status, words = problem(inspect(bridge, "a" * 16))
    assert status == 413
    assert "16 tokens (limit: the target's learned positions)" in words


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", (400, "malformed_payload: InspectRequest is not valid")),
        (b"{", (400, "malformed_payload: InspectRequest is not valid")),
        (b'{"text": "\\ud800"}', (400, "malformed_payload: InspectRequest is not valid")),
        (b'{"text": "\xff"}', (400, "malformed_payload: InspectRequest is not valid")),
        (b"[1]", (422, "invalid_request: InspectRequest is not valid: message: ")),
        (b'{"text": ""}', (422, "invalid_request: InspectRequest is not valid: text: ")),
        (b'{"text": 1}', (422, "invalid_request: InspectRequest is not valid: text: ")),
        (b'{"text": "a", "top_k": 21}', (422, "invalid_request: InspectRequest is not valid: top")),
        (b'{"text": "a", "top_k": 0}', (422, "invalid_request: InspectRequest is not valid: top")),
        (b'{"text": "a", "more": 1}', (422, "invalid_request: InspectRequest is not valid: more")),
        (
            json.dumps({"text": "a" * MAX_INSPECT_BODY_BYTES}).encode(),
            (413, f"limit_exceeded: a request body may have {MAX_INSPECT_BODY_BYTES} bytes here;"),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_request_is_refused(bridge: Any, body: bytes, expected: tuple[int, str]) -> None:
    register(bridge)
    headers = {"content-type": "application/json"}
    status, words = problem(bridge.app_client.post("/v1/inspect", content=body, headers=headers))
    assert status == expected[0]
    assert words.startswith(expected[1])


def test_another_media_type_is_refused(bridge: Any) -> None:
    answer = bridge.app_client.post("/v1/inspect", data={"text": "a"})
    assert problem(answer)[0] == 400
    assert "expected content-type application/json" in problem(answer)[1]


def test_it_waits_for_its_turn_and_counts_for_no_trainer(
    serve: Any, target: Any, checkpoint: Path, batch_of: Any
) -> None:
    gated = GatedTarget(target)
    bridge = serve(gated, model=str(checkpoint))
    register(bridge)
    inputs = batch_of(VOCAB_SIZE)

    def status() -> Any:
        return bridge.app_client.get("/v1/status").json()

    with (
        RemoteEagle3Backend("http://target", transport=bridge) as backend,
        ThreadPoolExecutor(1) as pool,
    ):
        mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        mask[DRAFT_IDS] = True
        backend.set_vocab_mapping(DRAFT_IDS, mask)
        pending = backend.generate_batch_async(*inputs)
        gated.wait_until_entered()
        asked = pool.submit(inspect, bridge, "abc")
        while status()["queued_requests"] == 0:
            assert not asked.done()
        # <s>, three bytes, and the document before them.
        assert status()["tokens_in_flight"] == inputs.input_ids.numel() + 5
        gated.gate.set()
        pending.result(PATIENCE_S)
        before = status()
        assert asked.result(PATIENCE_S).status_code == 200
    bridge.wait_until_idle()
    after = status()
    for name in ("tokens", "padding_share", "draft_vocab_coverage", "stages"):
        assert after[name] == before[name] is not None
    assert [client["requests"] for client in after["clients"]] == [1]
    assert after["tokens_in_flight"] == after["bytes_in_flight"] == 0


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


def test_a_fleets_comparison_is_not_the_draft_vocab_used_last(bridge: Any) -> None:
    digest = register(bridge)
    register(bridge, torch.arange(VOCAB_SIZE))
    assert inspect(bridge).json()["draft_vocab_digest"] == digest


def test_a_position_that_is_not_finite_is_told_in_the_texts_tokens(
    serve: Any, build_model: Any, checkpoint: Path
) -> None:
    model = build_model("llama")
    model.resize_token_embeddings(VOCAB_SIZE)
    bridge = serve(model, model=str(checkpoint))
    register(bridge)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    status, words = problem(inspect(bridge))
    assert status == 500
    assert "a filler is at 0" in words


def test_sentencepiece_keeps_its_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁tea": 1, "?": 2, "▁▁▁": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    texts = TokenTexts(lambda: PreTrainedTokenizerFast(tokenizer_object=words))
    assert texts.ids_of("the tea", None) == [0, 1]
    assert [texts.text_of(token_id).text for token_id in (0, 1, 3)] == [" the", " tea", "   "]


def test_the_entropy_is_at_most_that_of_the_uniform(bridge: Any) -> None:
    register(bridge)
    for token in inspect(bridge).json()["tokens"]:
        assert 0 < token["next_entropy_nats"] < math.log(150)
