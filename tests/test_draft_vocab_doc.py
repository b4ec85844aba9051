"""The code of docs/draft-vocab.md runs as printed, with only the URL and the folder replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "draft-vocab.md"


def test_the_code_runs_as_printed(
    live_server: Any, build_model: Any, batch_of: Any, tmp_path: Path
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    code = "".join(blocks)
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
    exec(code, scope)
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
    for field in scope["config"]:
        assert f"`{field}`" in text, field


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / link).exists(), link
