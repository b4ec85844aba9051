"""What a client and a server of one protocol version said to each other, kept as bytes.

`python -m tests.release.exchanges VERSION.json` records the sides of today; a recording is made
once a version and never again, since it stands for peers that are deployed.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from starlette.testclient import TestClient
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import pack_sequences
from eagle3_server import ServerSettings, TransformersTarget, create_app

V, DRAFT_IDS = 61, (7, 40, 3, 58, 21, 0, 33, 12, 50, 9)
ENCODINGS = ("probs", "logits", "hidden")
OUTPUTS = ("aux", "last_hidden", "last_hidden_prenorm", "argmax", "logsumexp", "position_mask",
           "loss_mask_probs", "loss_mask_logits", "draft_logsumexp")  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    method: str
    path: str
    request: bytes
    request_type: str
    status: int
    answer: bytes
    answer_type: str


def tiny() -> nn.Module:
    """A Llama of a few kilobytes; equal weights are not needed, equal dimensions are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=7, num_attention_heads=2,
        vocab_size=V, max_position_embeddings=64, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def padded() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    input_ids = torch.randint(1, V, (2, 9), generator=generator) * attention_mask
    return input_ids, attention_mask, attention_mask.clone()


def packed() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    documents = [torch.randint(1, V, (length,), generator=generator) for length in (5, 8)]
    return pack_sequences(documents, [torch.ones_like(each) for each in documents])


def talk(backend: RemoteEagle3Backend) -> dict[str, Any]:
    """Say everything that trainers say; returns what came of it by name."""
    mask = torch.zeros(V, dtype=torch.bool)
    mask[list(DRAFT_IDS)] = True
    backend.set_vocab_mapping(torch.tensor(DRAFT_IDS), mask)
    found: dict[str, Any] = {"info": backend.model_info()}
    found["padded"] = backend.generate_batch(*padded())
    found["packed"] = backend.generate_batch(**packed())
    found["capture"] = backend.capture(*padded(), outputs=OUTPUTS, aux_layer_ids=(0, 4))
    found["embeddings"] = backend.get_input_embeddings()
    found["head"] = backend.get_target_head()
    return found


@contextmanager
def server() -> Iterator[TestClient]:
    """Today's server."""
    app = create_app(TransformersTarget(tiny(), model_id="tiny"), ServerSettings(model="tiny"))
    with TestClient(app) as client:
        yield client


class Recorder(httpx.BaseTransport):
    """Hands requests to an app and keeps what was said."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.said: list[Exchange] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body, kind = request.read(), request.headers.get("content-type", "")
        headers = [(key.decode(), value.decode()) for key, value in request.headers.raw]
        path = request.url.raw_path.decode()
        answer = self.client.request(request.method, path, headers=headers, content=body)
        type_of_it = answer.headers["content-type"]
        self.said.append(
            Exchange(
                request.method, path, body, kind, answer.status_code, answer.content, type_of_it
            )
        )
        stream = httpx.ByteStream(answer.content)
        return httpx.Response(answer.status_code, headers=answer.headers.raw, stream=stream)


def record(path: Path) -> None:
    """Write what the sides of today say."""
    if path.exists():
        raise SystemExit(f"{path} exists: it stands for peers that are deployed")
    with server() as client:
        recorder = Recorder(client)
        for encoding in ENCODINGS:
            with RemoteEagle3Backend(
                "http://server", encoding=encoding, transport=recorder
            ) as backend:
                talk(backend)
    document = [
        {
            name: base64.b64encode(zlib.compress(value, 9)).decode()
            if isinstance(value, bytes)
            else value
            for name, value in asdict(each).items()
        }
        for each in dict.fromkeys(recorder.said)
    ]
    path.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")


def load(path: Path) -> list[Exchange]:
    """Read a recording."""
    return [
        Exchange(
            **{
                name: zlib.decompress(base64.b64decode(value))
                if name in ("request", "answer")
                else value
                for name, value in each.items()
            }
        )
        for each in json.loads(path.read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
