"""NeMo AutoModel's whole EAGLE-3 recipe on the CPU: `nemo_recipe.py KIND CONFIG.yaml LOSSES.json`.

KIND is `remote`, our client, by the code of docs/integrations.md; or `peer` or `ours`, that
co-located target. Of the recipe two things are replaced: its loader of a co-located target, which
needs CUDA, and the random state at the draft's first weights, which loading a target moves.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel as PeerTarget
from nemo_automodel.recipes.llm import train_eagle3
from tests import training_page
from tests.pages import run_by
from transformers import AutoModelForCausalLM

import eagle3_client
from eagle3_client import RemoteEagle3Backend
from eagle3_server import HFEagle3TargetModel

BLOCKS = (
    "tests/peer/test_nemo_recipe.py::"
    "test_the_whole_recipe_cannot_tell_our_remote_target_from_its_own"
)


class Exact(RemoteEagle3Backend):
    """Our client, bit for bit."""

    from_urls = partial(RemoteEagle3Backend.from_urls, exact=True)  # type: ignore[assignment]


class Recipe(train_eagle3.TrainEagle3Recipe):  # type: ignore[misc]
    """The recipe, its losses written down."""

    kind = "remote"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.losses: list[float] = []

    def _setup_colocated_target(self, _cfg: Any, path: str, _draft: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.target_model = model.requires_grad_(False)
        target = PeerTarget if self.kind == "peer" else HFEagle3TargetModel
        self.target_wrapper = target(self.target_model)

    def _setup_online_target(self, *arguments: Any) -> Any:
        found = super()._setup_online_target(*arguments)
        torch.manual_seed(0)
        return found

    def _forward_batch(self, batch: Any, target_batch: Any = None) -> Any:
        assert (target_batch is not None) == (self.kind == "remote"), "nothing was prefetched"
        metrics = super()._forward_batch(batch, target_batch)
        self.losses.append(metrics.loss.item())
        return metrics


def main() -> None:
    kind, config, file = sys.argv[1:]
    sys.argv[1:] = ["--config", config]
    Recipe.kind = kind
    recipes: list[Recipe] = []
    train_eagle3.TrainEagle3Recipe = lambda cfg: recipes.append(Recipe(cfg)) or recipes[-1]
    if kind == "remote":
        eagle3_client.RemoteEagle3Backend = Exact  # type: ignore[misc]
        training_page.run(run_by(BLOCKS)[:1], {})
    else:
        train_eagle3.main()
    Path(file).write_text(json.dumps(recipes[0].losses))


if __name__ == "__main__":
    main()
