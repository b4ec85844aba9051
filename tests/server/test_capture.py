"""Hidden states are caught from the layers named, and nothing stays behind in the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import HFEagle3TargetModel, TransformersTarget


class Layer(nn.Linear):
    """A layer that counts how often anybody asked to hook it."""

    hooks_asked_for = 0

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.hooks_asked_for += 1
        return super().register_forward_hook(*args, **kwargs)


class DictModel(nn.Module):
    """A causal LM unlike transformers': layers in a ModuleDict, no `get_decoder`, bare logits."""

    def __init__(self, num_layers: int = 7, hidden_size: int = 12, vocab_size: int = 29) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=num_layers)
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): Layer(hidden_size, hidden_size) for i in range(num_layers)}
        )
        self.head = nn.Linear(hidden_size, vocab_size)
        self.skipped = -1
        self.fails = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        state = self.embed(input_ids) * attention_mask[..., None]
        for i in range(len(self.layers)):
            if i != self.skipped:
                state = self.layers[str(i)](state)
        if self.fails:
            raise RuntimeError("out of memory")
        return self.head(state)


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture(params=["llama", "qwen3", "falcon", "mpt", "gpt2", "opt"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("last", [False, True], ids=["inner-layers", "with-the-last-layer"])
def test_each_aux_state_is_the_output_of_its_layer(
    model: Any, family: str, last: bool, batch_of: Any, expect: Any, same: Any
) -> None:
    """Falcon and MPT return tuples from a layer; the last layer's output is before the norm."""
    depth = model.config.num_hidden_layers
    aux_layer_ids = (depth - 1, 0, 3) if last else (4, 0, depth - 2)
    inputs = batch_of(model.config.vocab_size)
    batch = HFEagle3TargetModel(model, aux_layer_ids).generate_batch(*inputs)
    expected = expect(model, inputs, torch.arange(3), aux_layer_ids)
    attended = inputs.attention_mask.bool()
    same(batch.aux_hidden_states[attended], expected.aux_hidden_states[attended])


def test_default_aux_layers_follow_the_eagle3_rule(model: Any) -> None:
    depth = model.config.num_hidden_layers
    assert HFEagle3TargetModel(model).aux_layer_ids == (1, depth // 2 - 1, depth - 4)


def test_a_module_dict_of_layers_and_bare_logits_are_understood(same: Any) -> None:
    model = DictModel()
    ids = torch.randint(0, 29, (2, 5))
    ones = torch.ones_like(ids)
    batch = HFEagle3TargetModel(model, (5, 0, 2)).generate_batch(ids, ones, ones)
    outputs = [model.embed(ids)]
    for layer in model.layers.values():
        outputs.append(layer(outputs[-1]))
    same(batch.aux_hidden_states, torch.cat([outputs[6], outputs[1], outputs[3]], -1).detach())
    logits = model.head(outputs[-1]).detach()
    same(batch.logits, torch.cat([logits[:, 1:], torch.zeros(2, 1, 29)], 1))


def test_a_module_dict_in_another_order_is_not_taken_for_the_layers() -> None:
    model = DictModel()
    model.layers = nn.ModuleDict({str(i): Layer(12, 12) for i in reversed(range(7))})
    with pytest.raises(InvalidRequest, match="num_hidden_layers=7"):
        HFEagle3TargetModel(model)


@pytest.mark.parametrize("bad", [(0, 1), (0, 1, 1), (0, 1, 7), (-1, 0, 1), (0, 1, 2, 3)], ids=str)
def test_bad_aux_layer_ids_are_refused_before_any_hook_is_asked_for(bad: tuple[int, ...]) -> None:
    model = DictModel()
    with pytest.raises(InvalidRequest, match=r"3 distinct ids in \[0, 7\)"):
        HFEagle3TargetModel(model, bad)
    with pytest.raises(InvalidRequest, match=r"3 distinct ids in \[0, 7\)"):
        TransformersTarget(model, model_id="tiny", aux_layer_ids=bad)
    assert all(layer.hooks_asked_for == 0 for layer in model.layers.values())


def test_a_target_too_shallow_for_the_default_rule_says_so() -> None:
    with pytest.raises(InvalidRequest, match=r"too shallow.*pass aux_layer_ids"):
        HFEagle3TargetModel(DictModel(num_layers=4))


def test_hooks_are_gone_after_a_forward() -> None:
    model = DictModel()
    ids = torch.zeros(1, 3, dtype=torch.long)
    HFEagle3TargetModel(model).generate_batch(ids, ids, ids)
    assert sum(layer.hooks_asked_for for layer in model.layers.values()) == 3
    assert hooks_left(model) == 0


def test_hooks_are_gone_after_a_forward_that_raised() -> None:
    model = DictModel()
    target = HFEagle3TargetModel(model)
    model.fails = True
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="out of memory"):
        target.generate_batch(ids, ids, ids)
    assert sum(layer.hooks_asked_for for layer in model.layers.values()) == 3
    assert hooks_left(model) == 0


def test_a_layer_the_forward_does_not_pass_is_an_error_that_names_it() -> None:
    model = DictModel()
    target = HFEagle3TargetModel(model, (1, 3, 5))
    model.skipped = 3
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InvalidRequest, match=r"layers \[3\]"):
        target.generate_batch(ids, ids, ids)
    assert hooks_left(model) == 0


def test_a_served_target_proves_at_load_that_every_layer_is_caught() -> None:
    model = DictModel()
    model.skipped = 6
    with pytest.raises(InvalidRequest, match=r"layers \[6\]"):
        TransformersTarget(model, model_id="tiny")


def test_aux_states_can_be_saved_for_a_backward(model: Any, batch_of: Any) -> None:
    """Tensors made under `inference_mode` cannot: a co-located trainer would raise."""
    batch = HFEagle3TargetModel(model).generate_batch(*batch_of(model.config.vocab_size))
    weight = torch.randn(batch.aux_hidden_states.shape[-1], 1, requires_grad=True)
    (batch.aux_hidden_states @ weight).sum().backward()
    assert weight.grad is not None
    assert not batch.aux_hidden_states.requires_grad


def test_the_co_located_batch_is_shifted_where_the_contract_says(
    model: Any, batch_of: Any, same: Any
) -> None:
    inputs = batch_of(model.config.vocab_size)
    batch = HFEagle3TargetModel(model).generate_batch(*inputs)
    with torch.no_grad():
        logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    for shifted, plain in (
        (batch.logits, logits),
        (batch.input_ids, inputs.input_ids),
        (batch.loss_mask, inputs.loss_mask),
    ):
        same(shifted[:, :-1], plain[:, 1:])
        assert not shifted[:, -1].any()
    same(batch.attention_mask, inputs.attention_mask)


def test_the_model_is_put_into_eval_mode_and_frozen(build_model: Any) -> None:
    model = build_model("llama").train()
    assert not HFEagle3TargetModel(model).model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_co_located_target_hands_out_its_own_embeddings(model: Any) -> None:
    target = HFEagle3TargetModel(model)
    assert target.get_input_embeddings().weight is model.get_input_embeddings().weight


def test_a_mapping_is_nothing_to_the_co_located_target(model: Any, batch_of: Any) -> None:
    target = HFEagle3TargetModel(model)
    target.set_vocab_mapping(torch.tensor([1]), torch.zeros(3, dtype=torch.bool))
    batch = target.generate_batch(*batch_of(model.config.vocab_size))
    assert batch.logits is not None
    assert batch.logits.shape[-1] == model.config.vocab_size


def test_the_co_located_target_is_synchronous(model: Any, batch_of: Any) -> None:
    target = HFEagle3TargetModel(model)
    assert not target.supports_async
    with pytest.raises(NotImplementedError, match="call generate_batch"):
        target.generate_batch_async(*batch_of(model.config.vocab_size))
    target.close()
    target.close()


def test_masks_of_another_shape_are_refused_by_the_co_located_target(model: Any) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(InvalidRequest, match=r"loss_mask.*\[2, 5\].*\[2, 4\]"):
        HFEagle3TargetModel(model).generate_batch(ids, ids, ids[:, :4])


@pytest.mark.parametrize("name", ["position_ids", "seq_lens", "doc_remaining"])
def test_one_of_the_packing_tensors_alone_is_refused_by_the_co_located_target(
    model: Any, name: str
) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(InvalidRequest, match=r"seq_lens.*got none"):
        HFEagle3TargetModel(model).generate_batch(ids, ids, ids, **{name: ids})


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = DictModel()
    model.config.num_hidden_layers = 5
    with pytest.raises(InvalidRequest, match="num_hidden_layers=5"):
        HFEagle3TargetModel(model)


def test_a_model_whose_hooks_do_not_run_is_refused_in_words(build_model: Any) -> None:
    """As one that is compiled as a whole: nothing of it could be captured."""
    model = build_model("llama")
    forward = model.forward

    def without_hooks(*arguments: Any, **named: Any) -> Any:
        hooked = [module for module in model.modules() if module._forward_hooks]
        kept = [dict(module._forward_hooks) for module in hooked]
        for module in hooked:
            module._forward_hooks.clear()
        try:
            return forward(*arguments, **named)
        finally:
            for module, hooks in zip(hooked, kept, strict=True):
                module._forward_hooks.update(hooks)

    model.forward = without_hooks
    with pytest.raises(InvalidRequest, match=r"hooks did not run.*compile its layers one"):
        TransformersTarget(model, model_id="tiny")
