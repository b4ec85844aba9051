"""The checks that were made of a target at load, made anew of one that is being served.

Each holds what requests are served by against the model's own forward, run by transformers alone.
None branches on what it finds before its last forward: the ranks of a group stay in step whatever
each of them finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.packing import documents_of
from eagle3_schemas.self_check import SelfCheck
from eagle3_server.capture_probe import compare_capture, relative_difference, same_bits
from eagle3_server.device_errors import is_fatal, is_out_of_memory
from eagle3_server.forward import ForwardResult, forward_logits, forward_with_aux
from eagle3_server.head import RowsHead, cut_head, probe_batch
from eagle3_server.layout import decoder_layers
from eagle3_server.packing import PackingRoute, forward_packed
from eagle3_server.packing_probe import Leak, largest_difference, leak_probe
from eagle3_server.running import JobRunner

PROBE_TOKENS: Final = 66
"""Tokens of the largest forward of a check."""

# Times what may differ at load, where rows are as long in both: other shapes round otherwise, and
# recurrent layers and experts amplify it. A leak, or a lost window, is 0.1 and more.
_SLACK: Final[dict[PackingRoute, float]] = {"masked": 3.0, "documents": 10.0}
# ... and what it may be, relative, where activations are quantised over all rows of a batch.
_DEPENDENT: Final = 0.3
_NOISE: Final = 10.0  # times what two equal forwards differ by: below, it may be that and no more


def check_target(name: str, runner: JobRunner, num_layers: int) -> SelfCheck:
    """Make one of the checks; every rank of a group must call it.

    Args:
        name: one of `SELF_CHECKS`.
        runner: what requests are served by.
        num_layers: of the target, as it was described at load.

    Raises:
        InvalidRequest: no such check.
        Exception: what the model's forward raised.
    """
    checks: dict[str, Callable[[], SelfCheck]] = {
        "hooks": lambda: _check_hooks(runner, num_layers),
        "head": lambda: _check_head(runner),
        "packing": lambda: _check_packing(runner),
        "bits_repeat": lambda: _check_bits_repeat(runner),
    }
    if name not in checks:
        raise InvalidRequest(f"no check is named {name!r}; expected one of {', '.join(checks)}")
    return checks[name]()


def _check(
    name: str,
    status: Literal["passed", "failed", "not_applicable"],
    words: str,
    difference: float | None = None,
) -> SelfCheck:
    if difference is not None and not math.isfinite(difference):
        difference = None  # JSON has no such numbers; the words say it
    return SelfCheck(name=name, status=status, words=words, largest_difference=difference)


def _check_hooks(runner: JobRunner, num_layers: int) -> SelfCheck:
    found = compare_capture(runner.model, num_layers)
    if found.status == "not comparable":
        return _check("hooks", "not_applicable", f"not comparable: {found.words}")
    status: Any = "passed" if found.status == "verified" else "failed"
    return _check("hooks", status, found.words, found.largest_difference)


def _check_head(runner: JobRunner) -> SelfCheck:
    """Rows of the probe through the head that is served by, against the model's full logits."""
    head = runner.head
    if head is None:
        words = "the head runs for every position: its full logits are what is served"
        return _check("head", "not_applicable", words)
    forward = partial(forward_logits, runner.model)
    batch = probe_batch(runner.model)
    given: list[torch.Tensor] = []
    handle = head.module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        logits, _ = forward(*batch), forward(*batch)
    finally:
        handle.remove()
    cut, reason = _cut_forward(forward, head, batch)
    if len(given) != 2:
        return _check("head", "failed", "the model's forward does not call the head that is served")
    found = [*head.compare(given[0], logits)]  # all of it, so that ranks stay in step
    worst = max(error if error == error else math.inf for _, error, _ in found)
    wrong = [count for count, _, is_same in found if not is_same]
    rows, width = given[0].shape[:2].numel(), logits.shape[-1]
    if wrong:
        by = f"by {worst:.3g}" if math.isfinite(worst) else "in what is not finite"
        words = f"{wrong[0]} rows differ from the model's full logits {by}"
        return _check("head", "failed", words, worst)
    if cut is not None and not same_bits(cut, given[0]):
        apart = relative_difference(cut, given[0])
        if not apart <= _NOISE * relative_difference(given[1], given[0]):
            reason = f"the head is given something else ({apart:.2g} away, relative)"
    if reason is not None:
        return _check("head", "failed", f"with a head that is cut to the rows asked for, {reason}")
    equal = "equal" if worst == 0 else f"are, to {worst:.2g},"
    words = f"{rows} rows x {width:,} ids {equal} the model's full logits"
    return _check("head", "passed", words, worst)


