"""The hooks against transformers' own hidden states, before a target is served."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from tests.server.self_check.planting import add_noise, hook_layers, one_back, one_on, swap
from torch import nn

from eagle3_server import ServerSettings, TransformersTarget, create_app, forward
from eagle3_server.capture_probe import CaptureMismatch, compare_capture

L = 7  # of the tiny Llama


@pytest.fixture
def llama(build_model: Any) -> nn.Module:
    model: nn.Module = build_model("llama")
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "falcon", "mpt", "gemma2"])
def test_what_is_caught_is_verified_and_no_hook_stays(build_model: Any, family: str) -> None:
    model = build_model(family)
    before = {name: hooks_of(module) for name, module in model.named_modules()}
    description = TransformersTarget(model, model_id="tiny").describe()
    assert (description.hooks, description.hooks_reason) == ("verified", None)
    assert {name: hooks_of(module) for name, module in model.named_modules()} == before
    # transformers hooks its layers anew when it is asked again, here by a trainer.
    states = model(input_ids=torch.tensor([[3, 5, 7]]), output_hidden_states=True).hidden_states
    assert len(states) == description.num_hidden_layers + 1


def hooks_of(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def test_whose_hooks_were_there_keeps_them(llama: nn.Module) -> None:
    llama(input_ids=torch.tensor([[3, 5, 7]]), output_hidden_states=True)
    before = {name: hooks_of(module) for name, module in llama.named_modules()}
    assert compare_capture(llama, L).status == "verified"
    assert {name: hooks_of(module) for name, module in llama.named_modules()} == before


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (one_back, "what was caught of layer 1 is layer 0's output"),
        (one_on, "what was caught of layer 0 is layer 1's output"),
        (swap, "what was caught of layer 2 is layer 3's output; what was caught of layer 3 is lay"),
        (lambda layers: [*layers[:-1], layers[0]], "of layer 6 is layer 0's output"),
    ],
    ids=["one back", "one on", "swapped", "the last alone"],
)
def test_hooks_on_other_layers_are_refused_at_load(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch, order: Any, words: str
) -> None:
    hook_layers(monkeypatch, order)
    with pytest.raises(CaptureMismatch, match=words) as caught:
        TransformersTarget(llama, model_id="tiny")
    assert "LlamaForCausalLM is not served" in str(caught.value)
    assert "report the model" in str(caught.value)


def test_the_final_norms_output_is_not_the_last_layers(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' own list has it."""
    hook_layers(monkeypatch, lambda layers: [*layers[:-1], llama.model.norm])
    with pytest.raises(CaptureMismatch, match="of layer 6 is the final norm's output"):
        TransformersTarget(llama, model_id="tiny")


