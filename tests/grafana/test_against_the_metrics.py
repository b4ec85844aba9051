"""Dashboard and alerts against what a server exports, after requests of every kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.grafana.expressions import (
    DASHBOARD,
    EXPRESSIONS,
    RULES,
    SCRAPED,
    TARGETS,
    Selector,
    grouped_by,
    selectors,
)
from tests.server.sharing.conftest import Trainer
from tests.server.sharing.server_process import Process

from eagle3_schemas.errors import ERROR_KINDS

# Outcomes that are no error's code; docs/operations.md lists them.
CODES = {kind.code for kind in ERROR_KINDS} | {"ok", "client_gone", "failed"}


@pytest.fixture(scope="module")
def exported() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Names of the samples of `/metrics`, with their labels."""
    process = Process(EAGLE3_TOKEN="secret", EAGLE3_MAX_BODY_BYTES="60000")
    try:
        one = Trainer(process.url, "trainer", authorization="Bearer secret")
        one.register()
        assert one.ask(1).status_code == 200
        assert one.http.post("/v1/supervision", content=b"x").status_code == 400
        assert one.http.post("/v1/capture", content=b"x").status_code == 400
        found = defaultdict(list)
        for family in text_string_to_metric_families(one.http.get("/metrics").text):
            for sample in family.samples:
                found[sample.name].append(dict(sample.labels))
        one.http.close()
        yield found
    finally:
        process.close()


def test_the_parser_finds_every_metric_of_an_expression() -> None:
    """On expressions whose parts are known; a parser that finds nothing would prove nothing."""
    assert selectors('a{x="1", y=~"b|c"} > 0 unless on (z) rate(d_total{j!="e"}[10m]) > 0.5') == [
        Selector("a", (("x", "=", "1"), ("y", "=~", "b|c"))),
        Selector("d_total", (("j", "!=", "e"),)),
    ]
    assert selectors(
        "histogram_quantile(0.9, sum by (le, s) (rate(h_bucket[5m]))) or absent(up)"
    ) == [
        Selector("h_bucket", ()),
        Selector("up", ()),
    ]
    assert grouped_by("sum by (le, s) (x) / on (t) y") == {"le", "s", "t"}
    assert len(EXPRESSIONS) == 26
    for each in EXPRESSIONS:  # in which every metric has matchers
        assert len(selectors(each)) == each.count("{") > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_label_and_value_is_exported(
    exported: dict[str, list[dict[str, str]]], expression: str
) -> None:
    known = set(SCRAPED)
    for metric, matchers in ((each.metric, each.matchers) for each in selectors(expression)):
        if metric != "up":  # Prometheus's own
            assert metric in exported
        labels = {name for sample in exported.get(metric, []) for name in sample}
        known |= labels
        for label, operator, value in matchers:
            assert label in labels | SCRAPED, f"{metric} has no label {label}"
            if label == "code":
                values = CODES
            elif label in SCRAPED:
                continue
            else:
                values = {sample[label] for sample in exported[metric]}
            parts = value.split("|") if "~" in operator else [value]
            assert set(parts) <= values, f"{metric} has no {label} {set(parts) - values}"
    assert grouped_by(expression) <= known


def test_legends_and_words_name_labels_that_are_left(
    exported: dict[str, list[dict[str, str]]],
) -> None:
    for target in TARGETS:
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        (metric, *_) = [each.metric for each in selectors(target["expr"])]
        grouped = grouped_by(target["expr"])
        labels = {name for sample in exported[metric] for name in sample}
        has_sum = re.search(r"\b(sum|avg|max|min)\b", target["expr"])
        assert named <= (grouped if has_sum else labels | SCRAPED), target["legendFormat"]
    for rule in RULES:
        words = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", words)) <= {"instance"}


def test_the_dashboard_has_what_an_operator_asks() -> None:
    read = {each.metric for target in TARGETS for each in selectors(target["expr"])}
    assert read == {
        "eagle3_ready", "eagle3_tokens_total", "eagle3_body_bytes_total", "eagle3_bound_by",
        "eagle3_queued_requests", "eagle3_tokens_in_flight", "eagle3_bytes_in_flight",
        "eagle3_stage_seconds_bucket", "eagle3_draft_vocab_coverage", "eagle3_padding_share",
        "eagle3_rejections_total", "eagle3_requests_total", "eagle3_connections",
        "eagle3_draft_vocabs", "eagle3_device_memory_bytes", "process_resident_memory_bytes",
    }  # fmt: skip
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]
    for target in TARGETS:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for each in selectors(target["expr"]):
            assert ("instance", "=~", "$instance") in each.matchers


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at: Any = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_there_are_three_alerts_that_say_how_long_and_what_to_do() -> None:
    assert [rule["alert"] for rule in RULES] == [
        "Eagle3TargetDoesNotServe",
        "Eagle3RequestsFail",
        "Eagle3DraftVocabCoverageLow",
    ]
    for rule in RULES:
        assert {"for", "labels", "annotations"} <= set(rule)
        assert {"summary", "description"} == set(rule["annotations"])
