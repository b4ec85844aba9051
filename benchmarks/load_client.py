"""The trainers of the load benchmark, its probe, and the loop without a server; `load.py` asks."""

from __future__ import annotations

import argparse
import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from children import answer_commands
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab
from eagle3_server import TransformersTarget
from eagle3_server.allocator import keep_freed_memory
from eagle3_server.engine import SupervisionJob

DEPTH = 2
PROBE_EVERY_S = 0.02


class Commands:
    """What a child of `load.py` does; each returns what JSON can carry."""

    def __init__(self, plan: Path, url: str | None, checkpoint: Path | None) -> None:
        loaded = torch.load(plan)
        self._trainers: list[list[tuple[torch.Tensor, ...]]] = loaded["trainers"]
        self._vocabs: list[tuple[torch.Tensor, torch.Tensor]] = loaded["vocabs"]
        self._url = url
        self._stop = threading.Event()
        self._probed: list[float] = []
        self._backends: list[RemoteEagle3Backend] = []
        if url is not None:
            for number in range(len(self._trainers)):
                backend = RemoteEagle3Backend(url, encoding="probs", max_in_flight=DEPTH)
                backend.set_vocab_mapping(*self._vocab(number))
                self._backends.append(backend)
        if checkpoint is not None:
            disable_progress_bar()
            keep_freed_memory()
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            self._target = TransformersTarget(model, model_id="bare")

    def train(self, count: int) -> dict[str, Any]:
        """Let all trainers get `count` batches each at once; each one's waits in seconds."""

        def one(number: int) -> list[float]:
            batches = islice(self._trainers[number], count)
            waits, started = [], time.perf_counter()
            for _ in self._backends[number].prefetch(batches, DEPTH):
                now = time.perf_counter()
                waits.append(now - started)
                started = now
            return waits

        started = time.perf_counter()
        with ThreadPoolExecutor(len(self._trainers)) as pool:
            waits = list(pool.map(one, range(len(self._trainers))))
        return {"seconds": time.perf_counter() - started, "waits": waits}

    def alone(self) -> None:
        """Let the first trainer get the largest batch of all by itself."""
        largest = max((b for some in self._trainers for b in some), key=lambda b: b[0].numel())
        self._backends[0].generate_batch(*largest)

    def bare(self, count: int) -> dict[str, Any]:
        """Supervise the same batches one after the other, without a server."""
        started = time.perf_counter()
        for index in range(count):
            for number, batches in enumerate(self._trainers):
                input_ids, attention_mask, loss_mask = batches[index]
                self._target.supervise(
                    SupervisionJob(
                        input_ids=input_ids,
                        attention_mask=attention_mask.bool(),
                        loss_mask=loss_mask.bool(),
                        aux_layer_ids=self._target.describe().aux_layer_ids or (),
                        draft_vocab=DraftVocab.from_ids(*self._vocab(number)),
                        encoding="probs",
                        rows="position_mask",
                        aux_dtype="model",
                        exact=False,
                    )
                )
        return {"seconds": time.perf_counter() - started}

    def probe(self) -> None:
        """Begin to ask `/healthz` fifty times a second."""
        self._stop.clear()
        self._probed = []
        self._thread = threading.Thread(target=self._probing)
        self._thread.start()

    def probed(self) -> list[float]:
        """Stop asking; the seconds each answer took."""
        self._stop.set()
        self._thread.join()
        return self._probed

    def _probing(self) -> None:
        parts = urlsplit(self._url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        while not self._stop.wait(PROBE_EVERY_S):
            started = time.perf_counter()
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise RuntimeError(f"/healthz answered {response.status}")
            self._probed.append(time.perf_counter() - started)
        connection.close()

    def _vocab(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._vocabs[number % len(self._vocabs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--url")
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    commands = Commands(arguments.plan, arguments.url, arguments.checkpoint)
    names = ("alone", "train", "bare", "probe", "probed")
    answer_commands({name: getattr(commands, name) for name in names})


if __name__ == "__main__":
    main()