def _cut_forward(
    forward: Callable[..., torch.Tensor], head: RowsHead, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor | None, str | None]:
    """Return what a cut head is given, as requests have it, or why it is not."""
    try:
        with cut_head(head.module) as inputs:
            logits = forward(*batch)
    except Exception as exc:  # whatever a model does with logits of an unexpected shape
        if is_fatal(exc) or is_out_of_memory(exc):
            raise
        return None, f"its forward fails: {exc!r:.200}"
    if len(inputs) != 1 or logits.shape[1] != 1:
        return None, "its forward gives other logits than asked for"
    return inputs[0], None


def _check_packing(runner: JobRunner) -> SelfCheck:
    """Documents packed as requests' are, against each one alone, and beside another neighbour."""
    model, layers = runner.model, range(len(decoder_layers(runner.model)))
    seq_lens, input_ids, changed = leak_probe(model)
    input_ids, changed = input_ids.to(runner.device), changed.to(runner.device)
    alone = _alone(runner, input_ids, seq_lens)
    ways = {}
    if runner.can_trim or runner.packing.route == "documents":
        ways["each document as a row of its own"] = runner.packing.by_document()
    if runner.packing.route == "masked":
        ways["in one forward under a mask"] = runner.packing
    leaks: dict[str, Leak] = {}
    noise = 0.0
    for way, packing in ways.items():
        packed, again, moved = (
            forward_packed(model, packing, ids, seq_lens, layers, None, runner.context)
            for ids in (input_ids, input_ids, changed)
        )
        leaks[way] = Leak.of(alone, packed, moved, _SLACK[packing.route])
        noise = max(noise, largest_difference(packed, again))
    worst = max(leak.difference for leak in leaks.values())
    for way, leak in leaks.items():
        if leak.reason is None:
            continue
        if leak.difference <= _NOISE * noise:
            words = f"two equal forwards differ by {noise:.2g} (relative): documents cannot be told"
            return _check("packing", "not_applicable", words, noise)
        if not runner.can_trim and leak.difference <= _DEPENDENT:
            words = f"rows of this target depend on one another: {way}, {leak.reason}"
            return _check("packing", "not_applicable", words, worst)
        return _check("packing", "failed", f"{way}: {leak.reason}", worst)
    words = (
        f"packed documents are as each is alone, to {worst:.1e}, and do not move when a neighbour "
        f"changes ({'; '.join(reversed(ways))})"
    )
    return _check("packing", "passed", words, worst)


def _alone(runner: JobRunner, input_ids: torch.Tensor, seq_lens: torch.Tensor) -> ForwardResult:
    """Run each document by itself; the result is laid out as the packed rows."""
    layers = range(len(decoder_layers(runner.model)))
    rows: dict[int, list[ForwardResult]] = {}
    for each in documents_of(seq_lens):
        ids = input_ids[each.row : each.row + 1, each.start : each.start + each.length]
        result = forward_with_aux(runner.model, ids, torch.ones_like(ids), layers)
        rows.setdefault(each.row, []).append(result)

    def joined(part: Callable[[ForwardResult], torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.cat([part(each) for each in row], 1) for row in rows.values()])

    states = tuple(joined(lambda result, i=i: result.aux_states[i]) for i in layers)  # type: ignore[misc]
    return ForwardResult(states, joined(lambda result: result.logits), None)


def _check_bits_repeat(runner: JobRunner) -> SelfCheck:
    batch, layers = probe_batch(runner.model), range(len(decoder_layers(runner.model)))
    first, second = (
        forward_with_aux(runner.model, *batch, layers, context=runner.context) for _ in range(2)
    )
    pairs = [*zip(first.aux_states, second.aux_states, strict=True), (first.logits, second.logits)]
    if all(same_bits(a, b) for a, b in pairs):
        words = "two equal forwards have equal bits, in every layer and in the logits"
        return _check("bits_repeat", "passed", words, 0.0)
    worst = largest_difference(first, second)
    words = f"two equal forwards differ by {worst:.2g} (relative)"
    return _check("bits_repeat", "failed", words, worst)
