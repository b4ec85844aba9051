"""Run as a script: ranks that ask for the same downloads at once, each a process of its own.

Reads `{"url", "cache_dir", "ranks"}` as JSON; each rank prints the SHA-256 of its embeddings and of
a batch that needs the draft head.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas.tensors import byte_view

DRAFT_IDS = torch.arange(100, 20, -1)
BATCH = (torch.arange(10)[None], torch.ones(1, 10), torch.ones(1, 10))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(byte_view(tensor.contiguous())).hexdigest()


def rank(url: str, cache_dir: str) -> None:
    mask = torch.zeros(131, dtype=torch.bool)
    mask[DRAFT_IDS] = True
    with RemoteEagle3Backend(
        url, cache_dir=cache_dir, encoding="hidden", retry_for_s=60
    ) as backend:
        embeddings = digest(backend.get_input_embeddings().weight)
        backend.set_vocab_mapping(DRAFT_IDS, mask)
        probs = backend.generate_batch(*BATCH).target_probs
        assert probs is not None
        line = json.dumps({"embeddings": embeddings, "probs": digest(probs)})
    os.write(1, line.encode() + b"\n")


def main() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(1)
    start, go = os.pipe()
    children = []
    for _ in range(asked["ranks"]):
        if (child := os.fork()) == 0:
            os.close(go)
            os.read(start, 1)  # ends for all at once, when the parent closes the other end
            try:
                rank(asked["url"], asked["cache_dir"])
            except BaseException as exc:
                os.write(2, repr(exc).encode())
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(go)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
