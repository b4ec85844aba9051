"""docs/training.md does what it says."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import training_page as page
from tests.pages import DOCS

from eagle3_client import FingerprintMismatch, InvalidRequest, RemoteEagle3Backend
from eagle3_schemas.packing import restarting_positions

PAGE = DOCS / "training.md"


@pytest.fixture
def names(live_server: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader of the page has already, and in `steps` what was trained on."""
    monkeypatch.setenv("EAGLE3_URLS", live_server(build_model("llama")))
    steps: list[Any] = []
    return {
        "device": "cpu",
        "selected_token_ids": torch.arange(20),
        "selected_token_mask": torch.arange(131) < 20,
        "batches": page.batches(7),
        "step": steps.append,
        "steps": steps,
    }


def test_one_process(
    names: dict[str, Any], documented: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    page.run(documented, names)
    assert len(names["steps"]) == 7
    assert "bottleneck" in capsys.readouterr().out


def test_the_loss(target: Any, documented: list[str]) -> None:
    """Its gradient at the logits is the definition's: softmax less target, in supervised rows."""
    (ids, *masks), *_ = page.batches(1)
    supervision = target.generate_batch(ids, *masks)
    logits = torch.randn(2, 9, 20, requires_grad=True)
    names = page.run(documented, {"supervision": supervision, "draft": lambda _: logits})
    names["loss"].backward()
    rows = supervision.position_mask[..., 0]
    assert rows.any()
    assert not rows.all()
    expected = (logits.softmax(-1) - supervision.target_probs).detach() / rows.sum()
    expected[~rows] = 0
    # Rounding of two ways to the same number.
    torch.testing.assert_close(logits.grad, expected, atol=1e-7, rtol=1e-4)


def test_resume(
    names: dict[str, Any],
    documented: list[str],
    live_server: Any,
    build_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that broke after four steps goes on with the fifth, on its own target and mapping."""
    saves: list[dict[str, Any]] = []
    names |= {
        "save_every": 4,
        "load_checkpoint": lambda: saves[-1] if saves else None,
        "save_checkpoint": lambda state: saves.append(dict(state)),
    }
    page.run(documented, names)
    assert len(names["steps"]) == 7
    assert [each["step"] for each in saves] == [4]
    page.run(documented, names)
    assert len(names["steps"]) == 7 + 3
    first = names["steps"][4].aux_hidden_states
    assert torch.equal(names["steps"][7].aux_hidden_states, first)

    saves[-1]["draft_vocab"] = names["selected_token_ids"].flip(0), names["selected_token_mask"]
    with pytest.raises(InvalidRequest, match="other tokens"):
        page.run(documented, names)
    saves[-1]["draft_vocab"] = names["selected_token_ids"], names["selected_token_mask"]
    monkeypatch.setenv("EAGLE3_URLS", live_server(build_model("llama", seed=1)))
    with pytest.raises(FingerprintMismatch, match="run began with"):
        page.run(documented, names)


def test_a_fleet(
    live_server: Any,
    build_model: Any,
    documented: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    urls = [live_server(build_model("llama")) for _ in range(2)]
    names = page.run(documented, {"urls": urls})
    assert capsys.readouterr().out.split()[1] == "4"
    names["target"].close()


def test_the_same_host(
    live_server: Any, build_model: Any, documented: list[str], tmp_path: Path
) -> None:
    url = live_server(build_model("llama"), unix=tmp_path / "eagle3.sock")
    (code,) = documented
    assert code.count("unix:///run/eagle3.sock") == 1
    names = page.run([code.replace("unix:///run/eagle3.sock", url)], {})
    assert names["target"].model_info().model_id == "tiny"
    names["target"].close()


def test_draft_vocab(
    live_server: Any, build_model: Any, batch_of: Any, documented: list[str], tmp_path: Path
) -> None:
    assert len(documented) == 4
    code = "".join(documented)
    for printed, real in [
        ("http://target-host:8001", live_server(build_model("llama"))),
        ("~/.cache/eagle3-remote", str(tmp_path)),
    ]:
        assert code.count(printed) == 1
        code = code.replace(printed, real)

    def batches(seed: int) -> list[dict[str, torch.Tensor]]:
        return [vars(batch_of(131, seed=seed)), vars(batch_of(131, seed=seed + 1))]

    scope: dict[str, Any] = {
        "training_batches": batches(0),
        "held_out_batches": batches(7),
        "draft_vocab_size": 20,
        "special_token_ids": [2, 1],
        "draft_head": torch.nn.Linear(48, 20),
    }
    page.run([code], scope)
    scope["target"].close()

    counts = [0] * 131
    for batch in scope["training_batches"]:
        for token_id, is_counted in zip(
            batch["input_ids"].flatten().tolist(),
            batch["loss_mask"].flatten().tolist(),
            strict=True,
        ):
            counts[token_id] += bool(is_counted)
    by_count = sorted(set(range(131)) - {1, 2}, key=lambda i: (-counts[i], i))
    ids = [2, 1, *by_count][:20]
    assert scope["selected_token_ids"].tolist() == ids
    assert 0 < scope["coverage"] < 1
    assert scope["mapping"][0].tolist() == sorted(ids)
    assert torch.equal(
        scope["head_weight"], scope["draft_head"].weight[torch.tensor(ids).sort()[1]]
    )
    assert scope["config"]["draft_vocab_size"] == 20
    assert scope["embed_tokens"].weight.shape == (131, 48)
    assert len(list(tmp_path.iterdir())) == 1
    text = PAGE.read_text(encoding="utf-8")
    for field in scope["config"]:
        assert f"`{field}`" in text, field


@pytest.fixture
def target(live_server: Any, build_model: Any) -> Any:
    with RemoteEagle3Backend(live_server(build_model("llama")), exact=True) as target:
        target.set_vocab_mapping(torch.arange(20), torch.arange(131) < 20)
        yield target


def test_packed_rows(target: Any, documented: list[str]) -> None:
    """A document's aux states are those it has alone."""
    seq_lens = torch.tensor([[5, 4], [9, 0]])
    positions = restarting_positions(seq_lens, 9)
    ids, ones = torch.randint(131, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    given = {
        "input_ids": ids,
        "attention_mask": ones,
        "loss_mask": ones,
        "position_ids": positions,
        "seq_lens": seq_lens,
        "doc_remaining": positions.flip(1),
    }
    names = page.run(documented, {"target": target, **given})
    for name in ("position_ids", "seq_lens", "doc_remaining"):
        assert names["trainer_inputs"][name].equal(given[name])
    alone = target.generate_batch(ids[:1, 5:], ones[:1, 5:], ones[:1, 5:]).aux_hidden_states
    # Another shape: rounding, where the neighbour's tokens would be of the order of 1.
    torch.testing.assert_close(names["batch"].aux_hidden_states[:1, 5:], alone)


def test_sequences_of_unequal_length(target: Any, documented: list[str]) -> None:
    sequences = [torch.randint(131, (length,)) for length in (6, 3)]
    masks = [torch.ones(length, dtype=torch.long) for length in (6, 3)]
    names = page.run(documented, {"target": target, "sequences": sequences, "loss_masks": masks})
    batch = names["batch"]
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    alone = target.generate_batch(sequences[1][None], masks[1][None], masks[1][None])
    torch.testing.assert_close(batch.aux_hidden_states[1:, :3], alone.aux_hidden_states)


def test_every_option_of_the_client_is_on_the_page_with_its_default() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Options of the client")[2]
    table = "".join(line.split("|")[1] for line in section.splitlines() if line[:3] == "| `")
    for name, parameter in inspect.signature(RemoteEagle3Backend).parameters.items():
        assert f"`{name}`" in table, name
        default = parameter.default
        if isinstance(default, (str, float)) and not isinstance(default, bool):
            shown = f'"{default}"' if isinstance(default, str) else f"{default:g}"
            assert shown in table, (name, shown)
