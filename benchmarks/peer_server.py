"""The peer's target server in a process of its own: NeMo AutoModel 0.7.0, unchanged.

Its own launcher loads the model through its whole training stack, which is not needed here: this
loads it by transformers, as that does in the end, and hands it to the peer's `serve`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from children import LOOPBACK
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


def main() -> None:
    from nemo_automodel.components.speculative.eagle.remote.server import TargetModelServer, serve
    from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--aux-layer-ids", type=int, nargs=3, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    target = HFEagle3TargetModel(
        model.eval().requires_grad_(False), aux_layer_ids=arguments.aux_layer_ids
    )
    serve(TargetModelServer(target, nccl_port=0), LOOPBACK, arguments.port)


if __name__ == "__main__":
    main()
