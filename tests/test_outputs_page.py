"""docs/integrations.md: its tables are the code's, its tests exist, its code runs."""

from __future__ import annotations

from typing import Any

from tests.outputs_page import PAGE, ROOT, TRAINERS, tables, with_tables

from eagle3_schemas.capture import OUTPUTS


def test_the_tables_are_generated() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m tests.outputs_page`"
    for table in tables().values():
        assert table in page


def test_each_trainer_asks_for_outputs_there_are_and_is_shown_by_a_test_there_is() -> None:
    for each in TRAINERS:
        assert set(each.outputs) <= set(OUTPUTS), each.name
        assert each.shown_by is None or (ROOT / each.shown_by).is_file(), each.name
        assert "`" in each.source, each.name
    assert len({each.name for each in TRAINERS}) == len(TRAINERS)


def test_every_output_has_a_trainer_that_needs_it_or_a_reason() -> None:
    asked = {name for each in TRAINERS for name in each.outputs}
    assert set(OUTPUTS) - asked == {"argmax", "position_mask"}  # metrics: would the draft be right


def test_its_code_runs(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, documented: list[str]
) -> None:
    """Against a target of 7 layers: the layer ids of the page are cut to it."""
    (code,) = documented
    code = code.replace("(2, 9, 16, 23)", "(2, 0, 6, 3)").replace("aux_of(9)", "aux_of(0)")
    inputs = batch_of(131)
    names = {
        "target": connect(serve(build_model("llama"))),
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "loss_mask": inputs.loss_mask,
    }
    exec(code, names)
    captured: Any = names["captured"]
    assert captured.aux.shape == (3, 10, 4 * 48)
    assert captured.aux_of(0).data_ptr() == captured.aux[..., 48:].data_ptr()
    assert captured.last_hidden_prenorm.shape == (3, 10, 48)
