"""What a preflight measures of a server: round trip, supervision, and what the link carried."""

from __future__ import annotations

import re
import statistics
import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

import torch

from eagle3_client.config import ClientSettings, choose_encoding
from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.aux_states import aux_shapes
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import ProtocolMismatch
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.tensors import DTYPES
from eagle3_schemas.tokens import TokenBatch

ROUND_TRIPS: Final = 9
SURE_BYTES: Final = 4 << 20
"""Size of an answer below which its travel gives a lower bound of the bandwidth."""
_FIRST_BYTES = 2 << 20
_FIRST_S = 0.5
_FIRST_TOKENS = 128
_ANSWER_BYTES = 24 << 20
_PART_S = 2.5
"""Seconds that the larger answer may take to compute, and again to travel."""
_REPEATS_S = 1.5
_REPEATS = 3
_MAX_ROW = 512


@dataclass(frozen=True)
class Exchange:
    """One timed supervision request."""

    batch_size: int
    sequence_length: int
    elapsed_s: float
    answer_bytes: int
    row_bytes: int
    """Of one supervised row, as it came."""
    stages: dict[str, float]
    """Seconds, as the server's `server-timing` named them; empty if it did not."""

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch_size * self.sequence_length

    @property
    def compute_s(self) -> float | None:
        """Seconds that the model was busy with it: forward and head."""
        if "compute" not in self.stages:
            return None
        return self.stages["compute"] + self.stages.get("head", 0.0)

    def transfer_s(self, round_trip_s: float) -> float | None:
        """Seconds the answer took to travel; None if that is too short to be told from noise."""
        if "total" not in self.stages:
            return None
        spent = self.elapsed_s - self.stages["total"] - round_trip_s
        return spent if spent > max(0.001, round_trip_s / 2) else None


@dataclass(frozen=True)
class Cost:
    """Bytes a token of the encoding that is chosen for a trainer."""

    encoding: str
    aux_bytes: float
    row_bytes: float
    supervised_share: float
    draft_vocab_size: int

    @property
    def bytes_per_token(self) -> float:
        """For an attended token, with the assumed share of supervised ones."""
        return self.aux_bytes + self.row_bytes * self.supervised_share

    @classmethod
    def of(
        cls,
        settings: ClientSettings,
        info: ModelInfo,
        draft_vocab_size: int,
        supervised_share: float,
        row_bytes: int | None = None,
    ) -> Cost:
        """Compute it from what the server says; `row_bytes` as measured, if it was."""
        dtype, encoding = DTYPES[info.dtype], choose_encoding(settings, info)
        shapes = aux_shapes(1, 3 * info.hidden_size, settings.aux_dtype, dtype).values()
        by_encoding = {
            "probs": draft_vocab_size * 4,
            "logits": draft_vocab_size * dtype.itemsize,
            "hidden": info.hidden_size * dtype.itemsize,
        }
        return cls(
            encoding,
            sum(shape[1] * each.itemsize for shape, each in shapes),
            by_encoding[encoding] if row_bytes is None else row_bytes,
            supervised_share,
            draft_vocab_size,
        )


def round_trip_s(connection: Connection, timeout_s: float) -> float:
    """Return the median of several small GETs on one connection, seconds."""
    times = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        connection.check_alive(timeout_s)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one may have connected