def test_attention_alone_is_no_layers_output(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_layers(monkeypatch, lambda layers: [layer.self_attn for layer in layers])  # type: ignore[misc]
    with pytest.raises(CaptureMismatch, match="of layer 0 is no layer's output") as caught:
        TransformersTarget(llama, model_id="tiny")
    assert "and 4 layers more" in str(caught.value)


def test_a_server_that_would_serve_other_layers_never_gets_ready(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_layers(monkeypatch, one_back)
    failures: list[BaseException] = []
    failed = threading.Event()

    def note(exc: BaseException) -> None:
        failures.append(exc)
        failed.set()

    def load() -> Any:
        return TransformersTarget(llama, model_id="tiny")

    with TestClient(create_app(load, ServerSettings(), on_failure=note)) as client:
        assert failed.wait(60)
        assert client.get("/readyz").status_code == 503
    assert [type(each) for each in failures] == [CaptureMismatch]


def test_layers_that_change_their_input_in_place_are_refused(llama: Any) -> None:
    """All captures would be of the last layer then, and so would be transformers' own list."""

    def add_in_place(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        return args[0].copy_(output)

    for layer in llama.model.layers:
        layer.register_forward_hook(add_in_place)
    with pytest.raises(CaptureMismatch, match="layer 0's output is changed in place by what"):
        TransformersTarget(llama, model_id="tiny")


def test_a_model_that_does_not_repeat_itself_is_verified_all_the_same(llama: nn.Module) -> None:
    """Both sides are of one forward."""
    add_noise(llama, 1.0)
    assert compare_capture(llama, L).status == "verified"


def test_states_that_are_not_finite_are_compared_too(llama: Any) -> None:
    """NaN is not equal to itself; its bits are. What a norm makes of it, it was given."""
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    found = compare_capture(llama, L)
    assert found.status == "not comparable"
    assert "all layers but the last are transformers' own hidden_states" in found.words


def test_layers_that_end_with_their_norm_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No norm follows the last of them: the list's last entry is its output."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 5, "decoder_layers": 5}
    sizes = {"d_model": 48, "decoder_attention_heads": 4, "decoder_ffn_dim": 72, "vocab_size": 131}
    config = transformers.BartConfig(**layers, **sizes, max_position_embeddings=64)
    model = transformers.BartForCausalLM(config).eval()
    assert compare_capture(model, 5).status == "verified"
    hook_layers(monkeypatch, one_back)
    assert compare_capture(model, 5).status == "wrong"


class Without(nn.Module):
    """A Llama whose own list of hidden states is missing, short, or something else."""

    def __init__(self, inner: Any, answer: Any) -> None:
        super().__init__()
        self.inner, self.answer, self.config = inner, answer, inner.config
        self.get_decoder = inner.get_decoder
        self.get_input_embeddings = inner.get_input_embeddings
        self.get_output_embeddings = inner.get_output_embeddings

    def forward(self, input_ids: Any, attention_mask: Any, **how: Any) -> Any:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, **how)
        if not how.get("output_hidden_states"):
            return out
        return SimpleNamespace(logits=out.logits, hidden_states=self.answer(out.hidden_states))


class Takes(Without):
    def forward(self, input_ids: Any, attention_mask: Any) -> Any:  # type: ignore[override]
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def fails(_states: Any) -> Any:
    raise KeyError("no such output")


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        (Takes, None, "its forward takes no output_hidden_states"),
        (Without, lambda _: None, "its forward returns no hidden_states"),
        (Without, lambda states: (*states[:-1], None), "its forward returns no hidden_states"),
        (Without, lambda states: states[1:], "its forward returns 7 hidden_states for 7 layers"),
        (Without, lambda states: [each[:, :1] for each in states], "have several shapes"),
        (Without, fails, "its forward fails with output_hidden_states: KeyError"),
        (
            Without,
            lambda states: [*states[:-1], 2 * states[-1]],
            "no module's output is the last of its hidden_states; all layers but the last are",
        ),
        (
            Without,
            lambda states: [2 * each for each in states],
            "no module's output is the last of its hidden_states",
        ),
    ],
    ids=["takes", "none", "a hole", "short", "shapes", "fails", "last", "scaled"],
)
def test_what_cannot_be_compared_is_served_and_says_why(
    serve: Any, llama: nn.Module, kind: Any, answer: Any, reason: str
) -> None:
    bridge = serve(kind(llama, answer))
    info = bridge.app_client.get("/v1/model").json()
    assert info["hooks"] == "not comparable"
    assert reason in info["hooks_reason"]
    (check, *_) = bridge.app_client.post("/v1/self-check").json()["checks"]
    assert (check["name"], check["status"]) == ("hooks", "not_applicable")
    assert reason in check["words"]


def test_a_last_layer_that_something_follows_is_not_comparable(llama: Any) -> None:
    """Of the others, an error is an error still."""
    norm = llama.model.norm
    norm.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    found = compare_capture(llama, L)
    assert found.status == "not comparable"
    assert "is not given layer 6's output as it is; all layers but the last are" in found.words


def test_a_list_that_starts_behind_the_first_layer_is_one_behind(llama: nn.Module) -> None:
    """Mamba2's: told from hooks that are one off by what the final norm is given."""
    outputs: list[torch.Tensor] = []

    def shifted(states: Any) -> Any:
        return [*states[1:-1], outputs[-1], states[-1]]

    model = Without(llama, shifted)
    llama.model.layers[-1].register_forward_hook(  # type: ignore[union-attr,index]
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    assert compare_capture(model, L).status == "verified"


def test_no_memory_is_no_reason_not_to_compare(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: Any, **_how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "forward_logits", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        compare_capture(llama, L)


def test_it_costs_one_short_forward(llama: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    llama.model.register_forward_pre_hook(
        lambda _m, _a, how: shapes.append(tuple(how["input_ids"].shape)), with_kwargs=True
    )
    compare_capture(llama, L)
    assert shapes == [(1, 16)]


def test_the_fingerprint_does_not_know_of_it(
    build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = TransformersTarget(build_model("llama"), model_id="tiny").describe()
    unknown = compare_capture(Takes(build_model("llama"), None), L)
    monkeypatch.setattr("eagle3_server.transformers_target.prove_capture", lambda *_: unknown)
    other = TransformersTarget(build_model("llama"), model_id="tiny").describe()
    assert (verified.hooks, other.hooks) == ("verified", "not comparable")
    assert other.fingerprint == verified.fingerprint
