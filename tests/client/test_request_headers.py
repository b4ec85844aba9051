"""What a request says of itself: who asks, and until when the answer is wanted."""

from __future__ import annotations

import re
from typing import Any

import httpx
import torch

from eagle3_schemas.protocol import REQUEST_ID_PATTERN


def test_requests_name_the_trainer_and_the_time_it_waits(
    model: Any, serve: Any, connect: Any, batch_of: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu host/7 " + "x" * 99)
    bridge, seen = serve(model), []

    def observe(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return bridge.handle_request(request)

    backend = connect(httpx.MockTransport(observe), torch.tensor([3, 1]), timeout_s=7.5)
    backend.generate_batch(*batch_of(131))
    assert {headers["x-eagle3-deadline-ms"] for headers in seen} == {"7125"}
    (name,) = {headers["x-eagle3-client"] for headers in seen}
    assert re.match(REQUEST_ID_PATTERN, name)
    assert name.startswith("gpu_host_7_")
    assert "-3-" in name