class Probe:
    """Sends supervision requests of a chosen size: random ids, all attended.

    Args:
        connection: to the server.
        settings: of the trainer: encoding, layers, aux dtype.
        info: what the server serves.
        cost: that the answers will have.
    """

    def __init__(
        self, connection: Connection, settings: ClientSettings, info: ModelInfo, cost: Cost
    ) -> None:
        self._connection, self._settings, self._info, self._cost = connection, settings, info, cost
        self._vocab = DraftVocab.from_ids(torch.arange(cost.draft_vocab_size))

    def first(self) -> Exchange:
        """Send a small one, about 2 MiB at most, once the server has the draft vocab.

        A quick one is repeated, since a server's first one may be slow; the faster one counts.
        """
        self._connection.ensure_registered(self._vocab, self._info.vocab_size)
        count = int(_FIRST_BYTES / self._cost.bytes_per_token)
        count = min(max(count, 8), _FIRST_TOKENS)
        first = self._ask(count)
        if first.elapsed_s > _FIRST_S:
            return first
        return min(first, self._ask(count), key=lambda each: each.elapsed_s)

    def larger(self, first: Exchange, round_trip: float) -> Exchange:
        """Send one of up to 24 MiB, as far as `first` lets expect it to take a few seconds.

        A quick one is repeated, and the answer that travelled fastest counts; `first` does if no
        larger one is worth it.
        """
        tokens = _ANSWER_BYTES / self._cost.bytes_per_token
        if busy_s := first.stages.get("total", first.elapsed_s) - first.stages.get("queue", 0.0):
            tokens = min(tokens, _PART_S * first.tokens / busy_s)
        if travelled_s := first.transfer_s(round_trip):
            tokens = min(tokens, _PART_S * first.tokens / travelled_s)
        tokens = min(tokens, self._info.limits.max_tokens_per_request)
        if tokens < 1.5 * first.tokens:
            return first
        started, best = time.perf_counter(), self._ask(int(tokens))
        for _ in range(_REPEATS - 1):
            if time.perf_counter() - started > _REPEATS_S:
                break
            other = self._ask(int(tokens))
            best = min(best, other, key=lambda each: each.elapsed_s - each.stages.get("total", 0.0))
        return best

    def _ask(self, tokens: int) -> Exchange:
        info, settings = self._info, self._settings
        limits = info.limits
        longest = min(_MAX_ROW, limits.max_sequence_length or _MAX_ROW)
        length = max(min(tokens, longest, limits.max_tokens_per_request), 1)
        size = max(min(tokens, limits.max_tokens_per_request) // length, 1)
        bound = min(info.vocab_size, info.input_vocab_size)
        ids = torch.randint(bound, (size, length), generator=torch.Generator().manual_seed(0))
        request, frame = pack_request(
            TokenBatch(
                ids,
                torch.ones(size, length, dtype=torch.bool),
                spread_mask(size, length, self._cost.supervised_share),
            ),
            request_id=uuid.uuid4().hex,
            draft_vocab_digest=self._vocab.digest,
            aux_layer_ids=settings.aux_layer_ids or info.aux_layer_ids,
            encoding=self._cost.encoding,
            rows="all" if settings.rows == "all" else "loss_mask",
            aux_dtype=settings.aux_dtype,
            exact=settings.exact,
        )
        answer = self._connection.supervise_timed(frame, request.request_id)
        rows = answer.frame.tensors.get(ENCODINGS[self._cost.encoding].tensor_name)
        if rows is None or rows.ndim != 2:
            raise ProtocolMismatch(
                f"expected an answer with {self._cost.encoding}; got {sorted(answer.frame.tensors)}"
                ". Check that both sides have the same version",
                url=self._connection.url,
            )
        return Exchange(
            size,
            length,
            answer.elapsed_s,
            answer.body_bytes,
            rows.shape[1] * rows.element_size(),
            parse_timing(answer.server_timing),
        )


def spread_mask(size: int, length: int, share: float) -> torch.Tensor:
    """Return [size, length] bool that is true for `share` of it, evenly: each part costs alike."""
    steps = (torch.arange(length + 1) * share).long()
    return (steps[1:] > steps[:-1]).expand(size, length).contiguous()


def parse_timing(header: str) -> dict[str, float]:
    """`queue;dur=0.2, compute;dur=81.0` -> seconds by name; what is of another form is left out."""
    found = re.findall(r"(\w+);dur=(\d{1,9}(?:\.\d{1,9})?)(?=,|$)", header[:1000])
    return {name: float(value) / 1000 for name, value in found}


def say_exchange(exchange: Exchange) -> str:
    """Say what a request took."""
    spent = ", ".join(f"{name} {1000 * s:.1f}" for name, s in exchange.stages.items())
    return (
        f"{exchange.batch_size} x {exchange.sequence_length} tokens in "
        f"{1000 * exchange.elapsed_s:.1f} ms, {say_bytes(exchange.answer_bytes)}; on the server "
        f"{spent + ' ms' if spent else 'not said'}"
    )


def values_of(exchange: Exchange) -> dict[str, Any]:
    """Return it by the keys of the report, milliseconds."""
    stages = {"server" if n == "total" else n: s for n, s in exchange.stages.items()}
    return {
        "batch_size": exchange.batch_size,
        "sequence_length": exchange.sequence_length,
        "elapsed_ms": round(1000 * exchange.elapsed_s, 3),
        "answer_bytes": exchange.answer_bytes,
        **{f"{name}_ms": round(1000 * seconds, 3) for name, seconds in stages.items()},
    }


def say_bytes(count: float) -> str:
    """Say a number of bytes."""
    if count < 1024:
        return f"{count:.0f} B"
    power = 1 if count < 1 << 20 else 2 if count < 1 << 30 else 3
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
