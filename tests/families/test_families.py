"""Every model family: rows-only head, encodings, aux states and trim, against the full path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from tests.families import table
from tests.families.checks import Case
from tests.families.configs import CORE, FALLS_BACK, FAMILIES, Family, L, V
from tests.families.full_path import make_job
from torch import nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import HFEagle3TargetModel
from eagle3_server.layout import decoder_layers, max_sequence_length
from eagle3_server.transformers_target import TransformersTarget

DTYPES = (torch.float32, torch.bfloat16)


def _cases() -> Iterator[object]:
    for family in FAMILIES:
        for dtype in DTYPES:
            # What differs with the thread count is torch, not the family: a few show it.
            for threads in (1, 2) if family.is_key else (1,):
                yield pytest.param(
                    (family, dtype, threads),
                    id=f"{family.name}-{str(dtype).removeprefix('torch.')}-{threads}",
                    marks=[] if family.is_key else [pytest.mark.slow],
                )


@pytest.fixture(scope="module", params=_cases())
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    family, dtype, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield Case(family, dtype)
    torch.set_num_threads(before)


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def test_head_runs_for_rows_alone(case: Case) -> None:
    if case.family.name in FALLS_BACK:
        assert case.description.head == "full"
        assert case.description.head_reason
    else:
        case.check_head()


def test_hooks_are_verified_at_load_and_all_that_was_proved_there_is_proved_again(
    case: Case,
) -> None:
    assert (case.description.hooks, case.description.hooks_reason) == ("verified", None)
    found = {name: case.target.self_check(name) for name in SELF_CHECKS}
    expected = dict.fromkeys(SELF_CHECKS, "passed")
    if case.family.name in FALLS_BACK:
        expected["head"] = "not_applicable"
    assert {name: each.status for name, each in found.items()} == expected, found


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_supervision_is_bit_equal(case: Case, encoding: str) -> None:
    if encoding in case.description.encodings:
        case.check_supervision(make_job(encoding=encoding))
    else:
        assert case.family.name in FALLS_BACK


def test_every_loss_mask_row_is_bit_equal_in_chunks_of_16_and_in_one(case: Case) -> None:
    case.check_chunks(make_job(encoding="logits", rows="loss_mask"))


def test_left_padded_supervision_is_bit_equal(case: Case) -> None:
    case.check_supervision(make_job(left_padded=True))


@pytest.mark.parametrize("left_padded", [False, True], ids=["right", "left"])
def test_aux_states_are_bit_equal(case: Case, left_padded: bool) -> None:
    case.check_aux(make_job(left_padded=left_padded))


def test_captured_outputs_are_those_of_the_full_path(case: Case) -> None:
    case.check_outputs(make_job())


def test_the_head_and_norm_to_download_give_the_models_logits(case: Case) -> None:
    case.check_target_head(make_job())


def test_trimmed_batch_is_within_the_stated_bound(case: Case) -> None:
    difference = case.default_difference(make_job())
    bound = table.bound(case.family, case.dtype)
    assert difference.probs <= bound.probs
    assert difference.aux <= bound.aux
    assert difference.masks <= bound.masks


def test_learned_positions_bound_the_sequence_length(case: Case) -> None:
    expected = 96 if case.family.name in ("GPT2", "OPT", "MPT", "GPT-J (head bias)") else None
    assert case.description.max_sequence_length == expected


def test_a_towers_positions_do_not_bound_the_sequence_length() -> None:
    model = by_name("LLaVA").build(torch.float32)
    model.get_submodule("model.vision_tower").embed_positions = nn.Embedding(7, 4)
    assert max_sequence_length(model) is None


def test_a_towers_layers_are_not_taken_for_the_decoders() -> None:
    """A tower of as many layers as the decoder, and ahead of it in the model."""
    family = by_name("LLaVA")
    outer = dict(family.outer or {})
    outer["vision_config"] = {**outer["vision_config"], "num_hidden_layers": L}
    model = Family(**{**vars(family), "outer": outer}).build(torch.float32)
    assert decoder_layers(model) == list(model.get_submodule(family.layers))


@pytest.fixture(scope="module")
def streams() -> nn.Module:
    config = {
        "head_dim": 16,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 20,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * L,
        "intermediate_size": [72] * L,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "pad_token_id": 0,
    }
    return Family("Gemma 3n", "Gemma3nForCausalLM", config).build(torch.float32)


def test_layers_with_several_streams_are_refused_at_load(streams: nn.Module) -> None:
    """Gemma 3n's layers give [4, B, T, H]."""
    with pytest.raises(InvalidRequest, match=r"decoder layer 0 gives \[4, .*cannot be a target"):
        TransformersTarget(streams, model_id="tiny")


def test_layers_with_several_streams_are_refused_when_co_located(streams: nn.Module) -> None:
    job = make_job()
    target = HFEagle3TargetModel(streams, (0, 1, 2))
    with pytest.raises(InvalidRequest, match=r"decoder layer 0 gives \[4, .*cannot be a target"):
        target.generate_batch(job.input_ids, job.attention_mask, job.loss_mask)


def test_the_page_lists_every_family() -> None:
    rows = table.names(table.written())
    assert rows == [family.name for family in FAMILIES]
    assert len(set(rows)) == len(rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_says_what_is_measured_now() -> None:
    """Numbers apart: they are the machine's; the bound on them is asserted above."""
    page = table.without_numbers(table.written())
    assert table.without_numbers(table.write_table()) == page, (
        f"{table.PAGE.name} is out of date: run `python -m tests.families.table`"
    )


def test_every_config_is_a_class_of_this_transformers() -> None:
    assert all(hasattr(transformers, family.architecture) for family in FAMILIES)
    assert CORE["num_hidden_layers"] == L
